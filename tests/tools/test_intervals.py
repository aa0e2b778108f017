"""Intervals and tests against tables of Student's t, their own promise of coverage, and binomials counted by hand."""
import numpy as np
import pytest

from tools.intervals import mcnemar, over_seeds, paired, t_quantile


@pytest.mark.parametrize("freedom, t", [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (511, 1.96463)])
def test_quantiles_of_student(freedom, t):
    """As printed in tables."""
    assert t_quantile(0.975, freedom) == pytest.approx(t, rel=2e-4)


@pytest.mark.parametrize("seed_part, example_part", [(1.0, 0.0), (0.0, 1.0), (0.1, 1.0), (0.0, 0.0)])
def test_the_interval_covers_the_truth(seed_part, example_part):
    """Where seeds differ, where examples do, where both or only their combinations: 95 times in 100 or a little more."""
    random, inside, trials = np.random.default_rng(0), 0, 4000
    for _ in range(trials):
        d = 0.3 + seed_part * random.normal(size=(3, 1)) + example_part * random.normal(size=(1, 60)) + random.normal(size=(3, 60))
        interval = paired(d)
        inside += interval.low <= 0.3 <= interval.high
    assert 0.943 * trials <= inside


def test_an_interval_by_hand():
    """Two seeds, four examples, written out; with one seed the examples alone count."""
    d = np.array([[1.0, 2.0, 3.0, 6.0], [2.0, 3.0, 4.0, 3.0]])
    d[1] += 1
    V_s, V_e = np.var([3.0, 4.0], ddof=1) / 2, np.var([2.0, 3.0, 4.0, 5.0], ddof=1) / 4
    interval = paired(d)
    assert (interval.mean, interval.seeds) == (3.5, 2)
    assert interval.high == pytest.approx(3.5 + (12.7062 ** 2 * V_s + 3.18245 ** 2 * V_e) ** 0.5, rel=1e-4)
    assert interval.low == pytest.approx(7 - interval.high)
    one = paired(d[:1])
    assert one.seeds == 1 and one.high - one.mean == pytest.approx(3.18245 * np.std(d[0], ddof=1) / 2, rel=1e-4)
    assert not paired(d - 3).sure and paired(d + 9).sure and paired(d - 12).sure
    assert str(one) == f"+3.0000 [{one.low:+.4f}, {one.high:+.4f}], 1 seed" and "seed" not in str(interval)
    several = paired(d[:1], comparisons=5)  # t for 99 %, of three degrees of freedom
    assert several.high - several.mean == pytest.approx(5.84091 * np.std(d[0], ddof=1) / 2, rel=1e-4)
    seeds = over_seeds([1.0, 2.0, 6.0])
    assert seeds.mean == 3 and seeds.high - 3 == pytest.approx(4.30265 * np.std([1, 2, 6], ddof=1) / 3 ** 0.5, rel=1e-4)
    assert seeds.low == pytest.approx(6 - seeds.high) and not over_seeds([1.0]).sure
    looks = over_seeds([1.0, 2.0, 6.0], comparisons=5)  # t for 99 %, of two degrees of freedom
    assert looks.high - 3 == pytest.approx(9.92484 * np.std([1, 2, 6], ddof=1) / 3 ** 0.5, rel=1e-4)


@pytest.mark.parametrize("a, b, expected", [
    ("1100", "1010", (1, 1, 1.0)), ("111110", "000000", (5, 0, 2 / 32)), ("1010", "1010", (0, 0, 1.0)),
    ("11110", "00001", (4, 1, 12 / 32))])
def test_mcnemar(a, b, expected):
    """The binomial's two tails, from what only one of them has right."""
    assert mcnemar([c == "1" for c in a], [c == "1" for c in b]) == expected
