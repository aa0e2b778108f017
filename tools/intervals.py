"""How sure a difference between two methods is: an interval over seeds and examples, and McNemar's test on answers.

Two methods are trained with the same seeds, so on the same data in the same order, and measured on the same examples.
With d[s, i] the difference of their losses on example i after training with seed s,

    d[s, i] = mean + seed_s + example_i + rest          seeds and examples are both drawn from many
    V_s = variance of the S means over examples / S     how far the mean would move with other seeds
    V_e = variance of the N means over seeds / N        and with other examples
    mean +- sqrt(t_s^2 V_s + t_e^2 V_e)                 Student's t for S - 1 and for N - 1 degrees of freedom

Each part has its own t: three seeds say little about how much seeds matter, and t_s = 4.3 says so. The rest is counted
in both, which makes the interval too wide rather than too narrow.
"""
import functools
import math
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A difference with its 95 % interval; `seeds` is how many there were: with one, the interval is over examples."""
    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self):
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]" + f", {self.seeds} seed" * (self.seeds == 1)

    @property
    def sure(self):
        """Whether zero is outside."""
        return self.low > 0 or self.high < 0


def paired(d, comparisons=1):
    """The Interval of the mean of differences d (seeds, examples). As one of several comparisons (Bonferroni): with
    their number, all the intervals together cover the truth 95 times in 100."""
    d = np.asarray(d, dtype=float)
    S, N = d.shape
    p = 1 - 0.025 / comparisons
    square = t_quantile(p, N - 1) ** 2 * d.mean(0).var(ddof=1) / N
    if S > 1:
        square += t_quantile(p, S - 1) ** 2 * d.mean(1).var(ddof=1) / S
    reach = math.sqrt(square)
    return Interval(d.mean(), d.mean() - reach, d.mean() + reach, S)


def over_seeds(d, comparisons=1):
    """The Interval of the mean of differences d (seeds,), where there is one number per seed; comparisons: as above."""
    d = np.asarray(d, dtype=float)
    p = 1 - 0.025 / comparisons
    reach = t_quantile(p, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.inf
    return Interval(d.mean(), d.mean() - reach, d.mean() + reach, len(d))


@functools.cache
def t_quantile(p, freedom):
    """The t below which Student's distribution has the probability p > 1/2."""
    def beyond(t):  # the probability between 0 and t, by Simpson's rule
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        x = np.linspace(0, t, 2001)
        y = scale * (1 + x ** 2 / freedom) ** (-(freedom + 1) / 2)
        return t / 6000 * (y[0] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum() + y[-1])

    low, high = 0.0, 1.0
    while beyond(high) < p - 0.5:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond(middle) < p - 0.5 else (low, middle)
    return high


def mcnemar(right_a, right_b):
    """(only a right, only b right, the exact two-sided p that both are as often right) for two lists of truth values on
    the same problems."""
    only_a = sum(a and not b for a, b in zip(right_a, right_b, strict=True))
    only_b = sum(b and not a for a, b in zip(right_a, right_b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2 ** n
    return only_a, only_b, min(1.0, 2 * tail)
