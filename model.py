"""One decoder-only transformer, the Llama family and GPT-2, in plain PyTorch.

A block reads its input twice, each time through a norm, and adds what it computes back (pre-norm residuals):

    h = x + W_o attention(W_q n(x), W_k n(x), W_v n(x))          n = RMSNorm, attention is causal
    y = h + W_down (silu(W_gate n(h)) * W_up n(h))               SwiGLU

Queries and keys are rotated by their position (RoPE, half-split layout: feature i is paired with feature
i + head_dim/2, as in Hugging Face's weights). Several query heads share one key/value head (grouped-query attention).
Qwen2 adds biases to q, k and v, Qwen3 norms each head's q and k. GPT-2 is the same block with LayerNorm for RMSNorm,
learned positions added to the embedding for RoPE, W_down gelu(W_up n(h)) for SwiGLU, and biases everywhere.

Module and parameter names are those of Hugging Face's `LlamaForCausalLM`, so its weights load with unchanged keys
(GPT-2's are renamed on the way).
The seven `nn.Linear` of a block (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; GPT-2 has no gate_proj)
are what the methods adapt; this file knows nothing of adapters, files or tokenizers.

Shapes: B rows, T tokens, S cached slots, d hidden_size, H query heads, K key/value heads, D head_dim, V vocab_size.
"""
import copy
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    """The numbers that fix a model's shape, under the names of a Hugging Face `config.json`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    rope_scaling: dict | None = None  # {"rope_type": "linear", "llama3" or "factors", "factor": ..., ...}
    attention_bias: bool = False  # of q, k and v
    qk_norm: bool = False
    gpt2: bool = False


def rope_frequencies(config, device):
    """theta^(-2i/D) for i < D/2, (D/2,), fp32, slowed down as `rope_scaling` says.

    linear    all by `factor`.
    llama3    those that turn less than `low_freq_factor` times in the original context by `factor`, those that turn
              more than `high_freq_factor` times not at all, and a straight line in the number of turns between.
    factors   each by its own of `factors`.
    """
    D, scaling = config.head_dim, config.rope_scaling
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, device=device).float() / D)  # (D/2,)
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "factors":
        return frequencies / constant(tuple(scaling["factors"]), device)
    slow = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # (D/2,)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return torch.lerp(slow, frequencies, ((turns - low) / (high - low)).clamp(0, 1))


@functools.cache
def constant(numbers, device):
    """A tuple of numbers as a tensor (n,). Made once: a GPU is waited for, and a CUDA graph could not record that."""
    return torch.tensor(numbers, device=device)


def rope_tables(positions, config):
    """cos and sin of every angle position * frequency: two tensors (..., T, D/2), fp32, for positions (..., T)."""
    frequencies = rope_frequencies(config, positions.device)  # (D/2,)
    angles = positions[..., None].float() * frequencies  # (..., T, D/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i+D/2}) of x (B, heads, T, D) by its angle; cos and sin (B or 1, 1, T, D/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class KVCache:
    """Keys and values already computed, in a block of fixed size: slot j of row b holds token j of row b.

    `lengths` (B,) counts the tokens each row holds, so rows of different lengths live side by side without left
    padding: a right-padded prompt writes rubbish behind its end, which no query sees and the next tokens overwrite.
    """

    def __init__(self, config, rows, capacity, dtype, device):
        capacity = -(-capacity // 64) * 64  # what attention looks at is a multiple of 64: shapes repeat
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)  # (layers, B, K, capacity, D)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.cleared = 0  # slots below are written or zero: attention reads them, weight 0 where they hold no token
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # (B,)
        self.longest = 0  # an upper bound of lengths, kept on the host: no synchronisation to find the slots in use

    def positions(self, T):
        """Where the next T tokens of each row go: (B, T)."""
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def slots(self, T):
        """How many slots attention must look at once T more tokens are in, a multiple of 64."""
        return -(-(self.longest + T) // 64) * 64

    def clear(self, slots):
        """Zero those of the first `slots` slots that nothing was written to."""
        if slots > self.cleared:
            for cached in (self.k, self.v):
                cached[:, :, :, self.cleared:slots] = 0
            self.cleared = slots

    def write(self, layer, positions, k, v):
        """Put k, v (B, K, T, D) at `positions` (B, T)."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]  # (B, 1)
        self.k[layer][rows, :, positions] = k.transpose(1, 2)
        self.v[layer][rows, :, positions] = v.transpose(1, 2)

    def read(self, layer, slots):
        """All keys and values so far, each (B, K, slots, D)."""
        return self.k[layer, :, :, :slots], self.v[layer, :, :, :slots]

    def advance(self, tokens, longest):
        """Count `tokens` (B,) (or one int) more per row, at most `longest` in any row."""
        self.lengths += tokens
        self.longest += longest

    def keep(self, kept):
        """Forget the rows for which `kept` (B,) is False: the last ones that stay move into the places that get free,
        and nothing else is copied. Returns the new order, an index tensor: row i is what row order[i] was."""
        n = int(kept.sum())
        order = torch.arange(n, device=kept.device)  # (n,)
        holes, movers = (~kept[:n]).nonzero()[:, 0], n + kept[n:].nonzero()[:, 0]  # as many as each other
        order[holes] = movers
        self.lengths = self.lengths[order]
        self.longest = int(self.lengths.max())
        for cached in (self.k, self.v):
            cached[:, holes, :, :self.longest] = cached[:, movers, :, :self.longest]
        self.k, self.v = self.k[:, :n], self.v[:, :n]
        return order

    def window(self, first, last):
        """The same cache, seen through a window on rows first .. last - 1: what is written there is in this one too.

        `cleared` and `longest` are numbers, and the window's own: `clear` this one before, set its `longest` after.
        """
        part = copy.copy(self)
        part.k, part.v, part.lengths = self.k[:, first:last], self.v[:, first:last], self.lengths[first:last]
        return part


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, for x (..., d); the root is taken in fp32."""

    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        h = x.float()
        return (h * (h.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


def attention(q, k, v, seen=None):
    """softmax(q k^T / sqrt(D)) v of q (B, H, T, D), k and v (B, K, S, D): (B, H, T, D). H / K query heads share a key.

    A query sees the keys where seen (B, 1, T, S) is True; without `seen`, where S = T, those up to its own position.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None,
                                          enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = \
            layer, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        bias = config.attention_bias or config.gpt2
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.gpt2)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, eps=config.rms_norm_eps) for _ in range(2))

    def forward(self, x, cos, sin, cache=None, positions=None, seen=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            cache.write(self.layer, positions, k, v)
        if seen is not None:
            k, v = cache.read(self.layer, seen.shape[-1])  # (B, K, S, D)
        y = attention(q, k, v, seen)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class GPT2MLP(nn.Module):
    """A layer of gelu (its tanh form) in place of SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def norm(config):
    """The norm before each half of a block, and the last one."""
    return (nn.LayerNorm if config.gpt2 else RMSNorm)(config.hidden_size, eps=config.rms_norm_eps)


class Block(nn.Module):
    """Attention, then the MLP, each behind its norm and added to what came in."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm(config)
        self.mlp = GPT2MLP(config) if config.gpt2 else MLP(config)

    def forward(self, x, cos, sin, cache=None, positions=None, seen=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, positions, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm: tokens (B, T) -> hidden states (B, T, d)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.gpt2:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = norm(config)
        self.recompute = False  # True: training keeps each block's input only, and runs the block again in backward

    def forward(self, tokens, cache=None):
        """Without a cache the T tokens are whole rows; with one they follow what each row holds.

        Prefill and decoding are the same call: T is the prompt's length or 1. The caller then says how many of the T
        tokens were real with `cache.advance`. Right padding needs no mask: causal attention never looks ahead.
        """
        T, seen = tokens.shape[1], None
        if cache is None:
            positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
        else:
            positions = cache.positions(T)  # (B, T)
            S = cache.slots(T)
            cache.clear(S)
            if cache.longest:  # else nothing is there to be seen but the T tokens themselves
                seen = (torch.arange(S, device=tokens.device) <= positions[:, :, None])[:, None]  # (B, 1, T, S)
        x = self.embed_tokens(tokens)  # (B, T, d)
        if self.config.gpt2:
            x, cos, sin = x + self.embed_positions(positions), None, None
        else:
            cos, sin = rope_tables(positions, self.config)
            cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (B or 1, 1, T, D/2)
        for layer in self.layers:
            if self.recompute and cache is None and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, cache, positions, seen)
        return self.norm(x)


class Model(nn.Module):
    """The decoder and its head: tokens (B, T) -> logits (B, T, V).

    Training and generation call `model.model` for hidden states and apply `lm_head` only where they need logits.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        """Make the head and the embedding one Parameter, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, cache=None):
        return self.lm_head(self.model(tokens, cache))
