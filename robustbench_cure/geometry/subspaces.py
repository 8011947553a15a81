"""Smallest perturbations inside subspaces: random ones (semi-random noise), and bands of frequencies.

Source: Fawzi, Moosavi-Dezfooli & Frossard 2016, arXiv 1608.08967; thesis, sections 3.4.2 and 5.3-5.6. S is
a subspace of dimension m of the d inputs, r_S the shortest perturbation in S that changes the label, r the
shortest of all. For an affine classifier of L classes and a random S, with probability above 1 - 2 (L + 1)
delta,

    sqrt(zeta1) <= sqrt(m/d) ||r_S|| / ||r|| <= sqrt(zeta2)

    zeta1 = 1 / (1 + 2 sqrt(ln(1/delta)/m) + 2 ln(1/delta)/m)
    zeta2 = 1 / max(delta^(2/m) / e, 1 - sqrt(2 (1 - delta^(2/m))))

so that beta, the mean of the middle, is about 1: a network whose beta is near 1 in random subspaces has
boundaries that are nearly flat at that scale. m = 1 is random noise. In a band of frequencies beta below 1
says that the network is more sensitive there than to noise of the same dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.fft import idctn
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.threat import ThreatModel

#: Any radius: minimal DeepFool takes none.
L2 = ThreatModel.unbounded("l2")


def zeta(m: float, delta: float) -> tuple[float, float]:
    """zeta1 and zeta2 of the thesis' Theorem 1: how far a random subspace strays from its expectation.

    Args:
        m: dimension of the subspace, at least 1.
        delta: in (0, 1); the theorem holds with probability above 1 - 2 (L + 1) delta.
    """
    log = math.log(1 / delta)
    root = delta ** (2 / m)
    least = 1 / (1 + 2 * math.sqrt(log / m) + 2 * log / m)
    return least, 1 / max(root / math.e, 1 - math.sqrt(2 * (1 - root)))


def random_subspaces(shape: Sequence[int], m: int, noise: Noise) -> Tensor:
    """For each stream an orthonormal basis of a uniformly random subspace, float32 (B, m, C, H, W).

    Args:
        shape: (C, H, W) of the images.
        m: dimension, 1 to C H W.
        noise: a stream for each row.
    """
    gaussian = noise.normal((math.prod(shape), m), m).double()
    basis: Tensor = torch.linalg.qr(gaussian)[0].transpose(1, 2)
    return basis.float().reshape(len(noise), m, *shape)


def frequency_band(shape: Sequence[int], band: int, width: int) -> Tensor:
    """Basis of a band of the orthonormal two-dimensional DCT-II, the same in every channel.

    The block of ``width`` x ``width`` frequencies at place ``band`` of the diagonal (thesis, Eq. 3.19-3.20):
    0 holds the lowest.

    Args:
        shape: (C, H, W) of the images.
        band: from 0; its block must lie inside the image.
        width: of the block.

    Returns:
        float32 (1, C width^2, C, H, W), orthonormal.

    Raises:
        ValueError: the block does not lie inside the image.
    """
    channels, height, breadth = shape
    if band < 0 or width < 1 or (band + 1) * width > min(height, breadth):
        raise ValueError(f"no band {band} of width {width} in images of {height} x {breadth}")
    places = torch.arange(width * width)
    unit = torch.zeros((width * width, height, breadth), dtype=torch.float64)
    unit[places, band * width + places // width, band * width + places % width] = 1
    waves = torch.from_numpy(idctn(unit.numpy(), axes=(1, 2), norm="ortho"))
    basis = torch.zeros((channels, width * width, channels, height, breadth))
    for channel in range(channels):
        basis[channel, :, channel] = waves.float()
    return basis.flatten(0, 1)[None]
