"""SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation (arXiv 2409.00055).

Each pretrained weight is split by its SVD. The leading r triplets become three trainable factors, the rest is frozen,
and a penalty keeps the trainable singular vectors orthonormal while they move:

    W   = U diag(S) V^T + W_r               the leading r triplets, and the residual of all others
    h   = W_r x + U diag(S) V^T x
    R   = 1/2L sum over L layers of ( ||U^T U - I||_F + ||V^T V - I||_F )               norms are not squared
    loss = L_train + (gamma / peak_lr) R

    letter     attribute     shape      start                    trains
    W_r        weight        (out, in)  W - U diag(S) V^T        no
    U          U             (out, r)   left singular vectors    yes
    S          S             (r,)       singular values          yes
    V^T        Vt            (r, in)    right singular vectors   yes
    U_0 S_0 V_0^T   U0 S0 Vt0           copies of the start      no (kept to export and to rebuild W_r without an SVD)

(The paper multiplies from the right, x W: its U is our V. The penalty treats both alike, nothing else changes.)
Trainable parameters: r (in + out + 1) per adapted linear. Merge: W_r + U diag(S) V^T. Step 0 gives the base's output.
As a LoRA on the original W the change is U diag(S) V^T - U_0 diag(S_0) V_0^T, a product of rank 2r.

What the paper leaves open to us (we worked from its abstract, figures and code), and what we chose:
- the penalty is the mean over all 2L norms, as in the authors' code; the sum that they write is 2L times stronger and,
  with the published gamma, freezes the vectors: `reduction="sum"`;
- its gradient joins that of the training loss after clipping, once per optimizer step however the batch is cut;
- norms that are not squared pull with constant strength: the gradient of ||E||_F has length about 2 however small E is,
  so near orthonormality it follows rounding noise, and R settles at a floor that falls with the learning rate. AdamW
  normalises the sum of both gradients, which makes gamma / peak_lr a relative weight;
- exact triplets, signs fixed, scale 1, no dropout, factors in fp32 whatever the model's dtype; S is not penalised.
"""
import torch
import torch.nn as nn

import adapter


class SORSALinear(adapter.AdaptedLinear):
    """weight + U diag(S) Vt, for one `nn.Linear`: takes the product of the given triplets out of the frozen weight."""

    def __init__(self, linear, U, S, Vt):
        super().__init__(linear)
        U, S, Vt = (factor.to(self.weight.device, torch.float32) for factor in (U, S, Vt))  # (out, r), (r,), (r, in)
        self.U, self.S, self.Vt = nn.Parameter(U), nn.Parameter(S), nn.Parameter(Vt)
        self.register_buffer("U0", U.clone())
        self.register_buffer("S0", S.clone())
        self.register_buffer("Vt0", Vt.clone())
        adapter.subtract(self.weight, self.delta())

    def forward(self, x):
        return self.plus(x, self.Vt, self.U * self.S)  # W_r x + U diag(S) Vt x, (..., out)

    def factors(self):
        """What forward multiplies by, beside `weight`."""
        return self.Vt, self.U

    def delta(self):
        """(out, in): the principal part W_p, what forward adds to `weight`. Not zero at step 0."""
        return (self.U * self.S) @ self.Vt

    def lora_factors(self):
        """(down (2r, in), up (out, 2r)): up @ down = W_p - its start, the change against the original weight."""
        return torch.cat((self.Vt, self.Vt0)), torch.cat((self.U * self.S, -self.U0 * self.S0), dim=1)


def attach(model, rank=16, targets=adapter.TARGETS, svd="gram", saved=None):
    """Replace every target linear of `model` by a SORSALinear, in place; only the U, S and Vt train afterwards.

    `svd` is "gram" or "exact" (see `adapter.principal_triplets`). `saved`, the tensors of an adapter file, gives U0, S0
    and Vt0 in place of an SVD. Raises ValueError on an unknown target, a rank outside 1 .. min(out, in), or a second
    attach.
    """
    linears = adapter.find_linears(model, targets, rank)
    starts = [start(name, linear, rank, svd, saved) for name, linear in linears]
    adapter.freeze(model)
    for (name, linear), triplets in zip(linears, starts):
        adapter.replace(model, name, SORSALinear(linear, *triplets))
    adapter.record(model, "sorsa", rank=rank, targets=list(targets), svd=svd)


def start(name, linear, rank, svd, saved):
    """U (out, r), S (r,) and Vt (r, in) at step 0, from the weight or from an adapter file's tensors."""
    if saved is not None:
        return (adapter.saved_tensor(saved, f"{name}.U0", (linear.out_features, rank)),
                adapter.saved_tensor(saved, f"{name}.S0", (rank,)),
                adapter.saved_tensor(saved, f"{name}.Vt0", (rank, linear.in_features)))
    return adapter.principal_triplets(linear.weight, rank, svd)


def fit(model, params, targets=adapter.TARGETS):
    """{"rank": r}: the rank whose r (in + out + 1) parameters per linear come nearest to `params` in all."""
    linears = adapter.find_linears(model, targets, rank=1)
    return adapter.nearest_rank(linears, params, lambda rank: rank * sum(sum(m.weight.shape) + 1 for _, m in linears))


# ---- the orthonormal regularizer ------------------------------------------------------------------------------------

def _stacks(model):
    """The 2L matrices M that should have orthonormal rows, U^T and Vt, in lists of equal shape (r, d).

    Each is a pair (parameter, transpose), where M = parameter.T if transpose else parameter.
    """
    stacks = {}
    for _, layer in adapter.adapted_layers(model):
        stacks.setdefault(layer.U.T.shape, []).append((layer.U, True))
        stacks.setdefault(layer.Vt.shape, []).append((layer.Vt, False))
    return list(stacks.values())


def _deviation(stack):
    """M (n, r, d) and E = M M^T - I (n, r, r): how far the rows of each M are from orthonormal."""
    M = torch.stack([parameter.T if transpose else parameter for parameter, transpose in stack])  # (n, r, d)
    return M, torch.bmm(M, M.mT) - torch.eye(M.shape[1], device=M.device)


def _share(stacks, reduction):
    """What one norm counts in R: 1/2L for the mean over all matrices, 1 for the sum."""
    if not stacks:
        raise ValueError("this model has no SORSA layers: attach them first with sorsa.attach(model)")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}: choose mean or sum")
    return 1 / sum(map(len, stacks)) if reduction == "mean" else 1.0


def regularizer(model, reduction="mean"):
    """R, an fp32 scalar that autograd can follow: the readable form. Training uses the closed form below."""
    stacks = _stacks(model)
    share = _share(stacks, reduction)
    with adapter.full_precision(stacks[0][0][0].device.type):
        norms = [torch.linalg.vector_norm(_deviation(stack)[1], dim=(1, 2)) for stack in stacks]  # (n,) each
        return share * torch.cat(norms).sum()


@torch.no_grad()
def add_regularizer_grad(model, coefficient, reduction="mean"):
    """Add coefficient * dR to the `.grad` of every U and Vt, and return R (a tensor, so that nothing waits for a GPU).

    The gradient of ||E||_F for E = M M^T - I is 2 E M / ||E||_F, and 0 where E = 0. Call it once per optimizer step,
    after clipping, with coefficient = gamma / peak_lr.
    """
    stacks = _stacks(model)
    share, R = _share(stacks, reduction), 0.0
    with adapter.full_precision(stacks[0][0][0].device.type):
        for stack in stacks:
            M, E = _deviation(stack)
            norm = torch.linalg.vector_norm(E, dim=(1, 2), keepdim=True)  # (n, 1, 1)
            R = R + share * norm.sum()
            factor = torch.where(norm > 0, 2 * share * coefficient / norm, 0.0)  # (n, 1, 1)
            for (parameter, transpose), dM in zip(stack, torch.bmm(factor * E, M)):
                gradient = dM.T if transpose else dM
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
    return R


if __name__ == "__main__":
    adapter.demonstrate(attach, rank=4)
