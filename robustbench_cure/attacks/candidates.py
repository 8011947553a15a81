"""What every attack returns: candidates for adversarial images. The evaluation verifies them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Candidates:
    """Perturbed images and the work they took, row by row.

    Attributes:
        x_adv: perturbed images, float32 (B,C,H,W).
        steps: updates made before that image was reached, int64 (B,).
        forwards: images passed forward for each row, int64 (B,).
        backwards: input gradients computed for each row, int64 (B,).
        converged: whether the attack ended by its own criterion rather than by running out of steps,
            bool (B,); None where the attack has no such criterion.
        searched_again: rows searched in float32 because bfloat16 sees some of them otherwise, bool (B,); None
            where the two were not compared.
    """

    x_adv: Tensor
    steps: Tensor
    forwards: Tensor
    backwards: Tensor
    converged: Tensor | None = None
    searched_again: Tensor | None = None
    #: What the attack tried to touch and was kept from; for the report.
    effects: tuple[str, ...] = ()

    @classmethod
    def start(cls, x: Tensor) -> Candidates:
        """The images themselves as candidates, which have cost nothing."""
        steps, forwards, backwards = torch.zeros((3, len(x)), dtype=torch.int64, device=x.device).unbind()
        return cls(x.clone(), steps.clone(), forwards.clone(), backwards.clone())
