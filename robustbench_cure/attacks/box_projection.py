"""Shortest way from a point of the box [0, 1]^d to a hyperplane, inside the box, for l2 and linf.

Source: Croce & Hein 2020, arXiv 1907.02044, section 2.1 and appendix A, which sort the pixels. Here the one
unknown is found by Newton's method, which needs no sorting, is exact, and ends after a few rounds.

All pixels move in the direction of the normal w, and pixel i stops where the box ends, after c_i:

    |d_i| = min(s u_i, c_i),    u_i = 1 (linf) or |w_i| (l2),    where w_i is zero: d_i = 0

and s solves g(s) = sum_i |w_i| min(s u_i, c_i) = |rise|. g is increasing, concave and linear between the
values of s where a pixel stops. Newton's method from below therefore never passes the solution, every round
stops further pixels, and the round that stops none ends on the solution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustbench_cure.threat import Norm


def box_projection(norm: Norm, points: Tensor, normal: Tensor, rise: Tensor) -> Tensor:
    """Shortest d with normal . d = rise and points + d in [0, 1], row by row.

    Where no point of the box rises that far, d leads to the point of the box that rises furthest.
    In linf shortest vectors are not unique: the one whose pixels move alike is returned.

    Args:
        norm: the norm in which d is shortest.
        points: float (B, d) in [0, 1].
        normal: normal of the hyperplane, finite, float (B, d).
        rise: how much normal . d is to be, of either sign, float (B,). NaN is taken as zero.

    Returns:
        d, float (B, d); zero where the normal or the rise is.
    """
    # Scaled to the largest entry, so that squares of tiny slopes do not vanish.
    largest = normal.abs().amax(1, keepdim=True)
    normal = normal / largest.where(largest > 0, 1.0)
    rise = rise[:, None].nan_to_num(0.0, torch.inf, -torch.inf) / largest.where(largest > 0, torch.inf)
    towards = normal.where(rise >= 0, -normal)  # where w . d grows
    weight = normal.abs()
    room = torch.where(towards > 0, 1 - points, points).masked_fill_(normal == 0, 0.0).clamp_min_(0.0)
    target = rise.abs()

    speed = torch.ones_like(weight) if norm == "linf" else weight
    gain = weight * speed  # of each free pixel, for each unit of s
    held = weight * room  # of each pixel that has stopped
    scale = torch.where(held.sum(1, keepdim=True) <= target, torch.inf, target / gain.sum(1, keepdim=True))
    scale = scale.masked_fill(target == 0, 0.0)
    rows = (scale.isfinite() & (target > 0)).squeeze(1).nonzero().squeeze(1)
    free = torch.ones_like(room[rows], dtype=torch.bool)
    while len(rows):
        still = free & (room[rows] > scale[rows] * speed[rows])  # rounding frees none again
        changed = (still != free).any(1)
        rows, free = rows[changed], still[changed]
        slope = (gain[rows] * free).sum(1, keepdim=True)
        left = target[rows] - held[rows].masked_fill(free, 0.0).sum(1, keepdim=True)
        # No pixel is free: all have stopped, up to rounding.
        scale[rows] = torch.where(slope > 0, left / slope, scale[rows])
    length = torch.minimum(room, torch.where(scale.isinf(), room, scale * speed))
    return length * towards.sign()
