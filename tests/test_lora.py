"""LoRA: its start, its first steps, and agreement with peft."""
import pytest
import torch

import adapter
from tests.toy import Logits, attach, loss_of, perturb, tokens, toy_model, train_steps, transformers_llama


def test_start():
    """|A| <= 1/sqrt(in) and fills that range, B is zero, A is the same for the same seed and another for another."""
    layers, same, other = ([layer for _, layer in adapter.adapted_layers(attach(toy_model(), "lora", seed=seed))] for seed in (0, 0, 1))
    for layer in layers:
        bound = layer.in_features ** -0.5
        assert 0.8 * bound < layer.A.abs().max() <= bound and not layer.B.any() and layer.scale == 1
    assert torch.equal(layers[0].A, same[0].A) and not torch.equal(layers[0].A, other[0].A)
    assert not torch.equal(layers[0].A, layers[1].A)


def test_first_step_moves_b_only():
    """At B = 0 the gradient of A is exactly zero; after one step of B both have one."""
    model = attach(toy_model(), "lora")
    for first in (True, False):
        loss_of(model).backward()
        for _, layer in adapter.adapted_layers(model):
            assert layer.A.grad.any() != first and layer.B.grad.any()
        model.zero_grad()
        train_steps(model, 1)
        model.zero_grad()


@pytest.mark.peers
@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_agrees_with_peft(method):
    """The same factors in peft's LoRA on transformers' Llama: the same logits, the same gradients of A and B."""
    peft = pytest.importorskip("peft")
    ours, theirs = attach(toy_model(), method), transformers_llama().model
    theirs.load_state_dict(toy_model().state_dict())
    start = {"lora": True, "pissa": "pissa"}[method]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(adapter.TARGETS), init_lora_weights=start))
    if method == "lora":
        perturb(ours)
    pairs = [(layer, theirs.base_model.model.get_submodule(name)) for name, layer in adapter.adapted_layers(ours)]
    with torch.no_grad():
        for layer, module in pairs:
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            if method == "pissa":  # peft computed its own start, by an fp32 SVD: the same product and the same residual
                assert (B @ A - layer.delta()).abs().max() < 1e-4
                assert (module.base_layer.weight - layer.weight).abs().max() < 1e-4
            A.copy_(layer.A)
            B.copy_(layer.B)
    theirs = Logits(theirs)
    assert (ours(tokens()) - theirs(tokens())).abs().max() < 1e-4
    loss_of(ours).backward()
    loss_of(theirs).backward()
    for layer, module in pairs:
        for mine, peer in ((layer.A.grad, module.lora_A["default"].weight.grad), (layer.B.grad, module.lora_B["default"].weight.grad)):
            assert (mine - peer).abs().max() < 1e-4 * max(1, peer.abs().max())
