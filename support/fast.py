"""What makes it fast, beside the plain text: train.py and eval.py switch it on, --plain leaves it off.

`switch_on` puts the functions of this file in the places of the plain ones in model.py, support/loss.py and
support/graphs.py, and sets the process up for a CPU. Both forms give the same losses to rounding; the tests hold each
function here against the plain one, forward and gradient.

What each buys, by `python -m tools.bench fast --steps 2 --data gsm8k`, one round on 2 cores of an AMD EPYC, LoRA
r = 16, fp32, batch 16 (records in results/bench.jsonl; two runs of one thing differ by 5 % and more):

    left out             real tokens/s      peak GB
    nothing              594                4.32
    rotate               608                4.29
    attention            470                4.44
    norm                 602                4.50
    swiglu               598                4.79
    head                 579                5.61
    malloc               593                4.27
    onednn               311                4.82
    all of it            269                6.48

`rotate`, `norm` and `swiglu` save memory, and kernels where a GPU waits for them; what `malloc` saves differs from day
to day (0 to 10 %). `decode` is for a GPU alone.

Shapes: B rows, T tokens, S cached slots, H query heads, K key/value heads, D head_dim, d hidden_size, V vocab_size.
"""
import contextlib
import ctypes
import functools
import math
import os
import shutil
import sys
import time
import warnings

import torch
import torch.nn.functional as F

import model as decoder
from support import graphs, loss

CACHED = 1 << 21  # numbers, 8 MB of fp32: so much stays in a processor's cache from one pass to the next
QUERIES = 64  # about so many of a row are looked at together
# Rows are padded to a multiple of so many tokens: on a GPU, where attention may set itself up anew for every shape, and
# where its work is recorded (graphs.py), once for every shape.
CUDA_MULTIPLE, GRAPH_MULTIPLE = 16, 64
plain_attention = decoder.attention  # kept, as switch_on puts another in its place
CHUNK = 512  # answer tokens whose logits live at once: 512 x 49,152 bf16 are 50 MB
PART = 128  # and as many of them as a CPU widens to fp32 at once


def switch_on(names=None, chosen=None, device="auto"):
    """From here on, in this process, what is in NAMES is used: all of it, or what is given. `chosen`: the `products` of
    the process that this one goes on for. device: as --device names it; on a GPU there is nothing to choose."""
    names = NAMES if names is None else names
    for name, (owner, attribute, _, fast) in FORMS.items():
        if name in names:
            setattr(owner, attribute, fast)
    if "attention" in names:  # cuDNN's, which torch prefers on an H100 or B200, plans anew for every shape of a batch
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "malloc" in names:
        keep_freed_memory()
    if "onednn" in names and (str(device) == "cpu" or not torch.cuda.is_available()):
        fast_products(chosen)


def switch_off():
    """The plain forms again, and products by torch's default. (What malloc was told, it keeps.)"""
    for owner, attribute, plain, _ in FORMS.values():
        setattr(owner, attribute, plain)
    torch.backends.cuda.enable_cudnn_sdp(True)
    WIDENED.clear()
    if has_onednn_switch():
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # what a new process has


# ---- the process ----------------------------------------------------------------------------------------------------

def keep_freed_memory():
    """Tell glibc's malloc to keep what is freed, for the next tensor, instead of giving it back to the system.

    By default every large tensor is a mapping of its own, and the kernel clears and maps its pages one by one as they
    are written for the first time: a sixth of a training step on a CPU. The peak stays as it is. Elsewhere than on
    Linux with glibc nothing happens.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
        libc.mallopt(-2, 1 << 28)  # M_TOP_PAD: and grows by 256 MB at a time


def has_onednn_switch():
    """Whether torch can be told who multiplies fp32 matrices on a CPU: from 2.9 on."""
    return hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")


def products():
    """Who multiplies fp32 matrices on a CPU: "bf16" oneDNN, "ieee" and "none" MKL; None: a torch without the switch."""
    return torch.backends.mkldnn.matmul.fp32_precision if has_onednn_switch() else None


@contextlib.contextmanager
def onednn(precision):
    """A block in which oneDNN multiplies fp32 matrices on a CPU ("bf16") or not ("ieee"); what was set is set again."""
    if not has_onednn_switch():
        yield
        return
    products = torch.backends.mkldnn.matmul
    before, products.fp32_precision = products.fp32_precision, precision
    try:
        yield
    finally:
        products.fp32_precision = before


def fast_products(chosen=None):
    """Let oneDNN multiply fp32 matrices on the CPU where it is as exact as torch's default, MKL, and clearly faster, or
    where it was `chosen` before: "bf16", and not "ieee".

    MKL has a slow path for CPUs that are not Intel's: on an AMD one with AVX-512 oneDNN is twice as fast (on one without
    as fast). Its switch also permits rounding to bf16, which it makes use of on some CPUs: so one product is checked
    against fp64, and timed.
    """
    if not has_onednn_switch():
        return
    a = trial_matrix()
    exact = a.double() @ a.double()

    def product(precision):
        with onednn(precision):
            return a @ a

    is_exact = (product("bf16") - exact).norm() < 1e-6 * exact.norm()
    if chosen not in ("ieee", "bf16"):
        is_faster = takes_less_than(0.75, lambda: product("bf16"), lambda: product("ieee"))
        chosen = "bf16" if is_faster else "ieee"
    torch.backends.mkldnn.matmul.fp32_precision = chosen if is_exact else "ieee"


def multiplies_bf16():
    """Whether oneDNN multiplies bf16 matrices on this CPU: with AVX-512 or Arm's units for bf16. Elsewhere torch has
    loops for them that take 7 to 70 times as long as fp32, and more for larger ones (results/speed.md)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def bf16_pays():
    """Whether this CPU multiplies bf16 matrices at 1.5 times the speed of fp32 ones, or faster: those with units for
    them (avx512_bf16, AMX)."""
    if not multiplies_bf16():
        return False
    a = trial_matrix()
    b = a.bfloat16()
    return takes_less_than(1 / 1.5, lambda: b @ b, lambda: a @ a)


WIDENED = []  # the library of products that `widen_products` has put into torch's, while they are in use


def widen_products():
    """Have a CPU take its products of bf16 matrices in fp32 and round them once: what units for bf16 give too, but for
    the order of the sums, and close to the speed of fp32 where there are none."""
    if not WIDENED:
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings(action="ignore"):  # that there is a product already
            for name in ("mm", "addmm", "bmm"):
                library.impl(name, functools.partial(widened, getattr(torch.ops.aten, name).out), "CPU")
        WIDENED.append(library)


def widened(product, *operands, **scales):
    """product(*operands), an operator of torch that writes into `out`, in fp32 where they are bf16."""
    wider = [x.float() if x.dtype == torch.bfloat16 else x for x in operands]
    return product(*wider, **scales, out=wider[0].new_empty(0)).to(operands[0].dtype)


def trial_matrix():
    """(512, 512) in +-0.5: a product of it takes a few milliseconds."""
    return torch.rand(512, 512, generator=torch.Generator()) - 0.5


def takes_less_than(share, function, other):
    """Whether one function takes less than a share of another's time: in most of twelve pairs of calls, in one thread and
    by its own clock. A run and its repetition should choose alike, also on a CPU that other processes share: they
    disturb single calls, and now and then the least time of each, but hardly most of the pairs in the same sense."""
    def seconds(function):
        started = time.thread_time()
        function()
        return time.thread_time() - started

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        pairs = [(seconds(function), seconds(other)) for _ in range(12)]
    finally:
        torch.set_num_threads(threads)
    return sum(one < share * two for one, two in pairs) > 6


def eager_on_cpu(x):
    """Whether x is fp32 or bf16 on a CPU, in code that torch.compile is not looking at."""
    return (x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
            and not torch.compiler.is_compiling())


def wide(x):
    """x, as fp32 if it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def onednn_multiplies(x):
    """Whether oneDNN takes the products of x: bf16 ones always, fp32 ones where `fast_products` has given them to it.
    It is slow at small ones, of which torch's attention consists."""
    return eager_on_cpu(x) and (x.dtype == torch.bfloat16 or products() == "bf16")


# Where an autograd.Function has changed its result in place, it returns a view of it: torch.compile of torch 2.11 would
# else lose its gradient (pytorch issue 180642), and nothing would train.


# ---- positions ------------------------------------------------------------------------------------------------------

def rotate(x, cos, sin):
    """model.rotate in two passes."""
    return Rotation.apply(x, cos, sin)


class Rotation(torch.autograd.Function):
    """`rotate`. The gradient is turned back by the same angles: nothing else is kept."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        first, second = x.chunk(2, dim=-1)
        # A CPU's attention wants heads apart, a GPU's takes them as x has them, which saves a copy of the gradient.
        y = x.new_empty(x.shape) if x.device.type == "cpu" else torch.empty_like(x)
        torch.mul(x, torch.cat((cos, cos), dim=-1), out=y)
        for half, other, sign in zip(y.chunk(2, dim=-1), (second, first), (-1, 1)):
            half.addcmul_(other, sin, value=sign)
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return rotate(g, cos, -sin), None, None

# ---- attention ------------------------------------------------------------------------------------------------------

def attention(q, k, v, seen=None):
    """model.attention: in pieces where torch's own would be slow; over a cache with the heads of one key side by side.

    There the query heads of one key head become further queries of it: no copy of k and v is made for them, and fast
    kernels apply. oneDNN would copy the parts of the cache to multiply them, so it is kept out.
    """
    if seen is None:
        if q.device.type == "cuda" and q.dtype == torch.float32 and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # else no kernel is fast
        return AttentionInPieces.apply(q, k, v) if onednn_multiplies(q) else plain_attention(q, k, v)
    if seen.shape[2] > 1:
        seen = seen.repeat(1, 1, q.shape[1] // k.shape[1], 1)  # (B, 1, H/K * T, S)
    with onednn("ieee") if onednn_multiplies(q) else contextlib.nullcontext():
        return F.scaled_dot_product_attention(folded(q, k), k, v, attn_mask=seen).reshape(q.shape)


class AttentionInPieces(torch.autograd.Function):
    """Causal attention over whole rows, a few of them at a time, and of long ones some of the queries.

    The scores of a piece stay in the processor's cache, keys that come after all its queries are left out, and the
    weights P are computed again in the backward pass: nothing of size T x T outlives its piece. A piece is computed in
    fp32, whatever q, k and v are. With s = 1/sqrt(D), P = softmax(s q k^T) and g = dL/dy

        dv = P^T g      dP = g v^T      dS = P * (dP - sum(dP * P))      dq = s dS k      dk = dS^T s q
    """

    @staticmethod
    def forward(ctx, q, k, v):
        y = q.new_empty(q.shape)
        with torch.autocast("cpu", enabled=False):
            for queries, keys in pieces(q):
                P = attention_weights(scaled(q[queries]), wide(k[keys]))  # (b, K, H/K * t, S)
                y[queries] = (P @ wide(v[keys])).view(y[queries].shape)
        ctx.save_for_backward(q, k, v)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        q, k, v = ctx.saved_tensors
        dq, dk, dv = q.new_empty(q.shape), torch.zeros_like(wide(k)), torch.zeros_like(wide(v))
        for queries, keys in pieces(q):
            sq, k_piece = scaled(q[queries]), wide(k[keys])  # (b, H, t, D), (b, K, S, D)
            P = attention_weights(sq, k_piece)  # (b, K, H/K * t, S)
            g_piece = folded(wide(g[queries]), k)  # (b, K, H/K * t, D)
            dv[keys] += P.mT @ g_piece
            dP = g_piece @ wide(v[keys]).mT  # (b, K, H/K * t, S)
            dS = torch.ops.aten._softmax_backward_data(dP, P, -1, P.dtype)  # (b, K, H/K * t, S)
            dq[queries] = (dS @ scaled(k_piece)).view(dq[queries].shape)
            dk[keys] += dS.mT @ folded(sq, k)
        return dq, dk.to(k.dtype), dv.to(v.dtype)


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


def scaled(x):
    """x / sqrt(D), (..., D), in fp32."""
    return wide(x) * x.shape[-1] ** -0.5


def attention_weights(sq, k):
    """softmax(sq k^T) of the last t queries, already scaled, sq (b, H, t, D), on k (b, K, S, D), 0 where a key comes
    after its query: (b, K, H/K * t, S)."""
    t, S = sq.shape[2], k.shape[2]
    scores = folded(sq, k) @ k.mT  # (b, K, H/K * t, S)
    by_head = scores.view(*sq.shape[:2], t, S)
    by_head[..., S - t:].add_(sq.new_full((t, t), -math.inf).triu_(1))
    torch.softmax(by_head, dim=-1, out=by_head)
    return scores


# ---- norm, activation, loss -----------------------------------------------------------------------------------------

def norm_forward(self, x):
    """model.RMSNorm's forward."""
    if eager_on_cpu(x):
        return LeanRMSNorm.apply(x, self.weight, self.eps)
    return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # a GPU has one kernel for it


class LeanRMSNorm(torch.autograd.Function):
    """RMSNorm, computed in fp32, keeping x and 1 / rms alone. With g = dL/dy and u = g * weight

        dx = u / rms - x sum(u * x) / (d rms^3)      d weight = sum(g * x / rms)
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        h = wide(x)  # once, as arithmetic of bf16 with fp32 would each time
        length = torch.linalg.vector_norm(h, dim=-1, keepdim=True)  # (..., 1)
        inverse = (length.square_() / x.shape[-1] + eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        y = (h * inverse).to(x.dtype).mul_(weight)
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, inverse = ctx.saved_tensors
        u, h = wide(g * weight), wide(x)
        along = (u * h).sum(-1, keepdim=True).mul_(inverse ** 3 / x.shape[-1])  # (..., 1)
        d_weight = (g * (h * inverse)).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return u.mul_(inverse).addcmul_(h, along, value=-1).to(x.dtype), d_weight, None


def mlp_forward(self, x):
    """model.MLP's forward."""
    return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping these two alone; autograd would keep silu(gate) as well, a seventh of all that a block
    keeps when adapters train."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        y = F.silu(gate).mul_(up)
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(g * up, gate)
        return d_gate, F.silu(gate).mul_(g)


def head_loss(hidden, head, targets):
    """loss.head_loss by chunks of answer tokens; where the head is a frozen matrix, with its gradient taken at once."""
    if type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad:
        return FrozenHeadLoss.apply(hidden, head.weight, targets)
    return sum(F.cross_entropy(head(h).float(), t, reduction="sum")
               for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK)))


class FrozenHeadLoss(torch.autograd.Function):
    """Summed cross entropy of hidden (n, d) under a frozen head (V, d).

    The gradient of a token's loss with respect to its logits is softmax - onehot, known as soon as the logits are:
    taken at once and multiplied by the head, it leaves (n, d) numbers to keep instead of (n, V).
    """

    @staticmethod
    def forward(ctx, hidden, head, targets):
        loss, gradient = torch.zeros((), device=hidden.device), torch.empty_like(hidden)  # (), (n, d)
        size = PART if hidden.device.type == "cpu" else CHUNK
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = hidden[rows] @ head.T  # (chunk, V)
            parts = zip(logits.split(size), targets[rows, None].split(size))
            for part, target in parts:  # (size, V), (size, 1)
                log_p = part.float()
                torch.log_softmax(log_p, dim=1, out=log_p)
                loss = loss - log_p.gather(1, target).sum()
                if ctx.needs_input_grad[0]:
                    p = log_p.exp_()  # in fp32 it is `part` itself
                    part.copy_(p.scatter_add_(1, target, p.new_full(target.shape, -1.0)))
            if ctx.needs_input_grad[0]:
                gradient[rows] = logits @ head
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        gradient, = ctx.saved_tensors
        return upstream * gradient, None, None


def decoding(step, device):
    """graphs.decoding: recorded on a GPU."""
    return graphs.RecordedStep(step, device) if device.type == "cuda" else step


FORMS = {name: (owner, attribute, getattr(owner, attribute), fast) for name, owner, attribute, fast in (
    ("rotate", decoder, "rotate", rotate), ("attention", decoder, "attention", attention),
    ("norm", decoder.RMSNorm, "forward", norm_forward), ("swiglu", decoder.MLP, "forward", mlp_forward),
    ("head", loss, "head_loss", head_loss),
    ("decode", graphs, "decoding", decoding))}  # name: (where, under what name, the plain form, the fast one)
NAMES = (*FORMS, "malloc", "onednn")


def row_multiple(device, recorded, context):
    """What the length of rows is padded to a multiple of; rows never get longer than the context."""
    multiple = GRAPH_MULTIPLE if recorded else CUDA_MULTIPLE if device.type == "cuda" else 1
    return math.gcd(multiple, context)


# ---- torch.compile --------------------------------------------------------------------------------------------------

def compile_blocks(model):
    """torch.compile every block of the decoder, in place: one compilation serves all, whatever the ranks of layers.

    A first one is for the shapes of the first batch, a second one for any.
    The rest of a step stays as it is: the head's loss depends on how many answer tokens there are. Raises ValueError
    where a CPU has no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if model.lm_head.weight.device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(f"--compile on a CPU needs a C++ compiler, and there is no {compiler} here: install one, name "
                         "it in $CXX, or leave --compile out")
    torch._dynamo.config.force_parameter_static_shapes = False  # else SARA's layers would each be compiled
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    for block in model.model.layers:
        block.compile()


def eagerly(compiled):
    """A context in which compiled blocks run as they are written: what has shapes of its own is not worth compiling."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
