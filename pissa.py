"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (arXiv 2404.02948).

LoRA with another start. The leading r singular triplets of W become the trainable factors, the rest stays frozen:

    W = U diag(S) V^T + W_res                 the leading r triplets, and the residual of all others
    h = W_res x + B A x,                      B A = U diag(S) V^T at the start: A = diag(sqrt S) V^T, B = U diag(sqrt S)

    letter   attribute   shape      start                 trains
    W_res    weight      (out, in)  W - B A               no
    A        A           (r, in)    diag(sqrt S) V^T      yes
    B        B           (out, r)   U diag(sqrt S)        yes
    A_0 B_0  A0, B0      as A, B    copies of the start   no (kept to export and to rebuild W_res without an SVD)

Trainable parameters: r (in + out), as LoRA. Merge: W_res + B A. At step 0 the output is the base model's.
As a LoRA on the original W the change is B A - B_0 A_0, a product of rank 2r.

What is left open, and what we chose: scale 1, no alpha; the exact triplets (a randomised SVD is only nearly principal
on these slowly decaying spectra); the residual is formed from the factors as stored, so their rounding costs nothing.
Where a singular value is 0, its row of A and column of B are 0 too, and never move.
"""
from typing import Literal

import torch

import adapter
from lora import LoRALinear, fit


class PiSSALinear(LoRALinear):
    """A LoRALinear that starts from A, B instead of zero and takes their product out of the frozen weight."""

    def __init__(self, linear, A, B):
        super().__init__(linear, A, B)
        self.register_buffer("A0", self.A.detach().clone())  # (r, in)
        self.register_buffer("B0", self.B.detach().clone())  # (out, r)
        adapter.subtract(self.weight, self.B, self.A)

    def lora_factors(self):
        """(down (2r, in), up (out, 2r)): up @ down = B A - B_0 A_0, the change against the original weight."""
        return torch.cat((self.A, self.A0)), torch.cat((self.B, -self.B0), dim=1)


def attach(model, rank: int = 16, targets: list = adapter.TARGETS, svd: Literal["gram", "exact"] = "gram", saved=None):
    """Replace every target linear of `model` by a PiSSALinear, in place; only the A and B train afterwards.

    `svd` is "gram" or "exact" (see `adapter.principal_triplets`). `saved`, an `adapter.state`, gives A0 and B0 in place
    of an SVD. Raises ValueError on an unknown target, a rank outside 1 .. min(out, in), or a second attach.
    """
    linears = adapter.find_linears(model, targets, rank)
    starts = [start(name, linear, rank, svd, saved) for name, linear in linears]
    adapter.freeze(model)
    for (name, linear), factors in zip(linears, starts):
        adapter.replace(model, name, PiSSALinear(linear, *factors))
    adapter.record(model, "pissa", rank=rank, targets=list(targets), svd=svd)


def start(name, linear, rank, svd, saved):
    """A (r, in) and B (out, r) at step 0, from the weight or from a saved state."""
    if saved is not None:
        return (adapter.saved_tensor(saved, f"{name}.A0", (rank, linear.in_features)),
                adapter.saved_tensor(saved, f"{name}.B0", (linear.out_features, rank)))
    U, S, Vt = adapter.principal_triplets(linear.weight, rank, svd)
    return S.sqrt()[:, None] * Vt, U * S.sqrt()


METHODS = {"pissa": adapter.Method(attach, learning_rate=3e-4, fit=fit, help={"svd": "how the start is computed"})}

if __name__ == "__main__":
    adapter.demonstrate(attach, lambda q, k, v, later: [
        f"singular values in q_proj's factors at the start: {' '.join(f'{s:.2f}' for s in q.A0.norm(dim=1) ** 2)}",
        f"largest one left in the residual: {torch.linalg.svdvals(q.weight)[0]:.2f}"], rank=4)
