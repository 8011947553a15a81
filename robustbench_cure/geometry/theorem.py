"""Theorem 1 on a network: bounds from gradient and curvature, beside the distance that DeepFool finds.

Source: CURE paper, section 3 and figure 4. The theorem speaks of a loss that crosses t where the label
changes. Cross-entropy over more than two classes does not; the log-loss of the label against the best other
class, log(1 + exp(-(z_y - max_j z_j))), does at t = log 2, and is what is used here, for images classified
correctly. All in normalised inputs, DeepFool too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.losses import margins
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.bounds import Bounds, bounds
from robustbench_cure.geometry.lanczos import lanczos
from robustbench_cure.geometry.space import Space
from robustbench_cure.threat import ThreatModel

#: Where the log-loss of two classes changes its label.
THRESHOLD = math.log(2)


class TwoClass:
    """A `Space` whose loss is the log-loss of the label against the best other class."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.network: Classifier = space.network

    def losses(self, u: Tensor, y: Tensor) -> Tensor:
        """log(1 + exp(-J)) of each row, J the margin."""
        return functional.softplus(-margins(self.network.logits(u), y))

    def gradients(self, u: Tensor, y: Tensor) -> Tensor:
        """Gradients of `losses`, shape of ``u``."""
        return self.network.value_and_gradient(u, lambda z: functional.softplus(-margins(z, y)))[1]


@dataclass(frozen=True)
class TheoremRows:
    """What the theorem says of every row, and what DeepFool found.

    Attributes:
        c: threshold minus loss.
        gradient_norm: of the loss.
        nu: largest eigenvalue of the Hessian.
        along: |gradient . eigenvector|.
        bounds: of the distance.
        deepfool: l2 distance DeepFool found; NaN where it found none.
    """

    c: Tensor
    gradient_norm: Tensor
    nu: Tensor
    along: Tensor
    bounds: Bounds
    deepfool: Tensor


def theorem(
    space: Space,
    u: Tensor,
    y: Tensor,
    *,
    h: float,
    iterations: int = 30,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> TheoremRows:
    """Evaluate Theorem 1 at inputs that are classified correctly.

    Args:
        space: the network and its units.
        u: inputs, float32 (B,C,H,W).
        y: true labels, int64 (B,).
        h: step of the finite differences.
        iterations: of Lanczos.
        seed: of its start.
        advance: told of gradients computed.
    """
    two = TwoClass(space)
    c = THRESHOLD - two.losses(u, y).double().cpu()
    ends = lanczos(two, u, y, h=h, iterations=iterations, seed=seed, advance=advance)
    length = ends.gradient.flatten(1).double().norm(dim=1).cpu()
    along = (ends.gradient.flatten(1).double() * ends.vector.flatten(1)).sum(1).abs().cpu()
    found = deepfool(space.network, u, y, threat=ThreatModel.parse("l2", "0"), mode="minimal", clip=False)
    distance = (found.x_adv - u).flatten(1).double().norm(dim=1).cpu()
    converged = found.converged.cpu() if found.converged is not None else torch.ones(len(u), dtype=torch.bool)
    return TheoremRows(
        c=c,
        gradient_norm=length,
        nu=ends.largest,
        along=along,
        bounds=bounds(c, length, along, ends.largest),
        deepfool=torch.where(converged, distance, torch.nan),
    )
