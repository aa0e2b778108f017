"""What a step costs, and how a run is described."""
import pytest

import adapter
import model as decoder
from support import report
from tests.toy import attach, toy_model

EXAMPLES = [([0] * 10, 4), ([0] * 6, 4)]  # 16 tokens, half of them answer


def products(model):
    """Weights of all linears of the blocks; of q, k and v of the first block."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if "proj" in name}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if any(f"layers.0.self_attn.{x}_proj" in name for x in "qkv"))


@pytest.fixture
def without_products_of_attention(monkeypatch):
    """Which torch counts on some versions, and not on others."""
    monkeypatch.setattr(decoder, "attention", lambda q, k, v, seen=None: q * k.sum() * v.sum())


def test_the_cost_of_lora_by_hand(without_products_of_attention):
    """Per token and weight 2 forward and 2 for the gradient of its input, which q, k and v of the first block do not need;
    for a factor 2 more, for its own. The head works at half of the tokens."""
    model = toy_model()
    body, first = products(model)
    attach(model, "lora")  # rank 4
    factors = sum(p.numel() for p in adapter.trainable(model).values())
    first_A = 3 * 4 * 32
    head = 97 * 32 / 2
    forward, training = (1e9 * gflop for gflop in report.gflop_per_token(model, EXAMPLES))
    assert forward == pytest.approx(2 * body + 2 * factors + 2 * head)
    assert training == pytest.approx(4 * body - 2 * first + 6 * factors - 2 * first_A + 4 * head)


def test_the_cost_of_full_fine_tuning_by_hand(without_products_of_attention):
    """6 per token and weight, all of which train, and need the gradient of their input for the embedding."""
    model = toy_model()
    body, _ = products(model)
    attach(model, "full")
    forward, training = (1e9 * gflop for gflop in report.gflop_per_token(model, EXAMPLES))
    assert forward == pytest.approx(2 * (body + 97 * 32 / 2)) and training == pytest.approx(6 * (body + 97 * 32 / 2))


def test_counting_leaves_nothing_behind():
    """No gradients, recomputing as it was, and not counted; a model whose head alone trains has a cost too."""
    model = attach(toy_model(tie_word_embeddings=False), "lora")
    plain = report.gflop_per_token(model, EXAMPLES)
    model.model.recompute = True
    assert report.gflop_per_token(model, EXAMPLES) == plain and model.model.recompute
    assert all(p.grad is None for p in model.parameters())
    head = attach(toy_model(tie_word_embeddings=False), "lora", targets=["lm_head"])
    forward, training = report.gflop_per_token(head, EXAMPLES)
    assert 0 < forward < training


def test_the_parameter_table_has_a_line_per_kind_of_module():
    """Equal modules of all blocks are one line; shapes that differ by block are ranges."""
    lines = report.parameter_table(attach(toy_model(), "lora"))
    assert len(lines) == 1 + 7 + 1
    assert [line.split() for line in lines if line.startswith("mlp.down_proj")] == [
        ["mlp.down_proj", "A", "[4,", "48]", "B", "[32,", "4]", "2", f"{2 * 4 * (48 + 32)}"]]
    assert report.shape_range([[2, 64], [9, 64]]) == "[2-9, 64]"
