"""`cure-bench shared`: directions that the boundaries near many images share, and what they do to others."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry import prose
from robustbench_cure.geometry.boundary_study import DENSE, nearest_of, refuse_longer
from robustbench_cure.geometry.shared import Learned
from robustbench_cure.geometry.shared_figures import (
    draw_bending,
    draw_cosines,
    draw_fooling,
    draw_noise,
    draw_pictures,
    draw_relative,
    draw_singular,
)
from robustbench_cure.geometry.shared_judge import (
    Unseen,
    bending_by_dimension,
    changed_by_noise,
    fooling_by_dimension,
    relative,
    row_of,
)
from robustbench_cure.geometry.shared_learn import images_needed, learn_subspaces
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.page import Shown, present

Values = NDArray[np.float64]

#: d/m of the thesis' subspace of shared directions: 3,072 to 200.
RATIO = 16


@dataclass
class Found:
    """What was found, by model."""

    learned: dict[str, Learned] = field(default_factory=dict)
    rho: dict[str, Values] = field(default_factory=dict)
    bending: dict[str, pd.DataFrame] = field(default_factory=dict)
    fooling: dict[str, pd.DataFrame] = field(default_factory=dict)
    noise: dict[str, pd.DataFrame] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


def shared(
    study: Study,
    *,
    learn: int | None,
    dimension: int | None,
    xi: Fraction | None,
    step: float | None,
    draws: int,
    directions: int,
) -> pd.DataFrame:
    """Shared subspaces of all models (thesis, sections 6.3-6.5 and 7.4), judged on other images; the table.

    The first images are for learning, all others for judging.

    Args:
        study: models, images, folder, seed.
        learn: images to learn from, each at the cost of 2 (d - 1) gradients; None: half of all.
        dimension: m of the subspaces; None: a sixteenth of the inputs.
        xi: l2 length, pixels, of the vectors that are to change labels; None: a fifth of what random noise
            needs for it (thesis, section 6.4.1), taken as sqrt(d) times the median distance of each model's
            boundaries.
        step: of the differences, l2 in pixels; None: each image's distance of the boundary.
        draws: random vectors of every subspace.
        directions: random ones that the relative curvature is measured against.

    What an interrupted run finished is taken over, image by image.

    Raises:
        UsageError: too few images, too many inputs or dimensions, lengths beyond the box, no boundaries.
    """
    d = study.images[0].numel()
    m = dimension or max(1, d // RATIO)
    first = len(study.data) // 2 if learn is None else learn
    _refuse(study, first, m, xi, step)
    seek, test = study.data.take(range(first)), study.data.take(range(first, len(study.data)))
    found, lengths = _all_models(study, seek, test, m, xi, step, draws, directions)
    table = pd.DataFrame(found.rows)
    study.table("shared", table)
    present(
        study,
        title="Shared directions",
        lead=prose.SHARED,
        columns=("model", "n", "attack", "difference", "shift", "rho 1", "S_c", "S_f", "any"),
        rows=[_cells(row) for row in table.to_dict("records")],
        figures=_figures(study, found, seek),
        settings={
            "dimension": m,
            "dimension_of_S_f": ", ".join(f"{row['m_S_f']} ({row['model']})" for row in found.rows),
            "length": ", ".join(f"{length:.3g} ({name})" for name, length in lengths.items()),
            "step_h": "the distance of each image's boundary" if step is None else step,
            "draws": draws,
            "directions": directions,
            "learnt_on": f"{first} images",
            "judged_on": f"{len(test)} others; vectors are cut to [0, 1] with them, noise is not",
        },
        note=_note(found.rows[0]),
    )
    return table


def _refuse(study: Study, first: int, m: int, xi: Fraction | None, step: float | None) -> None:
    """Refuse what cannot be measured, before anything is."""
    d, n = study.images[0].numel(), len(study.data)
    if n < 4:
        raise UsageError(f"--n {n}: shared directions need at least 4 images")
    if d > DENSE:
        raise UsageError(f"the images have {d} inputs: all curvatures are taken up to {DENSE}")
    if m >= d:
        raise UsageError(f"--dimension {m}: the images have {d} inputs")
    refuse_longer("--step", step, d)
    refuse_longer("--xi", xi, d)
    if not 2 <= first <= n - 2:
        raise UsageError(f"--learn {first}: of {n} images, 2 must be left at least (--n)")
    needed = images_needed(m, d)
    if first < needed:
        raise UsageError(f"--learn {first}: {m} shared dimensions need {needed} images to learn from")


def _all_models(
    study: Study,
    seek: EvalSet,
    test: EvalSet,
    m: int,
    xi: Fraction | None,
    step: float | None,
    draws: int,
    directions: int,
) -> tuple[Found, dict[str, float]]:
    """Everything that is measured, and the length of the vectors for each model."""
    near = {name: nearest_of(name, classifier, test.images) for name, classifier in study.models.items()}
    for name, boundaries in near.items():
        if not bool(boundaries.found.any()):
            raise UsageError(f"{name}: DeepFool finds no boundary near the {len(test)} images to judge on")
    found, lengths = Found(), {}
    for name, classifier in study.models.items():
        usual = float(near[name].distance.nanmedian()) * test.images[0].numel() ** 0.5 / 5
        lengths[name] = length = usual if xi is None else float(xi)
        known = found.learned[name] = learn_subspaces(study, name, classifier, seek, m, step)
        unseen = Unseen(classifier, test, near[name], study.seed)
        found.rho[name] = rho = relative(unseen, known, step, directions)
        found.bending[name] = bending = bending_by_dimension(unseen, known, step, draws)
        found.fooling[name] = fooling = fooling_by_dimension(unseen, known, length, draws)
        found.noise[name] = changed_by_noise(unseen, known)
        found.rows.append(row_of(name, unseen, known, rho, fooling, bending) | {"length": length})
    return found, lengths


def _figures(study: Study, found: Found, seek: EvalSet) -> list[Shown]:
    study.table("shared-bending", _joined(found.bending))
    study.table("shared-fooling", _joined(found.fooling))
    study.table("shared-noise", _joined(found.noise))
    return [
        draw_bending(study, found.bending),
        draw_fooling(study, found.fooling),
        draw_noise(study, found.noise),
        draw_relative(study, found.rho),
        draw_singular(study, found.learned, seek),
        *draw_cosines(study, found.learned),
        draw_pictures(study, found.learned),
    ]


def _cells(row: dict[Hashable, Any]) -> list[str]:
    shares = [f"{row[key]:.2f}" for key in ("adversarial", "difference", "shift")]
    fooling = [f"{100 * row[f'fooled_{kind}']:.0f} %" for kind in ("S_c", "S_f", "any")]
    return [row["model"], str(row["n"]), *shares, f"{row['rho_1']:.1f}", *fooling]


def _note(row: dict[str, Any]) -> str:
    return f"""\
attack, difference, shift: their share in the shared directions, {row["chance"]:.2f} by chance;
rho 1: curvature along the first of these, 1 along random ones;
S_c, S_f, any: images fooled along curved directions, normals, all inputs."""


def _joined(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([table.assign(model=name) for name, table in tables.items()], ignore_index=True)
