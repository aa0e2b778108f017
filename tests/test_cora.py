"""CoRA: the common basis against an SVD, who shares it, its gradients and counts, its files and its refusals."""
import copy

import pytest
import torch
import torch.nn as nn

import adapter
import cora
from cora import CoRALinear
from lora import LoRALinear
from methods import METHODS
from model import Config, Model
from support import report
from tests.toy import attach, perturb, snapshot, tokens, toy_model
from weights import adapter_file
from weights.safetensors import read_safetensors

BOTH = ["cora", "cora-init"]
REST = [["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
GROUPED_QUERY = [["self_attn.q_proj"], ["self_attn.k_proj", "self_attn.v_proj"], *REST]
MULTI_HEAD = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], *REST]
Q, K, V = (f"model.layers.0.self_attn.{last}_proj" for last in "qkv")


def uneven_model(**changes):
    """A toy model whose weights have clear gaps in their joint spectra and a mean far from zero."""
    model = toy_model(**changes)
    for _, linear in adapter.find_linears(model, adapter.TARGETS):
        out, inner = linear.weight.shape
        axes = torch.linalg.qr(torch.randn(out, out, generator=torch.Generator().manual_seed(out)))[0]
        linear.weight.data = axes * 0.7 ** torch.arange(out) @ torch.randn(out, inner) / inner ** 0.5 + 0.1
    return model


def left_vectors(weights, rank=4):
    """The leading left singular vectors (out, rank) of the weights side by side, in fp64; their gaps must be clear."""
    J = torch.cat([weight.detach().double() for weight in weights], dim=1)
    U, S, _ = torch.linalg.svd(J, full_matrices=False)
    assert (S[:rank] > 1.05 * S[1:rank + 1]).all()
    return U[:, :rank]


def same_columns(B, expected):
    """Each column of B is that of `expected` up to sign, to within 1e-6 in the cosine."""
    return (torch.linalg.vecdot(B.double(), expected, dim=0).abs() > 1 - 1e-6).all()


def orthonormal(B):
    return (B.double().T @ B.double() - torch.eye(B.shape[1])).abs().max() < 1e-6


def layers_of(model):
    return dict(adapter.adapted_layers(model))


def bases(model):
    return {name: layer.B.detach() for name, layer in adapter.adapted_layers(model)}


def loss_of(model):
    return nn.functional.cross_entropy(model(tokens())[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


def untouched(model, before):
    """No trace of an attach: everything trains, and the state dict is `before` to the last bit."""
    now = model.state_dict()
    return (all(p.requires_grad for p in model.parameters()) and not adapter.adapted_layers(model)
            and not any(hasattr(model, name) for name in ("cora", "adapter_config", "base_keys"))
            and now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before))


# ---- the basis and its groups ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("kv_heads, groups", [(2, GROUPED_QUERY), (4, MULTI_HEAD)])
def test_basis_of_each_group_against_svd(kv_heads, groups, method):
    """B is the group's leading left singular vectors, in order, orthonormal and fp32; the largest entry is positive."""
    model = uneven_model(num_key_value_heads=kv_heads)
    expected = {}
    for i in range(2):
        for group in groups:
            members = [f"model.layers.{i}.{last}" for last in group]
            U = left_vectors([model.get_submodule(name).weight for name in members])
            expected.update(dict.fromkeys(members, U))
    attach(model, method)
    assert bases(model).keys() == expected.keys()
    for name, B in bases(model).items():
        assert B.dtype == torch.float32 and orthonormal(B) and same_columns(B, expected[name]), name
        assert torch.linalg.svdvals(B.double().T @ expected[name]).min() > 1 - 1e-6, name
        assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all(), name


@pytest.mark.parametrize("kv_heads, groups", [(2, GROUPED_QUERY), (4, MULTI_HEAD)])
def test_who_shares_a_basis(kv_heads, groups):
    """Layers of one block, role and output width hold one basis module, no others do; init starts from the same B."""
    frozen, init = (attach(toy_model(num_key_value_heads=kv_heads), method) for method in BOTH)
    holders = {}
    for name, layer in layers_of(frozen).items():
        assert type(layer) is CoRALinear and len(layer.basis) == 1
        holders.setdefault(id(layer.basis[0]), []).append(name)
    expected = [[f"model.layers.{i}.{last}" for last in group] for i in range(2) for group in groups]
    assert list(holders.values()) == expected
    assert all(type(layer) is LoRALinear for layer in layers_of(init).values()) and not hasattr(init, "cora")
    assert all(torch.equal(B, bases(init)[name]) for name, B in bases(frozen).items())
    distinct = {tuple(B.flatten().tolist()) for B in bases(init).values()}
    assert len(distinct) == len(holders)


def test_names_of_the_groups():
    """The state dict has one B per group, called by parent path, role and output width, and none in the layers."""
    added = attach(toy_model(), "cora").state_dict().keys() - toy_model().state_dict().keys()
    roles = ["self_attn/qkv/32", "self_attn/qkv/16", "self_attn/o_proj/32", "mlp/gate_up/48", "mlp/down_proj/32"]
    expected = {f"cora.model/layers/{i}/{role}.B" for i in range(2) for role in roles}
    assert added == expected | {f"{name}.A" for name, _ in adapter.find_linears(toy_model(), adapter.TARGETS)}


def test_only_targeted_projections_enter_the_joint_matrix():
    """Without k among the targets, v is alone with grouped-query attention and with q in the multi-head kind."""
    for kv_heads, members in ((2, [V]), (4, [Q, V])):
        model = uneven_model(num_key_value_heads=kv_heads)
        U = left_vectors([model.get_submodule(name).weight for name in members])
        attach(model, "cora", targets=["q_proj", "v_proj"])
        assert same_columns(layers_of(model)[V].B, U) and len(adapter.adapted_layers(model)) == 4


def test_the_same_role_in_another_module_is_another_group():
    """Two attention modules in one block, as in a decoder with cross-attention, do not share."""
    torch.manual_seed(0)
    host = nn.ModuleDict({name: nn.ModuleDict({"q_proj": nn.Linear(12, 8), "k_proj": nn.Linear(12, 8)})
                          for name in ("self_attn", "cross_attn")})
    layers = list(layers_of(attach(host, "cora", targets=["q_proj", "k_proj"])).values())
    assert layers[0].B is layers[1].B and layers[2].B is layers[3].B and not torch.equal(layers[0].B, layers[2].B)


@pytest.mark.parametrize("method", BOTH)
def test_two_builds_are_identical_whatever_sign_the_eigenvectors_have(method, monkeypatch):
    """Bitwise the same B again, also from an eigen routine that returns the negative of every second vector."""
    first, second = bases(attach(toy_model(), method)), bases(attach(toy_model(), method))
    eigh = torch.linalg.eigh

    def other_signs(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * (-1.0) ** torch.arange(len(values))
    monkeypatch.setattr(torch.linalg, "eigh", other_signs)
    third = bases(attach(toy_model(), method))
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], third[name]) for name in first)


def test_basis_of_a_bf16_model_is_that_of_its_weights():
    """On a bf16 base B is fp32 and equal, to the last bit, to the basis of the same weights held in fp32."""
    half = attach(toy_model().bfloat16(), "cora")
    single = attach(toy_model().bfloat16().float(), "cora")
    assert all(B.dtype == torch.float32 and torch.equal(B, bases(single)[name]) for name, B in bases(half).items())


@pytest.mark.parametrize("out, inner", [(24, 40), (40, 24), (24, 24)])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_basis_of_a_deficient_weight_is_orthonormal(scale, out, inner):
    """Where the joint matrix has fewer directions than the rank asks for, B is completed to an orthonormal one."""
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(inner, out, bias=False))
    W = scale * torch.randn(out, 2) @ torch.randn(2, inner)
    host[0].weight.data = W.clone()
    B = attach(host, "cora", targets=["0"])[0].B
    assert orthonormal(B) and (W - B[:, :2] @ (B[:, :2].T @ W)).abs().max() < 1e-4


# ---- sharing --------------------------------------------------------------------------------------------------------

def saved_and_loaded(model, folder):
    adapter_file.save(model, folder / "a.safetensors")
    fresh = toy_model()
    adapter_file.load(fresh, folder / "a.safetensors")
    return fresh


@pytest.mark.parametrize("change", [
    lambda model, folder: model, lambda model, folder: model.double(), lambda model, folder: model.bfloat16(),
    lambda model, folder: model.to("meta"), lambda model, folder: copy.deepcopy(model),
    lambda model, folder: copy.deepcopy(model).double(), saved_and_loaded,
    lambda model, folder: copy.deepcopy(saved_and_loaded(model, folder)).bfloat16()],
    ids=["attach", "double", "bfloat16", "move", "deepcopy", "deepcopy-double", "load", "load-deepcopy-bfloat16"])
def test_frozen_bases_stay_shared(change, tmp_path):
    """k and v read one tensor, q another; each is the state dict's own entry, once per group, after any of these."""
    original = attach(toy_model(), "cora")
    B = original.state_dict()["cora.model/layers/0/self_attn/qkv/16.B"].clone()
    model = change(original, tmp_path)
    q, k, v = (layers_of(model)[name] for name in (Q, K, V))
    assert k.B is v.B and k.basis[0] is v.basis[0] and q.B is not k.B
    assert model.state_dict()["cora.model/layers/0/self_attn/qkv/16.B"].data_ptr() == k.B.data_ptr()
    assert k.B is dict(model.named_buffers())["cora.model/layers/0/self_attn/qkv/16.B"] and k.B.dtype == k.weight.dtype
    assert k.B.device == k.weight.device and (k.B.is_meta or torch.equal(k.B, B.to(k.B.dtype)))
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


def test_moving_a_shared_basis_moves_every_layer_of_its_group():
    """A layer reads B on each forward: what changes in `model.cora` changes the layers' output, delta and factors."""
    model = perturb(attach(toy_model(), "cora", alpha=8))
    k = layers_of(model)[K]
    x = torch.randn(3, 32)
    before = k(x) - k.base(x)
    with torch.no_grad():
        getattr(model.cora, "model/layers/0/self_attn/qkv/16").B.mul_(2)
    assert torch.allclose(k(x) - k.base(x), 2 * before, atol=1e-6)
    down, up = k.lora_factors()
    assert torch.allclose(up @ down, k.delta()) and torch.allclose(x @ k.delta().T, 2 * before, atol=1e-5)


# ---- start, gradients, training -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", BOTH)
def test_step_zero_is_bitwise_the_base_model_in_every_dtype(method, dtype):
    """A is zero, so that not a bit of the logits changes; the factors are fp32 whatever the base is."""
    model = toy_model().to(dtype)
    before = model(tokens())
    after = attach(model, method, alpha=12)(tokens())
    assert after.dtype == dtype and torch.equal(before, after)
    assert not any(layer.A.any() for layer in layers_of(model).values())
    assert all(tensor.dtype == torch.float32 for layer in layers_of(model).values() for tensor in layer.factors())


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("method", BOTH)
def test_gradients_against_the_closed_form(method, moved):
    """dA = s B^T dW and dB = s dW A^T in fp64, dW from a plain model; at the start dA moves and dB is exactly zero."""
    s = 3.0
    model = attach(toy_model(), method, alpha=12).double()
    if moved:
        perturb(model)
    plain = toy_model().double()
    for name, layer in layers_of(model).items():
        plain.get_submodule(name).weight.data += layer.delta().detach()
    loss_of(plain).backward()
    loss_of(model).backward()
    for name, layer in layers_of(model).items():
        dW = plain.get_submodule(name).weight.grad
        dA, dB = s * layer.B.T @ dW, s * dW @ layer.A.T
        assert dA.abs().max() > 1e-6 and (layer.A.grad - dA).abs().max() < 1e-10 * dA.abs().max(), name
        assert layer.weight.grad is None and layer.B.requires_grad == (method == "cora-init")
        if method == "cora":
            assert layer.B.grad is None
        elif moved:
            assert dB.abs().max() > 1e-6 and (layer.B.grad - dB).abs().max() < 1e-10 * dB.abs().max(), name
        else:
            assert layer.B.grad is not None and not layer.B.grad.any()


def train_steps(model, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def test_init_basis_has_a_gradient_at_step_two():
    """In cora-init every dB is exactly zero at the first step and, A having moved, not at the second."""
    model = attach(toy_model(), "cora-init")
    train_steps(model, 1)
    assert not any(layer.B.grad.any() for layer in layers_of(model).values())
    train_steps(model, 1)
    assert all(layer.B.grad.any() for layer in layers_of(model).values())


def test_training_a_frozen_basis_stays_in_its_span():
    """After some steps the base and every B are bitwise as before, and delta is of rank r, with columns in span(B)."""
    model = attach(toy_model(), "cora", alpha=8)
    before = snapshot(model)
    train_steps(model, 5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in adapter.trainable(model)), name
    assert {name.rpartition(".")[2] for name in adapter.trainable(model)} == {"A"}
    for name, layer in layers_of(model).items():
        delta, B = layer.delta(), layer.B
        assert delta.norm() > 0.1 and (delta - B @ (B.T @ delta)).abs().max() < 1e-5, name
        assert torch.linalg.matrix_rank(delta, rtol=1e-5) == 4, name


def test_training_cora_init_moves_both_factors_and_leaves_the_basis():
    """After some steps every A and B has moved, the base has not, and delta has left the span of the first B."""
    model = attach(toy_model(), "cora-init")
    before = snapshot(model)
    train_steps(model, 5)
    assert {name.rpartition(".")[2] for name in adapter.trainable(model)} == {"A", "B"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in adapter.trainable(model)), name
    for name, layer in layers_of(model).items():
        start = before[f"{name}.B"]
        assert (layer.delta() - start @ (start.T @ layer.delta())).norm() > 1e-3, name


@pytest.mark.parametrize("method, factor", [
    ("cora", (48 * 8 / 16) ** 0.5), ("cora-init", (48 * 8 / 16) ** 0.5), ("lora", (8 / 3) ** 0.5)])
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


# ---- forward, merge, export -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("out, inner", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("alpha, s", [(None, 1.0), (4, 1.0), (10, 2.5), (0, 0.0)])
@pytest.mark.parametrize("method", BOTH)
def test_forward_delta_and_factors_against_float64(method, alpha, s, out, inner):
    """h = W x + b + s B A x with s = alpha / r, and delta() (out, in) and the exported factors are s B A."""
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(inner, out)), torch.randn(2, 5, inner)
    W, b = host[0].weight.detach().double(), host[0].bias.detach().double()
    layer = perturb(attach(host, method, alpha=alpha, targets=["0"]))[0]
    assert layer.A.shape == (4, inner) and layer.B.shape == (out, 4)
    change = s * layer.B.double() @ layer.A.double()
    down, up = layer.lora_factors()
    assert layer.delta().shape == (out, inner) and (layer.delta() - change).abs().max() < 1e-6
    assert down.shape == (4, inner) and up.shape == (out, 4) and (up @ down - change).abs().max() < 1e-6
    assert layer.factors()[0] is layer.A and layer.factors()[1] is layer.B
    assert (host(x) - (x.double() @ (W + change).T + b)).abs().max() < 1e-5


def test_forward_never_builds_delta(monkeypatch):
    """Training goes through the two thin products only."""
    monkeypatch.setattr(CoRALinear, "delta", None)
    loss_of(attach(toy_model(), "cora")).backward()


@pytest.mark.parametrize("method", BOTH)
def test_merge_and_a_second_method_afterwards(method):
    """Random A of any size merges into plain linears, `model.cora` goes, and the model is a base for either variant."""
    model = perturb(attach(toy_model(), method, alpha=8, a_init="random"))
    expected = model(tokens())
    assert (expected - toy_model()(tokens())).abs().max() > 1e-2 and hasattr(model, "cora") == (method == "cora")
    adapter.merge(model)
    assert not hasattr(model, "cora") and model.state_dict().keys() == toy_model().state_dict().keys()
    assert (model(tokens()) - expected).abs().max() < 1e-5
    merged = model(tokens())
    for following in BOTH:
        second = attach(copy.deepcopy(model), following)
        assert torch.equal(second(tokens()), merged) and second.adapter_config["method"] == following


@pytest.mark.parametrize("method", BOTH)
def test_lora_factors_make_a_plain_lora(method):
    """The base with plain LoRA layers of the same rank, B repeated in each, gives the adapted model's logits."""
    model, plain = perturb(attach(toy_model(), method, alpha=6)), toy_model()
    for name, layer in layers_of(model).items():
        down, up = layer.lora_factors()
        assert len(down) == up.shape[1] == 4
        adapter.replace(plain, name, LoRALinear(plain.get_submodule(name), down, up))
    assert (plain(tokens()) - model(tokens())).abs().max() < 1e-5


@pytest.mark.parametrize("method", BOTH)
def test_peft_computes_the_same_from_the_factors(method):
    """peft's own LoRA layer, given A and B and the scale alpha / r, gives the same output."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    host, x = nn.ModuleDict({name: nn.Linear(24, 16) for name in ("k_proj", "v_proj")}), torch.randn(5, 24)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["k_proj", "v_proj"])
    other = peft.inject_adapter_in_model(config, copy.deepcopy(host))
    perturb(attach(host, method, alpha=6, targets=["k_proj", "v_proj"]))
    for name, layer in layers_of(host).items():
        down, up = layer.lora_factors()
        other[name].lora_A["default"].weight.data = down.detach()
        other[name].lora_B["default"].weight.data = up.detach()
        assert (layer(x) - layer.base(x)).abs().max() > 0.1
        assert (other[name](x) - layer(x)).abs().max() < 1e-5


# ---- files ----------------------------------------------------------------------------------------------------------

def refuse(*arguments, **options):
    raise AssertionError("loading must not decompose anything")


@pytest.mark.parametrize("options", [{}, {"basis": "random"}, {"basis": "input", "targets": ["q_proj", "o_proj"]},
                                     {"extra": "other", "a_init": "random", "alpha": 6, "seed": 3}])
@pytest.mark.parametrize("method", BOTH)
def test_save_then_load_without_a_decomposition(method, options, tmp_path, monkeypatch):
    """The file alone gives every B back, to the last bit, and attach's arguments, with further checkpoints' names."""
    if "extra" in options:
        options = {**options, "extra": {"other": toy_model(seed=5).state_dict()}}
    model = perturb(attach(toy_model(), method, **options))
    adapter_file.save(model, tmp_path / "a.safetensors", "toy")
    for name in ("svd", "eigh", "qr"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    loaded = toy_model()
    config = adapter_file.load(loaded, tmp_path / "a.safetensors")
    expected = {"method": method, "rank": 4, "alpha": None, "targets": list(adapter.TARGETS), "basis": "weights",
                "a_init": "zeros", "seed": 0, **options, "extra": list(options.get("extra", []))}
    assert config == loaded.adapter_config == expected
    now = loaded.state_dict()
    assert now.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, now[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(loaded(tokens()), model(tokens()))
    assert set(adapter.trainable(loaded)) == set(adapter.trainable(model))


def test_a_file_holds_the_factors_and_nothing_else(tmp_path):
    """cora: one A per layer and one B per group; cora-init: one A and one B per layer; all fp32, no base weight."""
    for method, factors in (("cora", 14 + 10), ("cora-init", 14 + 14)):
        adapter_file.save(attach(toy_model(), method), tmp_path / "a.safetensors")
        tensors, _ = read_safetensors(tmp_path / "a.safetensors")
        assert len(tensors) == factors and {name.rpartition(".")[2] for name in tensors} == {"A", "B"}
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_a_file_without_a_basis_is_refused(tmp_path):
    """A is useless without its B: a file of the wrong kind or rank is refused before the model is touched."""
    init, frozen = attach(toy_model(), "cora-init"), attach(toy_model(), "cora", rank=3)
    init.adapter_config["method"], frozen.adapter_config["rank"] = "cora", 4
    for model, message in ((init, "no tensor cora.model/layers/0/self_attn/qkv/32.B"),
                           (frozen, "has shape .32, 3. .*expected .32, 4.")):
        adapter_file.save(model, tmp_path / "a.safetensors")
        base = toy_model()
        with pytest.raises(ValueError, match=message):
            adapter_file.load(base, tmp_path / "a.safetensors")
        assert untouched(base, toy_model().state_dict())


# ---- counts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("targets, rank, frozen, init, half, stored", [
    (adapter.TARGETS, 8, 1_198_080, 2_442_240, 1_221_120, 829_440),
    (adapter.TARGETS, 16, 2_396_160, 4_884_480, 2_442_240, 1_658_880),
    (["q_proj", "v_proj"], 8, 276_480, 460_800, 230_400, 184_320),
    (["q_proj", "v_proj"], 16, 552_960, 921_600, 460_800, 368_640)])
def test_published_counts_on_the_default_model(targets, rank, frozen, init, half, stored, monkeypatch):
    """What trains, and what a file of cora holds beside it, on the default model's shapes (no weights, no SVD)."""
    def no_svd(weight, rank):
        out, inner = weight.shape
        return tuple(torch.empty(size, device="meta") for size in ((out, rank), (rank,), (rank, inner)))
    monkeypatch.setattr(adapter, "principal_triplets", no_svd)
    with torch.device("meta"):
        base = Model(Config(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                            num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True))

    def counts(method, rank):
        model = attach(copy.deepcopy(base), method, rank=rank, targets=targets)
        trained = sum(p.numel() for p in adapter.trainable(model).values())
        beside = sum(tensor.numel() for tensor in adapter.state(model).values()) - trained
        table = "\n".join(report.parameter_table(model))
        assert f"{trained:,}" in table and (beside == 0 or f"{beside:,}" in table)
        return trained, beside
    assert counts("cora", rank) == (frozen, stored)
    assert counts("cora-init", rank) == counts("lora", rank) == (init, 0)
    assert counts("lora", rank // 2) == (half, 0)


@pytest.mark.parametrize("targets", [adapter.TARGETS, ["q_proj", "v_proj"], ["q_proj"]])
@pytest.mark.parametrize("method", BOTH)
def test_fit_finds_the_nearest_rank(method, targets):
    """For any budget, no rank that attach accepts has a trainable count nearer to it than the one `fit` returns."""
    fit, base = METHODS[method].fit, toy_model()
    assert fit is (cora.fit if method == "cora" else cora.fit_init)
    counts = {}
    for rank in range(1, (32 if list(targets) == ["q_proj"] else 16) + 1):
        model = attach(copy.deepcopy(base), method, rank=rank, targets=targets, basis="random")
        counts[rank] = sum(p.numel() for p in adapter.trainable(model).values())
    step = counts[1]
    for budget in (0, 1, step, 1.4 * step, 1.6 * step, 7 * step + 1, counts[max(counts)] - 1, 100 * step):
        found = fit(base, budget, targets)
        assert list(found) == ["rank"]
        assert abs(counts[found["rank"]] - budget) == min(abs(count - budget) for count in counts.values())
    assert untouched(base, toy_model().state_dict())


# ---- further checkpoints --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", BOTH)
def test_further_checkpoints_join_the_joint_matrix(method):
    """With two other checkpoints B is that of all three side by side, the base once; only names are recorded."""
    models = [uneven_model(), uneven_model(seed=3), uneven_model(seed=4)]
    models[2].load_state_dict({name: 2 * t if t.dim() == 2 else t for name, t in models[2].state_dict().items()})
    expected = {group[0]: left_vectors([m.get_submodule(name).weight for m in models for name in group])
                for group in ([Q], [K, V], ["model.layers.1.mlp.down_proj"])}
    alone = bases(attach(copy.deepcopy(models[0]), method))
    extra = {"second": models[1].state_dict(), "third": models[2].state_dict()}
    model = attach(models[0], method, extra=extra)
    for name, U in expected.items():
        assert same_columns(bases(model)[name], U) and not same_columns(alone[name], U), name
    assert torch.equal(bases(model)[K], bases(model)[V]) and model.adapter_config["extra"] == ["second", "third"]
    assert not any(key.startswith(("second", "third")) for key in model.state_dict())


def test_a_copy_of_the_base_changes_nothing():
    """A further checkpoint with the base's own weights, in any dtype, leaves every B where it was; one copy or two."""
    alone, twin = bases(attach(uneven_model(), "cora")), uneven_model()
    for extra in ({"a": twin.state_dict()}, {"a": twin.state_dict(), "b": copy.deepcopy(twin).double().state_dict()}):
        for name, B in bases(attach(uneven_model(), "cora", extra=extra)).items():
            assert (B - alone[name]).abs().max() < 1e-5, name


def test_the_base_counts_beside_a_further_checkpoint():
    """A further checkpoint that is nearly zero leaves B where it was: the base is in the joint matrix as well."""
    faint = {name: 1e-4 * tensor for name, tensor in uneven_model(seed=3).state_dict().items()}
    alone, joined = bases(attach(uneven_model(), "cora")), bases(attach(uneven_model(), "cora", extra={"faint": faint}))
    assert all((joined[name] - B).abs().max() < 1e-5 for name, B in alone.items())


def test_further_checkpoints_serve_the_input_basis_too():
    """basis="input" stacks them below the base."""
    models = [uneven_model(), uneven_model(seed=3)]
    V_t = left_vectors([m.get_submodule(Q).weight.T for m in models])
    extra = {"second": models[1].state_dict()}
    model = attach(models[0], "cora", basis="input", targets=["q_proj", "o_proj"], extra=extra)
    assert same_columns(layers_of(model)[Q].B, V_t)


# ---- control arms ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", BOTH)
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


@pytest.mark.parametrize("method", BOTH)
def test_input_basis_against_svd(method):
    """The other reading: leading eigenvectors of sum W_i^T W_i, for q and o, and for q, k, v together if square."""
    for kv_heads, targets, members in ((2, ["q_proj", "o_proj"], [Q]), (4, ["q_proj", "k_proj", "v_proj"], [Q, K, V])):
        model = uneven_model(num_key_value_heads=kv_heads)
        weights = [model.get_submodule(name).weight for name in members]
        expected = left_vectors([weight.T for weight in weights])
        assert not same_columns(left_vectors(weights), expected)
        attach(model, method, basis="input", targets=targets)
        for name in members:
            B = bases(model)[name]
            assert orthonormal(B) and same_columns(B, expected), name
            assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("method", BOTH)
def test_random_a(method):
    """LoRA's A, uniform in +-1/sqrt(in), another for each layer: the output moves at step 0, as nothing leaves W0."""
    model = attach(toy_model(), method, a_init="random", seed=3)
    again, other = (attach(toy_model(), method, a_init="random", seed=seed) for seed in (3, 4))
    base = toy_model()
    assert len({tuple(layer.A.flatten().tolist()) for layer in layers_of(model).values()}) == 14
    for name, layer in layers_of(model).items():
        bound = layer.in_features ** -0.5
        assert 0.9 * bound < layer.A.max() <= bound and -bound <= layer.A.min() < -0.9 * bound, name
        assert torch.equal(layer.A, layers_of(again)[name].A), name
        assert not torch.equal(layer.A, layers_of(other)[name].A) and layer.A.dtype == torch.float32, name
        assert layer.delta().norm() > 0.1 and torch.equal(layer.weight, base.get_submodule(name).weight), name
    assert torch.equal(layers_of(model)[K].B, layers_of(attach(toy_model(), "cora"))[K].B)
    assert (model(tokens()) - base(tokens())).abs().max() > 1e-2 and adapter.relative_change(model) > 1e-2


# ---- refusals -------------------------------------------------------------------------------------------------------

LAST = "model.layers.1.mlp.down_proj.weight"


def without_last():
    return {name: tensor for name, tensor in toy_model().state_dict().items() if name != LAST}


@pytest.mark.parametrize("options, message", [
    ({"basis": "weight"}, "unknown basis 'weight': choose weights, input or random"),
    ({"a_init": "zero"}, "unknown a_init 'zero': choose zeros or random"),
    ({"rank": 0}, "rank 0 is out of range: it must be 1 .. 16"),
    ({"rank": 17}, "rank 17 is out of range: it must be 1 .. 16"),
    ({"rank": 33, "targets": ["down_proj"]}, "rank 33 is out of range: it must be 1 .. 32"),
    ({"rank": 33, "targets": ["gate_proj"]}, "rank 33 is out of range: it must be 1 .. 32"),
    ({"targets": ["q_proj", "w_pack"]}, "'w_pack' matches no linear layer"),
    ({"targets": []}, "no targets given"),
    ({"basis": "input"}, "basis='input' needs square weights: .*k_proj is 16 x 32"),
    ({"basis": "input", "targets": ["k_proj", "v_proj"]}, "basis='input' needs square weights: .*k_proj is 16 x 32"),
    ({"basis": "input", "targets": ["q_proj", "down_proj"]}, "needs square weights: .*down_proj is 32 x 48"),
    ({"extra": {"other": without_last()}}, f"the further checkpoint other has no {LAST}"),
    ({"extra": {"fine": toy_model().state_dict(), "wide": {**without_last(), LAST: torch.zeros(32, 47)}}},
     f"{LAST} has shape .32, 47. in the further checkpoint wide, expected .32, 48."),
    ({"extra": {"flipped": {**without_last(), LAST: torch.zeros(48, 32)}}}, "further checkpoint flipped"),
    ({"extra": {"larger": toy_model(num_key_value_heads=4).state_dict()}}, "k_proj.weight has shape .32, 32.")])
@pytest.mark.parametrize("method", BOTH)
def test_a_refused_attach_leaves_the_model_untouched(method, options, message):
    """Each of these raises ValueError before anything has changed, and the model then serves an attach that fits."""
    model = toy_model()
    with pytest.raises(ValueError, match=message):
        attach(model, method, **options)
    assert untouched(model, toy_model().state_dict())
    assert torch.equal(attach(model, method)(tokens()), toy_model()(tokens()))


def test_unknown_variant_is_refused():
    """There are two variants, each with a name of its own among the methods."""
    model = toy_model()
    with pytest.raises(ValueError, match="unknown variant 'shared': choose frozen or init"):
        cora.attach(model, rank=4, variant="shared")
    assert untouched(model, toy_model().state_dict())
    cora.attach(model, rank=4, variant="init")
    assert model.adapter_config["method"] == "cora-init"


def test_defaults_are_those_of_the_description():
    """Unless told otherwise: rank 16, s = 1, all seven projections, frozen bases from the base's weights alone."""
    model = toy_model()
    cora.attach(model)
    assert model.adapter_config == {"method": "cora", "rank": 16, "alpha": None, "targets": list(adapter.TARGETS),
                                    "basis": "weights", "a_init": "zeros", "extra": [], "seed": 0}
    assert len(layers_of(model)) == 14 and {layer.s for layer in layers_of(model).values()} == {1.0}


def test_the_largest_rank_is_accepted():
    """Rank min(out, in) of the targets attaches, and B is then a whole orthogonal matrix where that is out."""
    for targets, rank in ((adapter.TARGETS, 16), (["q_proj", "o_proj"], 32)):
        assert all(orthonormal(B) for B in bases(attach(toy_model(), "cora", rank=rank, targets=targets)).values())


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("first", BOTH)
def test_a_second_attach_is_refused(first, method):
    """It raises, naming what is attached, and leaves that as it was, tensors, holder and all."""
    model = perturb(attach(toy_model(), first))
    before, layers, trained = snapshot(model), layers_of(model), set(adapter.trainable(model))
    with pytest.raises(ValueError, match=f"{first} is already attached"):
        attach(model, method, rank=2)
    assert layers_of(model) == layers and set(adapter.trainable(model)) == trained
    assert model.state_dict().keys() == before.keys() and model.adapter_config["method"] == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", BOTH)
def test_an_adapter_saved_from_a_cast_model_is_fp32_again_and_merges(method, dtype, tmp_path):
    """Factors are fp32 after loading whatever dtype the file has, so that delta() can be formed."""
    adapter_file.save(perturb(attach(toy_model(), method)).to(dtype), tmp_path / "a.safetensors")
    fresh = toy_model().to(dtype)
    adapter_file.load(fresh, tmp_path / "a.safetensors")
    assert all(factor.dtype == torch.float32 for layer in layers_of(fresh).values() for factor in layer.factors())
    expected = fresh(tokens())
    adapter.merge(fresh)
    assert (fresh(tokens()) - expected).abs().max() < (0.2 if dtype == torch.bfloat16 else 1e-5)


def test_a_random_basis_with_further_checkpoints_is_refused():
    """Weights that would not be used are not silently recorded."""
    with pytest.raises(ValueError, match="basis='random' uses no weights: leave out extra"):
        attach(toy_model(), "cora", basis="random", extra={"other": toy_model().state_dict()})
