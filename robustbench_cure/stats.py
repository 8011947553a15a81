"""Statistics of counts: intervals, exact paired tests, and the samples that they need. SciPy does the work.

Sources: Wilson 1927 (interval of a rate); McNemar 1947 in its exact form (among the samples on which two runs
disagree, a change of nothing falls either way with probability 1/2); Tango 1998, Statistics in Medicine 17,
891-908 (score interval of a difference of paired proportions); Holm 1979, Scandinavian Journal of Statistics
6, 65-70 (many tests at once).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # SciPy takes half a second, and commands that count nothing do without it
    import numpy as np
    from numpy.typing import NDArray


#: Confidence level of every printed interval.
CONFIDENCE = 0.95
#: Sizes beyond which no answer is worth having.
LARGEST = 10_000_000
#: Chance with which a run of the size that is asked for decides.
POWER = 0.9
#: Share of the samples that another seed or rounding is expected to flip each way; measured in docs/gate.md.
NOISE = 0.005


@dataclass(frozen=True)
class Rate:
    """A count out of a total, with its Wilson interval; rates lie in [0, 1].

    Attributes:
        count: successes.
        total: trials; 0 gives a rate that is not a number and the interval [0, 1].
    """

    count: int
    total: int

    @property
    def value(self) -> float:
        """The rate itself, count / total."""
        return self.count / self.total if self.total else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval (Wilson 1927), without continuity correction."""
        return _wilson(self.count, self.total) if self.total else (0.0, 1.0)

    @property
    def standard_error(self) -> float:
        """Standard error of the rate, sqrt(p (1 - p) / total); not a number for a rate out of nothing."""
        return sqrt(self.value * (1 - self.value) / self.total) if self.total else float("nan")


@cache
def _wilson(count: int, total: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    found = binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return (float(found.low), float(found.high))


def upper_bound(count: int, total: int) -> float:
    """Exact one-sided 95 % upper bound of a rate (Clopper & Pearson 1934); 1 without trials.

    Args:
        count: successes seen.
        total: trials.
    """
    from scipy.stats import beta

    return float(beta.ppf(CONFIDENCE, count + 1, total - count)) if count < total else 1.0


@dataclass(frozen=True)
class DiscordantPairs:
    """How a yes-or-no of each sample changed between two runs.

    Attributes:
        n: samples that both runs have.
        before: samples that held in the baseline.
        after: samples that hold now.
        lost: held before, not now.
        gained: hold now, not before.
    """

    n: int
    before: int
    after: int
    lost: int
    gained: int

    @classmethod
    def between(cls, before: NDArray[np.bool_], after: NDArray[np.bool_]) -> DiscordantPairs:
        """Count them.

        Args:
            before: bool (n,), the baseline.
            after: bool (n,), the same samples now.
        """
        lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
        return cls(len(before), int(before.sum()), int(after.sum()), lost, gained)

    @property
    def change(self) -> float:
        """Accuracy now minus accuracy before, in [-1, 1]."""
        return (self.gained - self.lost) / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % score interval of the change (Tango 1998), in [-1, 1]; all of it without samples.

        Not a point even where nothing flipped: then it is plus and minus z² / (n + z²).
        """
        if not self.n:
            return (-1.0, 1.0)
        from scipy.stats import norm

        z = float(norm.isf((1 - CONFIDENCE) / 2))
        low = 0.0 - _end(self.lost, self.gained, self.n, z)
        return (low, _end(self.gained, self.lost, self.n, z))

    @property
    def p_fall(self) -> float:
        """Exact one-sided p-value of a fall."""
        return tail(self.lost, self.gained)

    @property
    def p_rise(self) -> float:
        """Exact one-sided p-value of a rise."""
        return tail(self.gained, self.lost)

    def p_change(self, before: int = 0, after: int = 0) -> float:
        """Exact two-sided p-value of a change: twice the smaller one-sided p-value, at most 1.

        Args:
            before: samples of the baseline that may not hold after all: the worst case for a claim that it is
                better is that all of them are among those lost.
            after: likewise of the samples that hold now, among those gained.
        """
        fall = tail(max(self.lost - before, 0), self.gained)
        rise = tail(max(self.gained - after, 0), self.lost)
        return min(1.0, 2 * min(fall, rise))

    def fell_beyond(self, tolerance: Fraction) -> bool:
        """Whether more was lost, net, than the tolerance allows; exact arithmetic."""
        return self.lost - self.gained > tolerance * self.n

    def rose_beyond(self, tolerance: Fraction) -> bool:
        """Whether more was gained, net, than the tolerance; exact arithmetic."""
        return self.gained - self.lost > tolerance * self.n

    def decides_at(self, tolerance: Fraction, level: float) -> int | None:
        """Samples with which these rates of discordant pairs are decided, not inconclusive.

        Args:
            tolerance: of the accuracy, a share.
            level: of the test.

        Returns:
            The number, more than n: the gate decides with a chance of `POWER`. None: not even with `LARGEST`.
        """
        lose, gain = self.lost / self.n, self.gained / self.n
        return _smallest(lambda n: chances(n, lose, gain, tolerance, level).unclear <= 1 - POWER, self.n + 1)


class Chances(NamedTuple):
    """Chances that a fall is not seen, not decided, or called a regression; they add up to 1."""

    held: float
    unclear: float
    fell: float


@lru_cache(maxsize=100_000)
def tail(more: int, fewer: int) -> float:
    """Chance of at least ``more`` heads among ``more + fewer`` even tosses; 1 without any."""
    from scipy.stats import binomtest

    pairs = more + fewer
    return float(binomtest(more, pairs, alternative="greater").pvalue) if pairs else 1.0


def holm(pvalues: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's method: those at most `a` are significant with family-wise error `a`.

    The k-th smallest of m is multiplied by m - k + 1, and is at least as large as those before it; valid
    however the tests depend on each other.

    Args:
        pvalues: of one family of tests, each in [0, 1].

    Returns:
        The adjusted ones in the order given, each in [0, 1].
    """
    adjusted, largest = [0.0] * len(pvalues), 0.0
    for place, k in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        largest = max(largest, min(1.0, (len(pvalues) - place) * pvalues[k]))
        adjusted[k] = largest
    return adjusted


def chances(n: int, lose: float, gain: float, tolerance: Fraction, level: float) -> Chances:
    """What the gate says of a fall, exactly, when every sample is lost or gained by a chance of its own.

    Args:
        n: samples.
        lose: chance that a sample is lost.
        gain: chance that a sample is gained; the true change is gain - lose.
        tolerance: share of the samples whose net loss is tolerated.
        level: of the test.
    """
    import numpy as np
    from scipy.stats import binom

    flip = lose + gain
    if not flip:
        return Chances(1.0, 0.0, 0.0)
    flips = np.arange(max(0, int(binom.ppf(1e-10, n, flip))), min(n, int(binom.isf(1e-10, n, flip))) + 1)
    weight = binom.pmf(flips, n, flip)
    # Of so many flips, this many losses are a net loss beyond the tolerance, and this many are beyond chance.
    slack, unit = int(tolerance * n * tolerance.denominator), tolerance.denominator
    beyond = (slack + flips * unit) // (2 * unit) + 1
    sure = binom.isf(level, flips, 0.5).astype(int) + 1
    seen = float(weight @ binom.sf(beyond - 1, flips, lose / flip))
    fell = float(weight @ binom.sf(np.maximum(beyond, sure) - 1, flips, lose / flip))
    return Chances(1 - seen, seen - fell, fell)


def sample_size(tolerance: Fraction, level: float) -> int:
    """Samples with which a fall of twice the tolerance is called a regression, with a chance of `POWER`.

    Args:
        tolerance: share of the samples, in (0, 0.25).
        level: of the test.

    Returns:
        The number, for a network that loses 2 * tolerance and on top flips `NOISE` of its samples each way.

    Raises:
        ValueError: it would take more than `LARGEST`.
    """
    lose = 2 * float(tolerance) + NOISE
    n = _smallest(lambda n: chances(n, lose, NOISE, tolerance, level).fell >= POWER, 1)
    if n is None:
        raise ValueError(
            f"a tolerance of {100 * float(tolerance):g} points would take over {LARGEST:,} samples"
        )
    return n


def _smallest(enough: Callable[[int], bool], start: int) -> int | None:
    """A number that is enough while the one before is not, by doubling and halving; None beyond `LARGEST`."""
    low, high = start - 1, start
    while not enough(high):
        low, high = high, 2 * high
        if low >= LARGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _end(up: int, down: int, n: int, z: float) -> float:
    """Upper end of the score interval of (up - down) / n: the difference that is z standard errors away.

    The standard error is that of the likeliest probabilities with this difference; `share` is the one of
    a step down, the root of Tango's equation 4.
    """
    from scipy.optimize import brentq

    def score(difference: float) -> float:
        b = (2 * n - up + down) * difference - up - down
        root = b * b + 8 * n * down * difference * (1 - difference)
        share = (sqrt(max(root, 0.0)) - b) / (4 * n)
        spread = n * (2 * share + difference * (1 - difference))
        return (n * difference - up + down) / sqrt(max(spread, 1e-300)) - z

    estimate = (up - down) / n
    if estimate == 1:
        return 1.0
    return float(brentq(score, max(estimate, -1 + 1e-12), 1 - 1e-12))
