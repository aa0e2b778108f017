"""SARA and Mo-SARA: Singular-Value Based Adaptive Low-Rank Adaption (arXiv 2408.03290).

How large a change a weight W0 (out, in) may need is read off its spectrum. Its rank k is the number of leading singular
values that make up the share m (`threshold`) of the sum of all p = min(out, in) of them:

    k = min { j : sigma_1 + ... + sigma_j >= m (sigma_1 + ... + sigma_p) }

SARA adds a product with a diagonal in the middle. W0 stays whole, nothing is subtracted from it:

    h = W0 x + B diag(lam) A x        (times alpha / k if alpha is given)

    letter   attribute   shape      start: init="lam"   init="lora"             trains
    W0       weight      (out, in)  pretrained          pretrained              no
    A        A           (k, in)    N(0, 0.02^2)        uniform, +-1/sqrt(in)   yes
    lam      lam         (k,)       zeros               ones                    yes
    B        B           (out, k)   N(0, 0.02^2)        zeros                   yes

Trainable parameters: k (in + out + 1) per adapted linear. Merge: W0 + B diag(lam) A. At the first step only the tensor
of zeros has a gradient, from the second on all have; two tensors of zeros would stay so for ever, so no start has two.

Mo-SARA freezes the k leading singular vectors of W0. Between them, where the singular values stood (these are not
used), it trains n vectors, its `sets`, which a router mixes for each token (* is elementwise):

    z = V^T x                              the token in k coordinates
    g = softmax(W_g2^T W_g1^T z)           its n gates
    h = W0 x + v * (U ((Lam^T g) * z))

    letter   attribute   shape      start                          trains
    U        U           (out, k)   left singular vectors of W0    no
    V^T      Vt          (k, in)    right singular vectors of W0   no
    Lam      Lam         (n, k)     N(0, 1)                        yes
    v        v           (out,)     zeros                          yes
    W_g1     W_g1        (k, q)     N(0, 1/k) (variance)           yes
    W_g2     W_g2        (q, n)     N(0, 1/q) (variance)           yes

With n = 1, or `equal_gates`, there is no router, and every gate is 1/n.
Trainable parameters: n k + out, and q (k + n) for the router, where q is `router_rank`. U and V^T add k (in + out)
frozen numbers. The update diag(v) U diag(Lam^T g) V^T differs from token to token: with a router there is no merge.
At the first step only v has a gradient, then all have. Equal rows of Lam would give the router none until they drifted
apart: so they start random. With q = 1 the n logits are one number, W_g1^T z, times W_g2^T (n, 1), so that at any time
only the sets of its largest and its smallest entry can have the top gate; q >= 2 lifts most of this.

Evidence. The paper's text was not at hand and no official code is known to us: this is a reconstruction. From the
abstract and a caption come the rank rule on sigma (not sigma^2), the truncated diagonal form beside the weights, and
several parallel sets of singular values behind a router; from secondary summaries the frozen bases; from one unofficial
implementation random A and B, n = 5, the router's shape, the vector v, the targets q_proj and v_proj. Our own choice:
- the whole spectrum in fp64 and one k per weight matrix: the first j that reaches m (1 - 1e-9) of the sum, 1 for a
  matrix of zeros; m = 1 gives the numerical rank;
- the starts above; no scale, as lam learns it; no load-balancing loss, no top-k;
- two controls, for what the method's own parts are worth: ranks="even" spends SARA's budget on one k for all layers,
  equal_gates takes Mo-SARA's router away;
- m = 0.05 for SARA (about as many parameters as LoRA of rank 6.5 on q_proj and v_proj of the default model; 4096-wide
  models: 0.01) and m = 0.5 for Mo-SARA, of which we are unsure: another place in that implementation has 0.01;
- v scales the branch alone; v_mode="output", the implementation's reading, scales the whole output (1 + v) and does
  not start at the base model: an ablation;
- the signs of U and V^T are fixed and both are saved. An SVD may flip a column of U and the row of V^T that belongs to
  it: the update stays, but z changes its sign there, and the router sees another token.
"""
import bisect
import math
from typing import Literal

import torch

import adapter

TARGETS = ("q_proj", "v_proj")


# ---- the rank rule --------------------------------------------------------------------------------------------------

@torch.no_grad()
def spectrum(weight):
    """All min(out, in) singular values of weight (out, in), descending, in fp64.

    They are the square roots of the eigenvalues of the smaller of W W^T and W^T W. What is within that product's
    rounding of zero, below about 1e-6 of the largest singular value, is set to zero (their sum hardly notices): without
    this floor a rank-8 matrix of width 64 would seem to have rank 32.
    """
    W = adapter.with_fp64(weight).double()
    with adapter.full_precision(W.device.type):
        eigenvalues = torch.linalg.eigvalsh(W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W).flip(0)  # (p,)
    floor = max(W.shape) * torch.finfo(W.dtype).eps * eigenvalues[0]
    return torch.where(eigenvalues > floor, eigenvalues, 0).sqrt()


def choose_rank(sigma, threshold):
    """k: how many leading entries of sigma (p,), descending, make up the share `threshold` of its sum; 1 for zeros."""
    cumulative = sigma.cumsum(0)  # (p,)
    return 1 + int((cumulative < threshold * cumulative[-1] * (1 - 1e-9)).sum())


def choose_ranks(linears, threshold):
    """{name: k} of the linears. ValueError for a threshold outside 0 < m <= 1."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold:g} is out of range: it is a share, above 0 and at most 1")
    return {name: choose_rank(spectrum(linear.weight), threshold) for name, linear in linears}


def even_ranks(linears, ks):
    """{name: k} with one k for all: the one whose k (in + out + 1) in all come nearest to those of `ks`."""
    sizes = {name: sum(linear.weight.shape) + 1 for name, linear in linears}
    k = round(sum(ks[name] * size for name, size in sizes.items()) / sum(sizes.values()))
    return dict.fromkeys(sizes, max(1, min(k, *(min(linear.weight.shape) for _, linear in linears))))


def rank_table(model):
    """Lines of text: the k of every layer, a line per projection."""
    rows = {}
    for name, k in model.adapter_config["ks"].items():
        rows.setdefault(name.rpartition(".")[2], []).append(k)
    width = max(len(str(k)) for ks in rows.values() for k in ks)
    return ["ranks k, layer by layer"] + [
        f"{row:<10} " + " ".join(f"{k:>{width}}" for k in ks) + f"   mean {sum(ks) / len(ks):.1f}"
        for row, ks in rows.items()]


# ---- SARA -----------------------------------------------------------------------------------------------------------

class SARALinear(adapter.AdaptedLinear):
    """weight + scale B diag(lam) A, for one `nn.Linear`."""

    def __init__(self, linear, A, lam, B, scale=1.0):
        super().__init__(linear)
        self.A, self.lam, self.B = self.factor(A), self.factor(lam), self.factor(B)  # (k, in), (k,), (out, k)
        self.scale = scale  # alpha / k, or 1

    def forward(self, x):
        A, lam, B = self.A.to(x), self.lam.to(x), self.B.to(x)
        h = self.base(x)  # W0 x, (..., out)
        h.add_(((x @ A.T) * lam) @ B.T, alpha=self.scale)  # + B diag(lam) A x
        return h

    def delta(self):
        """(out, in): what forward adds to `weight`."""
        return self.scale * (self.B * self.lam) @ self.A

    def lora_factors(self):
        """(down (k, in), up (out, k)): up @ down is the change against the original weight."""
        return self.A, self.scale * (self.B * self.lam)


def attach(model, threshold: float = 0.05, targets: list = TARGETS, init: Literal["lam", "lora"] = "lam",
           alpha: float | None = None, ranks: Literal["spectrum", "even"] = "spectrum", seed: int = 0,
           ks: dict | None = None, norms: dict | None = None, saved=None):
    """Replace every target linear of `model` by a SARALinear of its own rank, in place; A, lam and B train afterwards.

    `init` names the start, "lam" or "lora". `alpha=None` means no scale. `ranks="even"` gives all layers the same k.
    `seed` draws the factors, on the CPU. Of an earlier attach, `ks` {name: k} takes the place of the rank rule, `norms`
    {name: |W0|_F} checks that this is its base, and `saved`, an `adapter.state` that is to be filled in, must have
    these ranks.
    Raises ValueError on an unknown target, init or ranks, a threshold outside 0 < m <= 1, `ks` or `norms` that do not
    fit this model, or a second attach.
    """
    adapter.check_choice("init", init, ("lam", "lora"))
    adapter.check_choice("ranks", ranks, ("spectrum", "even"))
    linears = adapter.find_linears(model, targets)
    if ks is None:
        ks = choose_ranks(linears, threshold)
    norms = check_base(linears, ks, norms)
    ks = even_ranks(linears, ks) if ranks == "even" else ks
    scales = {k: adapter.scaling(alpha, k) for k in ks.values()}
    adapter.check_saved(saved, {f"{name}.A": (ks[name], linear.in_features) for name, linear in linears})
    adapter.freeze(model)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears:
        k, (out, inner) = ks[name], linear.weight.shape
        if init == "lam":
            A = 0.02 * adapter.gaussian(k, inner, generator=generator)  # (k, in)
            B = 0.02 * adapter.gaussian(out, k, generator=generator)  # (out, k)
            lam = torch.zeros(k)
        else:
            A, lam, B = adapter.uniform_factor(k, inner, generator), torch.ones(k), torch.zeros(out, k)
        adapter.replace(model, name, SARALinear(linear, A, lam, B, scales[k]))
    adapter.record(model, "sara", threshold=threshold, targets=list(targets), init=init, alpha=alpha, ranks=ranks,
                   seed=seed, ks=ks, norms=norms)


# ---- Mo-SARA --------------------------------------------------------------------------------------------------------

class MoSARALinear(adapter.AdaptedLinear):
    """weight + diag(v) U diag(Lam^T g(x)) Vt, for one `nn.Linear`, with the gates g of each token."""

    def __init__(self, linear, U, Vt, Lam, v, W_g1=None, W_g2=None, v_mode="branch"):
        super().__init__(linear)
        self.register_buffer("U", U.to(self.weight.device, torch.float32, copy=True))  # (out, k), no view of a file
        self.register_buffer("Vt", Vt.to(self.weight.device, torch.float32, copy=True))  # (k, in)
        self.Lam, self.v = self.factor(Lam), self.factor(v)  # (n, k), (out,)
        self.W_g1, self.W_g2 = (None if W is None else self.factor(W) for W in (W_g1, W_g2))  # (k, q), (q, n)
        self.v_mode = v_mode
        if v_mode == "output":
            self.unmergeable = "v_mode='output' scales the base's output and bias too, which no delta can express"
        elif self.W_g1 is not None:
            self.unmergeable = "each token has its own update through the router, so no single matrix equals it"

    def gates(self, z):
        """(..., n), each >= 0 and with sum 1, for z = Vt x (..., k): in the router's fp32, also under autocast."""
        if self.W_g1 is None:
            return self.fixed_gates().expand(*z.shape[:-1], -1)
        with torch.autocast(z.device.type, enabled=False):
            return (z.to(self.W_g1.dtype) @ self.W_g1 @ self.W_g2).softmax(dim=-1)

    def fixed_gates(self):
        """(n,): the gates where there is no router."""
        return self.Lam.new_full((len(self.Lam),), 1 / len(self.Lam))

    def forward(self, x):
        U, Vt, v = self.U.to(x), self.Vt.to(x), self.v.to(x)
        z = x @ Vt.T  # (..., k)
        mix = (self.gates(z) @ self.Lam).to(x.dtype)  # Lam^T g (..., k): one product with U for all sets
        h = self.base(x)  # (..., out)
        if self.v_mode == "output":
            return ((1 + v) * (h + (mix * z) @ U.T)).to(h.dtype)
        h += (mix * z) @ (v[:, None] * U).T  # v folded into U, which is smaller than the output
        return h

    def delta(self, gates=None):
        """(out, in): diag(v) U diag(Lam^T gates) Vt for gates (n,), which a layer without a router need not be given.

        ValueError without gates where there is a router, and always for v_mode="output"."""
        if self.unmergeable and (gates is None or self.v_mode == "output"):
            raise ValueError(f"there is no delta(): {self.unmergeable}")
        down, up = self._factors_at(self.fixed_gates() if gates is None else gates)
        return up @ down

    def lora_factors(self):
        """(down (k, in), up (out, k)) without a router; else ValueError."""
        if self.unmergeable:
            raise ValueError(f"there are no lora_factors(): {self.unmergeable}")
        return self._factors_at(self.fixed_gates())

    def _factors_at(self, gates):
        """(Vt (k, in), diag(v) U diag(Lam^T gates) (out, k))."""
        return self.Vt, self.v[:, None] * self.U * (gates @ self.Lam)


def attach_mosara(model, threshold: float = 0.5, targets: list = TARGETS, sets: int = 5, router_rank: int = 1,
                  v_mode: Literal["branch", "output"] = "branch", equal_gates: bool = False, seed: int = 0,
                  ks: dict | None = None, norms: dict | None = None, saved=None):
    """Replace every target linear of `model` by a MoSARALinear, in place; Lam, v and the router train afterwards.

    `sets` is n, `router_rank` q, `v_mode` "branch" or "output"; `equal_gates` leaves the router out. `seed` draws Lam
    and the router, on the CPU. Of an earlier attach, `ks` {name: k} takes the place of the rank rule, `norms`
    {name: |W0|_F} checks that this is its base, and `saved`, an `adapter.state`, gives U and Vt in place of an SVD.
    Raises ValueError on an unknown target or v_mode, a threshold outside 0 < m <= 1, sets or a router rank outside
    1 .. 1000, `ks` or `norms` that do not fit this model, or a second attach.
    """
    adapter.check_choice("v_mode", v_mode, ("branch", "output"))
    if not (1 <= sets <= 1000 and 1 <= router_rank <= 1000):
        raise ValueError(f"sets {sets} and router_rank {router_rank} are out of range: both must be 1 .. 1000")
    routed = sets > 1 and not equal_gates
    linears = adapter.find_linears(model, targets)
    if ks is None:
        ks = choose_ranks(linears, threshold)
    norms = check_base(linears, ks, norms)
    shapes = {f"{name}.Lam": (sets, ks[name]) for name, _ in linears}
    shapes |= {f"{name}.W_g1": (ks[name], router_rank) for name, _ in linears if routed}
    adapter.check_saved(saved, shapes)
    bases = [singular_bases(name, linear, ks[name], saved) for name, linear in linears]
    adapter.freeze(model)
    generator = torch.Generator().manual_seed(seed)
    for (name, linear), (U, Vt) in zip(linears, bases):
        k = ks[name]
        Lam = adapter.gaussian(sets, k, generator=generator)  # (n, k)
        v = torch.zeros(linear.out_features)  # (out,)
        router = []
        if routed:
            router = [adapter.gaussian(k, router_rank, generator=generator) / k ** 0.5,  # (k, q)
                      adapter.gaussian(router_rank, sets, generator=generator) / router_rank ** 0.5]  # (q, n)
        adapter.replace(model, name, MoSARALinear(linear, U, Vt, Lam, v, *router, v_mode=v_mode))
    adapter.record(model, "mosara", threshold=threshold, targets=list(targets), sets=sets, router_rank=router_rank,
                   v_mode=v_mode, equal_gates=equal_gates, seed=seed, ks=ks, norms=norms)


def singular_bases(name, linear, k, saved):
    """U (out, k) and Vt (k, in) of the weight, signs fixed, or those of a saved state."""
    if saved is None:
        U, _, Vt = adapter.principal_triplets(linear.weight, k)
        return U, Vt
    return (adapter.saved_tensor(saved, f"{name}.U", (linear.out_features, k)),
            adapter.saved_tensor(saved, f"{name}.Vt", (k, linear.in_features)))


@torch.no_grad()
def gate_statistics(model, tokens):
    """What the routers do on tokens (B, T), averaged over tokens and layers; padding would count as tokens.

    {"top_gate": mean of a token's largest gate (1/n: undecided; near 1: saturated, where the router no longer learns),
     "gates": mean gate of a layer's sets, the most used first (1, 0, ...: every layer uses one set only),
     "change": |dW|_F / |W0|_F at each layer's mean gates, None for v_mode="output"}
    """
    means, tops, hooks = {}, [], []

    def watch(layer, inputs):
        gates = layer.gates(inputs[0] @ layer.Vt.to(inputs[0]).T).flatten(0, -2)  # (tokens, n)
        tops.append(gates.amax(-1).mean())
        means[layer] = gates.mean(0)  # (n,)

    for _, layer in adapter.adapted_layers(model):
        hooks.append(layer.register_forward_pre_hook(watch))
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    change = None
    if all(layer.v_mode == "branch" for layer in means):
        dW = sum(layer.delta(gates).square().sum() for layer, gates in means.items())
        change = (dW / sum(layer.weight.float().square().sum() for layer in means)).sqrt().item()
    return {"top_gate": torch.stack(tops).mean().item(), "change": change,
            "gates": torch.stack([gates.sort(descending=True).values for gates in means.values()]).mean(0).tolist()}


# ---- a threshold for a budget ---------------------------------------------------------------------------------------

def fit(model, params, targets=TARGETS):
    """{"threshold": m, "ks": ...}: the m, in thousandths, whose k (in + out + 1) in all come nearest to `params`."""
    return _fit(model, params, targets, lambda k, out, inner: k * (inner + out + 1))


def fit_mosara(model, params, targets=TARGETS, sets=5, router_rank=1, equal_gates=False):
    """The same for Mo-SARA's n k + out + q (k + n). A budget above what m = 1 gives is answered by m = 1."""
    router = router_rank if sets > 1 and not equal_gates else 0
    return _fit(model, params, targets, lambda k, out, inner: sets * k + out + router * (k + sets))


def _fit(model, params, targets, count):
    """By bisection: the ranks, and so the total of count(k, out, in), never fall as the threshold rises."""
    linears = adapter.find_linears(model, targets)
    found = {name: spectrum(linear.weight).cpu() for name, linear in linears}

    def ranks(thousandths):
        return {name: choose_rank(sigma, thousandths / 1000) for name, sigma in found.items()}

    def total(thousandths):
        ks = ranks(thousandths)
        return sum(count(ks[name], *linear.weight.shape) for name, linear in linears)

    above = min(1000, 1 + bisect.bisect_left(range(1, 1001), params, key=total))  # the first that reaches params
    best = min((max(1, above - 1), above), key=lambda thousandths: abs(total(thousandths) - params))
    return {"threshold": best / 1000, "ks": ranks(best)}


# ---- a saved state on the right base --------------------------------------------------------------------------------

def check_base(linears, ks, norms):
    """{name: |W0|_F} of the linears, whose names `ks` and, where given, `norms` must have.

    Raises ValueError for a k that is no rank of its weight, or a norm that its weight does not have (to 1e-3).
    """
    found = {name: torch.linalg.vector_norm(adapter.with_fp64(linear.weight).double()).item()
             for name, linear in linears}
    for what, given in (("ks", ks), ("norms", found if norms is None else norms)):
        odd = sorted(given.keys() ^ found.keys())
        if odd:
            raise ValueError(f"{what} does not fit this model and these targets: "
                             f"{'missing' if odd[0] in found else 'unexpected'} {odd[0]}")
    for name, linear in linears:
        if type(ks[name]) is not int or not 1 <= ks[name] <= min(linear.weight.shape):
            raise ValueError(f"ks gives {name} the rank {ks[name]!r}: it must be 1 .. {min(linear.weight.shape)}")
        if norms is not None and not math.isclose(norms[name], found[name], rel_tol=1e-3):
            raise ValueError(f"{name} has norm {found[name]:.6g}, but the adapter was made for one of norm "
                             f"{norms[name]:.6g}: it belongs to another base model")
    return found


METHODS = {
    "sara": adapter.Method(attach, learning_rate=3e-2, fit=fit, table=rank_table, help={
        "threshold": "m: a layer's rank is how many leading singular values make up this share of their sum",
        "init": "which factor starts at zero: lam, or B as in LoRA",
        "ranks": "even: the same rank for all layers, of as many parameters"}),
    "mosara": adapter.Method(attach_mosara, learning_rate=3e-1, fit=fit_mosara, table=rank_table, watch=gate_statistics,
                             help={"sets": "n, sets of singular values", "router_rank": "q, inner width of the router",
                                   "equal_gates": "no router: every set counts alike",
                                   "v_mode": "what v scales; output does not start at the base"})}

if __name__ == "__main__":
    def rule(q, k, v, later):
        share = spectrum(q.weight).cumsum(0) / spectrum(q.weight).sum()  # (p,)
        return [f"q_proj: {len(q.A)} singular values make up {share[len(q.A) - 1]:.3f} of the sum, one less "
                f"{share[len(q.A) - 2]:.3f}; m = 0.2",
                f"ranks k of q_proj, k_proj, v_proj: {len(q.A)}, {len(k.A)}, {len(v.A)}"]

    def routes(q, k, v, later):
        gates = q.gates(torch.randn(3, 32, generator=torch.Generator().manual_seed(1)) @ q.Vt.T)  # (3, n)
        return ["gates of 3 tokens: " + ", ".join(" ".join(f"{gate:.2f}" for gate in token) for token in gates)]

    adapter.demonstrate(attach, rule, threshold=0.2, learning_rate=3e-2)
    adapter.demonstrate(attach_mosara, routes, threshold=0.5, sets=3, learning_rate=3e-2)
