"""One function says what a comparison comes to, in words and as an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from robustbench_cure.gate.paired import Flips

Kind = Literal["pass", "inconclusive", "suspicious rise", "regression", "not comparable"]

#: From the best to the worst; a comparison of several things is as bad as its worst part.
ORDER: tuple[Kind, ...] = ("pass", "inconclusive", "suspicious rise", "regression", "not comparable")
EXIT_CODES: dict[Kind, int] = {
    "pass": 0,
    "inconclusive": 1,
    "suspicious rise": 1,
    "regression": 1,
    "not comparable": 2,
}


@dataclass(frozen=True)
class Rules:
    """What the gate tolerates.

    Attributes:
        tolerance: change of an accuracy that is not worth a word, as a share.
        floor: worst-case robust accuracy that must be reached, as a share; None: any.
        level: of the exact tests.
        accept: kinds of verdict whose exit code is 0 all the same: ``inconclusive``, ``suspicious rise``.
    """

    tolerance: float = 0.01
    floor: float | None = None
    level: float = 0.01
    accept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One accuracy, before and now.

    Attributes:
        name: ``clean``, an attack's name, or ``worst case``.
        kind: of the row: clean, attack, worst.
        flips: of its samples.
        verdict: on this row alone.
        words: why.
    """

    name: str
    kind: Literal["clean", "attack", "worst"]
    flips: Flips
    verdict: Kind
    words: str


@dataclass(frozen=True)
class Verdict:
    """What all rows come to.

    Attributes:
        kind: the worst of the rows'.
        words: what decided, one sentence a reason.
        exit_code: 0 good, 1 failed, 2 not comparable.
    """

    kind: Kind
    words: tuple[str, ...]
    exit_code: int


def judge_rows(
    named: Sequence[tuple[str, Literal["clean", "attack", "worst"], Flips]], rules: Rules
) -> list[Row]:
    """A verdict on every accuracy.

    Args:
        named: name, kind and flips; one is the clean accuracy, one the worst case.
        rules: what is tolerated.

    A fall of the clean accuracy or the worst case beyond the tolerance is a regression where chance would
    hardly do it, else inconclusive. An attack alone raises an alarm only where it is sure, at a level
    divided by the number of attacks. A rise beyond the tolerance and chance is suspicious while the clean
    accuracy stays: the attack, not the network, has changed. Where the clean accuracy moves as well, the
    network did, and the rise is an improvement.
    """
    clean = next(flips for _, kind, flips in named if kind == "clean")
    moved = abs(clean.change) > rules.tolerance and min(clean.p_fall, clean.p_rise) < rules.level
    attacks = max(1, sum(kind == "attack" for _, kind, _ in named))
    rows = []
    for name, kind, flips in named:
        level = rules.level / attacks if kind == "attack" else rules.level
        verdict, words = _judge(name, kind, flips, rules, level, moved)
        rows.append(Row(name, kind, flips, verdict, words))
    return rows


def conclude(rows: Sequence[Row], rules: Rules, reasons: Sequence[str] = ()) -> Verdict:
    """Verdict and exit code of a comparison.

    Args:
        rows: of `judge_rows`; empty where the runs cannot be compared.
        rules: what is tolerated.
        reasons: why they cannot be compared.
    """
    if reasons:
        return Verdict("not comparable", tuple(reasons), EXIT_CODES["not comparable"])
    kind = max((row.verdict for row in rows), key=ORDER.index)
    words = tuple(row.words for row in rows if row.verdict == kind)
    return Verdict(kind, words, 0 if kind in rules.accept else EXIT_CODES[kind])


def _judge(name: str, kind: str, flips: Flips, rules: Rules, level: float, moved: bool) -> tuple[Kind, str]:
    points = f"{100 * abs(flips.change):.1f} points"
    counts = f"{flips.lost} of {flips.n} samples lost, {flips.gained} gained"
    if kind == "worst" and rules.floor is not None and flips.after < rules.floor * flips.n:
        rate = 100 * flips.after / flips.n
        return "regression", f"{name} is {rate:.1f} %, below the floor of {100 * rules.floor:g} %"
    if -flips.change > rules.tolerance:
        if flips.p_fall < level:
            return "regression", f"{name} fell by {points}: {counts}, p = {flips.p_fall:.2g}"
        if kind == "attack":
            return "pass", f"{name}: {counts}, within chance"
        return "inconclusive", f"{name} is lower by {points}, which may be chance: {counts}, p = " + (
            f"{flips.p_fall:.2g}{_more(flips, rules.level)}"
        )
    if kind != "clean" and flips.change > rules.tolerance and flips.p_rise < level:
        why = f"{counts}, p = {flips.p_rise:.2g}"
        if moved:
            return "pass", f"{name} rose by {points} with the clean accuracy: {why}"
        return (
            "suspicious rise",
            f"{name} rose by {points} while the clean accuracy stayed: {why}; did an attack get weaker?",
        )
    return "pass", f"{name}: {counts}, within the tolerance or chance"


def _more(flips: Flips, level: float) -> str:
    n = flips.deciding_n(level)
    return "" if n is None else f"; about {n:,} samples would decide"
