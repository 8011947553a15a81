"""The extreme eigenvalues of the Hessian, and its top eigenvector, from a few products an image.

Source: Lanczos 1950; full re-orthogonalisation as in Golub & Van Loan, Matrix Computations, section 10.3.
Images are worked on together: one pass gives one product for each. The finite-difference operator is not
symmetric, so that the projected matrix V'HV is kept whole and symmetrised. Deviation from power iteration,
which finds the eigenvalue of largest magnitude: the theorem of the CURE paper needs the largest one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.geometry.hessian import NO_GRADIENT, alignment, gradients, on_sphere, products
from robustbench_cure.geometry.space import InputLoss

#: A direction shorter than this, relative to the products so far, adds nothing: the space is exhausted.
EXHAUSTED = 1e-5
#: Bytes that directions and products may take; images beyond are worked on after the first ones.
MEMORY = 1 << 30


@dataclass(frozen=True)
class Extremes:
    """Extreme eigenvalues and the top eigenvector of every row.

    Attributes:
        largest: largest (algebraic) Ritz value, float64 (B,).
        smallest: smallest one.
        vector: unit Ritz vector of the largest, float32, shape of the input.
        gradient: gradient at the input, float32, shape of the input.
        alignment: |gradient . vector| / ||gradient||, float64 (B,); NaN where there is no gradient.
        projected: V'HV, symmetric, over the directions V; float64 (B, iterations, iterations), zero beyond
            those that were taken.
    """

    largest: Tensor
    smallest: Tensor
    vector: Tensor
    gradient: Tensor
    alignment: Tensor
    projected: Tensor


def lanczos(
    space: InputLoss,
    u: Tensor,
    y: Tensor,
    *,
    h: float,
    iterations: int = 30,
    start: Literal["random", "gradient"] = "random",
    noise: Noise | None = None,
    advance: Callable[[int], None] | None = None,
) -> Extremes:
    """Largest and smallest eigenvalues of the finite-difference Hessian at every row.

    Args:
        space: the loss, see `InputLoss`.
        u: inputs, float32 (B,C,H,W).
        y: true labels, int64 (B,).
        h: step, in units of ``u``.
        iterations: products an image; at most d are made.
        start: first direction: random, which misses no eigenvector; or the gradient, whose Krylov space
            holds the solution of the quadratic model (the random one where there is no gradient).
        noise: of the random start, one stream a row; default: rows known by their place.
        advance: called with the number of gradients computed.

    Returns:
        Everything on the CPU but the vectors and gradients.
    """
    noise = Noise.for_rows(len(u), device=u.device) if noise is None else noise
    steps = min(iterations, u[0].numel())
    rows = max(1, MEMORY // (2 * 8 * steps * u[0].numel()))
    parts = []
    for part in torch.split(torch.arange(len(u), device=u.device), rows):
        first = on_sphere(noise[part], tuple(u.shape[1:]), 0)
        parts.append(_lanczos(space, u[part], y[part], first, h, steps, start, advance))
    return Extremes(
        **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Extremes)}
    )


def _lanczos(
    space: InputLoss,
    u: Tensor,
    y: Tensor,
    first: Tensor,
    h: float,
    steps: int,
    start: str,
    advance: Callable[[int], None] | None,
) -> Extremes:
    n, d = len(u), u[0].numel()
    here = gradients(space, u, y)
    basis = torch.zeros((n, steps, d), dtype=torch.float64, device=u.device)
    product = torch.zeros_like(basis)
    direction = first.flatten(1).double()
    if start == "gradient":
        slope = here.flatten(1).double()
        length = slope.norm(dim=1, keepdim=True)
        direction = torch.where(length > NO_GRADIENT, slope / length.clamp_min(NO_GRADIENT), direction)
    for k in range(steps):
        basis[:, k] = direction
        z = direction.float().view_as(u)
        product[:, k] = products(space, u, y, here, z, h).flatten(1).double()
        if advance is not None:
            advance(n)
        rest = product[:, k]
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            known = basis[:, : k + 1]
            rest = rest - torch.einsum("nk,nkd->nd", torch.einsum("nkd,nd->nk", known, rest), known)
        length = rest.norm(dim=1, keepdim=True)
        scale = product[:, : k + 1].norm(dim=2).amax(1, keepdim=True)
        # An exhausted row keeps a zero direction: its products are zero and its matrix gains zero rows.
        direction = torch.where(length > EXHAUSTED * scale, rest / length.clamp_min(1e-300), 0.0)
    return _extremes(basis, product, here, u)


def _extremes(basis: Tensor, product: Tensor, here: Tensor, u: Tensor) -> Extremes:
    projected = torch.einsum("nkd,nld->nkl", basis, product)
    symmetric = (projected + projected.transpose(1, 2)) / 2
    used = basis.norm(dim=2) > 0.5
    # Rows that were never used must not stand for eigenvalue zero: they are put between the others.
    values, vectors = [], []
    for matrix, mask in zip(symmetric, used, strict=True):
        own, space = torch.linalg.eigh(matrix[mask][:, mask])
        values.append((own[-1], own[0]))
        full = torch.zeros(len(mask), dtype=torch.float64, device=u.device)
        full[mask] = space[:, -1]
        vectors.append(full)
    top = torch.einsum("nk,nkd->nd", torch.stack(vectors), basis)
    top = top / top.norm(dim=1, keepdim=True)
    return Extremes(
        largest=torch.stack([largest for largest, _ in values]).cpu(),
        smallest=torch.stack([smallest for _, smallest in values]).cpu(),
        vector=top.float().view_as(u),
        gradient=here,
        alignment=alignment(here, top),
        projected=symmetric.cpu(),
    )
