"""SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation (arXiv 2409.00055).

Each pretrained weight is split by its SVD. The leading r triplets become three trainable factors, the rest is frozen,
and a penalty keeps the trainable singular vectors orthonormal while they move:

    W = U diag(S) V^T + W_r               the leading r triplets, and the residual of all others
    h = W_r x + U diag(S) V^T x
    minimise  L_train + (gamma / peak_lr) R
    R = 1/(2L) sum over the L adapted linears of ( ||U^T U - I||_F + ||V^T V - I||_F )         norms are not squared
    with E = M M^T - I for M = U^T or V^T:     d||E||_F / dM = 2 E M / ||E||_F, and 0 where E = 0

    letter          attribute   shape      start                    trains
    W_r             weight      (out, in)  W - U diag(S) V^T        no
    U               U           (out, r)   left singular vectors    yes
    S               S           (r,)       singular values          yes
    V^T             Vt          (r, in)    right singular vectors   yes
    U_0 S_0 V_0^T   U0 S0 Vt0   as above   the same                 no (to export, and to rebuild W_r without an SVD)

(The paper writes x W with W (in, out), so that its U is our V. The penalty treats both alike.)
Trainable parameters: r (in + out + 1) per adapted linear. Merge: W_r + U diag(S) V^T. Step 0 gives the base's output,
up to the rounding of W_r. As a LoRA on the original W the change is U diag(S) V^T - U_0 diag(S_0) V_0^T, of rank 2r.

gamma is 4e-4, peak_lr the highest rate of the schedule: a step of plain gradient descent at that rate moves by gamma
dR. AdamW normalises the sum of both gradients, so there gamma / peak_lr is the weight of the one against the other.

What the paper leaves open to us (we worked from its abstract, figures and code), and what we chose:
- R is a mean over the 2L norms, as in the authors' code; they write a sum (`reduction="sum"`), which is 2L times
  stronger and, with gamma = 4e-4, leaves the vectors where they are;
- R's gradient is not part of what is clipped: `regularize` adds it after clipping, once per optimizer step, also where
  a batch is cut into several backward passes;
- that gradient has length about 2 per norm however small E is. Once U and V are orthonormal up to rounding it follows
  the rounding: R does not reach 0, but a floor that falls with the learning rate;
- triplets of fp32 accuracy, never of a randomised SVD; signs fixed, scale 1, no dropout; S is not penalised.
"""
from typing import Literal

import torch

import adapter


class SORSALinear(adapter.AdaptedLinear):
    """weight + U diag(S) Vt, for one `nn.Linear`: takes the product of the given triplets out of the frozen weight."""

    def __init__(self, linear, U, S, Vt):
        super().__init__(linear)
        self.U, self.S, self.Vt = self.factor(U), self.factor(S), self.factor(Vt)  # (out, r), (r,), (r, in)
        self.register_buffer("U0", self.U.detach().clone())
        self.register_buffer("S0", self.S.detach().clone())
        self.register_buffer("Vt0", self.Vt.detach().clone())
        adapter.subtract(self.weight, self.U * self.S, self.Vt)

    def forward(self, x):
        U, S, Vt = self.U.to(x), self.S.to(x), self.Vt.to(x)
        h = self.base(x)  # W_r x, (..., out)
        h += ((x @ Vt.T) * S) @ U.T  # + U diag(S) V^T x
        return h

    def delta(self):
        """(out, in): the principal part W_p, what forward adds to `weight`. Not zero at step 0."""
        return (self.U * self.S) @ self.Vt

    def lora_factors(self):
        """(down (2r, in), up (out, 2r)): up @ down = W_p - its start, the change against the original weight."""
        return torch.cat((self.Vt, self.Vt0)), torch.cat((self.U * self.S, -self.U0 * self.S0), dim=1)


def attach(model, rank: int = 16, targets: list = adapter.TARGETS, svd: Literal["gram", "exact"] = "gram", saved=None):
    """Replace every target linear of `model` by a SORSALinear, in place; only the U, S and Vt train afterwards.

    `svd` is "gram" or "exact" (see `adapter.principal_triplets`). `saved`, an `adapter.state`, gives U0, S0 and Vt0 in
    place of an SVD. Raises ValueError on an unknown target, a rank outside 1 .. min(out, in), or a second attach.
    """
    linears = adapter.find_linears(model, targets, rank)
    starts = [start(name, linear, rank, svd, saved) for name, linear in linears]
    adapter.freeze(model)
    for (name, linear), triplets in zip(linears, starts):
        adapter.replace(model, name, SORSALinear(linear, *triplets))
    adapter.record(model, "sorsa", rank=rank, targets=list(targets), svd=svd)


def start(name, linear, rank, svd, saved):
    """U (out, r), S (r,) and Vt (r, in) at step 0, from the weight or from a saved state."""
    if saved is not None:
        return (adapter.saved_tensor(saved, f"{name}.U0", (linear.out_features, rank)),
                adapter.saved_tensor(saved, f"{name}.S0", (rank,)),
                adapter.saved_tensor(saved, f"{name}.Vt0", (rank, linear.in_features)))
    return adapter.principal_triplets(linear.weight, rank, svd)


def fit(model, params, targets=adapter.TARGETS):
    """{"rank": r}: the rank whose r (in + out + 1) parameters per linear come nearest to `params` in all."""
    linears = adapter.find_linears(model, targets)
    return adapter.nearest_rank(
        linears, params, lambda rank: rank * sum(m.in_features + m.out_features + 1 for _, m in linears))


# ---- the orthonormal regularizer: its definition, the fast form for training, and the call with its weight -----------

def regularizer(model, reduction: Literal["mean", "sum"] = "mean"):
    """R by its definition, a scalar that autograd can follow: ||M M^T - I||_F over every M = U^T and V^T.

    Raises ValueError where no SORSA layer is attached or `reduction` is unknown.
    """
    require_layers(model, reduction)
    norms = []
    for _, layer in adapter.adapted_layers(model):
        for M in (layer.U.T, layer.Vt):  # (r, out) and (r, in): rows that should be orthonormal
            with adapter.full_precision(M.device.type):
                M = M.to(torch.promote_types(M.dtype, torch.float32))  # also where the whole model was cast
                E = M @ M.T - torch.eye(len(M), device=M.device)  # (r, r)
                norms.append(torch.linalg.matrix_norm(E))
    return sum(norms) / len(norms) if reduction == "mean" else sum(norms)


@torch.no_grad()
def add_regularizer_grad(model, coefficient, reduction: Literal["mean", "sum"] = "mean"):
    """Add coefficient * dR to the `.grad` of every U and Vt, and return R (a tensor: nothing waits for a GPU).

    The closed form of the gradient of `regularizer`, matrices of one shape at a time, several times faster: for
    E = M M^T - I the gradient of ||E||_F is 2 E M / ||E||_F, and 0 where E = 0. Call it once per optimizer step, after
    clipping, with coefficient = gamma / peak_lr. Raises ValueError as `regularizer` does.
    """
    require_layers(model, reduction)
    stacks = {}  # {shape of M: [(factor, whether M is its transpose)]}, for one batched product each
    for _, layer in adapter.adapted_layers(model):
        stacks.setdefault(layer.U.T.shape, []).append((layer.U, True))
        stacks.setdefault(layer.Vt.shape, []).append((layer.Vt, False))
    share = 1 / sum(map(len, stacks.values())) if reduction == "mean" else 1.0  # 1/2L, or 1
    R = 0.0
    for stack in stacks.values():
        M = torch.stack([factor.T if turned else factor for factor, turned in stack])  # (n, r, d)
        M = M.to(torch.promote_types(M.dtype, torch.float32))
        with adapter.full_precision(M.device.type):
            E = torch.bmm(M, M.mT) - torch.eye(M.shape[1], device=M.device)  # (n, r, r)
            norm = torch.linalg.vector_norm(E, dim=(1, 2), keepdim=True)  # (n, 1, 1)
            dM = torch.bmm(torch.where(norm > 0, 2 * share * coefficient / norm, 0.0) * E, M)  # (n, r, d)
        R = R + share * norm.sum()
        for (factor, turned), gradient in zip(stack, dM):
            gradient = gradient.T if turned else gradient
            if factor.grad is None:
                factor.grad = torch.zeros_like(factor)
            factor.grad += gradient
    return R


def regularize(model, peak_lr, gamma: float = 4e-4, reduction: Literal["mean", "sum"] = "mean"):
    """Add (gamma / peak_lr) dR to the gradients and return R; None for gamma = 0, which leaves the gradients alone."""
    return add_regularizer_grad(model, gamma / peak_lr, reduction) if gamma else None


def require_layers(model, reduction):
    """ValueError unless there are SORSA layers, and `reduction` is one of the two."""
    if not any(isinstance(layer, SORSALinear) for _, layer in adapter.adapted_layers(model)):
        raise ValueError("this model has no SORSA layers: attach them first with sorsa.attach(model)")
    adapter.check_choice("reduction", reduction, ("mean", "sum"))


METHODS = {"sorsa": adapter.Method(
    attach, learning_rate=1e-4, fit=fit, regularize=regularize,
    help={"svd": "how the start is computed", "gamma": "weight of the regularizer, 0 is off",
          "reduction": "of the regularizer's norms"})}

if __name__ == "__main__":
    for gamma in (0.0, 4e-4):
        print(f"gamma = {gamma:g}")
        adapter.demonstrate(attach, lambda q, k, v, later: [
            f"q_proj's S: {' '.join(f'{s:.2f}' for s in q.S0)} -> {' '.join(f'{s:.2f}' for s in q.S)}",
            f"R of q_proj, how far U and V are from orthonormal: {regularizer(q):.1e}"],
            regularize=lambda model: regularize(model, 1e-2, gamma), rank=4)
