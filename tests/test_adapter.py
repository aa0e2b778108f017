"""The contract that every method keeps, and what adapter.py, methods.py and weights/adapter_file.py promise to all of them."""
import copy
import json
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import prune

import adapter
import methods
import sorsa
from lora import LoRALinear
from methods import METHODS
from support import report
from tests.toy import (ATTACHED, DEFAULT_MODEL, MERGEABLE, RANKED, SIZES, attach, loss_of, perturb, refused, same, shapes_without_svd,
                       snapshot, tokens, toy_model, train_steps, transformers_llama, untouched)
from weights import adapter_file
from weights.safetensors import read_safetensors, write_safetensors

ROOT = Path(__file__).resolve().parent.parent
TRAINED = {"lora": "A B", "pissa": "A B", "sorsa": "U S Vt", "sara": "A lam B", "mosara": "Lam v W_g1 W_g2", "cora": "A",
           "cora-init": "A B", "lotr": "A B G"}
EXACT_START = set(ATTACHED) - {"pissa", "sorsa"}  # these two split the weight and add it up again: equal to rounding
SCALED = [method for method in ATTACHED if "alpha" in methods.arguments(METHODS[method].attach)]


def expected_count(method, model):
    """The closed formula of each method's docstring on the toy model: rank 4, k per layer for SARA, n = 5 and q = 1."""
    ks = model.adapter_config.get("ks", {})
    layers = [(ks.get(name, 4), layer.in_features, layer.out_features) for name, layer in adapter.adapted_layers(model)]
    if method == "lotr":  # its groups: q with o, k with v, gate with up, down; and a core for each layer
        return 4 * ((32 + 32) + (32 + 16) + (32 + 48) + (48 + 32)) + 14 * 4 ** 2
    formula = {"sorsa": lambda r, inner, out: r * (inner + out + 1), "sara": lambda k, inner, out: k * (inner + out + 1),
               "mosara": lambda k, inner, out: 5 * k + out + k + 5, "cora": lambda r, inner, out: r * inner}
    return sum(formula.get(method, lambda r, inner, out: r * (inner + out))(*layer) for layer in layers)


def one_linear(method, inner, out):
    """A model of one linear with a bias, the method attached to it."""
    torch.manual_seed(0)
    return attach(nn.Sequential(nn.Linear(inner, out)), method, targets=["0"])


# ---- the start, the forward pass, training --------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2e-6), (torch.bfloat16, 0.05), (torch.float16, 0.01),
                                             (torch.float64, 2e-6)])
@pytest.mark.parametrize("method", ATTACHED)
def test_step_zero_is_the_base_model(method, dtype, rounding):
    """Attaching changes not a bit of the output (where the weight is split: rounding). Factors and their gradients are fp32."""
    model = toy_model().to(dtype)
    before = model(tokens())
    after = attach(model, method)(tokens())
    assert after.dtype == dtype
    assert torch.equal(before, after) if method in EXACT_START else (before - after).abs().max() < rounding * before.abs().max()
    loss_of(model).backward()
    assert all(p.dtype == torch.float32 for p in adapter.trainable(model).values())
    assert all(p.grad.dtype == torch.float32 for p in adapter.trainable(model).values() if p.grad is not None)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("method", MERGEABLE)
def test_weight_plus_delta_is_the_original_weight(method, dtype, tolerance):
    """weight + delta() reproduces W at step 0, square, tall or wide; a bias stays the same tensor, frozen."""
    plain = toy_model(attention_bias=True).to(dtype)
    model = copy.deepcopy(plain)
    biases = [linear.bias for _, linear in adapter.find_linears(model, adapter.TARGETS)]
    for (name, layer), bias in zip(adapter.adapted_layers(attach(model, method)), biases):
        W = plain.get_submodule(name).weight.float()
        assert (layer.weight.float() + layer.delta() - W).norm() <= tolerance * W.norm()
        assert layer.bias is bias and (bias is None or not bias.requires_grad)


@pytest.mark.parametrize("method, options", [*((method, {}) for method in ATTACHED), ("lotr", {"core_only": True}), (
    "lotr", {"group_by": "name"}), ("sara", {"init": "lora"}), ("sara", {"ranks": "even"}), ("mosara", {"sets": 1}), (
    "mosara", {"equal_gates": True}), ("mosara", {"v_mode": "output"}), ("cora", {"basis": "random"})])
def test_the_base_is_rounded_once_after_attach(method, options):
    """cast_frozen leaves what was added as it was, to the bit; the weights are those of fp32, PiSSA's and SORSA's residuals too, rounded
    once: W_r + W_p misses W by the rounding of W_r alone."""
    exact, cast = (attach(toy_model(), method, **options) for _ in range(2))
    adapter.cast_frozen(cast, torch.bfloat16)
    added = adapter.state(cast)
    for name, tensor in cast.state_dict().items():
        expected = exact.state_dict()[name]
        assert tensor.dtype == (torch.float32 if name in added else torch.bfloat16)
        assert torch.equal(tensor, expected if name in added else expected.bfloat16())
    assert cast(tokens()).dtype == torch.bfloat16
    for (name, layer), W in zip(adapter.adapted_layers(cast), [linear.weight for _, linear in adapter.find_linears(toy_model(), adapter.TARGETS)]):
        if not layer.unmergeable:
            residual = W - layer.delta()
            assert ((layer.weight.float() - residual).abs() <= residual.abs() * 2 ** -8 + 1e-6).all()
            down, up = layer.lora_factors()
            assert (up @ down).dtype == torch.float32


@pytest.mark.parametrize("method", MERGEABLE)
def test_forward_equals_weight_plus_delta(method):
    """The factored forward is that of the base model under weight + delta(), for arbitrary factors."""
    model = perturb(attach(toy_model(), method))
    weights = {f"{name}.weight": layer.weight + layer.delta() for name, layer in adapter.adapted_layers(model)}
    assert (torch.func.functional_call(toy_model(), weights, tokens()) - model(tokens())).abs().max() < 1e-5


@pytest.mark.parametrize("method", ATTACHED)
def test_forward_never_builds_delta(method, monkeypatch):
    """A training step goes through the thin products only."""
    model = attach(toy_model(), method)
    for kind in {type(layer) for _, layer in adapter.adapted_layers(model)}:
        monkeypatch.setattr(kind, "delta", None)
    loss_of(model).backward()


@pytest.mark.parametrize("method", ATTACHED)
def test_a_layer_takes_any_leading_shape(method):
    """(..., in) -> (..., out), without rows too, row by row; under a caller's autocast the same to bf16's rounding."""
    layer, x = perturb(one_linear(method, 24, 40))[0], torch.randn(2, 3, 24)
    expected = layer(x)
    assert expected.shape == (2, 3, 40) and layer(x[:, :0]).shape == (2, 0, 40)
    assert torch.allclose(layer(x[1]), expected[1], atol=1e-5) and torch.allclose(layer(x[1, 2]), expected[1, 2], atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x).float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("method", ATTACHED)
def test_derivatives_are_those_of_finite_differences(method):
    """First and second derivatives by the input and by every factor, in a model cast to fp64: shared factors are cast too."""
    host, x = perturb(one_linear(method, 6, 5)).double(), torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    trained = adapter.trainable(host)
    assert all(tensor.dtype == torch.float64 for tensor in adapter.state(host).values())

    def output(x, *factors):
        return torch.func.functional_call(host, dict(zip(trained, factors)), x)

    assert torch.autograd.gradcheck(output, (x, *trained.values())) and torch.autograd.gradgradcheck(output, (x, *trained.values()))


@pytest.mark.parametrize("method", ATTACHED)
def test_trainable_names_and_count(method):
    """requires_grad is True exactly on the method's own factors, and their count is the closed formula's."""
    model = attach(toy_model(), method)
    names = adapter.trainable(model)
    own, count = TRAINED[method].split(), expected_count(method, model)
    assert {name.rpartition(".")[2] for name in names} == set(own)
    assert len(names) == (14 + 2 * 4 if method == "lotr" else 14 * len(own))  # of 14 linears; LoTR has 4 groups
    assert sum(p.numel() for p in names.values()) == count
    lines = [line for line in report.parameter_table(model) if line.startswith("all ")]
    assert len(lines) == 1 and f" {count:,}  (" in lines[0]
    added = sum(tensor.numel() for tensor in adapter.state(model).values()) - count
    frozen = [line for line in report.parameter_table(model) if line.startswith("frozen")]
    assert len(frozen) == (added > 0) and all(line.endswith(f" {added:,}") for line in frozen)


@pytest.mark.parametrize("method", ATTACHED)
def test_training_moves_the_factors_and_nothing_else(method):
    """Fifty steps on a batch halve its loss (by less for Mo-SARA, which cannot turn a vector): every factor has moved, and
    all other tensors, buffers included, are bitwise unchanged."""
    model = attach(toy_model(), method)
    before, start, trained = snapshot(model), loss_of(model).item(), adapter.trainable(model)
    train_steps(model, 50, lr=2e-2)
    assert loss_of(model).item() < (0.8 if method == "mosara" else 0.5) * start
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


@pytest.mark.parametrize("method", SCALED)
def test_alpha_scales_the_change(method):
    """The factor of the change is alpha / r: twice as large an alpha doubles delta(), and forward follows."""
    single, double = (perturb(attach(toy_model(), method, alpha=alpha)) for alpha in (6, 12))
    for (name, a), (_, b) in zip(adapter.adapted_layers(single), adapter.adapted_layers(double)):
        rank, x = single.adapter_config.get("ks", {}).get(name, 4), torch.randn(3, a.in_features)
        assert (a.scale, b.scale) == (6 / rank, 12 / rank) and torch.allclose(2 * a.delta(), b.delta())
        assert torch.allclose(2 * (a(x) - a.base(x)), b(x) - b.base(x), atol=1e-5)


@pytest.mark.parametrize("method", ATTACHED)
def test_deepcopy_is_independent(method):
    """A deep copy of an adapted model computes the same, shares nothing that trains, and trains as the original would."""
    model = perturb(attach(toy_model(), method))
    twin, before = copy.deepcopy(model), model(tokens())
    assert torch.equal(twin(tokens()), before)
    perturb(twin, seed=2)
    assert not torch.equal(twin(tokens()), before) and torch.equal(model(tokens()), before)
    perturb(model, seed=2)
    assert torch.equal(twin(tokens()), model(tokens()))


def test_full_trains_everything_once_or_the_named_matrices():
    """Full fine-tuning trains every parameter, the tied embedding once; with targets, exactly those matrices."""
    model = attach(toy_model(), "full")
    assert len(adapter.trainable(model)) == len(list(model.parameters())) and "lm_head.weight" not in adapter.trainable(model)
    model = attach(toy_model(), "full", targets=["down_proj"])
    assert set(adapter.trainable(model)) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}
    biased = nn.ModuleDict({"q_proj": nn.Linear(4, 3), "k_proj": nn.Linear(4, 3)})
    assert set(adapter.trainable(attach(biased, "full", targets=["q_proj"]))) == {"q_proj.weight"}


@pytest.mark.peers
@pytest.mark.parametrize("method", ATTACHED)
def test_hugging_face_model_as_host(method):
    """The methods attach to transformers' own Llama: same output at step 0, some training steps, a merge."""
    host = transformers_llama()
    before = host(tokens())
    attach(host, method)
    assert (host(tokens()) - before).abs().max() < 1e-5
    start = loss_of(host).item()
    train_steps(host, 8, lr=2e-2)
    assert loss_of(host).item() < start - 0.05 and all(p.grad is not None for p in adapter.trainable(host).values())
    if method in MERGEABLE:
        expected = perturb(host)(tokens())
        adapter.merge(host)
        assert (host(tokens()) - expected).abs().max() < 1e-5 and (expected - before).abs().max() > 1e-2


# ---- the change: merged, exported, measured -------------------------------------------------------------------------

@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_equals_unmerged(method):
    """A merged model holds plain nn.Linear under the base's keys, biases too, and gives the adapted model's logits."""
    base = toy_model(attention_bias=True)
    model = perturb(attach(copy.deepcopy(base), method))
    expected = model(tokens())
    adapter.merge(model)
    assert base.model.layers[0].self_attn.q_proj.bias.any() and model.state_dict().keys() == base.state_dict().keys()
    assert all(type(m) is nn.Linear for m in model.modules() if hasattr(m, "in_features"))
    assert not any(isinstance(m, adapter.Shared) for m in model.modules())
    assert (model(tokens()) - expected).abs().max() < 1e-5
    attach(model, method)  # and it is a fresh base for the next method


@pytest.mark.parametrize("targets, expected", [
    (["layers.1.*"], 7), (["layers.[01].mlp.up_proj"], 2), (["model.layers.0.self_attn.q_proj"], 1), (["?_proj"], 8), (["q_proj", "*q_proj"], 2)])
def test_targets_may_name_layers(targets, expected):
    """By the end of their names, from a dot on, with the wildcards of file names; each once."""
    linears = adapter.find_linears(toy_model(), targets)
    assert len(linears) == len({name for name, _ in linears}) == expected
    for wrong in ("proj", "roj", "layers.2.*", "self_attn", "odel.layers.0.self_attn.q_proj"):
        with pytest.raises(ValueError, match="matches no linear layer"):
            adapter.find_linears(toy_model(), [wrong])


def test_merge_refuses_an_unmergeable_layer_before_changing_anything():
    """If one layer's change depends on its input, no layer is merged: the error names the layer and says why."""
    class Routed(adapter.AdaptedLinear):
        forward, unmergeable = adapter.AdaptedLinear.base, "it is routed"
    model = attach(toy_model(), "lora", targets=["q_proj", "v_proj"])
    adapter.replace(model, "model.layers.1.mlp.up_proj", Routed(model.model.layers[1].mlp.up_proj))
    with pytest.raises(ValueError, match="up_proj cannot be merged: it is routed"):
        adapter.merge(model)
    assert len(adapter.adapted_layers(model)) == 5
    with pytest.raises(ValueError, match="q_proj cannot be merged: each token has its own update through the router"):
        adapter.merge(attach(toy_model(), "mosara"))


@pytest.mark.parametrize("method", MERGEABLE)
def test_lora_factors_make_a_plain_lora(method):
    """The base under plain LoRA layers made from the factors, of rank 2r where W was split, gives the adapted model's logits."""
    model, plain = perturb(attach(toy_model(), method)), toy_model()
    for name, layer in adapter.adapted_layers(model):
        down, up = layer.lora_factors()
        rank = model.adapter_config["ks"][name] if method == "sara" else 8 if method in ("pissa", "sorsa") else 4
        assert down.shape == (rank, layer.in_features) and up.shape == (layer.out_features, rank)
        adapter.replace(plain, name, LoRALinear(plain.get_submodule(name), down, up))
    assert (plain(tokens()) - model(tokens())).abs().max() < 1e-5


@pytest.mark.parametrize("method", ATTACHED)
def test_relative_change(method):
    """0 at the start, then |dW| / |W| over all adapted matrices, by the difference of the merged and the base weights."""
    model = attach(toy_model(), method)
    if method == "mosara":
        assert adapter.relative_change(model) is None
        return
    assert adapter.relative_change(model) < 1e-6
    reported, names = adapter.relative_change(perturb(model)), [name for name, _ in adapter.adapted_layers(model)]
    adapter.merge(model)
    after, before = (torch.cat([m.get_submodule(name).weight.flatten() for name in names]) for m in (model, toy_model()))
    assert reported == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-4)


# ---- saved and loaded -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_adapter_is_the_saved_one(method, tmp_path, monkeypatch):
    """A fresh base with the file has its settings, its tensors, starts included, its change and its logits, to the last bit."""
    model, fresh = perturb(attach(toy_model(), method), scale=0.05), toy_model()
    adapter_file.save(model, tmp_path / "a.safetensors")
    for name in ("svd", "svdvals", "eigh", "eigvalsh", "qr"):  # loading must not need a decomposition
        monkeypatch.setattr(torch.linalg, name, None)
    config = adapter_file.load(fresh, tmp_path / "a.safetensors")
    assert config == fresh.adapter_config == model.adapter_config and same(adapter.state(fresh), adapter.state(model))
    assert torch.equal(fresh(tokens()), model(tokens())) and set(adapter.trainable(fresh)) == set(adapter.trainable(model))
    for (_, layer), (_, loaded) in zip(adapter.adapted_layers(model), adapter.adapted_layers(fresh)):
        if not layer.unmergeable:
            assert all(torch.equal(a, b) for a, b in zip(layer.lora_factors(), loaded.lora_factors()))


@pytest.mark.parametrize("method", ATTACHED)
def test_an_adapter_of_a_cast_model_is_fp32_again(method, tmp_path):
    """Factors are fp32 after loading, whatever dtype the file has: with them delta() can be formed and merged."""
    adapter_file.save(perturb(attach(toy_model(), method)).bfloat16(), tmp_path / "a.safetensors")
    fresh = toy_model().bfloat16()
    adapter_file.load(fresh, tmp_path / "a.safetensors")
    assert all(factor.dtype == torch.float32 for factor in adapter.trainable(fresh).values())
    if method in MERGEABLE:
        expected = fresh(tokens())
        adapter.merge(fresh)
        assert (fresh(tokens()) - expected).abs().max() < 0.2


@pytest.mark.parametrize("change, message", [
    (lambda tensors, name: tensors.pop(name), "does not fit this model: missing model.layers.0.self_attn.q_proj.A$"),
    (lambda tensors, name: tensors.update(more=torch.ones(1)), "unexpected more"),
    (lambda tensors, name: tensors.update({name: tensors[name].int()}), "q_proj.A has dtype torch.int32"),
    (lambda tensors, name: tensors.update({name: tensors[name].T}), r"q_proj.A has shape \(32, 4\), expected \(4, 32\)"),
    (lambda tensors, name: tensors.clear(), "missing .*; and 24 more")])
def test_fill_takes_exactly_the_models_own_state(change, message):
    """A tensor too few or too many, of another dtype or shape: ValueError, and not one tensor has been filled in."""
    model, tensors = attach(toy_model(), "lora"), adapter.state(perturb(attach(toy_model(), "lora")))
    change(tensors, "model.layers.0.self_attn.q_proj.A")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        adapter.fill(model, tensors)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("method", ATTACHED)
def test_an_adapter_of_another_base_can_be_forced(method, tmp_path):
    """It is refused by the base's checksum, naming the flag; with force it loads, also where the other base has other norms."""
    adapter_file.save(perturb(attach(toy_model(), method)), tmp_path / "a.safetensors", "toy", "1" * 64)
    message = "trained on another base model .toy, sha256 111111111111.*; load that base, or force it on this one .--force."
    with pytest.raises(ValueError, match=message):
        adapter_file.load(toy_model(seed=5), tmp_path / "a.safetensors", "2" * 64)
    forced = toy_model(seed=5)
    adapter_file.load(forced, tmp_path / "a.safetensors", "2" * 64, force=True)
    saved = read_safetensors(tmp_path / "a.safetensors")[0]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in adapter.state(forced).items())


@pytest.mark.parametrize("method, settings, message", [
    ("lora", {"rank": "4"}, "the setting rank is '4', expected a whole number"),
    ("lora", {"rank": True}, "the setting rank is True, expected a whole number"),
    ("lora", {"rank": 10**9}, "rank 1000000000 is out of range"),
    ("lora", {"alpha": 10**400}, "the setting alpha is 10000"),
    ("lora", {"targets": [3]}, r"the setting targets is \[3\], expected a list of texts"),
    ("lora", {"seed": 1 << 64}, "the setting seed is 18446744073709551616, expected a whole number"),
    ("lora", {"saved": {}}, "lora has no setting saved"),
    ("lora", {"method": ["lora"]}, r"unknown method \['lora'\]; known: full, lora"),
    ("lotr", {"core_only": 1}, "the setting core_only is 1, expected true or false"),
    ("sara", {"ks": {"a": "1"}}, "expected a map of numbers"),
    ("mosara", {"sets": 10**9}, "sets 1000000000 and router_rank 1 are out of range"),
    ("lora", {"rank": 16}, "q_proj.A has shape .* in the saved state, expected .16, "),
    ("lotr", {"rank": 16}, "q_proj.G has shape .* in the saved state, expected .16, 16"),
    ("sara", {"targets": ["q_proj"], "ks": {f"model.layers.{i}.self_attn.q_proj": 16 for i in (0, 1)}, "norms": None},
     "q_proj.A has shape .* in the saved state, expected .16, "),
    ("mosara", {"sets": 900}, "Lam has shape .* in the saved state, expected .900, "),
    ("mosara", {"router_rank": 900}, "W_g1 has shape .* in the saved state, expected ")])
def test_settings_that_cannot_be_are_refused(method, settings, message, tmp_path):
    """A setting of another type, or a size that the file's tensors do not have: one line with the file's name, before
    anything is allocated."""
    path = tmp_path / "a.safetensors"
    adapter_file.save(attach(toy_model(), method), path)
    tensors, metadata = read_safetensors(path)
    config = json.dumps({**json.loads(metadata["adapter"]), **settings})
    write_safetensors(path, {name: tensor.clone() for name, tensor in tensors.items()}, {**metadata, "adapter": config})
    model = toy_model()
    with pytest.raises(ValueError, match=message) as error:
        adapter_file.load(model, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not adapter.adapted_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ATTACHED)
def test_adapter_that_does_not_fit_is_refused(method, tmp_path):
    """A file for a wider model, for one with more layers or with fewer: each raises, naming the tensor."""
    path = tmp_path / "a.safetensors"
    adapter_file.save(attach(toy_model(), method), path)
    with pytest.raises(ValueError, match="has shape|does not fit|another base"):
        adapter_file.load(toy_model(hidden_size=40, head_dim=10), path)
    with pytest.raises(ValueError, match="no tensor .*layers.2|missing model.layers.2"):
        adapter_file.load(toy_model(num_hidden_layers=3), path)
    with pytest.raises(ValueError, match="unexpected .*layers.1"):
        adapter_file.load(toy_model(num_hidden_layers=1), path)


@pytest.mark.parametrize("method", ["pissa", "sorsa"])
def test_a_state_without_its_start_is_refused(method):
    """Without one of the initial factors W cannot be split again: refused before the model is touched; an unknown svd likewise."""
    saved = adapter.state(attach(toy_model(), method))
    missing = [name for name in saved if name.endswith("0")][-1]
    refused(f"no tensor {missing}", method, saved={name: tensor for name, tensor in saved.items() if name != missing})
    refused("unknown svd 'fast': choose exact or gram", method, svd="fast")


def test_a_base_model_is_no_adapter(tmp_path):
    """There is nothing to save on it."""
    with pytest.raises(ValueError, match="nothing is attached"):
        adapter_file.save(toy_model(), tmp_path / "a.safetensors")


# ---- what attach refuses, and what methods.py reads of it -----------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_attaching_twice_is_refused(method):
    """A second attach raises and leaves layers, tensors and what trains as they were."""
    model = perturb(attach(toy_model(), method))
    before, layers, trained = snapshot(model), adapter.adapted_layers(model), set(adapter.trainable(model))
    with pytest.raises(ValueError, match=f"{method} is already attached"):
        attach(model, method)
    assert same(model.state_dict(), before) and adapter.adapted_layers(model) == layers
    assert set(adapter.trainable(model)) == trained and model.adapter_config["method"] == method


@pytest.mark.parametrize("method", METHODS)
def test_targets_that_cannot_be_are_refused(method):
    """One that matches nothing is answered with what there is; none at all and a head tied to the embedding are refused."""
    refused("'w_pack' matches no linear layer: this model has q_proj, k_proj", method, targets=["q_proj", "w_pack"])
    refused("lm_head shares its weight with another module", method, targets=["lm_head"])
    refused("no targets given", method, targets=[])
    refused("targets is 'q_proj': give a list of names", method, targets="q_proj")
    refused("targets is .*generator.*: give a list of names", method, targets=(name for name in ["q_proj"]))
    attach(toy_model(tie_word_embeddings=False), method, targets=["lm_head"])


@pytest.mark.parametrize("method", METHODS)
def test_linears_that_cannot_be_replaced_are_refused(method):
    """One that stands at two places, of which only the first would be replaced; one whose weight its parent reads itself."""
    model = nn.ModuleDict({"first": nn.ModuleDict({"q_proj": nn.Linear(8, 8)})})
    model["second"] = nn.ModuleDict({"q_proj": model["first"]["q_proj"]})
    options = {**SIZES.get(method, {"rank": 4}), "targets": ["q_proj"]}
    with pytest.raises(ValueError, match="first.q_proj shares its weight with another module"):
        METHODS[method].attach(model, **options)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "q_proj": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="target 'out_proj' matches no linear layer: this model has q_proj$"):
        METHODS[method].attach(model, **{**options, "targets": ["out_proj"]})
    model = nn.ModuleDict({"a": nn.ModuleDict({"q_proj": nn.Linear(8, 8)}), "b": nn.ModuleDict({"q_proj": nn.Linear(8, 8)})})
    for share in (lambda weight: weight, lambda weight: nn.Parameter(weight.data)):  # registered again, or its numbers alone
        model["b"].tied = share(model["a"]["q_proj"].weight)
        with pytest.raises(ValueError, match="a.q_proj shares its weight with another module"):
            METHODS[method].attach(model, **options)
    with pytest.raises(ValueError, match=r"the model is itself a linear.*: give nn.Sequential\(model\)"):
        METHODS[method].attach(nn.Linear(8, 8), **{**options, "targets": ["*"]})
    assert not adapter.adapted_layers(model) and not hasattr(model, "adapter_config")


def test_a_linear_that_is_more_than_one_is_refused():
    """Its hooks, its own forward, or what its class adds would be gone, and the output at step 0 another: also where other targets
    are plain, and where none is."""
    def hooked(linear):
        linear.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))

    def patched(linear):
        linear.forward = lambda x: x

    for more, said in ((hooked, "has hooks, or a forward of its own"), (patched, "has hooks, or a forward of its own"),
                       (nn.utils.parametrizations.spectral_norm, "is a ParametrizedLinear, which is more than the nn.Linear")):
        for names in (("q_proj",), ("q_proj", "v_proj")):
            model = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
            more(model["q_proj"])
            with pytest.raises(ValueError, match=f"^q_proj {said}"):
                METHODS["lora"].attach(model, rank=2)
            assert not adapter.adapted_layers(model) and not hasattr(model, "adapter_config")


@pytest.mark.parametrize("method", METHODS)
def test_the_start_hangs_on_no_default_of_torch(method):
    """Factors are drawn on the CPU and in fp32, so that a seed gives the same, whatever device and dtype tensors have by default."""
    model = perturb(toy_model())
    expected, other = snapshot(attach(copy.deepcopy(model), method)), copy.deepcopy(model)
    torch.set_default_dtype(torch.float64)
    try:
        attach(other, method)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(other.state_dict(), expected)
    drawn = adapter.gaussian(3, 4, generator=torch.Generator().manual_seed(0))
    bounded = adapter.uniform_factor(3, 4, torch.Generator().manual_seed(0))
    with torch.device("meta"):
        assert torch.equal(adapter.gaussian(3, 4, generator=torch.Generator("cpu").manual_seed(0)), drawn)
        assert torch.equal(adapter.uniform_factor(3, 4, torch.Generator("cpu").manual_seed(0)), bounded)


@pytest.mark.parametrize("method", METHODS)
def test_attach_leaves_earlier_copies_of_the_base_alone(method):
    """A state dict that was taken before still is the base's, and so is a model that shares its tensors; layers keep their mode."""
    model, sharing = toy_model(), toy_model()
    taken, before = model.state_dict(), snapshot(model)
    sharing.load_state_dict(taken, assign=True)
    attach(model.eval(), method)
    assert same(taken, before) and same(sharing.state_dict(), before)
    assert not any(layer.training for _, layer in adapter.adapted_layers(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("computed", ["pruned", "weight_norm"])
def test_a_weight_that_is_computed_is_refused(computed):
    """It is no parameter: frozen in the adapter's place it would no longer be part of the model."""
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    if computed == "pruned":
        prune.l1_unstructured(model["q_proj"], "weight", 0.5)
    else:
        torch.nn.utils.weight_norm(model["q_proj"])
    with pytest.raises(ValueError, match="^q_proj's weight is computed from other tensors.*make it plain first"):
        METHODS["lora"].attach(model, rank=2, targets=["q_proj"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora", "lotr", "cora"])
def test_wrappers_and_parts_of_a_model(method, tmp_path):
    """A state is that of the model that attach was given; a merge leaves nothing behind, whichever module it is called on."""
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def __getattr__(self, name):  # as some wrappers do
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.module, name)

    model = attach(toy_model(), method)
    wrapper, keys = Wrapper(model), toy_model().state_dict().keys()
    for other in (wrapper, model.model):
        with pytest.raises(ValueError, match="^no method is attached to this model itself"):
            adapter.state(other)
    adapter.merge(wrapper)
    assert model.state_dict().keys() == keys and not hasattr(model, "adapter_config") and not hasattr(model, "base_keys")
    attach(model, method)  # again, as on a fresh base
    with pytest.raises(ValueError, match="^the model is compiled already: attach first"):
        attach(torch.compile(toy_model()), method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_was_cast_as_a_whole_is_kept_orthonormal(dtype):
    """By SORSA's penalty in fp32, of the factors as they are then: the closed form's gradient is autograd's."""
    model = perturb(attach(toy_model(), "sorsa")).to(dtype)
    trained = [layer.U for _, layer in adapter.adapted_layers(model)]
    R = sorsa.regularizer(model)
    expected = torch.autograd.grad(R, trained)
    assert R.dtype == torch.float32 and sorsa.add_regularizer_grad(model, 1.0).item() == pytest.approx(R.item(), rel=1e-5)
    for factor, gradient in zip(trained, expected):
        torch.testing.assert_close(factor.grad, gradient, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "full"])
def test_a_layer_that_reads_weights_past_its_linears(method):
    """torch's encoder layer, in eval mode: it is refused; with that path off the adapter counts there as in training."""
    layer, x = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), torch.randn(2, 5, 32)
    options = {**SIZES.get(method, {"rank": 4}), "targets": ["linear1", "linear2"]}
    with pytest.raises(ValueError, match=r"linear1 lies in an nn.TransformerEncoderLayer.*set_fastpath_enabled\(False\) first"):
        METHODS[method].attach(layer, **options)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        METHODS[method].attach(layer, **options)
        perturb(layer)
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), layer.train()(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_what_is_no_number_is_not_cast():
    """An index table and a complex filter are left as they are."""
    model = toy_model()
    model.table = nn.Parameter(torch.arange(3), requires_grad=False)
    model.filter = nn.Parameter(torch.tensor([1j]), requires_grad=False)
    adapter.cast_frozen(attach(model, "lora"), torch.bfloat16)
    assert (model.table.dtype, model.filter.dtype, model.lm_head.weight.dtype) == (torch.int64, torch.complex64, torch.bfloat16)


def test_a_model_without_numbers_or_without_a_method_is_named():
    """On the meta device nothing can be decomposed; a plain model has no state of a method."""
    for method in ("pissa", "sorsa", "sara", "mosara", "cora", "cora-init"):
        with pytest.raises(ValueError, match="^a weight on the meta device has no numbers to start from: load the weights first$"):
            attach(toy_model().to("meta"), method)
    with pytest.raises(ValueError, match="^no method is attached to this model itself"):
        adapter.state(toy_model())


def test_targets_match_whole_names_only():
    """`o_proj` does not match `foo_o_proj`; the default seven stand for those of them that the model has."""
    for targets in (["o_proj"], adapter.TARGETS):
        host = nn.ModuleDict({"o_proj": nn.Linear(8, 8), "foo_o_proj": nn.Linear(8, 8)})
        assert [name for name, _ in adapter.adapted_layers(attach(host, "lora", targets=targets))] == ["o_proj"]


@pytest.mark.parametrize("method", RANKED)
def test_rank_out_of_range_is_refused(method):
    """The rank must be 1 .. the smallest side of any target: 16 for the toy model's k and v, 32 for its down_proj."""
    for rank in (0, -1, 17, 2.0):
        refused(f"rank {rank} is out of range: it must be 1 .. 16", method, rank=rank)
    refused("rank 33 is out of range: it must be 1 .. 32", method, rank=33, targets=["down_proj"])


@pytest.mark.parametrize("method", SCALED)
def test_alpha_out_of_range_is_refused(method):
    """A change scaled by zero could not be learned: alpha is above 0, or not a number at all but None."""
    for alpha in (0, -1.5, float("nan")):
        refused(f"alpha {alpha:g} is out of range: it must be above 0", method, alpha=alpha)
    assert (adapter.scaling(None, 8), adapter.scaling(4, 8)) == (1.0, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e30])
def test_a_base_that_no_method_can_compute_with_is_refused_by_name(value, dtype):
    """One number in one weight: every attach and every fit name it, and nothing has changed. Other weights do not matter."""
    model, odd = toy_model().to(dtype), "model.layers.1.self_attn.v_proj"
    model.get_submodule(odd).weight.data[3, 5] = value
    for name, method in METHODS.items():
        options = {"targets": ["v_proj"]} if name == "full" else {}
        for call in [lambda: attach(model, name, **options), *([lambda: method.fit(model, 1000)] if method.fit else [])]:
            with pytest.raises(ValueError, match=f"^{odd} has weights that are not finite, or too large to compute with"):
                call()
        assert not hasattr(model, "adapter_config") and not adapter.adapted_layers(model)
    attach(model, "pissa", targets=["q_proj"])


def test_methods_go_by_name():
    """In any case; a wrong name is answered with the right ones."""
    assert methods.method("Cora-INIT") is METHODS["cora-init"]
    known = "full, lora, pissa, sorsa, sara, mosara, cora, cora-init, lotr"
    with pytest.raises(ValueError, match=f"unknown method 'lorra': choose one of {known}"):
        methods.method("lorra")


def test_arguments_are_read_from_the_signature():
    """Kinds come from annotations or defaults, choices from a Literal; the model, tensors and what has no kind are left out."""
    def attach(model, rank: int = 16, alpha: float | None = None, svd: Literal["gram", "exact"] = "gram", targets: list = ("q",),
               ks: dict | None = None, core_only=False, names=("a", "b"), saved=None):
        pass
    assert methods.arguments(attach) == {
        "rank": (int, (), 16), "alpha": (float, (), None), "svd": (str, ("gram", "exact"), "gram"), "targets": (list, (), ("q",)),
        "ks": (dict, (), None), "core_only": (bool, (), False), "names": (list, (), ("a", "b"))}


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_recorded_and_has_a_kind(method):
    """What attach records is what attach takes: each of its arguments, as JSON of the kind that its signature says."""
    model = attach(toy_model(), method)
    adapter_file.check_recorded(method, model)
    assert model.adapter_config.keys() == {"method", *methods.arguments(METHODS[method].attach)}


def test_what_a_copied_method_forgot_is_said():
    """The name that it was copied under, or an argument: its file would be read as another's, or without what was given."""
    model = attach(toy_model(), "lora")
    with pytest.raises(ValueError, match="^pissa's attach: records the name 'lora'; end attach with adapter.record.model, 'pissa'"):
        adapter_file.check_recorded("pissa", model)
    del model.adapter_config["alpha"]
    with pytest.raises(ValueError, match="^lora's attach: does not record alpha; end attach with"):
        adapter_file.check_recorded("lora", model)
    with pytest.raises(ValueError, match="the argument n of .*attach is int | float: one kind, or one and None"):
        methods.arguments(two_kinds)


def two_kinds(model, n: int | float = 1):
    """What a flag cannot be."""


def test_a_state_may_hold_whole_numbers():
    """Indices or a mask: taken as they are, and refused where they should be others."""
    first, second = [attach(toy_model(), "lora") for _ in range(2)]
    for model in (first, second):
        model.register_buffer("places", torch.arange(3))
        model.register_buffer("mask", torch.tensor([True, False]))
    first.places += 1
    adapter.fill(second, {name: tensor.clone() for name, tensor in adapter.state(first).items()})
    assert second.places.tolist() == [1, 2, 3] and second.mask.tolist() == [True, False]
    for name, wrong in (("places", torch.ones(3)), ("mask", torch.ones(2, dtype=torch.int8))):
        with pytest.raises(ValueError, match=f"{name} has dtype {wrong.dtype}, expected {getattr(first, name).dtype}"):
            adapter.fill(second, {**adapter.state(first), name: wrong})


@pytest.mark.parametrize("targets", [adapter.TARGETS, ["q_proj"]])
@pytest.mark.parametrize("method", RANKED)
def test_the_rank_for_a_budget_is_the_nearest(method, targets):
    """fit's rank has a count at least as near to the budget as that of every other rank that attach takes."""
    def count(rank):
        model = attach(toy_model(), method, rank=rank, targets=targets)
        return sum(p.numel() for p in adapter.trainable(model).values())
    counts = [count(rank) for rank in range(1, 17 if len(targets) > 1 else 33)]
    one, base = counts[0], toy_model()
    for budget in (0, 1, one, 1.4 * one, 1.6 * one, 7 * one + 1, counts[-1] - 1, 10 ** 9):
        rank = METHODS[method].fit(base, budget, targets=targets)["rank"]
        assert abs(counts[rank - 1] - budget) == min(abs(count - budget) for count in counts)
    assert untouched(base)


# ---- singular vectors -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("svd", ["gram", "exact"])
@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40)])
def test_principal_triplets_against_float64(svd, shape):
    """Both routes give the fp64 SVD's leading triplets: descending S, orthonormal sides, fixed signs, no run-to-run change."""
    torch.manual_seed(0)
    W = torch.randn(shape)
    U, S, Vt = adapter.principal_triplets(W, 6, svd)
    Uf, Sf, Vf = torch.linalg.svd(W.double(), full_matrices=False)
    assert U.dtype == S.dtype == Vt.dtype == torch.float32 and (S.diff() <= 0).all()
    assert (S - Sf[:6]).abs().max() < 1e-5
    assert ((U * S) @ Vt - (Uf[:, :6] * Sf[:6]) @ Vf[:6]).abs().max() < 1e-5
    assert (U.T @ U - torch.eye(6)).norm() < 1e-4 and (Vt @ Vt.T - torch.eye(6)).norm() < 1e-4
    assert (Vt.gather(1, Vt.abs().argmax(1, keepdim=True)) > 0).all()
    assert all(torch.equal(a, b) for a, b in zip((U, S, Vt), adapter.principal_triplets(W, 6, svd)))


def assert_as_good_as_an_svd(W, rank):
    """Singular values to 1e-6, the part of W that the triplets make to 1e-6 of what is left, both sides to fp32's accuracy."""
    U, S, Vt = adapter.principal_triplets(W, rank)
    Sf = torch.linalg.svdvals(W.double())
    best = Sf[rank:].norm()  # what any rank-r part leaves at least (Eckart-Young)
    assert ((S - Sf[:rank]).abs() < 1e-6 * Sf[:rank]).all()
    assert abs((W.double() - (U.double() * S) @ Vt.double()).norm() - best) < 1e-6 * best
    assert (U.T @ U - torch.eye(rank)).norm() < 2e-5 and (Vt @ Vt.T - torch.eye(rank)).norm() < 2e-5


@pytest.mark.parametrize("projection, rank", [("self_attn.q_proj", 1), ("mlp.gate_proj", 16), ("mlp.down_proj", 128)])
def test_triplets_of_real_weights(projection, rank, real_base):
    """On weights of the default model, whose spectra fall slowly."""
    assert_as_good_as_an_svd(real_base.model.model.layers[7].get_submodule(projection).weight.detach(), rank)


@pytest.mark.parametrize("shape", [(96, 96), (96, 240), (240, 96)])
def test_triplets_of_a_nearly_flat_spectrum(shape):
    """Singular values 1e-4 apart at the cut."""
    torch.manual_seed(0)
    Q1, Q2 = (torch.linalg.qr(torch.randn(size, 96, dtype=torch.float64)).Q for size in shape)
    assert_as_good_as_an_svd(((Q1 * (1 - 1e-4 * torch.arange(96))) @ Q2.T).float(), 10)


@pytest.mark.parametrize("last", [0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5])
def test_triplets_of_a_steep_spectrum(last):
    """A few directions tower over the others, as in large models: W W^T squares what lies between them."""
    torch.manual_seed(0)
    Q1, Q2 = (torch.linalg.qr(torch.randn(size, 96, dtype=torch.float64)).Q for size in (96, 240))
    S = last ** (torch.arange(96, dtype=torch.float64) / 9).clamp(max=1.2)  # the tenth is `last`, the rest a little lower
    W = ((Q1 * S) @ Q2.T).float()
    U, found, Vt = adapter.principal_triplets(W, 10)
    Uf, Sf, Vf = torch.linalg.svd(W.double(), full_matrices=False)
    assert ((found - Sf[:10]).abs() < 1e-6 * Sf[:10]).all()
    assert ((U * Uf[:, :10]).sum(0).abs() > 1 - 1e-6).all() and ((Vt * Vf[:10]).sum(1).abs() > 1 - 1e-6).all()


def test_triplets_of_a_weight_of_lower_rank():
    """Where sigma_r is zero both sides are orthonormal all the same, and W is what they make."""
    torch.manual_seed(0)
    W = torch.randn(24, 2) @ torch.randn(2, 40)
    for svd in ("gram", "exact"):
        U, S, Vt = adapter.principal_triplets(W, 6, svd)
        assert (U.T @ U - torch.eye(6)).norm() < 1e-4 and (Vt @ Vt.T - torch.eye(6)).norm() < 1e-4
        assert ((U * S) @ Vt - W).norm() < 1e-5 * W.norm()
        U, S, Vt = adapter.principal_triplets(torch.zeros(8, 12), 3, svd)
        assert (U.T @ U - torch.eye(3)).norm() < 1e-6 and not S.any() and (Vt @ Vt.T - torch.eye(3)).norm() < 1e-6


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9 has one of them")
def test_full_precision_holds_under_both_apis():
    """TF32 is off inside and as it was afterwards, whichever of PyTorch's two settings the host program has used."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with adapter.full_precision("cpu"):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        torch.set_float32_matmul_precision("high")
        with adapter.full_precision("cpu"):
            assert matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


# ---- counts on large models -----------------------------------------------------------------------------------------

LLAMA2 = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
              num_key_value_heads=32, head_dim=128)
MISTRAL = {**LLAMA2, "intermediate_size": 14336, "num_key_value_heads": 8}
GEMMA = dict(vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
             num_key_value_heads=16, head_dim=256, tie_word_embeddings=True)
Q_V = {"targets": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("config, method, options, count", [
    (DEFAULT_MODEL, "full", {}, 134_515_008), (DEFAULT_MODEL, "full", {"targets": adapter.TARGETS}, 106_168_320),
    (DEFAULT_MODEL, "lora", {"rank": 16}, 4_884_480), (DEFAULT_MODEL, "lora", {"rank": 128}, 39_075_840),
    (DEFAULT_MODEL, "pissa", {"rank": 16}, 4_884_480), (LLAMA2, "pissa", {"rank": 128}, 319_815_680),
    (DEFAULT_MODEL, "sorsa", {"rank": 16}, 4_887_840), (DEFAULT_MODEL, "sorsa", {"rank": 128}, 39_102_720),
    (LLAMA2, "sorsa", {"rank": 128}, 319_844_352), (MISTRAL, "sorsa", {"rank": 64}, 167_786_496),
    (GEMMA, "sorsa", {"rank": 64}, 200_028_416),
    (DEFAULT_MODEL, "cora", {"rank": 8}, 1_198_080), (DEFAULT_MODEL, "cora", {"rank": 16}, 2_396_160),
    (DEFAULT_MODEL, "cora", {"rank": 8, **Q_V}, 276_480), (DEFAULT_MODEL, "cora", {"rank": 16, **Q_V}, 552_960),
    (DEFAULT_MODEL, "cora-init", {"rank": 8}, 2_442_240), (DEFAULT_MODEL, "cora-init", {"rank": 16, **Q_V}, 921_600),
    (DEFAULT_MODEL, "lotr", {"rank": 64}, 1_253_376)])
def test_published_counts(config, method, options, count, monkeypatch):
    """The counts of the specifications, on the shapes of the default model and of the papers' models."""
    model = shapes_without_svd(monkeypatch, config)
    METHODS[method].attach(model, **options)
    assert sum(p.numel() for p in adapter.trainable(model).values()) == count


def readme_counts():
    """{method: parameters} of the method table in the README."""
    rows = [line.split("|") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    return {row[1].strip(" `"): int(row[5].split()[0].replace(",", "")) for row in rows
            if len(row) == 8 and row[1].strip(" `") in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_the_readme_states_the_counts_of_the_default_sizes(method, real_base, monkeypatch):
    """The method table's parameters are those of attach with its defaults on the default model (for SARA, of its weights)."""
    model = shapes_without_svd(monkeypatch, DEFAULT_MODEL)
    if "sara" in method:
        model.load_state_dict(real_base.model.state_dict(), assign=True)
    METHODS[method].attach(model)
    assert readme_counts()[method] == sum(p.numel() for p in adapter.trainable(model).values())
