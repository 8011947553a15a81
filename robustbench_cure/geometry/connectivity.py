"""Are classification regions connected? A path between two points of one region, inside it.

Source: thesis, section 7.3, algorithm 5, figure 7.2. Two points with the same label are joined by a
polyline that never leaves the region of that label:

    path(a, b):  m = (a + b) / 2, moved into the region where it lies outside
                 a-m and m-b inside: done; otherwise path(a, m) and path(m, b)

A segment is inside if all its sampled convex combinations have the label. D, the length of the path over the
distance of its ends, is 1 for a segment. That no path results proves nothing; a path says that its samples
lie in the region, not what is between them. Points are not cut to [0, 1].

Deviations. (1) The segment between the ends is tried first, as in the text. (2) Only the half that is not
inside is divided further, at most `DEPTH` times. (3) Samples are taken from coarse to fine, and a segment
is dropped at the first one outside: the result is that of all samples. (4) An anchor is moved on into the
region as far again as it was moved to get there. On the boundary itself, or a fiftieth
beyond it, anchors lie closer to it than the next chord cuts into it wherever the boundary bends away, and
bisection ends only where samples no longer resolve it: after hundreds of anchors, or not at all. Half as far
is not enough for some ends that lie on such a boundary themselves. D - 1 grows by a factor of 4 at most.

Pairs of points: one end is an image, and its predicted label names the region. The other end is

    image      another image with the same label
    carried    an image with another label, moved into the region by its smallest targeted perturbation
    random     a point drawn evenly from the sphere around the origin (black) whose radius is the mean norm of
               the images, moved likewise
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
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry.convexity import labels_of, same_class_images

#: Bisections of the segment between the ends, at most.
DEPTH = 12
#: How far an anchor is moved on into the region, as a share of its move, if the label stays the same.
AHEAD = 1.0
#: Samples of each segment in the first pass; twice as many in every further one.
FIRST_SAMPLES = 4
#: Shortest step of a projection, l2 in pixels: leads off a boundary that a point lies on exactly.
TINY = 1e-6
#: Where the other end of a pair comes from.
SCENARIOS = ("image", "carried", "random")


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
    active_set = ActiveSet(len(x), classifier.batch_size, x.device)
    for rows in active_set:
        aim = target[rows, None]

        def lead(logits: Tensor, aim: Tensor = aim) -> Tensor:
            return (logits.gather(1, aim) - logits.scatter(1, aim, -torch.inf).amax(1, True)).squeeze(1)

        logits, slope = classifier.value_and_gradient(here[rows], lead, reference=True)
        reached[rows] = logits.argmax(1) == target[rows]
        size = slope.flatten(1).norm(dim=1)
        moved = (here[rows] - x[rows]).flatten(1).norm(dim=1)
        # On the boundary itself gaps are lost in rounding: no step is a tiny part of the move so far.
        length = torch.maximum(-lead(logits) / size.clamp_min(FLAT), LEAST * moved).clamp_min(TINY)
        active = ~reached[rows] & (size > FLAT) & (taken[rows] < steps)
        step = ((1 + overshoot) * length / size.clamp_min(FLAT)).view(-1, 1, 1, 1) * slope
        here[rows[active]] += step[active]
        taken[rows] += 1
        active_set.drop(rows[~active])
    return here, reached


def inside(classifier: Classifier, a: Tensor, b: Tensor, labels: Tensor, spacing: Tensor) -> Tensor:
    """Whether all samples between a and b have the label, bool (S,) for S segments; ends are not checked.

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
    samples = FIRST_SAMPLES
    while True:
        remaining = [s for s in good.nonzero().flatten().tolist() if done[s] < pieces[s] - 1]
        if not remaining:
            return good
        take = max(1, min(samples, classifier.batch_size // len(remaining)))
        parts = [coarse_to_fine(pieces[s])[done[s] : done[s] + take] for s in remaining]
        segment = torch.cat([torch.full((len(p),), s) for s, p in zip(remaining, parts, strict=True)])
        share = torch.cat([p.double() / pieces[s] for s, p in zip(remaining, parts, strict=True)])
        for s, part in zip(remaining, parts, strict=True):
            done[s] += len(part)
        segment, t = segment.to(a.device), share.float().view(-1, 1, 1, 1).to(a.device)
        for rows, weight in zip(
            torch.split(segment, classifier.batch_size), torch.split(t, classifier.batch_size), strict=True
        ):
            points = (1 - weight) * a[rows] + weight * b[rows]
            good[rows[labels_of(classifier, points) != labels[rows]]] = False
        samples *= 2


@lru_cache(maxsize=64)
def coarse_to_fine(pieces: int) -> Tensor:
    """The numbers 1 to ``pieces`` - 1, each once: halves before quarters before eighths; int64."""
    places = torch.arange(1, pieces)
    finest = places & -places
    return places[torch.sort(finest, descending=True, stable=True).indices]


@dataclass(frozen=True)
class Path:
    """A path between two points of one region, or none.

    Attributes:
        points: the ends and the anchors between them, in order, float32 (m,C,H,W) on the CPU; None: no path.
        depth: levels of bisection, 0 for a segment.
    """

    points: Tensor | None
    depth: int

    @property
    def anchors(self) -> int:
        """Number of points between the two ends of the path; 0 without a path."""
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
    """Middles of segments, moved into the regions of their labels, and which of them arrived."""
    middle = (a + b) / 2
    points, reached = onto_region(classifier, middle, labels)
    deeper = points + AHEAD * (points - middle)
    same = labels_of(classifier, deeper) == labels
    return torch.where(same.view(-1, 1, 1, 1), deeper, points), reached


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
        depth: bisections at most.
        advance: called with the number of pairs that are done.

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
    reported = 0
    while True:
        unfinished = [(row, k) for row, s in enumerate(searches) if (k := s.open) is not None]
        if advance is not None:
            advance(len(searches) - len(unfinished) - reported)
        reported = len(searches) - len(unfinished)
        if not unfinished:
            return [search.path() for search in searches]
        rows = torch.tensor([row for row, _ in unfinished], device=a.device)
        left, right = (torch.stack([searches[row].points[k + i] for row, k in unfinished]) for i in (0, 1))
        anchor, reached = _anchors(classifier, left, right, labels[rows])
        halves = inside(
            classifier,
            torch.cat((left, anchor)),
            torch.cat((anchor, right)),
            labels[rows].repeat(2),
            gap[rows].repeat(2),
        ).view(2, -1)
        for i, (row, k) in enumerate(unfinished):
            searches[row].divide(k, anchor[i], halves[:, i].tolist(), depth)
            searches[row].lost |= not reached[i]


@dataclass(frozen=True)
class Pairs:
    """Ends of paths.

    Attributes:
        rows: of the images, int64 (B, 2) on the CPU; -1 where there is none.
        first: the images, float32 (B,C,H,W) on the classifier's device.
        second: the other ends, moved into the region, shape of ``first``.
        moved: l2 length of that move, in pixels, float32 (B,) on the CPU.
        reached: whether both ends have the same label, bool (B,).
    """

    rows: Tensor
    first: Tensor
    second: Tensor
    moved: Tensor
    reached: Tensor


def draw_pairs(classifier: Classifier, x: Tensor, labels: Tensor, scenario: str, noise: Noise) -> Pairs:
    """A pair for each stream.

    Args:
        classifier: the model.
        x: images, float32 (N,C,H,W).
        labels: predicted for them, int64 (N,).
        scenario: one of `SCENARIOS`.
        noise: a stream for each pair; draws of streams 0 and 1 are used up.

    Raises:
        ValueError: there are no two images with one label, or with two.
    """
    rows = same_class_images(labels, 2, noise) if scenario == "image" else other_class_pairs(labels, noise)
    first, start = x[rows[:, 0]].to(classifier.device), x[rows[:, 1]]
    if scenario == "random":
        draw = noise.normal(tuple(x.shape[1:]), 1)
        radius = x.flatten(1).norm(dim=1).mean()
        start = draw * (radius / draw.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
        rows[:, 1] = -1
    start = start.to(classifier.device)
    second, reached = onto_region(classifier, start, labels.cpu()[rows[:, 0]].to(classifier.device))
    return Pairs(rows, first, second, (second - start).flatten(1).norm(dim=1).cpu(), reached)


def other_class_pairs(labels: Tensor, noise: Noise) -> Tensor:
    """For each stream two images of different regions, int64 (B, 2) on the CPU.

    Arguments as those of `same_class_images`.

    Raises:
        ValueError: all images lie in one region.
    """
    labels = labels.cpu()
    order = noise.uniform((len(labels),), 0)
    first = order.argmax(1)
    other = labels != labels[first][:, None]
    if not bool(other.any()):
        raise ValueError("all images lie in one region")
    return torch.stack((first, torch.where(other, order, -1.0).argmax(1)), 1)
