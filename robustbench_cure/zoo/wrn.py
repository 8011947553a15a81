"""Wide residual network, WRN-depth-widen, with pre-activation blocks.

Source: Zagoruyko & Komodakis 2016 (arXiv 1605.07146), without dropout. Parameter names are those of the
implementation that TRADES and RobustBench share, so that its state dicts load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Block(nn.Module):
    """BN-ReLU-conv twice; where the width changes the shortcut starts behind the first BN-ReLU."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.same = channels_in == channels
        if not self.same:
            self.convShortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = functional.relu(self.bn1(x))
        out: Tensor = self.conv2(functional.relu(self.bn2(self.conv1(active))))
        shortcut: Tensor = x if self.same else self.convShortcut(active)
        return out + shortcut


class _Stage(nn.Module):
    def __init__(self, channels_in: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = _Block(channels_in, channels, stride)
        self.layer = nn.Sequential(first, *[_Block(channels, channels, 1) for _ in range(blocks - 1)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """Three stages of pre-activation blocks, widths 16, 32 and 64 times the widening factor.

    Args:
        num_classes: width of the last layer.
        in_channels: channels of one image.
        blocks: blocks in each stage.
        widen_factor: the factor k of WRN-d-k.
    """

    def __init__(self, num_classes: int, in_channels: int, blocks: int, widen_factor: int) -> None:
        super().__init__()
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.block1 = _Stage(widths[0], widths[1], blocks, 1)
        self.block2 = _Stage(widths[1], widths[2], blocks, 2)
        self.block3 = _Stage(widths[2], widths[3], blocks, 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) of normalised images (B,C,H,W)."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = functional.relu(self.bn1(out))
        logits: Tensor = self.fc(torch.mean(out, (2, 3)))
        return logits


def wrn(num_classes: int, in_channels: int, *, depth: int = 28, widen_factor: int = 10) -> WideResNet:
    """WRN-``depth``-``widen_factor``; 36,479,194 parameters for 28-10 on CIFAR-10.

    Args:
        num_classes: width of the last layer.
        in_channels: channels of one image.
        depth: number of layers, 6n + 4.
        widen_factor: positive.

    Raises:
        ValueError: a depth that is not 6n + 4, or a widening factor that is not positive.
    """
    if depth < 10 or (depth - 4) % 6 or widen_factor < 1:
        raise ValueError(f"depth {depth} must be 6n + 4 (10, 16, 22, 28, ...), widen_factor positive")
    return WideResNet(num_classes, in_channels, (depth - 4) // 6, widen_factor)
