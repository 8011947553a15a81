"""How far from convex are classification regions? Random images of one region, and what lies between them.

Source: thesis, section 7.3, figure 7.3: the probability that a random convex combination of k images with the
same predicted label has it too, over k. It is 1 for convex regions. The thesis names no distribution of the
weights; here they are uniform on the simplex, Dirichlet(1, ..., 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier


def labels_of(classifier: Classifier, x: Tensor) -> Tensor:
    """Predicted labels of the reference form, int64 (B,)."""
    return classifier.logits(x).argmax(1)


def same_class_images(labels: Tensor, k: int, noise: Noise) -> Tensor:
    """For each stream k different images of one region, int64 (B, k) on the CPU.

    The first is drawn evenly from all images whose region holds at least k, the others from its region.

    Args:
        labels: predicted, int64 (N,).
        k: at least 1.
        noise: a stream for each draw; its draws of stream 0 are used up.

    Raises:
        ValueError: no region holds k images.
    """
    labels = labels.cpu()
    large = labels.bincount()[labels] >= k
    if not bool(large.any()):
        raise ValueError(f"no region holds {k} images")
    order = noise.uniform((len(labels),), 0)
    first = torch.where(large, order, -1.0).argmax(1)
    same = labels == labels[first][:, None]
    return torch.where(same, order, -1.0).sort(dim=1, descending=True, stable=True).indices[:, :k]


def mixtures(classifier: Classifier, x: Tensor, labels: Tensor, k: int, noise: Noise) -> Tensor:
    """Whether random convex combinations of k images of one region lie in it, bool (B,), a draw a stream.

    Args:
        classifier: the model.
        x: images, float32 (N,C,H,W).
        labels: predicted for them, int64 (N,).
        k: images in a combination.
        noise: a stream for each draw.

    Raises:
        ValueError: no region holds k images.
    """
    chosen = same_class_images(labels, k, noise)
    weights = -torch.log1p(-noise.uniform((k,), 1).double())
    weights = (weights / weights.sum(1, keepdim=True)).float()
    stayed = []
    for rows, weight in zip(
        torch.split(chosen, classifier.batch_size), torch.split(weights, classifier.batch_size), strict=True
    ):
        points = sum(weight[:, j].view(-1, 1, 1, 1) * x[rows[:, j]] for j in range(k))
        assert isinstance(points, Tensor)  # noqa: S101 - k is at least 1
        stayed.append(labels_of(classifier, points.to(classifier.device)).cpu() == labels.cpu()[rows[:, 0]])
    return torch.cat(stayed)
