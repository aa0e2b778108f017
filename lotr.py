"""LoTR: Low Tensor Rank Weight Adaptation (arXiv 2402.01376).

The changes of all linears of a group, stacked, are one tensor of low rank. They share an input factor A and an output
factor B, and each linear owns only a small r x r core between them (s is its number in the group, 0 .. M - 1):

    h = W_s x + (alpha / r) B G_s^T A^T x
    T[s, i, j] = (alpha / r) sum_pq B[i, q] G_s[p, q] A[j, p]      the changes, (M, out, in): a Tucker decomposition
                                                                   without a factor along s; each has rank <= r

    letter      attribute   shape      start                                 trains      belongs to
    W_s         weight      (out, in)  pretrained                            no          the linear
    A           A           (in, r)    N(0, 1)                               yes         the group
    B           B           (out, r)   N(0, 1)                               yes         the group
    G_s         G           (r, r)     zeros, so that step 0 is the base     yes         the linear
    alpha / r   scale       a number   3 / (r sqrt(in))                      no          the group
    with core_only=True A and B stay frozen at their random start (A is LoRA's transposed, as in the official code)

Trainable parameters of a group of M linears: r (in + out) + M r^2, core only M r^2. In the default model the groups are
q,o (M = 60), k,v (60), gate,up (60) and down (30). Merge: W_s + (alpha / r) B G_s^T A^T. Exported as a LoRA, each
linear has a pair of its own of rank r: r (in + out) numbers each.
First step (dA means dL/dA; dW_s is that of W_s with its change, (out, in)): G = 0 makes dA = dB = 0, while
dG_s = scale A^T dW_s^T B is not; from the second step on all three move. The factors are not unique (A P, B Q and
P^-1 G_s Q^-T give the same change): compare delta() between runs, never the factors.

Sources: the paper's abstract, the first author's slides and the official code; the paper's text was not at hand.
What that leaves open, and what we chose:
- a group is all targets of one shape, as in the official code. The parameter counts that the authors publish come out
  only so: 73,728 for r 32 on query and value of 12 blocks of width 768, which two groups would make 122,880. It also
  mixes projections that read different inputs (q with o); group_by="name" gives each projection a group of its own;
- alpha = 3 / sqrt(in). For inputs of size about 1 with signs that do not agree, the first Adam step at rate lr then
  moves an output by alpha lr sqrt(in) = 3 lr, whatever r is; LoRA's by sqrt(r / 3) lr, 2.3 lr at r = 16, 4.6 at 64.
  alpha = 1, the official default, moves it 8 to 13 times as far on the default model. For width 768 our rule gives
  0.11; the authors' own scan is best at 0.1;
- core_only: the abstract names the idea, the protocol is our reading;
- no weight decay on A and B in train.py: it would pull the N(0, 1) factors to zero;
- each G_s is stored with its linear, not as one tensor (M, r, r): the same numbers, and backward through a slice of the
  whole would touch all M cores in every linear.
"""
from typing import Literal

import torch
import torch.nn as nn

import adapter


class LoTRFactors(nn.Module):
    """What the layers of one group share: A (in, r) and B (out, r), parameters or, where they stay frozen, buffers."""

    def __init__(self, A, B, frozen=False):
        super().__init__()
        for name, factor in (("A", A), ("B", B)):
            if frozen:
                self.register_buffer(name, factor)
            else:
                self.register_parameter(name, nn.Parameter(factor))


class LoTRLinear(adapter.AdaptedLinear):
    """weight + scale B G^T A^T, for one `nn.Linear`: A and B are the group's, in its LoTRFactors; G is the layer's."""

    def __init__(self, linear, shared, G, scale):
        super().__init__(linear)
        self.shared = (shared,)  # in a tuple, so that it is not registered here again: see adapter.Shared
        self.G = self.factor(G)  # (r, r)
        self.scale = scale  # alpha / r

    @property
    def A(self):
        """(in, r), the group's."""
        return self.shared[0].A

    @property
    def B(self):
        """(out, r), the group's."""
        return self.shared[0].B

    def forward(self, x):
        A, B, G = self.A.to(x), self.B.to(x), self.G.to(x)
        h = self.base(x)  # (..., out)
        h.add_(((x @ A) @ G) @ B.T, alpha=self.scale)
        return h

    def delta(self):
        """(out, in): what forward adds to `weight`."""
        return self.scale * self.B @ self.G.T @ self.A.T

    def lora_factors(self):
        """(down (r, in), up (out, r)): up @ down is the change against the original weight."""
        return self.A.T, self.scale * self.B @ self.G.T


def attach(model, rank: int = 64, alpha: float | None = None, targets: list = adapter.TARGETS,
           group_by: Literal["shape", "name"] = "shape", core_only: bool = False, seed: int = 0,
           saved=None):
    """Replace every target linear by a LoTRLinear, in place, and register the groups' A and B as `model.lotr`.

    `alpha=None` means 3 / sqrt(in) per group. `group_by` is "shape" (all targets of one shape) or "name" (a projection,
    over all layers). `seed` draws A and B, on the CPU. `saved`, an `adapter.state` that is to be filled in, must have
    this rank.
    Raises ValueError on an unknown target or grouping, a rank outside 1 .. min(out, in), a group whose layers have not
    all one shape, or a second attach.
    """
    linears = adapter.find_linears(model, targets, rank)
    groups = make_groups(linears, group_by)
    adapter.check_saved(saved, {f"{name}.G": (rank, rank) for name, _ in linears})
    generator, shared, scales = torch.Generator().manual_seed(seed), {}, {}
    for key, members in groups.items():
        weight = members[0][1].weight
        out, inner = weight.shape
        scales[key] = adapter.scaling(3 / inner ** 0.5 if alpha is None else alpha, rank)
        A = adapter.gaussian(inner, rank, generator=generator)  # (in, r)
        B = adapter.gaussian(out, rank, generator=generator)  # (out, r)
        A, B = (factor.to(weight.device, torch.float32) for factor in (A, B))
        shared[key] = LoTRFactors(A, B, core_only)
    adapter.freeze(model)
    model.lotr = adapter.Shared(shared)
    for key, members in groups.items():
        for name, linear in members:
            G = torch.zeros(rank, rank)  # (r, r)
            adapter.replace(model, name, LoTRLinear(linear, shared[key], G, scales[key]))
    adapter.record(model, "lotr", rank=rank, alpha=alpha, targets=list(targets), group_by=group_by,
                   core_only=core_only, seed=seed)


def make_groups(linears, group_by):
    """{key: [(name, linear)]}: the layers that share A and B, by their shape or by their projection's name."""
    adapter.check_choice("group_by", group_by, ("shape", "name"))

    def key(name, linear):
        return f"{linear.in_features}x{linear.out_features}" if group_by == "shape" else name.rpartition(".")[2]

    groups = adapter.grouped(linears, key)
    for key, members in groups.items():
        shapes = {tuple(linear.weight.shape) for _, linear in members}
        if len(shapes) > 1:
            raise ValueError(f"the layers called {key} differ in shape ({', '.join(map(str, sorted(shapes)))}), so "
                             "they cannot share A and B: choose other targets, or group_by='shape'")
    return groups


def fit(model, params, targets=adapter.TARGETS, group_by="shape", core_only=False):
    """{"rank": r}: the rank whose r (in + out) + M r^2 parameters per group of M come nearest to `params` in all."""
    linears = adapter.find_linears(model, targets)
    groups = make_groups(linears, group_by).values()
    ends = 0 if core_only else sum(linear.in_features + linear.out_features for (_, linear), *_ in groups)
    return adapter.nearest_rank(linears, params, lambda rank: ends * rank + len(linears) * rank ** 2)


METHODS = {"lotr": adapter.Method(attach, learning_rate=1e-2, fit=fit, help={
    "group_by": "which layers share A and B", "core_only": "freeze A and B at their random start, train the cores"})}

if __name__ == "__main__":
    adapter.demonstrate(attach, lambda q, k, v, later: [
        f"q_proj of both blocks has the same A and B: {q.A is later.A and q.B is later.B}; a core of its own: "
        f"{q.G is not later.G}",
        f"k_proj and v_proj, of one shape, share theirs too: {k.A is v.A}; q_proj's are others: {q.A is not k.A}"],
        rank=8, learning_rate=3e-2)
