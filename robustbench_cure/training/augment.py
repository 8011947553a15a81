"""Augmentation on batches of tensors: each row its own crop and flip, without a loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

#: Black border, in pixels, that a crop may reach into.
PADDING = 4


def crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random window of the image padded with four black pixels on each side; same shape."""
    n, _, height, width = x.shape
    offsets = torch.randint(2 * PADDING + 1, (2, n), generator=generator, device=x.device)
    rows = torch.arange(n, device=x.device)
    windows = functional.pad(x, [PADDING] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[rows, :, offsets[0], offsets[1]]


def crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """`crop`, then a mirror image of every second row on average."""
    x = crop(x, generator)
    mirrored = torch.rand(len(x), generator=generator, device=x.device) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)


def none(x: Tensor, generator: torch.Generator) -> Tensor:
    """The images as they are."""
    del generator
    return x


#: Name in a recipe -> (images (B,C,H,W), generator on their device) -> images of the same shape.
AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": none,
    "crop": crop,
    "crop-flip": crop_flip,
}
