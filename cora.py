"""CoRA: Optimizing Low-Rank Adaptation with Common Subspace of Large Language Models (arXiv 2409.02119).

LoRA's B, which starts at zero, is replaced by an orthonormal basis computed from the pretrained weights of a group of
projections, which share it, and A starts at zero instead:

    h = W_i x + (alpha / r) B A_i x,      B^T B = I
    B = the r leading left singular vectors of J = [W_1 ... W_n]      the weights (out, in) of the group, side by side
    groups of a block: q,k,v | o | gate,up | down; with grouped-query attention, where q is wider, q | k,v

    letter      attribute   shape      start                            trains: cora    cora-init
    W_i         weight      (out, in)  pretrained                       no              no
    A_i         A           (r, in)    zeros, so step 0 is the base     yes             yes
    B           B           (out, r)   the group's basis                no, shared      yes, each layer its own
    alpha / r   scale       a number   1                                no              no

Trainable parameters: r * in per adapted linear (about half of LoRA's; the file holds each group's B beside them,
r * out numbers), cora-init r (in + out). Merge: W_i + (alpha / r) B A_i.
First step (dA means dL/dA; dW is that of W_i with its change, (out, in)): dA = scale B^T dW is not zero. In cora-init
dB = scale dW A^T is, because A = 0; from the second step on both move. In cora B never moves: every column of the
change stays in its span, and what lies outside of it cannot be learned. cora-init is a LoRALinear (lora.py) with
another start.

Evidence. The paper's text was not at hand and we know of no code by its authors: this is a reconstruction. From the
abstract come the common subspace in B's place and its two uses; from secondary summaries the joint matrix of the query,
key and value weights of each layer, its plain SVD and the first r singular vectors. By these summaries the weights in J
are those of several fine-tuned models. Ours, without `extra`, are the base model's alone: our substitute.
What is open, and what we chose:
- the output space (left vectors; the summaries fit two readings), as it also serves out != in. basis="input" is the
  other reading: the leading eigenvectors of sum W_i^T W_i, possible only where out = in;
- no mean removed, no singular values in B, the largest entry of each column positive; A = 0; alpha = r;
- a group: same parent module, same role (attention input, MLP input, by the names in ROLES; any other projection is
  alone), same output width. A projection alone in its group has its own singular vectors for B, and nothing is common;
- several models (`extra`): the weights of further models join J; the base's always count once;
- B is part of the adapter file, once per group: A is useless without the exact B it was trained with;
- control arms: basis="random" (orthonormal, seeded), a_init="random" (LoRA's A: the output then moves at step 0).
"""
from typing import Literal

import torch
import torch.nn as nn

import adapter
import lora

ROLES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "query": "qkv", "key": "qkv", "value": "qkv",
         "gate_proj": "gate_up", "up_proj": "gate_up"}
Basis, AInit = Literal["weights", "input", "random"], Literal["zeros", "random"]


class CoRABasis(nn.Module):
    """What the layers of one group share: B (out, r), frozen, with orthonormal columns."""

    def __init__(self, B):
        super().__init__()
        self.register_buffer("B", B)


class CoRALinear(adapter.AdaptedLinear):
    """weight + scale B A, for one `nn.Linear`: B is read from the group's CoRABasis, A is the layer's own."""

    def __init__(self, linear, shared, A, scale=1.0):
        super().__init__(linear)
        self.shared = (shared,)  # in a tuple, so that it is not registered here again: see adapter.Shared
        self.A = self.factor(A)  # (r, in)
        self.scale = scale  # alpha / r

    @property
    def B(self):
        """(out, r), the group's."""
        return self.shared[0].B

    def forward(self, x):
        A, B = self.A.to(x), self.B.to(x)
        h = self.base(x)  # (..., out)
        h.add_((x @ A.T) @ B.T, alpha=self.scale)
        return h

    def delta(self):
        """(out, in): what forward adds to `weight`."""
        return self.scale * self.B @ self.A

    def lora_factors(self):
        """(down (r, in), up (out, r)): up @ down is the change against the original weight."""
        return self.A, self.scale * self.B


def attach(model, rank: int = 16, alpha: float | None = None, targets: list = adapter.TARGETS, basis: Basis = "weights",
           a_init: AInit = "zeros", extra: list = (), seed: int = 0, saved=None):
    """CoRA: replace every target linear by a CoRALinear, in place, and register the groups' bases as `model.cora`.

    `alpha=None` means alpha = rank. `basis` is "weights", "input" or "random", `a_init` "zeros" or "random". `extra` is
    {name: state dict} of further models of the same architecture and pretraining. `seed` draws what is random, on the
    CPU. `saved`, an `adapter.state`, gives B without an SVD; `extra` is then their names alone, which is all that is
    recorded of them.
    Raises ValueError on an unknown target or choice, a rank outside 1 .. min(out, in), basis="input" where out != in,
    an `extra` that does not fit or is not used, or a second attach.
    """
    layers, bases, scale = prepare(model, rank, alpha, targets, basis, a_init, extra, seed, saved)
    shared = {key: CoRABasis(B) for key, B in bases.items()}
    adapter.freeze(model)
    for name, linear, key, A in layers:
        adapter.replace(model, name, CoRALinear(linear, shared[key], A, scale))
    model.cora = adapter.Shared(shared)
    adapter.record(model, "cora", rank=rank, alpha=alpha, targets=list(targets), basis=basis, a_init=a_init,
                   extra=list(extra), seed=seed)


def attach_init(model, rank: int = 16, alpha: float | None = None, targets: list = adapter.TARGETS,
                basis: Basis = "weights", a_init: AInit = "zeros", extra: list = (), seed: int = 0, saved=None):
    """cora-init: replace every target linear by a LoRALinear whose B starts as the group's basis, and trains.

    The arguments and errors are those of `attach`. With `saved` no SVD is made: `adapter.fill` is to set A and B.
    """
    layers, bases, scale = prepare(model, rank, alpha, targets, basis, a_init, extra, seed, saved)
    adapter.freeze(model)
    for name, linear, key, A in layers:
        adapter.replace(model, name, lora.LoRALinear(linear, A, bases[key], scale))
    adapter.record(model, "cora-init", rank=rank, alpha=alpha, targets=list(targets), basis=basis, a_init=a_init,
                   extra=list(extra), seed=seed)


def prepare(model, rank, alpha, targets, basis, a_init, extra, seed, saved):
    """([(name, linear, key of its group, A (r, in))], {key: B (out, r)}, alpha / r); the errors of `attach`."""
    adapter.check_choice("a_init", a_init, AInit.__args__)
    adapter.check_choice("basis", basis, Basis.__args__)
    if saved is None and not isinstance(extra, dict) and extra:
        raise ValueError("extra is {name: state dict} of further models, not their names alone")
    if basis == "random" and extra:
        raise ValueError("basis='random' uses no weights: leave out extra")
    groups = adapter.grouped(adapter.find_linears(model, targets, rank), group_key)
    scale, generator = adapter.scaling(alpha, rank), torch.Generator().manual_seed(seed)
    if saved is None:
        bases = {key: common_basis(members, rank, basis, extra, generator) for key, members in groups.items()}
    else:
        bases = {key: saved_basis(saved, key, members, rank) for key, members in groups.items()}
    layers = []
    for key, members in groups.items():
        for name, linear in members:
            A = torch.zeros(rank, linear.in_features)  # (r, in)
            if a_init == "random":
                A = adapter.uniform_factor(rank, linear.in_features, generator)
            layers.append((name, linear, key, A))
    return layers, bases, scale


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
        B = torch.linalg.qr(adapter.gaussian(len(first), rank, generator=generator)).Q.to(first.device)  # (out, r)
    elif basis == "weights":
        J = torch.cat(weights_of(members, extra), dim=1)  # (out, sum in)
        B = adapter.principal_triplets(J, rank)[0]
    else:
        for name, linear in members:
            if linear.in_features != linear.out_features:
                raise ValueError(f"basis='input' needs square weights: {name} is {linear.out_features} x "
                                 f"{linear.in_features}; name other targets (with grouped-query attention: "
                                 "q_proj,o_proj)")
        B = adapter.principal_triplets(torch.cat(weights_of(members, extra)), rank)[2].T  # of sum W_i^T W_i
    return adapter.fix_signs(B.T)[0].T.contiguous()


def weights_of(members, extra):
    """The weights of a group, in the base and then in each further model."""
    weights = [linear.weight for _, linear in members]
    for other, state in dict(extra).items():
        weights += [further_weight(other, state, f"{name}.weight", linear.weight) for name, linear in members]
    return weights


def further_weight(other, state, name, weight):
    """The further model's tensor in the place of `weight` (out, in); ValueError if it is absent or misshapen."""
    if name not in state:
        raise ValueError(f"the further model {other} has no {name}: it must have the base's architecture")
    if state[name].shape != weight.shape:
        raise ValueError(f"{name} has shape {tuple(state[name].shape)} in the further model {other}, "
                         f"expected {tuple(weight.shape)}: it must have the base's architecture")
    adapter.check_numbers(f"{name} of the further model {other}", state[name])
    return state[name].to(weight.device)


def saved_basis(saved, key, members, rank):
    """B (out, r) of one group from a saved state: cora has it once, cora-init in every layer, here in the first."""
    first, linear = members[0]
    name = f"cora.{key}.B" if any(stored.startswith("cora.") for stored in saved) else f"{first}.B"
    B = adapter.saved_tensor(saved, name, (linear.out_features, rank))
    return B.to(linear.weight.device, torch.float32, copy=True)


def fit(model, params, targets=adapter.TARGETS):
    """{"rank": r}: the rank whose r * in parameters per linear come nearest to `params` in all."""
    linears = adapter.find_linears(model, targets)
    return adapter.nearest_rank(linears, params, lambda rank: rank * sum(m.in_features for _, m in linears))


HELP = {"basis": "where B comes from", "a_init": "start of A; random moves the output at step 0",
        "extra": "further models, with commas, whose weights join the basis: same architecture and pretraining (all "
                 "are in memory at once while it is computed)"}
METHODS = {"cora": adapter.Method(attach, learning_rate=3e-3, fit=fit, help=HELP),
           "cora-init": adapter.Method(attach_init, learning_rate=3e-3, fit=lora.fit, help=HELP)}

if __name__ == "__main__":
    def facts(q, k, v, later):
        outside = k.delta() - k.B @ (k.B.T @ k.delta())  # of the span of B's columns, which are orthonormal
        return [f"k_proj and v_proj have the same B: {k.B is v.B}; q_proj, of another width, another: {q.B is not k.B}",
                f"part of k_proj's change outside the span of B: {outside.norm() / k.delta().norm():.1e}; what lies "
                "there cannot be learned"]

    adapter.demonstrate(attach, facts, rank=4)
    adapter.demonstrate(attach_init, lambda q, k, v, later: [
        f"B^T B of k_proj is no longer I: off by {(k.B.T @ k.B - torch.eye(4)).norm():.2f}"], rank=4)
