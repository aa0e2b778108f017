"""CoRA: Optimizing Low-Rank Adaptation with Common Subspace of Large Language Models (arXiv 2409.02119).

LoRA's B, which starts at zero, is replaced by an orthonormal basis computed from the pretrained weights of the
projections that share an input, and A starts at zero instead:

    h = W_i x + s B A_i x,      s = alpha / r,      B^T B = I
    B = the r leading left singular vectors of J = [W_1 ... W_n]      the weights (out, in) of one group, side by side

    letter   attribute   shape      start                            trains: cora    cora-init
    W_i      weight      (out, in)  pretrained                       no              no
    A_i      A           (r, in)    zeros, so step 0 is the base     yes             yes
    B        B           (out, r)   the group's basis                no, shared      yes, each layer its own

Trainable parameters: r in per adapted linear (about half of LoRA's), cora-init r (in + out). Merge: W_i + s B A_i.
First step (d: the gradient of the loss): dA = s B^T dW is not zero; in cora-init dB = s dW A^T is, as A = 0, and from
step 2 on both move. In cora B never moves: every column of the change stays in its span. cora-init is a LoRALinear from
another start, and uses that class.

Evidence. The paper's text was not at hand and we know of no code by its authors: this is a reconstruction. From the
abstract come the common subspace in B's place and its two uses; from secondary summaries the joint matrix of the query,
key and value weights of each layer, its plain SVD and the first r singular vectors. What is open, and what we chose:
- the output space (left vectors; the summaries fit two readings), as it also serves out != in. basis="input" is the
  other reading: the leading eigenvectors of sum W_i^T W_i, possible only where out = in;
- no mean removed, no singular values in B, the largest entry of each column positive; A = 0; alpha = r, so s = 1;
- a group: same parent module, same role (attention input q k v, MLP input gate up, by the names in ROLES; any other
  projection is alone), same output width. With grouped-query attention q is therefore alone, and its B is nothing but
  its own singular vectors: only k with v and gate with up are truly common there. With full multi-head attention it is
  q, k, v as in the paper;
- several models (`extra`): the weights of further checkpoints join J; the base always counts once;
- B is part of the adapter file, once per group: A is useless without the exact B it was trained with;
- control arms: basis="random" (orthonormal, seeded), a_init="random" (LoRA's A: the output then moves at step 0).
"""
import functools

import torch
import torch.nn as nn

import adapter
from lora import LoRALinear, fit as fit_init  # noqa: F401 (cora-init has LoRA's count)

ROLES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "query": "qkv", "key": "qkv", "value": "qkv",
         "gate_proj": "gate_up", "up_proj": "gate_up"}


class CoRABasis(nn.Module):
    """What the layers of one group share: B (out, r), frozen, with orthonormal columns."""

    def __init__(self, B):
        super().__init__()
        self.register_buffer("B", B)


class CoRALinear(adapter.AdaptedLinear):
    """weight + s B A, for one `nn.Linear`: B is read from the group's CoRABasis, A is the layer's own."""

    def __init__(self, linear, basis, A, s=1.0):
        super().__init__(linear)
        self.basis = (basis,)  # in a tuple, so that it is not registered here again: see adapter.Shared
        self.A = nn.Parameter(A)  # (r, in)
        self.s = s

    @property
    def B(self):
        """(out, r), the group's."""
        return self.basis[0].B

    def forward(self, x):
        return self.plus(x, self.A, self.s * self.B)  # W x + s B A x, (..., out)

    def factors(self):
        """What forward multiplies by, beside `weight`."""
        return self.A, self.B

    def delta(self):
        """(out, in): what forward adds to `weight`."""
        return self.s * (self.B @ self.A)

    def lora_factors(self):
        """(down (r, in), up (out, r)): up @ down is the change against the original weight."""
        return self.A, self.s * self.B


def attach(model, rank=16, alpha=None, targets=adapter.TARGETS, variant="frozen", basis="weights", a_init="zeros",
           extra=(), seed=0, saved=None):
    """Replace every target linear by a CoRALinear (variant "frozen") or a LoRALinear that starts from B ("init").

    The bases of the frozen variant are registered as `model.cora`. `alpha=None` means alpha = rank. `basis` is
    "weights", "input" or "random", `a_init` "zeros" or "random". `extra` is {name: state dict} of further checkpoints
    of the same architecture and pretraining; only the names are recorded. `seed` draws what is random, on the CPU.
    `saved`, the tensors of an adapter file, gives the B in place of an SVD.
    Raises ValueError on an unknown target or choice, a rank outside 1 .. min(out, in), basis="input" where out != in,
    an `extra` that does not fit or is not used, or a second attach.
    """
    for what, choice, choices in (("variant", variant, ("frozen", "init")), ("a_init", a_init, ("zeros", "random")),
                                  ("basis", basis, ("weights", "input", "random"))):
        if choice not in choices:
            raise ValueError(f"unknown {what} {choice!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")
    if basis == "random" and extra:
        raise ValueError("basis='random' uses no weights: leave out extra")
    linears = adapter.find_linears(model, targets, rank)
    generator, s = torch.Generator().manual_seed(seed), (rank if alpha is None else alpha) / rank
    groups = adapter.grouped(linears, group_key)
    if saved is None:
        bases = {key: common_basis(members, rank, basis, extra, generator) for key, members in groups.items()}
    else:
        bases = {key: saved_basis(saved, key, members, rank, variant) for key, members in groups.items()}
    adapter.freeze(model)
    shared = {key: CoRABasis(B) for key, B in bases.items()}
    for key, members in groups.items():
        for name, linear in members:
            A = torch.zeros(rank, linear.in_features)  # (r, in)
            if a_init == "random":
                A = adapter.uniform_factor(rank, linear.in_features, generator)
            A = A.to(linear.weight.device, torch.float32)
            if variant == "frozen":
                layer = CoRALinear(linear, shared[key], A, s)
            else:
                layer = LoRALinear(linear, A, bases[key].clone(), s)
            adapter.replace(model, name, layer)
    if variant == "frozen":
        model.cora = adapter.Shared(shared)
    adapter.record(model, "cora" if variant == "frozen" else "cora-init", rank=rank, alpha=alpha, targets=list(targets),
                   basis=basis, a_init=a_init, extra=list(extra), seed=seed)


attach_init = functools.partial(attach, variant="init")


# ---- the common basis -----------------------------------------------------------------------------------------------

def group_key(name, linear):
    """Which layers have one basis: those of the same parent module, role and output width."""
    parent, _, last = name.rpartition(".")
    return f"{parent}/{ROLES.get(last, last)}/{linear.out_features}".replace(".", "/").strip("/")


@torch.no_grad()
def common_basis(members, rank, basis, extra, generator):
    """B (out, r) of one group, fp32: orthonormal columns, in each the entry of largest magnitude positive."""
    first = members[0][1].weight
    if basis == "random":
        Q = torch.linalg.qr(torch.randn(first.shape[0], rank, generator=generator))[0]  # (out, r)
        return adapter.fix_signs(Q.T)[0].T.contiguous().to(first.device)
    weights = [linear.weight for _, linear in members]
    for checkpoint, state in dict(extra).items():
        weights += [further_weight(checkpoint, state, f"{name}.weight", linear.weight) for name, linear in members]
    if basis == "weights":
        J = torch.cat(weights, dim=1)  # (out, sum in), with J J^T = sum W_i W_i^T, of which B are eigenvectors
        return adapter.principal_triplets(J.T, rank)[2].T.contiguous()
    for name, linear in members:
        if linear.in_features != linear.out_features:
            raise ValueError(f"basis='input' needs square weights: {name} is {linear.out_features} x "
                             f"{linear.in_features}; name other targets (with grouped-query attention: q_proj,o_proj)")
    return adapter.principal_triplets(torch.cat(weights), rank)[2].T.contiguous()  # of sum W_i^T W_i


def further_weight(checkpoint, state, name, weight):
    """The further checkpoint's tensor in the place of `weight` (out, in); ValueError if it is absent or misshapen."""
    if name not in state:
        raise ValueError(f"the further checkpoint {checkpoint} has no {name}: it must have the base's architecture")
    if state[name].shape != weight.shape:
        raise ValueError(f"{name} has shape {tuple(state[name].shape)} in the further checkpoint {checkpoint}, "
                         f"expected {tuple(weight.shape)}: it must have the base's architecture")
    return state[name].to(weight.device)


def saved_basis(saved, key, members, rank, variant):
    """B of one group from an adapter file. In cora-init each layer has its own, which `adapter.load` fills in."""
    shape = (members[0][1].out_features, rank)
    if variant == "init":
        return torch.zeros(shape)
    return adapter.saved_tensor(saved, f"cora.{key}.B", shape).to(members[0][1].weight.device, torch.float32)


def fit(model, params, targets=adapter.TARGETS):
    """{"rank": r}: the rank whose r in parameters per linear come nearest to `params` in all."""
    linears = adapter.find_linears(model, targets, rank=1)
    return adapter.nearest_rank(linears, params, lambda rank: rank * sum(m.in_features for _, m in linears))


if __name__ == "__main__":
    adapter.demonstrate(attach, rank=4)
    adapter.demonstrate(attach_init, rank=4)
