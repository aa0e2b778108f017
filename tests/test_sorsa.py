"""SORSA: the split, and the orthonormal regularizer against autograd, finite differences and hand values."""
import pytest
import torch
import torch.nn as nn

import adapter
import sorsa
from tests.toy import attach, perturb, snapshot, tokens, toy_model


def reference_regularizer(model, reduction):
    """The definition, matrix by matrix, in fp64."""
    norms = []
    for _, layer in adapter.adapted_layers(model):
        for M in (layer.U.double().T, layer.Vt.double()):
            norms.append((M @ M.T - torch.eye(len(M), dtype=torch.float64)).norm())
    return sum(norms) / (len(norms) if reduction == "mean" else 1)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def square_host():
    """A linear whose U is square at full rank: rows and columns of its gradient are easily confused there."""
    torch.manual_seed(0)
    return attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12)), "sorsa", rank=8, targets=["0", "1"])


def test_principal_part_and_its_transpose():
    """delta() is the principal part (tail of the spectrum left over), and W^T gives the same triplets with U and V exchanged."""
    torch.manual_seed(0)
    W = torch.randn(12, 20)
    hosts = [nn.Sequential(nn.Linear(20, 12, bias=False)), nn.Sequential(nn.Linear(12, 20, bias=False))]
    for host, weight in zip(hosts, (W, W.T)):
        host[0].weight.data = weight.clone()
        attach(host, "sorsa", targets=["0"])
        tail = torch.linalg.svdvals(W.double())[4:].norm()
        assert abs((weight - host[0].delta()).norm() - tail) < 1e-5
    first, second = hosts[0][0], hosts[1][0]
    assert torch.allclose(first.S, second.S, atol=1e-5)
    assert torch.allclose((first.U.T @ second.Vt.T).abs(), torch.eye(4), atol=1e-4)


@pytest.mark.parametrize("svd", ["gram", "exact"])
@pytest.mark.parametrize("out, inner", [(24, 24), (40, 24), (24, 40)])
def test_start_and_forward_against_float64(out, inner, svd):
    """The split and, once the factors have moved, the forward pass equal the same equations computed in fp64."""
    torch.manual_seed(0)
    host, x = nn.Sequential(nn.Linear(inner, out)), torch.randn(7, inner)
    W, b = host[0].weight.detach().double(), host[0].bias.detach().double()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    W_p = (U[:, :6] * S[:6]) @ Vt[:6]
    layer = attach(host, "sorsa", rank=6, targets=["0"], svd=svd)[0]
    assert (layer.delta() - W_p).abs().max() < 1e-5 and (layer.weight - (W - W_p)).abs().max() < 1e-5
    assert (layer.S - S[:6]).abs().max() < 1e-5
    perturb(host)
    moved = W - W_p + (layer.U.double() * layer.S.double()) @ layer.Vt.double()
    assert (host(x) - (x.double() @ moved.T + b)).abs().max() < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("build", [lambda: perturb(attach(toy_model(), "sorsa")), lambda: perturb(square_host())])
def test_regularizer_closed_form_autograd_and_definition_agree(build, reduction):
    """R and its gradient: stacked closed form = stacked autograd = fp64 autograd of the definition; S gets none."""
    model = build()
    R = sorsa.regularizer(model, reduction)
    expected = reference_regularizer(model, reduction)
    assert R.dtype == torch.float32 and abs(R - expected) < 1e-5 * expected
    reference = torch.autograd.grad(3 * expected, [p for n, p in model.named_parameters() if n.endswith(("U", "Vt"))])
    (3 * R).backward()
    by_autograd = gradients(model)
    model.zero_grad()
    closed = sorsa.add_regularizer_grad(model, 3.0, reduction)
    by_hand = gradients(model)
    assert torch.allclose(closed, R.detach(), rtol=1e-6) and by_hand.keys() == by_autograd.keys()
    assert not any(name.endswith(".S") for name in by_hand)
    for (name, gradient), exact in zip(by_hand.items(), reference):
        assert torch.allclose(gradient, by_autograd[name], atol=1e-6) and torch.allclose(gradient, exact.float(), atol=1e-6), name


def test_regularizer_gradient_against_finite_differences():
    """The gradient predicts the change of R along a random direction, to the accuracy of central differences in fp64."""
    model = perturb(square_host())
    sorsa.add_regularizer_grad(model, 1.0)
    for _, layer in adapter.adapted_layers(model):
        for name in ("U", "Vt"):
            parameter = getattr(layer, name)
            start, direction, h = parameter.data.double(), torch.randn_like(parameter).double(), 1e-5
            values = []
            for sign in (1, -1):
                setattr(layer, name, nn.Parameter((start + sign * h * direction)))
                values.append(reference_regularizer(model, "mean").item())
            setattr(layer, name, parameter)
            assert abs((values[0] - values[1]) / (2 * h) - (parameter.grad.double() * direction).sum()) < 1e-5


def test_hand_value_and_ratio_of_reductions():
    """Doubling one row of an orthonormal M makes its norm 3; the sum is 2L times the mean."""
    model = attach(toy_model(), "sorsa")
    for _, layer in adapter.adapted_layers(model):
        for factor in (layer.U.data.T, layer.Vt.data):
            factor.copy_(torch.eye(4, factor.shape[1]))
    assert sorsa.regularizer(model) == 0
    adapter.adapted_layers(model)[0][1].Vt.data[2] *= 2  # (M M^T - I) has one entry, 4 - 1
    assert abs(sorsa.regularizer(model, "sum") - 3) < 1e-6 and abs(sorsa.regularizer(model, "mean") - 3 / 28) < 1e-6


def test_exactly_orthonormal_factors_get_zero_gradient():
    """At E = 0, where the norm has no derivative, both forms give exactly zero, not nan."""
    model = attach(toy_model(), "sorsa")
    for _, layer in adapter.adapted_layers(model):
        for factor in (layer.U.data.T, layer.Vt.data):
            factor.copy_(torch.eye(4, factor.shape[1]))
    sorsa.regularizer(model).backward()
    assert all(not g.any() for g in gradients(model).values())
    model.zero_grad()
    assert sorsa.add_regularizer_grad(model, 1.0) == 0
    assert len(gradients(model)) == 28 and all(not g.any() for g in gradients(model).values())


def test_regularizer_is_fp32_on_any_model_and_under_autocast():
    """A bf16 base or a caller's autocast changes nothing in R; a matmul precision that was set is still set afterwards."""
    model = perturb(attach(toy_model(), "sorsa"))
    expected = sorsa.regularizer(model)
    half = toy_model().bfloat16()
    attach(half, "sorsa")
    half.load_state_dict({name: t for name, t in model.state_dict().items()}, strict=True)
    assert torch.equal(sorsa.regularizer(half), expected)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sorsa.regularizer(model), expected)
            assert torch.allclose(sorsa.add_regularizer_grad(model, 1.0), expected.detach(), rtol=1e-6)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_one_sgd_step_is_the_two_rate_form():
    """Under SGD: W_p moves by -lr grad L - gamma_t grad R with gamma_t = gamma lr_t / peak_lr."""
    gamma, peak, lr = 4e-4, 1e-2, 5e-3
    model = perturb(attach(toy_model(), "sorsa"))
    before = snapshot(model)
    model(tokens()).square().mean().backward()
    loss_gradient = gradients(model)
    sorsa.add_regularizer_grad(model, gamma / peak)
    torch.optim.SGD(adapter.trainable(model).values(), lr=lr).step()
    moved = snapshot(model)
    model.load_state_dict(before)
    model.zero_grad()
    sorsa.regularizer(model).backward()
    for name, parameter in adapter.trainable(model).items():
        pull = 0 if parameter.grad is None else gamma * lr / peak * parameter.grad
        assert torch.allclose(moved[name], before[name] - lr * loss_gradient[name] - pull, atol=1e-7), name


def test_a_model_without_sorsa_layers_is_refused():
    """There is nothing to regularize on a base model."""
    with pytest.raises(ValueError, match="no SORSA layers"):
        sorsa.add_regularizer_grad(toy_model(), 1.0)


def test_unknown_reduction_is_refused():
    """Only mean and sum exist."""
    with pytest.raises(ValueError, match="unknown reduction 'max': choose mean or sum"):
        sorsa.regularizer(attach(toy_model(), "sorsa"), "max")
