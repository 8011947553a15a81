"""ResNet-18 for 32x32 images: 3x3 stem, no max-pool.

Source: He, Zhang, Ren & Sun 2016 (arXiv 1512.03385), in the CIFAR form with basic blocks and widths 64 to
512 that adversarial-robustness papers mean by "ResNet-18". Parameter names are those of the widely shared
`pytorch-cifar` implementation, so that its state dicts load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of basic blocks behind a 3x3 stem.

    Args:
        num_classes: width of the last layer.
        in_channels: channels of one image.
        width: channels of the first stage; doubled at each of the next three.
        blocks: basic blocks in each stage.
    """

    def __init__(
        self, num_classes: int, in_channels: int, width: int, blocks: tuple[int, int, int, int]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks[0], 1)
        self.layer2 = _stage(width, 2 * width, blocks[1], 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], 2)
        self.layer4 = _stage(4 * width, 8 * width, blocks[3], 2)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) of normalised images (B,C,H,W)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(torch.mean(out, (2, 3)))
        return logits


def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Block(channels_in, channels, stride)
    return nn.Sequential(first, *[_Block(channels, channels, 1) for _ in range(blocks - 1)])


def resnet18(num_classes: int, in_channels: int, *, width: int = 64) -> ResNet:
    """ResNet-18, widths ``width`` to ``8 * width``; 11,173,962 parameters at 64, 0.70 M at 16.

    Args:
        num_classes: width of the last layer.
        in_channels: channels of one image.
        width: channels of the first stage.

    Raises:
        ValueError: ``width`` is not positive.
    """
    if width < 1:
        raise ValueError(f"width {width} must be positive")
    return ResNet(num_classes, in_channels, width, (2, 2, 2, 2))
