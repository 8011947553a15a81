"""Products of the Hessian of the loss with directions, by finite differences of step h.

Source: CURE paper, Eq. 1:  Hz = (grad l(u + h z) - grad l(u)) / h.

h is finite on purpose: it is the scale at which curvature is wanted, and the Hessian of a piecewise linear
network's loss has rank L - 1 in the limit. Exact for every h where the loss is quadratic. Where it is not,
Hz is not linear in z: the matrix that such products make up depends on the directions they were taken along.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.geometry.space import Loss

#: A gradient shorter than this is what float32 left of a loss of zero: it points nowhere.
NO_GRADIENT = 1e-12


def products(space: Loss, u: Tensor, y: Tensor, here: Tensor, z: Tensor, h: float) -> Tensor:
    """Hz for one direction of every row.

    Args:
        space: the loss, see `Loss`.
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


def gradients(space: Loss, u: Tensor, y: Tensor) -> Tensor:
    """Gradients of all rows, in passes of the network's batch size; shape of ``u``."""
    batches = torch.split(torch.arange(len(u), device=u.device), space.network.batch_size)
    return torch.cat([space.gradients(u[rows], y[rows]) for rows in batches])


def columns(
    space: Loss, u: Tensor, y: Tensor, basis: Tensor, h: float, advance: Callable[[int], None] | None = None
) -> Tensor:
    """H q for every direction q of a basis, at one point.

    Args:
        space: the loss, see `Loss`.
        u: one input (C,H,W).
        y: its label, int64 ().
        basis: directions as rows, (m, d).
        h: step.
        advance: told of gradients computed.

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
    space: Loss,
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
        space: the loss, see `Loss`.
        u: inputs, float32 (B,C,H,W).
        y: labels, int64 (B,).
        h: step.
        directions: how many z are drawn for each row.
        noise: of the draws, one stream a row; default: rows known by their place.
        advance: told of gradients computed.

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


def along_sign(space: Loss, u: Tensor, y: Tensor, *, h: float) -> Tensor:
    """||Hz|| at every row for z = sign(grad l) of unit length, float32 (B,); 0 where the gradient is zero."""
    here = gradients(space, u, y)
    sign = here.sign()
    length = sign.flatten(1).norm(dim=1).clamp_min(1.0).view(-1, *[1] * (u.dim() - 1))
    norms: Tensor = products(space, u, y, here, sign / length, h).flatten(1).norm(dim=1)
    return norms
