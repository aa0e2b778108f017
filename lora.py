"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).

The change of a weight is learned as a product of two thin matrices; the weight itself never moves:

    h = W x + (alpha / r) B A x

    letter      attribute   shape      start                            trains
    W           weight      (out, in)  pretrained                       no
    A           A           (r, in)    uniform in +-1/sqrt(in)          yes
    B           B           (out, r)   zeros, so step 0 is the base     yes
    alpha / r   scale       a number   1                                no

Trainable parameters: r (in + out) per adapted linear. Merge: W + (alpha / r) B A.
First step (dA means dL/dA; dW is that of W with its change, (out, in)): B = 0 makes dA = scale B^T dW = 0, while
dB = scale dW A^T is not; from the second step on both move.

What is left open, and what we chose: the paper draws A from a Gaussian, implementations use the uniform distribution
above (Kaiming with a = sqrt 5) and so do we; alpha = r unless given; no dropout.
"""
import torch

import adapter


class LoRALinear(adapter.AdaptedLinear):
    """weight + scale B A, for one `nn.Linear`. A and B are fp32, and cast to x's dtype where they meet it."""

    def __init__(self, linear, A, B, scale=1.0):
        super().__init__(linear)
        self.A = self.factor(A)  # (r, in)
        self.B = self.factor(B)  # (out, r)
        self.scale = scale  # alpha / r

    def forward(self, x):
        A, B = self.A.to(x), self.B.to(x)
        h = self.base(x)  # (..., out)
        h.add_((x @ A.T) @ B.T, alpha=self.scale)  # in place: one tensor of this size less
        return h

    def delta(self):
        """(out, in): what forward adds to `weight`."""
        return self.scale * self.B @ self.A

    def lora_factors(self):
        """(down (r, in), up (out, r)): up @ down is the change against the original weight."""
        return self.A, self.scale * self.B


def attach(model, rank: int = 16, alpha: float | None = None, targets: list = adapter.TARGETS, seed: int = 0,
           saved=None):
    """Replace every target linear of `model` by a LoRALinear, in place; only the A and B train afterwards.

    `alpha=None` means alpha = rank. `seed` draws A, on the CPU, so that every device gets the same. `saved`, an
    `adapter.state` that is to be filled in, must have this rank.
    Raises ValueError on an unknown target, a rank outside 1 .. min(out, in), an alpha of 0 or less, or a second attach.
    """
    linears = adapter.find_linears(model, targets, rank)
    scale = adapter.scaling(alpha, rank)
    adapter.check_saved(saved, {f"{name}.A": (rank, linear.in_features) for name, linear in linears})
    adapter.freeze(model)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears:
        A = adapter.uniform_factor(rank, linear.in_features, generator)  # (r, in)
        B = torch.zeros(linear.out_features, rank)  # (out, r)
        adapter.replace(model, name, LoRALinear(linear, A, B, scale))
    adapter.record(model, "lora", rank=rank, alpha=alpha, targets=list(targets), seed=seed)


def fit(model, params, targets=adapter.TARGETS):
    """{"rank": r}: the rank whose r (in + out) parameters per linear come nearest to `params` in all."""
    linears = adapter.find_linears(model, targets)
    return adapter.nearest_rank(
        linears, params, lambda rank: rank * sum(m.in_features + m.out_features for _, m in linears))


METHODS = {"lora": adapter.Method(attach, learning_rate=3e-3, fit=fit)}

if __name__ == "__main__":
    adapter.demonstrate(attach, lambda q, k, v, later: [
        f"rank of q_proj's change: {torch.linalg.matrix_rank(q.delta())} of {min(q.weight.shape)}"], rank=4)
