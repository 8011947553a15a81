"""The subspaces of one model, learned from the boundaries near some images."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.files import Kept
from robustbench_cure.geometry.boundary import bending
from robustbench_cure.geometry.boundary_study import nearest_of, steps
from robustbench_cure.geometry.profile import random_basis
from robustbench_cure.geometry.shared import ENDS, Learned, common, ends, in_inputs, most_curved
from robustbench_cure.progress import ProgressLine
from robustbench_cure.studies.engine import Study


def images_needed(m: int, d: int) -> int:
    """Images to learn m shared directions from: fewer than 2 m columns have no m directions to share."""
    return math.ceil(2 * m / min(2 * ENDS, d - 1))


def learn_subspaces(
    study: Study, name: str, classifier: Classifier, images: EvalSet, m: int, step: float | None
) -> Learned:
    """The subspaces of one model; what an interrupted run saw is not looked at again.

    Args:
        study: folder, seed.
        name: of the model.
        classifier: the model.
        images: to learn from, each at the cost of 2 (d - 1) gradients.
        m: of S_c and the u_i.
        step: of the differences, l2 in pixels; None: each image's distance of the boundary.

    Raises:
        UsageError: too few of the images have a boundary.
    """
    identity = study.identity(name, learn=len(images), m=m, h=step, seed=study.seed)
    kept = Kept(study.out / f"shared-{name}.npz", identity)
    found = kept.rows
    if "curved" not in found:
        normals, curvatures, mean = _look(study, name, classifier, images, m, step, kept)
        _refuse_few(name, len(normals), len(images), m, images.pixels[0].numel())
        singular, flat = common(normals)
        _, directions = common(curvatures)
        parts = {"singular": singular, "flat": flat, "curved": most_curved(mean, m), "shared": directions[:m]}
        # In the order that a file keeps them in: products round by it, and a resumed run reads the file.
        found = {key: np.ascontiguousarray(part.numpy()) for key, part in parts.items()}
        found["images"] = np.array(len(normals))
        kept.write(found)
    study.files.append(kept.path)
    tensors = {key: torch.from_numpy(found[key]) for key in ("singular", "flat", "curved", "shared")}
    return Learned(**tensors, images=int(found["images"]))


def _refuse_few(name: str, found: int, asked: int, m: int, d: int) -> None:
    needed = images_needed(m, d)
    if found < needed:
        raise UsageError(
            f"{name}: {found} of the {asked} images to learn from have a boundary, {m} shared dimensions "
            f"need {needed} (--learn)"
        )


def _look(
    study: Study, name: str, classifier: Classifier, images: EvalSet, m: int, step: float | None, kept: Kept
) -> tuple[Tensor, Tensor, Tensor]:
    """Normals r/||r|| (k, d), principal directions (any, d) and the mean projected Hessian (d, d)."""
    x = images.images
    d, n = x[0].numel(), len(images)
    near = nearest_of(name, classifier, x)
    _refuse_few(name, int(near.found.sum()), n, m, d)  # before the gradients, not after
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
                    way = (near.point[row] - x[row].to(classifier.device)).flatten()
                    normals.append((way / way.norm()).cpu().numpy())
                    curvatures.append(ends(frame, matrix).cpu().numpy())
                    total += in_inputs(frame, matrix).cpu().double()
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
