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
from tests.toy import perturb, snapshot, tokens, toy_model
from weights import adapter_file
from weights.safetensors import write_safetensors

SHAPES = [(24, 24), (40, 24), (24, 40)]
SHARES = (0.01, 0.02, 0.05, 0.1, 0.5)
ROUTED = {"Lam", "v", "W_g1", "W_g2"}


def linear_host(out=24, inner=40, bias=True):
    """A model of one linear, called "0", and tokens (3, 5, in) for it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inner, out, bias=bias)), torch.randn(3, 5, inner)


def filled(attach, out=24, inner=40, bias=True, scale=0.5, **options):
    """An attached host in fp64 with random factors, its layer and its tokens."""
    host, x = linear_host(out, inner, bias)
    attach(host, targets=["0"], **options)
    return perturb(host.double(), scale), host[0], x.double()


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


def reference_rank(W, share):
    """The rule, one singular value after another, on the fp64 SVD."""
    sigma, reached = torch.linalg.svdvals(W.double()).tolist(), 0.0
    for k, value in enumerate(sigma, 1):
        reached += value
        if reached >= share * sum(sigma) * (1 - 1e-9):
            return k


# ---- the rank rule --------------------------------------------------------------------------------------------------

def test_rank_of_a_known_spectrum():
    """diag(4, 3, 2, 1): shares are of the sum of sigma (not of its squares), and a share reached exactly is enough."""
    sigma = sara.spectrum(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    assert [sara.choose_rank(sigma, m) for m in (0.4, 0.41, 0.7, 0.71, 1.0)] == [1, 2, 2, 3, 4]


def test_rank_of_a_zero_matrix_is_one():
    """There is no share to reach, and no layer without a rank."""
    assert not sara.spectrum(torch.zeros(6, 4)).any()
    assert [sara.choose_rank(sara.spectrum(torch.zeros(6, 4)), m) for m in (0.01, 1.0)] == [1, 1]


def test_boundary_has_a_slack_of_a_billionth():
    """A share missed by 5e-10 of the total counts as reached, one missed by 1e-8 does not."""
    sigma = torch.ones(2, dtype=torch.float64)
    assert [sara.choose_rank(sigma, 0.5 + excess) for excess in (2.5e-10, 5e-9)] == [1, 2]


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_grows_with_the_threshold_and_ignores_scale_and_transpose(shape):
    """k is non-decreasing in m, ends at min(out, in), and is that of W^T, 1e-6 W and 1e6 W."""
    torch.manual_seed(0)
    W = torch.randn(shape)
    thresholds = [i / 200 for i in range(1, 201)]
    ks = [sara.choose_rank(sara.spectrum(W), m) for m in thresholds]
    assert ks == sorted(ks) and ks[0] == 1 and ks[-1] == 24
    for twin in (W.T, 1e-6 * W, 1e6 * W):
        assert [sara.choose_rank(sara.spectrum(twin), m) for m in thresholds] == ks


def test_rank_at_one_counts_the_nonzero_singular_values():
    """k(1) of a rank-8 64 x 64 matrix is 8: what rounding leaves of the other 56 is cut off."""
    torch.manual_seed(0)
    low = torch.randn(64, 8, dtype=torch.float64) @ torch.randn(8, 64, dtype=torch.float64)
    assert sara.choose_rank(sara.spectrum(low), 1.0) == 8
    assert sara.choose_rank(sara.spectrum(torch.diag(torch.tensor([3.0, 0.0, 1e-3, 2.0]))), 1.0) == 3


@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (1536, 576)])
def test_spectrum_against_the_fp64_svd(shape):
    """The Gram route is descending, within 1e-10 of sigma_1, and gives the SVD's k."""
    torch.manual_seed(0)
    W = torch.randn(shape)
    sigma, exact = sara.spectrum(W), torch.linalg.svdvals(W.double())
    assert sigma.dtype == torch.float64 and (sigma.diff() <= 0).all()
    assert (sigma - exact).abs().max() <= 1e-10 * exact[0]
    assert [sara.choose_rank(sigma, m) for m in SHARES] == [sara.choose_rank(exact, m) for m in SHARES]


def test_exact_boundary_of_a_rotated_spectrum():
    """64, 63, ..., 1 between rotations: m = 64 / 2080 is reached by one value, 127 / 2080 by two."""
    torch.manual_seed(0)
    Q, R = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    sigma = sara.spectrum(Q @ torch.diag(torch.arange(64, 0, -1).double()) @ R)
    assert [sara.choose_rank(sigma, m / 2080) for m in (64, 127)] == [1, 2]


def test_spectrum_of_half_precision_weights():
    """A bf16 weight is taken as it is and computed in fp64, also within a caller's autocast."""
    torch.manual_seed(0)
    W = torch.randn(24, 40).bfloat16()
    exact = torch.linalg.svdvals(W.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert (sara.spectrum(W) - exact).abs().max() <= 1e-10 * exact[0]


def test_defaults():
    """What the docstring says of thresholds, sets and scales is what attach does, and the config records all of it."""
    common = {"targets": ["q_proj", "v_proj"], "seed": 0}
    for attach, expected in (
            (sara.attach, {"method": "sara", "threshold": 0.05, "init": "lam", "alpha": None}),
            (sara.attach_mosara, {"method": "mosara", "threshold": 0.5, "sets": 5, "router_rank": 1,
                                  "v_mode": "branch"})):
        model = toy_model()
        attach(model)
        config = dict(model.adapter_config)
        assert len(config.pop("ks")) == len(config.pop("norms")) == 4 and config == {**common, **expected}


@pytest.mark.parametrize("attach", [sara.attach, sara.attach_mosara])
def test_each_matrix_has_the_rank_of_its_own_spectrum(attach):
    """q_proj and v_proj are adapted; k, |W0|_F and the settings are in the config, as JSON can hold them."""
    plain, model = toy_model(), toy_model()
    plain.model.layers[1].self_attn.q_proj.weight.data[4:] *= 0.02  # a steep spectrum among flat ones
    model.load_state_dict(plain.state_dict())
    attach(model, threshold=0.4)
    config = model.adapter_config
    names = [f"model.layers.{i}.self_attn.{target}" for i in range(2) for target in ("q_proj", "v_proj")]
    assert [name for name, _ in adapter.adapted_layers(model)] == names == list(config["ks"]) == list(config["norms"])
    assert json.loads(json.dumps(config)) == config
    assert config["threshold"] == 0.4 and config["targets"] == ["q_proj", "v_proj"]
    ks = {name: reference_rank(plain.get_submodule(name).weight, 0.4) for name in names}
    assert config["ks"] == ks and len(set(ks.values())) > 1
    for name in names:
        assert abs(config["norms"][name] - plain.get_submodule(name).weight.double().norm()) < 1e-9
        layer = model.get_submodule(name)
        assert len(layer.A if attach is sara.attach else layer.Vt) == ks[name]


@pytest.mark.parametrize("threshold", [0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("attach", [sara.attach, sara.attach_mosara])
def test_threshold_that_is_no_share_is_refused(attach, threshold):
    """Only 0 < m <= 1 means anything, 1 included; the model is left as it was."""
    model = toy_model()
    with pytest.raises(ValueError, match="is out of range: it is a share, above 0 and at most 1"):
        attach(model, threshold=threshold)
    assert all(p.requires_grad for p in model.parameters()) and not adapter.adapted_layers(model)
    attach(model, threshold=1)
    assert set(model.adapter_config["ks"].values()) == {32, 16}


@pytest.mark.parametrize("attach", [sara.attach, sara.attach_mosara])
@pytest.mark.parametrize("k", [0, -1, 25, 2.0, "2", None])
def test_given_rank_that_is_none_is_refused(attach, k):
    """A given k must be a whole number in 1 .. min(out, in) of its weight, and those names are the model's."""
    host, _ = linear_host()
    for ks, message in (({"0": k}, f"ks gives 0 the rank {k!r}: it must be 1 .. 24"),
                        ({}, "ks does not fit this model and these targets: missing 0"),
                        ({"0": 2, "1": 2}, "ks does not fit this model and these targets: unexpected 1")):
        with pytest.raises(ValueError, match=message):
            attach(host, targets=["0"], ks=ks)
    assert all(p.requires_grad for p in host.parameters()) and not adapter.adapted_layers(host)
    attach(host, targets=["0"], ks={"0": 24})


@pytest.mark.parametrize("attach", [sara.attach, sara.attach_mosara])
def test_given_norm_of_another_base_is_refused(attach):
    """|W0|_F may differ by 1e-3, in both directions; a norm that differs more, or is missing, is another base's."""
    norm = linear_host()[0][0].weight.norm().item()
    other = "0 has norm .* it belongs to another base model"
    for norms, message in (({"0": 1.0011 * norm}, other), ({"0": 0.9989 * norm}, other), ({"0": float("nan")}, other),
                           ({}, "norms does not fit this model and these targets: missing 0"),
                           ({"0": norm, "1": norm}, "norms does not fit .*: unexpected 1")):
        for ks in (None, {"0": 2}):
            with pytest.raises(ValueError, match=message):
                attach(linear_host()[0], targets=["0"], norms=norms, ks=ks)
    for scale in (1.0009, 0.9991):
        attach(linear_host()[0], targets=["0"], norms={"0": scale * norm})


@pytest.mark.parametrize("attach", [sara.attach, sara.attach_mosara])
def test_given_ranks_take_the_place_of_the_rule(attach, monkeypatch):
    """With ks no spectrum is computed, and every layer has the rank that it was given."""
    monkeypatch.setattr(sara, "spectrum", None)
    model = toy_model()
    ks = {f"model.layers.{i}.self_attn.{p}_proj": 3 + 2 * i + (p == "v") for i in range(2) for p in "qv"}
    attach(model, ks=ks)
    assert model.adapter_config["ks"] == ks
    for name, layer in adapter.adapted_layers(model):
        factor = layer.A if attach is sara.attach else layer.Vt
        assert factor.shape == (ks[name], layer.in_features)


def test_rank_table():
    """One line per projection with the k of every layer in columns, and their mean."""
    for attach in (sara.attach, sara.attach_mosara):
        model = toy_model()
        attach(model, ks={f"model.layers.{i}.self_attn.{p}_proj": k for p, ks in {"q": (2, 11), "v": (4, 5)}.items()
                          for i, k in enumerate(ks)})
        assert sara.rank_table(model) == ["q_proj      2 11   mean 6.5", "v_proj      4  5   mean 4.5"]


def test_ranks_and_counts_on_the_default_model(real_base, monkeypatch):
    """The ranks and sizes that the README and the docstring state for q_proj and v_proj of the default model."""
    linears = adapter.find_linears(real_base.model, sara.TARGETS)
    monkeypatch.setattr(sara, "spectrum", functools.cache(sara.spectrum))
    golden = {0.01: ((1, 1.6, 2), (1, 1.7, 2), 95_716), 0.05: ((2, 6.8, 9), (4, 6.0, 7), 374_785),
              0.1: ((4, 14.5, 20), (9, 12.0, 14), 780_317), 0.5: ((56, 109.9, 135), (57, 69.2, 79), None)}
    for threshold, (of_q, of_v, count) in golden.items():
        ks, _ = sara.choose_ranks(linears, threshold, None, None)
        for target, expected in (("q_proj", of_q), ("v_proj", of_v)):
            found = [k for name, k in ks.items() if name.endswith(target)]
            assert len(found) == 30 and (min(found), round(sum(found) / 30, 1), max(found)) == expected
        if count:
            assert sum(ks[name] * (sum(linear.weight.shape) + 1) for name, linear in linears) == count
    assert sum(6 * ks[name] + linear.out_features + 5 for name, linear in linears) == 55_578
    assert sum(ks[name] * sum(linear.weight.shape) for name, linear in linears) == 5_392_512
    block_0 = [(name, linear) for name, linear in linears if ".0." in name]
    for threshold in (0.01, 0.05):
        assert sara.choose_ranks(block_0, threshold, None, None)[0] == {
            name: reference_rank(linear.weight.detach(), threshold) for name, linear in block_0}


# ---- the layers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("attach, options", [
    (sara.attach, {"init": "lam"}), (sara.attach, {"init": "lora"}), (sara.attach, {"init": "lora", "alpha": 8}),
    (sara.attach_mosara, {}), (sara.attach_mosara, {"sets": 1}), (sara.attach_mosara, {"router_rank": 2})])
def test_step_zero_is_the_base_bit_for_bit(attach, options, bias):
    """Every start that is meant to begin at the base does so exactly, with and without bias."""
    host, x = linear_host(bias=bias)
    model = toy_model()
    before = host(x), model(tokens())
    attach(host, targets=["0"], **options)
    attach(model, **options)
    assert torch.equal(host(x), before[0]) and torch.equal(model(tokens()), before[1])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("init, alpha", [("lam", None), ("lam", 8), ("lora", None), ("lora", 8)])
@pytest.mark.parametrize("out, inner", SHAPES)
def test_sara_forward_is_its_equation(out, inner, init, alpha, bias):
    """W0 x + b + s B (lam * A x) with s = 1 or alpha / k, and weight + delta() in one; lora_factors make delta()."""
    _, layer, x = filled(sara.attach, out, inner, bias, threshold=0.3, init=init, alpha=alpha)
    s = 1 if alpha is None else 8 / len(layer.lam)
    y, low = layer(x), (x @ layer.A.T) * layer.lam
    assert len(layer.lam) not in (1, 8) and layer.delta().shape == (out, inner)
    assert (y - (F.linear(x, layer.weight, layer.bias) + s * low @ layer.B.T)).abs().max() < 1e-12
    assert (y - F.linear(x, layer.weight + layer.delta(), layer.bias)).abs().max() < 1e-12
    down, up = layer.lora_factors()
    assert down.shape == (len(layer.lam), inner) and (up @ down - layer.delta()).abs().max() < 1e-12
    assert layer.delta().abs().max() > 0.1


@pytest.mark.parametrize("attach, options", [
    (sara.attach, {"alpha": 3}), (sara.attach_mosara, {"sets": 1})])
@pytest.mark.parametrize("out, inner", SHAPES)
def test_merged_linear_gives_the_adapted_output(attach, options, out, inner):
    """A plain nn.Linear with weight + delta(), summed in fp32 and with the old bias, takes the layer's place."""
    host, layer, x = filled(attach, out, inner, threshold=0.3, **options)
    expected, weight = layer(x), (layer.weight.float() + layer.delta().float()).double()
    adapter.merge(host)
    assert type(host[0]) is nn.Linear and torch.equal(host[0].weight, weight) and host[0].bias is layer.bias
    assert (host(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("sets, router_rank", [(5, 1), (5, 2), (2, 3), (1, 1)])
@pytest.mark.parametrize("out, inner", SHAPES)
def test_mosara_forward_is_the_sum_over_its_sets(out, inner, sets, router_rank):
    """Mixed first or summed over n whole updates, and token by token the linear of weight + delta(g(x))."""
    _, layer, x = filled(sara.attach_mosara, out, inner, sets=sets, router_rank=router_rank, bias=sets != 2)
    y, h = layer(x), x @ layer.Vt.T
    logits = torch.zeros(3, 5, 1).double() if sets == 1 else h @ layer.W_g1 @ layer.W_g2
    gates = logits.exp() / logits.exp().sum(-1, keepdim=True)
    updates = sum(gates[..., j:j + 1] * (h * layer.Lam[j]) @ layer.U.T for j in range(sets))
    assert (y - (F.linear(x, layer.weight, layer.bias) + layer.v * updates)).abs().max() < 1e-12
    assert (layer.v * updates).abs().max() > 0.1
    for token, own, expected in zip(x.flatten(0, 1), layer.gates(h).flatten(0, 1), y.flatten(0, 1)):
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


@pytest.mark.parametrize("router_rank", [1, 2])
def test_gates_are_a_distribution_for_each_token(router_rank):
    """Non-negative, with sum 1 over the sets, and another one for every token."""
    _, layer, x = filled(sara.attach_mosara, router_rank=router_rank)
    gates = layer.gates(x @ layer.Vt.T)
    assert gates.shape == (3, 5, 5) and (gates >= 0).all() and (gates.sum(-1) - 1).abs().max() < 1e-12
    assert torch.pdist(gates.flatten(0, 1)).min() > 1e-6


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
        _, layer, _ = filled(sara.attach_mosara, router_rank=router_rank, threshold=0.5)
        h = torch.randn(2000, len(layer.Vt), generator=torch.Generator().manual_seed(0)).double()
        tops = set(layer.gates(h).argmax(-1).tolist())
        assert len(tops) >= on_top
        assert router_rank > 1 or tops == {layer.W_g2.argmax().item(), layer.W_g2.argmin().item()}


@pytest.mark.parametrize("attach", [sara.attach, sara.attach_mosara])
def test_dtypes_on_a_bf16_model(attach):
    """What trains is fp32, what is frozen is the weight's bf16, gates are computed in fp32, the output is bf16."""
    host, x = linear_host()
    host, x = host.bfloat16(), x.bfloat16()
    attach(host, targets=["0"])
    layer = perturb(host)[0]
    assert all(p.dtype == torch.float32 for p in adapter.trainable(host).values()) and layer(x).dtype == torch.bfloat16
    if attach is sara.attach_mosara:
        assert layer.weight.dtype == layer.U.dtype == layer.Vt.dtype == torch.bfloat16
        h = x @ layer.Vt.T
        gates = layer.gates(h)
        expected = (h.double() @ layer.W_g1.double() @ layer.W_g2.double()).softmax(-1)
        assert gates.dtype == torch.float32 and (gates - expected).abs().max() < 1e-6


@pytest.mark.parametrize("out, inner", SHAPES)
@pytest.mark.parametrize("router_rank", [1, 2])
@pytest.mark.parametrize("sets", [1, 5])
def test_mosara_trainable_count(out, inner, sets, router_rank):
    """n k + out + q (k + n), for n = 1 k + out and no router; nothing else has requires_grad."""
    host, _ = linear_host(out, inner)
    sara.attach_mosara(host, targets=["0"], sets=sets, router_rank=router_rank)
    k, names = len(host[0].Vt), ROUTED if sets == 5 else {"Lam", "v"}
    assert {name for name, p in host[0].named_parameters() if p.requires_grad} == names
    assert sum(p.numel() for p in host.parameters() if p.requires_grad) == (
        sets * k + out + (router_rank * (k + sets) if sets == 5 else 0))
    assert host.state_dict().keys() == {f"0.{name}" for name in names | {"weight", "bias", "U", "Vt"}}


@pytest.mark.parametrize("out, inner", SHAPES)
@pytest.mark.parametrize("init", ["lam", "lora"])
def test_sara_trainable_count(out, inner, init):
    """k (in + out + 1) in A, lam and B; nothing else has requires_grad."""
    host, _ = linear_host(out, inner)
    sara.attach(host, targets=["0"], threshold=0.3, init=init)
    assert {name for name, p in host[0].named_parameters() if p.requires_grad} == {"A", "lam", "B"}
    assert sum(p.numel() for p in host.parameters() if p.requires_grad) == len(host[0].lam) * (out + inner + 1)
    assert host.state_dict().keys() == {f"0.{name}" for name in ("weight", "bias", "A", "lam", "B")}


@pytest.mark.parametrize("out, inner", SHAPES)
def test_bases_are_the_leading_singular_vectors_with_fixed_signs(out, inner):
    """U and Vt are orthonormal, span the fp64 SVD's leading part, and every v_i has its largest entry positive."""
    host, _ = linear_host(out, inner)
    W = host[0].weight.detach().double()
    sara.attach_mosara(host, targets=["0"])
    U, Vt = host[0].U, host[0].Vt
    k = len(Vt)
    assert 1 < k < 24 and (Vt.gather(1, Vt.abs().argmax(1, keepdim=True)) > 0).all()
    for factor in (U.T, Vt):
        assert (factor.double() @ factor.T.double() - torch.eye(k)).abs().max() < 1e-5
    left, sigma, right = torch.linalg.svd(W, full_matrices=False)
    assert ((U.double() * sigma[:k]) @ Vt.double() - (left[:, :k] * sigma[:k]) @ right[:k]).abs().max() < 1e-5


def test_signs_of_the_decomposition_do_not_matter(monkeypatch):
    """An eigensolver that returns other signs leads to the same U, Vt: both sides are turned along."""
    plain, flipped, eigh = linear_host()[0], linear_host()[0], torch.linalg.eigh
    sara.attach_mosara(plain, targets=["0"])

    def turned(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * torch.where(torch.arange(len(values)) % 3 == 0, -1.0, 1.0)

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    sara.attach_mosara(flipped, targets=["0"])
    assert torch.equal(plain[0].U, flipped[0].U) and torch.equal(plain[0].Vt, flipped[0].Vt)


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


def test_training_leaves_bases_and_weights_alone():
    """After some steps U, Vt, weight and bias have the same bits, and everything that trains has moved."""
    host, x = linear_host()
    sara.attach_mosara(host, targets=["0"])
    before = snapshot(host)
    for _ in range(3):
        step(host, x)
    moved = {name for name, tensor in host.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"0.{name}" for name in ROUTED} == set(adapter.trainable(host))


# ---- starts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("attach, options, first, all_of_them", [
    (sara.attach, {}, {"lam"}, {"A", "lam", "B"}),
    (sara.attach, {"init": "lora"}, {"B"}, {"A", "lam", "B"}),
    (sara.attach_mosara, {}, {"v"}, ROUTED),
    (sara.attach_mosara, {"router_rank": 2}, {"v"}, ROUTED),
    (sara.attach_mosara, {"sets": 1}, {"v"}, {"Lam", "v"}),
    (sara.attach_mosara, {"v_mode": "output"}, ROUTED, ROUTED)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_the_starts(attach, options, first, all_of_them, dtype):
    """At step 0 exactly the tensors of zeros have a gradient (in output mode all), after one step every one has."""
    host, x = linear_host()
    attach(host, targets=["0"], **options)
    host, x = host.to(dtype), x.to(dtype)
    assert moving(host, x) == first
    step(host, x)
    assert moving(host, x) == all_of_them


@pytest.mark.parametrize("attach, zeroed", [(sara.attach, ("lam", "B")), (sara.attach_mosara, ("v", "Lam"))])
def test_two_tensors_of_zeros_are_dead(attach, zeroed):
    """The start that no init offers: no gradient anywhere, so a step changes nothing. Output mode escapes."""
    host, _, x = filled(attach)
    for name in zeroed:
        getattr(host[0], name).data.zero_()
    assert moving(host, x) == set()
    before = snapshot(host)
    step(host, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in host.state_dict().items())
    if attach is sara.attach_mosara:
        host[0].v_mode = "output"
        assert {"v", "Lam"} <= moving(host, x)


def test_equal_rows_of_lam_leave_the_router_without_gradient():
    """With v != 0 everything moves but the router, which gets rounding of 1e-15; attach draws independent rows."""
    host, layer, x = filled(sara.attach_mosara)
    layer.Lam.data.copy_(layer.Lam.data[:1].repeat(5, 1))
    found = gradients(host, x / 100)
    assert found["v"].any() and found["Lam"].any()
    assert max(found["W_g1"].abs().max(), found["W_g2"].abs().max()) <= 1e-15
    layer.Lam.data[0] *= 2
    assert gradients(host, x / 100)["W_g2"].abs().max() > 1e-9


def test_zero_router_is_dead_but_one_zero_factor_recovers():
    """W_g1 = W_g2 = 0 with v != 0: never a router gradient; one zero factor alone recovers after a step."""
    host, layer, x = filled(sara.attach_mosara)
    layer.W_g1.data.zero_()
    assert moving(host, x) == ROUTED - {"W_g2"}
    layer.W_g2.data.zero_()
    for _ in range(3):
        assert moving(host, x) == {"v", "Lam"}
        step(host, x, lr=1e-3)
    for zero in ("W_g1", "W_g2"):
        host, layer, x = filled(sara.attach_mosara)
        getattr(layer, zero).data.zero_()
        assert moving(host, x) == {"v", "Lam", zero}
        step(host, x, lr=1e-3)
        assert moving(host, x) == ROUTED


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


@pytest.mark.parametrize("attach", [sara.attach, sara.attach_mosara])
def test_seed_decides_the_start(attach):
    """The same seed draws the same factors whatever torch's global state, which is left alone; another seed others."""
    models = [toy_model() for _ in range(3)]
    for i, (model, seed) in enumerate(zip(models, (0, 0, 1))):
        torch.manual_seed(i)
        state = torch.random.get_rng_state()
        attach(model, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
    first, second, third = (adapter.trainable(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name in first if first[name].any()]
    assert len(drawn) >= 8 and not any(torch.equal(first[name], third[name]) for name in drawn)


def test_settings_that_do_not_exist_are_refused():
    """An unknown start or mode is answered with those that exist; there is at least one set and one router column."""
    for attach, options, message in (
            (sara.attach, {"init": "zeros"}, "unknown init 'zeros': choose lam or lora"),
            (sara.attach_mosara, {"v_mode": "none"}, "unknown v_mode 'none': choose branch or output"),
            (sara.attach_mosara, {"sets": 0}, "sets 0 and router_rank 1 must be at least 1"),
            (sara.attach_mosara, {"router_rank": 0}, "sets 5 and router_rank 0 must be at least 1")):
        model = toy_model()
        with pytest.raises(ValueError, match=message):
            attach(model, **options)
        assert all(p.requires_grad for p in model.parameters()) and not adapter.adapted_layers(model)


# ---- merging and files ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, reason", [
    ({}, "each token has its own update through the router, so no single matrix equals it"),
    ({"v_mode": "output"}, "v_mode='output' scales the base's output and bias too"),
    ({"v_mode": "output", "sets": 1}, "v_mode='output' scales the base's output and bias too")])
def test_what_no_matrix_equals_is_refused_with_the_reason(options, reason):
    """merge(), delta() and lora_factors() name it; in output mode gates do not help delta() either."""
    host, layer, x = filled(sara.attach_mosara, **options)
    before = host(x)
    for call, what in ((lambda: adapter.merge(host), "0 cannot be merged: "), (layer.delta, r"there is no delta\(\): "),
                       (layer.lora_factors, r"there are no lora_factors\(\): ")):
        with pytest.raises(ValueError, match=what + reason):
            call()
    assert reason in layer.unmergeable and host[0] is layer and torch.equal(host(x), before)
    gates = torch.ones(len(layer.Lam)).double() / len(layer.Lam)
    if options:
        with pytest.raises(ValueError, match=reason):
            layer.delta(gates)
    else:
        expected = torch.diag(layer.v) @ layer.U @ torch.diag(layer.Lam.mean(0)) @ layer.Vt
        assert (layer.delta(gates) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("out, inner", SHAPES)
def test_mosara_of_one_set_is_a_matrix(out, inner):
    """n = 1: forward = F.linear(x, weight + delta(), bias) to 1e-12, and lora_factors make delta()."""
    _, layer, x = filled(sara.attach_mosara, out, inner, sets=1)
    down, up = layer.lora_factors()
    assert layer.unmergeable is None
    assert (layer(x) - F.linear(x, layer.weight + layer.delta(), layer.bias)).abs().max() < 1e-12
    assert down.shape == (len(layer.Vt), inner) and (up @ down - layer.delta()).abs().max() < 1e-12


def test_reload_in_a_fresh_process_without_any_decomposition(tmp_path):
    """Both methods, in every form, load to the same bits with torch's SVD routines gone; 1.01 W0 is refused."""
    forms = {"lam": (sara.attach, {}), "lora": (sara.attach, {"init": "lora", "alpha": 8, "threshold": 0.2}),
             "routed": (sara.attach_mosara, {"router_rank": 2, "seed": 3}), "one": (sara.attach_mosara, {"sets": 1}),
             "output": (sara.attach_mosara, {"v_mode": "output", "targets": ["o_proj"]})}
    logits = {}
    for form, (attach, options) in forms.items():
        model = toy_model()
        attach(model, **options)
        adapter_file.save(perturb(model), tmp_path / f"{form}.safetensors")
        logits[form] = model(tokens())
    assert not any(torch.equal(found, toy_model()(tokens())) for found in logits.values())
    write_safetensors(tmp_path / "logits.safetensors", logits)
    code = ("import sys; sys.path[:0] = ['.', 'tests']\n"
            "import torch, adapter, toy, tensorfile\n"
            "for name in ('svd', 'eigh', 'eigvalsh', 'svdvals'):\n"
            "    setattr(torch.linalg, name, None)\n"
            f"folder = {str(tmp_path)!r}\n"
            "for form, expected in tensorfile.read_safetensors(folder + '/logits.safetensors')[0].items():\n"
            "    model, other = toy.toy_model(), toy.toy_model()\n"
            "    config = adapter_file.load(model, f'{folder}/{form}.safetensors')\n"
            "    assert config == model.adapter_config, form\n"
            "    assert torch.equal(model(toy.tokens()), expected), form\n"
            "    for parameter in other.parameters():\n"
            "        parameter.data *= 1.01\n"
            "    try:\n"
            "        adapter_file.load(other, f'{folder}/{form}.safetensors')\n"
            "    except ValueError as error:\n"
            "        assert 'belongs to another base model' in str(error), error\n"
            "    else:\n"
            "        raise AssertionError(form)\n")
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mosara_bases_come_from_the_file_not_from_a_decomposition(tmp_path):
    """A file whose v_1 and u_1 are both flipped loads as it is: the update's matrices agree, the gates do not."""
    model, loaded = toy_model(), toy_model()
    sara.attach_mosara(model)
    perturb(model)
    for _, layer in adapter.adapted_layers(model):
        layer.U[:, 0] *= -1
        layer.Vt[0] *= -1
    adapter_file.save(model, tmp_path / "a.safetensors")
    adapter_file.load(loaded, tmp_path / "a.safetensors")
    assert torch.equal(model(tokens()), loaded(tokens()))
    fixed = toy_model()
    sara.attach_mosara(fixed)
    perturb(fixed)
    assert (fixed(tokens()) - loaded(tokens())).abs().max() > 1e-3


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
    assert found.keys() == {"top_gate", "gates", "change"} and len(found["gates"]) == sets
    assert abs(found["top_gate"] - sum(tops) / 2) < 1e-6
    ranked = sum(gates.sort(descending=True).values for gates in means) / 2
    assert (torch.tensor(found["gates"]) - ranked).abs().max() < 1e-6
    if v_mode == "output":
        assert found["change"] is None
        return
    change = (sum(c * c for c in changes) / sum(s * s for s in sizes)) ** 0.5
    assert abs(found["change"] - change) < 1e-6 < 0.1 < change
    assert sets > 1 or abs(found["change"] - adapter.relative_change(host)) < 1e-6


@pytest.mark.parametrize("raises", [False, True])
def test_gate_statistics_leaves_nothing_behind(raises):
    """No hook stays and no gradient is recorded, also when the model raises halfway through."""
    class Broken(nn.Module):
        def forward(self, x):
            assert not torch.is_grad_enabled()
            if raises:
                raise RuntimeError("halfway")
            return x
    host, x = linear_host()
    host.append(Broken())
    sara.attach_mosara(host, targets=["0"])
    if raises:
        with pytest.raises(RuntimeError, match="halfway"):
            sara.gate_statistics(host, x)
    else:
        sara.gate_statistics(host, x)
    assert not host[0]._forward_pre_hooks and not host[0]._forward_hooks and host[0].v.grad is None


def test_gate_statistics_of_a_language_model():
    """On token ids: gates of a distribution, 1/n for a router of zeros, no change at step 0."""
    model = toy_model()
    sara.attach_mosara(model, sets=4)
    found = sara.gate_statistics(model, tokens())
    assert found["change"] == 0 and abs(sum(found["gates"]) - 1) < 1e-6 and 0.25 < found["top_gate"] < 1
    for _, layer in adapter.adapted_layers(model):
        layer.W_g1.data.zero_()
    found = sara.gate_statistics(model, tokens())
    assert found["top_gate"] == 0.25 and found["gates"] == [0.25] * 4


# ---- a threshold for a budget ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("fit, attach, options, count", [
    (sara.fit, sara.attach, {}, lambda k, out, inner: k * (out + inner + 1)),
    (sara.fit, sara.attach, {"targets": ["o_proj", "down_proj"]}, lambda k, out, inner: k * (out + inner + 1)),
    (sara.fit_mosara, sara.attach_mosara, {}, lambda k, out, inner: 5 * k + out + k + 5),
    (sara.fit_mosara, sara.attach_mosara, {"sets": 3, "router_rank": 2},
     lambda k, out, inner: 3 * k + out + 2 * (k + 3)),
    (sara.fit_mosara, sara.attach_mosara, {"sets": 1, "router_rank": 2}, lambda k, out, inner: k + out)])
def test_fit_is_the_nearest_of_all_thousandths(fit, attach, options, count):
    """No m in 0.001 .. 1 comes nearer, also to budgets below the smallest and beyond the largest; attach agrees."""
    model = toy_model()
    linears = adapter.find_linears(model, options.get("targets", sara.TARGETS))
    cumulative = {name: torch.linalg.svdvals(linear.weight.detach().double()).cumsum(0) for name, linear in linears}
    goals = torch.arange(1, 1001).double()[:, None] / 1000 * (1 - 1e-9)
    ks = {name: 1 + (c < goals * c[-1]).sum(1) for name, c in cumulative.items()}  # {name: (1000,)}
    totals = sum(count(ks[name], *linear.weight.shape) for name, linear in linears)  # (1000,)
    low, high = totals[0].item(), totals[-1].item()
    reachable = totals.unique().tolist()
    gaps = [(a + b) // 2 + shift for a, b in zip(reachable, reachable[1:]) for shift in (0, 1)]
    for params in [1, low, low + 1, high - 1, high, 10 * high] + gaps[::2] + gaps[1::8] + reachable[::5]:
        found = fit(model, params, **options)
        index = round(1000 * found["threshold"]) - 1
        assert abs(totals[index] - params) == (totals - params).abs().min(), params
        assert found["threshold"] == (index + 1) / 1000
        assert found["ks"] == {name: k[index].item() for name, k in ks.items()}
    assert fit(model, 10 * high, **options)["ks"] == {name: min(linear.weight.shape) for name, linear in linears}
    assert all(p.requires_grad for p in model.parameters()) and not adapter.adapted_layers(model)
    found = fit(model, (low + high) // 2, **options)
    attach(model, threshold=found["threshold"], **options)
    assert model.adapter_config["ks"] == found["ks"]
    trained = sum(p.numel() for p in adapter.trainable(model).values())
    assert trained == totals[round(1000 * found["threshold"]) - 1]


def test_fit_refuses_what_attach_refuses():
    """An unknown target, or a model that has an adapter already."""
    model = toy_model()
    sara.attach(model)
    for fit in (sara.fit, sara.fit_mosara):
        with pytest.raises(ValueError, match="'w_pack' matches no linear layer"):
            fit(toy_model(), 1000, targets=["w_pack"])
        with pytest.raises(ValueError, match="sara is already attached"):
            fit(model, 1000)


def test_router_is_fp32_under_autocast():
    """A caller's autocast lowers neither the router's products nor its softmax."""
    host, x = linear_host()
    sara.attach_mosara(host, targets=["0"])
    h = x @ host[0].Vt.T
    expected = host[0].gates(h)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(host[0].gates(h), expected) and expected.dtype == torch.float32


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


@pytest.mark.parametrize("attach", [sara.attach, sara.attach_mosara])
def test_weights_that_are_not_finite_are_refused_by_name(attach):
    """A NaN in a weight has no spectrum: the layer is named, nothing has changed."""
    host, _ = linear_host()
    host[0].weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="0 has weights that are not finite"):
        attach(host, targets=["0"])
    assert type(host[0]) is nn.Linear and host[0].weight.requires_grad
