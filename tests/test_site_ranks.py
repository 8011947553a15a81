"""The statistics behind ranks: exact tests against sums, Holm against hand and R, errors by simulation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest

from robustbench_cure.site.entries import Entry, ReportedAccuracy, _compared, _placed
from robustbench_cure.stats import DiscordantPairs, Rate, holm


def pairs(lost: int, gained: int) -> DiscordantPairs:
    return DiscordantPairs(1000, 500, 500 + gained - lost, lost, gained)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 2 / 2**5),
        (6, 0, 2 / 2**6),
        (1, 9, 2 * (1 + 10) / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
        (3, 3, 1.0),  # twice 42/64 is no probability
        (4, 3, 1.0),
    ],
)
def test_the_two_sided_test_by_hand(lost, gained, p):
    assert pairs(lost, gained).p_change() == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(("lost", "gained"), [(40, 25), (200, 3), (31, 31), (0, 60)])
def test_the_two_sided_test_is_the_sum_over_outcomes_as_unlikely(lost, gained):
    """The general definition, which does not use the symmetry of a fair coin."""
    n = lost + gained
    weights = [math.comb(n, k) for k in range(n + 1)]
    exact = Fraction(sum(w for w in weights if w <= weights[lost]), 2**n)
    assert pairs(lost, gained).p_change() == pytest.approx(float(exact), rel=1e-9)
    assert pairs(lost, gained).p_change() == pairs(gained, lost).p_change()


@pytest.mark.parametrize(
    ("given", "adjusted"),
    [
        # As R's p.adjust with the method of Holm gives them.
        ((0.01, 0.02, 0.03, 0.04), (0.04, 0.06, 0.06, 0.06)),
        ((0.01, 0.04, 0.03, 0.005), (0.03, 0.06, 0.06, 0.02)),
        ((0.04, 0.001, 0.5), (0.08, 0.003, 0.5)),
        ((0.5, 0.6), (1.0, 1.0)),
        ((0.02, 0.02), (0.04, 0.04)),
        ((0.3,), (0.3,)),
        ((), ()),
    ],
)
def test_holm_by_hand(given, adjusted):
    assert holm(given) == pytest.approx(adjusted, rel=1e-12)


def test_holm_keeps_the_order_follows_its_definition_and_lies_between_the_simple_ones():
    random = np.random.default_rng(0)
    for size in (2, 3, 7, 20):
        p = random.uniform(0, 0.2, size).round(2).tolist()  # with ties
        found = holm(p)
        assert [found[k] for k in np.argsort(p, kind="stable")] == sorted(found)
        assert all(a <= b <= min(1.0, size * a + 1e-12) for a, b in zip(p, found, strict=True))
        # As a step-down test at every level: reject while p(k) <= level / (m - k + 1).
        for level in (0.01, 0.05, 0.3, 0.9):
            rejected = 0
            for k, value in enumerate(sorted(p)):
                if value * (size - k) > level:
                    break
                rejected += 1
            assert sum(value <= level for value in found) == rejected
        order = random.permutation(size)
        assert holm([p[k] for k in order]) == [found[k] for k in order]


def test_standard_errors():
    assert Rate(50, 100).standard_error == pytest.approx(0.05)
    assert Rate(90, 100).standard_error == pytest.approx(0.03)
    assert Rate(0, 7).standard_error == 0
    assert math.isnan(Rate(0, 0).standard_error)


def row(name: str, stands: np.ndarray) -> Entry:
    none = ReportedAccuracy()
    return Entry("measured", name, none, "", none, len(stands), "", "", stands=stands)


def placed(rows: list[Entry]) -> list[tuple[int, int]]:
    found = _compared(rows)
    return [(r.rank_low, r.rank_high) for r in (_placed(row, found) for row in rows)]


def simulated(random: np.random.Generator, rates: list[float], n: int) -> list[Entry]:
    """Models of these true rates; images are hard or easy for all of them, as real ones are."""
    hard = random.normal(size=n)
    own = random.normal(size=(len(rates), n))
    score = 0.8 * hard + 0.6 * own  # standard normal
    cut = [NormalDist().inv_cdf(rate) for rate in rates]
    return [row(f"m{k}", score[k] < cut[k]) for k in range(len(rates))]


def test_one_row_is_first_and_none_is_none():
    assert placed([row("a", np.ones(4, bool))]) == [(1, 1)]
    assert placed([]) == []
    same = np.arange(200) % 2 == 0
    assert placed([row("a", same), row("b", same), row("c", same)]) == [(1, 3)] * 3


def test_equal_models_are_told_apart_in_at_most_one_of_twenty_leaderboards():
    random = np.random.default_rng(1)
    cut, runs, n, models = 0.3, 600, 120, 6
    wrong = 0
    for _ in range(runs):
        hard = random.normal(size=n)
        rows = [row(str(k), 0.8 * hard + 0.6 * random.normal(size=n) < cut) for k in range(models)]
        wrong += placed(rows) != [(1, models)] * models
    # Exact tests are conservative; three standard errors of 600 leaderboards are 2.7 points.
    assert wrong / runs <= 0.05 + 0.027
    # Without Holm's correction the same test would be wrong far more often: the bound above is not empty.
    random = np.random.default_rng(1)
    plain = 0
    for _ in range(200):
        hard = random.normal(size=n)
        stands = [0.8 * hard + 0.6 * random.normal(size=n) < cut for _ in range(models)]
        p = [DiscordantPairs.between(a, b).p_change() for a, b in itertools.combinations(stands, 2)]
        plain += min(p) <= 0.05
    assert plain / 200 > 2 * 0.05


def test_intervals_hold_the_true_rank_and_separate_models_that_differ():
    """Two pairs of equal models, 20 points apart: true ranks 1-2 and 3-4."""
    random = np.random.default_rng(2)
    apart = wrong = 0
    for _ in range(200):
        ranks = placed(simulated(random, [0.6, 0.6, 0.4, 0.4], 400))
        truth = [(1, 2), (1, 2), (3, 4), (3, 4)]
        apart += all(high <= 2 for _, high in ranks[:2]) and all(low >= 3 for low, _ in ranks[2:])
        held = zip(ranks, truth, strict=True)
        wrong += any(low > best or high < worst for (low, high), (best, worst) in held)
    assert apart >= 196
    assert wrong / 200 <= 0.05 + 0.046


def test_more_images_narrow_the_interval_and_the_order_of_rows_does_not_matter():
    random = np.random.default_rng(3)
    rows = simulated(random, [0.5, 0.45, 0.42, 0.3], 4000)
    few = [row(r.label, r.stands[:120]) for r in rows]
    wide = [high - low for low, high in placed(few)]
    narrow = [high - low for low, high in placed(rows)]
    assert sum(narrow) < sum(wide)
    for order in itertools.permutations(range(4)):
        shuffled = placed([few[k] for k in order])
        assert [shuffled[order.index(k)] for k in range(4)] == placed(few)
