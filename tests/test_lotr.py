"""LoTR: formulas and gradients in fp64, sharing, groups, counts, step size, merge and files."""
import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import adapter
import lotr
import train
from lora import LoRALinear
from model import Config, Model
from tests.toy import attach, perturb, snapshot, tokens, toy_model
from weights import adapter_file
from weights.safetensors import read_safetensors

SHAPES = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32), "gate_proj": (32, 48),
          "up_proj": (32, 48), "down_proj": (48, 32)}  # the toy model's, (in, out)


def default_shapes():
    """The default model without weights."""
    with torch.device("meta"):
        return Model(Config(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                            num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True))


def stack(*shapes, device=None):
    """Linears of these (in, out) sizes, one after the other, all called `proj`."""
    return nn.Sequential(*(nn.Sequential(OrderedDict(proj=nn.Linear(*shape, bias=False, device=device)))
                           for shape in shapes))


def last(name):
    return name.rpartition(".")[2]


def members(model):
    """{group: names of the layers that use its A and B}."""
    return {key: [name for name, layer in adapter.adapted_layers(model) if layer.A is shared.A and layer.B is shared.B]
            for key, shared in model.lotr.named_children()}


def trained_count(model):
    return sum(p.numel() for p in adapter.trainable(model).values())


def loss_of(model):
    return nn.functional.cross_entropy(model(tokens())[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


def training_steps(model, count):
    optimizer = torch.optim.AdamW(train.decay_groups(model, 0.0), lr=1e-2)
    for _ in range(count):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def moved(model, before):
    """{last name component: set of whether such tensors differ from the snapshot}."""
    changes = {}
    for name, tensor in model.state_dict().items():
        changes.setdefault(last(name), set()).add(not torch.equal(tensor, before[name]))
    return changes


def element_form(layer, core):
    """delta[i, j] = c sum_pq B[i, q] G[p, q] A[j, p] in fp64, for any core."""
    return layer.c * torch.einsum("iq,pq,jp->ij", layer.B.double(), core.double(), layer.A.double())


def reassigned(model):
    """Every parameter exchanged for a new object."""
    model.load_state_dict(snapshot(model), assign=True)
    return model


def reloaded(model, folder):
    """What a fresh base becomes with the saved adapter."""
    fresh = toy_model(num_hidden_layers=len(model.model.layers))
    adapter_file.save(model, folder / "a.safetensors")
    adapter_file.load(fresh, folder / "a.safetensors")
    return fresh


def assert_untouched(model, before):
    assert not adapter.adapted_layers(model) and not hasattr(model, "lotr") and not hasattr(model, "adapter_config")
    assert before.keys() == model.state_dict().keys() and all(p.requires_grad for p in model.parameters())


# ---- start and formulas ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"group_by": "shape"}, {"core_only": True}])
def test_step_zero_is_bitwise_the_base_in_every_dtype(dtype, options):
    """Attaching changes no bit of the logits, and A, B and G are fp32 whatever the base is."""
    model = toy_model().to(dtype)
    before = model(tokens())
    attach(model, "lotr", **options)
    after = model(tokens())
    assert after.dtype == dtype and torch.equal(before, after)
    assert {f.dtype for _, layer in adapter.adapted_layers(model) for f in layer.factors()} == {torch.float32}


def test_start_is_normal_factors_and_zero_cores():
    """A (in, r) and B (out, r) are N(0, 1), others in each group; every core (r, r) is zero and a tensor of its own."""
    model = attach(toy_model(), "lotr", rank=16)
    factors = []
    for key, (inner, out) in SHAPES.items():
        shared = model.lotr.get_submodule(key)
        assert shared.A.shape == (inner, 16) and shared.B.shape == (out, 16)
        factors += [shared.A.detach().flatten(), shared.B.detach().flatten()]
    for side in (torch.cat(factors[::2]), torch.cat(factors[1::2])):  # some 3700 numbers each
        assert abs(side.mean()) < 0.07 and abs(side.std() - 1) < 0.05
        assert abs((side.abs() < 1).float().mean() - 0.683) < 0.03
    assert len({tuple(factor[:16].tolist()) for factor in factors}) == 14
    cores = [layer.G for _, layer in adapter.adapted_layers(model)]
    assert all(core.shape == (16, 16) and not core.any() for core in cores) and len({id(core) for core in cores}) == 14


def test_seed_decides_the_factors():
    """The same seed draws the same A and B whatever the global generator's state, another seed draws others."""
    first, again, other = (attach(toy_model(base), "lotr", seed=seed).lotr.state_dict()
                           for base, seed in ((0, 3), (1, 3), (0, 4)))
    for name in first:
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert not torch.equal(first["q_proj.A"], attach(toy_model(), "lotr").lotr.q_proj.A)


@pytest.mark.parametrize("options", [{}, {"group_by": "shape"}])
def test_default_alpha_is_three_over_root_in_per_group(options):
    """c = alpha / r with alpha = 3 / sqrt(in): 0.125 for in 576 and 0.0765 for in 1536."""
    for _, layer in adapter.adapted_layers(attach(default_shapes(), "lotr", rank=32, **options)):
        assert round(layer.c * 32, 4) == {576: 0.125, 1536: 0.0765}[layer.in_features]


@pytest.mark.parametrize("alpha", [1, 0.1])
def test_a_given_alpha_applies_to_every_group(alpha):
    """The official alpha = 1, or any other number, holds in all groups, divided by r."""
    for rank in (4, 8):
        layers = adapter.adapted_layers(attach(toy_model(), "lotr", rank=rank, alpha=alpha))
        assert {layer.c for _, layer in layers} == {alpha / rank}


@pytest.mark.parametrize("inner, out", [(24, 24), (24, 40), (40, 24)])
def test_delta_and_forward_against_the_element_form(inner, out):
    """delta() and the factored forward, bias included, equal c sum_pq B[i, q] G[p, q] A[j, p] in fp64, of rank r."""
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(inner, out)), torch.randn(3, 7, inner)
    layer = perturb(attach(host, "lotr", rank=6, targets=["0"]))[0]
    expected = element_form(layer, layer.G)
    assert abs(layer.c - 3 / inner ** 0.5 / 6) < 1e-12
    assert (layer.delta() - expected).abs().max() < 1e-5 and torch.linalg.matrix_rank(expected) == 6
    moved_weight = layer.weight.double() + expected
    assert (host(x) - (x.double() @ moved_weight.T + layer.bias.double())).abs().max() < 1e-5


def test_forward_costs_two_thin_products_and_the_core():
    """2 r (in + out) FLOPs per token beside the base's 2 in out, 2 in r^2 once: delta is never built."""
    host = attach(nn.Sequential(nn.Linear(24, 40)), "lotr", rank=6, targets=["0"])
    with FlopCounterMode(display=False) as counter:
        host(torch.randn(5, 24))
    assert counter.get_total_flops() == 5 * (2 * 24 * 40 + 2 * 6 * 24) + 2 * 24 * 6 * 6  # the counter does not see addmm_, 2 r out


# ---- gradients and steps --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("group_by", ["name", "shape"])
def test_gradients_equal_the_closed_formulas_in_float64(group_by):
    """dG_s = c A^T dW_s^T B, dA = c sum_s dW_s^T B G_s^T, dB = c sum_s dW_s A G_s; dW_s is that of full weights."""
    model = perturb(attach(toy_model(), "lotr", group_by=group_by).double(), scale=0.3)
    loss_of(model).backward()
    layers = dict(adapter.adapted_layers(model))
    weights = {f"{name}.weight": (layer.weight + layer.delta()).detach().requires_grad_()
               for name, layer in layers.items()}
    plain = toy_model().double()
    loss = loss_of(lambda ids: torch.func.functional_call(plain, weights, ids))
    dW = dict(zip(layers, torch.autograd.grad(loss, list(weights.values()))))
    groups = members(model)
    assert sorted(sum(groups.values(), [])) == sorted(layers)
    for names in groups.values():
        dA = dB = 0
        for name in names:
            A, G, B = (factor.detach() for factor in (layers[name].A, layers[name].G, layers[name].B))
            c = layers[name].c
            assert (G - G.T).norm() > 0.5 * G.norm() and G.dtype == torch.float64
            assert torch.allclose(layers[name].G.grad, c * A.T @ dW[name].T @ B, rtol=1e-9, atol=1e-14)
            dA, dB = dA + c * dW[name].T @ B @ G.T, dB + c * dW[name] @ A @ G
        assert len(names) > 1 and dA.abs().max() > 1e-5 and dB.abs().max() > 1e-5
        assert torch.allclose(layers[name].A.grad, dA, rtol=1e-9, atol=1e-14)
        assert torch.allclose(layers[name].B.grad, dB, rtol=1e-9, atol=1e-14)


def test_first_step_moves_the_cores_only_and_the_second_everything():
    """dA = dB = 0 exactly and every dG_s non-zero at step 1; A and B follow at step 2; the base never moves."""
    model = attach(toy_model(), "lotr")
    before = snapshot(model)
    loss_of(model).backward()
    for _, layer in adapter.adapted_layers(model):
        assert not layer.A.grad.any() and not layer.B.grad.any() and layer.G.grad.ne(0).all()
    model.zero_grad()
    training_steps(model, 1)
    first = moved(model, before)
    assert (first["A"], first["B"], first["G"], first["weight"]) == ({False}, {False}, {True}, {False})
    model.load_state_dict(before)
    training_steps(model, 2)
    second = moved(model, before)
    assert (second["A"], second["B"], second["G"], second["weight"]) == ({True}, {True}, {True}, {False})


def test_core_only_trains_the_cores_and_nothing_else():
    """With core_only A and B get no gradient and stay bitwise, and every G has moved after one step as after five."""
    model = attach(toy_model(), "lotr", core_only=True)
    before = snapshot(model)
    assert {last(name) for name in adapter.trainable(model)} == {"G"} and trained_count(model) == 14 * 4 ** 2
    for count in (1, 4):
        training_steps(model, count)
        changes = moved(model, before)
        assert changes.pop("G") == {True} and set.union(*changes.values()) == {False}
    assert all(layer.A.grad is None and layer.B.grad is None for _, layer in adapter.adapted_layers(model))


def first_adam_step(inner, method, **options):
    """RMS change of a linear's output on new unit-RMS inputs, in units of lr, after one step of Adam."""
    torch.manual_seed(0)
    host, lr = attach(nn.Sequential(nn.Linear(inner, 576)), method, targets=["0"], **options), 1e-3
    optimizer = torch.optim.Adam(adapter.trainable(host).values(), lr=lr)
    (host(torch.randn(256, inner)) * torch.randn(256, 576)).sum().backward()
    x = torch.randn(256, inner)
    before = host(x)
    optimizer.step()
    return ((host(x) - before).square().mean().sqrt() / lr).item()


@pytest.mark.parametrize("inner", [576, 1536])
def test_first_step_is_as_large_as_loras(inner):
    """alpha lr sqrt(in) for LoTR at any rank, 3 lr by default; (alpha_L / r_L) lr sqrt(r_L / 3) for LoRA: alike."""
    default = first_adam_step(inner, "lotr", rank=32)
    assert abs(default / 3 - 1) < 0.2 and abs(first_adam_step(inner, "lotr", rank=8) / 3 - 1) < 0.2
    assert abs(first_adam_step(inner, "lotr", rank=32, alpha=1) / inner ** 0.5 - 1) < 0.2
    for rank, alpha in ((8, 16), (32, 32)):
        lora = first_adam_step(inner, "lora", rank=rank, alpha=alpha)
        assert abs(lora / (alpha / rank * (rank / 3) ** 0.5) - 1) < 0.1 and abs(default / lora - 1) < 0.2


def test_weight_decay_reaches_the_cores_only():
    """decay_groups gives A and B decay 0 and G the given one: a step on zero gradients shrinks G alone."""
    model = perturb(attach(toy_model(), "lotr"))
    before = snapshot(model)
    groups = train.decay_groups(model, 0.5)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {last(name): decay[id(p)] for name, p in adapter.trainable(model).items()} == {"A": 0.0, "B": 0.0, "G": 0.5}
    for parameter in adapter.trainable(model).values():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(groups, lr=0.1).step()
    for name, tensor in model.state_dict().items():
        if last(name) == "G":
            assert torch.allclose(tensor, 0.95 * before[name], rtol=1e-6, atol=0)
        else:
            assert torch.equal(tensor, before[name]), name


def test_optimizer_holds_each_tensor_once():
    """decay_groups lists every trainable tensor exactly once: cores and shared factors, or with core_only the cores."""
    for core_only, names in ((False, {"A", "B", "G"}), (True, {"G"})):
        model = attach(toy_model(), "lotr", core_only=core_only)
        held = [id(p) for group in train.decay_groups(model, 0.1) for p in group["params"]]
        known = {id(p): last(name) for name, p in model.named_parameters()}
        assert len(held) == len(set(held)) == (14 if core_only else 28) and {known[i] for i in held} == names


# ---- sharing --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    lambda model, folder: model, lambda model, folder: model.double(), lambda model, folder: model.bfloat16(),
    lambda model, folder: copy.deepcopy(model), lambda model, folder: reassigned(model), reloaded],
    ids=["attached", "double", "bfloat16", "deepcopy", "reassigned", "reloaded"])
@pytest.mark.parametrize("group_by", ["name", "shape"])
def test_layers_of_a_group_share_one_a_and_one_b(group_by, change, tmp_path):
    """q of layers 0 and 5 have the same A and B objects, q and k do not; the state dict holds each of them once."""
    model = change(perturb(attach(toy_model(num_hidden_layers=6), "lotr", group_by=group_by)), tmp_path)
    layers, groups, plain = dict(adapter.adapted_layers(model)), members(model), toy_model(num_hidden_layers=6)
    assert sorted(map(len, groups.values())) == ([6] * 7 if group_by == "name" else [6, 12, 12, 12])
    assert sorted(sum(groups.values(), [])) == sorted(layers)
    q0, q5, k0 = (layers[f"model.layers.{name}_proj"] for name in ("0.self_attn.q", "5.self_attn.q", "0.self_attn.k"))
    assert q0.A is q5.A and q0.B is q5.B and q0.A is not k0.A and q0.B is not k0.B and q0.G is not q5.G
    added = {f"lotr.{key}.{factor}" for key in groups for factor in "AB"} | {f"{name}.G" for name in layers}
    assert model.state_dict().keys() - plain.state_dict().keys() == added
    registered, before = (list(m.named_parameters(remove_duplicate=False)) for m in (model, plain))
    assert len(registered) == len(before) + len(added)
    assert model(tokens()).isfinite().all()


def test_a_deep_copy_shares_with_itself_and_not_with_the_original():
    """Moving the copy's A moves all its q layers and none of the original's."""
    model = perturb(attach(toy_model(), "lotr"))
    twin = copy.deepcopy(model)
    before = {name: layer.delta() for name, layer in adapter.adapted_layers(model)}
    with torch.no_grad():
        twin.lotr.q_proj.A.add_(1)
    assert all(torch.equal(layer.delta(), before[name]) for name, layer in adapter.adapted_layers(model))
    for name, layer in adapter.adapted_layers(twin):
        assert torch.equal(layer.delta(), before[name]) == (last(name) != "q_proj")


@pytest.mark.parametrize("group_by", ["name", "shape"])
def test_a_shared_factor_reaches_its_group_and_a_core_its_layer(group_by):
    """Perturbing A or B changes the output of every layer of the group and of no other, G that of its layer alone."""
    model = perturb(attach(toy_model(), "lotr", group_by=group_by))
    layers, groups = dict(adapter.adapted_layers(model)), members(model)
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))

    def outputs():
        return {name: layer(x[:, :layer.in_features]) for name, layer in layers.items()}

    before = outputs()
    reach = [(factor, groups[key]) for key, shared in model.lotr.named_children() for factor in shared.parameters()]
    reach += [(layer.G, [name]) for name, layer in layers.items()]
    for factor, names in reach:
        kept = factor.detach().clone()
        factor.data[0] += 1
        assert {name for name, output in outputs().items() if not torch.equal(output, before[name])} == set(names)
        factor.data.copy_(kept)


# ---- groups and refusals --------------------------------------------------------------------------------------------

def test_groups_of_the_default_model():
    """By name 7 groups of 30; by shape {q,o}, {k,v}, {gate,up} with M = 60 each and {down} with M = 30."""
    by_name = members(attach(default_shapes(), "lotr"))
    assert by_name.keys() == set(adapter.TARGETS)
    assert all(len(names) == 30 and {last(name) for name in names} == {key} for key, names in by_name.items())
    by_shape = {key: ({last(name) for name in names}, len(names))
                for key, names in members(attach(default_shapes(), "lotr", group_by="shape")).items()}
    assert by_shape == {"576x576": ({"q_proj", "o_proj"}, 60), "576x192": ({"k_proj", "v_proj"}, 60),
                        "576x1536": ({"gate_proj", "up_proj"}, 60), "1536x576": ({"down_proj"}, 30)}


def test_a_group_of_unequal_shapes_is_refused():
    """Two `proj` that differ in shape cannot share A and B: the host is left as it was, and goes by shape."""
    for shapes in [(8, 12), (12, 16)], [(8, 12), (12, 8)], [(8, 12), (12, 12)], [(8, 12), (8, 16)]:
        host = stack(*shapes)
        before = snapshot(host)
        with pytest.raises(ValueError, match="called proj differ in shape .*choose other targets, or group_by='shape'"):
            attach(host, "lotr", targets=["proj"])
        assert_untouched(host, before)
        with pytest.raises(ValueError, match="called proj differ in shape"):
            lotr.fit(host, 100, targets=["proj"])
        attach(host, "lotr", targets=["proj"], group_by="shape")
        assert members(host) == {f"{inner}x{out}": [f"{i}.proj"] for i, (inner, out) in enumerate(shapes)}


@pytest.mark.parametrize("options, message", [
    ({"group_by": "layer"}, "unknown group_by 'layer': choose name or shape"),
    ({"rank": 193}, "rank 193 is out of range: it must be 1 .. 192"), ({"rank": 0}, "rank 0 is out of range"),
    ({"targets": ["q_proj", "w_pack"]}, "target 'w_pack' matches no linear layer")])
def test_what_cannot_be_attached_is_refused(options, message):
    """An unknown grouping, a rank above 192 on the default model or below 1, an unknown target: nothing has changed."""
    model = default_shapes()
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        lotr.attach(model, **options)
    assert_untouched(model, before)
    lotr.attach(model, rank=192)


def test_a_second_attach_is_refused():
    """LoTR on LoTR, and LoTR on a model that has another method: both raise, and what was there stays."""
    for method in ("lotr", "lora"):
        model = attach(toy_model(), method)
        before = snapshot(model)
        with pytest.raises(ValueError, match=f"{method} is already attached"):
            attach(model, "lotr")
        assert before.keys() == model.state_dict().keys() and set.union(*moved(model, before).values()) == {False}


def test_a_sequential_host_passes_through_the_holder():
    """An nn.Sequential calls the holder too, as its last module: it changes nothing, before and after training."""
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 12)), torch.randn(5, 20)
    before = host(x)
    attach(host, "lotr", targets=["0", "2"])
    assert isinstance(host[-1], adapter.Shared) and torch.equal(host(x), before)
    perturb(host)
    assert torch.equal(host(x), host[2](host[0](x).relu())) and not torch.equal(host(x), before)
    expected = host(x)
    adapter.merge(host)
    assert len(host) == 3 and (host(x) - expected).abs().max() < 1e-5


# ---- counts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("targets, rank, by_name, by_shape, core, lora", [
    (adapter.TARGETS, 16, 216_576, 152_064, 53_760, 4_884_480),
    (adapter.TARGETS, 32, 540_672, 411_648, 215_040, 9_768_960),
    (adapter.TARGETS, 64, 1_511_424, 1_253_376, 860_160, 19_537_920),
    (("q_proj", "v_proj"), 16, 46_080, 46_080, 15_360, 921_600),
    (("q_proj", "v_proj"), 32, 122_880, 122_880, 61_440, 1_843_200),
    (("q_proj", "v_proj"), 64, 368_640, 368_640, 245_760, 3_686_400)])
def test_counts_on_the_default_model(targets, rank, by_name, by_shape, core, lora):
    """r (in + out) + M r^2 per group, M r^2 with core_only, summed over the default model's groups; LoRA beside it."""
    assert trained_count(attach(default_shapes(), "lotr", rank=rank, targets=targets)) == by_name
    assert trained_count(attach(default_shapes(), "lotr", rank=rank, targets=targets, group_by="shape")) == by_shape
    for group_by in ("name", "shape"):
        model = attach(default_shapes(), "lotr", rank=rank, targets=targets, group_by=group_by, core_only=True)
        assert trained_count(model) == core
    assert trained_count(attach(default_shapes(), "lora", rank=rank, targets=targets)) == lora


@pytest.mark.parametrize("width, layers, rank, count", [
    (768, 24, 2, 3_168), (768, 24, 32, 73_728), (768, 24, 40, 99_840), (768, 24, 80, 276_480), (768, 24, 88, 321_024),
    (1024, 48, 64, 327_680)])
def test_count_of_one_group_of_square_matrices(width, layers, rank, count):
    """The paper's and the slides' counts for RoBERTa: one group of M matrices d x d has 2 d r + M r^2."""
    host = stack(*[(width, width)] * layers, device="meta")
    assert trained_count(attach(host, "lotr", rank=rank, targets=["proj"])) == count


@pytest.mark.parametrize("targets, budget, rank, count", [
    (adapter.TARGETS, 2_442_240, 86, 2_428_296), (adapter.TARGETS, 4_884_480, 130, 4_871_880),
    (("q_proj", "v_proj"), 460_800, 73, 459_900), (("q_proj", "v_proj"), 921_600, 109, 922_140)])
def test_rank_of_equal_budget_on_the_default_model(targets, budget, rank, count):
    """LoTR's rank for the budget of LoRA(8) and LoRA(16), and what it then trains."""
    model = default_shapes()
    assert lotr.fit(model, budget, targets=targets) == {"rank": rank}
    assert trained_count(attach(model, "lotr", targets=targets, **lotr.fit(model, budget, targets=targets))) == count


@pytest.mark.parametrize("options", [
    {}, {"group_by": "shape"}, {"core_only": True}, {"targets": ("k_proj", "down_proj")}])
def test_fit_against_every_rank_there_is(options):
    """fit is the rank in 1 .. 16 whose attached count comes nearest to the budget, and changes nothing itself."""
    counts = {rank: trained_count(attach(toy_model(), "lotr", rank=rank, **options)) for rank in range(1, 17)}
    model = toy_model()
    before = snapshot(model)
    for budget in [1, *range(100, counts[16] + 500, 371), *counts.values(), 10 ** 9]:
        nearest = min(counts, key=lambda rank: abs(counts[rank] - budget))
        assert lotr.fit(model, budget, **options) == {"rank": nearest}
    assert_untouched(model, before)


# ---- merge, export, files -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("group_by", ["name", "shape"])
def test_merge_takes_the_transposed_core(group_by):
    """W + c B G^T A^T gives the adapted logits for asymmetric cores; with G in the place of G^T it would not."""
    model = perturb(attach(toy_model(), "lotr", group_by=group_by))
    expected, layers = model(tokens()), dict(adapter.adapted_layers(model))
    assert {(layer.in_features, layer.out_features) for layer in layers.values()} == set(SHAPES.values())
    assert all((layer.G - layer.G.T).norm() > 0.5 * layer.G.norm() for layer in layers.values())
    right, wrong = ({f"{name}.weight": (layer.weight + element_form(layer, core(layer.G))).float()
                     for name, layer in layers.items()} for core in (lambda G: G, lambda G: G.T))
    adapter.merge(model)
    assert (model(tokens()) - expected).abs().max() < 1e-5
    for name in layers:
        assert (model.get_submodule(name).weight - right[f"{name}.weight"]).abs().max() < 1e-6
    assert (torch.func.functional_call(toy_model(), wrong, tokens()) - expected).abs().max() > 0.1


def test_merge_removes_the_holder():
    """A merged model has the base's keys and no `lotr`, and another method or LoTR itself can be attached."""
    for method in ("lora", "lotr"):
        model = perturb(attach(toy_model(), "lotr"))
        adapter.merge(model)
        assert not hasattr(model, "lotr") and model.state_dict().keys() == toy_model().state_dict().keys()
        expected = model(tokens())
        assert torch.equal(attach(model, method)(tokens()), expected) and model.adapter_config["method"] == method


def test_export_is_a_plain_lora_of_rank_r():
    """LoRA layers with down = A^T (r, in) and up = c B G^T (out, r) on the base give the same logits."""
    model, plain = perturb(attach(toy_model(), "lotr")), toy_model()
    for name, layer in adapter.adapted_layers(model):
        down, up = layer.lora_factors()
        assert torch.equal(down, layer.A.T) and up.shape == (layer.out_features, 4)
        adapter.replace(plain, name, LoRALinear(plain.get_submodule(name), down, up))
    assert (plain(tokens()) - model(tokens())).abs().max() < 1e-5
    assert (toy_model()(tokens()) - model(tokens())).abs().max() > 0.1


@pytest.mark.parametrize("options", [
    {}, {"core_only": True}, {"group_by": "shape", "alpha": 1, "seed": 5},
    {"targets": ["k_proj", "down_proj"], "rank": 8}])
def test_save_then_load_is_bitwise(options, tmp_path):
    """A, B (also with core_only) and the cores are in the file, once: a fresh base with it has the same bits."""
    model = perturb(attach(toy_model(), "lotr", **options))
    with torch.no_grad():
        for factor in model.lotr.parameters():  # no longer what the seed would draw
            factor.mul_(1.1)
    fresh = reloaded(model, tmp_path)
    tensors = read_safetensors(tmp_path / "a.safetensors")[0]
    assert tensors.keys() == model.state_dict().keys() - toy_model().state_dict().keys()
    assert {last(name) for name in tensors} == {"A", "B", "G"}
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(fresh(tokens()), model(tokens())) and fresh.adapter_config == model.adapter_config
    assert adapter.trainable(fresh).keys() == adapter.trainable(model).keys() and members(fresh) == members(model)
    assert fresh.adapter_config == {"method": "lotr", "rank": 4, "alpha": None, "targets": list(adapter.TARGETS),
                                    "group_by": "name", "core_only": False, "seed": 0, **options}
