"""Pairs of points in one classification region, to be joined by a path.

Source: thesis, section 7.3. One end is an image, and its predicted label names the region. The other end is

    image      another image with the same label
    carried    an image with another label, carried into the region by its smallest targeted perturbation
    random     a point drawn evenly from the sphere around the origin (black) whose radius is the mean norm of
               the images, carried likewise
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.connectivity import onto_region
from robustbench_cure.geometry.convexity import companions

#: Where the other end comes from.
SCENARIOS = ("image", "carried", "random")


@dataclass(frozen=True)
class Pairs:
    """Ends of paths.

    Attributes:
        rows: of the images, int64 (B, 2) on the CPU; -1 where there is none.
        first: the images, float32 (B,C,H,W) on the classifier's device.
        second: the other ends, where they were carried to.
        carried: l2 length of the way there, float32 (B,) on the CPU.
        reached: whether both ends have the same label, bool (B,).
    """

    rows: Tensor
    first: Tensor
    second: Tensor
    carried: Tensor
    reached: Tensor


def draw_pairs(classifier: Classifier, x: Tensor, labels: Tensor, scenario: str, noise: Noise) -> Pairs:
    """A pair for each stream.

    Args:
        classifier: the model.
        x: images, float32 (N,C,H,W).
        labels: predicted for them, int64 (N,).
        scenario: one of `SCENARIOS`.
        noise: a stream for each pair; draws of streams 0 and 1 are used up.

    Raises:
        ValueError: there are no two images with one label, or with two.
    """
    rows = companions(labels, 2, noise) if scenario == "image" else strangers(labels, noise)
    first, start = x[rows[:, 0]].to(classifier.device), x[rows[:, 1]]
    if scenario == "random":
        draw = noise.normal(tuple(x.shape[1:]), 1)
        radius = x.flatten(1).norm(dim=1).mean()
        start = draw * (radius / draw.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
        rows[:, 1] = -1
    start = start.to(classifier.device)
    second, reached = onto_region(classifier, start, labels.cpu()[rows[:, 0]].to(classifier.device))
    return Pairs(rows, first, second, (second - start).flatten(1).norm(dim=1).cpu(), reached)


def strangers(labels: Tensor, noise: Noise) -> Tensor:
    """For each stream two images of different regions, int64 (B, 2) on the CPU; arguments as `companions`.

    Raises:
        ValueError: all images lie in one region.
    """
    labels = labels.cpu()
    order = noise.uniform((len(labels),), 0)
    first = order.argmax(1)
    other = labels != labels[first][:, None]
    if not bool(other.any()):
        raise ValueError("all images lie in one region")
    return torch.stack((first, torch.where(other, order, -1.0).argmax(1)), 1)
