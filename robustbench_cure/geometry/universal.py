"""Universal perturbations: one vector that changes the label of most images.

Source: Moosavi-Dezfooli, Fawzi, Fawzi & Frossard 2017, arXiv 1610.08401; thesis, chapter 4, algorithm 4:

    v = 0
    repeat:  for every image x, in a new order:
                 if k(x + v) = k(x):   v = shorten(v + r),  r the smallest change of the label of x + v
    until k(x + v) != k(x) for a share 1 - delta of the images, or passes run out

shorten cuts v to ||v||_p <= xi. Images and v are pixels in [0, 1].

The method ``gradient`` instead climbs the mean cross-entropy of small batches, cut at `CEILING` for each
image so that fooled ones stop to count (Shafahi et al. 2020, arXiv 1811.11304), with steps that shrink.

Deviations. (1) x + v is cut to the box, and r keeps to it, while v is sought as when fooled images are
counted: what is counted is an image. The thesis adds v without cutting. An image that is fooled outside the
box alone is then never visited again, and on black or white images the search stands still. (2) An image that
DeepFool cannot move within its iterations leaves v as it is, as in the authors' code. (3) Passes are limited.
(4) Shares of fooled images go up and down with the passes: the perturbation of the best pass is kept, not
that of the last.

Baselines (thesis, section 4.4, Fig. 4.9): noise; the adversarial perturbation of one image, by DeepFool and
by the fast gradient sign method; the sum of the adversarial perturbations of all images; the mean image.
Images that DeepFool cannot move have no perturbation: they are not drawn, and add nothing to the sum. The
image is drawn by the seed, and noise several times, since a single vector of it may be lucky.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.losses import cross_entropy, odds_against
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.subspaces import L2
from robustbench_cure.threat import Norm, ThreatModel

Method: TypeAlias = Literal["deepfool", "gradient"]

#: DeepFool's iterations on one image (the authors' code).
ITERATIONS = 10
#: Of the gradient method: largest loss of an image that still counts; images in a step; first step in radii
#: at least, and all steps together about.
CEILING, BATCH, FIRST_STEP, TOTAL_LENGTH = 9.0, 32, 0.1, 5.0
#: Vectors of noise among the baselines.
DRAWS = 10


@dataclass(frozen=True)
class Universal:
    """State of a search after a number of passes.

    Attributes:
        v: the perturbation that fooled most, float32 (C,H,W), in pixels of [0, 1].
        last: that of the last pass, from which the next one goes on.
        fooled: share of the images whose label each pass's perturbation changes, in [0, 1].
    """

    v: Tensor
    last: Tensor
    fooled: tuple[float, ...] = ()

    @property
    def passes(self) -> int:
        """Passes made over the images."""
        return len(self.fooled)


def universal(
    classifier: Classifier,
    x: Tensor,
    *,
    threat: ThreatModel,
    method: Method = "deepfool",
    delta: float = 0.2,
    passes: int = 10,
    seed: int = 0,
    known: Universal | None = None,
    checkpoint: Callable[[Universal], None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Universal:
    """Seek one perturbation for all images.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W) in [0, 1].
        threat: norm p and radius xi of the perturbation.
        method: the thesis' algorithm, or ascent on batches.
        delta: share of the images that may keep their label.
        passes: over the images, at most.
        seed: of their order in every pass; another order leads to another perturbation.
        known: what an earlier call with the same arguments reached, to go on from.
        checkpoint: called with the state after every pass.
        advance: called with the number of images visited.

    Returns:
        The best perturbation, and the share of images fooled after every pass.

    Guarantees:
        ||v||_p <= xi up to rounding; a search that goes on from ``known`` ends where a whole one does.
    """
    x = x.to(classifier.device)
    labels = classifier.logits(x).argmax(1)
    zero = torch.zeros(x.shape[1:])
    state = known or Universal(zero, zero)
    while state.passes < passes and max(state.fooled, default=0.0) < 1 - delta:
        generator = torch.Generator().manual_seed((seed * 10_000 + state.passes) % 2**63)
        order = torch.randperm(len(x), generator=generator).to(x.device)
        v = state.last.to(x.device)
        if method == "deepfool":
            v = _deepfool_pass(classifier, x[order], labels[order], v, threat, advance)
        else:
            step = _first_step(len(x), passes) * threat.radius * (1 - state.passes / passes)
            v = _gradient_pass(classifier, x[order], labels[order], v, threat, step, advance)
        share = float(fooled(classifier, x, labels, v).double().mean())
        better = share > max(state.fooled, default=-1.0)
        state = Universal(v.cpu() if better else state.v, v.cpu(), (*state.fooled, share))
        if checkpoint is not None:
            checkpoint(state)
    return state


def _deepfool_pass(
    classifier: Classifier,
    x: Tensor,
    labels: Tensor,
    v: Tensor,
    threat: ThreatModel,
    advance: Callable[[int], None] | None,
) -> Tensor:
    """One visit of every image in order.

    Labels are predicted in windows that grow while all images in them are fooled: v does not change before
    the first that is not, so that the outcome is that of one image after the other.
    """
    place, window = 0, 1
    while place < len(x):
        moved = (x[place : place + window] + v).clamp(0, 1)
        own = labels[place : place + window]
        unfooled = (classifier.logits(moved).argmax(1) == own).nonzero().flatten().tolist()
        visited = len(moved)
        if unfooled:
            row = slice(unfooled[0], unfooled[0] + 1)
            result = deepfool(
                classifier, moved[row], own[row], threat=L2, mode="minimal", clip=True, steps=ITERATIONS
            )
            if bool(result.converged):
                v = threat.shorten(v + result.x_adv - moved[row])[0]
            visited = unfooled[0] + 1
        window = 1 if unfooled else min(2 * window, classifier.batch_size)
        place += visited
        if advance is not None:
            advance(visited)
    return v


def _first_step(images: int, passes: int) -> float:
    """In radii: steps shrink to nothing, and few of them must still reach every place of the ball."""
    steps = passes * -(-images // BATCH)
    return min(1.0, max(FIRST_STEP, 2 * TOTAL_LENGTH / steps))


def _gradient_pass(
    classifier: Classifier,
    x: Tensor,
    labels: Tensor,
    v: Tensor,
    threat: ThreatModel,
    step: float,
    advance: Callable[[int], None] | None,
) -> Tensor:
    """One step of ascent for every batch of images in order; pixels at an end of the box do not count."""
    for images, label in zip(torch.split(x, BATCH), torch.split(labels, BATCH), strict=True):
        moved = images + v

        def loss(logits: Tensor, label: Tensor = label) -> Tensor:
            return cross_entropy(logits, label).clamp_max(CEILING)

        _, gradient = classifier.value_and_gradient(moved.clamp(0, 1), loss)
        inside = (moved >= 0) & (moved <= 1)
        uphill = threat.steepest((gradient * inside).sum(0, keepdim=True))
        v = threat.shorten(v + step * uphill)[0]
        if advance is not None:
            advance(len(images))
    return v


def fooled(classifier: Classifier, x: Tensor, labels: Tensor, v: Tensor) -> Tensor:
    """Which images get another label when v is added and the sum cut to [0, 1]; bool (B,).

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W) in [0, 1].
        labels: predicted for x itself, int64 (B,).
        v: perturbation, float32 (C,H,W).
    """
    return labels_with(classifier, x, v) != labels.to(classifier.device)


def labels_with(classifier: Classifier, x: Tensor, v: Tensor) -> Tensor:
    """Labels predicted for x + v, cut to [0, 1]; int64 (B,), arguments as those of `fooled`."""
    x = x.to(classifier.device)
    return classifier.logits((x + v.to(x.device)).clamp(0, 1)).argmax(1)


def baselines(classifier: Classifier, x: Tensor, *, norm: Norm, seed: int) -> dict[str, Tensor]:
    """Directions by name, float32 (k,C,H,W) on the CPU: k is `DRAWS` for noise, 1 for all others.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W) in [0, 1].
        norm: noise is drawn from the surface of its ball; in linf from the corners.
        seed: of noise, and of the one image.
    """
    images, x = x.cpu(), x.to(classifier.device)
    label = classifier.logits(x).argmax(1)
    result = deepfool(classifier, x, label, threat=L2, mode="minimal", clip=False)
    moved = torch.ones_like(label, dtype=torch.bool) if result.converged is None else result.converged
    r = torch.where(moved.view(-1, 1, 1, 1), result.x_adv - x, torch.zeros_like(x)).cpu()
    order = Noise.for_samples(seed, "universal", ["image"]).uniform((len(x),), 0)[0]
    one = int(torch.where(moved.cpu(), order, -1.0).argmax())
    row = slice(one, one + 1)
    # Steepest where cross-entropy is, also where that is zero in float32.
    loss = partial(odds_against, labels=label[row])
    gradient = classifier.value_and_gradient(x[row], loss, reference=True)[1]
    noise = Noise.for_samples(seed, "universal", [f"random/{draw}" for draw in range(DRAWS)])
    draw = noise.normal if norm == "l2" else noise.signs
    return {
        "random": draw(tuple(x.shape[1:]), 0),
        "one image's": r[row],
        "one image's FGSM": gradient.sign().cpu(),
        "sum of all images'": r.sum(0, keepdim=True),
        "mean image": images.mean(0, keepdim=True),
    }
