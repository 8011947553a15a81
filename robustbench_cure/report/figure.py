"""Geometry of the accuracy figure: one band an attack, one lane a model, a dot with its interval.

Positions are per cent of the width of the plot, so that the picture fills any width while its text and
marks keep their size; the template only prints them.
"""

from __future__ import annotations

from dataclasses import dataclass

from robustbench_cure.report.tables import AccuracyRow, Protocol, attack_rows
from robustbench_cure.report.wording import interval, number

LANE = 16
PAD = 6
#: Marks as SVG paths around the origin; with the colours they tell models apart without colour vision.
SHAPES = (
    "M0-4.5A4.5 4.5 0 1 1 0 4.5A4.5 4.5 0 1 1 0-4.5Z",
    "M-4-4H4V4H-4Z",
    "M0-5.4 5.4 0 0 5.4-5.4 0Z",
    "M0-5 5 4H-5Z",
    "M0 5 5-4H-5Z",
)
COLOURS = 6


@dataclass(frozen=True)
class Mark:
    """One number: `at`, `low`, `high` in per cent of the width, `y` in pixels."""

    model: int
    at: float
    low: float
    high: float
    y: int
    text: str
    title: str
    unreliable: bool


@dataclass(frozen=True)
class Band:
    """One row of the figure."""

    name: str
    note: str
    kind: str
    height: int
    marks: tuple[Mark, ...]


def bands(protocol: Protocol) -> list[Band]:
    """The figure of one protocol, top to bottom: clean, each attack, worst case.

    Minimal-norm attacks are left out: their product is a distance.
    """
    tables = [
        [row for row in attack_rows(line.record) if isinstance(row, AccuracyRow)] for line in protocol.summary
    ]
    height = LANE * len(tables) + 2 * PAD
    found = []
    for rows in zip(*tables, strict=True):
        marks = []
        for model, row in enumerate(rows):
            if not row.accuracy.total:
                continue
            line = protocol.summary[model]
            low, high = row.accuracy.interval
            marks.append(
                Mark(
                    model,
                    round(100 * row.accuracy.value, 3),
                    round(100 * low, 3),
                    round(100 * high, 3),
                    PAD + LANE * model + LANE // 2,
                    number(row.accuracy),
                    f"{line.label}, {row.name}: {number(row.accuracy)} % {interval(row.accuracy)}",
                    line.unreliable,
                )
            )
        note = f"first {rows[0].limit:,}" if rows[0].limit else ""
        found.append(Band(rows[0].name, note, rows[0].kind, height, tuple(marks)))
    return found


def shape(model: int) -> str:
    """SVG path of a model's mark."""
    return SHAPES[model % len(SHAPES)]


def colour(model: int) -> int:
    """Number of a model's colour, from 0; the style sheet holds the colours."""
    return model % COLOURS
