"""What a step costs, and how a run is described."""
import pytest

import adapter
from support import report
from tests.toy import attach, toy_model

EXAMPLES = [([0] * 10, 4), ([0] * 6, 4)]  # 16 tokens, half of them answer


def products(model):
    """Weights of all linears of the blocks; of q, k and v of the first block."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if "proj" in name}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if any(f"layers.0.self_attn.{x}_proj" in name for x in "qkv"))


def test_the_cost_of_lora_by_hand():
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


def test_the_cost_of_full_fine_tuning_by_hand():
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


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (75, "1m15s"), (7260, "2h01m")])
def test_durations(seconds, text):
    """As a person would say them."""
    assert report.duration(seconds) == text


def test_a_log_line_shows_what_is_new():
    """Numbers that have no place of their own come with their names."""
    line = {"step": 3, "loss": 1.5, "lr": 1e-3, "grad_norm": 0.25, "tokens_per_second": 1234.0, "padding": 0.125, "gflops": 9.0,
            "memory_gb": 0.5, "largest": 0.75}
    assert report.log_line(line, 10, 75) == ("step  3/10  loss 1.5000  lr 1.0e-03  |g| 0.25  largest 0.75  1,234 tok/s  pad 12%  9 GFLOP/s  "
                                             "0.50 GB  1m15s left")
