"""Curvature profile: all eigenvalues of the Hessian of the loss, image by image, averaged by rank.

Source: CURE paper, section 2 and figure 2; thesis figure 8.2. For each image the d columns H q_i are finite
differences along an orthonormal basis; the matrix is symmetrised, as finite differences are not symmetric,
and its eigenvalues sorted descending. Images are averaged after sorting, position by position.

Cost: d + 1 gradients an image. `lanczos` gives the ends of the profile for far fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from robustbench_cure.geometry.hessian import columns
from robustbench_cure.geometry.space import Loss

Basis = Literal["canonical", "random"]


def random_basis(d: int, seed: int, device: torch.device) -> Tensor:
    """A random rotation: orthonormal directions as rows, float32 (d, d).

    Along a single input (the canonical basis) the whole step h falls on one value; a rotation spreads it.
    """
    matrix = torch.randn((d, d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(matrix)
    # Signs fixed: uniform over all rotations.
    rotation: Tensor = (q * r.diagonal().sign()).T.float().contiguous()
    return rotation.to(device)


def eigenvalues(
    space: Loss,
    u: Tensor,
    y: Tensor,
    *,
    h: float,
    basis: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """Eigenvalues of the symmetrised finite-difference Hessian at one input.

    Args:
        space: the loss, see `Loss`.
        u: one input (C,H,W), float32.
        y: its true label, int64 ().
        h: step, in units of ``u``.
        basis: orthonormal directions as rows, (d, d); None: the canonical basis, one input each.
        advance: told of gradients computed.

    Returns:
        float32 (d,), descending, on the CPU: differences of float32 gradients hold no more digits.
    """
    d = math.prod(u.shape)
    if basis is not None and tuple(basis.shape) != (d, d):
        raise ValueError(f"the basis must be ({d}, {d}), got {tuple(basis.shape)}")
    directions = torch.eye(d, device=u.device) if basis is None else basis
    product = columns(space, u, y, directions, h, advance)  # row i is H q_i
    inside = product if basis is None else product @ basis.T  # q_i' H q_j: a rotation keeps the eigenvalues
    ascending: Tensor = torch.linalg.eigvalsh((inside + inside.T) / 2)
    return ascending.flip(0).cpu()
