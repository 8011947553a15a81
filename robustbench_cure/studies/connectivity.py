"""`cure-bench connectivity`: paths inside classification regions, and how far from convex these are.

Source: thesis, section 7.3, algorithm 5, Figs. 7.2 and 7.3, see `geometry.connectivity` and
`geometry.convexity`. "found" near all pairs says that regions are connected; combinations that leave their
region say that they are not convex.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry.connectivity import (
    AHEAD,
    DEPTH,
    SCENARIOS,
    Pairs,
    Path,
    draw_pairs,
    find_paths,
)
from robustbench_cure.geometry.convexity import labels_of, mixtures
from robustbench_cure.geometry.plane import ACROSS, ALONG, PathSection, path_section
from robustbench_cure.protocol.request import Request
from robustbench_cure.stats import Rate
from robustbench_cure.studies import plots
from robustbench_cure.studies.engine import (
    Arrays,
    Columns,
    Counter,
    ModelRow,
    Shown,
    Study,
    counter,
    open_study,
    paragraphs,
)

#: Pairs that are joined together, and cached together when a command is interrupted.
BLOCK = 32
#: Images in a convex combination.
COUNTS = range(2, 11)
#: Outcomes of a pair, by their code in the cache.
OUTCOMES = ("no end", "not found", "bent", "straight")
NO_END, NOT_FOUND, BENT, STRAIGHT = range(4)

LEAD = paragraphs("""
Is a classification region connected? Two points with the same predicted label are joined by a polyline that
does not leave their region: two images; an image and one of another region, moved into the first one's by
the smallest perturbation ("carried"); an image and a random point of an image's norm, moved likewise. Pairs
whose second point cannot be moved there, or lies on a tie of two labels, are left out.

"Straight" are the pairs that a segment joins. "Anchors" is the mean number of points between the ends, D the
length of the path over the distance of its ends: first over all paths, segments among them, as in the
thesis, then over those where a segment is not enough. "Outside" is the share of anchors with a pixel outside
[0, 1]; a dash: there is no such path. The thesis finds a path for all pairs, with about 10 anchors and
D = 1 + 1e-4: regions are connected though not convex. A path is known at its samples only, and where the
search fails there may still be one.

A region is convex if every convex combination of its images stays in it; for two images the thesis finds
that with probability about 0.8, and less for more.
""")


@dataclass(frozen=True)
class Settings:
    """Options of the verb.

    Attributes:
        pairs: of points, in each of `SCENARIOS`.
        spacing: of the samples on a path, as a share of the distance of its ends, from 1e-6 to 0.1.
        draws: of convex combinations, for each number of images in `COUNTS`.
    """

    pairs: int = 100
    spacing: float = 1e-4
    draws: int = 1000


def run(request: Request, settings: Settings) -> pd.DataFrame:
    """Load what a request names and measure it; see `measure`.

    Raises:
        UsageError: a spacing out of its range.
    """
    if not 1e-6 <= settings.spacing <= 0.1:
        raise UsageError(f"--spacing {settings.spacing:g}: must lie between 1e-6 and 0.1")
    return measure(open_study("connectivity", request, default_n=1000), settings)


def measure(study: Study, settings: Settings) -> pd.DataFrame:
    """Paths between points of one region, and convex combinations of its images; a row for each scenario.

    An interrupted run is continued.

    Raises:
        UsageError: images that leave nothing to join.
    """
    labels = {name: _labels(study, name) for name in study.models}
    pairs, stays = [], []
    for name in study.models:
        cached = _measure_model(study, name, labels[name], settings)
        pairs.append(_pair_table(study, name, labels[name], cached))
        stays += [_stay_row(name, k, cached[f"mixtures-{k}"]) for k in COUNTS]
    everything = pd.concat(pairs, ignore_index=True)
    study.table("connectivity-pairs", everything)
    table = pd.DataFrame(
        [
            _scenario_row(str(name), str(scenario), part, settings.spacing)
            for (name, scenario), part in everything.groupby(["model", "scenario"], sort=False)
        ]
    )
    convexity = pd.DataFrame(stays)
    study.table("convexity", convexity)
    study.present(
        table,
        COLUMNS,
        title="Connected regions",
        lead=LEAD,
        figures=[
            *_draw_paths(study, labels, everything, settings.spacing),
            _draw_convexity(study, convexity),
        ],
        settings={
            "pairs": settings.pairs,
            "spacing": f"{settings.spacing:g} of the distance",
            "halvings": f"{DEPTH} at most",
            "anchors_carried": f"by DeepFool, l2, and {AHEAD:g} times as far again; not cut to the box",
            "draws": f"{settings.draws} for each number of images",
        },
    )
    return table


# --- measuring -------------------------------------------------------------------------------------------


def _labels(study: Study, name: str) -> Tensor:
    """Predicted labels, int64 (N,) on the CPU; refuses images that leave no pair."""
    classifier = study.models[name]
    labels = labels_of(classifier, study.images.to(classifier.device)).cpu()
    sizes = labels.bincount()
    if int(sizes.max()) < 2:
        raise UsageError(f"{name}: no two of the {len(labels)} images have the same label: raise --n")
    if int((sizes > 0).sum()) < 2:
        raise UsageError(f"{name}: all {len(labels)} images have the same label: raise --n")
    return labels


def _measure_model(study: Study, name: str, labels: Tensor, settings: Settings) -> Arrays:
    """All columns of a model: those of pairs as scenario.column, and for each k whether draws stayed."""
    classifier, pairs = study.models[name], settings.pairs
    cache = study.cache(name, pairs=pairs, spacing=settings.spacing, draws=settings.draws, seed=study.seed)
    for k in COUNTS:
        if f"mixtures-{k}" not in cache.rows:
            cache.rows[f"mixtures-{k}"] = _mixtures(study, classifier, labels, k, settings.draws)
    cache.write(cache.rows)
    with counter(name, "pairs", len(SCENARIOS) * pairs) as advance:

        def join(scenario: str) -> None:
            def columns(rows: range) -> Arrays:
                return _join_block(study, classifier, labels, scenario, rows, settings.spacing, advance)

            advance.doing = scenario
            prefix = f"{scenario}."
            study.by_image(cache, columns, size=BLOCK, count=pairs, prefix=prefix, advance=advance, cost=1)

        for scenario in SCENARIOS:
            join(scenario)
    return cache.rows


def _mixtures(study: Study, classifier: Classifier, labels: Tensor, k: int, draws: int) -> NDArray[np.bool_]:
    """Whether each combination of k images stays; empty if no region holds so many."""
    if int(labels.bincount().max()) < k:
        return np.zeros(0, bool)
    noise = Noise.for_samples(study.seed, "connectivity", [f"{k} images/{draw}" for draw in range(draws)])
    return mixtures(classifier, study.images, labels, k, noise).numpy()


def _streams(study: Study, scenario: str, pairs: Iterable[int]) -> Noise:
    return Noise.for_samples(study.seed, "connectivity", [f"{scenario}/{pair}" for pair in pairs])


def _join_block(
    study: Study,
    classifier: Classifier,
    labels: Tensor,
    scenario: str,
    block: range,
    spacing: float,
    advance: Counter,
) -> Arrays:
    """Columns of some pairs of a scenario, joined together."""
    ends = draw_pairs(classifier, study.images, labels, scenario, _streams(study, scenario, block))
    rows = [_path_row(path) for path in _join(classifier, ends, labels, spacing, advance)]
    return {
        "first": ends.rows[:, 0].numpy(),
        "second": ends.rows[:, 1].numpy(),
        "carried": ends.moved.numpy(),
        "distance": (ends.second - ends.first).flatten(1).norm(dim=1).cpu().numpy(),
        **{key: np.array([row[key] for row in rows]) for key in rows[0]},
    }


def _join(
    classifier: Classifier, ends: Pairs, labels: Tensor, spacing: float, advance: Counter | None = None
) -> list[Path | None]:
    """A path for every pair; None: an end is not in the region.

    Labels were predicted in other batches: where two classes tie, rounding decides anew.
    """
    wanted = labels[ends.rows[:, 0]].to(ends.first.device)
    usable = ends.reached.clone()
    for end in (ends.first, ends.second):
        usable &= labels_of(classifier, end) == wanted
    paths: list[Path | None] = [None] * len(usable)
    if advance is not None:
        advance(int((~usable).sum()))
    rows = usable.nonzero().flatten()
    if len(rows):
        joined = find_paths(
            classifier,
            ends.first[rows],
            ends.second[rows],
            labels=wanted[rows],
            spacing=spacing,
            advance=advance,
        )
        for row, path in zip(rows.tolist(), joined, strict=True):
            paths[row] = path
    return paths


# --- tables ----------------------------------------------------------------------------------------------


def _path_row(path: Path | None) -> dict[str, float]:
    """A path in numbers; `path` None: an end is not in the region."""
    if path is None or path.points is None:
        outcome, depth = (NO_END, 0) if path is None else (NOT_FOUND, path.depth)
        return {"outcome": outcome, "depth": depth, "anchors": 0, "D": np.nan, "outside": 0, "excess": np.nan}
    anchors = path.points[1:-1]
    excess = torch.maximum(-anchors, anchors - 1).flatten(1).amax(1).clamp_min(0)
    return {
        "outcome": BENT if path.anchors else STRAIGHT,
        "depth": path.depth,
        "anchors": path.anchors,
        "D": path.deviation,
        "outside": int((excess > 0).sum()),
        "excess": float(excess.max()) if len(excess) else np.nan,
    }


def _pair_table(study: Study, name: str, labels: Tensor, cached: Arrays) -> pd.DataFrame:
    """One row a pair, with names instead of numbers."""
    parts = []
    for scenario in SCENARIOS:
        columns: dict[str, Any] = {
            key.partition(".")[2]: column for key, column in cached.items() if key.startswith(f"{scenario}.")
        }
        first, second = columns.pop("first"), columns.pop("second")
        outcome = columns.pop("outcome").astype(int)
        names = {
            "model": name,
            "scenario": scenario,
            "pair": np.arange(len(first)),
            "first": [study.data.ids[row] for row in first],
            "second": ["random" if row < 0 else study.data.ids[row] for row in second],
            "label": [study.data.classes[label] for label in labels[first].tolist()],
            "outcome": [OUTCOMES[code] for code in outcome],
        }
        parts.append(pd.DataFrame(names | columns))
    return pd.concat(parts, ignore_index=True)


def _scenario_row(name: str, scenario: str, part: pd.DataFrame, spacing: float) -> dict[str, object]:
    """A scenario in numbers; anchors and D are those of the bent paths, and of all paths."""
    joined = part[part["outcome"] != OUTCOMES[NO_END]]
    straight = int((joined["outcome"] == OUTCOMES[STRAIGHT]).sum())
    bent = joined[joined["outcome"] == OUTCOMES[BENT]]
    paths = joined[joined["D"].notna()]
    rate = Rate(straight + len(bent), len(joined))
    low, high = rate.interval
    anchors = int(bent["anchors"].sum())
    return {
        "model": name,
        "scenario": scenario,
        "pairs": len(part),
        "n": len(joined),
        "found": rate.count,
        "ci_low": low,
        "ci_high": high,
        "straight": straight,
        "bent": len(bent),
        "anchors": bent["anchors"].mean(),
        "D": bent["D"].mean(),
        "D_largest": bent["D"].max(),
        "outside": int(bent["outside"].sum()) / anchors if anchors else np.nan,
        "spacing": spacing,
        "anchors_all": paths["anchors"].mean(),
        "D_all": paths["D"].mean(),
    }


def _stay_row(name: str, k: int, stayed: NDArray[Any]) -> dict[str, object]:
    """How many combinations of k images stayed in their region."""
    rate = Rate(int(stayed.sum()), len(stayed))
    low, high = rate.interval if rate.total else (np.nan, np.nan)
    return {
        "model": name,
        "k": k,
        "draws": rate.total,
        "stayed": rate.count,
        "share": rate.value,
        "ci_low": low,
        "ci_high": high,
    }


def _bent(row: ModelRow, key: str) -> str:
    """A number of the bent paths, or a dash without one."""
    if not row["bent"]:
        return "-"
    forms = {"anchors": f"{row[key]:.1f}", "outside": f"{100 * row[key]:.0f} %"}
    return forms.get(key, f"{row[key] - 1:.1e}")


#: Anchors and D - 1 of all paths, then of the bent ones, under the same head.
COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "to": lambda row: row["scenario"],
    "found": lambda row: f"{row['found']}/{row['n']}",
    "95 %": lambda row: f"{100 * row['ci_low']:.0f}-{100 * row['ci_high']:.0f}",
    "straight": lambda row: f"{row['straight']}/{row['n']}",
    "anchors": lambda row: f"{row['anchors_all']:.2g}" if row["found"] else "-",
    "D - 1": lambda row: f"{row['D_all'] - 1:.1e}" if row["found"] else "-",
    "if bent": lambda row: _bent(row, "anchors"),
    "D - 1 ": lambda row: _bent(row, "D"),
    "largest": lambda row: _bent(row, "D_largest"),
    "outside": lambda row: _bent(row, "outside"),
}


# --- figures ---------------------------------------------------------------------------------------------


def _draw_paths(study: Study, labels: dict[str, Tensor], rows: pd.DataFrame, spacing: float) -> list[Shown]:
    """For every model that has one, its first path that is not straight, next to the segment."""
    sections: dict[str, PathSection] = {}
    for name, classifier in study.models.items():
        bent = rows[(rows["model"] == name) & (rows["outcome"] == OUTCOMES[BENT])]
        if len(bent):
            scenario, pair = bent.iloc[0][["scenario", "pair"]]
            noise = _streams(study, scenario, [pair])
            ends = draw_pairs(classifier, study.images, labels[name], scenario, noise)
            section = section_of(classifier, _join(classifier, ends, labels[name], spacing)[0])
            if section is not None:
                sections[name] = section
    if not sections:
        return []
    study.archive(
        "path",
        {
            f"{name}.{key}": values.numpy()
            for name, section in sections.items()
            for key, values in vars(section).items()
        },
    )
    return [
        study.figure(
            "path",
            _path_figure(sections),
            "A segment that leaves the region, and the path that does not",
            "Green: the region of both ends. The line in the middle of a panel is the segment (left) or the "
            "path with its anchors (right); across it the normal r of the boundary nearest to the first end.",
        )
    ]


def section_of(classifier: Classifier, path: Path | None) -> PathSection | None:
    """Labels around a path; None without one, or where it is straight.

    A path that was bent need not be bent again: among other pairs it was another batch, and other rounding.
    """
    if path is None or path.points is None or not path.anchors:
        return None
    return path_section(classifier, path.points)


def _path_figure(sections: dict[str, PathSection]) -> Figure:
    """Labels around the segment and around the path, one row a model."""
    with plots.style():
        figure = Figure(figsize=(6.4, 1.9 * len(sections)), layout="constrained")
        grid = figure.subplots(len(sections), 2, squeeze=False, sharex=True, sharey="row")
        along = np.linspace(0, 1, ALONG)
        for row, (name, section) in zip(grid, sections.items(), strict=True):
            own = int(section.path[ACROSS // 2, 0])
            for axes, labels in zip(row, (section.straight, section.path), strict=True):
                plots.regions(axes, along, section.height.numpy(), labels.numpy(), own)
                axes.axhline(0, color=plots.IMAGE, linewidth=1)
            marks = [0.0, *section.anchors.tolist(), 1.0]
            row[0].plot([0, 1], [0, 0], "o", color=plots.IMAGE, markersize=4, clip_on=False)
            row[1].plot(marks, np.zeros(len(marks)), "o", color=plots.IMAGE, markersize=3, clip_on=False)
            row[0].set_ylabel(f"{name}\nalong r, pixels")
        grid[0][0].set_title("segment")
        grid[0][1].set_title("path")
        for axes in grid[-1]:
            axes.set_xlabel("share of the length")
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
        return figure


def _draw_convexity(study: Study, table: pd.DataFrame) -> Shown:
    """Shares of combinations that stay, over the number of images, with their intervals."""
    series, bands = {}, {}
    for name, part in table.dropna().groupby("model", sort=False):
        k = part["k"].to_numpy(float)
        series[str(name)] = (k, part["share"].to_numpy(float))
        bands[str(name)] = (part["ci_low"].to_numpy(float), part["ci_high"].to_numpy(float))
    figure = plots.lines(
        series,
        bands=bands,
        xlabel="images in the combination",
        ylabel="stays in the region",
        marks=True,
        ylim=(0, 1.03),
    )
    two = ", ".join(f"{name} {100 * y[0]:.1f} %" for name, (_, y) in series.items())
    return study.figure(
        "convexity",
        figure,
        "Convex combinations that stay in the region",
        "Share of random convex combinations of images of one region that lie in it, with 95 % intervals. "
        f"Of two images: {two}.",
    )
