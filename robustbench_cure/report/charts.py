"""The drawings of reports and pages that are made without a plotting library: positions that templates print.

*Accuracy figure*: one band an attack, one lane a model, a mark with its interval. *Curves*: what a record
holds already, accuracy against PGD's steps and against the radius. An attack that stops at its first
success notes after how many steps that was, so that one run gives what every shorter run would have left
robust; the distance at which a minimal-norm attack reached a boundary gives what it leaves robust at every
radius.

*Margin scatter*: final margins of SPSA against those of PGD, image by image (CURE paper, figure 7).

Positions are per cent of the width of the plot, so that the picture fills any width while its text and
marks keep their size.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_cure.evaluation.record import Record
from robustbench_cure.masking.checks import statistics
from robustbench_cure.masking.evidence import PairedMargins
from robustbench_cure.protocol.specs import PGD, AttackSpec, DeepFool
from robustbench_cure.report.table import Table, columns
from robustbench_cure.report.tables import Protocol, accuracy_rows
from robustbench_cure.report.wording import NORMS, interval, number
from robustbench_cure.stats import Rate

#: Pixels of a lane, and above and below the lanes of a band.
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
#: Steps at which the printed table has a row.
PRINTED = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 70, 100, 200, 500, 1000)
#: Most points that a drawn curve keeps.
MOST = 60


# --- accuracy figure -----------------------------------------------------------------------------------


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

    Minimal-norm attacks are left out, whose product is a distance, and audits, which are of survivors alone.
    """
    tables = [accuracy_rows(line.record) for line in protocol.summary]
    height = LANE * len(tables) + 2 * PAD
    figure = []
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
        figure.append(Band(rows[0].name, note, rows[0].kind, height, tuple(marks)))
    return figure


def shape(model: int) -> str:
    """SVG path of a model's mark."""
    return SHAPES[model % len(SHAPES)]


def colour(model: int) -> int:
    """Number of a model's colour, from 0; the style sheet holds the colours."""
    return model % COLOURS


# --- curves --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Accuracy along something.

    Attributes:
        name: the attack.
        axis: what is along the horizontal axis.
        points: (where, accuracy, as words), the first at zero.
    """

    name: str
    axis: str
    points: tuple[tuple[float, Rate, str], ...]


@dataclass(frozen=True)
class Dot:
    """A point that is drawn: per cent of the plot's width and height, and its number in words."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Plot:
    """Curves over one axis.

    Attributes:
        title: of the figure.
        note: what it shows.
        lines: for every curve its name, its path in a box of 100 x 100, and its points.
        ticks: (per cent of the width, label) of the horizontal axis.
    """

    title: str
    note: str
    axis: str
    lines: tuple[tuple[str, str, tuple[Dot, ...]], ...]
    ticks: tuple[tuple[float, str], ...]


def step_curves(record: Record) -> list[Curve]:
    """Accuracy after every number of steps, for the longest PGD of each kind that notes its steps."""
    longest: dict[str, PGD] = {}
    for spec in _on_every_sample(record):
        # With restarts, the number of steps is that of the last of them.
        if isinstance(spec, PGD) and spec.stop == "first-success" and spec.restarts == 1:
            family = spec.model_dump_json(exclude={"id", "name", "steps"})
            if family not in longest or longest[family].steps < spec.steps:
                longest[family] = spec
    return [_step_curve(record, spec) for spec in longest.values() if spec.steps > 1]


def _on_every_sample(record: Record) -> tuple[AttackSpec, ...]:
    """Attacks that were given every sample they cover: all, or the first of a cascade."""
    return record.attacks[:1] if record.manifest.battery.cascade else record.attacks


def _step_curve(record: Record, spec: PGD) -> Curve:
    covered = record.covered(spec.id)
    correct = int((record.clean_correct & covered).sum())
    broken = record.samples[f"{spec.id}.broken"] & covered
    taken = record.samples[f"{spec.id}.step"][broken].astype("int64")
    points = []
    for step in range(spec.steps + 1):
        rate = Rate(correct - int((taken <= step).sum()), int(covered.sum()))
        points.append((float(step), rate, f"{step} step{'s' * (step != 1)}"))
    return Curve(spec.name, "steps", tuple(points))


def radius_curves(record: Record) -> list[Curve]:
    """Accuracy at every radius up to twice the battery's, for each minimal-norm attack."""
    threat = record.manifest.battery.threat
    return [
        _radius_curve(record, spec, threat.norm, 2 * threat.radius)
        for spec in _on_every_sample(record)
        if isinstance(spec, DeepFool) and spec.mode == "minimal" and threat.radius
    ]


def _radius_curve(record: Record, spec: DeepFool, norm: str, most: float) -> Curve:
    covered, table = record.covered(spec.id), record.samples
    correct = int((record.clean_correct & covered).sum())
    reached = (
        table[f"{spec.id}.attacked"]
        & (table[f"{spec.id}.violation"].fillna("") == "")
        & (table[f"{spec.id}.pred"].fillna(-1) != table["label"])
    )
    distances = table.loc[reached, f"{spec.id}.{norm}"].astype("float64")
    points = []
    for k in range(MOST + 1):
        radius = most * k / MOST
        words = f"{255 * radius:.1f}/255" if norm == "linf" else f"{radius:.3f}"
        rate = Rate(correct - int((distances <= radius).sum()), int(covered.sum()))
        points.append((radius, rate, f"{NORMS[norm]} {words}"))
    return Curve(spec.name, "radius", tuple(points))


def plot(curves: Sequence[Curve]) -> Plot | None:
    """Positions of some curves of one axis; None without curves."""
    if not curves:
        return None
    axis, most = curves[0].axis, max(curve.points[-1][0] for curve in curves)
    if axis == "steps":
        title, note = "Accuracy after every step of PGD", "where it is flat, more steps change nothing"

        def place(at: float) -> float:
            return round(100 * math.log1p(at) / math.log1p(most), 3)

        marks = [s for s in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if s <= most]
        ticks = [(place(s), str(s)) for s in marks]
    else:
        title, note = "Accuracy at every radius", "from the distances of a minimal-norm attack"

        def place(at: float) -> float:
            return round(100 * at / most, 3)

        ends = curves[0].points
        ticks = [(place(ends[k][0]), ends[k][2].split(" ")[-1]) for k in (0, MOST // 2, MOST)]
    lines = []
    for curve in curves:
        corners = _corners(curve)
        path = "".join(
            f"{'M' if i == 0 else 'H'}{place(at):g}" + (f" {_down(rate)}" if i == 0 else f"V{_down(rate)}")
            for i, (at, rate, _) in enumerate(corners)
        )
        dots = tuple(
            Dot(
                place(at),
                _down(rate),
                f"{curve.name}, {words}: {number(rate)} % {interval(rate)}",
            )
            for at, rate, words in corners
        )
        lines.append((curve.name, path + f"H{place(curve.points[-1][0]):g}", dots))
    return Plot(title, note, axis, tuple(lines), tuple(ticks))


def _down(rate: Rate) -> float:
    return round(100 - 100 * rate.value, 3) if rate.total else 100.0


def _corners(curve: Curve) -> list[tuple[float, Rate, str]]:
    """The first point, those where the number changes, and the last."""
    kept = [curve.points[0]]
    for point in curve.points[1:]:
        if point[1].count != kept[-1][1].count:
            kept.append(point)
    if kept[-1] is not curve.points[-1]:
        kept.append(curve.points[-1])
    return kept


def curve_table(curves: Sequence[Curve]) -> Table:
    """The numbers of some curves: all for programs, some for people."""
    rows, data = [], []
    for curve in curves:
        for i, (at, rate, words) in enumerate(curve.points):
            low, high = rate.interval
            last = i == len(curve.points) - 1
            if last or (at in PRINTED if curve.axis == "steps" else i % 5 == 0):
                rows.append((curve.name, words, f"{number(rate)} {interval(rate)}", f"{rate.total:,}"))
            data.append(
                {
                    "attack": curve.name,
                    "axis": curve.axis,
                    "at": at,
                    "count": rate.count,
                    "n": rate.total,
                    "accuracy": rate.value,
                    "low": low,
                    "high": high,
                }
            )
    note = "Accuracy in % of all samples covered, with 95 % Wilson intervals"
    return Table("Curves", note, columns("Attack", "At", "Accuracy", "n"), tuple(rows), tuple(data))


# --- margin scatter ----------------------------------------------------------------------------------------

#: Side of the plot in its own units.
SIDE = 360.0


@dataclass(frozen=True)
class ScatterPoint:
    """One image in the plot.

    Attributes:
        id: its name.
        at: (x, y) in units of the plot, y downwards.
        margins: PGD's and SPSA's.
        below: SPSA ended lower.
        picture: data address of the image, or "".
    """

    id: str
    at: tuple[float, float]
    margins: tuple[float, float]
    below: bool
    picture: str = ""


@dataclass(frozen=True)
class MarginScatter:
    """A plot for a page.

    Attributes:
        title: what is on the axes.
        points: those below the diagonal last, so that they lie on top.
        ticks: (place in the plot, label) of both axes; y runs the other way.
        summary: counts, sign test and correlation in words.
        zero: place of margin zero, where images are lost.
    """

    title: str
    points: tuple[ScatterPoint, ...]
    ticks: tuple[tuple[float, str], ...]
    summary: str
    zero: float


def margin_scatter(pairs: PairedMargins, pictures: Sequence[str] | None = None) -> MarginScatter:
    """A plot whose axes share one range, which holds every point.

    Args:
        pairs: margins of each image.
        pictures: data addresses of the images, see `picture`.
    """
    x, y = pairs.pgd.double().tolist(), pairs.spsa.double().tolist()
    low, high = min([*x, *y, 0.0]), max([*x, *y, 0.0])
    room = 0.04 * (high - low or 1.0)
    low, high = low - room, high + room

    def place(value: float) -> float:
        return float(round(SIDE * (value - low) / (high - low), 2))

    points = [
        ScatterPoint(
            name, (place(a), round(SIDE - place(b), 2)), (a, b), b < a, pictures[k] if pictures else ""
        )
        for k, (name, a, b) in enumerate(zip(pairs.ids, x, y, strict=True))
    ]
    return MarginScatter(
        title=pairs.title,
        points=tuple(sorted(points, key=lambda point: point.below)),
        ticks=tuple((place(value), f"{value:g}") for value in _round_values(low, high)),
        summary=_in_words(pairs),
        zero=place(0.0),
    )


def picture(image: Tensor) -> str:
    """The data address of an image (C,H,W) in [0, 1], as PNG."""
    from PIL import Image

    pixels = (image.cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _in_words(pairs: PairedMargins) -> str:
    s = statistics(pairs)
    r = "" if s["pearson_r"] is None else f", r = {s['pearson_r']:.2f}"
    return (
        f"{s['points']} images: SPSA ended lower on {s['below']} (red), higher on {s['above']}; "
        f"sign test p = {s['sign_test_p']:.2g}{r}"
    )


def _round_values(low: float, high: float) -> list[float]:
    """About five round numbers within a range."""
    from matplotlib.ticker import MaxNLocator

    return [float(v) for v in MaxNLocator(5).tick_values(low, high) if low <= v <= high]
