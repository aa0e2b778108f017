"""PiSSA: the principal part of the weight, split evenly over two factors."""
import torch

import adapter
from tests.toy import attach, toy_model


def test_delta_is_the_best_rank_r_approximation():
    """||W - delta()||_F^2 is the sum of the squared remaining singular values: no rank-r matrix comes closer."""
    plain = toy_model()
    for name, layer in adapter.adapted_layers(attach(toy_model(), "pissa")):
        W = plain.get_submodule(name).weight.double()
        tail = torch.linalg.svdvals(W)[4:].square().sum()
        assert ((W - layer.delta().double()).square().sum() - tail).abs() < 1e-5 * tail


def test_singular_values_are_split_evenly():
    """A A^T and B^T B both equal diag(S)."""
    plain = toy_model()
    for name, layer in adapter.adapted_layers(attach(toy_model(), "pissa")):
        S = torch.linalg.svdvals(plain.get_submodule(name).weight.double())[:4].float().diag()
        assert (layer.A @ layer.A.T - S).abs().max() < 1e-5 and (layer.B.T @ layer.B - S).abs().max() < 1e-5


def test_same_split_as_sorsa():
    """At step 0 PiSSA and SORSA hold the same residual and the same delta()."""
    layers = zip(adapter.adapted_layers(attach(toy_model(), "pissa")), adapter.adapted_layers(attach(toy_model(), "sorsa")))
    for (_, pissa), (_, sorsa) in layers:
        assert (pissa.weight - sorsa.weight).abs().max() < 1e-6 and (pissa.delta() - sorsa.delta()).abs().max() < 1e-6
