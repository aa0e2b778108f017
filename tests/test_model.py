"""The decoder against transformers and against definitions."""
import pytest
import torch
import torch.nn.functional as F

from model import KVCache, rope_tables
from support.fast import rotate
from tests.toy import tokens, toy_model


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1},
                                     {"rope_theta": 500000.0, "head_dim": 16}])
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


def test_tied_head_is_the_embedding():
    """With tied embeddings the head is the same Parameter, listed once; otherwise they are two."""
    tied, untied = toy_model(), toy_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1


def test_cached_forward_equals_uncached_for_rows_of_different_length():
    """Right-padded prefill, then single tokens at per-row positions: each row's logits are those of the row alone."""
    model, lengths, more = toy_model(), [3, 9, 70, 1], 5
    rows = [tokens(1, n + more, seed=n)[0] for n in lengths]
    cache = KVCache(model.config, 4, 96, torch.float32, "cpu")
    padded = torch.zeros(4, max(lengths), dtype=torch.long)
    for b, n in enumerate(lengths):
        padded[b, :n] = rows[b][:n]
    with torch.no_grad():
        logits = [model(padded, cache)[torch.arange(4), torch.tensor(lengths) - 1]]
        cache.advance(torch.tensor(lengths), max(lengths))
        for step in range(more):
            logits.append(model(torch.stack([rows[b][n + step] for b, n in enumerate(lengths)])[:, None], cache)[:, 0])
            cache.advance(1, 1)
        for b, n in enumerate(lengths):
            alone = model(rows[b][None])[0, n - 1:]
            assert (torch.stack(logits)[:, b] - alone).abs().max() < 1e-5


def test_cache_takes_several_tokens_at_once_and_drops_rows():
    """Feeding a row in pieces of 4, 1 and 7 tokens equals one pass; rows that are kept are not disturbed."""
    model, text = toy_model(), tokens(3, 12)
    cache = KVCache(model.config, 3, 64, torch.float32, "cpu")
    with torch.no_grad():
        parts = [model(text[:, :4], cache)]
        cache.advance(4, 4)
        assert cache.keep(torch.tensor([True, False, True])).tolist() == [0, 2]
        for first, last in ((4, 5), (5, 12)):
            parts.append(model(text[[0, 2], first:last], cache))
            cache.advance(last - first, last - first)
        whole = model(text)
    assert (parts[0] - whole[:, :4]).abs().max() < 1e-5
    assert (torch.cat(parts[1:], 1) - whole[[0, 2], 4:]).abs().max() < 1e-5


def test_grouped_queries_equal_repeated_keys():
    """One key head for several query heads is attention with that head repeated."""
    model = toy_model()
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 6, 32)
    cos, sin = rope_tables(torch.arange(6)[None], toy_model().config)
    q, k, v = (F.linear(x, p.weight).view(2, 6, -1, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k, v = rotate(q, cos, sin), rotate(k, cos, sin).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.mT / 8 ** 0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    expected = attention.o_proj((scores @ v).transpose(1, 2).reshape(2, 6, 32))
    assert (attention(x, cos[:, None], sin[:, None]) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kept", [[1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
def test_rows_that_stay_go_on_undisturbed(kept):
    """Whatever rows leave, the others' next logits are those of rows that had always been alone, in the order given."""
    model, text, kept = toy_model(), tokens(6, 9), torch.tensor(kept, dtype=torch.bool)
    cache = KVCache(model.config, 6, 80, torch.float32, "cpu")
    lengths = torch.tensor([3, 8, 5, 7, 2, 6])
    with torch.no_grad():
        model(text[:, :8], cache)
        cache.advance(lengths, 8)
        order = cache.keep(kept)
        assert sorted(order.tolist()) == kept.nonzero()[:, 0].tolist() and cache.longest == lengths[kept].max()
        logits = model(text[order, 8:], cache)[:, 0]
        for row, b in enumerate(order.tolist()):
            alone = torch.cat((text[b, :lengths[b]], text[b, 8:]))[None]
            assert (logits[row] - model(alone)[0, -1]).abs().max() < 1e-5


def test_slots_without_tokens_may_hold_anything_before_they_are_cleared(monkeypatch):
    """Fresh memory may be NaN: no output sees it, also where the cache grows and where windows were written apart."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    model, text = toy_model(), tokens(2, 140)
    cache = KVCache(model.config, 2, 150, torch.float32, "cpu")
    with torch.no_grad():
        cache.slots(70)
        for row, length in ((0, 70), (1, 3)):
            window = cache.window(row, row + 1)
            model(text[row:row + 1, :length], window)
            window.advance(length, length)
        cache.longest = 70
        for step in range(60):  # past the next multiple of 64
            rows = torch.stack((text[0, 70 + step], text[1, 3 + step]))[:, None]
            logits = model(rows, cache)[:, 0]
            cache.advance(1, 1)
        assert (logits[0] - model(text[:1, :130])[0, -1]).abs().max() < 1e-5
        assert (logits[1] - model(text[1:, :63])[0, -1]).abs().max() < 1e-5
