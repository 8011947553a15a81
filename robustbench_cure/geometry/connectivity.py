"""Are classification regions connected? A path between two points of one region, inside it.

Source: thesis, section 7.3, algorithm 5, figure 7.2. Two points with the same label are joined by a
polyline that never leaves the region of that label:

    path(a, b):  m = (a + b) / 2, carried into the region where it lies outside
                 a-m and m-b inside: done; otherwise path(a, m) and path(m, b)

A segment is inside if all its sampled convex combinations have the label. D, the length of the path over the
distance of its ends, is 1 for a segment. That no path is found proves nothing; that one is found says that
the samples lie in the region, not what is between them. Points are not cut to [0, 1].

Deviations. (1) The segment between the ends is tried first, as in the text. (2) Only the half that is not
inside is divided further, at most `DEPTH` times. (3) Samples are looked at from coarse to fine, and a segment
is given up at the first one outside: the verdict is that of all samples. (4) An anchor is
carried on into the region as far again as it was carried to get there. On the boundary itself, or a fiftieth
beyond it, anchors lie closer to it than the next chord cuts into it wherever the boundary bends away, and
halving ends only where samples no longer tell: after hundreds of anchors, or not at all. Half as far is not
enough for some ends that lie on such a boundary themselves. D - 1 grows by a factor of 4 at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from robustbench_cure.attacks.active_set import ActiveSet
from robustbench_cure.attacks.deepfool import FLAT, LEAST
from robustbench_cure.classifier import Classifier

#: Halvings of the segment between the ends, at most.
DEPTH = 12
#: Share of its way that an anchor is carried on into the region, if that leads nowhere else.
AHEAD = 1.0
#: Samples of each segment in the first look; twice as many in every further one.
FIRST = 4
#: Shortest step of a projection, l2 in pixels: leads off a boundary that a point lies on exactly.
TINY = 1e-6


def labels_of(classifier: Classifier, x: Tensor) -> Tensor:
    """Predicted labels of the reference form, int64 (B,)."""
    return classifier.logits(x).argmax(1)


def onto_region(
    classifier: Classifier, x: Tensor, target: Tensor, *, overshoot: float = 0.02, steps: int = 100
) -> tuple[Tensor, Tensor]:
    """Smallest change of each point that gives it the label ``target``: targeted DeepFool in l2, no clipping.

    Each step goes to the linearised boundary between the target and the class that wins at present.

    Args:
        classifier: the model.
        x: points, float32 (B,C,H,W), not necessarily in [0, 1].
        target: labels to reach, int64 (B,).
        overshoot: every step is lengthened by this share to cross the boundary.
        steps: at most.

    Returns:
        The points moved, shape of ``x``, and which of them have the target's label, bool (B,). Points that
        have it from the start are returned as they are.
    """
    here, reached = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    taken = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    active = ActiveSet(len(x), classifier.batch_size, x.device)
    for rows in active:
        aim = target[rows, None]

        def lead(logits: Tensor, aim: Tensor = aim) -> Tensor:
            return (logits.gather(1, aim) - logits.scatter(1, aim, -torch.inf).amax(1, True)).squeeze(1)

        logits, slope = classifier.value_and_gradient(here[rows], lead, reference=True)
        reached[rows] = logits.argmax(1) == target[rows]
        size = slope.flatten(1).norm(dim=1)
        made = (here[rows] - x[rows]).flatten(1).norm(dim=1)
        # On the boundary itself gaps are lost in rounding: no step is a tiny part of the way made so far.
        length = torch.maximum(-lead(logits) / size.clamp_min(FLAT), LEAST * made).clamp_min(TINY)
        going = ~reached[rows] & (size > FLAT) & (taken[rows] < steps)
        step = ((1 + overshoot) * length / size.clamp_min(FLAT)).view(-1, 1, 1, 1) * slope
        here[rows[going]] += step[going]
        taken[rows] += 1
        active.drop(rows[~going])
    return here, reached


def inside(classifier: Classifier, a: Tensor, b: Tensor, labels: Tensor, spacing: Tensor) -> Tensor:
    """Whether all samples between a and b have the label, bool (S,) for S segments; ends are not looked at.

    Args:
        classifier: the model.
        a: one end of each segment, float32 (S,C,H,W).
        b: the other.
        labels: wanted, int64 (S,).
        spacing: of the samples, at most, float64 (S,), in units of x.
    """
    lengths = (b - a).flatten(1).double().norm(dim=1)
    pieces = (lengths / spacing - 1e-6).ceil().long().clamp_min(1).tolist()
    done = [0] * len(a)
    good = torch.ones(len(a), dtype=torch.bool, device=a.device)
    look = FIRST
    while True:
        living = [s for s in good.nonzero().flatten().tolist() if done[s] < pieces[s] - 1]
        if not living:
            return good
        take = max(1, min(look, classifier.batch_size // len(living)))
        parts = [coarse_to_fine(pieces[s])[done[s] : done[s] + take] for s in living]
        segment = torch.cat([torch.full((len(p),), s) for s, p in zip(living, parts, strict=True)])
        share = torch.cat([p.double() / pieces[s] for s, p in zip(living, parts, strict=True)])
        for s, part in zip(living, parts, strict=True):
            done[s] += len(part)
        segment, t = segment.to(a.device), share.float().view(-1, 1, 1, 1).to(a.device)
        for rows, weight in zip(
            torch.split(segment, classifier.batch_size), torch.split(t, classifier.batch_size), strict=True
        ):
            points = (1 - weight) * a[rows] + weight * b[rows]
            good[rows[labels_of(classifier, points) != labels[rows]]] = False
        look *= 2


@lru_cache(maxsize=64)
def coarse_to_fine(pieces: int) -> Tensor:
    """The numbers 1 to ``pieces`` - 1, each once: halves before quarters before eighths; int64."""
    places = torch.arange(1, pieces)
    finest = places & -places
    return places[torch.sort(finest, descending=True, stable=True).indices]


@dataclass(frozen=True)
class Path:
    """What was found between two points of one region.

    Attributes:
        points: the ends and the anchors between them, in order, float32 (m,C,H,W) on the CPU; None: no path.
        depth: levels of halving that were looked at, 0 for a segment.
    """

    points: Tensor | None
    depth: int

    @property
    def anchors(self) -> int:
        """Points between the ends."""
        return 0 if self.points is None else len(self.points) - 2

    @property
    def deviation(self) -> float:
        """D, length over distance of the ends, at least 1; NaN without a path."""
        if self.points is None:
            return math.nan
        flat = self.points.flatten(1).double()
        straight = float((flat[-1] - flat[0]).norm())
        length = float((flat[1:] - flat[:-1]).norm(dim=1).sum())
        return length / straight if len(flat) > 2 and straight > 0 else 1.0


class _Search:
    """One path in the making: its points, and for each segment its depth and whether it is inside."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.points, self.segments = [a, b], [(0, False)]
        self.lost = False

    @property
    def open(self) -> int | None:
        """The first segment to be divided; None: there is none."""
        if self.lost:
            return None
        return next((k for k, (_, good) in enumerate(self.segments) if not good), None)

    def divide(self, k: int, anchor: Tensor, good: Sequence[bool], limit: int) -> None:
        """Put an anchor into segment k; ``good``: whether its halves are inside."""
        depth = self.segments[k][0] + 1
        self.points.insert(k + 1, anchor)
        self.segments[k : k + 1] = [(depth, half) for half in good]
        self.lost = depth == limit and not all(good)

    def path(self) -> Path:
        points = None if self.lost else torch.stack(self.points).cpu()
        return Path(points, max(depth for depth, _ in self.segments))


def _anchors(classifier: Classifier, a: Tensor, b: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Middles of segments, carried into the regions of their labels, and which of them got there."""
    middle = (a + b) / 2
    points, reached = onto_region(classifier, middle, labels)
    ahead = points + AHEAD * (points - middle)
    kept = labels_of(classifier, ahead) == labels
    return torch.where(kept.view(-1, 1, 1, 1), ahead, points), reached


def find_paths(
    classifier: Classifier,
    a: Tensor,
    b: Tensor,
    *,
    labels: Tensor | None = None,
    spacing: float = 1e-4,
    depth: int = DEPTH,
    advance: Callable[[int], None] | None = None,
) -> list[Path]:
    """Join each pair of points by a polyline inside the region of their common label.

    Args:
        classifier: the model.
        a: one end of each path, float32 (B,C,H,W).
        b: the other; the same label as ``a``, row by row.
        labels: of the regions, int64 (B,), where they are known: an end on a tie gets one label or the other
            by the rounding of its batch. None: those predicted.
        spacing: of the samples that decide whether a segment is inside, as a share of ||a - b||.
        depth: halvings at most.
        advance: told of pairs that are done.

    Raises:
        ValueError: the ends of a pair have different labels, or ``spacing`` is not positive.

    Guarantees:
        Every anchor of a path has the label, and so have samples on all its segments, no farther apart than
        ``spacing`` says; a path from b to a has the same anchors, up to rounding.
    """
    if not spacing > 0:
        raise ValueError(f"spacing {spacing}: must be positive")
    a, b = a.to(classifier.device), b.to(classifier.device)
    if labels is None:
        labels = labels_of(classifier, a)
        if not torch.equal(labels, labels_of(classifier, b)):
            raise ValueError("the ends of a path must have the same label")
    labels = labels.to(a.device)
    gap = spacing * (b - a).flatten(1).double().norm(dim=1).clamp_min(1e-30)
    searches = [_Search(*ends) for ends in zip(a, b, strict=True)]
    for search, good in zip(searches, inside(classifier, a, b, labels, gap).tolist(), strict=True):
        search.segments = [(0, good)]
        search.lost = not good and depth < 1
    told = 0
    while True:
        living = [(row, k) for row, s in enumerate(searches) if (k := s.open) is not None]
        if advance is not None:
            advance(len(searches) - len(living) - told)
        told = len(searches) - len(living)
        if not living:
            return [search.path() for search in searches]
        rows = torch.tensor([row for row, _ in living], device=a.device)
        left, right = (torch.stack([searches[row].points[k + i] for row, k in living]) for i in (0, 1))
        anchor, reached = _anchors(classifier, left, right, labels[rows])
        halves = inside(
            classifier,
            torch.cat((left, anchor)),
            torch.cat((anchor, right)),
            labels[rows].repeat(2),
            gap[rows].repeat(2),
        ).view(2, -1)
        for i, (row, k) in enumerate(living):
            searches[row].divide(k, anchor[i], halves[:, i].tolist(), depth)
            searches[row].lost |= not reached[i]
