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


def onednn_multiplies(x):
    """Whether products of x are oneDNN's by the choice of `script.fast_products`. It is slow at small ones, of which
    torch's attention consists."""
    return (x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
            and torch.backends.mkldnn.matmul.fp32_precision == "bf16")


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
        return AttentionByRows.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class AttentionByRows(torch.autograd.Function):
    """`causal_attention`, a few rows of the batch after the other.

    The scores of a few rows stay in the processor's cache, and the weights P are computed again in the backward pass:
    nothing of size T x T outlives its rows. With g = dL/dy

        dv = P^T g      dS = P * (g v^T - sum(g * y)) / sqrt(D)      dq = dS k      dk = dS^T q
    """

    @staticmethod
    def forward(ctx, q, k, v):
        y = q.new_empty(q.shape)
        for q_b, k_b, v_b, y_b in few_rows(q, k, v, y):  # b rows: (b, H, T, D), (b, K, T, D), ...
            torch.matmul(attention_weights(q_b, k_b), v_b, out=folded(y_b, k_b))
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        q, k, v, y = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        for g_b, q_b, k_b, v_b, y_b, dq_b, dk_b, dv_b in few_rows(g, q, k, v, y, dq, dk, dv):
            P, g_b, y_b = attention_weights(q_b, k_b), folded(g_b, k_b), folded(y_b, k_b)
            torch.matmul(P.mT, g_b, out=dv_b)
            dS = g_b @ v_b.mT  # (b, K, H/K * T, T)
            dS.sub_((g_b * y_b).sum(-1, keepdim=True)).mul_(P).mul_(q.shape[-1] ** -0.5)
            torch.matmul(dS, k_b, out=folded(dq_b, k_b))
            torch.matmul(dS.mT, folded(q_b, k_b), out=dk_b)
        return dq, dk, dv


def few_rows(q, *others):
    """Tuples of the same few rows of each tensor, as many as have about CACHED scores together; q (B, H, T, D)."""
    rows = max(1, CACHED // (q.shape[1] * q.shape[2] ** 2))
    return zip(*(x.split(rows) for x in (q, *others)))


def folded(q, k):
    """q (b, H, T, D) as further queries of the key heads that they share, k (b, K, T, D): (b, K, H/K * T, D)."""
    return q.reshape(*k.shape[:2], -1, q.shape[-1])


def attention_weights(q, k):
    """softmax(q k^T / sqrt(D)) of q (b, H, T, D), k (b, K, T, D), 0 where a key comes later: (b, K, H/K * T, T)."""
    T = q.shape[2]
    scores = folded(q * q.shape[-1] ** -0.5, k) @ k.mT  # (b, K, H/K * T, T)
    by_head = scores.view(*q.shape[:2], T, T)
    by_head.add_(q.new_full((T, T), -math.inf).triu_(1))
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
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling():
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
