"""How far the nearest boundary is: the smallest perturbation by DeepFool, and the length that one step needs.

Source: Moosavi-Dezfooli, Fawzi & Frossard 2016, arXiv 1511.04599; thesis, Eq. 3.10 and section 3.2.3, Tables
3.1 and 3.2. The average robustness of a classifier is the mean over images of

    rho = ||r(x)||_p / ||x||_p

with r(x) the smallest perturbation that changes the predicted label. DeepFool's is an upper bound of it: it
does change the label, and a smaller one may. Pixels, not cut to the box, as in the thesis.

DeepFool ends beyond the boundary, by its overshoot on flat ones and by more on others, and on a line takes
the one direction its slopes point to. `along_segment` and `along_line` return where the label first changes
instead (thesis, section 5.3: under random noise the perturbation is the smallest |t| at which the label of
x + t v changes): lengths are tried in ascending order, and the first that changes the label is bisected. A
stretch with another label that is shorter than a step can be missed: such a length is an upper bound too.

For comparison the fast gradient sign method: r = eps sign(grad), one eps for all images, the smallest at
which `SHARE` of them change their label. Its success is not monotone in eps, and does not reach `SHARE` for
every network: eps goes up a geometric grid, and the result says whether `SHARE` was reached.

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
from robustbench_cure.threat import Norm, ThreatModel, distance

#: Steps along a perturbation that is known to change the label at its end.
SEGMENT_STEPS = 64
#: Along a line: first length, l2 in pixels for each root of an input; ratio of a length to the one before;
#: last length, a thousand times the range of pixels, farther than DeepFool gets on flat lines.
LINE_FIRST, LINE_RATIO, LINE_LAST = 1e-3, 1.1, 1000.0
#: Bisections of a step: far finer than 1e-3 of the length.
BISECTIONS = 16
#: Lengths tried in one pass, before the rows whose label has changed are dropped.
LENGTHS_PER_PASS = 8
#: Share of the images that one step must change (thesis, section 3.2.3).
SHARE = 0.9
#: Radii that are tried: from a tenth of a grey level to the whole range, each larger than the last by 5 %.
FIRST, RATIO = 0.1 / 255, 1.05
GRID = tuple(min(1.0, FIRST * RATIO**k) for k in range(math.ceil(math.log(1 / FIRST, RATIO)) + 1))


def along_segment(classifier: Classifier, x: Tensor, labels: Tensor, r: Tensor) -> Tensor:
    """Share of each perturbation at which the label first changes, float64 (B,) in (0, 1].

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W), on its device.
        labels: predicted for them, int64 (B,).
        r: perturbations that change them, shape of ``x``. Where rounding hides the change: 1.
    """
    lengths = torch.arange(1, SEGMENT_STEPS + 1, dtype=torch.float64) / SEGMENT_STEPS
    return _first_change(classifier, x, labels, r, lengths).nan_to_num(1.0)


def along_line(classifier: Classifier, x: Tensor, labels: Tensor, v: Tensor) -> Tensor:
    """Smallest |t| at which the label of x + t v changes, float64 (B,); NaN: not up to `LINE_LAST`.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W), on its device.
        labels: predicted for them, int64 (B,).
        v: a direction of unit length for each, shape of ``x``.
    """
    count = math.ceil(math.log(LINE_LAST / LINE_FIRST, LINE_RATIO)) + 1
    root = math.prod(x.shape[1:]) ** 0.5
    lengths = LINE_FIRST * root * LINE_RATIO ** torch.arange(count, dtype=torch.float64)
    both = [_first_change(classifier, x, labels, u, lengths).nan_to_num(torch.inf) for u in (v, -v)]
    nearer = torch.minimum(*both)
    return torch.where(nearer.isfinite(), nearer, torch.nan)


def _first_change(classifier: Classifier, x: Tensor, labels: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Smallest t of ascending ``lengths`` at which x + t v has another label, bisected; NaN: none."""
    low, high = torch.zeros(len(x)).double(), torch.full((len(x),), torch.nan).double()
    for ts in torch.split(lengths, LENGTHS_PER_PASS):
        rows = high.isnan().nonzero().flatten()
        if not len(rows):
            break
        # Row after row all lengths of the pass.
        pairs = rows.repeat_interleave(len(ts)), ts.repeat(len(rows))
        changed = _changed(classifier, x, labels, v, *pairs).view(len(rows), len(ts))
        hit, first = changed.any(1), changed.int().argmax(1)
        before = torch.cat((torch.zeros(1).double(), ts))
        low[rows] = torch.where(hit, torch.where(first > 0, before[first], low[rows]), ts[-1])
        high[rows[hit]] = ts[first[hit]]
    rows = (~high.isnan()).nonzero().flatten()
    for _ in range(BISECTIONS):
        middle = (low[rows] + high[rows]) / 2
        changed = _changed(classifier, x, labels, v, rows, middle)
        low[rows] = torch.where(changed, low[rows], middle)
        high[rows] = torch.where(changed, middle, high[rows])
    return high


def _changed(classifier: Classifier, x: Tensor, labels: Tensor, v: Tensor, rows: Tensor, t: Tensor) -> Tensor:
    """Whether the label of x + t v of each of these rows is another one, bool on the CPU."""
    out = []
    for part, share in zip(
        torch.split(rows, classifier.batch_size), torch.split(t, classifier.batch_size), strict=True
    ):
        here = part.to(x.device)
        scale = share.to(x.device, torch.float32).view(-1, 1, 1, 1)
        out.append((classifier.logits(x[here] + scale * v[here]).argmax(1) != labels[here]).cpu())
    return torch.cat(out) if out else torch.zeros(0, dtype=torch.bool)


@dataclass(frozen=True)
class Smallest:
    """Length of DeepFool's smallest perturbation, row by row, on the CPU.

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
        cut: end r where the label first changes along it, instead of where DeepFool ends: at least 2 % beyond
            a boundary. In a subspace of one dimension, a line, both directions are tried: DeepFool takes one.
    """
    x = x.to(classifier.device)
    label = classifier.logits(x).argmax(1)
    basis = None if basis is None else basis.to(x.device)
    if cut and norm == "l2" and basis is not None and basis.shape[1] == 1:
        nearer = along_line(classifier, x, label, basis[:, 0].expand_as(x))
        return Smallest(nearer, torch.zeros_like(label).cpu())
    threat = ThreatModel.unbounded(norm)
    result = deepfool(classifier, x, label, threat=threat, mode="minimal", clip=False, basis=basis)
    reached = result.converged if result.converged is not None else torch.ones_like(label, dtype=torch.bool)
    length = torch.where(reached, distance(norm, x.double(), result.x_adv.double()), torch.nan).cpu()
    if cut:
        length *= along_segment(classifier, x, label, result.x_adv - x)
    return Smallest(length, result.steps.cpu())


@dataclass(frozen=True)
class OneStep:
    """The length at which one step of the gradient's sign changes the labels of most images.

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
        advance: called with the number of radii tried.
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
