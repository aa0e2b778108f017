"""SORSA: the split, and the orthonormal regularizer against autograd, finite differences and hand values."""
import pytest
import torch
import torch.nn as nn

import adapter
import sorsa
from tests.toy import attach, loss_of, perturb, snapshot, toy_model


def gradients(model):
    """{name: gradient}, and the model as if there had been no backward pass."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def square_host():
    """A linear whose U is square at full rank: rows and columns of its gradient are easily confused there."""
    torch.manual_seed(0)
    return attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12)), "sorsa", rank=8, targets=["0", "1"])


def orthonormal_model():
    """A toy model whose U and V are exactly orthonormal: columns and rows of the identity."""
    model = attach(toy_model(), "sorsa")
    for _, layer in adapter.adapted_layers(model):
        for factor in (layer.U.data.T, layer.Vt.data):
            factor.copy_(torch.eye(4, factor.shape[1]))
    return model


MODELS = pytest.mark.parametrize("build", [lambda: attach(toy_model(), "sorsa"), square_host], ids=["toy", "square"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])


# ---- the split ------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("svd, out, inner", [("gram", 40, 24), ("gram", 24, 40), ("exact", 24, 24)])
def test_start_and_forward_against_float64(svd, out, inner):
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


# ---- the regularizer ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@REDUCTIONS
@MODELS
def test_closed_form_equals_autograd_of_the_definition(build, reduction, dtype, rounding):
    """add_regularizer_grad adds what autograd finds by `regularizer`, times the coefficient, and returns the same R; S gets none."""
    model = perturb(build()).to(dtype)
    R = sorsa.regularizer(model, reduction)
    (3 * R).backward()
    by_autograd = gradients(model)
    closed = sorsa.add_regularizer_grad(model, 3.0, reduction)
    by_hand = gradients(model)
    assert R.dtype == closed.dtype == dtype and abs(closed - R) < rounding * R
    assert by_hand.keys() == by_autograd.keys() == {name for name in adapter.trainable(model) if name.endswith(("U", "Vt"))}
    for name, gradient in by_hand.items():
        assert (gradient - by_autograd[name]).abs().max() < rounding * max(1, gradient.abs().max()), name
        assert gradient.stride() == model.get_parameter(name).stride()  # AdamW(fused=True) steps wrongly with another
    for times in (1, 2):  # what is there already stays: a second call adds as much again
        sorsa.add_regularizer_grad(model, 3.0, reduction)
        assert all(torch.allclose(model.get_parameter(name).grad, times * gradient) for name, gradient in by_hand.items())


@REDUCTIONS
@MODELS
def test_definition_against_finite_differences(build, reduction):
    """The gradient predicts the change of R along a random direction, to the accuracy of central differences in fp64."""
    model, h = perturb(build()).double(), 1e-6
    sorsa.add_regularizer_grad(model, 1.0, reduction)
    generator = torch.Generator().manual_seed(0)
    for name, gradient in gradients(model).items():
        factor = model.get_parameter(name).data
        direction = torch.randn(factor.shape, generator=generator).double()
        values = []
        for step in (h, -2 * h, h):  # up, down, and back to where it was
            factor += step * direction
            values.append(sorsa.regularizer(model, reduction).item())
        assert abs((values[0] - values[1]) / (2 * h) - (gradient * direction).sum()) < 1e-7, name


@pytest.mark.parametrize("R", [sorsa.regularizer, lambda model, *reduction: sorsa.add_regularizer_grad(model, 1.0, *reduction)],
                         ids=["definition", "closed form"])
def test_hand_value_and_ratio_of_reductions(R):
    """Doubling one row of an orthonormal M makes its norm 3; the sum is 2L times the mean, which is the default."""
    model = orthonormal_model()
    assert R(model) == 0
    adapter.adapted_layers(model)[0][1].Vt.data[2] *= 2  # (M M^T - I) has one entry, 4 - 1
    assert abs(R(model, "sum") - 3) < 1e-6 and abs(R(model, "mean") - 3 / 28) < 1e-6 and R(model) == R(model, "mean")


def test_exactly_orthonormal_factors_get_zero_gradient():
    """At E = 0, where the norm has no derivative, both forms give exactly zero, not nan."""
    model = orthonormal_model()
    sorsa.regularizer(model).backward()
    by_autograd = gradients(model)
    assert sorsa.add_regularizer_grad(model, 1.0) == 0
    by_hand = gradients(model)
    assert len(by_hand) == 28 and not any(gradient.any() for gradient in [*by_hand.values(), *by_autograd.values()])


def test_regularizer_is_fp32_on_any_model_and_under_autocast():
    """A bf16 base or a caller's autocast changes nothing in R; a matmul precision that was set is still set afterwards."""
    model = perturb(attach(toy_model(), "sorsa"))
    expected = sorsa.regularizer(model)
    half = attach(toy_model().bfloat16(), "sorsa")
    half.load_state_dict(model.state_dict())
    assert torch.equal(sorsa.regularizer(half), expected) and expected.dtype == torch.float32
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
    sorsa.regularizer(model).backward()
    pull, before = gradients(model), snapshot(model)
    loss_of(model).backward()
    loss_gradient = {name: p.grad.clone() for name, p in adapter.trainable(model).items()}
    sorsa.regularize(model, peak, gamma)
    torch.optim.SGD(adapter.trainable(model).values(), lr=lr).step()
    for name, parameter in adapter.trainable(model).items():
        step = lr * loss_gradient[name] + gamma * lr / peak * pull.get(name, 0)
        assert torch.allclose(parameter, before[name] - step, atol=1e-7), name


def test_gamma_zero_leaves_the_gradients_alone():
    """There is then no R to log; the default gamma of 4e-4 is a coefficient of gamma / peak_lr."""
    model = perturb(attach(toy_model(), "sorsa"))
    assert sorsa.regularize(model, 1e-4, gamma=0.0) is None and not gradients(model)
    assert torch.allclose(sorsa.regularize(model, 1e-4), sorsa.regularizer(model).detach())
    found = gradients(model)
    sorsa.add_regularizer_grad(model, 4.0)
    assert all(torch.allclose(gradient, found[name]) for name, gradient in gradients(model).items())


@pytest.mark.parametrize("R", [sorsa.regularizer, lambda model, *reduction: sorsa.add_regularizer_grad(model, 1.0, *reduction)],
                         ids=["definition", "closed form"])
def test_what_cannot_be_regularized_is_refused(R):
    """A model without SORSA layers, and a reduction other than mean and sum."""
    for model in (toy_model(), attach(toy_model(), "pissa")):
        with pytest.raises(ValueError, match="no SORSA layers"):
            R(model)
    with pytest.raises(ValueError, match="unknown reduction 'max': choose mean or sum"):
        R(attach(toy_model(), "sorsa"), "max")
