"""Gradient-obfuscating models: each hides its gradients in one known way, to test the checks with.

Sources: Athalye, Carlini & Wagner 2018, arXiv 1802.00420 (shattered and random gradients, JPEG);
Carlini & Wagner 2016, arXiv 1607.04311 (saturated outputs).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class _Wrapper(nn.Module):
    """A network with something before it and something after it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def before(self, x: Tensor) -> Tensor:
        """Change the images, (B,C,H,W), before the network."""
        return x

    def after(self, z: Tensor) -> Tensor:
        """Change the logits, (B,L), after the network."""
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Images (B,C,H,W) -> logits (B,L)."""
        return self.after(self.net(self.before(x)))


class ZeroGradient(_Wrapper):
    """The graph is cut: the network is as weak as before, its gradient is zero."""

    def before(self, x: Tensor) -> Tensor:
        """The images, without their history."""
        return x.detach() + 0 * x


class Quantised(_Wrapper):
    """Images are rounded to 17 grey levels: a staircase, flat almost everywhere."""

    def before(self, x: Tensor) -> Tensor:
        """Images rounded to multiples of 1/16."""
        return (x * 16).round() / 16


class Saturated(_Wrapper):
    """Logits times 10,000: softmax is one or zero to the last bit, and so is cross-entropy's gradient."""

    def after(self, z: Tensor) -> Tensor:
        """The logits multiplied by 10,000, float32 (B, L)."""
        return z * 1e4


class Randomised(_Wrapper):
    """Gaussian noise on the images, drawn anew at every pass."""

    def before(self, x: Tensor) -> Tensor:
        """Images with Gaussian noise of deviation 0.1."""
        return x + 0.1 * torch.randn_like(x)


class SoftmaxOutput(_Wrapper):
    """Probabilities where logits are expected."""

    def after(self, z: Tensor) -> Tensor:
        """Probabilities in place of logits: softmax, float32 (B, L)."""
        return z.softmax(1)


class Compressed(_Wrapper):
    """Coefficients of an 8x8 cosine transform are rounded, as JPEG does."""

    def before(self, x: Tensor) -> Tensor:
        """Compressed images; sides must be multiples of eight."""
        k = torch.arange(8, dtype=x.dtype, device=x.device)
        basis = torch.cos(math.pi * (2 * k[None] + 1) * k[:, None] / 16) / 2
        basis[0] /= math.sqrt(2)
        blocks = x.unfold(2, 8, 8).unfold(3, 8, 8)
        coefficients = basis @ blocks @ basis.T
        rounded = (coefficients * 8).round() / 8
        pixels = basis.T @ rounded @ basis
        return pixels.permute(0, 1, 2, 4, 3, 5).reshape(x.shape)


class Shattered(_Wrapper):
    """A fast ripple on every pixel: too small to change labels, steep enough to send gradients anywhere."""

    def before(self, x: Tensor) -> Tensor:
        """Images with the ripple on top."""
        return x + 0.02 * torch.sin(2000 * x)


#: Name -> wrapper of an honest network.
OBFUSCATED: dict[str, type[_Wrapper]] = {
    "zero gradient": ZeroGradient,
    "quantised input": Quantised,
    "saturated logits": Saturated,
    "random": Randomised,
    "softmax output": SoftmaxOutput,
    "JPEG-like rounding": Compressed,
    "shattered gradient": Shattered,
}
