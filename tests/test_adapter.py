"""The contract that every method keeps."""
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import adapter
from lora import LoRALinear
from methods import METHODS
from model import Config, Model
from support import report
from tests.toy import ATTACHED, MERGEABLE, RANKED, attach, perturb, snapshot, tokens, toy_model
from weights import adapter_file
from weights.safetensors import read_safetensors, write_safetensors

SUM_IN, SUM_OUT, LAYERS = 2 * (32 * 6 + 48), 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32), 14  # of the toy model's 14 linears
TRAINED = {"lora": "A B", "pissa": "A B", "sorsa": "U S Vt", "sara": "A lam B", "mosara": "Lam v W_g1 W_g2", "cora": "A",
           "cora-init": "A B", "lotr": "A B G"}
EXACT_START = set(ATTACHED) - {"pissa", "sorsa"}  # these two split the weight and add it up again: equal to rounding


def expected_count(method, model):
    """The closed formula of each method's docstring on the toy model: rank 4, k per layer for SARA, n = 5 and q = 1."""
    ks = [(model.adapter_config["ks"][name], *layer.weight.shape) for name, layer in adapter.adapted_layers(model)
          if method in ("sara", "mosara")]
    return {"lora": 4 * (SUM_IN + SUM_OUT), "pissa": 4 * (SUM_IN + SUM_OUT), "sorsa": 4 * (SUM_IN + SUM_OUT + LAYERS),
            "sara": sum(k * (inner + out + 1) for k, out, inner in ks),
            "mosara": sum(5 * k + out + k + 5 for k, out, inner in ks),
            "cora": 4 * SUM_IN, "cora-init": 4 * (SUM_IN + SUM_OUT),
            "lotr": 4 * (SUM_IN + SUM_OUT) // 2 + LAYERS * 4 ** 2}[method]  # two layers share each A and B


def loss_of(model):
    return nn.functional.cross_entropy(model(tokens())[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


def train_steps(model, steps, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", ATTACHED)
def test_step_zero_is_the_base_model(method):
    """Attaching changes no output: rounding for the two methods that split the weight, not a bit for the others."""
    model = toy_model()
    before = model(tokens())
    after = attach(model, method)(tokens())
    assert torch.equal(before, after) if method in EXACT_START else (before - after).abs().max() < 1e-5


@pytest.mark.parametrize("method", MERGEABLE)
def test_forward_equals_weight_plus_delta(method):
    """The factored forward is that of the base model under weight + delta(), for arbitrary factors."""
    model = perturb(attach(toy_model(), method))
    weights = {f"{name}.weight": layer.weight + layer.delta() for name, layer in adapter.adapted_layers(model)}
    plain = toy_model()
    expected = torch.func.functional_call(plain, {**dict(plain.named_parameters()), **weights}, tokens())
    assert (expected - model(tokens())).abs().max() < 1e-5


@pytest.mark.parametrize("method", ATTACHED)
def test_trainable_names_and_count(method):
    """requires_grad is True exactly on the method's own factors, and their count is the closed formula's."""
    model = attach(toy_model(), method)
    names = adapter.trainable(model)
    own, count = TRAINED[method].split(), expected_count(method, model)
    assert {name.rpartition(".")[2] for name in names} == set(own)
    assert len(names) == (LAYERS + 2 * 7 if method == "lotr" else LAYERS * len(own))
    assert sum(p.numel() for p in names.values()) == count
    lines = [line for line in report.parameter_table(model) if line.startswith("all ")]
    assert len(lines) == 1 and f" {count:,}  (" in lines[0]
    added = sum(tensor.numel() for tensor in adapter.state(model).values()) - count
    frozen = [line for line in report.parameter_table(model) if line.startswith("frozen")]
    assert len(frozen) == (added > 0) and all(line.endswith(f" {added:,}") for line in frozen)


@pytest.mark.parametrize("method", ATTACHED)
def test_ten_steps_move_the_factors_and_nothing_else(method):
    """After ten steps every factor has moved and all other tensors, buffers included, are bitwise unchanged."""
    model = attach(toy_model(), method)
    before = snapshot(model)
    train_steps(model, 10)
    trained = adapter.trainable(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


@pytest.mark.parametrize("method", ATTACHED + ["full"])
def test_fifty_steps_fit_one_batch(method):
    """Fifty steps on one batch bring its loss down by more than half; by less for Mo-SARA, which cannot turn a vector."""
    model = attach(toy_model(), method)
    start = loss_of(model).item()
    train_steps(model, 50, lr=2e-2)
    assert loss_of(model).item() < (0.8 if method == "mosara" else 0.5) * start


@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_equals_unmerged(method):
    """A merged model holds plain nn.Linear under the base's keys and gives the adapted model's logits."""
    model = perturb(attach(toy_model(), method))
    expected = model(tokens())
    adapter.merge(model)
    assert not adapter.adapted_layers(model) and model.state_dict().keys() == toy_model().state_dict().keys()
    assert all(type(m) is nn.Linear for m in model.modules() if hasattr(m, "in_features"))
    assert (model(tokens()) - expected).abs().max() < 1e-5
    attach(model, "lora")  # and it is a fresh base for the next method


@pytest.mark.parametrize("method", MERGEABLE)
def test_lora_factors_are_the_change_against_the_original_weight(method):
    """base weights + up @ down give the adapted model's logits."""
    model, plain = perturb(attach(toy_model(), method)), toy_model()
    for name, layer in adapter.adapted_layers(model):
        down, up = layer.lora_factors()
        assert down.shape[1] == layer.in_features and up.shape == (layer.out_features, down.shape[0])
        plain.get_submodule(name).weight.data += up @ down
    assert (plain(tokens()) - model(tokens())).abs().max() < 1e-5


@pytest.mark.parametrize("method", ATTACHED + ["full"])
def test_save_then_load_in_a_fresh_process(method, tmp_path):
    """A fresh process that builds the same base and loads the file computes the same logits to the last bit."""
    model = perturb(attach(toy_model(), method), scale=0.05)
    adapter_file.save(model, tmp_path / "a.safetensors", "toy", "abc")
    write_safetensors(tmp_path / "logits.safetensors", {"logits": model(tokens())})
    code = ("import sys; sys.path[:0] = ['.', 'tests']\n"
            "import torch, adapter, toy, tensorfile\n"
            "for name in ('svd', 'svdvals', 'eigh', 'eigvalsh', 'qr'):  # loading must not need a decomposition\n"
            "    setattr(torch.linalg, name, None)\n"
            "model = toy.toy_model()\n"
            f"config = adapter_file.load(model, {str(tmp_path / 'a.safetensors')!r}, 'abc')\n"
            f"assert config['method'] == {method!r}\n"
            f"expected = tensorfile.read_safetensors({str(tmp_path / 'logits.safetensors')!r})[0]['logits']\n"
            "assert torch.equal(model(toy.tokens()), expected)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ATTACHED + ["full"])
def test_a_loaded_adapter_is_the_saved_one_in_every_tensor(method, tmp_path):
    """Loading fills starts and trained factors from the file, each its own: saving again writes the same tensors, and
    lora_factors() give the same change."""
    model, fresh = perturb(attach(toy_model(), method), scale=0.05), toy_model()
    adapter_file.save(model, tmp_path / "a.safetensors")
    adapter_file.load(fresh, tmp_path / "a.safetensors")
    adapter_file.save(fresh, tmp_path / "b.safetensors")
    first, second = (read_safetensors(tmp_path / name)[0] for name in ("a.safetensors", "b.safetensors"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for (_, layer), (_, loaded) in zip(adapter.adapted_layers(model), adapter.adapted_layers(fresh)):
        if not layer.unmergeable:
            assert all(torch.equal(a, b) for a, b in zip(layer.lora_factors(), loaded.lora_factors()))


@pytest.mark.parametrize("method", ATTACHED)
def test_factors_are_fp32_on_a_bf16_model(method):
    """On a bf16 base the factors are fp32, the weight stays bf16, and step 0 differs by bf16 rounding only."""
    model = toy_model().bfloat16()
    before = model(tokens())
    attach(model, method)
    assert all(p.dtype == torch.float32 for p in adapter.trainable(model).values())
    after = model(tokens())
    assert after.dtype == torch.bfloat16
    assert torch.equal(before, after) if method in EXACT_START else (before - after).abs().max() < 0.05 * before.abs().max()
    loss_of(model).backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter.trainable(model).values() if p.grad is not None)


@pytest.mark.parametrize("method", MERGEABLE)
def test_weight_plus_delta_is_the_original_weight(method):
    """weight + delta() reproduces W at step 0: 1e-6 relative in fp32, 2e-3 in bf16; square, tall, wide, with bias."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-3)):
        for out, inner in ((24, 24), (40, 24), (24, 40)):
            torch.manual_seed(0)
            host = nn.Sequential(nn.Linear(inner, out).to(dtype))
            W, bias = host[0].weight.detach().float().clone(), host[0].bias
            attach(host, method, targets=["0"])
            assert (host[0].weight.float() + host[0].delta() - W).norm() <= tolerance * W.norm()
            assert host[0].bias is bias and not bias.requires_grad


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


@pytest.mark.parametrize("method", ATTACHED)
def test_a_cast_model_computes_with_cast_factors(method):
    """model.double() reaches every factor, shared ones included: logits in fp64, equal to fp32's up to its rounding."""
    model = perturb(attach(toy_model(), method))
    expected = model(tokens())
    model.double()
    assert model(tokens()).dtype == torch.float64 and (model(tokens()) - expected).abs().max() < 1e-5
    assert all(factor.dtype == torch.float64 for _, layer in adapter.adapted_layers(model) for factor in layer.factors())


def test_mosara_refuses_to_be_merged_and_says_why():
    """Merging a routed method raises before anything has changed, with the reason."""
    model = perturb(attach(toy_model(), "mosara"))
    before = model(tokens())
    with pytest.raises(ValueError, match="q_proj cannot be merged: each token has its own update through the router"):
        adapter.merge(model)
    assert torch.equal(model(tokens()), before) and len(adapter.adapted_layers(model)) == LAYERS


@pytest.mark.parametrize("method", ATTACHED)
def test_relative_change(method):
    """0 at the start, then |dW| / |W| over all adapted matrices, by the difference of the merged and the base weights."""
    base, model = toy_model(), attach(toy_model(), method)
    if method == "mosara":
        assert adapter.relative_change(model) is None
        return
    assert adapter.relative_change(model) < 1e-6
    perturb(model)
    reported, names = adapter.relative_change(model), [name for name, _ in adapter.adapted_layers(model)]
    adapter.merge(model)
    pairs = [(model.get_submodule(name).weight, base.get_submodule(name).weight) for name in names]
    squares = [((after - before).square().sum().item(), before.square().sum().item()) for after, before in pairs]
    assert reported == pytest.approx((sum(s for s, _ in squares) / sum(w for _, w in squares)) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("method", RANKED)
@pytest.mark.parametrize("params", [1, 1500, 4000, 10_000, 10 ** 9])
def test_the_rank_for_a_budget_is_the_nearest(method, params):
    """fit's rank has a count at least as near to the budget as that of every other rank."""
    def count(rank):
        return sum(p.numel() for p in adapter.trainable(attach(toy_model(), method, rank=rank)).values())
    rank = METHODS[method].fit(toy_model(), params)["rank"]
    assert abs(count(rank) - params) == min(abs(count(rank) - params) for rank in range(1, 17))


@pytest.mark.parametrize("method", ATTACHED + ["full"])
def test_attaching_twice_is_refused(method):
    """A second attach raises and leaves the model as it was."""
    model = attach(toy_model(), method)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{method} is already attached"):
        attach(model, method)
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize("method", ATTACHED + ["full"])
def test_unknown_target_is_refused_by_name(method):
    """A target that matches nothing raises, listing what there is, before anything has changed."""
    model = toy_model()
    with pytest.raises(ValueError, match="'w_pack' matches no linear layer: this model has q_proj, k_proj"):
        attach(model, method, targets=["q_proj", "w_pack"])
    if method != "full":
        with pytest.raises(ValueError, match="no targets given"):
            attach(model, method, targets=[])
    assert all(p.requires_grad for p in model.parameters()) and not adapter.adapted_layers(model)


@pytest.mark.parametrize("method", RANKED)
@pytest.mark.parametrize("rank", [0, -1, 17])
def test_rank_out_of_range_is_refused(method, rank):
    """The rank must be 1 .. the smallest side of any target (16 for the toy model's k and v)."""
    with pytest.raises(ValueError, match=rf"rank {rank} is out of range: it must be 1 .. 16"):
        attach(toy_model(), method, rank=rank)


def test_targets_match_whole_names_only():
    """`proj` matches neither `q_proj` nor `foo_proj`: the last component must be equal."""
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.o_proj, self.foo_o_proj = nn.Linear(8, 8), nn.Linear(8, 8)
    host = attach(Host(), "lora", targets=["o_proj"])
    assert [name for name, _ in adapter.adapted_layers(host)] == ["o_proj"]


def test_unknown_method_lists_the_methods():
    """A wrong method name is answered with the right ones."""
    with pytest.raises(ValueError, match="unknown method 'lorra': choose one of full, lora, pissa, sorsa, sara, mosara, cora, cora-init, lotr"):
        adapter.method_module("lorra")


def test_merge_refuses_an_unmergeable_layer_before_changing_anything():
    """If one layer's change depends on its input, no layer is merged."""
    class Routed(adapter.AdaptedLinear):
        forward, unmergeable = adapter.AdaptedLinear.base, "it is routed"
    model = attach(toy_model(), "lora", targets=["q_proj", "v_proj"])
    adapter.replace(model, "model.layers.1.mlp.up_proj", Routed(model.model.layers[1].mlp.up_proj))
    with pytest.raises(ValueError, match="up_proj cannot be merged: it is routed"):
        adapter.merge(model)
    assert len(adapter.adapted_layers(model)) == 5


def test_adapter_of_another_base_is_refused(tmp_path):
    """An adapter remembers its base's checksum, and is refused on another."""
    adapter_file.save(attach(toy_model(), "lora"), tmp_path / "a.safetensors", "toy", "1" * 64)
    with pytest.raises(ValueError, match="trained on another base model .toy, sha256 111111111111"):
        adapter_file.load(toy_model(), tmp_path / "a.safetensors", "2" * 64)


@pytest.mark.parametrize("method", ATTACHED)
def test_an_adapter_of_another_base_can_be_forced(method, tmp_path):
    """The refusal names the flag; with force it loads, also where the other base has other norms."""
    adapter_file.save(perturb(attach(toy_model(), method)), tmp_path / "a.safetensors", "toy", "1" * 64)
    with pytest.raises(ValueError, match="load that base, or force it on this one .--force."):
        adapter_file.load(toy_model(seed=5), tmp_path / "a.safetensors", "2" * 64)
    forced = toy_model(seed=5)
    adapter_file.load(forced, tmp_path / "a.safetensors", "2" * 64, force=True)
    saved = read_safetensors(tmp_path / "a.safetensors")[0]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in adapter.state(forced).items())


@pytest.mark.parametrize("method, settings, message", [
    ("lora", {"rank": "4"}, "the setting rank is '4', expected a whole number"),
    ("lora", {"rank": True}, "the setting rank is True, expected a whole number"),
    ("lora", {"rank": None}, "the setting rank is None, expected a whole number"),
    ("lora", {"rank": 10**9}, "rank 1000000000 is out of range"),
    ("lora", {"alpha": [1]}, r"the setting alpha is \[1\], expected a number"),
    ("lora", {"alpha": 10**400}, "the setting alpha is 10000"),
    ("lora", {"targets": 3}, "the setting targets is 3, expected a list of texts"),
    ("lora", {"targets": [3]}, "expected a list of texts"),
    ("lora", {"seed": 1 << 64}, "the setting seed is 18446744073709551616, expected a whole number"),
    ("lora", {"saved": {}}, "lora has no setting saved"),
    ("lora", {"method": ["lora"]}, r"unknown method \['lora'\]; known: full, lora"),
    ("lotr", {"core_only": 1}, "the setting core_only is 1, expected true or false"),
    ("sara", {"ks": {"a": "1"}}, "expected a map of numbers"),
    ("sara", {"norms": 1.0}, "expected a map of numbers"),
    ("mosara", {"sets": 10**9}, "Lam has shape .* in the adapter file, expected .1000000000, "),
    ("mosara", {"router_rank": 10**9}, "W_g1 has shape .* in the adapter file, expected "),
])
def test_settings_that_cannot_be_are_refused(method, settings, message, tmp_path):
    """A setting of another type, or a size that the file's tensors do not have: one line with the file's name, before
    anything is allocated."""
    path = tmp_path / "a.safetensors"
    adapter_file.save(attach(toy_model(), method), path)
    tensors, metadata = read_safetensors(path)
    config = json.dumps({**json.loads(metadata["adapter"]), **settings})
    write_safetensors(path, {name: tensor.clone() for name, tensor in tensors.items()}, {**metadata, "adapter": config})
    with pytest.raises(ValueError, match=message) as error:
        adapter_file.load(toy_model(), path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_every_setting_has_a_kind():
    """What any method records is a setting that `read_config` knows."""
    for method in METHODS:
        assert attach(toy_model(), method).adapter_config.keys() <= {"method", *adapter.SETTINGS}


@pytest.mark.parametrize("method", ATTACHED)
def test_adapter_that_does_not_fit_is_refused(method, tmp_path):
    """A file for a wider model, one with a missing tensor, and a file that is no adapter: each raises, naming the tensor."""
    path = tmp_path / "a.safetensors"
    adapter_file.save(attach(toy_model(), method), path)
    with pytest.raises(ValueError, match="has shape|does not fit|another base"):
        adapter_file.load(toy_model(hidden_size=40, head_dim=10), path)
    with pytest.raises(ValueError, match="no tensor .*layers.2|missing model.layers.2"):
        adapter_file.load(toy_model(num_hidden_layers=3), path)
    with pytest.raises(ValueError, match="unexpected .*layers.1"):
        adapter_file.load(toy_model(num_hidden_layers=1), path)
    tensors, metadata = read_safetensors(path)
    write_safetensors(path, tensors, {**metadata, "adapter": metadata["adapter"].replace('"targets"', '"rang"')})
    with pytest.raises(ValueError, match=f"{method} has no setting rang; was it written by another version"):
        adapter_file.load(toy_model(), path)
    write_safetensors(path, tensors, {})
    with pytest.raises(ValueError, match="not an adapter file"):
        adapter_file.load(toy_model(), path)


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


@pytest.mark.parametrize("rank", [1, 16, 128])
def test_triplets_of_real_weights_are_as_good_as_an_svd(rank, real_base):
    """On weights of the default model: singular values to 1e-6, the part of W they make and both sides to fp32's accuracy."""
    layer = real_base.model.model.layers[7]
    for W in (layer.self_attn.q_proj.weight, layer.mlp.gate_proj.weight, layer.mlp.down_proj.weight):
        U, S, Vt = adapter.principal_triplets(W.detach(), rank)
        Uf, Sf, Vf = torch.linalg.svd(W.detach().double(), full_matrices=False)
        assert ((S - Sf[:rank]).abs() < 1e-6 * Sf[:rank]).all()
        best = (Sf[rank:] ** 2).sum().sqrt()  # what any rank-r part leaves at least (Eckart-Young)
        assert abs((W.detach().double() - (U.double() * S) @ Vt.double()).norm() - best) < 1e-6 * best
        assert (U.T @ U - torch.eye(rank)).norm() < 2e-5 and (Vt @ Vt.T - torch.eye(rank)).norm() < 2e-5


@pytest.mark.parametrize("shape", [(96, 96), (96, 240), (240, 96)])
def test_triplets_of_a_nearly_flat_spectrum(shape):
    """Singular values 1e-4 apart at the cut: still the best rank-r part of W, to 1e-6 of what is left."""
    torch.manual_seed(0)
    Q1, Q2 = (torch.linalg.qr(torch.randn(size, 96, dtype=torch.float64)).Q for size in shape)
    S = 1 - 1e-4 * torch.arange(96, dtype=torch.float64)
    W = ((Q1 * S) @ Q2.T).float()
    U, found, Vt = adapter.principal_triplets(W, 10)
    best = torch.linalg.svdvals(W.double())[10:].norm()
    assert ((found - S[:10]).abs() < 1e-6).all()
    assert abs((W.double() - (U.double() * found) @ Vt.double()).norm() - best) < 1e-6 * best


def test_rank_deficient_weight_falls_back_to_the_exact_svd():
    """Where sigma_r is zero the Gram route would divide by it: the result is then the exact route's, finite and orthonormal."""
    torch.manual_seed(0)
    W = torch.randn(24, 2) @ torch.randn(2, 40)
    gram, exact = adapter.principal_triplets(W, 6, "gram"), adapter.principal_triplets(W, 6, "exact")
    assert all(torch.equal(a, b) for a, b in zip(gram, exact))
    assert (gram[0].T @ gram[0] - torch.eye(6)).norm() < 1e-4


@pytest.mark.parametrize("svd", ["gram", "exact"])
def test_a_zero_weight_gives_finite_factors(svd):
    """A weight of zeros has no direction to prefer, and no route may divide by its singular values."""
    assert all(factor.isfinite().all() for factor in adapter.principal_triplets(torch.zeros(8, 12), 3, svd))


def test_full_precision_holds_under_both_apis():
    """TF32 is off inside and as it was afterwards, whichever of PyTorch's two settings the host program has used."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with adapter.full_precision("cpu"):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    torch.set_float32_matmul_precision("high")
    try:
        with adapter.full_precision("cpu"):
            assert matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("method", ATTACHED)
def test_a_shared_weight_is_refused(method):
    """A head tied to the embedding is no target: its change would be the embedding's too."""
    with pytest.raises(ValueError, match="lm_head shares its weight with another module"):
        attach(toy_model(), method, targets=["lm_head"])
    attach(toy_model(tie_word_embeddings=False), method, targets=["lm_head"])


@pytest.mark.parametrize("method", ["pissa", "sorsa"])
def test_a_load_that_fails_early_leaves_a_usable_base(method, tmp_path):
    """A file without one of the initial factors is refused before the model is touched; an unknown svd likewise."""
    adapter_file.save(attach(toy_model(), method), tmp_path / "a.safetensors")
    tensors, metadata = read_safetensors(tmp_path / "a.safetensors")
    missing = [name for name in tensors if name.endswith("0")][-1]
    write_safetensors(tmp_path / "a.safetensors", {k: v for k, v in tensors.items() if k != missing}, metadata)
    model = toy_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"no tensor {missing}"):
        adapter_file.load(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="unknown svd 'fast': choose exact or gram"):
        attach(model, method, svd="fast")
    assert all(p.requires_grad for p in model.parameters()) and before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    attach(model, method)


def test_there_is_nothing_to_save_without_an_adapter(tmp_path):
    """Saving a base or merged model as an adapter is refused."""
    with pytest.raises(ValueError, match="nothing is attached"):
        adapter_file.save(toy_model(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("method", ["pissa", "sorsa"])
def test_lora_factors_make_a_plain_lora(method):
    """The base with plain LoRA layers of rank 2r, built from the factors, gives the adapted model's logits."""
    model, plain = perturb(attach(toy_model(), method)), toy_model()
    for name, layer in adapter.adapted_layers(model):
        adapter.replace(plain, name, LoRALinear(plain.get_submodule(name), *layer.lora_factors()))
    assert (plain(tokens()) - model(tokens())).abs().max() < 1e-5


@pytest.fixture
def default_shapes(monkeypatch):
    """The default model without weights, on which no SVD is run."""
    def no_svd(weight, rank, svd="gram"):
        out, inner = weight.shape
        return [torch.empty(size, device=weight.device) for size in ((out, rank), (rank,), (rank, inner))]
    monkeypatch.setattr(adapter, "principal_triplets", no_svd)
    monkeypatch.setattr(adapter, "subtract", lambda weight, delta: None)
    with torch.device("meta"):
        return Model(Config(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                            num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True))


@pytest.mark.parametrize("method, rank, count", [
    ("lora", 16, 4_884_480), ("pissa", 16, 4_884_480), ("sorsa", 16, 4_887_840), ("lora", 128, 39_075_840),
    ("sorsa", 128, 39_102_720), ("full", None, 134_515_008), ("cora", 8, 1_198_080), ("cora-init", 8, 2_442_240),
    ("lotr", 32, 540_672)])
def test_published_counts_on_the_default_model(method, rank, count, default_shapes):
    """The counts of the specifications, on the default model's shapes."""
    attach(default_shapes, method, **({"rank": rank} if rank else {}))
    assert sum(p.numel() for p in adapter.trainable(default_shapes).values()) == count


def test_full_trains_everything_once_or_the_named_matrices():
    """Full fine-tuning trains every parameter, the tied embedding once; with targets, exactly those matrices."""
    model = attach(toy_model(), "full")
    assert len(adapter.trainable(model)) == len(list(model.parameters())) and "lm_head.weight" not in adapter.trainable(model)
    model = attach(toy_model(), "full", targets=["down_proj"])
    assert set(adapter.trainable(model)) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}


@pytest.mark.parametrize("file", ["lora", "pissa", "sorsa", "sara", "cora", "lotr"])
def test_method_file_runs_as_a_demonstration(file):
    """`python METHOD.py` prints, for each of its methods, the parts, an exact start, and an exact merge or why there is none."""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, f"{file}.py"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = done.stdout.strip().split("\n\n")
    assert [part.split()[0] for part in parts] == [name for name, (owner, _) in METHODS.items() if owner == file]
    for part in parts:
        *_, start, trained, merged = part.splitlines()
        assert float(start.split()[-1]) < 1e-6 < 1e-2 < float(trained.split()[-1])
        assert "each token" in merged if part.startswith("mosara") else float(merged.split()[-1]) < 1e-6


@pytest.mark.parametrize("method", ATTACHED)
def test_hugging_face_model_as_host(method):
    """The methods attach to transformers' own Llama: same output at step 0, a training step, a merge."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    host = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).eval()
    before = host(tokens()).logits
    attach(host, method)
    assert (host(tokens()).logits - before).abs().max() < 1e-5
    optimizer, losses = torch.optim.AdamW(adapter.trainable(host).values(), lr=2e-2), []
    for _ in range(8):
        losses.append(host(tokens(), labels=tokens()).loss)
        losses[-1].backward()
        assert all(p.grad is not None for p in adapter.trainable(host).values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    perturb(host)
    if method == "mosara":
        return
    expected = host(tokens()).logits
    adapter.merge(host)
    assert (host(tokens()).logits - expected).abs().max() < 1e-5 and (expected - before).abs().max() > 1e-2


def readme_counts():
    """{method: parameters} of the method table in the README."""
    rows = [line.split("|") for line in (Path(__file__).parent.parent / "README.md").read_text().splitlines() if line.startswith("| `")]
    return {row[1].strip(" `"): int(row[5].split()[0].replace(",", "")) for row in rows
            if len(row) == 8 and row[1].strip(" `") in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_the_readme_states_the_counts_of_the_default_sizes(method, default_shapes, real_base):
    """The method table's parameters are those of attach with its defaults on the default model (for SARA, of its weights)."""
    if "sara" in method:
        default_shapes = Model(real_base.model.config)
        default_shapes.load_state_dict(real_base.model.state_dict(), assign=True)
    METHODS[method].attach(default_shapes)
    assert readme_counts()[method] == sum(p.numel() for p in adapter.trainable(default_shapes).values())


# ---- the sum of a frozen and a thin product -------------------------------------------------------------------------

@pytest.mark.parametrize("trained", [(True,) * 5, (True, False, False, True, True), (False, False, False, True, True),
                                     (True, False, False, True, False), (True, False, False, False, True)])
def test_low_rank_sum_equals_autograd_in_float64(trained):
    """x W^T + b + (x down^T) up^T and all its gradients, whichever of the five are asked for."""
    torch.manual_seed(0)
    shapes = (7, 5), (6, 5), (6,), (3, 5), (6, 3)  # x, W, b, down, up
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=wanted) for shape, wanted in zip(shapes, trained)]
    x, W, b, down, up = tensors
    found, expected = adapter.LowRankSum.apply(*tensors), x @ W.T + b + (x @ down.T) @ up.T
    assert torch.allclose(found, expected, rtol=1e-12)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    g = torch.randn(7, 6, dtype=torch.float64)
    for ours, theirs in zip(torch.autograd.grad(found, wanted, g), torch.autograd.grad(expected, wanted, g)):
        assert torch.allclose(ours, theirs, rtol=1e-12)
    assert torch.autograd.gradcheck(adapter.LowRankSum.apply, tensors)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5)])
def test_plus_takes_any_leading_shape_and_every_dtype(shape):
    """(..., in) -> (..., out), no rows included, in x's dtype; under a caller's autocast the same numbers to bf16's rounding."""
    torch.manual_seed(0)
    layer = adapter.AdaptedLinear(nn.Linear(5, 6))
    x, down, up = torch.randn(shape), torch.randn(3, 5), torch.randn(6, 3)
    expected = x @ layer.weight.T + layer.bias + (x @ down.T) @ up.T
    assert layer.plus(x, down, up).shape == (*shape[:-1], 6) and torch.allclose(layer.plus(x, down, up), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(layer.plus(x, down, up).float(), expected, atol=0.2)
    half = layer.bfloat16().plus(x.bfloat16(), down, up)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), expected, atol=0.2)


def test_second_derivatives_are_refused_not_wrong():
    """The gradient of a gradient would need what the backward pass does not keep: it raises."""
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((7, 5), (6, 5), (6,), (3, 5), (6, 3))]
    first = torch.autograd.grad(adapter.LowRankSum.apply(*tensors).square().sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
