"""Where a search in bfloat16 may miss what a search in float32 would find.

Most networks compute nearly the same in bfloat16 as in float32. Some do not (large constants inside, logits
with a large common offset, sums over many small terms), and on those every attack that searches in bfloat16
is weak and robust accuracy too high. So both precisions are compared before a search (`disagreement`) and
during it (`within_rounding`, `margins_differ`): rows that are still robust are searched again in float32.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from robustbench_cure.attacks.losses import margins, misclassified, odds_against
from robustbench_cure.classifier import Classifier

#: One rounding of bfloat16, relative: 2^-7.
ROUNDING = torch.finfo(torch.bfloat16).eps
#: What the two precisions must agree on: margins up to this share of the typical range of the logits, and
#: gradients up to this cosine.
MARGIN_ERROR, COSINE = 4 * ROUNDING, 0.9
#: Share of the images that may disagree before a model is searched in float32 throughout.
DISAGREE_SHARE = 0.05
#: Share of the rows of an attack whose margins may differ before all robust ones are searched again.
ASTRAY_SHARE = 0.01


def within_rounding(margin: Tensor, logits: Tensor) -> Tensor:
    """Whether one rounding of bfloat16 could decide the sign of a margin; bool (B,).

    Args:
        margin: margin of each row, (B,).
        logits: logits, (B, L). A rounding error is proportional to a logit, not to the difference of two.
    """
    return margin.abs() < ROUNDING * logits.abs().amax(1)


def logit_range(logits: Tensor) -> Tensor:
    """Largest logit minus the smallest, (B,); logits (B, L)."""
    return logits.amax(1) - logits.amin(1)


def typical_range(logits: Tensor) -> float:
    """Median over the images of `logit_range`, where it is finite; logits (B, L)."""
    sound = logits[logits.isfinite().all(1)]
    return float(logit_range(sound).median()) if len(sound) else 0.0


def margins_differ(searched: Tensor, exact: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """Rows that have finite logits in float32, and another margin in bfloat16; bool (B,).

    Args:
        searched: logits in bfloat16, (B, L).
        exact: logits of the same points in float32, (B, L).
        y: labels, int64 (B,).
        scale: `logit_range` of the unperturbed images, of each row or the typical one. That of the points
            themselves is no measure: on the boundary of two classes it is zero. It is bounded by twice the
            largest logit of the point: a network that is confident on an image may have small logits there.
    """
    error = (margins(searched, y) - margins(exact, y)).abs()
    scale = (2 * exact.abs().amax(1)).clamp(max=scale)
    return exact.isfinite().all(1) & ~(error <= MARGIN_ERROR * scale)


def to_search_again(differ: Tensor, robust: Tensor) -> Tensor:
    """Rows to search a second time, in float32; bool (B,).

    Args:
        differ: rows whose `margins_differ` at the points that were compared, bool (B,).
        robust: rows that are still robust after the search in bfloat16, bool (B,).

    Returns:
        Robust rows that differ; all robust rows, where more than one in a hundred differs: a search may be
        misled at an earlier iterate, and end at a point where the two precisions agree.
    """
    return robust if int(differ.sum()) > ASTRAY_SHARE * len(differ) else differ & robust


def compare_at(
    classifier: Classifier, x: Tensor, y: Tensor, x_adv: Tensor, robust: Tensor
) -> tuple[Tensor, Tensor]:
    """Compare the two precisions where a search in bfloat16 ended; three forward passes a robust row.

    Args:
        classifier: the model, which searches in bfloat16.
        x: images, float32 (B,C,H,W).
        y: labels, int64 (B,).
        x_adv: points to compare at, float32 (B,C,H,W).
        robust: rows that the search left robust, bool (B,); no others are looked at.

    Returns:
        Rows to search again because the two differ, bool (B,), see `to_search_again`; and the margins of
        x_adv in float32, (B,), infinite where a row is not looked at.
    """
    differ, stands = torch.zeros((2, len(x)), dtype=torch.bool, device=x.device)
    margin = x.new_full((len(x),), torch.inf)
    for rows in torch.split(robust.nonzero().squeeze(1), classifier.batch_size):
        scale = logit_range(classifier.logits(x[rows]))
        exact, searched = classifier.logits(x_adv[rows]), classifier.search_logits(x_adv[rows])
        differ[rows] = margins_differ(searched, exact, y[rows], scale)
        stands[rows] = ~misclassified(exact, y[rows])
        margin[rows] = margins(exact, y[rows])
    return to_search_again(differ, stands), margin


def disagreement(
    classifier: Classifier, x: Tensor, y: Tensor, scale: float, exact: tuple[Tensor, Tensor] | None = None
) -> str:
    """In words: how the search form in bfloat16 differs from the reference form; empty where it hardly does.

    Args:
        classifier: the model; the answer is empty unless it searches in bfloat16.
        x: points, float32 (B,C,H,W).
        y: labels, int64 (B,).
        scale: `typical_range` of the logits of unperturbed images.
        exact: logits (B, L) and gradients (B,C,H,W) of `odds_against` in the reference form, where they are
            known.
    """
    if classifier.precision != "bf16" or not len(x):
        return ""
    margin, slope = [], []
    for rows in torch.split(torch.arange(len(x), device=x.device), classifier.batch_size):
        part, labels = x[rows], y[rows]
        loss = partial(odds_against, labels=labels)
        searched, ours = classifier.value_and_gradient(part, loss)
        if exact is None:
            logits, true = classifier.value_and_gradient(part, loss, reference=True)
        else:
            logits, true = (of[rows] for of in exact)
        cosine = torch.cosine_similarity(ours.flatten(1), true.flatten(1), eps=1e-30)
        margin.append(margins_differ(searched, logits, labels, scale))
        slope.append((cosine < COSINE) & (true != 0).flatten(1).any(1) & logits.isfinite().all(1))
    wrong_margin, wrong_gradient = torch.cat(margin), torch.cat(slope)
    if int((wrong_margin | wrong_gradient).sum()) <= DISAGREE_SHARE * len(x):
        return ""
    parts = [f"margins of {int(wrong_margin.sum())}"] if wrong_margin.any() else []
    parts += [f"gradients of {int(wrong_gradient.sum())}"] if wrong_gradient.any() else []
    return f"{' and '.join(parts)} of {len(x)} images differ between bfloat16 and float32"
