"""The loss on answer tokens against plain cross entropy."""
import pytest
import torch
import torch.nn.functional as F

import adapter
from data import batching
from support import fast, loss
from tests.toy import attach, perturb, toy_examples, toy_model


@pytest.fixture(params=["plain", "fast"], autouse=True)
def form(request, monkeypatch):
    """Each property holds for the plain loss and for the one in chunks."""
    if request.param == "fast":
        monkeypatch.setattr(fast, "CHUNK", 8)
        fast.switch_on(["head"])


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_mean_loss_is_that_of_every_answer_token(batch):
    """Summed over each row alone by the definition: padding and the batch a row is in do not matter."""
    model, encoded, total = attach(toy_model(), "lora"), toy_examples(8), 0.0
    for ids, prompt_length in encoded:
        losses = F.cross_entropy(model(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]), reduction="none")
        total += losses[prompt_length - 1:].sum().item()
    assert loss.mean_loss(model, encoded, batch, "cpu") == pytest.approx(total / batching.answer_tokens(encoded), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_losses_of_examples_are_those_of_each_alone(batch):
    """In the order that they are given in, whatever batch they are in; and nothing of them is kept for a gradient."""
    model, encoded = perturb(attach(toy_model(), "lora")), toy_examples(8)
    expected = [loss.answer_loss(model, *batching.collate([example], "cpu")).item() for example in encoded]
    found = loss.example_losses(model, encoded, batch, "cpu", multiple=4)
    assert found == pytest.approx(expected, rel=1e-5) and len({len(ids) for ids, _ in encoded}) > 1


@pytest.mark.parametrize("method, targets, changes", [
    ("full", None, {}), ("lora", adapter.TARGETS, {}), ("lora", ["lm_head"], {"tie_word_embeddings": False})])
def test_gradients_are_those_of_plain_cross_entropy(method, targets, changes):
    """With a trained head, tied to the embedding; with a frozen one; with an adapted one, whose factors train."""
    model = perturb(attach(toy_model(**changes), method, targets=targets))
    tokens, targets = batching.collate(toy_examples(5), "cpu")
    trained = list(adapter.trainable(model).values())
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    found = loss.answer_loss(model, tokens, targets)
    assert torch.allclose(found, expected, rtol=1e-5)
    for ours, plain in zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained)):
        assert plain.any() and torch.allclose(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [None, "lora", "mosara"])
def test_a_frozen_head_counts_with_all_that_it_adds(method):
    """A bias, and an adapter that is measured and not merged, are parts of it: it is not its weight alone."""
    model = toy_model(tie_word_embeddings=False)
    if method:
        perturb(attach(model, method, targets=["lm_head"]))
    else:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features))
    model.requires_grad_(False)
    tokens, targets = batching.collate(toy_examples(5), "cpu")
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    by_weight = F.cross_entropy(F.linear(model.model(tokens), model.lm_head.weight).flatten(0, 1), targets.flatten(), reduction="sum")
    assert torch.allclose(loss.answer_loss(model, tokens, targets), expected, rtol=1e-6) and abs(by_weight - expected) > 0.01


def test_nothing_flows_below_the_first_adapted_layer():
    """With LoRA in the last block only, what the first block computes takes no part in the backward pass."""
    model, seen = toy_model().requires_grad_(False), []
    attach(model.model.layers[1], "lora")
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    loss.answer_loss(model, *batching.collate(toy_examples(3), "cpu")).backward()
    assert seen == [False] and all(p.grad is not None for p in adapter.trainable(model.model.layers[1]).values())
