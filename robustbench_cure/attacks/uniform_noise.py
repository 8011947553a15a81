"""Uniform noise in the ball: the control every gradient attack must beat.

Linf: each pixel uniform on [x - eps, x + eps]. L2: uniform in the Euclidean ball, a Gaussian direction
with radius eps * u^(1/d). The draw of lowest margin in the reference form is returned: there is no later step
to correct an error of reduced precision.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.attacks.inputs import check_inputs
from robustbench_cure.attacks.losses import margins
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel


def draw(x: Tensor, threat: ThreatModel, noise: Noise, stream: int | Tensor) -> Tensor:
    """One uniform point of the ball around each row, cut to the box; shape of ``x``.

    Args:
        x: images (B,C,H,W) in [0, 1].
        threat: norm and eps.
        noise: one stream a row.
        stream: number of the draw, int or int64 (B,).
    """
    shape = tuple(x.shape[1:])
    if threat.norm == "linf":
        return threat.project(x, x + threat.radius * (2.0 * noise.uniform(shape, stream) - 1.0))
    # Disjoint streams for direction and radius: the radius takes a key of its own.
    direction = threat.steepest(noise.normal(shape, stream))
    length = Noise(~noise.keys).uniform((1,), stream).view(-1, *[1] * (x.dim() - 1)) ** (
        1.0 / math.prod(shape)
    )
    return threat.project(x, x + threat.radius * length * direction)


@torch.inference_mode(False)  # where gradients are zero
def uniform_noise(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    noise: Noise | None = None,
    draws: int,
) -> Candidates:
    """Return the worst of ``draws`` random points of the ball.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: true labels, int64 (B,).
        threat: norm and eps, in units of x.
        noise: random streams of the rows; default: rows numbered from 0 under seed 0.
        draws: points tried for each image.

    Returns:
        Candidates inside the ball and the box; ``steps`` is the number of the returned draw.
    """
    check_inputs(classifier, x, y)
    noise = noise or Noise.for_rows(len(x), device=x.device)
    candidates = Candidates.start(x)
    lowest = x.new_full((len(x),), torch.inf)
    for rows in torch.split(torch.arange(len(x), device=x.device), classifier.batch_size):
        for number in range(draws):
            point = draw(x[rows], threat, noise[rows], number)
            margin = margins(classifier.logits(point), y[rows])
            better = margin < lowest[rows]
            chosen = rows[better]
            candidates.x_adv[chosen] = point[better]
            candidates.steps[chosen] = number + 1
            lowest[chosen] = margin[better]
    candidates.forwards += draws
    return candidates
