"""`cure-bench shared`: directions that the boundaries near many images share, and what they do to others."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry import prose
from robustbench_cure.geometry.boundary import Nearest, bending, nearest_boundary
from robustbench_cure.geometry.boundary_study import DENSE, steps
from robustbench_cure.geometry.hessian import on_sphere
from robustbench_cure.geometry.kept import Kept
from robustbench_cure.geometry.page import present
from robustbench_cure.geometry.profile import random_basis
from robustbench_cure.geometry.shared import (
    common,
    ends,
    most_curved,
    random_in,
    random_outside,
    relative_curvatures,
    share_inside,
)
from robustbench_cure.geometry.shared_figures import (
    Learned,
    draw_cosines,
    draw_fooling,
    draw_noise,
    draw_pictures,
    draw_relative,
    draw_singular,
)
from robustbench_cure.geometry.study import Study
from robustbench_cure.geometry.universal import fooled
from robustbench_cure.progress import ProgressLine
from robustbench_cure.threat import parse_fraction

Values = NDArray[np.float64]

#: d/m of the thesis' subspace of shared directions: 3,072 to 200.
RATIO = 16
#: Lengths of the noise inside and outside that subspace, in mean lengths of the images.
LENGTHS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)


def shared(
    study: Study,
    *,
    learn: int | None,
    dimension: int | None,
    xi: str | None,
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
        UsageError: too few images, too many inputs or dimensions.
    """
    d = study.images[0].numel()
    m = dimension or max(1, d // RATIO)
    if len(study.data) < 4:
        raise UsageError(f"--n {len(study.data)}: shared directions need at least 4 images")
    if d > DENSE:
        raise UsageError(f"the images have {d} inputs: all curvatures are taken up to {DENSE}")
    if m >= d:
        raise UsageError(f"--dimension {m}: the images have {d} inputs")
    first = len(study.data) // 2 if learn is None else learn
    if not 2 <= first <= len(study.data) - 2:
        raise UsageError(f"--learn {first}: of {len(study.data)} images, 2 must be left at least (--n)")
    seek, test = study.data.take(range(first)), study.data.take(range(first, len(study.data)))
    learned, rows, relative, fooling, noise, lengths = {}, [], {}, {}, {}, {}
    for name, classifier in study.models.items():
        learned[name] = known = _learn(study, name, classifier, seek, m, step)
        near = nearest_boundary(classifier, test.images)
        usual = float(near.distance.nanmedian()) * d**0.5 / 5
        lengths[name] = length = float(parse_fraction(xi)) if xi else usual
        relative[name] = _relative(study, classifier, test, near, known, step, directions)
        fooling[name] = _fooling(study, classifier, test, known, length, draws)
        noise[name] = _noise(study, classifier, test, known)
        rows.append(_row(study, name, test, near, known, relative[name], fooling[name]) | {"length": length})
    table = pd.DataFrame(rows)
    study.table("shared", table)
    study.table("shared-fooling", _joined(fooling))
    study.table("shared-noise", _joined(noise))
    present(
        study,
        title="Shared directions",
        lead=prose.SHARED,
        columns=("model", "m", "chance", "adv.", "diff.", "shift", "rho 1", "S_c", "S_f", "any"),
        rows=[_cells(row) for row in table.to_dict("records")],
        figures=[
            draw_fooling(study, fooling),
            draw_noise(study, noise),
            draw_relative(study, relative),
            draw_singular(study, learned, seek),
            *draw_cosines(study, learned),
            draw_pictures(study, learned),
        ],
        settings={
            "dimension": m,
            "length": ", ".join(f"{length:.3g} ({name})" for name, length in lengths.items()),
            "step_h": "the distance of each image's boundary" if step is None else step,
            "draws": draws,
            "directions": directions,
            "learnt_on": f"{first} images",
            "judged_on": f"{len(test)} others, cut to [0, 1]",
        },
    )
    return table


def _learn(
    study: Study, name: str, classifier: Classifier, images: EvalSet, m: int, step: float | None
) -> Learned:
    """The subspaces of one model; what an interrupted run saw is not looked at again."""
    kept = Kept(
        study.out / f"shared-{name}.npz",
        study.identity(name, learn=len(images), m=m, h=step, seed=study.seed),
    )
    if "curved" not in kept.rows:
        normals, curvatures, mean = _look(study, name, classifier, images, step, kept)
        if not len(normals):
            raise UsageError(f"{name}: DeepFool finds no boundary near the images")
        singular, flat = common(normals)
        _, directions = common(curvatures)
        curved = most_curved(mean, m)
        kept.write(
            {
                "singular": singular.numpy(),
                "flat": flat.numpy(),
                "curved": curved.numpy(),
                "shared": directions[:m].numpy(),
                "images": np.array(len(normals)),
            }
        )
        kept = Kept(kept.path, study.identity(name, learn=len(images), m=m, h=step, seed=study.seed))
    study.files.append(kept.path)
    tensors = {key: torch.from_numpy(kept.rows[key]) for key in ("singular", "flat", "curved", "shared")}
    return Learned(**tensors, images=int(kept.rows["images"]))


def _look(
    study: Study, name: str, classifier: Classifier, images: EvalSet, step: float | None, kept: Kept
) -> tuple[Tensor, Tensor, Tensor]:
    """Normals (k, d), principal directions (any, d) and the mean projected Hessian (d, d) of all images."""
    d, n = images.images[0].numel(), len(images)
    near = nearest_boundary(classifier, images.images)
    h = steps(near, step)
    rotation = random_basis(d - 1, study.seed, classifier.device)
    done = int(kept.rows["done"]) if kept.rows else 0
    normals = list(kept.rows["normals"]) if kept.rows else []
    curvatures = list(kept.rows["curvatures"]) if kept.rows else []
    total = torch.from_numpy(kept.rows["total"]) if kept.rows else torch.zeros((d, d), dtype=torch.float64)
    each = 2 * (d - 1)
    with ProgressLine(name, "gradients") as line:
        gradients = done * each

        def advance(count: int) -> None:
            nonlocal gradients
            gradients += count
            line(gradients, n * each, "curvature")

        for row in range(done, n):
            if bool(near.found[row]):
                place = near.point[row], near.own[row], near.other[row]
                frame, matrix = bending(
                    classifier, *place, h=float(h[row]), rotation=rotation, advance=advance
                )
                if not bool(matrix.isnan().any()):
                    way = (near.point[row] - images.images[row].to(classifier.device)).flatten()
                    normals.append((way / way.norm()).cpu().numpy())
                    curvatures.append(ends(frame, matrix).cpu().numpy())
                    total += (frame.T @ matrix @ frame).cpu().double()
            if row + 1 < n:
                kept.keep(
                    {
                        "done": np.array(row + 1),
                        "normals": np.array(normals, np.float32).reshape(-1, d),
                        "curvatures": np.array(curvatures, np.float32),
                        "total": total.numpy(),
                    }
                )
    stacked = np.concatenate(curvatures) if curvatures else np.zeros((0, d), np.float32)
    return (
        torch.from_numpy(np.array(normals, np.float32).reshape(-1, d)),
        torch.from_numpy(stacked),
        total / max(1, len(normals)),
    )


def _relative(
    study: Study,
    classifier: Classifier,
    test: EvalSet,
    near: Nearest,
    known: Learned,
    step: float | None,
    directions: int,
) -> Values:
    """rho_i: how much more boundaries near unseen images bend along u_i than at random, on average."""
    rows = near.found.nonzero().flatten()
    if not len(rows):
        return np.full(len(known.shared), np.nan)
    found = Nearest(
        near.own[rows], near.other[rows], near.point[rows], near.beyond[rows], near.distance[rows]
    )
    ids = [test.ids[row] for row in rows.tolist()]
    noise = Noise.for_samples(study.seed, "shared/relative", ids, classifier.device)
    values = relative_curvatures(
        classifier, found, known.shared, h=steps(found, step), references=directions, noise=noise
    )
    mean: Values = np.nanmean(values.cpu().numpy(), axis=0)
    return mean


def _fooling(
    study: Study, classifier: Classifier, test: EvalSet, known: Learned, length: float, draws: int
) -> pd.DataFrame:
    """Unseen images that get another label by vectors drawn from the first dimensions of a subspace."""
    x = test.images.to(classifier.device)
    labels = classifier.logits(x).argmax(1)
    d = x[0].numel()
    rows = []
    for kind, basis in (("S_c", known.curved), ("S_f", known.flat), ("any", None)):
        for m in [d] if basis is None else _dimensions(len(known.curved), len(basis)):
            noise = Noise.for_samples(study.seed, f"shared/{kind}", [str(k) for k in range(draws)])
            unit = on_sphere(noise, (d,), 0) if basis is None else random_in(basis[:m], noise, 0)
            shares = [
                float(fooled(classifier, x, labels, length * v.view(x[0].shape)).double().mean())
                for v in unit
            ]
            row = {"subspace": kind, "m": m, "draws": draws, "fooled": float(np.mean(shares))}
            rows.append(row | {"best": max(shares), "n": len(x)})
    return pd.DataFrame(rows)


def _dimensions(m: int, most: int) -> list[int]:
    """Powers of two, the m that was asked for, and all there are."""
    powers = (2**k for k in range(most.bit_length()))
    return sorted({*powers, min(m, most), most})


def _noise(study: Study, classifier: Classifier, test: EvalSet, known: Learned) -> pd.DataFrame:
    """Unseen images that get another label by noise of their own, inside the u_i and outside."""
    x = test.images.to(classifier.device)
    labels = classifier.logits(x).argmax(1)
    usual = float(x.flatten(1).norm(dim=1).mean())
    noise = Noise.for_samples(study.seed, "shared/noise", test.ids)
    units = {
        "inside": random_in(known.shared, noise, 0),
        "outside": random_outside(known.shared, noise, 1),
        "anywhere": on_sphere(noise, (x[0].numel(),), 2),
    }
    rows = []
    for kind, unit in units.items():
        for share in LENGTHS:
            moved = x + share * usual * unit.to(x).view_as(x)
            changed = classifier.logits(moved.clamp(0, 1)).argmax(1) != labels
            rows.append({"noise": kind, "length": share, "changed": float(changed.double().mean())})
    return pd.DataFrame(rows)


def _row(
    study: Study,
    name: str,
    test: EvalSet,
    near: Nearest,
    known: Learned,
    relative: Values,
    fooling: pd.DataFrame,
) -> dict[str, Any]:
    x, m = test.images, len(known.curved)
    noise = Noise.for_samples(study.seed, "shared/random", test.ids)
    way = near.point.cpu() - x
    shares = {
        "random": on_sphere(noise, tuple(x.shape[1:]), 0),
        "adversarial": way[near.found.cpu()],
        "difference": x - x.roll(1, 0),
        "shift": torch.gradient(x, dim=3)[0],
    }
    dimensions = {"S_c": m, "S_f": min(m, len(known.flat)), "any": x[0].numel()}
    share = fooling.set_index(["subspace", "m"])["fooled"]
    return {
        "model": name,
        "images": known.images,
        "m": m,
        "chance": (len(known.shared) / x[0].numel()) ** 0.5,
        **{kind: float(share_inside(known.shared, v).nanmean()) for kind, v in shares.items()},
        "rho_1": float(relative[0]),
        "rho_mean": float(relative.mean()),
        **{f"fooled_{kind}": share[kind, at] for kind, at in dimensions.items()},
    }


def _cells(row: dict[Hashable, Any]) -> list[str]:
    shares = [f"{row[key]:.2f}" for key in ("chance", "adversarial", "difference", "shift")]
    fooling = [f"{100 * row[f'fooled_{kind}']:.0f} %" for kind in ("S_c", "S_f", "any")]
    return [row["model"], str(row["m"]), *shares, f"{row['rho_1']:.1f}", *fooling]


def _joined(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([table.assign(model=name) for name, table in tables.items()], ignore_index=True)
