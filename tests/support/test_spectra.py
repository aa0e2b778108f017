"""How far weights move in their SVD, against closed forms, numpy's SVD, and the regularizer by its definition."""
import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import adapter
import sorsa
from support import spectra
from tests.runs import Stopped, begin, go_on, stopping, trace
from tests.toy import MERGEABLE, attach, perturb, toy_model

TALL, SQUARE, WIDE = (40, 24), (24, 24), (24, 56)


def orthonormal(rows, columns, seed):
    """(rows, columns) in fp64 with orthonormal columns."""
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


def made(shape, s=None, U=None):
    """(U, s, Vt, the matrix of this shape with these singular values, left to right from 24 to 1 if none are given)."""
    k = min(shape)
    s = torch.arange(k, 0, -1, dtype=torch.float64) if s is None else s
    U, Vt = orthonormal(shape[0], k, 0) if U is None else U, orthonormal(shape[1], k, 1).T
    return U, s, Vt, U * s @ Vt


def by_numpy(W_0, W_t):
    """Delta Sigma, Delta D and |dW|/|W| by numpy's SVD in fp64, written as sums."""
    (U_0, s_0, Vt_0), (U_t, s_t, Vt_t) = (np.linalg.svd(np.asarray(W, np.float64), full_matrices=False) for W in (W_0, W_t))
    k = len(s_0)
    turned = sum(abs(U_t[:, j] @ U_0[:, j]) + abs(Vt_t[j] @ Vt_0[j]) for j in range(k))
    return {"delta_sigma": sum(abs(s_t - s_0)) / k, "delta_d": 1 - turned / (2 * k),
            "change": np.linalg.norm(W_t - W_0) / np.linalg.norm(W_0)}


# ---- one matrix: Delta Sigma and Delta D ----------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [TALL, SQUARE, WIDE])
def test_a_multiple_of_w_turns_nothing(shape):
    """W_t = c W_0: Delta Sigma = |c - 1| mean(s), Delta D = 0; for c = 1 all is 0, and a negative c only turns signs."""
    _, s, _, W = made(shape)
    for c in (1.0, 1.7, 0.4, -1.0):
        found = spectra.variation(W, c * W)
        assert found["delta_sigma"] == pytest.approx(abs(abs(c) - 1) * s.mean().item(), abs=1e-13)
        assert abs(found["delta_d"]) < 1e-13 and found["change"] == pytest.approx(abs(c - 1))


@pytest.mark.parametrize("shape", [TALL, SQUARE, WIDE])
def test_signs_do_not_count(shape):
    """Every other u_j, or v_j, turned about: another matrix with the same singular values and, up to signs, vectors."""
    U, s, Vt, W = made(shape)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(s) // 2)
    for W_t in (U * sign * s @ Vt, U * s @ (sign[:, None] * Vt)):
        found = spectra.variation(W, W_t)
        assert found["delta_sigma"] < 1e-13 and abs(found["delta_d"]) < 1e-13 and found["change"] > 0.5


@pytest.mark.parametrize("shape", [TALL, SQUARE, WIDE])
def test_a_pair_that_changes_places(shape):
    """s_6 = 19 grows to 20.5, past s_5 = 20: sorted again two lengths have changed, by 0.5 and 1, and two pairs of vectors stand where
    strangers to them stood: Delta D = 2/k. Exchanged, the lengths are the same."""
    _, s, _, W = made(shape)
    k = len(s)
    for value, other, lengths in ((20.5, 20, 1.5), (20, 19, 0)):
        moved = s.clone()
        moved[5], moved[4] = value, other
        found = spectra.variation(W, made(shape, moved)[3])
        assert found["delta_sigma"] == pytest.approx(lengths / k, abs=1e-13) and found["delta_d"] == pytest.approx(2 / k, abs=1e-13)


@pytest.mark.parametrize("shape", [TALL, SQUARE, WIDE])
def test_a_plane_that_turns(shape):
    """u_3 and u_4 turned by theta in their plane: Delta D = (1 - cos theta) / k; the same with v; with both, twice that."""
    U, s, Vt, W = made(shape)
    theta, k = torch.tensor(0.3, dtype=torch.float64), len(s)
    turn = torch.eye(k, dtype=torch.float64)
    turn[3, 3] = turn[4, 4] = theta.cos()
    turn[3, 4], turn[4, 3] = -theta.sin(), theta.sin()
    share = (1 - theta.cos().item()) / k
    for W_t, expected in ((U @ turn * s @ Vt, share), (U * s @ (turn @ Vt), share), (U @ turn * s @ (turn.T @ Vt), 2 * share)):
        found = spectra.variation(W, W_t)
        assert found["delta_sigma"] < 1e-13 and found["delta_d"] == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("shape", [TALL, SQUARE, WIDE])
@pytest.mark.parametrize("smallest", [1.0, 1e-2, 3e-4, 1e-6])
def test_numpy_says_the_same(shape, smallest, monkeypatch):
    """Random changes of matrices whose singular values go down to a share of the largest: torch's SVD, which is slow, for the last."""
    svd, taken = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda *arguments, **options: taken.append(svd(*arguments, **options)) or taken[-1])
    s = torch.logspace(0, np.log10(smallest), min(shape), dtype=torch.float64) * torch.linspace(2, 1, min(shape), dtype=torch.float64)
    W = made(shape, s)[3]
    change = 1e-2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for W_t in (W + change * smallest ** 0.5, W + change * smallest):
        taken.clear()
        expected = by_numpy(W, W_t)
        assert spectra.variation(W, W_t) == pytest.approx(expected, rel=1e-7, abs=3e-11) and expected["delta_d"] > 1e-7
        assert bool(taken) == (smallest == 1e-6)


def test_the_smallest_movement_is_seen_on_the_real_model(real_base):
    """Of a matrix of the default model, whose singular values lie close together: 1e-11 of Delta D, where fp32 is lost."""
    W = real_base.model.get_submodule("model.layers.14.self_attn.v_proj").weight.detach().double()
    change = torch.randn(W.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W_t = W + 1e-5 * W.norm() / change.norm() * change
    expected = by_numpy(W, W_t)
    assert spectra.variation(W, W_t) == pytest.approx(expected, rel=1e-6, abs=1e-12) and 1e-10 < expected["delta_d"] < 1e-7


# ---- what trains of a principal part --------------------------------------------------------------------------------

@pytest.mark.parametrize("out, inner, r", [(30, 20, 5), (20, 30, 5), (20, 20, 20), (7, 9, 1)])
def test_kappa_needs_no_product(out, inner, r):
    """sigma_1 / sigma_r of the whole product, by numpy."""
    left, right = orthonormal(out, r, 0) * torch.linspace(-3, 1.5, r, dtype=torch.float64), orthonormal(inner, r, 1).T
    right = right + 0.3 * torch.randn(r, inner, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    s = np.linalg.svd((left @ right).numpy(), compute_uv=False)
    assert spectra.kappa(left, right) == pytest.approx(s[0] / s[r - 1], rel=1e-10) and (r == 1 or s[0] > 1.5 * s[r - 1])


@pytest.mark.parametrize("method", ["sorsa", "pissa"])
def test_kappa_of_the_layers(method):
    """At the start that of the base's leading triplets; after a move that of the layer's delta(). No other method has it."""
    base, model = toy_model(), perturb(attach(toy_model(), method))
    for name, numbers in spectra.measure(model):
        s_0, s_t = (np.linalg.svd(W.detach().double().numpy(), compute_uv=False)
                    for W in (base.get_submodule(name).weight, model.get_submodule(name).delta()))
        assert numbers["kappa_start"] == pytest.approx(s_0[0] / s_0[3], rel=1e-5)
        assert numbers["kappa"] == pytest.approx(s_t[0] / s_t[3], rel=1e-5) != pytest.approx(s_0[0] / s_0[3], rel=1e-2)
    assert all("kappa" not in numbers for _, numbers in spectra.measure(attach(toy_model(), "lora")))


def test_orthonormality_is_what_the_regularizer_adds_up():
    """The mean over U and V is R, by its definition in sorsa.py; at the start 0. The largest is one of those there are."""
    model = perturb(attach(toy_model(), "sorsa"))
    rows = [numbers for _, numbers in spectra.measure(model)]
    means = spectra.means(rows)
    assert (means["u_error"] + means["v_error"]) / 2 == pytest.approx(sorsa.regularizer(model).item(), rel=1e-5)
    assert means["u_error_start"] < 1e-6 and means["v_error_start"] < 1e-6 and means["u_error"] > 0.1
    assert means["u_error_max"] == max(row["u_error"] for row in rows) > means["u_error"] and means["v_error_max"] > means["v_error"]
    layer = adapter.adapted_layers(model)[0][1]
    for key, M in (("u_error", layer.U.T), ("v_error", layer.Vt)):  # which is which
        expected = torch.linalg.matrix_norm(M @ M.T - torch.eye(len(M))).item()
        assert rows[0][key] == pytest.approx(expected, rel=1e-5)
    assert not [key for _, row in spectra.measure(attach(toy_model(), "pissa")) for key in row if "error" in key]


# ---- models ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", MERGEABLE)
def test_nothing_has_moved_at_step_0(method, dtype):
    """To 1e-11, also where the frozen weights were rounded to bf16 after attach; what trains moves it."""
    model = attach(toy_model(), method)
    adapter.cast_frozen(model, dtype)
    still = dict(spectra.measure(model))
    assert still.keys() == {name for name, _ in adapter.adapted_layers(model)}
    moved = dict(spectra.measure(perturb(model)))
    for name, numbers in still.items():
        assert numbers["delta_sigma"] < 1e-13 and abs(numbers["delta_d"]) < 1e-11 and numbers["change"] < 1e-14
        assert all(moved[name][key] > 1e-6 for key in ("delta_sigma", "delta_d", "change"))


@pytest.mark.parametrize("method", MERGEABLE)
def test_the_matrices_are_the_base_and_the_merged_one(method):
    """Layer by layer the numbers are numpy's, of the base's own matrix and of the one that a merge leaves."""
    base, model = toy_model(), perturb(attach(toy_model(), method), 0.03)
    found = dict(spectra.measure(model))
    adapter.merge(model)
    for name, numbers in found.items():
        expected = by_numpy(*(some.get_submodule(name).weight.detach().double().numpy() for some in (base, model)))
        assert {key: numbers[key] for key in expected} == pytest.approx(expected, rel=1e-3)  # the merge rounds to fp32


@pytest.mark.parametrize("targets", [None, ["v_proj", "down_proj"]])
def test_full_fine_tuning(targets):
    """Against copies of what the base had: numpy's numbers, of the seven projections or of those that train."""
    model = toy_model()
    before = {name: W.clone() for name, W in spectra.original_matrices(model, targets).items()}
    assert {name.rpartition(".")[2] for name in before} == set(targets or adapter.TARGETS) and len(before) == (4 if targets else 14)
    perturb(attach(model, "full", targets=targets), 0.03)
    found = dict(spectra.measure(model, before))
    assert found.keys() == before.keys()
    for name, numbers in found.items():
        assert numbers == pytest.approx(by_numpy(before[name].numpy(), model.get_submodule(name).weight.detach().numpy()), rel=1e-6)


def test_what_cannot_be_measured_says_why():
    """Mo-SARA, whose one set without gates can; a fork's layers without lora_factors; a method that replaces nothing."""
    router = "each token has its own update through the router"
    assert router in spectra.unmeasurable(attach(toy_model(), "mosara"))
    assert spectra.unmeasurable(attach(toy_model(), "mosara", sets=1)) is None
    assert "full replaces no linear layer" in spectra.unmeasurable(attach(toy_model(), "full"))
    assert all(spectra.unmeasurable(attach(toy_model(), method)) is None for method in MERGEABLE)
    model = attach(toy_model(), "lora")
    adapter.replace(model, "model.layers.1.mlp.up_proj", adapter.AdaptedLinear(nn.Linear(32, 48)))
    assert "lora has no lora_factors() at model.layers.1.mlp.up_proj" in spectra.unmeasurable(model)


def test_a_matrix_that_is_not_finite_is_named():
    """One line in place of an SVD that does not end."""
    model = attach(toy_model(), "lora")
    model.model.layers[1].mlp.up_proj.B.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="^model.layers.1.mlp.up_proj is not finite any more, .* lower --lr$"):
        list(spectra.measure(model))


@pytest.mark.parametrize("method", ["sorsa", "lora", "full"])
def test_a_matrix_of_zeros_is_left_out(method):
    """As added blocks begin: it has no directions, and no ratio to its size. Where all are, that is said."""
    model = toy_model()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    originals = {name: W.clone() for name, W in spectra.original_matrices(model).items()} if method == "full" else None
    found = dict(spectra.measure(perturb(attach(model, method)), originals))
    assert len(found) == 13 and "model.layers.1.mlp.down_proj" not in found
    assert all(math.isfinite(number) for number in spectra.means([*found.values()]).values())
    with pytest.raises(ValueError, match="are zero: there are no singular vectors"):
        spectra.means([])


class Alive(TorchDispatchMode):
    """How many bytes of fp64 are alive at most, of all that operators have made."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0  # {address of a storage: bytes}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.live:
                    self.live[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage.data_ptr())
        self.most = max(self.most, sum(self.live.values()))
        return result


@pytest.mark.parametrize("method", ["sorsa", "full"])
def test_one_matrix_at_a_time(method):
    """Six layers take the memory of two, that of a few matrices: W_0, W_t, and the vectors of both."""
    most = []
    for layers in (2, 6):
        model = toy_model(num_hidden_layers=layers)
        before = {name: W.clone() for name, W in spectra.original_matrices(model).items()} if method == "full" else None
        perturb(attach(model, method), 0.03)
        gc.collect()
        with Alive() as alive:
            numbers = list(spectra.measure(model, before))
        assert len(numbers) == 7 * layers
        most.append(alive.most)
    largest = 8 * 48 * 32
    assert most[0] == most[1] and 4 * largest < most[0] < 12 * largest


# ---- train.py --spectra-every ---------------------------------------------------------------------------------------

def lines(out, spectra_too):
    """The lines of a run's log with, or without, spectra."""
    return [line for line in trace(out) if ("spectra" in line) == spectra_too]


def assert_spectra(out, expected):
    """A run's spectra are those of another run: to what W_0 owes to fp32."""
    found = lines(out, True)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected):
        assert line["spectra"] == pytest.approx(other["spectra"], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("method, more", [
    ("lotr", ()), ("pissa", ()), ("sorsa", ("--dtype", "bfloat16")), ("full", ("--targets", "q_proj,up_proj"))],
    ids=["lotr", "pissa", "sorsa", "full"])
def test_looking_changes_nothing(method, more, place, tmp_path, capsys):
    """To the last bit, neither in a whole run nor in one that is stopped and goes on, which has the same spectra too: for full
    fine-tuning W_0 is then the base's, not what the checkpoint holds. Steps 0, 4 and the last."""
    flags = place.flags(method, *more)
    begin(flags, tmp_path / "plain")
    begin([*flags, "--spectra-every", "4"], tmp_path / "whole")
    printed = capsys.readouterr().out
    with stopping(2), pytest.raises(Stopped):
        begin([*flags, "--spectra-every", "4"], tmp_path / "parts")
    go_on(tmp_path / "parts")
    expected, adapters = lines(tmp_path / "whole", True), [(tmp_path / name / "adapter.safetensors").read_bytes()
                                                           for name in ("plain", "whole", "parts")]
    assert [line["step"] for line in expected] == [0, 4, 6] and printed.count("spectra after ") == 3
    assert_spectra(tmp_path / "parts", expected)
    assert adapters[0] == adapters[1] == adapters[2]
    for name in ("whole", "parts"):
        assert lines(tmp_path / name, False) == trace(tmp_path / "plain")
    start, middle, _ = (line["spectra"] for line in expected)
    assert start["delta_sigma"] < 1e-12 and abs(start["delta_d"]) < 1e-11 and min(middle["delta_sigma"], middle["delta_d"]) > 1e-7
    assert ("kappa" in start) == (method in ("sorsa", "pissa")) and ("u_error_max" in start) == (method == "sorsa")


@pytest.mark.parametrize("method", ["sorsa", "full"])
def test_a_run_that_goes_on_may_begin_to_look(method, place, tmp_path):
    """The flag is free: the spectra of the steps that are left are those of a run that looked from its start."""
    flags = place.flags(method)
    begin([*flags, "--spectra-every", "3"], tmp_path / "whole")
    with stopping(2), pytest.raises(Stopped):
        begin(flags, tmp_path / "parts")
    go_on(tmp_path / "parts", "--spectra-every", "3")
    assert_spectra(tmp_path / "parts", lines(tmp_path / "whole", True)[1:])


def test_a_step_is_logged_where_it_is_looked_at(place, tmp_path, capsys):
    """Also where no other line is due; the line says all that is measured."""
    begin([*place.flags("sorsa"), "--spectra-every", "5", "--log-every", "6"], tmp_path / "run")
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [2, 3, 4, 5, 6]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("spectra after 5 steps: ")][0]
    numbers = next(line["spectra"] for line in logged if line["step"] == 5 and "spectra" in line)
    for part in (f"dSigma {numbers['delta_sigma']:.2e}", f"dD {numbers['delta_d']:.2e}", f"kappa {numbers['kappa_start']:.6g} -> ",
                 f"|UtU-I| {numbers['u_error']:.1e} (most {numbers['u_error_max']:.1e})"):
        assert part in said
