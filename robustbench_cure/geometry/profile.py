"""Curvature profile: all eigenvalues of the Hessian of the loss, image by image, averaged by rank.

Source: CURE paper, section 2 and figure 2; thesis figure 8.2. For each image the d columns H q_i are finite
differences along an orthonormal basis; the matrix is symmetrised, as finite differences are not symmetric,
and its eigenvalues sorted descending. Images are averaged after sorting, position by position.

Cost: d + 1 gradients an image. `lanczos` gives the ends of the profile for far fewer: the same ones where the
loss is quadratic within the step, others where it is not (see `hessian`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from robustbench_cure.geometry.hessian import columns
from robustbench_cure.geometry.space import Loss

Basis = Literal["canonical", "random"]

#: Inputs up to which all eigenvectors are computed to have the first.
FEW = 256


def random_basis(d: int, seed: int, device: torch.device) -> Tensor:
    """A random rotation: orthonormal directions as rows, float32 (d, d).

    Along a single input (the canonical basis) the whole step h falls on one value; a rotation spreads it.
    """
    matrix = torch.randn((d, d), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(matrix)
    # Signs fixed: uniform over all rotations.
    rotation: Tensor = (q * r.diagonal().sign()).T.float().contiguous()
    return rotation.to(device)


@dataclass(frozen=True)
class Spectrum:
    """Of one image.

    Attributes:
        values: all eigenvalues, float32 (d,), descending, on the CPU: differences of float32 gradients hold
            no more digits.
        vector: unit eigenvector of the first, float32 (C,H,W), on the CPU.
    """

    values: Tensor
    vector: Tensor


def spectrum(
    space: Loss,
    u: Tensor,
    y: Tensor,
    *,
    h: float,
    basis: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> Spectrum:
    """Eigenvalues, and the top eigenvector, of the symmetrised finite-difference Hessian at one input.

    Args:
        space: the loss, see `Loss`.
        u: one input (C,H,W), float32.
        y: its true label, int64 ().
        h: step, in units of ``u``.
        basis: orthonormal directions as rows, (d, d); None: the canonical basis, one input each.
        advance: told of gradients computed.
    """
    d = math.prod(u.shape)
    if basis is not None and tuple(basis.shape) != (d, d):
        raise ValueError(f"the basis must be ({d}, {d}), got {tuple(basis.shape)}")
    directions = torch.eye(d, device=u.device) if basis is None else basis
    product = columns(space, u, y, directions, h, advance)  # row i is H q_i
    inside = product if basis is None else product @ basis.T  # q_i' H q_j: a rotation keeps the eigenvalues
    symmetric = (inside + inside.T) / 2
    values = torch.linalg.eigvalsh(symmetric).flip(0).cpu()
    vector = _top(symmetric.cpu())
    turned = vector if basis is None else basis.T.cpu() @ vector
    return Spectrum(values, turned.view(u.shape))


def eigenvalues(
    space: Loss,
    u: Tensor,
    y: Tensor,
    *,
    h: float,
    basis: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """The values of `spectrum`, float32 (d,), descending, on the CPU."""
    return spectrum(space, u, y, h=h, basis=basis, advance=advance).values


def _top(symmetric: Tensor) -> Tensor:
    """Unit eigenvector of the largest eigenvalue; by Lanczos where all of them would take much longer."""
    d = len(symmetric)
    if d <= FEW:
        vector: Tensor = torch.linalg.eigh(symmetric)[1][:, -1]
        return vector
    start = np.ones(d) + np.arange(d) / d  # a fixed start: the same vector in every run
    found = eigsh(symmetric.double().numpy(), k=1, which="LA", v0=start)[1][:, 0]
    return torch.from_numpy(found).float()
