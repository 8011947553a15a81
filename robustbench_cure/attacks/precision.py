"""What a search in bfloat16 can and cannot see.

Most networks compute nearly the same in bfloat16 as in float32. Some do not (large constants inside, logits
with a large common offset, sums over many small terms), and on those every attack that searches in bfloat16
is weak and robust accuracy too high. So both precisions are compared before and during a search.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from robustbench_cure.attacks.losses import margins, odds_against
from robustbench_cure.classifier import Classifier

#: One rounding of bfloat16, relative: 2^-7.
ROUNDING = torch.finfo(torch.bfloat16).eps
#: What the two precisions must agree on: margins up to this share of the typical range of the logits, and
#: gradients up to this cosine.
MARGIN_ERROR, COSINE = 4 * ROUNDING, 0.9
#: Share of the images that may disagree.
DISAGREE_SHARE = 0.05


def within_rounding(margin: Tensor, logits: Tensor) -> Tensor:
    """Whether one rounding of bfloat16 could decide the sign of a margin; bool (B,).

    Args:
        margin: of each row, (B,).
        logits: (B, L). Numbers round in proportion to their own size, whatever the differences between them.
    """
    return margin.abs() < ROUNDING * logits.abs().amax(1)


def typical_range(logits: Tensor) -> float:
    """Median over the images of the largest logit less the smallest, where they are finite; logits (B, L)."""
    sound = logits[logits.isfinite().all(1)]
    return float((sound.amax(1) - sound.amin(1)).median()) if len(sound) else 0.0


def disagreement(
    classifier: Classifier, x: Tensor, y: Tensor, scale: float, *, gradients: bool = True
) -> str:
    """In words: how the search form in bfloat16 differs from the reference form; empty where it hardly does.

    Args:
        classifier: the model; nothing to say unless it searches in bfloat16.
        x: points, float32 (B,C,H,W).
        y: labels, int64 (B,).
        scale: `typical_range` of the logits of unperturbed images. That of the points themselves is no
            measure: two classes have none left on the boundary.
        gradients: compare gradients too, not logits alone.
    """
    if classifier.precision != "bf16" or not len(x):
        return ""
    wrong_margin, wrong_gradient = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for _ in range(2))
    for rows in torch.split(torch.arange(len(x), device=x.device), classifier.batch_size):
        labels = y[rows]
        if gradients:
            loss = partial(odds_against, labels=labels)
            (searched, slope), (exact, true) = (
                classifier.value_and_gradient(x[rows], loss, reference=reference)
                for reference in (False, True)
            )
            cosine = torch.cosine_similarity(slope.flatten(1), true.flatten(1), eps=1e-30)
            wrong_gradient[rows] = (cosine < COSINE) & (true != 0).flatten(1).any(1)
        else:
            searched, exact = classifier.search_logits(x[rows]), classifier.logits(x[rows])
        apart = (margins(searched, labels) - margins(exact, labels)).abs()
        sound = exact.isfinite().all(1)
        wrong_margin[rows] = sound & ~(apart <= MARGIN_ERROR * scale)
        wrong_gradient[rows] &= sound
    if int((wrong_margin | wrong_gradient).sum()) <= DISAGREE_SHARE * len(x):
        return ""
    parts = [f"margins of {int(wrong_margin.sum())}"] if wrong_margin.any() else []
    parts += [f"gradients of {int(wrong_gradient.sum())}"] if wrong_gradient.any() else []
    return f"{' and '.join(parts)} of {len(x)} images differ between bfloat16 and float32"
