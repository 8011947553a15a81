"""The audit: how many samples a stronger protocol would take from those that a cheap search left robust.

Where gradients are sound a cheap search finds what AutoAttack finds; where they are masked it does not, and
its own number does not say so. So some of the samples that are still robust are drawn at random and attacked
with the stronger protocol in full. If it breaks k of m, the share of all of them that it would break is, with
95 % confidence, below the exact one-sided bound of Clopper & Pearson 1934 (`stats.upper_bound`).

The draw is stratified by the final margin: the samples are ordered by it and cut into m strata of equal size,
and one is drawn from each. k is then a sum of independent yes-or-noes of unequal chances whose mean is the
share that is asked for; its spread is smaller than that of a simple draw, and the bound is conservative
(Hoeffding 1956, Annals of Mathematical Statistics 27, 713-721). A stratum may begin or end inside a sample:
then two neighbours may draw the same one, which is attacked once and counts twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.protocol.cards import Audit, Battery
from robustbench_cure.stats import Rate, upper_bound

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

#: Column of the table: how often a sample was drawn; 0: it was not, or there was no audit yet.
DRAWS = "audit.draws"


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        name: of the stronger protocol.
        total: samples of the record.
        survivors: samples that the search left robust.
        draws: m, how many were drawn; 0: the audit was not made yet.
        broken: k, how many draws the stronger protocol broke.
        lost: samples that it broke; fewer than ``broken`` where one was drawn twice.
        whole: whether every survivor was audited, so that nothing is left to estimate.
    """

    name: str
    total: int
    survivors: int
    draws: int
    broken: int
    lost: int
    whole: bool

    @property
    def search(self) -> Rate:
        """Robust accuracy after the search, before the audit."""
        return Rate(self.survivors, self.total)

    @property
    def bound(self) -> float:
        """By how much the stronger protocol lowers the search's accuracy at most, a share of all samples.

        Exact where every survivor was audited, else with 95 % confidence.
        """
        if self.whole:
            return self.lost / self.total if self.total else 0.0
        # One survivor of the draw short of all: the only case in which Hoeffding's condition may not hold.
        all_but_one = 0 < self.broken >= self.draws - 1
        share = 1.0 if all_but_one else upper_bound(self.broken, self.draws)
        return share * self.survivors / self.total

    @property
    def estimate(self) -> float:
        """Robust accuracy that the stronger protocol would leave, as estimated; a share of all samples."""
        if self.whole or not self.draws:
            return (self.survivors - self.lost) / self.total if self.total else float("nan")
        return self.survivors / self.total * (1 - self.broken / self.draws)

    @property
    def words(self) -> str:
        """What follows, in one sentence without a full stop."""
        terms = f"95 %, m = {self.draws:,}, k = {self.broken:,}"
        if not self.survivors:
            return f"nothing was left for {self.name} to break"
        if self.whole and not self.lost:
            return f"{self.name} was run on all {self.survivors:,} survivors and broke none"
        if self.whole:
            return f"{self.name} was run on all {self.survivors:,} survivors and broke {self.lost:,}"
        if not self.draws:
            return (
                f"not audited yet, by how much {self.name} would lower it is not known: go on with --resume"
            )
        if not self.broken:
            return f"{self.name} would lower it by at most {_points(self.bound)} points ({terms})"
        least = max(self.search.value - self.bound, 0.0)
        down = np.floor(1000 * least + 1e-9) / 10  # never printed larger than it is
        left = f"about {100 * self.estimate:.1f} %, at least {down:.1f} %"
        return f"{self.name} would leave {left} ({terms})"


def _points(share: float) -> str:
    """A bound in points, rounded up: it must not be printed smaller than it is."""
    return f"{np.ceil(1000 * share - 1e-9) / 10:.1f}"


def audit_battery(battery: Battery, audit: Audit) -> Battery:
    """The attacks of an audit as a battery of their own: in order, each on what still stands."""
    return battery.model_copy(update={"attacks": audit.attacks, "cascade": True, "audit": None})


def drawn(margins: NDArray[np.floating], samples: int, seed: int) -> NDArray[np.int64]:
    """How often each survivor is drawn, int64 (N,); the sum is ``samples``, or N where all are.

    Args:
        margins: final margin of each survivor, (N,), finite.
        samples: m; 0, or N and more: every survivor, once.
        seed: of the run.
    """
    n = len(margins)
    if not samples or samples >= n:
        return np.ones(n, dtype=np.int64)
    keys = [str(stratum) for stratum in range(samples)]
    where = Noise.for_samples(seed, "audit", keys).uniform((1,), 0).squeeze(1).double().numpy()
    places = np.floor((np.arange(samples) + where) * n / samples).astype(np.int64).clip(0, n - 1)
    return np.bincount(np.argsort(margins, kind="stable")[places], minlength=n)


def draw(samples: pd.DataFrame, battery: Battery, number: int, seed: int) -> NDArray[np.int64]:
    """How often each row of a record's table is drawn for the audit, int64 (n,).

    Args:
        samples: the table, with the columns of the search.
        battery: its battery.
        number: m; 0: every row that is still robust.
        seed: of the run.
    """
    robust = (samples["clean_pred"] == samples["label"]).to_numpy(dtype=bool)
    margin = samples["clean_margin"].to_numpy(dtype=float, na_value=np.inf)
    for spec in battery.attacks:
        robust = robust & ~samples[f"{spec.id}.broken"].to_numpy(dtype=bool)
        final = samples[f"{spec.id}.margin"].to_numpy(dtype=float, na_value=np.inf)
        margin = np.fmin(margin, final)
    draws = np.zeros(len(samples), dtype=np.int64)
    draws[robust] = drawn(margin[robust], number, seed)
    return draws


def result(samples: pd.DataFrame, battery: Battery, robust: pd.Series) -> AuditResult | None:
    """What the audit of a record found; None: its battery has none.

    Args:
        samples: its table.
        battery: its battery.
        robust: samples that the search left robust, bool (n,).
    """
    if battery.audit is None:
        return None
    survivors = robust.to_numpy(dtype=bool)
    draws = samples[DRAWS].to_numpy(dtype=np.int64)
    broken = np.zeros(len(samples), dtype=bool)
    for spec in battery.audit.attacks:
        broken |= samples[f"{spec.id}.broken"].to_numpy(dtype=bool)
    return AuditResult(
        name=battery.audit.name,
        total=len(samples),
        survivors=int(survivors.sum()),
        draws=int(draws.sum()),
        broken=int(draws[broken].sum()),
        lost=int(broken.sum()),
        whole=bool((draws[survivors] > 0).all()),
    )
