"""SARA and Mo-SARA: the rank rule against fp64 SVDs, the layers against their equations, starts, files and budgets."""
import copy
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import adapter
import sara
from tests.toy import perturb, tokens, toy_model
from weights import adapter_file
from weights.safetensors import write_safetensors

BOTH = pytest.mark.parametrize("attach", [sara.attach, sara.attach_mosara])
SHARES = (0.01, 0.02, 0.05, 0.1, 0.5)
ROUTED = {"Lam", "v", "W_g1", "W_g2"}
NAMES = [f"model.layers.{i}.self_attn.{target}" for i in range(2) for target in sara.TARGETS]  # of the toy model


def linear_host(out=24, inner=40, bias=True):
    """A model of one linear, called "0", and tokens (3, 5, in) for it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inner, out, bias=bias)), torch.randn(3, 5, inner)


def filled(attach, out=24, inner=40, bias=True, **options):
    """An attached host in fp64 with random factors, its layer and its tokens."""
    host, x = linear_host(out, inner, bias)
    attach(host, targets=["0"], **options)
    return perturb(host.double(), 0.5), host[0], x.double()


def gradients(host, x):
    """{name of a tensor of layer 0: its gradient} for some loss, zeros where autograd has none."""
    host.zero_grad()
    y = host(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (y * weights + y.square()).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in host[0].named_parameters()}


def moving(host, x):
    """The names of the tensors that have a gradient at all."""
    return {name for name, gradient in gradients(host, x).items() if gradient.any()}


def step(host, x, lr=1e-2):
    for name, gradient in gradients(host, x).items():
        getattr(host[0], name).data -= lr * gradient


# ---- the rank rule --------------------------------------------------------------------------------------------------

def test_rank_of_a_known_spectrum():
    """diag(4, 3, 2, 1): shares are of the sum of sigma (not of its squares), and one reached exactly is enough."""
    sigma = sara.spectrum(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    assert [sara.choose_rank(sigma, m) for m in (0.4, 0.41, 0.7, 0.71, 1.0)] == [1, 2, 2, 3, 4]


def test_rank_of_a_zero_matrix_is_one():
    """There is no share to reach, and no layer without a rank."""
    assert [sara.choose_rank(sara.spectrum(torch.zeros(6, 4)), m) for m in (0.01, 1.0)] == [1, 1]


def test_boundary_has_a_slack_of_a_billionth():
    """A share missed by 5e-10 of the total counts as reached, one missed by 1e-8 does not."""
    sigma = torch.ones(2, dtype=torch.float64)
    assert [sara.choose_rank(sigma, 0.5 + excess) for excess in (2.5e-10, 5e-9)] == [1, 2]


def test_rank_grows_with_the_threshold_and_ignores_scale_and_transpose():
    """k is non-decreasing in m, ends at min(out, in), and is that of W^T, 1e-6 W and 1e6 W."""
    torch.manual_seed(0)
    W = torch.randn(24, 40)
    thresholds = [i / 200 for i in range(1, 201)]
    ks, *others = ([sara.choose_rank(sigma, m) for m in thresholds]
                   for sigma in map(sara.spectrum, (W, W.T, 1e-6 * W, 1e6 * W)))
    assert ks == sorted(ks) and ks[0] == 1 and ks[-1] == 24 and others == 3 * [ks]


def test_rank_at_one_counts_the_nonzero_singular_values():
    """k(1) of a rank-8 64 x 64 matrix is 8: what rounding leaves of the other 56 is cut off."""
    torch.manual_seed(0)
    low = torch.randn(64, 8, dtype=torch.float64) @ torch.randn(8, 64, dtype=torch.float64)
    assert sara.choose_rank(sara.spectrum(low), 1.0) == 8
    assert sara.choose_rank(sara.spectrum(torch.diag(torch.tensor([3.0, 0.0, 1e-3, 2.0]))), 1.0) == 3


@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (1536, 576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spectrum_against_the_fp64_svd(shape, dtype):
    """Within a caller's autocast too, the Gram route is in fp64, descending, within 1e-10 of sigma_1, and gives the SVD's k."""
    torch.manual_seed(0)
    W = torch.randn(shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        sigma = sara.spectrum(W)
    exact = torch.linalg.svdvals(W.double())
    assert sigma.dtype == torch.float64 and (sigma.diff() <= 0).all()
    assert (sigma - exact).abs().max() <= 1e-10 * exact[0]
    assert [sara.choose_rank(sigma, m) for m in SHARES] == [sara.choose_rank(exact, m) for m in SHARES]


def test_exact_boundary_of_a_rotated_spectrum():
    """64, 63, ..., 1 between rotations: m = 64 / 2080 is reached by one value, 127 / 2080 by two."""
    torch.manual_seed(0)
    Q, R = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    sigma = sara.spectrum(Q @ torch.diag(torch.arange(64, 0, -1).double()) @ R)
    assert [sara.choose_rank(sigma, m / 2080) for m in (64, 127)] == [1, 2]


@pytest.mark.parametrize("attach, settings", [
    (sara.attach, {"method": "sara", "threshold": 0.05, "init": "lam", "alpha": None, "ranks": "spectrum"}),
    (sara.attach_mosara, {"method": "mosara", "threshold": 0.5, "sets": 5, "equal_gates": False, "router_rank": 1, "v_mode": "branch"})])
def test_each_matrix_has_the_rank_of_its_own_spectrum(attach, settings):
    """By default q_proj and v_proj are adapted; the settings, k and |W0|_F of each are in the config, and JSON can hold it."""
    plain, model = toy_model(), toy_model()
    for host in (plain, model):
        nn.init.eye_(host.model.layers[1].self_attn.q_proj.weight)  # a flat spectrum among steeper ones
    attach(model)
    config = dict(model.adapter_config)
    assert json.loads(json.dumps(config)) == config
    ks, norms = config.pop("ks"), config.pop("norms")
    assert config == {"targets": ["q_proj", "v_proj"], "seed": 0, **settings}
    assert [name for name, _ in adapter.adapted_layers(model)] == NAMES == list(ks) == list(norms)
    for name in NAMES:
        weight, layer = plain.get_submodule(name).weight.detach().double(), model.get_submodule(name)
        assert abs(norms[name] - weight.norm()) < 1e-9
        assert ks[name] == sara.choose_rank(torch.linalg.svdvals(weight), settings["threshold"])
        assert ks[name] == len(layer.A if attach is sara.attach else layer.Vt)
    assert len(set(ks.values())) > 1


@BOTH
def test_given_ranks_take_the_place_of_the_rule(attach, monkeypatch):
    """With ks no spectrum is computed, every layer has the rank that it was given, and the table shows them in columns."""
    monkeypatch.setattr(sara, "spectrum", None)
    model, ks = toy_model(), dict(zip(NAMES, (2, 4, 11, 5)))
    attach(model, ks=ks)
    assert model.adapter_config["ks"] == ks
    for name, layer in adapter.adapted_layers(model):
        assert (layer.A if attach is sara.attach else layer.Vt).shape == (ks[name], layer.in_features)
    assert sara.rank_table(model) == ["ranks k, layer by layer", "q_proj      2 11   mean 6.5", "v_proj      4  5   mean 4.5"]


NORM = linear_host()[0][0].weight.norm().item()
OUT_OF_RANGE = "is out of range: it is a share, above 0 and at most 1"
NO_RANK = "ks gives 0 the rank .*: it must be 1 .. 24"
OTHER_BASE = "0 has norm .* it belongs to another base model"


@BOTH
@pytest.mark.parametrize("options, message", [
    ({"threshold": 0}, OUT_OF_RANGE), ({"threshold": 1.5}, OUT_OF_RANGE), ({"threshold": float("nan")}, OUT_OF_RANGE),
    ({"ks": {"0": 0}}, NO_RANK), ({"ks": {"0": 25}}, NO_RANK), ({"ks": {"0": 2.0}}, NO_RANK),
    ({"ks": {}}, "ks does not fit this model and these targets: missing 0"),
    ({"ks": {"0": 2, "1": 2}}, "ks does not fit this model and these targets: unexpected 1"),
    ({"norms": {"0": 1.0011 * NORM}}, OTHER_BASE), ({"norms": {"0": 0.9989 * NORM}}, OTHER_BASE),
    ({"norms": {"0": float("nan")}, "ks": {"0": 2}}, OTHER_BASE),
    ({"norms": {}}, "norms does not fit this model and these targets: missing 0"),
    ({"norms": {"0": NORM, "1": NORM}}, "norms does not fit this model and these targets: unexpected 1")])
def test_what_does_not_fit_is_refused(attach, options, message):
    """A threshold that is no share, ranks or norms that are not this model's: nothing has changed. |W0|_F may differ by 1e-3."""
    host, _ = linear_host()
    with pytest.raises(ValueError, match=message):
        attach(host, targets=["0"], **options)
    assert type(host[0]) is nn.Linear and host[0].weight.requires_grad
    attach(host, targets=["0"], threshold=1, norms={"0": (1 + 9e-4) * NORM})
    assert host.adapter_config["ks"] == {"0": 24} and host.adapter_config["threshold"] == 1


@pytest.mark.parametrize("attach, options, message", [
    (sara.attach, {"init": "zeros"}, "unknown init 'zeros': choose lam or lora"),
    (sara.attach, {"alpha": 0}, "alpha 0 is out of range: it must be above 0"),
    (sara.attach_mosara, {"v_mode": "none"}, "unknown v_mode 'none': choose branch or output"),
    (sara.attach_mosara, {"sets": 0}, "sets 0 and router_rank 1 are out of range: both must be 1 .. 1000"),
    (sara.attach_mosara, {"sets": 10 ** 6}, "sets 1000000 and router_rank 1 are out of range"),
    (sara.attach_mosara, {"router_rank": 0}, "sets 5 and router_rank 0 are out of range")])
def test_settings_that_do_not_exist_are_refused(attach, options, message):
    """An unknown start or mode is answered with those that exist; there is at least one set and one router column,
    and no more than memory can be asked for."""
    host, _ = linear_host()
    with pytest.raises(ValueError, match=message):
        attach(host, targets=["0"], **options)
    assert type(host[0]) is nn.Linear and host[0].weight.requires_grad


@pytest.mark.parametrize("call", [sara.attach, sara.attach_mosara, functools.partial(sara.fit, params=100)])
def test_weights_that_are_not_finite_are_refused_by_name(call):
    """A NaN in a weight has no spectrum: the layer is named, nothing has changed."""
    host, _ = linear_host()
    host[0].weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="0 has weights that are not finite"):
        call(host, targets=["0"])
    assert type(host[0]) is nn.Linear and host[0].weight.requires_grad


def test_ranks_and_counts_on_the_default_model(real_base, monkeypatch):
    """The ranks and sizes that the README and the docstring state for q_proj and v_proj of the default model."""
    linears = adapter.find_linears(real_base.model, sara.TARGETS)
    monkeypatch.setattr(sara, "spectrum", functools.cache(sara.spectrum))
    golden = {0.01: ((1, 1.6, 2), (1, 1.7, 2), 95_716), 0.05: ((2, 6.8, 9), (4, 6.0, 7), 374_785),
              0.1: ((4, 14.5, 20), (9, 12.0, 14), 780_317), 0.5: ((56, 109.9, 135), (57, 69.2, 79), None)}
    for threshold, (of_q, of_v, count) in golden.items():
        ks = sara.choose_ranks(linears, threshold)
        for target, expected in (("q_proj", of_q), ("v_proj", of_v)):
            found = [k for name, k in ks.items() if name.endswith(target)]
            assert len(found) == 30 and (min(found), round(sum(found) / 30, 1), max(found)) == expected
        if count:
            assert sum(ks[name] * (sum(linear.weight.shape) + 1) for name, linear in linears) == count
    assert sum(6 * ks[name] + linear.out_features + 5 for name, linear in linears) == 55_578
    assert sum(ks[name] * sum(linear.weight.shape) for name, linear in linears) == 5_392_512


# ---- the layers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("attach, options", [
    (sara.attach, {"init": "lam"}), (sara.attach, {"init": "lora", "alpha": 8}),
    (sara.attach_mosara, {"router_rank": 2}), (sara.attach_mosara, {"sets": 1})])
def test_step_zero_is_the_base_bit_for_bit(attach, options, bias):
    """Every start that is meant to begin at the base does so exactly, with and without bias."""
    host, x = linear_host(bias=bias)
    before = host(x)
    attach(host, targets=["0"], **options)
    assert torch.equal(host(x), before)


@pytest.mark.parametrize("out, inner, init, alpha, bias", [
    (24, 24, "lam", None, True), (40, 24, "lora", 8, True), (24, 40, "lam", 8, False), (24, 40, "lora", None, False)])
def test_sara_forward_is_its_equation(out, inner, init, alpha, bias):
    """W0 x + b + s B (lam * A x) with s = 1 or alpha / k, and weight + delta() in one; lora_factors make delta()."""
    _, layer, x = filled(sara.attach, out, inner, bias, threshold=0.3, init=init, alpha=alpha)
    s = 1 if alpha is None else 8 / len(layer.lam)
    y, low = layer(x), (x @ layer.A.T) * layer.lam
    assert len(layer.lam) not in (1, 8) and layer.delta().shape == (out, inner) and layer.delta().abs().max() > 0.1
    assert (y - (F.linear(x, layer.weight, layer.bias) + s * low @ layer.B.T)).abs().max() < 1e-12
    assert (y - F.linear(x, layer.weight + layer.delta(), layer.bias)).abs().max() < 1e-12
    down, up = layer.lora_factors()
    assert down.shape == (len(layer.lam), inner) and (up @ down - layer.delta()).abs().max() < 1e-12


@pytest.mark.parametrize("out, inner, sets, router_rank", [(24, 24, 5, 1), (40, 24, 5, 2), (24, 40, 2, 3), (24, 40, 1, 1)])
def test_mosara_forward_is_the_sum_over_its_sets(out, inner, sets, router_rank):
    """With softmax gates, others for each token: the sum over n whole updates, and each token's own weight + delta(g(x))."""
    _, layer, x = filled(sara.attach_mosara, out, inner, sets=sets, router_rank=router_rank, bias=sets != 2)
    y, h = layer(x), x @ layer.Vt.T
    logits = torch.zeros(3, 5, 1).double() if sets == 1 else h @ layer.W_g1 @ layer.W_g2
    gates = logits.exp() / logits.exp().sum(-1, keepdim=True)
    assert (layer.gates(h) - gates).abs().max() < 1e-12 and (sets == 1 or torch.pdist(gates.flatten(0, 1)).min() > 1e-6)
    updates = sum(gates[..., j:j + 1] * (h * layer.Lam[j]) @ layer.U.T for j in range(sets))
    assert (y - (F.linear(x, layer.weight, layer.bias) + layer.v * updates)).abs().max() < 1e-12
    assert (layer.v * updates).abs().max() > 0.1
    for token, own, expected in zip(x.flatten(0, 1), gates.flatten(0, 1), y.flatten(0, 1)):
        assert (F.linear(token, layer.weight + layer.delta(own), layer.bias) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("sets", [1, 5])
def test_output_mode_scales_the_whole_output(sets):
    """v_mode="output": (1 + v) on weight, bias and update; with v = 0 the update is there, so it is not the base."""
    host, layer, x = filled(sara.attach_mosara, sets=sets, v_mode="output")
    h = x @ layer.Vt.T
    whole = F.linear(x, layer.weight, layer.bias) + ((layer.gates(h) @ layer.Lam) * h) @ layer.U.T
    assert (layer(x) - (1 + layer.v) * whole).abs().max() < 1e-12
    layer.v.data.zero_()
    assert (host(x) - layer.base(x)).abs().max() > 0.1


def test_order_of_the_sets_does_not_matter():
    """Rows of Lam permuted together with the columns of W_g2 leave y unchanged; permuted alone they do not."""
    _, layer, x = filled(sara.attach_mosara, router_rank=2)
    before, order = layer(x), torch.tensor([3, 0, 4, 1, 2])
    layer.Lam.data = layer.Lam.data[order]
    assert (layer(x) - before).abs().max() > 1e-3
    layer.W_g2.data = layer.W_g2.data[:, order]
    assert (layer(x) - before).abs().max() < 1e-12


def test_router_of_rank_one_uses_the_ends_of_its_line_only():
    """q = 1: only the sets with the largest and the smallest entry of W_g2 are ever on top; q = 2 lifts this."""
    for router_rank, on_top in ((1, 2), (2, 3)):
        _, layer, _ = filled(sara.attach_mosara, router_rank=router_rank)
        h = torch.randn(2000, len(layer.Vt), generator=torch.Generator().manual_seed(0)).double()
        tops = set(layer.gates(h).argmax(-1).tolist())
        assert len(tops) >= on_top
        assert router_rank > 1 or tops == {layer.W_g2.argmax().item(), layer.W_g2.argmin().item()}


def test_mosara_dtypes():
    """On a bf16 base U and Vt stay fp32, and are cast where they meet x; the router and its softmax are fp32, also under a caller's
    autocast."""
    host, x = linear_host()
    host, x = host.bfloat16(), x.bfloat16()
    sara.attach_mosara(host, targets=["0"])
    layer = perturb(host)[0]
    assert layer(x).dtype == layer.weight.dtype == torch.bfloat16 and layer.U.dtype == layer.Vt.dtype == torch.float32
    h = x @ layer.Vt.to(x).T
    gates = layer.gates(h)
    expected = (h.double() @ layer.W_g1.double() @ layer.W_g2.double()).softmax(-1)
    assert gates.dtype == torch.float32 and (gates - expected).abs().max() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.gates(h), gates)


@pytest.mark.parametrize("attach, options, names, count", [
    (sara.attach, {"init": "lora"}, {"A", "lam", "B"}, lambda k: k * (40 + 24 + 1)),
    (sara.attach_mosara, {}, ROUTED, lambda k: 5 * k + 24 + k + 5),
    (sara.attach_mosara, {"router_rank": 2}, ROUTED, lambda k: 5 * k + 24 + 2 * (k + 5)),
    (sara.attach_mosara, {"sets": 1}, {"Lam", "v"}, lambda k: k + 24),
    (sara.attach_mosara, {"sets": 1, "router_rank": 2}, {"Lam", "v"}, lambda k: k + 24)])
def test_trainable_names_and_count(attach, options, names, count):
    """k (in + out + 1); n k + out + q (k + n), for n = 1 k + out and no router; the bases U and Vt are stored but frozen."""
    host, _ = linear_host()
    attach(host, targets=["0"], threshold=0.3, **options)
    trained, bases = adapter.trainable(host), {"U", "Vt"} if attach is sara.attach_mosara else set()
    assert trained.keys() == {f"0.{name}" for name in names}
    assert sum(p.numel() for p in trained.values()) == count(host.adapter_config["ks"]["0"])
    assert host.state_dict().keys() == {f"0.{name}" for name in names | bases | {"weight", "bias"}}


@pytest.mark.parametrize("out, inner", [(40, 24), (24, 40)])
def test_bases_are_the_leading_singular_vectors_with_fixed_signs(out, inner):
    """U and Vt are orthonormal, span the fp64 SVD's leading part, and every v_i has its largest entry positive."""
    host, _ = linear_host(out, inner)
    left, sigma, right = torch.linalg.svd(host[0].weight.detach().double(), full_matrices=False)
    sara.attach_mosara(host, targets=["0"])
    U, Vt = host[0].U.double(), host[0].Vt.double()
    k = len(Vt)
    assert 1 < k < 24 and (Vt.gather(1, Vt.abs().argmax(1, keepdim=True)) > 0).all()
    assert all((factor @ factor.T - torch.eye(k)).abs().max() < 1e-5 for factor in (U.T, Vt))
    assert ((U * sigma[:k]) @ Vt - (left[:, :k] * sigma[:k]) @ right[:k]).abs().max() < 1e-5


def test_fixed_signs_restore_an_svd_and_decide_ties_by_the_first_entry():
    """Random signs on both sides are undone by fix_signs on Vt and the signs it returns on U."""
    torch.manual_seed(0)
    U, _, Vt = torch.linalg.svd(torch.randn(12, 20).double(), full_matrices=False)
    Vt, sign = adapter.fix_signs(Vt)
    U, random = U * sign.T, torch.randint(0, 2, (12, 1)).double() * 2 - 1
    restored, sign = adapter.fix_signs(random * Vt)
    assert torch.equal(restored, Vt) and torch.equal(U * random.T * sign.T, U) and random.unique().numel() == 2
    ties = torch.tensor([[-2.0, 2.0, 1.0], [2.0, -2.0, 1.0]])
    assert adapter.fix_signs(ties)[0].tolist() == [[2.0, -2.0, -1.0], [2.0, -2.0, 1.0]]


@pytest.mark.peers
def test_triple_form_and_its_gradients_are_those_of_peft_adalora():
    """peft's SVDLinear with the same A, lam and B gives the same output and gradients: B diag(lam) A is AdaLoRA's form."""
    peft = pytest.importorskip("peft")
    from peft.tuners.adalora.layer import SVDLinear
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(20, 12)).double(), torch.randn(7, 20).double()
    config = peft.AdaLoraConfig(total_step=1)
    peer = SVDLinear(copy.deepcopy(host[0]), "default", config=config, r=5, lora_alpha=3).double()
    sara.attach(host, targets=["0"], ks={"0": 5}, alpha=3)
    layer = perturb(host.double(), scale=0.5)[0]
    theirs = peer.lora_A["default"], peer.lora_E["default"], peer.lora_B["default"]
    peer.ranknum["default"].data.fill_(5 - 1e-5)  # they divide by ranknum + 1e-5
    for parameter, value in zip(theirs, (layer.A, layer.lam[:, None], layer.B)):
        parameter.data = value.detach().clone()
    assert torch.allclose(peer(x), host(x), atol=1e-12)
    for model in (peer, host):
        model(x).square().sum().backward()
    for parameter, own in zip(theirs, (layer.A.grad, layer.lam.grad[:, None], layer.B.grad)):
        assert torch.allclose(parameter.grad, own, atol=1e-10)


# ---- starts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("attach, options, first, all_of_them", [
    (sara.attach, {}, {"lam"}, {"A", "lam", "B"}),
    (sara.attach, {"init": "lora"}, {"B"}, {"A", "lam", "B"}),
    (sara.attach_mosara, {}, {"v"}, ROUTED),
    (sara.attach_mosara, {"sets": 1}, {"v"}, {"Lam", "v"}),
    (sara.attach_mosara, {"v_mode": "output"}, ROUTED, ROUTED)])
def test_gradients_of_the_starts(attach, options, first, all_of_them):
    """At step 0 exactly the tensors of zeros have a gradient (in output mode all), after one step every one has."""
    host, x = linear_host()
    attach(host, targets=["0"], **options)
    assert moving(host, x) == first
    step(host, x)
    assert moving(host, x) == all_of_them


@pytest.mark.parametrize("attach, zeroed, first, later", [
    (sara.attach, {"lam", "B"}, set(), set()), (sara.attach_mosara, {"v", "Lam"}, set(), set()),
    (sara.attach_mosara, {"W_g1", "W_g2"}, {"v", "Lam"}, {"v", "Lam"}),
    (sara.attach_mosara, {"W_g1"}, {"v", "Lam", "W_g1"}, ROUTED), (sara.attach_mosara, {"W_g2"}, {"v", "Lam", "W_g2"}, ROUTED)])
def test_two_zero_factors_are_dead_but_one_recovers(attach, zeroed, first, later):
    """Starts that attach does not offer: two factors of one product at zero stay there, one alone is left after a step."""
    host, layer, x = filled(attach)
    for name in zeroed:
        getattr(layer, name).data.zero_()
    assert moving(host, x) == first
    step(host, x, lr=1e-3)
    assert moving(host, x) == later


def test_equal_rows_of_lam_leave_the_router_without_gradient():
    """With v != 0 everything moves but the router, which gets rounding of 1e-15; attach draws independent rows."""
    host, layer, x = filled(sara.attach_mosara)
    layer.Lam.data.copy_(layer.Lam.data[:1].repeat(5, 1))
    found = gradients(host, x / 100)
    assert found["v"].any() and found["Lam"].any()
    assert max(found["W_g1"].abs().max(), found["W_g2"].abs().max()) <= 1e-15
    layer.Lam.data[0] *= 2
    assert gradients(host, x / 100)["W_g2"].abs().max() > 1e-9


def test_distributions_of_the_starts():
    """Each tensor starts at the spread that the docstring states, rows of Lam independent of each other."""
    hosts = [linear_host(300, 400)[0] for _ in range(3)]
    sara.attach(hosts[0], targets=["0"], ks={"0": 100})
    sara.attach(hosts[1], targets=["0"], ks={"0": 100}, init="lora")
    sara.attach_mosara(hosts[2], targets=["0"], ks={"0": 100}, sets=64, router_rank=9)
    lam, lora, routed = (host[0] for host in hosts)
    for tensor, deviation in ((lam.A, 0.02), (lam.B, 0.02), (lora.A, (3 * 400) ** -0.5), (routed.Lam, 1),
                              (routed.W_g1, 0.1), (routed.W_g2, 1 / 3)):
        assert abs(tensor.std() / deviation - 1) < 0.1 and abs(tensor.mean()) < 0.15 * deviation
    assert lam.A.abs().max() > 3 * 0.02 and 0.99 / 20 < lora.A.abs().max() <= 1 / 20
    assert not lam.lam.any() and (lora.lam == 1).all() and not lora.B.any() and not routed.v.any()
    assert (torch.corrcoef(routed.Lam.detach()) - torch.eye(64)).abs().max() < 0.5


@BOTH
def test_seed_decides_the_start(attach):
    """The same seed draws the same factors whatever torch's global state, which is left alone; another seed others."""
    starts = []
    for i, seed in enumerate((0, 0, 1)):
        model = toy_model()
        torch.manual_seed(i)
        state = torch.random.get_rng_state()
        attach(model, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        starts.append(adapter.trainable(model))
    for name, first in starts[0].items():
        assert torch.equal(first, starts[1][name]) and not (first.any() and torch.equal(first, starts[2][name]))


# ---- merging and files ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, reason", [
    ({}, "each token has its own update through the router, so no single matrix equals it"),
    ({"v_mode": "output"}, "v_mode='output' scales the base's output and bias too"),
    ({"v_mode": "output", "sets": 1}, "v_mode='output' scales the base's output and bias too")])
def test_what_no_matrix_equals_is_refused_with_the_reason(options, reason):
    """merge(), delta() and lora_factors() name it; in output mode gates do not help delta() either."""
    host, layer, _ = filled(sara.attach_mosara, **options)
    for what, call in (("0 cannot be merged: ", lambda: adapter.merge(host)), (r"there is no delta\(\): ", layer.delta),
                       (r"there are no lora_factors\(\): ", layer.lora_factors)):
        with pytest.raises(ValueError, match=what + reason):
            call()
    assert reason in layer.unmergeable and host[0] is layer
    if options:
        with pytest.raises(ValueError, match=reason):
            layer.delta(torch.ones(len(layer.Lam)).double())


@pytest.mark.parametrize("out, inner, options", [(40, 24, {"sets": 1}), (24, 40, {"sets": 1}), (24, 40, {"equal_gates": True})])
def test_mosara_without_a_router_is_a_matrix(out, inner, options):
    """forward = F.linear(x, weight + delta(), bias) to 1e-12, lora_factors make delta(), and it can be merged."""
    host, layer, x = filled(sara.attach_mosara, out, inner, **options)
    change = torch.diag(layer.v) @ layer.U @ torch.diag(layer.Lam.mean(0)) @ layer.Vt
    assert (layer.delta() - change).abs().max() < 1e-12 and layer.gates(x[..., :1]).shape == (3, 5, len(layer.Lam))
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "Lam", "v"}
    expected, (down, up) = layer(x), layer.lora_factors()
    assert (expected - F.linear(x, layer.weight + layer.delta(), layer.bias)).abs().max() < 1e-12
    assert down.shape == (len(layer.Vt), inner) and (up @ down - layer.delta()).abs().max() < 1e-12
    adapter.merge(host)
    assert type(host[0]) is nn.Linear and (host(x) - expected).abs().max() < 1e-5


RELOAD = """
import sys, torch
from tests.toy import tokens, toy_model
from weights import adapter_file
from weights.safetensors import read_safetensors
for name in ("svd", "svdvals", "eigh", "eigvalsh"):
    setattr(torch.linalg, name, None)
for form in sys.argv[1:]:
    model = toy_model()
    assert adapter_file.load(model, form) == model.adapter_config
    assert torch.equal(model(tokens()), read_safetensors(form + "-logits")[0]["logits"]), form
"""


def test_reload_in_a_fresh_process_without_any_decomposition(tmp_path):
    """Both methods, in every form, load to the same bits with torch's SVD routines gone; 1.01 W0 is refused."""
    forms = {"lora": (sara.attach, {"init": "lora", "alpha": 8, "threshold": 0.2}), "lam": (sara.attach, {}),
             "routed": (sara.attach_mosara, {"router_rank": 2, "seed": 3}), "even": (sara.attach, {"ranks": "even"}),
             "equal": (sara.attach_mosara, {"equal_gates": True}), "one": (sara.attach_mosara, {"sets": 1}),
             "output": (sara.attach_mosara, {"v_mode": "output", "targets": ["o_proj"]})}
    for form, (attach, options) in forms.items():
        model, other = toy_model(), toy_model()
        attach(model, **options)
        adapter_file.save(perturb(model), tmp_path / form)
        write_safetensors(tmp_path / f"{form}-logits", {"logits": model(tokens())})
        for parameter in other.parameters():
            parameter.data *= 1.01
        with pytest.raises(ValueError, match="belongs to another base model"):
            adapter_file.load(other, tmp_path / form)
    paths = [str(tmp_path / form) for form in forms]
    done = subprocess.run([sys.executable, "-c", RELOAD, *paths], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- gate statistics ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sets, v_mode", [(3, "branch"), (3, "output"), (1, "branch")])
def test_gate_statistics_by_hand(sets, v_mode):
    """Top gate, mean gates and the change at them, averaged over tokens and two layers of different size."""
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6)), torch.randn(2, 7, 8)
    sara.attach_mosara(host, targets=["0", "1"], sets=sets, v_mode=v_mode)
    perturb(host, 0.5)
    tops, means, changes, sizes = [], [], [], []
    for layer, inputs in ((host[0], x), (host[1], host[0](x))):
        gates = [torch.softmax(layer.Vt @ token @ layer.W_g1 @ layer.W_g2, 0) if sets > 1 else torch.ones(1)
                 for token in inputs.flatten(0, 1)]
        tops.append(sum(g.max().item() for g in gates) / 14)
        means.append(sum(gates) / 14)
        changes.append((torch.diag(layer.v) @ layer.U @ torch.diag(means[-1] @ layer.Lam) @ layer.Vt).norm().item())
        sizes.append(layer.weight.norm().item())
    found = sara.gate_statistics(host, x)
    assert abs(found["top_gate"] - sum(tops) / 2) < 1e-6
    ranked = sum(gates.sort(descending=True).values for gates in means) / 2
    assert (torch.tensor(found["gates"]) - ranked).abs().max() < 1e-6
    if v_mode == "output":
        assert found["change"] is None
    else:
        change = (sum(c * c for c in changes) / sum(s * s for s in sizes)) ** 0.5
        assert abs(found["change"] - change) < 1e-6 < 0.1 < change


def test_gate_statistics_leaves_nothing_behind():
    """No gradient is recorded and no hook stays, also when the model raises halfway through."""
    class Broken(nn.Module):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            raise RuntimeError("halfway")
    host, x = linear_host()
    host.append(Broken())
    sara.attach_mosara(host, targets=["0"])
    with pytest.raises(RuntimeError, match="halfway"):
        sara.gate_statistics(host, x)
    assert not host[0]._forward_pre_hooks and not host[0]._forward_hooks


def test_gate_statistics_see_the_head():
    """Also where it is all that is adapted: train.py looks at the whole model, not at its decoder alone."""
    model = toy_model(tie_word_embeddings=False)
    sara.attach_mosara(model, targets=["lm_head"])
    assert sara.gate_statistics(model, tokens())["change"] == 0


def test_even_ranks_spend_the_same_budget_on_one_k():
    """No other k for all layers comes nearer to the parameters that the spectrum's ranks take; the layers have it; a budget's
    ranks are spread as well."""
    model, even = toy_model(), toy_model()
    sara.attach(model, threshold=0.3, targets=adapter.TARGETS)
    sara.attach(even, threshold=0.3, targets=adapter.TARGETS, ranks="even")
    layers = [layer for _, layer in adapter.adapted_layers(even)]
    sizes, wanted = [layer.in_features + layer.out_features + 1 for layer in layers], count(model)
    k, = {len(layer.lam) for layer in layers}
    assert k == min(range(1, 17), key=lambda k: abs(k * sum(sizes) - wanted)) and len(set(model.adapter_config["ks"].values())) > 1
    fitted = toy_model()
    sara.attach(fitted, targets=adapter.TARGETS, ranks="even", **sara.fit(fitted, wanted, adapter.TARGETS))
    assert set(fitted.adapter_config["ks"].values()) == {k}
    with pytest.raises(ValueError, match="unknown ranks 'odd': choose spectrum or even"):
        sara.attach(toy_model(), ranks="odd")


def count(model):
    return sum(parameter.numel() for parameter in adapter.trainable(model).values())


# ---- a threshold for a budget ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("fit, attach, options, count", [
    (sara.fit, sara.attach, {"targets": ["o_proj", "down_proj"]}, lambda k, out, inner: k * (out + inner + 1)),
    (sara.fit_mosara, sara.attach_mosara, {"sets": 3, "router_rank": 2},
     lambda k, out, inner: 3 * k + out + 2 * (k + 3)),
    (sara.fit_mosara, sara.attach_mosara, {"sets": 1, "router_rank": 2}, lambda k, out, inner: k + out)])
def test_fit_is_the_nearest_of_all_thousandths(fit, attach, options, count):
    """No m in 0.001 .. 1 comes nearer, also to budgets below the smallest and beyond the largest; attach agrees."""
    model = toy_model()
    linears = adapter.find_linears(model, options.get("targets", sara.TARGETS))
    totals = []  # of m = 0.001, 0.002, ... 1
    sigmas = [torch.linalg.svdvals(linear.weight.detach().double()) for _, linear in linears]
    for thousandths in range(1, 1001):
        totals.append(sum(count(sara.choose_rank(sigma, thousandths / 1000), *linear.weight.shape)
                          for sigma, (_, linear) in zip(sigmas, linears)))
    low, high = totals[0], totals[-1]
    for params in (1, low, low + 1, (2 * low + high) // 3, (low + high) // 2, (low + 2 * high) // 3, high - 1, 10 * high):
        found = fit(model, params, **options)
        reached = totals[round(1000 * found["threshold"]) - 1]
        assert abs(reached - params) == min(abs(total - params) for total in totals), params
    found = fit(model, (low + high) // 2, **options)
    attach(model, threshold=found["threshold"], **options)
    assert model.adapter_config["ks"] == found["ks"]
    assert sum(p.numel() for p in adapter.trainable(model).values()) == totals[round(1000 * found["threshold"]) - 1]
    with pytest.raises(ValueError, match="is already attached"):
        fit(model, 1000, **options)
