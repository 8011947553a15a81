"""Networks, images and measurements that several tests share."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet, from_arrays
from robustbench_cure.masking.conclusions import Diagnosis
from robustbench_cure.masking.evidence import Measurements, Settings
from robustbench_cure.studies import selftest
from robustbench_cure.threat import ThreatModel

#: Of `diagnosed`, before a test replaces it.
_diagnosis = selftest.diagnosis


def images(n: int, shape=(3, 2, 2), *, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Uniform images (n,C,H,W) with pixels in [low, high], the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand((n, *shape), generator=generator) * (high - low) + low


def classified(classifier: Classifier, x: torch.Tensor) -> EvalSet:
    """The images with the labels that the classifier gives them, named 0, 1, ..."""
    labels = classifier.logits(x).argmax(1)
    names = [str(row) for row in range(len(x))]
    return from_arrays(
        "made", "test", x, labels, ids=names, classes=list(map(str, range(classifier.num_classes)))
    )


def measurements(
    classifier: Classifier, x: torch.Tensor, threat: ThreatModel, settings: Settings
) -> Measurements:
    """Measurements on images that are all classified correctly; no attack is run yet."""
    return Measurements(classifier, classified(classifier, x), threat, settings, flags=())


def identity_with_backward(change):
    """The identity as a function of tensors, whose backward pass returns ``change(gradient)``."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return change(gradient)

    return Identity.apply


class Roots(nn.Module):
    """Finite outputs everywhere, infinite gradients at black pixels; images of 12 numbers, three classes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(12, 3, generator=generator))

    def forward(self, x):
        return x.flatten(1).sqrt() @ self.weight


class Waves(nn.Module):
    """Outputs without order: the phases of 195 fast waves across an image of 12 numbers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("weight", 1e3 * torch.randn(12, 195, generator=generator))

    def forward(self, x):
        return torch.cos(x.flatten(1) @ self.weight)


@cache
def diagnosed(name: str, device: str = "cpu") -> Diagnosis:
    """All checks on 60 digits, of an honest or a gradient-obfuscating model; made once a process."""
    return _diagnosis(name, device)
