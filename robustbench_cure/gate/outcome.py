"""The outcome of a comparison: findings on each accuracy, and one outcome with its exit code of all of them.

The rule: a change is an alarm when it is larger than the tolerance *and* chance would hardly do it. So what
is too small to matter fails no build, however many samples show it, and what few samples cannot tell
from chance is called inconclusive, not good. docs/gate.md says why, and how often this is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

from robustbench_cure.stats import DiscordantPairs

Kind = Literal["pass", "inconclusive", "suspicious rise", "regression", "not comparable"]
RowResult = Literal[
    "held", "may have fallen", "rose", "rose with the network", "fell", "below the minimum", "not comparable"
]

#: The outcome of a comparison with this finding on one accuracy.
OUTCOMES: dict[RowResult, Kind] = {
    "held": "pass",
    "rose with the network": "pass",
    "may have fallen": "inconclusive",
    "rose": "suspicious rise",
    "fell": "regression",
    "below the minimum": "regression",
    "not comparable": "not comparable",
}
#: From the best to the worst.
ORDER: tuple[Kind, ...] = ("pass", "inconclusive", "suspicious rise", "regression", "not comparable")
EXIT_CODES: dict[Kind, int] = {
    "pass": 0,
    "inconclusive": 1,
    "suspicious rise": 1,
    "regression": 1,
    "not comparable": 2,
}
Of = Literal["clean", "attack", "worst"]


class Rules(NamedTuple):
    """What the gate tolerates.

    Attributes:
        tolerance: change of an accuracy that does not matter, a share in [0, 1).
        min_robust: worst-case robust accuracy that must be reached, a share; None: any.
        level: of each exact one-sided test, in (0, 1).
        accept: outcomes whose exit code is 0 all the same: ``inconclusive``, ``suspicious rise``.
    """

    tolerance: Fraction = Fraction(1, 100)
    min_robust: Fraction | None = None
    level: float = 0.01
    accept: tuple[str, ...] = ()


@dataclass(frozen=True)
class AccuracyChange:
    """One accuracy of two runs.

    Attributes:
        id: ``clean``, ``worst_case``, or the attack's.
        name: for people.
        of: what it is the accuracy of.
        pairs: its discordant pairs, on the samples that both runs have.
        least: samples of these that are robust now by everything known, a new run's audit included, where
            that finds more than is compared; None: as `pairs` counts.
    """

    id: str
    name: str
    of: Of
    pairs: DiscordantPairs
    least: int | None = None


@dataclass(frozen=True)
class Row:
    """An accuracy and the finding on it.

    Attributes:
        accuracy: before and now.
        finding: on this accuracy alone.
        level: of its tests.
    """

    accuracy: AccuracyChange
    finding: RowResult
    level: float


@dataclass(frozen=True)
class Outcome:
    """The result of a comparison.

    Attributes:
        kind: in a word.
        exit_code: 0 good, 1 failed, 2 not comparable.
    """

    kind: Kind
    exit_code: int


def find_changes(
    accuracies: Sequence[AccuracyChange], rules: Rules, *, same_weights: bool
) -> tuple[Row, ...]:
    """The finding on every accuracy.

    Args:
        accuracies: one is the clean one.
        rules: what is tolerated.
        same_weights: whether both runs evaluated the very same weights.

    A fall beyond the tolerance is a fall where chance would hardly do it. Where chance might, the clean
    accuracy and the worst case *may* have fallen; a single attack, of which there are many, has held. Attacks
    are tested at the level divided by their number. A rise of robust accuracy is explained where the
    network changed, which only other weights and another clean accuracy together show.
    """
    clean = next(a.pairs for a in accuracies if a.of == "clean")
    moved = _fell(clean, rules, rules.level) or _rose(clean, rules, rules.level)
    attacks = sum(a.of == "attack" for a in accuracies)
    rows = []
    for accuracy in accuracies:
        level = rules.level / attacks if accuracy.of == "attack" else rules.level
        rows.append(Row(accuracy, _find(accuracy, rules, level, moved and not same_weights), level))
    return tuple(rows)


def conclude(findings: Sequence[RowResult], rules: Rules) -> Outcome:
    """Outcome and exit code of any number of findings, on one model or on several: those of the worst.

    Args:
        findings: at least one.
        rules: which outcomes are accepted. An accepted one counts less than any that is not.
    """
    kinds = [OUTCOMES[finding] for finding in findings]
    outcomes = [Outcome(kind, 0 if kind in rules.accept else EXIT_CODES[kind]) for kind in kinds]
    return max(outcomes, key=lambda outcome: (outcome.exit_code, ORDER.index(outcome.kind)))


def _find(accuracy: AccuracyChange, rules: Rules, level: float, other_network: bool) -> RowResult:
    pairs = accuracy.pairs
    known = pairs.after if accuracy.least is None else accuracy.least
    if accuracy.of == "worst" and rules.min_robust is not None and known < rules.min_robust * pairs.n:
        return "below the minimum"
    if _fell(pairs, rules, level):
        return "fell"
    if pairs.fell_beyond(rules.tolerance) and accuracy.of != "attack":
        return "may have fallen"
    if accuracy.of != "clean" and _rose(pairs, rules, level):
        return "rose with the network" if other_network else "rose"
    return "held"


def _fell(pairs: DiscordantPairs, rules: Rules, level: float) -> bool:
    return pairs.fell_beyond(rules.tolerance) and pairs.p_fall <= level


def _rose(pairs: DiscordantPairs, rules: Rules, level: float) -> bool:
    return pairs.rose_beyond(rules.tolerance) and pairs.p_rise <= level
