"""What is computed in few passes, and by whom products are, against torch's own and finite differences."""
import pytest
import torch
import torch.nn.functional as F

from data import batching
from model import KVCache
from support import fast
from support.fast import AttentionInPieces, LeanRMSNorm, SwiGLU, rotate
from support.loss import answer_loss
from tests.toy import attach, perturb, tokens, toy_examples, toy_model


def test_swiglu_equals_autograd_in_float64():
    """silu(gate) * up and both gradients, though silu(gate) is not kept."""
    torch.manual_seed(0)
    gate, up = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.equal(SwiGLU.apply(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))


def test_the_gradient_of_a_rotation_is_turned_back():
    """rotate's gradient against finite differences in float64."""
    torch.manual_seed(0)
    x, angles = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 1, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles.cos(), angles.sin()), x)


def test_rms_norm_equals_torch():
    """Values and both gradients in float64, the gradients against finite differences too."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64, requires_grad=True)
    ours, theirs = LeanRMSNorm.apply(x, weight, 1e-3), F.rms_norm(x, (7,), weight, 1e-3)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, weight)) for y in (ours, theirs))):
        assert torch.allclose(a, b, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x, weight: LeanRMSNorm.apply(x, weight, 1e-3), (x, weight))


@pytest.mark.parametrize("heads, key_heads, T, cached, queries", [
    (6, 2, 5, 1 << 20, 64), (3, 3, 4, 96, 64), (4, 1, 1, 8, 64), (4, 2, 5, 1, 2), (2, 1, 4, 32, 2), (3, 3, 3, 1, 1)])
def test_attention_in_pieces_equals_torch(heads, key_heads, T, cached, queries, monkeypatch):
    """Values equal torch's attention, gradients finite differences in float64; strided inputs, grouped heads or not,
    all rows at once or two or one, all queries or some or one."""
    monkeypatch.setattr(fast, "CACHED", cached)
    monkeypatch.setattr(fast, "QUERIES", queries)
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, T, n, 4, dtype=torch.float64, requires_grad=True) for n in (heads, key_heads, key_heads))
    rows_last = lambda *x: [part.transpose(1, 2) for part in x]  # noqa: E731 (B, T, heads, D), as the model has them
    ours = lambda q, k, v: AttentionInPieces.apply(*rows_last(q, k, v))  # noqa: E731
    theirs = F.scaled_dot_product_attention(*rows_last(q, k, v), is_causal=True, enable_gqa=True)
    assert torch.allclose(ours(q, k, v), theirs, rtol=1e-10)
    assert torch.autograd.gradcheck(ours, (q, k, v))


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"qk_norm": True}])
def test_the_same_loss_and_gradients_whoever_multiplies(changes):
    """With oneDNN allowed to multiply, the model takes its own attention: losses and gradients stay, to fp32."""
    model, batch = perturb(attach(toy_model(**changes), "lora")), batching.collate(toy_examples(6), "cpu")
    found = []
    for precision in ("ieee", "bf16"):
        torch.backends.mkldnn.matmul.fp32_precision = precision
        model.zero_grad()
        loss = answer_loss(model, *batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        assert ("AttentionInPieces" in graph_of(loss.grad_fn)) == (precision == "bf16")
    for usual, ours in zip(*found):
        assert (usual - ours).norm() < 1e-5 * usual.norm()


def graph_of(node):
    """The names of all nodes of an autograd graph, as one text."""
    seen, waiting = {}, [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            waiting += [before for before, _ in node.next_functions]
    return " ".join(seen.values())


def test_the_cache_keeps_onednn_out_and_gives_it_back():
    """Attention to cached keys runs with torch's default products, whatever is chosen, and leaves the choice as it was."""
    model, seen, attend = toy_model(), [], F.scaled_dot_product_attention

    def watched(*inputs, **options):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return attend(*inputs, **options)

    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", watched)
        model(tokens(2, 5), KVCache(model.config, 2, 64, torch.float32, "cpu"))
    assert seen == ["ieee", "ieee"] and torch.backends.mkldnn.matmul.fp32_precision == "bf16"


@pytest.mark.parametrize("slow, rounds, chosen", [("ieee", False, "bf16"), ("bf16", False, "ieee"), (None, False, "ieee"), ("ieee", True, "ieee")])
def test_products_are_given_to_onednn_only_where_faster_and_exact(slow, rounds, chosen, monkeypatch):
    """fast_products: a CPU where the default is slow, one where oneDNN is, one where they are alike, one that rounds."""
    matmul = torch.Tensor.__matmul__

    def pretended(a, b):
        precision = torch.backends.mkldnn.matmul.fp32_precision
        if a.dtype == torch.float64:
            return matmul(a, b)
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
        y = matmul(a, b)
        torch.backends.mkldnn.matmul.fp32_precision = precision
        clock[0] += 2.0 if precision == slow else 1.0
        return y.bfloat16().float() if rounds and precision == "bf16" else y

    clock = [0.0]
    monkeypatch.setattr(torch.Tensor, "__matmul__", pretended)
    monkeypatch.setattr(fast.time, "thread_time", lambda: clock[0])
    fast.fast_products()
    assert torch.backends.mkldnn.matmul.fp32_precision == chosen
