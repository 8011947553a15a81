"""Accuracy against the radius of the ball: one PGD a radius, upward, on what the smaller radii left.

Source: CURE paper, figure 6. A point adversarial at one radius lies in every larger ball too, so that the
curve cannot rise; at radius 0 it is the clean accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction

import torch
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.pgd import pgd
from robustbench_cure.classifier import Classifier
from robustbench_cure.evaluation.verify import verify
from robustbench_cure.threat import Norm, ThreatModel


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
    known: Tensor | None = None,
    checkpoint: Callable[[Tensor], None] | None = None,
    advance: Callable[[float], None] | None = None,
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
        known: result of an earlier call at the first radii, bool (k, B), to continue from.
        checkpoint: called with the result so far, bool (k, B), after every radius.
        advance: called with the number of radii done, with a fraction for the one under way.

    Returns:
        bool (len(eps), B) on the CPU, every row non-increasing along the first axis; verified in float32.

    Raises:
        ValueError: radii that do not ascend, or ``known`` of other rows.
    """
    if list(eps) != sorted(set(eps)) or not eps or eps[0] < 0:
        raise ValueError("radii must ascend from 0 or more")
    names = list(ids) if ids is not None else [str(row) for row in range(len(x))]
    x, y = x.to(classifier.device), y.to(classifier.device)
    out: list[Tensor] = [] if known is None else list(known)
    if any(len(row) != len(x) for row in out):
        raise ValueError(f"known is of {len(out[0])} rows, there are {len(x)}")
    alive = out[-1].to(x.device).clone() if out else classifier.logits(x).argmax(1) == y
    for radius in eps[len(out) :]:
        remaining = alive.nonzero().squeeze(1)
        if radius > 0 and len(remaining):
            threat = ThreatModel(norm, radius)
            rows = [names[i] for i in remaining.tolist()]
            with _reporting(classifier, advance, len(out), len(remaining) * steps):
                candidates = pgd(
                    classifier,
                    x[remaining],
                    y[remaining],
                    threat=threat,
                    noise=Noise.for_samples(seed, "pgd", rows, x.device),
                    steps=steps,
                    step_size=threat.radius / 4,
                    loss=loss,
                )
            broken = verify(classifier, x[remaining], y[remaining], candidates, threat).broken.to(x.device)
            alive[remaining[broken]] = False
        out.append(alive.cpu().clone())
        if checkpoint is not None:
            checkpoint(torch.stack(out))
        if advance is not None:
            advance(len(out))
    return torch.stack(out)


@contextmanager
def _reporting(
    classifier: Classifier, advance: Callable[[float], None] | None, done: int, most: int
) -> Iterator[None]:
    """Report a radius under way by its gradients; rows that break need fewer."""
    before, listener = classifier.backwards, classifier.callback

    def report_passes() -> None:
        if advance is not None:
            advance(round(done + min(1.0, (classifier.backwards - before) / most), 2))

    classifier.callback = report_passes
    try:
        yield
    finally:
        classifier.callback = listener
