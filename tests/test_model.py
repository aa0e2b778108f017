"""The decoder against transformers and against definitions. (tests/support/test_fast.py holds the fast forms against it.)"""
import pytest
import torch
import torch.nn.functional as F

from model import KVCache, RMSNorm, rope_tables, rotate
from tests.toy import tokens, toy_model


@pytest.mark.peers
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "tie_word_embeddings": False},
                                     {"num_key_value_heads": 1, "rope_theta": 500000.0, "head_dim": 16}])
def test_logits_equal_transformers(changes):
    """The same random weights in transformers' Llama: the same logits; keys load unchanged."""
    transformers = pytest.importorskip("transformers")
    ours = toy_model(**changes)
    config = transformers.LlamaConfig(**{**vars(ours.config), "attn_implementation": "eager"})
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert (ours(tokens(3, 40)) - theirs(tokens(3, 40)).logits).abs().max() < 1e-5


def test_rope_is_a_rotation_of_complex_pairs():
    """Half-split RoPE multiplies x_i + j x_{i+D/2} by exp(j position theta^(-2i/D))."""
    torch.manual_seed(0)
    x, positions = torch.randn(2, 3, 5, 8), torch.arange(5)[None] + torch.tensor([[0], [7]])
    cos, sin = rope_tables(positions, toy_model().config)
    turned = rotate(x, cos[:, None], sin[:, None])
    angle = positions[:, None, :, None].double() * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    expected = torch.complex(x[..., :4].double(), x[..., 4:].double()) * torch.polar(torch.ones_like(angle), angle)
    assert (turned - torch.cat((expected.real, expected.imag), -1)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_the_norm_is_torchs(dtype, tolerance):
    """The same values, in fp32 and in bf16."""
    torch.manual_seed(0)
    norm, x = RMSNorm(24, 1e-5).to(dtype), torch.randn(3, 24).to(dtype)
    torch.nn.init.normal_(norm.weight)
    expected = F.rms_norm(x.double(), (24,), norm.weight.double(), 1e-5)
    assert norm(x).dtype == dtype and (norm(x) - expected).norm() < tolerance * expected.norm()


def test_tied_head_is_the_embedding():
    """With tied embeddings the head is the same Parameter, listed once; otherwise they are two."""
    tied, untied = toy_model(), toy_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1


def test_grouped_queries_equal_repeated_keys():
    """One key head for several query heads is attention with that head repeated; a query sees no key behind it."""
    model = toy_model()
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 6, 32)
    cos, sin = rope_tables(torch.arange(6)[None], model.config)
    q, k, v = (F.linear(x, p.weight).view(2, 6, -1, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k, v = rotate(q, cos, sin), rotate(k, cos, sin).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.mT / 8 ** 0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    expected = attention.o_proj((scores @ v).transpose(1, 2).reshape(2, 6, 32))
    assert (attention(x, cos[:, None], sin[:, None]) - expected).abs().max() < 1e-5


# ---- the cache ------------------------------------------------------------------------------------------------------

def is_alone(model, logits, text):
    """Whether `logits` (T, V) are the last ones of a row that had always been alone, without a cache."""
    return (logits - model(text[None])[0, -len(logits):]).abs().max() < 1e-5


@torch.no_grad()
def test_cached_forward_equals_uncached_for_rows_of_different_length():
    """Right-padded prefill, then single tokens at positions of their own: each row's logits are those of the row alone."""
    model, lengths, more = toy_model(), torch.tensor([3, 9, 70, 1]), 5
    text, row = tokens(4, 75), torch.arange(4)
    cache = KVCache(model.config, 4, 96, torch.float32, "cpu")
    logits = [model(text[:, :70], cache)[row, lengths - 1]]
    cache.advance(lengths, 70)
    for step in range(more):
        logits.append(model(text[row, lengths + step][:, None], cache)[:, 0])
        cache.advance(1, 1)
    for b, n in enumerate(lengths):
        assert is_alone(model, torch.stack(logits)[:, b], text[b, :n + more])


@torch.no_grad()
@pytest.mark.parametrize("kept", [[1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
def test_rows_that_stay_go_on_undisturbed(kept):
    """Whatever rows leave, the others' next logits are those of rows that had always been alone, in the order given."""
    model, text, kept = toy_model(), tokens(6, 9), torch.tensor(kept, dtype=torch.bool)
    cache, lengths = KVCache(model.config, 6, 80, torch.float32, "cpu"), torch.tensor([3, 8, 5, 7, 2, 6])
    model(text[:, :8], cache)
    cache.advance(lengths, 8)
    order = cache.keep(kept)
    assert sorted(order.tolist()) == kept.nonzero()[:, 0].tolist() and cache.longest == lengths[kept].max()
    logits = model(text[order, 8:], cache)
    for row, b in enumerate(order):
        assert is_alone(model, logits[row], torch.cat((text[b, :lengths[b]], text[b, 8:])))


@torch.no_grad()
@pytest.mark.parametrize("capacity", [1, 64, 65, 150])
def test_attention_looks_at_whole_64s(capacity):
    """Of a cache that holds whatever was asked for: shapes repeat, and the rows of a mask are aligned."""
    cache = KVCache(toy_model().config, 2, capacity, torch.float32, "cpu")
    assert cache.slots(1) == 64 and cache.slots(capacity) % 64 == 0 and capacity <= cache.slots(capacity) == cache.k.shape[3]


@torch.no_grad()
def test_slots_without_tokens_may_hold_anything_before_they_are_cleared(monkeypatch):
    """Fresh memory may be NaN: no output sees it, also where the cache grows and where windows were written apart."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    model, text = toy_model(), tokens(2, 140)
    cache = KVCache(model.config, 2, 150, torch.float32, "cpu")
    cache.clear(cache.slots(70))
    for row, length in ((0, 70), (1, 3)):
        window = cache.window(row, row + 1)
        model(text[row:row + 1, :length], window)
        window.advance(length, length)
    cache.longest = 70
    for step in range(60):  # past the next multiple of 64
        logits = model(torch.stack((text[0, 70 + step], text[1, 3 + step]))[:, None], cache)
        cache.advance(1, 1)
    assert is_alone(model, logits[0], text[0, :130]) and is_alone(model, logits[1], text[1, :63])
