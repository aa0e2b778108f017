"""LoTR: formulas and gradients in fp64, sharing, groups, published counts, step size, merge and files."""
import copy

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import adapter
import lotr
import train
from lora import LoRALinear
from tests.toy import attach, perturb, snapshot, tokens, toy_model
from weights import adapter_file
from weights.safetensors import read_safetensors

GROUPINGS = pytest.mark.parametrize("group_by", ["shape", "name"])
Q_V = ("q_proj", "v_proj")
DEFAULT_BLOCK = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576),
                 "gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576)}  # (in, out)


def blocks(*sizes):
    """A host without weights, of blocks, each {name: (in, out) of a linear}."""
    return nn.Sequential(*(nn.ModuleDict({name: nn.Linear(*size, device="meta") for name, size in block.items()})
                           for block in sizes))


def default_shapes():
    """The default model's linears."""
    return blocks(*[DEFAULT_BLOCK] * 30)


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


def moved_by(steps, model):
    """{last name component: set of whether such tensors differ after these steps of AdamW}."""
    before, changes = snapshot(model), {}
    optimizer = torch.optim.AdamW(adapter.trainable(model).values(), lr=1e-2, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        changes.setdefault(last(name), set()).add(not torch.equal(tensor, before[name]))
    return changes


def reassigned(model):
    """Every parameter exchanged for a new object."""
    model.load_state_dict(snapshot(model), assign=True)
    return model


# ---- start and formulas ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_step_zero_is_bitwise_the_base_in_every_dtype(dtype):
    """Attaching changes no bit of the logits, and A, B and G are fp32 whatever the base is."""
    model = toy_model().to(dtype)
    before = model(tokens())
    attach(model, "lotr")
    assert before.dtype == dtype and torch.equal(before, model(tokens()))
    assert {p.dtype for p in adapter.trainable(model).values()} == {torch.float32}


def test_start_is_normal_factors_and_zero_cores():
    """A (in, r) and B (out, r) are N(0, 1), other ones in each group and for each seed; every core (r, r) is zero."""
    models = [attach(toy_model(base), "lotr", rank=16, seed=seed) for base, seed in ((0, 3), (1, 3), (0, 4))]
    first, again, other = (model.lotr.state_dict() for model in models)
    for key in ("32x32", "32x16", "32x48", "48x32"):
        inner, out = map(int, key.split("x"))
        assert first[f"{key}.A"].shape == (inner, 16) and first[f"{key}.B"].shape == (out, 16)
    for letter in "AB":
        side = torch.cat([factor.flatten() for name, factor in first.items() if last(name) == letter])  # some 2000 numbers
        assert abs(side.mean()) < 0.07 and abs(side.std() - 1) < 0.05
        assert abs((side.abs() < 1).float().mean() - 0.683) < 0.03
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len({tuple(factor[0].tolist()) for factor in (*first.values(), *other.values())}) == 16
    cores = [layer.G for _, layer in adapter.adapted_layers(models[0])]
    assert all(core.shape == (16, 16) and not core.any() for core in cores)


def test_alpha():
    """scale = alpha / r: alpha is 3 / sqrt(in) by default, 0.125 for in 576 and 0.0765 for in 1536, or one number for all."""
    for _, layer in adapter.adapted_layers(attach(default_shapes(), "lotr", rank=32)):
        assert round(layer.scale * 32, 4) == {576: 0.125, 1536: 0.0765}[layer.in_features]
    for alpha in (1, 0.1):
        layers = adapter.adapted_layers(attach(toy_model(), "lotr", rank=8, alpha=alpha))
        assert {layer.scale for _, layer in layers} == {alpha / 8}


@pytest.mark.parametrize("inner, out", [(24, 40), (40, 24)])
def test_delta_and_forward_against_the_element_form(inner, out):
    """delta() and the factored forward, bias included, equal scale sum_pq B[i, q] G[p, q] A[j, p] in fp64, of rank r."""
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(inner, out)), torch.randn(3, 7, inner)
    layer = perturb(attach(host, "lotr", rank=6, targets=["0"]))[0]
    expected = layer.scale * torch.einsum("iq,pq,jp->ij", layer.B.double(), layer.G.double(), layer.A.double())
    assert (layer.delta() - expected).abs().max() < 1e-5 and torch.linalg.matrix_rank(expected) == 6
    assert (host(x) - (x.double() @ (layer.weight.double() + expected).T + layer.bias.double())).abs().max() < 1e-5


def test_forward_costs_two_thin_products_and_the_core():
    """2 r (in + r + out) FLOPs per token beside the base's 2 in out: delta is never built."""
    host = attach(nn.Sequential(nn.Linear(24, 40)), "lotr", rank=6, targets=["0"])
    with FlopCounterMode(display=False) as counter:
        host(torch.randn(5, 24))
    assert counter.get_total_flops() == 5 * (2 * 24 * 40 + 2 * 6 * (24 + 6 + 40))


# ---- gradients and steps --------------------------------------------------------------------------------------------

@GROUPINGS
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
    for names in members(model).values():
        dA = dB = 0
        for name in names:
            A, G, B = (factor.detach() for factor in (layers[name].A, layers[name].G, layers[name].B))
            c = layers[name].scale
            assert torch.allclose(layers[name].G.grad, c * A.T @ dW[name].T @ B, rtol=1e-9, atol=1e-14)
            dA, dB = dA + c * dW[name].T @ B @ G.T, dB + c * dW[name] @ A @ G
        assert len(names) > 1 and dA.abs().max() > 1e-5 and dB.abs().max() > 1e-5
        assert torch.allclose(layers[name].A.grad, dA, rtol=1e-9, atol=1e-14)
        assert torch.allclose(layers[name].B.grad, dB, rtol=1e-9, atol=1e-14)


def test_first_step_moves_the_cores_only_and_the_second_everything():
    """dA = dB = 0 exactly and every dG_s non-zero at step 1; A and B follow at step 2; the base never moves."""
    model = attach(toy_model(), "lotr")
    first = moved_by(1, model)
    for _, layer in adapter.adapted_layers(model):
        assert not layer.A.grad.any() and not layer.B.grad.any() and layer.G.grad.ne(0).all()
    second = moved_by(2, attach(toy_model(), "lotr"))
    assert (first["A"], first["B"], first["G"], first["weight"]) == ({False}, {False}, {True}, {False})
    assert (second["A"], second["B"], second["G"], second["weight"]) == ({True}, {True}, {True}, {False})


def test_core_only_trains_the_cores_and_nothing_else():
    """With core_only A and B get no gradient and stay bitwise, and every G moves in the first step as in four more."""
    model = attach(toy_model(), "lotr", core_only=True)
    assert {last(name) for name in adapter.trainable(model)} == {"G"} and trained_count(model) == 14 * 4 ** 2
    for steps in (1, 4):
        changes = moved_by(steps, model)
        assert changes.pop("G") == {True} and set.union(*changes.values()) == {False}
    assert all(factor.grad is None for factor in model.lotr.parameters())


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


@pytest.mark.parametrize("core_only", [False, True])
def test_an_optimizer_holds_each_tensor_once_and_decays_the_cores_only(core_only):
    """decay_groups lists what trains once: A and B, where they train, with decay 0, each layer's G with the given one."""
    model = attach(toy_model(), "lotr", core_only=core_only)
    names = {id(p): last(name) for name, p in adapter.trainable(model).items()}
    held = [(names[id(p)], group["weight_decay"]) for group in train.decay_groups(model, 0.5) for p in group["params"]]
    shared = [] if core_only else [("A", 0.0)] * 4 + [("B", 0.0)] * 4
    assert sorted(held) == shared + [("G", 0.5)] * 14


# ---- sharing and groups ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    lambda model: model, lambda model: model.double(), copy.deepcopy, reassigned],
    ids=["attached", "cast", "copied", "reassigned"])
@GROUPINGS
def test_layers_of_a_group_share_one_a_and_one_b(group_by, change):
    """q of both layers has the same A and B objects, q and k have not; the state dict holds each of them once."""
    model = change(perturb(attach(toy_model(), "lotr", group_by=group_by)))
    layers, groups, plain = dict(adapter.adapted_layers(model)), members(model), toy_model()
    assert sorted(map(len, groups.values())) == ([2] * 7 if group_by == "name" else [2, 4, 4, 4])
    assert sorted(sum(groups.values(), [])) == sorted(layers)
    q0, q1, k0 = (layers[f"model.layers.{name}_proj"] for name in ("0.self_attn.q", "1.self_attn.q", "0.self_attn.k"))
    assert q0.A is q1.A and q0.B is q1.B and q0.A is not k0.A and q0.B is not k0.B and q0.G is not q1.G
    added = {f"lotr.{key}.{factor}" for key in groups for factor in "AB"} | {f"{name}.G" for name in layers}
    assert model.state_dict().keys() - plain.state_dict().keys() == added
    registered, before = (list(m.named_parameters(remove_duplicate=False)) for m in (model, plain))
    assert len(registered) == len(before) + len(added)


@GROUPINGS
def test_a_shared_factor_reaches_its_group_and_a_core_its_layer(group_by):
    """Perturbing A or B changes the output of every layer of the group and of no other, G that of its layer alone."""
    model = perturb(attach(toy_model(), "lotr", group_by=group_by))
    layers, groups = dict(adapter.adapted_layers(model)), members(model)
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))

    def outputs():
        return {name: layer(x[:, :layer.in_features]) for name, layer in layers.items()}

    before = outputs()
    reach = [(factor, groups[key]) for key, shared in model.lotr.named_children() for factor in shared.parameters()]
    reach += [(layer.G, [name]) for name, layer in list(layers.items())[:3]]  # k and v share a group by shape
    for factor, names in reach:
        kept = factor.detach().clone()
        factor.data[0] += 1
        assert {name for name, output in outputs().items() if not torch.equal(output, before[name])} == set(names)
        factor.data.copy_(kept)


def test_groups_of_the_default_model():
    """By shape {q,o}, {k,v}, {gate,up} with M = 60 each and {down} with M = 30; by name 7 groups of 30."""
    expected = {"shape": {"576x576": ("q_proj", "o_proj"), "576x192": ("k_proj", "v_proj"),
                          "576x1536": ("gate_proj", "up_proj"), "1536x576": ("down_proj",)},
                "name": {name: (name,) for name in adapter.TARGETS}}
    for group_by, groups in expected.items():
        found = members(attach(default_shapes(), "lotr", group_by=group_by))
        assert found.keys() == groups.keys()
        for key, names in found.items():
            assert {last(name) for name in names} == set(groups[key]) and len(names) == 30 * len(groups[key])


@pytest.mark.parametrize("first, second", [((8, 12), (12, 8)), ((8, 12), (12, 12)), ((8, 12), (8, 16))])
def test_a_group_of_unequal_shapes_is_refused(first, second):
    """Two `proj` that differ in one size or both cannot share A and B by name: nothing has changed. By shape they can."""
    host = blocks({"proj": first}, {"proj": second})
    for call in (attach, lambda host, _, **options: lotr.fit(host, 100, **options)):
        with pytest.raises(ValueError, match="called proj differ in shape .*choose other targets, or group_by='shape'"):
            call(host, "lotr", targets=["proj"], group_by="name")
    assert not hasattr(host, "lotr") and all(p.requires_grad for p in host.parameters())
    attach(host, "lotr", targets=["proj"])
    assert members(host) == {f"{inner}x{out}": [f"{i}.proj"] for i, (inner, out) in enumerate((first, second))}


@pytest.mark.parametrize("options, message", [
    ({"group_by": "layer"}, "unknown group_by 'layer': choose shape or name"),
    ({"rank": 193}, "rank 193 is out of range: it must be 1 .. 192"),
    ({"alpha": 0}, "alpha 0 is out of range: it must be above 0")])
def test_what_cannot_be_attached_is_refused(options, message):
    """An unknown grouping, a rank above the default model's 192, an alpha of zero: nothing has changed."""
    model = blocks(DEFAULT_BLOCK)
    with pytest.raises(ValueError, match=message):
        lotr.attach(model, **options)
    assert not hasattr(model, "lotr") and all(p.requires_grad for p in model.parameters())
    lotr.attach(model, rank=192)


def test_a_sequential_host_passes_through_the_holder():
    """An nn.Sequential calls the holder too, as its last module: it changes nothing, and merging takes it away."""
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 12)), torch.randn(5, 20)
    perturb(attach(host, "lotr", targets=["0", "2"]))
    expected = host[2](host[0](x).relu())
    assert isinstance(host[-1], adapter.Shared) and torch.equal(host(x), expected)
    adapter.merge(host)
    assert len(host) == 3 and (host(x) - expected).abs().max() < 1e-5


# ---- counts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, layers, rank, count", [
    (768, 12, 2, 3_168), (768, 12, 32, 73_728), (768, 12, 40, 99_840), (768, 12, 80, 276_480), (768, 12, 88, 321_024),
    (1024, 24, 64, 327_680)])
def test_published_counts_are_those_of_query_and_value_in_one_group(width, layers, rank, count):
    """The authors' counts for RoBERTa: 2 d r + M r^2 for one group of M = 2 layers; by name they would be larger."""
    hosts = [blocks(*[dict.fromkeys(Q_V, (width, width))] * layers) for _ in range(2)]
    attach(hosts[0], "lotr", rank=rank, targets=Q_V)
    assert len(members(hosts[0])) == 1 and trained_count(hosts[0]) == count
    attach(hosts[1], "lotr", rank=rank, targets=Q_V, group_by="name")
    assert trained_count(hosts[1]) == count + 2 * width * rank


@pytest.mark.parametrize("targets, rank, by_name, by_shape, core, lora", [
    (adapter.TARGETS, 16, 216_576, 152_064, 53_760, 4_884_480),
    (adapter.TARGETS, 32, 540_672, 411_648, 215_040, 9_768_960),
    (adapter.TARGETS, 64, 1_511_424, 1_253_376, 860_160, 19_537_920),
    (Q_V, 16, 46_080, 46_080, 15_360, 921_600), (Q_V, 32, 122_880, 122_880, 61_440, 1_843_200),
    (Q_V, 64, 368_640, 368_640, 245_760, 3_686_400)])
def test_counts_on_the_default_model(targets, rank, by_name, by_shape, core, lora):
    """r (in + out) + M r^2 per group, M r^2 with core_only, summed over the default model's groups; LoRA beside it."""
    for options, count in (({}, by_shape), ({"group_by": "name"}, by_name), ({"core_only": True}, core)):
        assert trained_count(attach(default_shapes(), "lotr", rank=rank, targets=targets, **options)) == count
    assert 30 * trained_count(attach(blocks(DEFAULT_BLOCK), "lora", rank=rank, targets=targets)) == lora


@pytest.mark.parametrize("targets, options, budget, rank, count", [
    (adapter.TARGETS, {"group_by": "name"}, 2_442_240, 86, 2_428_296),
    (adapter.TARGETS, {"group_by": "name"}, 4_884_480, 130, 4_871_880),
    (Q_V, {"group_by": "name"}, 460_800, 73, 459_900), (Q_V, {"group_by": "name"}, 921_600, 109, 922_140),
    (adapter.TARGETS, {}, 2_442_240, 94, 2_433_096), (adapter.TARGETS, {"core_only": True}, 900_000, 65, 887_250)])
def test_rank_of_a_budget_on_the_default_model(targets, options, budget, rank, count):
    """fit: LoTR's rank for what LoRA(8) and LoRA(16) train, and how much LoTR then trains."""
    model = default_shapes()
    assert lotr.fit(model, budget, targets=targets, **options) == {"rank": rank}
    assert trained_count(attach(model, "lotr", targets=targets, rank=rank, **options)) == count


# ---- merge, export, files -------------------------------------------------------------------------------------------

@GROUPINGS
def test_merge_and_export_take_the_transposed_core(group_by):
    """W + c B G^T A^T, and LoRA layers of A^T and c B G^T, give the adapted logits; with G instead of G^T they would not."""
    model, exported = perturb(attach(toy_model(), "lotr", group_by=group_by)), toy_model()
    expected, layers = model(tokens()), dict(adapter.adapted_layers(model))
    for name, layer in layers.items():
        assert (layer.G - layer.G.T).norm() > 0.5 * layer.G.norm()
        adapter.replace(exported, name, LoRALinear(exported.get_submodule(name), *layer.lora_factors()))
    assert (exported(tokens()) - expected).abs().max() < 1e-5
    wrong = {f"{name}.weight": layer.weight + layer.scale * layer.B @ layer.G @ layer.A.T for name, layer in layers.items()}
    assert (torch.func.functional_call(toy_model(), wrong, tokens()) - expected).abs().max() > 0.1
    adapter.merge(model)
    assert not hasattr(model, "lotr") and (model(tokens()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("options", [
    {"core_only": True}, {"group_by": "name", "alpha": 1, "seed": 5}, {"targets": ["k_proj", "down_proj"], "rank": 8}])
def test_save_then_load_is_bitwise(options, tmp_path):
    """A, B (also with core_only) and the cores are in the file, once: a fresh base with it has the same bits."""
    model, fresh = perturb(attach(toy_model(), "lotr", **options)), toy_model()
    for factor in model.lotr.parameters():
        factor.data *= 1.1  # no longer what the seed would draw
    adapter_file.save(model, tmp_path / "a.safetensors")
    adapter_file.load(fresh, tmp_path / "a.safetensors")
    in_file = read_safetensors(tmp_path / "a.safetensors")[0].keys()
    assert in_file == model.state_dict().keys() - toy_model().state_dict().keys()
    assert torch.equal(fresh(tokens()), model(tokens()))
    assert adapter.trainable(fresh).keys() == adapter.trainable(model).keys() and members(fresh) == members(model)
    assert fresh.adapter_config == {"method": "lotr", "rank": 4, "alpha": None, "targets": list(adapter.TARGETS),
                                    "group_by": "shape", "core_only": False, "seed": 0, **options}
