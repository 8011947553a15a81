"""What shared subspaces are worth on unseen images: curvature along them, labels changed, projections.

Source: thesis, sections 6.3, 6.4 (Fig. 6.9) and 7.4 (Figs. 7.6 and 7.7, Table 7.1). Vectors of a subspace are
added to images and cut to [0, 1] with them, as universal perturbations are; noise and curvature are not cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.geometry.boundary import Nearest
from robustbench_cure.geometry.boundary_study import steps
from robustbench_cure.geometry.hessian import on_sphere
from robustbench_cure.geometry.shared import (
    Learned,
    curvatures_along,
    random_in,
    random_outside,
    relative_curvatures,
    share_inside,
)
from robustbench_cure.geometry.universal import fooled
from robustbench_cure.stats import Rate

Values = NDArray[np.float64]

#: Lengths of the noise inside and outside the shared directions, in mean lengths of the images.
LENGTHS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)


@dataclass(frozen=True)
class Unseen:
    """Images that nothing was learned from, and their boundaries.

    Attributes:
        classifier: the model.
        data: the images.
        near: their nearest boundaries.
        seed: of every random choice.
    """

    classifier: Classifier
    data: EvalSet
    near: Nearest
    seed: int

    @property
    def found(self) -> Tensor:
        """Numbers of the images with a boundary, int64, on the CPU."""
        return self.near.found.nonzero().flatten().cpu()


def relative(unseen: Unseen, known: Learned, step: float | None, references: int) -> Values:
    """rho_i: how much more boundaries near unseen images bend along u_i than at random, on average; (m,)."""
    near, ids = unseen.near[unseen.found], [unseen.data.ids[row] for row in unseen.found.tolist()]
    noise = Noise.for_samples(unseen.seed, "shared/relative", ids, unseen.classifier.device)
    values = relative_curvatures(
        unseen.classifier, near, known.shared, h=steps(near, step), references=references, noise=noise
    )
    mean: Values = values.nanmean(0).cpu().numpy()
    return mean


def vectors(known: Learned, draws: int, seed: int) -> Iterator[tuple[str, int, Tensor]]:
    """Random unit vectors of the first m dimensions of S_c and S_f, and of all inputs.

    Yields:
        The subspace, m, and one vector a row, float32 (draws, d).
    """
    d = known.curved.shape[1]
    streams = [str(k) for k in range(draws)]
    for kind, basis in (("S_c", known.curved), ("S_f", known.flat)):
        noise = Noise.for_samples(seed, f"shared/{kind}", streams)
        for m in _dimensions(len(known.curved), len(basis)):
            yield kind, m, random_in(basis[:m], noise, 0)
    yield "any", d, on_sphere(Noise.for_samples(seed, "shared/any", streams), (d,), 0)


def _dimensions(m: int, most: int) -> list[int]:
    """Powers of two, the m that was asked for, and all there are."""
    powers = (2**k for k in range(most.bit_length()))
    return sorted({*powers, min(m, most), most})


def bending_by_dimension(unseen: Unseen, known: Learned, step: float | None, draws: int) -> pd.DataFrame:
    """S(x): curvature of boundaries along random vectors of a subspace, by its dimension (thesis, Fig. 6.9a).

    Returns:
        Mean over images and draws, standard deviations over images (of their means over draws) and over draws
        (of their means over images); 1/pixel.
    """
    near = unseen.near[unseen.found]
    rows = []
    for kind, m, unit in vectors(known, draws, unseen.seed):
        along = curvatures_along(unseen.classifier, near, unit, h=steps(near, step))
        by_image = along[~along.isnan().any(1)].cpu().numpy()
        row = {"subspace": kind, "m": m, "draws": draws, "n": len(by_image)}
        row |= {"mean": by_image.mean() if len(by_image) else np.nan}
        row |= {"std": by_image.mean(1).std() if len(by_image) else np.nan}
        rows.append(row | {"std_draws": by_image.mean(0).std() if len(by_image) else np.nan})
    return pd.DataFrame(rows)


def fooling_by_dimension(unseen: Unseen, known: Learned, length: float, draws: int) -> pd.DataFrame:
    """Unseen images that get another label by vectors of a subspace, by its dimension (thesis, Fig. 6.9b).

    Returns:
        Mean share over draws, its standard deviation and largest; the interval is that of the mean as if each
        of the n images had been tried once.
    """
    classifier, x = unseen.classifier, unseen.data.images.to(unseen.classifier.device)
    labels = classifier.logits(x).argmax(1)
    rows = []
    for kind, m, unit in vectors(known, draws, unseen.seed):
        shares = [
            float(fooled(classifier, x, labels, length * v.view(x[0].shape)).double().mean()) for v in unit
        ]
        mean = float(np.mean(shares))
        low, high = Rate(round(mean * len(x)), len(x)).interval
        row = {"subspace": kind, "m": m, "draws": draws, "fooled": mean, "best": max(shares), "n": len(x)}
        rows.append(row | {"std": float(np.std(shares)), "ci_low": low, "ci_high": high})
    return pd.DataFrame(rows)


def changed_by_noise(unseen: Unseen, known: Learned) -> pd.DataFrame:
    """Unseen images that get another label by noise of their own, inside the u_i and outside (Fig. 7.7)."""
    x = unseen.data.images.to(unseen.classifier.device)
    labels = unseen.classifier.logits(x).argmax(1)
    usual = float(x.flatten(1).norm(dim=1).mean())
    noise = Noise.for_samples(unseen.seed, "shared/noise", unseen.data.ids)
    units = {
        "inside": random_in(known.shared, noise, 0),
        "outside": random_outside(known.shared, noise, 1),
        "anywhere": on_sphere(noise, (x[0].numel(),), 2),
    }
    rows = []
    for kind, unit in units.items():
        for share in LENGTHS:
            moved = x + share * usual * unit.to(x).view_as(x)
            changed = unseen.classifier.logits(moved).argmax(1) != labels
            rate = Rate(int(changed.sum()), len(x))
            row = {"noise": kind, "length": share, "changed": rate.value, "n": len(x)}
            rows.append(row | dict(zip(("ci_low", "ci_high"), rate.interval, strict=True)))
    return pd.DataFrame(rows)


def projections(unseen: Unseen, known: Learned) -> dict[str, float]:
    """Mean share of their length that vectors have among the u_i (thesis, Table 7.1)."""
    x = unseen.data.images
    noise = Noise.for_samples(unseen.seed, "shared/random", unseen.data.ids)
    rows = unseen.found
    shares = {
        "random": on_sphere(noise, tuple(x.shape[1:]), 0),
        "adversarial": unseen.near.point.cpu()[rows] - x[rows],
        "difference": x - x.roll(1, 0),
        "shift": torch.gradient(x, dim=3)[0],
    }
    return {kind: float(share_inside(known.shared, v).nanmean()) for kind, v in shares.items()}


def row_of(
    name: str,
    unseen: Unseen,
    known: Learned,
    rho: Values,
    fooling: pd.DataFrame,
    bending: pd.DataFrame,
) -> dict[str, Any]:
    """One model's row of the table: subspaces at the dimension asked for, or at all there are of fewer."""
    m, d = known.curved.shape
    dimensions = {"S_c": m, "S_f": min(m, len(known.flat)), "any": d}
    row = {
        "model": name,
        "images": known.images,
        "n": len(unseen.data),
        "n_boundary": len(unseen.found),
        "m": m,
        "m_S_f": dimensions["S_f"],
        "chance": (len(known.shared) / d) ** 0.5,
        **projections(unseen, known),
        "rho_1": float(rho[0]),
        "rho_mean": float(rho.mean()),
    }
    fools, bends = (table.set_index(["subspace", "m"]) for table in (fooling, bending))
    for kind, at in dimensions.items():
        row[f"fooled_{kind}"] = fools.loc[(kind, at), "fooled"]
        for key in ("std", "ci_low", "ci_high"):
            row[f"fooled_{kind}_{key}"] = fools.loc[(kind, at), key]
        row[f"curvature_{kind}"] = bends.loc[(kind, at), "mean"]
        row[f"curvature_{kind}_std"] = bends.loc[(kind, at), "std"]
    return row
