"""How far the nearest boundary is: the distances DeepFool finds, and the length at which one step does.

Source: Moosavi-Dezfooli, Fawzi & Frossard 2016, arXiv 1511.04599; thesis, Eq. 3.10 and section 3.2.3, Tables
3.1 and 3.2. The average robustness of a classifier is the mean over images of

    rho = ||r(x)||_p / ||x||_p

with r(x) the smallest perturbation that changes the predicted label. DeepFool's is an upper bound of it: it
does change the label, and a smaller one may. Pixels, not cut to the box, as in the thesis.

Beside it the fast gradient sign method: r = eps sign(grad), one eps for all images, the smallest at which
`SHARE` of them change their label. Its success is not monotone in eps, and does not reach `SHARE` for every
network: eps goes up a geometric grid, and what is not reached is said.

Deviation. The step starts from the loss of the predicted label, not of the true one, so that both columns
measure the same thing: how far the prediction is from changing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.losses import odds_against
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.crossing import along_line, along_segment
from robustbench_cure.threat import Norm, ThreatModel, distance

#: Share of the images that one step must change (thesis, section 3.2.3).
SHARE = 0.9
#: Radii that are tried: from a tenth of a grey level to the whole range, each larger than the last by 5 %.
FIRST, RATIO = 0.1 / 255, 1.05
GRID = tuple(min(1.0, FIRST * RATIO**k) for k in range(math.ceil(math.log(1 / FIRST, RATIO)) + 1))


@dataclass(frozen=True)
class Smallest:
    """The smallest perturbation that DeepFool finds, row by row, on the CPU.

    Attributes:
        length: ||r|| in the norm asked for, pixels, float64 (B,), DeepFool's overshoot of 2 % included unless
            cut; NaN where the label never changed.
        steps: iterations of DeepFool, int64 (B,); 0 on a line that is cut.
    """

    length: Tensor
    steps: Tensor


def smallest(
    classifier: Classifier,
    x: Tensor,
    *,
    norm: Norm = "l2",
    basis: Tensor | None = None,
    cut: bool = False,
) -> Smallest:
    """Distance to the nearest change of the predicted label.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W) in [0, 1].
        norm: that is to be small.
        basis: of the subspace that r lies in, as `deepfool` takes it; None: all inputs.
        cut: end r where the label first changes on the way along it, instead of where DeepFool ends: at least
            2 % beyond a boundary. In a subspace of one dimension, a line, look both ways instead: DeepFool
            goes one only.
    """
    x = x.to(classifier.device)
    label = classifier.logits(x).argmax(1)
    basis = None if basis is None else basis.to(x.device)
    if cut and norm == "l2" and basis is not None and basis.shape[1] == 1:
        nearer = along_line(classifier, x, label, basis[:, 0].expand_as(x))
        return Smallest(nearer, torch.zeros_like(label).cpu())
    threat = ThreatModel.parse(norm, "0")  # any radius: minimal DeepFool takes none
    found = deepfool(classifier, x, label, threat=threat, mode="minimal", clip=False, basis=basis)
    reached = found.converged if found.converged is not None else torch.ones_like(label, dtype=torch.bool)
    length = torch.where(reached, distance(norm, x.double(), found.x_adv.double()), torch.nan).cpu()
    if cut:
        length *= along_segment(classifier, x, label, found.x_adv - x)
    return Smallest(length, found.steps.cpu())


@dataclass(frozen=True)
class OneStep:
    """What one step of the gradient's sign needs to change the labels of most images.

    Attributes:
        eps: its length, pixels, linf: the first of the grid that changes `SHARE` of the images; if none does,
            the first that changes most.
        changed: share of the images that it changes.
        direction: sign of the gradient, float32 (B,C,H,W), on the device of the model; zero for an image
            without a gradient.
    """

    eps: float
    changed: float
    direction: Tensor

    @property
    def reached(self) -> bool:
        """Whether `SHARE` of the images changed."""
        return self.changed >= SHARE

    def lengths(self, norm: Norm) -> Tensor:
        """||r|| of every image in a norm, pixels, float64 (B,) on the CPU; NaN without a gradient."""
        size = distance(norm, torch.zeros_like(self.direction).double(), self.direction.double())
        return torch.where(size > 0, self.eps * size, torch.nan).cpu()


def one_step(classifier: Classifier, x: Tensor, advance: Callable[[int], None] | None = None) -> OneStep:
    """Lengthen one step of the gradient's sign, the same for all images, until most of them change.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W) in [0, 1]; the steps are not cut to the box.
        advance: told of radii tried.
    """
    x = x.to(classifier.device)
    label = classifier.logits(x).argmax(1)
    parts = []
    for rows in torch.split(torch.arange(len(x), device=x.device), classifier.batch_size):
        # Steepest where cross-entropy is, also where that is zero in float32.
        loss = partial(odds_against, labels=label[rows])
        _, gradient = classifier.value_and_gradient(x[rows], loss, reference=True)
        parts.append(gradient.sign())
    direction = torch.cat(parts)
    best, most = GRID[0], -1.0
    for eps in GRID:
        changed = float((classifier.logits(x + eps * direction).argmax(1) != label).double().mean())
        if changed > most:
            best, most = eps, changed
        if advance is not None:
            advance(1)
        if changed >= SHARE:
            break
    return OneStep(best, most, direction)
