"""Accuracy against the radius of the ball: one PGD a radius, upward, on what the smaller radii left.

Source: CURE paper, figure 6. A point adversarial at one radius lies in every larger ball too, so that the
curve cannot rise; at radius 0 it is the clean accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from robustbench_cure.attacks.losses import margins
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.pgd import pgd
from robustbench_cure.classifier import Classifier
from robustbench_cure.judge import judge
from robustbench_cure.threat import Norm, ThreatModel, format_eps


def robust_rows(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm,
    eps: Sequence[Fraction],
    steps: int = 20,
    loss: str = "ce",
    seed: int = 0,
    ids: Sequence[str] | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Which rows are classified correctly at each radius, under PGD with steps of a quarter of it.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W) in [0, 1].
        y: true labels, int64 (B,).
        norm: of the ball.
        eps: radii, ascending; 0 asks for no attack.
        steps: of PGD.
        loss: of PGD.
        seed: of its random starts.
        ids: names of the rows, which their random numbers depend on; default: their place.
        advance: told of radii done and in all.

    Returns:
        bool (len(eps), B) on the CPU, every row non-increasing along the first axis; judged in float32.

    Raises:
        ValueError: radii that do not ascend.
    """
    if list(eps) != sorted(set(eps)) or not eps or eps[0] < 0:
        raise ValueError("radii must ascend from 0 or more")
    names = list(ids) if ids is not None else [str(row) for row in range(len(x))]
    x, y = x.to(classifier.device), y.to(classifier.device)
    alive = margins(classifier.logits(x), y) >= 0
    alive &= classifier.logits(x).argmax(1) == y
    out = []
    for done, radius in enumerate(eps):
        living = alive.nonzero().squeeze(1)
        if radius > 0 and len(living):
            threat = ThreatModel.parse(norm, format_eps(radius))
            rows = [names[i] for i in living.tolist()]
            proposal = pgd(
                classifier,
                x[living],
                y[living],
                threat=threat,
                noise=Noise.for_samples(seed, "pgd", rows, x.device),
                steps=steps,
                step_size=threat.radius / 4,
                loss=loss,
            )
            broken = judge(classifier, x[living], y[living], proposal, threat).broken.to(x.device)
            alive[living[broken]] = False
        out.append(alive.cpu().clone())
        if advance is not None:
            advance(done + 1, len(eps))
    return torch.stack(out)
