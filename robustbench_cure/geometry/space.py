"""The space in which the loss is curved: normalised inputs u = (x - mean) / std, and the network on them.

The CURE paper measures Hessians, their bounds and its own step h there (section 0 of the conventions: pixels
for attacks and boundaries, normalised inputs for the loss). A network that does its own normalising inside
has no such space to offer; then pixels are it, and the result says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robustbench_cure.adapt import Normalised
from robustbench_cure.attacks.losses import cross_entropy
from robustbench_cure.classifier import Classifier


class InputLoss(Protocol):
    """What curvature is taken of: a loss of inputs, with gradients. `Space` is one."""

    @property
    def network(self) -> Classifier:
        """The network under it; its batch size is the size of a pass."""

    def gradients(self, u: Tensor, y: Tensor) -> Tensor:
        """Gradient of each row's loss, float32, shape of ``u``; one pass."""


@dataclass(frozen=True)
class Space:
    """A network and the units of its inputs.

    Attributes:
        network: takes inputs of this space; float32.
        mean: subtracted from pixels, shape (C,1,1).
        std: what they are divided by.
        name: ``norm`` or ``px01``.
    """

    network: Classifier
    mean: Tensor
    std: Tensor
    name: str

    def inputs(self, x: Tensor) -> Tensor:
        """Pixels (B,C,H,W) in [0, 1] as inputs of the network."""
        return (x.to(self.network.device) - self.mean) / self.std

    def gradients(self, u: Tensor, y: Tensor) -> Tensor:
        """Gradient of the cross-entropy of each row, float32, shape of ``u``; one pass."""
        return self.network.value_and_gradient(u, lambda z: cross_entropy(z, y))[1]

    def losses(self, u: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of each row, float32 (B,)."""
        return cross_entropy(self.network.logits(u), y)


def normalised_space(classifier: Classifier) -> Space:
    """The space of a model's normalised inputs, or of pixels where it normalises inside.

    Args:
        classifier: the model; it is not changed. The bare network is folded and runs in float32, as
            differences of gradients need the digits.
    """
    module = classifier.module
    shape = (classifier.input_shape[0], 1, 1)
    mean, std = torch.zeros(shape), torch.ones(shape)
    if isinstance(module, Normalised):
        mean, std = module.mean.detach().clone().view(-1, 1, 1), module.std.detach().clone().view(-1, 1, 1)
    network = Classifier(
        module.net if isinstance(module, Normalised) else module,
        num_classes=classifier.num_classes,
        input_shape=classifier.input_shape,
        device=classifier.device,
        precision="fp32",
        batch_size=classifier.batch_size,
        info=classifier.model_info(),
    )
    device = classifier.device
    return Space(
        network, mean.to(device), std.to(device), "norm" if isinstance(module, Normalised) else "px01"
    )
