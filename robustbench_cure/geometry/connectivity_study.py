"""`cure-bench connectivity`: paths inside classification regions, and their convexity, for any models."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.errors import UsageError
from robustbench_cure.files import Kept
from robustbench_cure.geometry import prose
from robustbench_cure.geometry.connectivity import AHEAD, DEPTH, Path, find_paths, labels_of
from robustbench_cure.geometry.connectivity_tables import (
    BENT,
    HEADS,
    OUTCOMES,
    Columns,
    cells,
    facts,
    pair_rows,
    scenario_row,
    stay_row,
)
from robustbench_cure.geometry.convexity import mixtures
from robustbench_cure.geometry.path_picture import Crossing, cross, draw_paths
from robustbench_cure.geometry.region_pairs import SCENARIOS, Pairs, draw_pairs
from robustbench_cure.progress import ProgressLine
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.page import Shown, present

#: Pairs worked on together, and kept together when a command is interrupted.
BLOCK = 32
#: Images in a convex combination.
COUNTS = range(2, 11)


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
        [pair_rows(study, name, labels[name], found[name]) for name in study.models], ignore_index=True
    )
    study.table("connectivity-pairs", everything)
    table = pd.DataFrame(
        [
            scenario_row(str(name), str(scenario), part, spacing)
            for (name, scenario), part in everything.groupby(["model", "scenario"], sort=False)
        ]
    )
    study.table("connectivity", table)
    convexity = pd.DataFrame(
        [stay_row(name, k, found[name][f"mixtures-{k}"]) for name in study.models for k in COUNTS]
    )
    study.table("convexity", convexity)
    present(
        study,
        title="Connected regions",
        lead=prose.CONNECTIVITY,
        columns=HEADS,
        rows=[cells(row) for row in table.to_dict("records")],
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
    rows = [facts(path) for path in _join(classifier, ends, labels, spacing, advance)]
    return {
        "first": ends.rows[:, 0].numpy(),
        "second": ends.rows[:, 1].numpy(),
        "carried": ends.carried.numpy(),
        "distance": (ends.second - ends.first).flatten(1).norm(dim=1).cpu().numpy(),
        **{key: np.array([row[key] for row in rows]) for key in rows[0]},
    }


def _join(
    classifier: Classifier,
    ends: Pairs,
    labels: Tensor,
    spacing: float,
    advance: Callable[[int], None] | None = None,
) -> list[Path | None]:
    """A path for every pair; None: an end is not in the region.

    Labels were predicted in other batches: where two classes tie, rounding decides anew.
    """
    wanted = labels[ends.rows[:, 0]].to(ends.first.device)
    there = ends.reached.clone()
    for end in (ends.first, ends.second):
        there &= labels_of(classifier, end) == wanted
    paths: list[Path | None] = [None] * len(there)
    if advance is not None:
        advance(int((~there).sum()))
    rows = there.nonzero().flatten()
    if len(rows):
        joined = find_paths(
            classifier, ends.first[rows], ends.second[rows], labels=wanted[rows], spacing=spacing,
            advance=advance,
        )  # fmt: skip
        for row, path in zip(rows.tolist(), joined, strict=True):
            paths[row] = path
    return paths


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
            path = _join(classifier, ends, labels[name], spacing)[0]
            crossing = None if path is None else cross(classifier, path)
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
