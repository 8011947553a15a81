"""Where the label first changes on the way along a perturbation, or along a line, either way.

Source: thesis, section 5.3: in the regime of random noise the perturbation is the smallest |t| at which the
label of x + t v changes. DeepFool ends beyond the boundary, by its overshoot on flat ones and by more on
others, and on a line goes the one way its slopes point to. Here the way is looked along in steps, and the
first that ends on another label is halved `HALVINGS` times.

A stretch with another label that is shorter than a step can be missed: a length is an upper bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustbench_cure.classifier import Classifier

#: Steps along a perturbation that is known to change the label at its end.
STEPS = 64
#: Along a line: first length, l2 in pixels for each root of an input; each further one is longer by `RATIO`;
#: the last is a thousand times the range of pixels, farther than DeepFool gets on flat lines.
FIRST, RATIO, FARTHEST = 1e-3, 1.1, 1000.0
#: Halvings of a step: far finer than 1e-3 of the length.
HALVINGS = 16
#: Lengths looked at before the rows that have changed are left out.
LOOK = 8


def along_segment(classifier: Classifier, x: Tensor, labels: Tensor, r: Tensor) -> Tensor:
    """Share of each perturbation at which the label first changes, float64 (B,) in (0, 1].

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W), on its device.
        labels: predicted for them, int64 (B,).
        r: perturbations that change them, shape of ``x``. Where rounding hides the change: 1.
    """
    ladder = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
    return _first(classifier, x, labels, r, ladder).nan_to_num(1.0)


def along_line(classifier: Classifier, x: Tensor, labels: Tensor, v: Tensor) -> Tensor:
    """Smallest |t| at which the label of x + t v changes, float64 (B,); NaN: not up to `FARTHEST`.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W), on its device.
        labels: predicted for them, int64 (B,).
        v: a direction of unit length for each, shape of ``x``.
    """
    rungs = math.ceil(math.log(FARTHEST / FIRST, RATIO)) + 1
    ladder = FIRST * math.prod(x.shape[1:]) ** 0.5 * RATIO ** torch.arange(rungs, dtype=torch.float64)
    two = [_first(classifier, x, labels, way, ladder).nan_to_num(torch.inf) for way in (v, -v)]
    nearer = torch.minimum(*two)
    return torch.where(nearer.isfinite(), nearer, torch.nan)


def _first(classifier: Classifier, x: Tensor, labels: Tensor, way: Tensor, ladder: Tensor) -> Tensor:
    """Smallest t of ascending ``ladder`` at which x + t way has another label, refined; NaN: none."""
    low, high = torch.zeros(len(x)).double(), torch.full((len(x),), torch.nan).double()
    for rungs in torch.split(ladder, LOOK):
        rows = high.isnan().nonzero().flatten()
        if not len(rows):
            break
        # Row after row all rungs of the look.
        each, all_of_them = rows.repeat_interleave(len(rungs)), rungs.repeat(len(rows))
        changed = _changed(classifier, x, labels, way, each, all_of_them).view(len(rows), len(rungs))
        hit, first = changed.any(1), changed.int().argmax(1)
        before = torch.cat((torch.zeros(1).double(), rungs))
        low[rows] = torch.where(hit, torch.where(first > 0, before[first], low[rows]), rungs[-1])
        high[rows[hit]] = rungs[first[hit]]
    rows = (~high.isnan()).nonzero().flatten()
    for _ in range(HALVINGS):
        middle = (low[rows] + high[rows]) / 2
        changed = _changed(classifier, x, labels, way, rows, middle)
        low[rows] = torch.where(changed, low[rows], middle)
        high[rows] = torch.where(changed, middle, high[rows])
    return high


def _changed(
    classifier: Classifier, x: Tensor, labels: Tensor, way: Tensor, rows: Tensor, t: Tensor
) -> Tensor:
    """Whether the label of x + t way of each of these rows is another one, bool on the CPU."""
    out = []
    for part, share in zip(
        torch.split(rows, classifier.batch_size), torch.split(t, classifier.batch_size), strict=True
    ):
        here = part.to(x.device)
        scale = share.to(x.device, torch.float32).view(-1, 1, 1, 1)
        out.append((classifier.logits(x[here] + scale * way[here]).argmax(1) != labels[here]).cpu())
    return torch.cat(out) if out else torch.zeros(0, dtype=torch.bool)
