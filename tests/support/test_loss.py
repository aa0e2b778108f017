"""The loss on answer tokens against plain cross entropy."""
import pytest
import torch
import torch.nn.functional as F

import adapter
from data import batching
from support import fast, loss
from tests.toy import attach, perturb, toy_examples, toy_model

@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
def test_gradient_in_forward_equals_plain_cross_entropy(count, monkeypatch):
    """The frozen-head loss and its gradient equal F.cross_entropy's, whatever the chunks, and under a factor."""
    monkeypatch.setattr(loss, "CHUNK", 8)
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(count, 16, requires_grad=True), torch.randn(50, 16), torch.randint(0, 50, (count,))
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    gradient, = torch.autograd.grad(0.3 * expected, hidden)
    value = fast.FrozenHeadLoss.apply(hidden, head, targets)
    (0.3 * value).backward()
    assert torch.allclose(value, expected, rtol=1e-6) and torch.allclose(hidden.grad, gradient, atol=1e-6)


def test_loss_is_over_answers_only_and_blind_to_padding():
    """A batch's loss is the sum over its rows alone, each by the definition: next-token loss of the answer's tokens."""
    model, batch = attach(toy_model(), "lora"), toy_examples(5)
    expected = 0.0
    for ids, prompt_length in batch:
        logits = model(torch.tensor([ids]))[0, :-1]
        expected += F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")[prompt_length - 1:].sum()
    assert torch.allclose(loss.answer_loss(model, *batching.collate(batch, "cpu")), expected, rtol=1e-5)


def test_trained_head_gets_the_plain_loss():
    """With full fine-tuning the tied head's gradient is autograd's, both of its uses included."""
    model, batch = attach(toy_model(), "full"), toy_examples(5)
    inputs, targets = batching.collate(batch, "cpu")
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    gradient, = torch.autograd.grad(expected, model.lm_head.weight)
    value = loss.answer_loss(model, inputs, targets)
    value.backward()
    assert torch.allclose(value, expected, rtol=1e-6) and torch.allclose(model.lm_head.weight.grad, gradient, atol=1e-4)


def test_nothing_flows_below_the_first_adapted_layer():
    """With LoRA on the last projection only, what the first block computes takes no part in the backward pass."""
    model, seen = toy_model(), []
    model.model.layers = model.model.layers[:1] + torch.nn.ModuleList([RenamedBlock(model.model.layers[1])])
    attach(model, "lora", targets=["last_down"])
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    loss.answer_loss(model, *batching.collate(toy_examples(3), "cpu")).backward()
    assert seen == [False] and all(p.grad is not None for p in adapter.trainable(model).values())


class RenamedBlock(torch.nn.Module):
    """A block whose down projection has a name of its own, to be a target alone."""

    def __init__(self, block):
        super().__init__()
        self.block, self.last_down = block, block.mlp.down_proj
        del block.mlp.down_proj
        block.mlp.down_proj = lambda x: self.last_down(x)

    def forward(self, *inputs):
        return self.block(*inputs)


def test_an_adapted_head_trains():
    """With LoRA on an untied head the plain path is taken and its factors get gradients."""
    model = attach(toy_model(tie_word_embeddings=False), "lora", targets=["lm_head"])
    perturb(model)
    inputs, targets = batching.collate(toy_examples(3), "cpu")
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    value = loss.answer_loss(model, inputs, targets)
    value.backward()
    assert torch.allclose(value, expected, rtol=1e-5) and model.lm_head.A.grad.any() and model.lm_head.B.grad.any()
