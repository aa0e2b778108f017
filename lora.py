"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).

The change of a weight is learned as a product of two thin matrices; the weight itself never moves:

    h = W x + s B A x,      s = alpha / r

    letter   attribute   shape      start                            trains
    W        weight      (out, in)  pretrained                       no
    A        A           (r, in)    uniform in +-1/sqrt(in)          yes
    B        B           (out, r)   zeros, so step 0 is the base     yes

Trainable parameters: r (in + out) per adapted linear. Merge: W + s B A.
First step (d: the gradient of the loss): B = 0 makes dA = s B^T dW = 0, while dB = s dW A^T is not; then both move.

What is left open, and what we chose: the paper draws A from a Gaussian, implementations use the uniform distribution
above (Kaiming with a = sqrt 5) and so do we; alpha = r, so s = 1, unless given; no dropout.
"""
import torch
import torch.nn as nn

import adapter


class LoRALinear(adapter.AdaptedLinear):
    """weight + scale * B A, for one `nn.Linear`. Factors are fp32 on the weight's device, cast to x's dtype at use."""

    def __init__(self, linear, A, B, scale=1.0):
        super().__init__(linear)
        self.A = nn.Parameter(A.float().to(self.weight.device))  # (r, in)
        self.B = nn.Parameter(B.float().to(self.weight.device))  # (out, r)
        self.scale = scale

    def forward(self, x):
        return self.plus(x, self.A, self.scale * self.B)  # W x + (alpha / r) B A x, (..., out)

    def factors(self):
        """What forward multiplies by, beside `weight`."""
        return self.A, self.B

    def delta(self):
        """(out, in): what forward adds to `weight`."""
        return self.scale * (self.B @ self.A)

    def lora_factors(self):
        """(down (r, in), up (out, r)): up @ down is the change against the original weight."""
        return self.A, self.scale * self.B


def attach(model, rank=16, alpha=None, targets=adapter.TARGETS, seed=0, saved=None):
    """Replace every target linear of `model` by a LoRALinear, in place; only the A and B train afterwards.

    `alpha=None` means alpha = rank. `seed` draws A, on the CPU, so that every device gets the same. `saved` is part of
    every attach (the tensors of an adapter file); LoRA's start needs none of it.
    Raises ValueError on an unknown target, a rank outside 1 .. min(out, in), or a second attach.
    """
    linears = adapter.find_linears(model, targets, rank)
    adapter.freeze(model)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears:
        A = adapter.uniform_factor(rank, linear.in_features, generator)  # (r, in)
        B = torch.zeros(linear.out_features, rank)  # (out, r)
        scale = (rank if alpha is None else alpha) / rank
        adapter.replace(model, name, LoRALinear(linear, A, B, scale))
    adapter.record(model, "lora", rank=rank, alpha=alpha, targets=list(targets), seed=seed)


def fit(model, params, targets=adapter.TARGETS):
    """{"rank": r}: the rank whose r (in + out) parameters per linear come nearest to `params` in all."""
    linears = adapter.find_linears(model, targets, rank=1)
    return adapter.nearest_rank(linears, params, lambda rank: rank * sum(sum(m.weight.shape) for _, m in linears))


if __name__ == "__main__":
    adapter.demonstrate(attach, rank=4)
