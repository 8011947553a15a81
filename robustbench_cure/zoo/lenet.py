"""LeNet for small colour images: two 5x5 convolutions and three linear layers.

Source: LeCun, Bottou, Bengio & Haffner 1998, with ReLU and max-pooling, as used on CIFAR-10 for the
small network of Moosavi-Dezfooli's thesis (chapter 6).
"""

from __future__ import annotations

from torch import nn


def lenet(num_classes: int, in_channels: int, *, image_size: int = 32) -> nn.Sequential:
    """Convolutions of 6 and 16 channels, linear layers of 120 and 84 units; 62,006 parameters on CIFAR-10.

    Args:
        num_classes: width of the last layer.
        in_channels: channels of one image.
        image_size: side of the square image, at least 16.

    Raises:
        ValueError: an image too small for two valid 5x5 convolutions and poolings.
    """
    side = ((image_size - 4) // 2 - 4) // 2
    if side < 1:
        raise ValueError(f"image_size {image_size} is too small: at least 16")
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * side * side, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )
