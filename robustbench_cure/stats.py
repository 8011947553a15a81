"""Statistics of counts: intervals and exact tests. SciPy does the work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

#: Confidence level of every printed interval.
CONFIDENCE = 0.95


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


@cache
def _wilson(count: int, total: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    found = binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return (float(found.low), float(found.high))
