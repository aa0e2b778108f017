"""SARA and Mo-SARA: Singular-Value Based Adaptive Low-Rank Adaption (arXiv 2408.03290).

How large a change a weight W0 (out, in) may need is read off its spectrum. Its rank k is the number of leading singular
values that make up the share m (`threshold`) of the sum of all r = min(out, in) of them:

    k = min { j : sigma_1 + ... + sigma_j >= m (sigma_1 + ... + sigma_r) }

SARA adds a product with a diagonal in the middle. W0 stays whole, nothing is subtracted from it:

    y = W0 x + b + s B diag(lam) A x,        s = 1 (alpha / k if alpha is given)

    letter   attribute   shape      start: init="lam"   init="lora"             trains
    W0       weight      (out, in)  pretrained          pretrained              no
    A        A           (k, in)    N(0, 0.02^2)        uniform, +-1/sqrt(in)   yes
    lam      lam         (k,)       zeros               ones                    yes
    B        B           (out, k)   N(0, 0.02^2)        zeros                   yes

Trainable parameters: k (in + out + 1) per adapted linear. Merge: W0 + s B diag(lam) A. At step 0 only the tensor of
zeros has a gradient, the others follow; two tensors of zeros would stay so for ever, so no start has two.

Mo-SARA freezes the k leading singular vectors of W0 and trains n sets of singular values (`sets`) between them, mixed
for each token by a router that sees the token in these k coordinates:

    h = V^T x,    g = softmax(h W_g1 W_g2),    y = W0 x + b + v * U (g Lam * h)

(* is elementwise; h and g are rows or columns as each product needs them)

    letter   attribute   shape      start                          trains
    U        U           (out, k)   left singular vectors of W0    no
    V^T      Vt          (k, in)    right singular vectors of W0   no
    Lam      Lam         (n, k)     N(0, 1)                        yes
    v        v           (out,)     zeros                          yes
    W_g1     W_g1        (k, q)     N(0, 1/k) (variance)           yes, absent for n = 1, where g = 1
    W_g2     W_g2        (q, n)     N(0, 1/q) (variance)           yes, absent for n = 1

Trainable parameters: n k + out + q (k + n), for n = 1 k + out; q is `router_rank`. Beside them U and V^T cost
k (in + out) frozen numbers per linear, in memory and in the file (q_proj and v_proj of a 7B model at m = 0.5: some 0.5
to 0.9 billion, an estimate).
Mixing first and multiplying once by V^T and once by U equals the sum over n updates, whatever n is. The update is
diag(v) U diag(Lam^T g(x)) V^T, another one for every token, so for n > 1 there is nothing to merge.
At step 0 only v has a gradient, the others follow. Equal rows of Lam would leave the router without one.
With q = 1 the logits are one number per token times W_g2, so only the sets with the largest and the smallest entry of
W_g2 can ever have the top gate; q >= 2 lifts this.

Evidence. The paper's text was not at hand and no official code is known to us: this is a reconstruction. From the
abstract and a caption come the rank rule on sigma (not sigma^2), the truncated diagonal form beside the weights, and
several parallel sets of singular values behind a router; from secondary summaries the frozen bases; from one unofficial
implementation random A and B, n = 5, the router's shape, the vector v, the targets q_proj and v_proj. Our own choice:
- the whole spectrum in fp64 with one k per weight matrix, reached exactly (>=, with 1e-9 of slack), never 0;
- the starts above; s = 1, as lam learns the scale; no load-balancing loss, no top-k;
- m = 0.05 for SARA (about LoRA's r = 7 on the default model; 4096-wide models: 0.01) and m = 0.5 for Mo-SARA;
- v scales the branch alone; v_mode="output", the implementation's reading, scales the whole output (1 + v) and does
  not start at the base model: an ablation;
- the signs of U, V^T are fixed and both are saved: a flipped v_i would leave the update alone but not the router.
"""
import bisect
import math

import torch
import torch.nn as nn

import adapter

TARGETS = ("q_proj", "v_proj")


# ---- the rank rule --------------------------------------------------------------------------------------------------

@torch.no_grad()
def spectrum(weight):
    """All min(out, in) singular values of weight (out, in), descending, in fp64.

    They are the square roots of the eigenvalues of the smaller of W W^T and W^T W. What is within that product's
    rounding of zero, below about 1e-7 of the largest singular value, is set to zero (their sum hardly notices): without
    this floor a rank-8 matrix of width 64 would seem to have rank 32.
    """
    with adapter.full_precision(weight.device.type):
        W = weight.double()
        eigenvalues = torch.linalg.eigvalsh(W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W).flip(0)  # (r,)
    floor = max(W.shape) * torch.finfo(W.dtype).eps * eigenvalues[0]
    return torch.where(eigenvalues > floor, eigenvalues, 0).sqrt()


def choose_rank(sigma, threshold):
    """k: how many leading entries of sigma (r,), descending, make up the share `threshold` of its sum; 1 for zeros."""
    cumulative = sigma.cumsum(0)  # (r,)
    return 1 + int((cumulative < threshold * cumulative[-1] * (1 - 1e-9)).sum())


def choose_ranks(linears, threshold, ks, norms):
    """({name: k}, {name: |W0|_F}) of the linears: by the rule, or as given, from an adapter file.

    Raises ValueError for a threshold outside 0 < m <= 1, weights that are not finite, given ones that are not those of
    these linears, a k that is no rank of its weight, or a norm that the weight does not have (to 1e-3): the adapter
    then belongs to another base.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold:g} is out of range: it is a share, above 0 and at most 1")
    found = {name: torch.linalg.vector_norm(linear.weight.double()).item() for name, linear in linears}
    for what, given in (("ks", ks), ("norms", norms)):
        wrong = [] if given is None else [f"missing {name}" for name in found if name not in given]
        wrong += [] if given is None else [f"unexpected {name}" for name in given if name not in found]
        if wrong:
            raise ValueError(f"{what} does not fit this model and these targets: {wrong[0]}")
    for name, norm in found.items():
        if not math.isfinite(norm):
            raise ValueError(f"{name} has weights that are not finite: it has no spectrum to read a rank from")
        if norms is not None and not abs(norms[name] - norm) <= 1e-3 * norm:
            raise ValueError(f"{name} has norm {norm:.6g}, but the adapter was made for one of norm {norms[name]:.6g}: "
                             "it belongs to another base model")
    if ks is None:
        return {name: choose_rank(spectrum(linear.weight), threshold) for name, linear in linears}, found
    for name, linear in linears:
        if type(ks[name]) is not int or not 1 <= ks[name] <= min(linear.weight.shape):
            raise ValueError(f"ks gives {name} the rank {ks[name]!r}: it must be 1 .. {min(linear.weight.shape)}")
    return ks, found


def rank_table(model):
    """Lines of text: the k of every layer, a line per projection."""
    rows = {}
    for name, k in model.adapter_config["ks"].items():
        rows.setdefault(name.rpartition(".")[2], []).append(k)
    width = max(len(str(k)) for ks in rows.values() for k in ks)
    return [f"{row:<10} " + " ".join(f"{k:>{width}}" for k in ks) + f"   mean {sum(ks) / len(ks):.1f}"
            for row, ks in rows.items()]


# ---- SARA -----------------------------------------------------------------------------------------------------------

class SARALinear(adapter.AdaptedLinear):
    """weight + s B diag(lam) A, for one `nn.Linear`."""

    def __init__(self, linear, A, lam, B, s=1.0):
        super().__init__(linear)
        A, lam, B = (factor.float().to(self.weight.device) for factor in (A, lam, B))  # (k, in), (k,), (out, k)
        self.A, self.lam, self.B = nn.Parameter(A), nn.Parameter(lam), nn.Parameter(B)
        self.s = s

    def forward(self, x):
        return self.plus(x, self.A, self.s * (self.B * self.lam))  # W x + s B diag(lam) A x, (..., out)

    def factors(self):
        """What forward multiplies by, beside `weight`."""
        return self.A, self.B

    def delta(self):
        """(out, in): what forward adds to `weight`."""
        return self.s * ((self.B * self.lam) @ self.A)

    def lora_factors(self):
        """(down (k, in), up (out, k)): up @ down is the change against the original weight."""
        return self.A, self.s * (self.B * self.lam)


def attach(model, threshold=0.05, targets=TARGETS, init="lam", alpha=None, seed=0, ks=None, norms=None, saved=None):
    """Replace every target linear of `model` by a SARALinear of its own rank, in place; A, lam and B train afterwards.

    `init` names the start, "lam" or "lora". `alpha=None` means s = 1. `seed` draws the factors, on the CPU. `ks` and
    `norms`, {name: k} and {name: |W0|_F} from an adapter file, take the place of an SVD and check the base. `saved` is
    part of every attach (the tensors of an adapter file); SARA's start needs none of it.
    Raises ValueError on an unknown target or init, a threshold outside 0 < m <= 1, `ks` or `norms` that do not fit this
    model, or a second attach.
    """
    if init not in ("lam", "lora"):
        raise ValueError(f"unknown init {init!r}: choose lam or lora")
    linears = adapter.find_linears(model, targets, rank=1)
    ks, norms = choose_ranks(linears, threshold, ks, norms)
    adapter.freeze(model)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears:
        k, (out, inner) = ks[name], linear.weight.shape
        if init == "lam":
            A, B = (0.02 * torch.randn(shape, generator=generator) for shape in ((k, inner), (out, k)))
            lam = torch.zeros(k)
        else:
            A, lam, B = adapter.uniform_factor(k, inner, generator), torch.ones(k), torch.zeros(out, k)
        adapter.replace(model, name, SARALinear(linear, A, lam, B, 1.0 if alpha is None else alpha / k))
    adapter.record(model, "sara", threshold=threshold, targets=list(targets), init=init, alpha=alpha, seed=seed, ks=ks,
                   norms=norms)


# ---- Mo-SARA --------------------------------------------------------------------------------------------------------

class MoSARALinear(adapter.AdaptedLinear):
    """weight + diag(v) U diag(Lam^T g(x)) Vt, for one `nn.Linear`, with the gates g of each token."""

    def __init__(self, linear, U, Vt, Lam, v, W_g1=None, W_g2=None, v_mode="branch"):
        super().__init__(linear)
        self.register_buffer("U", U.to(self.weight))  # (out, k)
        self.register_buffer("Vt", Vt.to(self.weight))  # (k, in)
        trained = [None if factor is None else nn.Parameter(factor.float().to(self.weight.device))
                   for factor in (Lam, v, W_g1, W_g2)]
        self.Lam, self.v, self.W_g1, self.W_g2 = trained  # (n, k), (out,), (k, q), (q, n); no router for n = 1
        self.v_mode = v_mode
        if v_mode == "output":
            self.unmergeable = "v_mode='output' scales the base's output and bias too, which no delta can express"
        elif self.W_g1 is not None:
            self.unmergeable = "each token has its own update through the router, so no single matrix equals it"

    def gates(self, h):
        """(..., n), each >= 0 and with sum 1, for h = Vt x (..., k): in the router's fp32, also under autocast."""
        if self.W_g1 is None:
            return self.Lam.new_ones(*h.shape[:-1], 1)
        with torch.autocast(h.device.type, enabled=False):
            return (h.to(self.W_g1.dtype) @ self.W_g1 @ self.W_g2).softmax(dim=-1)

    def forward(self, x):
        h = x @ self.Vt.T  # (..., k)
        mix = (self.gates(h) @ self.Lam).to(x.dtype)  # (..., k)
        if self.v_mode == "output":
            return (1 + self.v.to(x.dtype)) * (self.base(x) + (mix * h) @ self.U.T)  # (..., out)
        return self.base(x) + (mix * h) @ (self.v.to(x.dtype)[:, None] * self.U).T  # (..., out)

    def factors(self):
        """What forward multiplies by, beside `weight`."""
        return (self.Vt, self.U, self.Lam) + (() if self.W_g1 is None else (self.W_g1, self.W_g2))

    def delta(self, gates=None):
        """(out, in): diag(v) U diag(Lam^T gates) Vt for gates (n,). Without gates ValueError, but for n = 1."""
        if self.unmergeable and (gates is None or self.v_mode == "output"):
            raise ValueError(f"there is no delta(): {self.unmergeable}")
        down, up = self._factors_at(self.Lam.new_ones(1) if gates is None else gates)
        return up @ down

    def lora_factors(self):
        """(down (k, in), up (out, k)) for n = 1; else ValueError."""
        if self.unmergeable:
            raise ValueError(f"there are no lora_factors(): {self.unmergeable}")
        return self._factors_at(self.Lam.new_ones(1))

    def _factors_at(self, gates):
        """(Vt (k, in), diag(v) U diag(Lam^T gates) (out, k)), in the dtype of Lam."""
        return self.Vt.to(self.Lam.dtype), self.v[:, None] * self.U.to(self.Lam.dtype) * (gates @ self.Lam)


def attach_mosara(model, threshold=0.5, targets=TARGETS, sets=5, router_rank=1, v_mode="branch", seed=0, ks=None,
                  norms=None, saved=None):
    """Replace every target linear of `model` by a MoSARALinear, in place; Lam, v and the router train afterwards.

    `sets` is n, `router_rank` q, `v_mode` "branch" or "output". `seed` draws Lam and the router, on the CPU. `ks` and
    `norms`, {name: k} and {name: |W0|_F} from an adapter file, take the place of the rank rule and check the base;
    `saved`, its tensors, gives U and Vt in place of an SVD.
    Raises ValueError on an unknown target or v_mode, a threshold outside 0 < m <= 1, less than one set, a router rank
    below 1, `ks` or `norms` that do not fit this model, or a second attach.
    """
    if v_mode not in ("branch", "output"):
        raise ValueError(f"unknown v_mode {v_mode!r}: choose branch or output")
    if sets < 1 or router_rank < 1:
        raise ValueError(f"sets {sets} and router_rank {router_rank} must be at least 1")
    linears = adapter.find_linears(model, targets, rank=1)
    ks, norms = choose_ranks(linears, threshold, ks, norms)
    bases = [singular_bases(name, linear, ks[name], saved) for name, linear in linears]
    for name, _ in linears if saved is not None else ():  # before sets and router_rank are believed
        adapter.saved_tensor(saved, f"{name}.Lam", (sets, ks[name]))
        if sets > 1:
            adapter.saved_tensor(saved, f"{name}.W_g1", (ks[name], router_rank))
    adapter.freeze(model)
    generator = torch.Generator().manual_seed(seed)
    for (name, linear), (U, Vt) in zip(linears, bases):
        k = ks[name]
        Lam, v = torch.randn(sets, k, generator=generator), torch.zeros(linear.out_features)  # (n, k), (out,)
        router = []
        if sets > 1:
            router = [torch.randn(k, router_rank, generator=generator) / k ** 0.5,  # (k, q)
                      torch.randn(router_rank, sets, generator=generator) / router_rank ** 0.5]  # (q, n)
        adapter.replace(model, name, MoSARALinear(linear, U, Vt, Lam, v, *router, v_mode=v_mode))
    adapter.record(model, "mosara", threshold=threshold, targets=list(targets), sets=sets, router_rank=router_rank,
                   v_mode=v_mode, seed=seed, ks=ks, norms=norms)


def singular_bases(name, linear, k, saved):
    """U (out, k) and Vt (k, in) of the weight, signs fixed, or those of an adapter file."""
    if saved is not None:
        return (adapter.saved_tensor(saved, f"{name}.U", (linear.out_features, k)),
                adapter.saved_tensor(saved, f"{name}.Vt", (k, linear.in_features)))
    U, _, Vt = adapter.principal_triplets(linear.weight, k)
    return U, Vt


@torch.no_grad()
def gate_statistics(model, tokens):
    """What the routers do on tokens (B, T), averaged over tokens and layers; padding would count as tokens.

    {"top_gate": mean of a token's largest gate (1/n: undecided; near 1: saturated, where the router no longer learns),
     "gates": mean gate of a layer's sets, the most used first (1, 0, ...: every layer uses one set only),
     "change": |dW|_F / |W0|_F at each layer's mean gates, None for v_mode="output"}
    """
    means, tops, hooks = {}, [], []

    def watch(layer, inputs):
        gates = layer.gates(inputs[0] @ layer.Vt.T).flatten(0, -2)  # (tokens, n)
        tops.append(gates.amax(-1).mean())
        means[layer] = gates.mean(0)  # (n,)

    for _, layer in adapter.adapted_layers(model):
        hooks.append(layer.register_forward_pre_hook(watch))
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    branch = all(layer.v_mode == "branch" for layer in means)
    squares = [(layer.delta(gates).square().sum(), layer.weight.float().square().sum())
               for layer, gates in means.items() if branch]
    change = (sum(dW for dW, _ in squares) / sum(W for _, W in squares)).sqrt().item() if branch else None
    return {"top_gate": torch.stack(tops).mean().item(), "change": change,
            "gates": torch.stack([gates.sort(descending=True).values for gates in means.values()]).mean(0).tolist()}


# ---- a threshold for a budget ---------------------------------------------------------------------------------------

def fit(model, params, targets=TARGETS):
    """{"threshold": m, "ks": ...}: the m, in thousandths, whose k (in + out + 1) in all come nearest to `params`."""
    return _fit(model, params, targets, lambda k, out, inner: k * (inner + out + 1))


def fit_mosara(model, params, targets=TARGETS, sets=5, router_rank=1):
    """The same for Mo-SARA's n k + out + q (k + n). `params` may be more than even m = 1 has."""
    router = router_rank if sets > 1 else 0
    return _fit(model, params, targets, lambda k, out, inner: sets * k + out + router * (k + sets))


def _fit(model, params, targets, count):
    """By bisection: the ranks, and so the total of count(k, out, in), never fall as the threshold rises."""
    linears = adapter.find_linears(model, targets, rank=1)
    spectra = {name: spectrum(linear.weight).cpu() for name, linear in linears}

    def ranks(thousandths):
        return {name: choose_rank(sigma, thousandths / 1000) for name, sigma in spectra.items()}

    def total(thousandths):
        ks = ranks(thousandths)
        return sum(count(ks[name], *linear.weight.shape) for name, linear in linears)

    above = min(1000, 1 + bisect.bisect_left(range(1, 1001), params, key=total))  # the first that reaches params
    best = min((max(1, above - 1), above), key=lambda thousandths: abs(total(thousandths) - params))
    return {"threshold": best / 1000, "ks": ranks(best)}


if __name__ == "__main__":
    adapter.demonstrate(attach, threshold=0.2)
    adapter.demonstrate(attach_mosara, threshold=0.5)
