"""Two verdicts on the same samples: flips, McNemar's exact test, and how many samples would decide.

Source: McNemar 1947, in its exact form: among the samples on which two runs disagree, a change of nothing
but chance falls either way with probability 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

#: Sizes beyond which no answer is worth having.
LARGEST = 10_000_000


@dataclass(frozen=True)
class Flips:
    """How a yes-or-no of each sample changed between two runs.

    Attributes:
        n: samples both runs have.
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
    def between(cls, before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Flips:
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
    def p_fall(self) -> float:
        """Exact one-sided p-value of a fall."""
        return tail(self.lost, self.gained)

    @property
    def p_rise(self) -> float:
        """Exact one-sided p-value of a rise."""
        return tail(self.gained, self.lost)

    def deciding_n(self, level: float) -> int | None:
        """Samples after which flips in these proportions would be beyond chance.

        Args:
            level: of the test.

        Returns:
            The number, at least n; None: not even `LARGEST` would do, or nothing flipped.
        """
        more, fewer = max(self.lost, self.gained), min(self.lost, self.gained)
        if more == fewer:
            return None

        def decided(n: int) -> bool:
            scale = n / self.n
            return tail(round(more * scale), round(fewer * scale)) < level

        low, high = self.n, 2 * self.n
        if decided(low):
            return low
        while not decided(high):
            low, high = high, 2 * high
            if high > LARGEST:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if decided(middle) else (middle, high)
        return high


def tail(more: int, fewer: int) -> float:
    """Chance of at least ``more`` heads among ``more + fewer`` even tosses; 1 without any."""
    pairs = more + fewer
    return float(binomtest(more, pairs, alternative="greater").pvalue) if pairs else 1.0


def sample_size(tolerance: float, level: float, power: float = 0.9) -> int:
    """Samples with which a fall of twice the tolerance is noticed.

    Args:
        tolerance: share of the samples, in (0, 0.5).
        level: of the test.
        power: chance of noticing.

    Returns:
        The smallest n at which a network that loses every sample with chance 2 * tolerance, and gains none,
        loses more than the tolerance and enough for the test, with at least that power.
    """
    fewest = next(k for k in range(1, 200) if 0.5**k < level)

    def noticed(n: int) -> bool:
        needed = max(fewest, int(np.floor(tolerance * n)) + 1)
        return float(binom.sf(needed - 1, n, 2 * tolerance)) >= power

    n = fewest
    while not noticed(n):
        n = max(n + 1, int(n * 1.01))
        if n > LARGEST:
            raise ValueError(f"a tolerance of {tolerance:g} would take more than {LARGEST:,} samples")
    return n
