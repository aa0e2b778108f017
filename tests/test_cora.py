"""CoRA: the common basis against an SVD, who shares it, its gradients and counts, its files and its refusals."""
import copy

import pytest
import torch
import torch.nn as nn

import adapter
from cora import CoRALinear
from lora import LoRALinear
from tests.toy import (DEFAULT_MODEL, attach, loss_of, perturb, refused, same, shapes_without_svd, tokens, toy_model, train_steps)
from weights import adapter_file

BOTH = pytest.mark.parametrize("method", ["cora", "cora-init"])
REST = [["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
GROUPED_QUERY = [["self_attn.q_proj"], ["self_attn.k_proj", "self_attn.v_proj"], *REST]
MULTI_HEAD = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], *REST]
KINDS = pytest.mark.parametrize("kv_heads, groups", [(2, GROUPED_QUERY), (4, MULTI_HEAD)])
Q, K, V = (f"model.layers.0.self_attn.{last}_proj" for last in "qkv")


def uneven_model(**changes):
    """A toy model whose weights have clear gaps in their joint spectra and a mean far from zero."""
    model = toy_model(**changes)
    for _, linear in adapter.find_linears(model, adapter.TARGETS):
        out, inner = linear.weight.shape
        axes = torch.linalg.qr(torch.randn(out, out, generator=torch.Generator().manual_seed(out)))[0]
        linear.weight.data = axes * 0.7 ** torch.arange(out) @ torch.randn(out, inner) / inner ** 0.5 + 0.1
    return model


def left_vectors(model, names, transposed=False):
    """The leading 4 left singular vectors of these weights side by side, in fp64; their gaps must be clear."""
    weights = [model.get_submodule(name).weight.detach().double() for name in names]
    U, S, _ = torch.linalg.svd(torch.cat([W.T if transposed else W for W in weights], dim=1), full_matrices=False)
    assert (S[:4] > 1.05 * S[1:5]).all()
    return U[:, :4]


def same_columns(B, expected):
    """Each column of B is that of `expected` up to sign, to within 1e-6 in the cosine."""
    return (torch.linalg.vecdot(B.double(), expected, dim=0).abs() > 1 - 1e-6).all()


def orthonormal(B):
    return (B.double().T @ B.double() - torch.eye(B.shape[1])).abs().max() < 1e-6


def signs_fixed(B):
    """The entry of largest magnitude in each column is positive."""
    return (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()


def layers_of(model):
    return dict(adapter.adapted_layers(model))


def bases(model):
    return {name: layer.B.detach() for name, layer in adapter.adapted_layers(model)}


# ---- the basis and its groups ---------------------------------------------------------------------------------------

@KINDS
def test_basis_of_each_group_against_svd(kv_heads, groups):
    """B is the group's leading left singular vectors, in order, orthonormal and fp32, with signs fixed."""
    plain = uneven_model(num_key_value_heads=kv_heads)
    found = bases(attach(copy.deepcopy(plain), "cora"))
    members = [[f"model.layers.{i}.{last}" for last in group] for i in range(2) for group in groups]
    assert sorted(found) == sorted(sum(members, []))
    for group in members:
        expected = left_vectors(plain, group)
        for name in group:
            B = found[name]
            assert B.dtype == torch.float32 and orthonormal(B) and same_columns(B, expected) and signs_fixed(B), name
            assert torch.linalg.svdvals(B.double().T @ expected).min() > 1 - 1e-6, name


@KINDS
def test_who_shares_a_basis(kv_heads, groups):
    """Layers of one block, role and output width hold one basis module, no others do; cora-init starts from the same B."""
    frozen, init = (attach(toy_model(num_key_value_heads=kv_heads), method) for method in ("cora", "cora-init"))
    holders = {}
    for name, layer in layers_of(frozen).items():
        assert type(layer) is CoRALinear and len(layer.shared) == 1
        holders.setdefault(id(layer.shared[0]), []).append(name)
    assert list(holders.values()) == [[f"model.layers.{i}.{last}" for last in group] for i in range(2) for group in groups]
    assert all(type(layer) is LoRALinear for layer in layers_of(init).values()) and not hasattr(init, "cora")
    assert same(bases(frozen), bases(init))
    assert len({tuple(B.flatten().tolist()) for B in bases(init).values()}) == len(holders)


def test_names_of_the_groups():
    """The state has one B per group, called by parent path, role and output width, and one A per layer."""
    added = adapter.state(attach(toy_model(), "cora")).keys()
    roles = ["self_attn/qkv/32", "self_attn/qkv/16", "self_attn/o_proj/32", "mlp/gate_up/48", "mlp/down_proj/32"]
    expected = {f"cora.model/layers/{i}/{role}.B" for i in range(2) for role in roles}
    assert added == expected | {f"{name}.A" for name, _ in adapter.find_linears(toy_model(), adapter.TARGETS)}


@pytest.mark.parametrize("kv_heads, members", [(2, [V]), (4, [Q, V])])
def test_only_targeted_projections_enter_the_joint_matrix(kv_heads, members):
    """Without k among the targets, v is alone with grouped-query attention and with q in the multi-head kind."""
    model = uneven_model(num_key_value_heads=kv_heads)
    expected = left_vectors(model, members)
    attach(model, "cora", targets=["q_proj", "v_proj"])
    assert same_columns(layers_of(model)[V].B, expected) and len(adapter.adapted_layers(model)) == 4


def test_the_same_role_in_another_module_is_another_group():
    """Two attention modules in one block, as in a decoder with cross-attention, do not share."""
    torch.manual_seed(0)
    host = nn.ModuleDict({name: nn.ModuleDict({"q_proj": nn.Linear(12, 8), "k_proj": nn.Linear(12, 8)})
                          for name in ("self_attn", "cross_attn")})
    layers = list(layers_of(attach(host, "cora", targets=["q_proj", "k_proj"])).values())
    assert layers[0].B is layers[1].B and layers[2].B is layers[3].B and not torch.equal(layers[0].B, layers[2].B)


def test_two_builds_are_identical_whatever_sign_the_eigenvectors_have(monkeypatch):
    """Bitwise the same B again, also from an eigen routine that returns the negative of every second vector."""
    first, second = bases(attach(toy_model(), "cora")), bases(attach(toy_model(), "cora"))
    eigh = torch.linalg.eigh

    def other_signs(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * (-1.0) ** torch.arange(len(values))
    monkeypatch.setattr(torch.linalg, "eigh", other_signs)
    assert same(first, second) and same(first, bases(attach(toy_model(), "cora")))


def test_basis_of_a_bf16_model_is_that_of_its_weights():
    """On a bf16 base B is fp32 and equal, to the last bit, to the basis of the same weights held in fp32."""
    half, single = (bases(attach(model, "cora")) for model in (toy_model().bfloat16(), toy_model().bfloat16().float()))
    assert same(half, single) and all(B.dtype == torch.float32 for B in half.values())


@pytest.mark.parametrize("out, inner, rank", [(24, 40, 4), (40, 24, 4), (24, 40, 24), (40, 24, 24)])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_basis_of_a_deficient_weight_is_orthonormal(scale, out, inner, rank):
    """Where the joint matrix has fewer directions than the rank asks for, B is completed to an orthonormal one."""
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(inner, out, bias=False))
    W = scale * torch.randn(out, 2) @ torch.randn(2, inner)
    host[0].weight.data = W.clone()
    B = attach(host, "cora", targets=["0"], rank=rank)[0].B
    assert orthonormal(B) and (W - B[:, :2] @ (B[:, :2].T @ W)).abs().max() < 1e-4


# ---- sharing --------------------------------------------------------------------------------------------------------

def saved_and_loaded(model, folder):
    adapter_file.save(model, folder / "a.safetensors")
    fresh = toy_model()
    adapter_file.load(fresh, folder / "a.safetensors")
    return fresh


@pytest.mark.parametrize("change", [
    lambda model, folder: model, lambda model, folder: model.double(), lambda model, folder: model.to("meta"),
    lambda model, folder: copy.deepcopy(model), saved_and_loaded,
    lambda model, folder: copy.deepcopy(saved_and_loaded(model, folder)).bfloat16()],
    ids=["attach", "double", "move", "deepcopy", "load", "load-deepcopy-bfloat16"])
def test_frozen_bases_stay_shared(change, tmp_path):
    """k and v read one tensor, q another; each is the state dict's own entry, once per group, after any of these."""
    original, key = attach(toy_model(), "cora"), "cora.model/layers/0/self_attn/qkv/16.B"
    B = original.state_dict()[key].clone()
    model = change(original, tmp_path)
    q, k, v = (layers_of(model)[name] for name in (Q, K, V))
    assert k.B is v.B and k.shared[0] is v.shared[0] and q.B is not k.B
    assert k.B is dict(model.named_buffers())[key] and model.state_dict()[key].data_ptr() == k.B.data_ptr()
    assert k.B.dtype == k.weight.dtype and k.B.device == k.weight.device and (k.B.is_meta or torch.equal(k.B, B.to(k.B.dtype)))
    assert sum(name.endswith(".B") for name in model.state_dict()) == 10
    assert model is original or k.B is not layers_of(original)[K].B


@pytest.mark.parametrize("load", [False, True])
def test_init_layers_have_their_own_storage(load, tmp_path):
    """In cora-init no two factors share memory, freshly attached or loaded: moving k's B leaves v's where it was."""
    model = attach(toy_model(), "cora-init")
    if load:
        model = saved_and_loaded(model, tmp_path)
    k, v = layers_of(model)[K], layers_of(model)[V]
    assert torch.equal(k.B, v.B) and k.B.any()
    factors = list(adapter.trainable(model).values())
    assert len(factors) == 28 and len({factor.untyped_storage().data_ptr() for factor in factors}) == 28
    k.B.data += 1
    assert (k.B - v.B).mean() == 1


# ---- forward, gradients, training -----------------------------------------------------------------------------------

@pytest.mark.parametrize("alpha, scale", [(None, 1.0), (10, 2.5)])
@BOTH
def test_forward_and_change_against_float64(method, alpha, scale):
    """h = W x + b + s B A x with s = alpha / r; delta() (out, in) and the exported factors make s B A."""
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(24, 40)), torch.randn(2, 5, 24)
    W, b = host[0].weight.detach().double(), host[0].bias.detach().double()
    layer = perturb(attach(host, method, alpha=alpha, targets=["0"]))[0]
    assert layer.A.shape == (4, 24) and layer.B.shape == (40, 4) and layer.scale == scale
    change = scale * layer.B.double() @ layer.A.double()
    down, up = layer.lora_factors()
    assert (layer.delta() - change).abs().max() < 1e-6 and (up @ down - change).abs().max() < 1e-6
    assert (host(x) - (x.double() @ (W + change).T + b)).abs().max() < 1e-5


@pytest.mark.parametrize("step", [1, 2])
@BOTH
def test_gradients_against_the_closed_form(method, step):
    """dA = s B^T dW and dB = s dW A^T in fp64, dW from a plain model; dA moves at once, dB is exactly zero until step 2."""
    model, plain = attach(toy_model(), method, alpha=12).double(), toy_model().double()
    train_steps(model, step - 1)
    for name, layer in layers_of(model).items():
        plain.get_submodule(name).weight.data += layer.delta().detach()
    loss_of(plain).backward()
    model.zero_grad()
    loss_of(model).backward()
    for name, layer in layers_of(model).items():
        dW = plain.get_submodule(name).weight.grad
        dA, dB = 3.0 * layer.B.T @ dW, 3.0 * dW @ layer.A.T
        assert dA.abs().max() > 1e-6 and (layer.A.grad - dA).abs().max() < 1e-10 * dA.abs().max(), name
        assert layer.weight.grad is None and layer.B.requires_grad == (method == "cora-init")
        if method == "cora":
            assert layer.B.grad is None
        else:
            assert layer.B.grad.any() == (step == 2) and (layer.B.grad - dB).abs().max() <= 1e-10 * dB.abs().max(), name


def test_training_a_frozen_basis_stays_in_its_span():
    """After some steps delta is of rank r, with columns in span(B)."""
    model = attach(toy_model(), "cora", alpha=8)
    train_steps(model, 5)
    for name, layer in layers_of(model).items():
        delta, B = layer.delta(), layer.B
        assert delta.norm() > 0.1 and (delta - B @ (B.T @ delta)).abs().max() < 1e-5, name
        assert torch.linalg.matrix_rank(delta, rtol=1e-5) == 4, name


@pytest.mark.parametrize("method, factor", [("cora", (48 * 8 / 16) ** 0.5), ("cora-init", (48 * 8 / 16) ** 0.5), ("lora", (8 / 3) ** 0.5)])
def test_size_of_the_first_adam_step(method, factor):
    """On independent inputs of unit RMS it moves the output by s lr sqrt(in r / out), LoRA's by s lr sqrt(r / 3)."""
    torch.manual_seed(0)
    s, lr, sizes = 2.0, 1e-4, []
    for _ in range(8):
        host, x = nn.Sequential(nn.Linear(48, 16)), torch.randn(512, 48)
        attach(host, method, rank=8, alpha=8 * s, targets=["0"])
        optimizer = torch.optim.Adam(adapter.trainable(host).values(), lr=lr, eps=1e-30)
        (host(x) * torch.randn(512, 16)).sum().backward()
        optimizer.step()
        x = torch.randn(2048, 48)
        sizes.append((host(x) - host[0].base(x)).square().mean())
    assert abs(torch.stack(sizes).mean().sqrt() / (s * lr * factor) - 1) < 0.1


# ---- files and counts -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{"basis": "random"}, {"basis": "input", "targets": ["q_proj", "o_proj"]},
                                     {"extra": "other", "a_init": "random", "alpha": 6, "seed": 3}])
@BOTH
def test_a_file_gives_every_basis_back(method, options, tmp_path):
    """Whatever B came from, the file alone has it, to the last bit, beside attach's arguments and further models' names."""
    if "extra" in options:
        options = {**options, "extra": {"other": toy_model(seed=5).state_dict()}}
    model = perturb(attach(toy_model(), method, **options))
    loaded = saved_and_loaded(model, tmp_path)
    assert loaded.adapter_config == {
        "method": method, "rank": 4, "alpha": None, "targets": list(adapter.TARGETS), "basis": "weights", "a_init": "zeros",
        "seed": 0, **options, "extra": list(options.get("extra", []))}
    assert same(loaded.state_dict(), model.state_dict()) and torch.equal(loaded(tokens()), model(tokens()))
    assert set(adapter.trainable(loaded)) == set(adapter.trainable(model))


def test_a_saved_state_without_a_basis_is_refused():
    """A is useless without its B: a state that lacks one, or has it in another rank, is refused before the model is touched."""
    name = "cora.model/layers/0/self_attn/qkv/32.B"
    state, thin = (adapter.state(attach(toy_model(), "cora", rank=rank)) for rank in (4, 3))
    refused(f"no tensor {name}", "cora", saved={key: tensor for key, tensor in state.items() if key != name})
    refused("has shape .32, 3. .*expected .32, 4.", "cora", saved=thin)


@pytest.mark.parametrize("targets, rank, stored", [(adapter.TARGETS, 8, 829_440), (adapter.TARGETS, 16, 1_658_880),
                                                   (["q_proj", "v_proj"], 8, 184_320), (["q_proj", "v_proj"], 16, 368_640)])
def test_size_of_the_stored_bases(targets, rank, stored, monkeypatch):
    """What the default model's file holds beside what trains: r out per group; nothing in cora-init, which trains its B."""
    for method, beside in (("cora", stored), ("cora-init", 0)):
        model = attach(shapes_without_svd(monkeypatch, DEFAULT_MODEL), method, rank=rank, targets=targets)
        sizes = [sum(tensor.numel() for tensor in some.values()) for some in (adapter.state(model), adapter.trainable(model))]
        assert sizes[0] - sizes[1] == beside


# ---- further models -------------------------------------------------------------------------------------------------

def test_further_models_join_the_joint_matrix():
    """With two other models B is that of all three side by side, the base once; only their names are recorded."""
    models = [uneven_model(), uneven_model(seed=3), uneven_model(seed=4)]
    models[2].load_state_dict({name: 2 * t if t.dim() == 2 else t for name, t in models[2].state_dict().items()})
    together = nn.ModuleList(models)
    expected = {group[0]: left_vectors(together, [f"{i}.{name}" for i in range(3) for name in group])
                for group in ([Q], [K, V], ["model.layers.1.mlp.down_proj"])}
    alone = bases(attach(copy.deepcopy(models[0]), "cora"))
    model = attach(models[0], "cora", extra={"second": models[1].state_dict(), "third": models[2].state_dict()})
    for name, U in expected.items():
        assert same_columns(bases(model)[name], U) and not same_columns(alone[name], U), name
    assert torch.equal(bases(model)[K], bases(model)[V]) and model.adapter_config["extra"] == ["second", "third"]
    assert not any(key.startswith(("second", "third")) for key in model.state_dict())


@pytest.mark.parametrize("extra", [
    lambda: {"copy": uneven_model().state_dict()},
    lambda: {"a": uneven_model().state_dict(), "b": uneven_model().double().state_dict()},
    lambda: {"faint": {name: 1e-4 * tensor for name, tensor in uneven_model(seed=3).state_dict().items()}}],
    ids=["copy", "two copies, one in fp64", "nearly zero"])
def test_further_models_that_add_no_direction(extra):
    """Copies of the base leave every B where it was. So does a model that is nearly zero, as the base always counts too."""
    alone, joined = bases(attach(uneven_model(), "cora")), bases(attach(uneven_model(), "cora", extra=extra()))
    assert all((joined[name] - B).abs().max() < 1e-5 for name, B in alone.items())


def test_further_models_serve_the_input_basis_too():
    """basis="input" stacks them below the base."""
    models = nn.ModuleList([uneven_model(), uneven_model(seed=3)])
    expected = left_vectors(models, [f"0.{Q}", f"1.{Q}"], transposed=True)
    model = attach(models[0], "cora", basis="input", targets=["q_proj", "o_proj"], extra={"second": models[1].state_dict()})
    assert same_columns(layers_of(model)[Q].B, expected)


# ---- control arms ---------------------------------------------------------------------------------------------------

@BOTH
def test_random_basis(method):
    """Orthonormal, one per group and each another, from the seed and not from the weights."""
    model = attach(toy_model(), method, basis="random", seed=3)
    again = bases(attach(toy_model(seed=9), method, basis="random", seed=3))
    other = bases(attach(toy_model(), method, basis="random", seed=4))
    assert len({tuple(B.flatten().tolist()) for B in bases(model).values()}) == 10
    for name, B in bases(model).items():
        assert orthonormal(B) and torch.equal(B, again[name]) and not torch.equal(B, other[name]), name
    k, v = layers_of(model)[K], layers_of(model)[V]
    assert torch.equal(k.B, v.B) and (k.B is v.B) == (method == "cora")
    assert torch.equal(model(tokens()), toy_model()(tokens()))


@pytest.mark.parametrize("kv_heads, targets, members", [
    (2, ["q_proj", "o_proj"], [Q]), (4, ["q_proj", "k_proj", "v_proj"], [Q, K, V])])
def test_input_basis_against_svd(kv_heads, targets, members):
    """The other reading: leading eigenvectors of sum W_i^T W_i, for q and o, and for q, k, v together if square."""
    model = uneven_model(num_key_value_heads=kv_heads)
    expected = left_vectors(model, members, transposed=True)
    assert not same_columns(left_vectors(model, members), expected)
    found = bases(attach(model, "cora", basis="input", targets=targets))
    assert all(orthonormal(found[name]) and same_columns(found[name], expected) and signs_fixed(found[name]) for name in members)


@BOTH
def test_random_a(method):
    """LoRA's A, uniform in +-1/sqrt(in), another for each layer: the output moves at step 0, as nothing leaves W0."""
    model, base = attach(toy_model(), method, a_init="random", seed=3), toy_model()
    again, other = (attach(toy_model(), method, a_init="random", seed=seed) for seed in (3, 4))
    assert len({tuple(layer.A.flatten().tolist()) for layer in layers_of(model).values()}) == 14
    for name, layer in layers_of(model).items():
        bound = layer.in_features ** -0.5
        assert 0.9 * bound < layer.A.max() <= bound and -bound <= layer.A.min() < -0.9 * bound, name
        assert torch.equal(layer.A, layers_of(again)[name].A) and not torch.equal(layer.A, layers_of(other)[name].A), name
        assert layer.delta().norm() > 0.1 and torch.equal(layer.weight, base.get_submodule(name).weight), name
    assert same(bases(model), bases(attach(toy_model(), "cora")))
    assert (model(tokens()) - base(tokens())).abs().max() > 1e-2 and adapter.relative_change(model) > 1e-2


# ---- refusals -------------------------------------------------------------------------------------------------------

LAST = "model.layers.1.mlp.down_proj.weight"


def without_last():
    return {name: tensor for name, tensor in toy_model().state_dict().items() if name != LAST}


@pytest.mark.parametrize("options, message", [
    ({"basis": "weight"}, "unknown basis 'weight': choose weights, input or random"),
    ({"a_init": "zero"}, "unknown a_init 'zero': choose zeros or random"),
    ({"basis": "input"}, "basis='input' needs square weights: .*k_proj is 16 x 32"),
    ({"basis": "input", "targets": ["q_proj", "down_proj"]}, "needs square weights: .*down_proj is 32 x 48"),
    ({"basis": "random", "extra": {"other": {}}}, "basis='random' uses no weights: leave out extra"),
    ({"extra": ["other"]}, "extra is .name: state dict. of further models, not their names alone"),
    ({"extra": {"other": without_last()}}, f"the further model other has no {LAST}"),
    ({"extra": {"fine": toy_model().state_dict(), "wide": {**without_last(), LAST: torch.zeros(32, 47)}}},
     f"{LAST} has shape .32, 47. in the further model wide, expected .32, 48."),
    ({"extra": {"broken": {**without_last(), LAST: torch.full((32, 48), float("nan"))}}},
     f"{LAST} of the further model broken has weights that are not finite"),
    ({"extra": {"flipped": {**without_last(), LAST: torch.zeros(48, 32)}}}, "has shape .48, 32. in the further model flipped")])
@BOTH
def test_a_refused_attach_leaves_the_model_untouched(method, options, message):
    """A choice that there is not, weights that do not fit or would not be used: ValueError before anything has changed."""
    refused(message, method, **options)
