"""What the decoder computes between its matrix products, in few passes over memory.

Each function here is a line or two of plain PyTorch, which its docstring gives, and does the same. Left to itself,
autograd would write down and read again more of what lies between: that is memory everywhere, and time, as these passes
have next to no arithmetic. The tests compare each with torch's own, and gradients with finite differences.

Shapes: B rows, T tokens, S cached slots, H query heads, K key/value heads, D head_dim.
"""
import math

import torch
import torch.nn.functional as F

CACHED = 1 << 20  # numbers, 4 MB of fp32: so much stays in a processor's cache from one pass to the next
QUERIES = 64  # about so many of a row are looked at together


def fp32_on_cpu(x):
    """Whether x is fp32 on a CPU, and what is done with it not being compiled."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def onednn_multiplies(x):
    """Whether products of x are oneDNN's by the choice of `script.fast_products`. It is slow at small ones, of which
    torch's attention consists."""
    return fp32_on_cpu(x) and torch.backends.mkldnn.matmul.fp32_precision == "bf16"


# ---- positions ------------------------------------------------------------------------------------------------------

def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i+D/2}) of x (B, heads, T, D) by its angle; cos and sin (B or 1, 1, T, D/2).

    cat(first * cos - second * sin, second * cos + first * sin), first and second the halves of x.
    """
    return Rotation.apply(x, cos, sin)


class Rotation(torch.autograd.Function):
    """`rotate`. The gradient is turned back by the same angles: nothing else is kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        first, second = x.chunk(2, dim=-1)
        y = torch.mul(x, torch.cat((cos, cos), dim=-1), out=x.new_empty(x.shape))  # contiguous, as x may not be
        for half, other, sign in zip(y.chunk(2, dim=-1), (second, first), (-1, 1)):
            half.addcmul_(other, sin, value=sign)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return rotate(g, cos, -sin), None, None


# ---- attention ------------------------------------------------------------------------------------------------------

def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v of q (B, H, T, D), k and v (B, K, T, D), no query looking ahead: (B, H, T, D)."""
    if onednn_multiplies(q):
        return AttentionInPieces.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class AttentionInPieces(torch.autograd.Function):
    """`causal_attention`, a few rows of the batch, and of long rows some of the queries, at a time.

    The scores of a piece stay in the processor's cache, keys that come after all its queries are left out, and the
    weights P are computed again in the backward pass: nothing of size T x T outlives its piece. With g = dL/dy

        dv = P^T g      dS = P * (g v^T - sum(g * y)) / sqrt(D)      dq = dS k      dk = dS^T q
    """

    @staticmethod
    def forward(ctx, q, k, v):
        y = q.new_empty(q.shape)
        for queries, keys in pieces(q):
            y[queries] = (attention_weights(q[queries], k[keys]) @ v[keys]).view(y[queries].shape)
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        q, k, v, y = ctx.saved_tensors
        dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        for queries, keys in pieces(q):
            P = attention_weights(q[queries], k[keys])  # (b, K, H/K * t, S)
            q_piece, g_piece, y_piece = (folded(x[queries], k) for x in (q, g, y))  # (b, K, H/K * t, D)
            dv[keys] += P.mT @ g_piece
            dS = g_piece @ v[keys].mT  # (b, K, H/K * t, S)
            dS.sub_((g_piece * y_piece).sum(-1, keepdim=True)).mul_(P).mul_(q.shape[-1] ** -0.5)
            dq[queries] = (dS @ k[keys]).view(dq[queries].shape)
            dk[keys] += dS.mT @ q_piece
        return dq, dk, dv


def pieces(q):
    """(index of b rows and t queries of each head of q (B, H, T, D), index of the keys that some of these look at)."""
    B, H, T, _ = q.shape
    t = -(-T // max(1, round(T / QUERIES)))
    rows = max(1, CACHED // (H * t * T))
    for row in range(0, B, rows):
        for first in range(0, T, t):
            some, last = slice(row, row + rows), min(T, first + t)
            yield (some, slice(None), slice(first, last)), (some, slice(None), slice(last))


def folded(q, k):
    """q (b, H, t, D) as further queries of the key heads that they share, k (b, K, S, D): (b, K, H/K * t, D)."""
    return q.reshape(len(q), k.shape[1], -1, q.shape[-1])


def attention_weights(q, k):
    """softmax(q k^T / sqrt(D)) of the last t queries, q (b, H, t, D), on k (b, K, S, D), 0 where a key comes after its
    query: (b, K, H/K * t, S)."""
    t, S = q.shape[2], k.shape[2]
    scores = folded(q * q.shape[-1] ** -0.5, k) @ k.mT  # (b, K, H/K * t, S)
    by_head = scores.view(*q.shape[:2], t, S)
    by_head.add_(q.new_full((t, S), -math.inf).triu_(1 + S - t))
    torch.softmax(by_head, dim=-1, out=by_head)
    return scores


def cached_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(D) + mask) v of q (B, H, T, D), k and v (B, K, S, D), parts of a cache: (B, H, T, D).

    The query heads of one key head become further queries of it, mask (B, 1, H/K * T, S): no copy of k and v is made
    for them, and fast kernels apply. oneDNN would copy the parts to multiply them, so it is kept out.
    """
    products = torch.backends.mkldnn.matmul
    before, products.fp32_precision = products.fp32_precision, "ieee"
    y = F.scaled_dot_product_attention(folded(q, k), k, v, attn_mask=mask)
    products.fp32_precision = before
    return y.view(q.shape)


# ---- norm and activation --------------------------------------------------------------------------------------------

def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight for x (..., d), weight (d,)."""
    if fp32_on_cpu(x):
        return RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)  # a GPU has one kernel for it


class RMSNorm(torch.autograd.Function):
    """`rms_norm` in the precision of x, keeping x and 1 / rms alone. With g = dL/dy and u = g * weight

        dx = u / rms - x sum(u * x) / (d rms^3)      d weight = sum(g * x / rms)
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1] + eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, inverse = ctx.saved_tensors
        u = g * weight
        along = (u * x).sum(-1, keepdim=True).mul_(inverse ** 3 / x.shape[-1])  # (..., 1)
        d_weight = (g * x * inverse).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return u.mul_(inverse).addcmul_(x, along, value=-1), d_weight, None


def swiglu(gate, up):
    """silu(gate) * up."""
    return SwiGLU.apply(gate, up)


class SwiGLU(torch.autograd.Function):
    """`swiglu`, keeping its two inputs alone; autograd would keep silu(gate) as well, a seventh of all that a block
    keeps when adapters train."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(g * up, gate)
        return d_gate, F.silu(gate).mul_(g)
