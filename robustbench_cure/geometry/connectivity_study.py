"""`cure-bench connectivity`: paths inside classification regions, and their convexity, for any models."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry import figures, prose
from robustbench_cure.geometry.connectivity import AHEAD, DEPTH, Path, find_paths, labels_of
from robustbench_cure.geometry.convexity import mixtures
from robustbench_cure.geometry.kept import Kept
from robustbench_cure.geometry.page import Shown, present
from robustbench_cure.geometry.path_picture import Crossing, cross, draw_paths
from robustbench_cure.geometry.region_pairs import SCENARIOS, draw_pairs
from robustbench_cure.geometry.study import Study
from robustbench_cure.progress import ProgressLine
from robustbench_cure.stats import Rate

#: What became of a pair.
OUTCOMES = ("no end", "not found", "bent", "straight")
NO_END, NOT_FOUND, BENT, STRAIGHT = range(4)
#: Pairs worked on together, and kept together when a command is interrupted.
BLOCK = 32
#: Images in a convex combination.
COUNTS = range(2, 11)

Columns = dict[str, NDArray[Any]]


def connectivity(study: Study, *, pairs: int, spacing: float, draws: int) -> pd.DataFrame:
    """Paths between points of one region, and convex combinations of its images (thesis, 7.3); the table.

    Args:
        study: models, images, folder, seed.
        pairs: of points, in each of `SCENARIOS`.
        spacing: of the samples on a path, as a share of the distance of its ends.
        draws: of convex combinations, for each number of images in `COUNTS`.

    What an interrupted run finished is taken over.

    Raises:
        UsageError: images that leave nothing to join.
    """
    labels = {name: _labels(study, name, classifier) for name, classifier in study.models.items()}
    found = {name: _measure(study, name, labels[name], pairs, spacing, draws) for name in study.models}
    everything = pd.concat(
        [_pairs(study, name, labels[name], found[name]) for name in study.models], ignore_index=True
    )
    study.table("connectivity-pairs", everything)
    table = pd.DataFrame(
        [
            _row(str(name), str(scenario), part, spacing)
            for (name, scenario), part in everything.groupby(["model", "scenario"], sort=False)
        ]
    )
    study.table("connectivity", table)
    convexity = pd.DataFrame(
        [_stay(name, k, found[name][f"mixtures-{k}"]) for name in study.models for k in COUNTS]
    )
    study.table("convexity", convexity)
    present(
        study,
        title="Connected regions",
        lead=prose.CONNECTIVITY,
        columns=("model", "to", "found", "95 %", "straight", "anchors", "D - 1", "largest", "outside"),
        rows=[_cells(row) for row in table.to_dict("records")],
        figures=[*_paths(study, labels, everything, spacing), _convexity(study, convexity)],
        settings={
            "pairs": pairs,
            "spacing": f"{spacing:g} of the distance",
            "halvings": f"{DEPTH} at most",
            "anchors_carried": f"by DeepFool, l2, and {AHEAD:g} times as far again; not cut to the box",
            "draws": f"{draws} for each number of images",
        },
    )
    return table


def _labels(study: Study, name: str, classifier: Classifier) -> Tensor:
    """Predicted labels, int64 (N,) on the CPU; refuses images that leave no pair."""
    labels = labels_of(classifier, study.images.to(classifier.device)).cpu()
    sizes = labels.bincount()
    if int(sizes.max()) < 2:
        raise UsageError(f"{name}: no two of the {len(labels)} images have the same label: raise --n")
    if int((sizes > 0).sum()) < 2:
        raise UsageError(f"{name}: all {len(labels)} images have the same label: raise --n")
    return labels


def _measure(study: Study, name: str, labels: Tensor, pairs: int, spacing: float, draws: int) -> Columns:
    """All columns of a model: those of pairs as scenario.column, and for each k whether draws stayed."""
    classifier = study.models[name]
    settings = {"pairs": pairs, "spacing": spacing, "draws": draws, "seed": study.seed}
    kept = Kept(study.out / f"connectivity-{name}.npz", study.identity(name, **settings))
    found: Columns = dict(kept.rows)
    for k in COUNTS:
        if f"mixtures-{k}" not in found:
            found[f"mixtures-{k}"] = _mixtures(study, classifier, labels, k, draws)
    kept.write(found)
    with ProgressLine(name, "pairs") as line:
        for place, scenario in enumerate(SCENARIOS):
            while (start := len(found.get(f"{scenario}.outcome", ()))) < pairs:
                done = place * pairs + start

                def advance(n: int, scenario: str = scenario) -> None:
                    nonlocal done
                    done += n
                    line(done, len(SCENARIOS) * pairs, scenario)

                block = range(start, min(start + BLOCK, pairs))
                for key, column in _block(
                    study, classifier, labels, scenario, block, spacing, advance
                ).items():
                    full = f"{scenario}.{key}"
                    found[full] = np.concatenate([found[full], column]) if full in found else column
                kept.keep(found)
            kept.write(found)
    study.files.append(kept.path)
    return found


def _mixtures(study: Study, classifier: Classifier, labels: Tensor, k: int, draws: int) -> NDArray[np.bool_]:
    """Whether each combination of k images stays; empty if no region holds so many."""
    if int(labels.bincount().max()) < k:
        return np.zeros(0, bool)
    noise = Noise.for_samples(study.seed, "connectivity", [f"{k} images/{draw}" for draw in range(draws)])
    return mixtures(classifier, study.images, labels, k, noise).numpy()


def _streams(study: Study, scenario: str, pairs: Iterable[int]) -> Noise:
    return Noise.for_samples(study.seed, "connectivity", [f"{scenario}/{pair}" for pair in pairs])


def _block(
    study: Study,
    classifier: Classifier,
    labels: Tensor,
    scenario: str,
    block: range,
    spacing: float,
    advance: Callable[[int], None],
) -> Columns:
    """Columns of some pairs of a scenario, found together."""
    ends = draw_pairs(classifier, study.images, labels, scenario, _streams(study, scenario, block))
    paths: list[Path | None] = [None] * len(block)
    there = ends.reached.nonzero().flatten()
    advance(len(block) - len(there))
    if len(there):
        joined = find_paths(
            classifier, ends.first[there], ends.second[there], spacing=spacing, advance=advance
        )
        for row, path in zip(there.tolist(), joined, strict=True):
            paths[row] = path
    facts = [_facts(path) for path in paths]
    return {
        "first": ends.rows[:, 0].numpy(),
        "second": ends.rows[:, 1].numpy(),
        "carried": ends.carried.numpy(),
        "distance": (ends.second - ends.first).flatten(1).norm(dim=1).cpu().numpy(),
        **{key: np.array([fact[key] for fact in facts]) for key in facts[0]},
    }


def _facts(path: Path | None) -> dict[str, float]:
    """A path in numbers; `path` None: its second end was not reached."""
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


def _pairs(study: Study, name: str, labels: Tensor, found: Columns) -> pd.DataFrame:
    """One row a pair, with names instead of numbers."""
    parts = []
    for scenario in SCENARIOS:
        columns = {
            key.partition(".")[2]: column for key, column in found.items() if key.startswith(f"{scenario}.")
        }
        first, second = columns.pop("first"), columns.pop("second")
        outcome = columns.pop("outcome").astype(int)
        ends = {
            "model": name,
            "scenario": scenario,
            "pair": np.arange(len(first)),
            "first": [study.data.ids[row] for row in first],
            "second": ["random" if row < 0 else study.data.ids[row] for row in second],
            "label": [study.data.classes[label] for label in labels[first].tolist()],
            "outcome": [OUTCOMES[code] for code in outcome],
        }
        parts.append(pd.DataFrame(ends | columns))
    return pd.concat(parts, ignore_index=True)


def _row(name: str, scenario: str, part: pd.DataFrame, spacing: float) -> dict[str, object]:
    """A scenario in numbers; anchors and D are those of the paths that are not straight."""
    joined = part[part["outcome"] != OUTCOMES[NO_END]]
    straight = int((joined["outcome"] == OUTCOMES[STRAIGHT]).sum())
    bent = joined[joined["outcome"] == OUTCOMES[BENT]]
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
    }


def _cells(row: dict[Hashable, Any]) -> list[str]:
    bent = [
        f"{row['anchors']:.1f}",
        f"{row['D'] - 1:.1e}",
        f"{row['D_largest'] - 1:.1e}",
        f"{100 * row['outside']:.0f} %",
    ]
    return [
        row["model"],
        row["scenario"],
        f"{row['found']}/{row['n']}",
        f"{100 * row['ci_low']:.0f}-{100 * row['ci_high']:.0f}",
        f"{row['straight']}/{row['n']}",
        *(bent if row["bent"] else ["-"] * len(bent)),
    ]


def _stay(name: str, k: int, stayed: NDArray[Any]) -> dict[str, object]:
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


def _paths(study: Study, labels: dict[str, Tensor], rows: pd.DataFrame, spacing: float) -> list[Shown]:
    """For every model that has one, its first path that is not straight, beside the segment."""
    drawn: dict[str, Crossing] = {}
    for name, classifier in study.models.items():
        bent = rows[(rows["model"] == name) & (rows["outcome"] == OUTCOMES[BENT])]
        if len(bent):
            scenario, pair = bent.iloc[0][["scenario", "pair"]]
            noise = _streams(study, scenario, [pair])
            ends = draw_pairs(classifier, study.images, labels[name], scenario, noise)
            # Among other pairs it was another batch, and other rounding: it need not bend again.
            crossing = cross(classifier, find_paths(classifier, ends.first, ends.second, spacing=spacing)[0])
            if crossing is not None:
                drawn[name] = crossing
    return [draw_paths(study, drawn)] if drawn else []


def _convexity(study: Study, table: pd.DataFrame) -> Shown:
    """Shares of combinations that stay, over the number of images, with their intervals."""
    series, bands = {}, {}
    for name, part in table.dropna().groupby("model", sort=False):
        k = part["k"].to_numpy(float)
        series[str(name)] = (k, part["share"].to_numpy(float))
        bands[str(name)] = (part["ci_low"].to_numpy(float), part["ci_high"].to_numpy(float))
    figure = figures.lines(
        series, bands=bands, xlabel="images in the combination", ylabel="stays in the region", marks=True,
        ylim=(0, 1.03),
    )  # fmt: skip
    files = figures.save(figure, study.out / "convexity")
    study.files += files
    two = ", ".join(f"{name} {100 * y[0]:.1f} %" for name, (_, y) in series.items())
    return Shown(
        files[0],
        "Convex combinations that stay in the region",
        f"Share of random convex combinations of images of one region that lie in it, with 95 % intervals. "
        f"Of two images: {two}.",
    )
