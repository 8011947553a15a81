"""Hessian of the loss by finite differences of step h: products, norms, and the whole spectrum of an image.

Source: CURE paper, Eq. 1:  Hz = (grad l(u + h z) - grad l(u)) / h.

h is finite on purpose: it is the scale at which curvature is wanted, and the Hessian of a piecewise linear
network's loss has rank L - 1 in the limit. Exact for every h where the loss is quadratic. Where it is not,
Hz is not linear in z: the matrix that such products make up depends on the directions they were taken along.

The spectrum (CURE paper, section 2 and figure 2; thesis figure 8.2): the d columns H q_i are finite
differences along an orthonormal basis; the matrix is symmetrised, as finite differences are not symmetric,
and its eigenvalues sorted descending. It costs d + 1 gradients an image. `lanczos` gives the extreme
eigenvalues for far fewer: the same ones where the loss is quadratic within the step, others where it is not.
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

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.geometry.space import InputLoss

#: A gradient shorter than this is what float32 left of a loss of zero: it points nowhere.
NO_GRADIENT = 1e-12
#: Inputs up to which all eigenvectors are computed to have the first.
DENSE_EIGENVECTORS = 256

Basis = Literal["canonical", "random"]


def products(space: InputLoss, u: Tensor, y: Tensor, here: Tensor, z: Tensor, h: float) -> Tensor:
    """Hz for one direction of every row.

    Args:
        space: the loss, see `InputLoss`.
        u: inputs, float32 (B,C,H,W).
        y: labels, int64 (B,).
        here: gradients at ``u``, shape of ``u``.
        z: directions, shape of ``u``.
        h: step, in units of ``u``.

    Returns:
        float32, shape of ``u``.
    """
    parts = []
    for rows in torch.split(torch.arange(len(u), device=u.device), space.network.batch_size):
        parts.append((space.gradients(u[rows] + h * z[rows], y[rows]) - here[rows]) / h)
    return torch.cat(parts)


def gradients(space: InputLoss, u: Tensor, y: Tensor) -> Tensor:
    """Gradients of all rows, in passes of the network's batch size; shape of ``u``."""
    batches = torch.split(torch.arange(len(u), device=u.device), space.network.batch_size)
    return torch.cat([space.gradients(u[rows], y[rows]) for rows in batches])


def columns(
    space: InputLoss,
    u: Tensor,
    y: Tensor,
    basis: Tensor,
    h: float,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """H q for every direction q of a basis, at one point.

    Args:
        space: the loss, see `InputLoss`.
        u: one input (C,H,W).
        y: its label, int64 ().
        basis: directions as rows, (m, d).
        h: step.
        advance: called with the number of gradients computed.

    Returns:
        float32 (m, d): row i is H q_i.
    """
    here = space.gradients(u[None], y[None])[0].flatten()
    out = torch.empty_like(basis)
    for rows in torch.split(torch.arange(len(basis), device=u.device), space.network.batch_size):
        there = u + h * basis[rows].view(-1, *u.shape)
        out[rows] = (space.gradients(there, y.expand(len(rows))).flatten(1) - here) / h
        if advance is not None:
            advance(len(rows))
    return out


def on_sphere(noise: Noise, shape: tuple[int, ...], stream: int) -> Tensor:
    """One direction a row, uniform on the unit sphere, float32 (B, *shape), from the row's own stream."""
    z = noise.normal(shape, stream)
    unit: Tensor = z / z.flatten(1).norm(dim=1).view(-1, *[1] * len(shape))
    return unit


def frobenius(
    space: InputLoss,
    u: Tensor,
    y: Tensor,
    *,
    h: float,
    directions: int = 100,
    noise: Noise | None = None,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """Estimate of the Frobenius norm of the Hessian at every row.

    Source: CURE paper, section 4: ||H||_F^2 = E ||Hz||^2 over z ~ N(0, I). Here z is uniform on the unit
    sphere and the mean is multiplied by d, which is the same for a linear map, and keeps the step at h where
    a Gaussian z would make it sqrt(d) times longer.

    Args:
        space: the loss, see `InputLoss`.
        u: inputs, float32 (B,C,H,W).
        y: labels, int64 (B,).
        h: step.
        directions: how many z are drawn for each row.
        noise: of the draws, one stream a row; default: rows known by their place.
        advance: called with the number of gradients computed.

    Returns:
        float32 (B,).
    """
    noise = Noise.for_rows(len(u), device=u.device) if noise is None else noise
    here = gradients(space, u, y)
    total = torch.zeros(len(u), dtype=torch.float64, device=u.device)
    for k in range(directions):
        z = on_sphere(noise, tuple(u.shape[1:]), k)
        total += products(space, u, y, here, z, h).flatten(1).double().square().sum(1)
        if advance is not None:
            advance(len(u))
    d = math.prod(u.shape[1:])
    return (d * total / directions).sqrt().float()


def alignment(gradient: Tensor, vector: Tensor) -> Tensor:
    """|cos| of two vectors row by row, float64 (B,) on the CPU; NaN where there is no gradient."""
    g, v = gradient.flatten(1).double(), vector.flatten(1).double()
    length = g.norm(dim=1)
    cosine = (g * v).sum(1).abs() / (length * v.norm(dim=1))
    return torch.where(length > NO_GRADIENT, cosine, torch.nan).cpu()


def along_sign(space: InputLoss, u: Tensor, y: Tensor, *, h: float) -> Tensor:
    """||Hz|| at every row for z = sign(grad l) of unit length, float32 (B,); 0 where the gradient is zero."""
    here = gradients(space, u, y)
    sign = here.sign()
    length = sign.flatten(1).norm(dim=1).clamp_min(1.0).view(-1, *[1] * (u.dim() - 1))
    norms: Tensor = products(space, u, y, here, sign / length, h).flatten(1).norm(dim=1)
    return norms


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
    """Eigenvalues and top eigenvector of one image.

    Attributes:
        values: all eigenvalues, float32 (d,), descending, on the CPU: differences of float32 gradients hold
            no more digits.
        vector: unit eigenvector of the first, float32 (C,H,W), on the CPU.
    """

    values: Tensor
    vector: Tensor


def spectrum(
    space: InputLoss,
    u: Tensor,
    y: Tensor,
    *,
    h: float,
    basis: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> Spectrum:
    """All eigenvalues, and the top eigenvector, of the symmetrised finite-difference Hessian at one input.

    Args:
        space: the loss, see `InputLoss`.
        u: one input (C,H,W), float32.
        y: its true label, int64 ().
        h: step, in units of ``u``.
        basis: orthonormal directions as rows, (d, d); None: the canonical basis, one input each.
        advance: called with the number of gradients computed.
    """
    d = math.prod(u.shape)
    if basis is not None and tuple(basis.shape) != (d, d):
        raise ValueError(f"the basis must be ({d}, {d}), got {tuple(basis.shape)}")
    directions = torch.eye(d, device=u.device) if basis is None else basis
    product = columns(space, u, y, directions, h, advance)  # row i is H q_i
    matrix = product if basis is None else product @ basis.T  # q_i' H q_j: a rotation keeps the eigenvalues
    symmetric = (matrix + matrix.T) / 2
    values = torch.linalg.eigvalsh(symmetric).flip(0).cpu()
    vector = _top(symmetric.cpu())
    in_inputs = vector if basis is None else basis.T.cpu() @ vector
    return Spectrum(values, in_inputs.view(u.shape))


def _top(symmetric: Tensor) -> Tensor:
    """Unit eigenvector of the largest eigenvalue; by Lanczos where all of them would take much longer."""
    d = len(symmetric)
    if d <= DENSE_EIGENVECTORS:
        vector: Tensor = torch.linalg.eigh(symmetric)[1][:, -1]
        return vector
    start = np.ones(d) + np.arange(d) / d  # a fixed start: the same vector in every run
    top = eigsh(symmetric.double().numpy(), k=1, which="LA", v0=start)[1][:, 0]
    return torch.from_numpy(top).float()
