"""A small convolutional network for 8x8 digits: trains in seconds on a CPU, weighs under 1 MB.

It has no batch-norm, so that rows of a batch are independent in training mode too.
"""

from __future__ import annotations

from torch import nn


def digits_cnn(
    num_classes: int, in_channels: int, *, image_size: int = 8, hidden: int = 128
) -> nn.Sequential:
    """Three 3x3 convolutions (32, 64, 64), one max-pool, two linear layers; 188 k parameters.

    Args:
        num_classes: width of the last layer.
        in_channels: channels of one image.
        image_size: side of the square image, even.
        hidden: width of the first linear layer.

    Raises:
        ValueError: a size that is not positive, or an odd image size.
    """
    if image_size < 2 or image_size % 2 or hidden < 1:
        raise ValueError(f"image_size {image_size} must be even and hidden {hidden} positive")
    return nn.Sequential(
        nn.Conv2d(in_channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (image_size // 2) ** 2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )
