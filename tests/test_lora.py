"""LoRA: its start, its first steps, and agreement with peft."""
import pytest
import torch

import adapter
from tests.toy import attach, perturb, tokens, toy_model


def backward(model):
    logits = model(tokens())
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    return logits.detach()


def test_start():
    """|A| <= 1/sqrt(in) and fills that range, B is zero, A is the same for the same seed and another for another."""
    layers, same, other = ([layer for _, layer in adapter.adapted_layers(attach(toy_model(), "lora", seed=seed))] for seed in (0, 0, 1))
    for layer in layers:
        bound = layer.in_features ** -0.5
        assert 0.8 * bound < layer.A.abs().max() <= bound and not layer.B.any()
    assert torch.equal(layers[0].A, same[0].A) and not torch.equal(layers[0].A, other[0].A)
    assert not torch.equal(layers[0].A, layers[1].A)


def test_first_step_moves_b_only():
    """At B = 0 the gradient of A is exactly zero; after one step of B both have one."""
    model = attach(toy_model(), "lora")
    for first in (True, False):
        backward(model)
        for _, layer in adapter.adapted_layers(model):
            assert layer.A.grad.any() != first and layer.B.grad.any()
            layer.B.data -= 0.1 * layer.B.grad
        model.zero_grad()


def test_alpha_scales_delta():
    """alpha = 2r doubles delta(), and forward follows."""
    single, double = perturb(attach(toy_model(), "lora")), perturb(attach(toy_model(), "lora", alpha=8))
    for (_, a), (_, b) in zip(adapter.adapted_layers(single), adapter.adapted_layers(double)):
        assert torch.allclose(2 * a.delta(), b.delta())
        x = torch.randn(3, a.in_features)
        assert torch.allclose(2 * (a(x) - a.base(x)), b(x) - b.base(x), atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_agrees_with_peft(method):
    """The same factors in peft's LoRA on transformers' Llama: the same logits, the same gradients of A and B."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    ours = attach(toy_model(), method)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
                                      max_position_embeddings=256)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(toy_model().state_dict())
    start = {"lora": True, "pissa": "pissa"}[method]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(adapter.TARGETS), init_lora_weights=start))
    if method == "lora":
        perturb(ours)
    with torch.no_grad():
        for name, layer in adapter.adapted_layers(ours):
            module = theirs.base_model.model.get_submodule(name)
            if method == "pissa":  # peft computed its own start: the same product and the same residual
                product = module.lora_B["default"].weight @ module.lora_A["default"].weight
                assert (product - layer.delta()).abs().max() < 1e-4  # theirs is an fp32 SVD
                assert (module.base_layer.weight - layer.weight).abs().max() < 1e-4
            module.lora_A["default"].weight.copy_(layer.A)
            module.lora_B["default"].weight.copy_(layer.B)
    class Logits(torch.nn.Module):
        def forward(self, ids):
            return theirs(ids).logits
    assert (backward(ours) - backward(Logits())).abs().max() < 1e-4
    for name, layer in adapter.adapted_layers(ours):
        module = theirs.base_model.model.get_submodule(name)
        for mine, peer in ((layer.A.grad, module.lora_A["default"].weight.grad), (layer.B.grad, module.lora_B["default"].weight.grad)):
            assert (mine - peer).abs().max() < 1e-4 * max(1, peer.abs().max()), name
