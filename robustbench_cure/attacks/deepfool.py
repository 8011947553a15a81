"""DeepFool for l2 and linf, batched, to the nearest boundary or inside a ball.

Source: Moosavi-Dezfooli, Fawzi & Frossard 2016, arXiv 1511.04599; thesis, algorithm 2 and Eq. 3.11-3.14.

At x + (1 + overshoot) r, linearise every logit difference f_k - f_y, take the class whose boundary is
nearest, |f_k| / ||w_k||_q (q dual to the norm), and add the shortest step that reaches it:

    l2:    r += |f_l| / ||w_l||_2^2 * w_l            linf:  r += |f_l| / ||w_l||_1 * sign(w_l)

Gaps and labels are those of the reference form, and slopes are taken in float32: with those of bfloat16 a
path ends elsewhere, and samples stand that float32 breaks.
``mode = "minimal"`` runs until the label changes: its product is a distance. ``mode = "bounded"`` cuts
the overshot vector to the ball after every step (the form of the CURE paper's Table 1, whose caption
constrains the perturbations) and needs only a verdict. With a ``basis`` the slopes are projected onto its
span, and so is the perturbation (thesis, algorithm 3).

Deviations. (1) The label is tested, and the model linearised, at the overshot point, as the authors' own
code does: on an affine model the algorithm as printed stops exactly on the boundary. (2) No absolute
constant is added to a step. (3) Pixels that cannot move, because box or linf ball end there, take no part
in the linearisation. Otherwise every step covers only their complement's share of the way, and iterates
creep up to the boundary without ever crossing it: on digits most pixels are 0. (4) Inside a ball, a row
whose margin has not fallen for `PATIENCE` iterations is given up. (5) No step is shorter than a thousandth
of the way made so far, nor than what float32 pixels resolve, so that rounding cannot hold a row on the
boundary, also where logits tie.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustbench_cure.attacks.inputs import check_inputs
from robustbench_cure.attacks.losses import margins, misclassified
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.pool import Pool
from robustbench_cure.attacks.proposal import Proposal
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import Norm, ThreatModel, distance

#: Below this dual norm a linearised boundary is out of reach, and a step in that direction unstable.
FLAT = 1e-12
#: Iterations without a lower margin after which a row inside the ball is given up: it goes in circles
#: between the boundaries of classes that the ball does not reach.
PATIENCE = 6
#: A step is at least this share of the way made so far: on the boundary itself gaps are lost in rounding.
LEAST = 1e-3
#: Nor is it shorter than this in every pixel, four units of float32's last place at 1: it would be lost.
FINEST = 2.0**-21


@torch.inference_mode(False)  # where gradients are zero
def deepfool(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    noise: Noise | None = None,
    mode: Literal["bounded", "minimal"] = "minimal",
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
    clip: bool = True,
    basis: Tensor | None = None,
) -> Proposal:
    """Perturb each image towards the nearest linearised boundary until its label changes.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: labels to leave, int64 (B,): the predicted ones for distances, the true ones for accuracy.
        threat: its norm decides the steps; its radius bounds them in mode ``bounded`` only.
        noise: unused; every attack takes it.
        mode: ``minimal`` (nearest boundary) or ``bounded`` (inside the ball).
        steps: iterations at most.
        overshoot: the perturbation is lengthened by this share to cross the boundary.
        candidates: classes considered, the highest-ranked at x including the label's own.
        clip: keep iterates in [0, 1]; off for geometry, where r must stay normal to the boundary.
        basis: orthonormal vectors whose span each perturbation lies in, float32 (B, m, C, H, W), or
            (1, m, C, H, W) for all rows; only ``minimal``, in l2 and without ``clip``: box and ball cut
            a perturbation out of the span.

    Returns:
        A proposal; ``converged`` says whether the reference form changed its label at ``x_adv``
        (``bounded`` proposals lie in ball and box, ``minimal`` ones anywhere, in the box if ``clip``).
        Rows already past the boundary are returned as they are, with zero steps.

    Raises:
        ValueError: fewer than two ``candidates``: none would be another class; a ``basis`` where a
            perturbation would not stay in its span, or of another shape.
    """
    check_inputs(classifier, x, y, box=clip or mode == "bounded")
    del noise
    if candidates < 2:
        raise ValueError(f"candidates {candidates}: the label's own and at least one other")
    if basis is not None:
        if mode != "minimal" or threat.norm != "l2" or clip:
            raise ValueError("a basis needs mode 'minimal', the l2 norm and clip=False")
        if basis.dim() != 5 or len(basis) not in (1, len(x)) or basis.shape[2:] != x.shape[1:]:
            raise ValueError(f"basis of shape {tuple(basis.shape)} for images of shape {tuple(x.shape)}")
    search = _Search(classifier, x, y, threat, mode == "bounded", overshoot, candidates, clip, basis)
    pool = Pool(len(x), classifier.batch_size, x.device)
    with classifier.in_float32():
        for rows in pool:
            pool.retire(search.visit(rows, steps))
    return search.proposal


class _Search:
    """State of one call of `deepfool`, for all rows of the shard."""

    def __init__(
        self,
        classifier: Classifier,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        bounded: bool,
        overshoot: float,
        candidates: int,
        clip: bool,
        basis: Tensor | None,
    ) -> None:
        self.classifier, self.x, self.y, self.threat = classifier, x, y, threat
        self.bounded, self.overshoot, self.clip, self.basis = bounded, overshoot, clip, basis
        self.proposal = Proposal.start(x)
        self.proposal.converged = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.lowest = x.new_full((len(x),), torch.inf)  # margin so far
        self.stalled = torch.zeros(
            len(x), dtype=torch.int64, device=x.device
        )  # iterations without a lower one
        self.logits = x.new_zeros((len(x), classifier.num_classes))  # of the reference form, at x_adv
        self.finest = FINEST * (x[0].numel() ** 0.5 if threat.norm == "l2" else 1.0) if len(x) else 0.0
        self.others = min(candidates, classifier.num_classes) - 1
        self.classes = torch.zeros((len(x), self.others), dtype=torch.int64, device=x.device)

    def visit(self, rows: Tensor, steps: int) -> Tensor:
        """One iteration of each row; returns the rows that are done."""
        fresh = self.proposal.steps[rows] == 0
        done = torch.zeros_like(fresh)
        done[fresh] = self._enter(rows[fresh])
        going = rows[~done]
        if len(going) == 0:
            return rows
        here, labels, classes = self.proposal.x_adv[going], self.y[going], self.classes[going]
        slopes = self._within(going, self.classifier.value_and_jacobian(here, labels, classes)[1])
        self.proposal.forwards[going] += 1
        self.proposal.backwards[going] += self.others

        # Gaps of the reference form: close to a boundary reduced precision sees ties, and would stop there.
        logits = self.logits[going]
        gaps = logits.gather(1, classes) - logits.gather(1, labels[:, None])
        least = (LEAST * distance(self.threat.norm, self.x[going], here)).clamp_min(self.finest)
        free = self._free(self.x[going], here, slopes)
        step = nearest_boundary_step(self.threat.norm, gaps, free, least)
        # here is x + (1 + overshoot) r, or what ball and box let through of it.
        ahead = self._feasible(self.x[going], here + (1.0 + self.overshoot) * step)
        moving = (ahead != here).flatten(1).any(1)
        moved = going[moving]
        self.proposal.x_adv[moved] = ahead[moving]
        self.proposal.steps[moved] += 1
        # Looking before linearising again spares a crossed row all its backward passes.
        crossed = self._cross(moved, self._look(moved))
        ended = crossed | (self.proposal.steps[moved] >= steps)
        if self.bounded:
            ended |= self.stalled[moved] >= PATIENCE
        return torch.cat((rows[done], going[~moving], moved[ended]))

    def _enter(self, fresh: Tensor) -> Tensor:
        """Choose the candidate classes of rows at x; returns which are past the boundary already."""
        if len(fresh) == 0:
            return torch.zeros_like(fresh, dtype=torch.bool)
        logits = self._look(fresh)
        others = logits.scatter(1, self.y[fresh, None], -torch.inf)
        self.classes[fresh] = others.topk(self.others, dim=1).indices
        return self._cross(fresh, logits)

    def _look(self, rows: Tensor) -> Tensor:
        self.proposal.forwards[rows] += 1
        self.logits[rows] = self.classifier.logits(self.proposal.x_adv[rows])
        return self.logits[rows]

    def _cross(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Mark and return the rows whose label the reference form has changed."""
        margin = margins(logits, self.y[rows])
        lower = margin < self.lowest[rows]
        self.lowest[rows] = torch.where(lower, margin, self.lowest[rows])
        self.stalled[rows] = torch.where(lower, 0, self.stalled[rows] + 1)
        crossed = misclassified(logits, self.y[rows])
        assert self.proposal.converged is not None  # noqa: S101 - set in __init__
        self.proposal.converged[rows] = crossed
        return crossed

    def _within(self, rows: Tensor, slopes: Tensor) -> Tensor:
        """The slopes, (B, k, C, H, W), projected onto the span of the basis."""
        if self.basis is None:
            return slopes
        basis = (self.basis if len(self.basis) == 1 else self.basis[rows]).flatten(2)
        return (slopes.flatten(2) @ basis.transpose(1, 2) @ basis).view_as(slopes)

    def _free(self, x: Tensor, here: Tensor, slopes: Tensor) -> Tensor:
        """The slopes, (B, m, C, H, W), with zeros where the way up leads out of the box or the linf ball."""
        low, high = torch.zeros_like(x), torch.ones_like(x)
        if self.bounded and self.threat.norm == "linf":
            low, high = self.threat.project(x, low), self.threat.project(x, high)
        elif not (self.bounded or self.clip):
            return slopes
        blocked = torch.where(slopes > 0, (here >= high)[:, None], (here <= low)[:, None])
        return slopes.masked_fill(blocked, 0.0)

    def _feasible(self, x: Tensor, ahead: Tensor) -> Tensor:
        if self.bounded:
            return self.threat.project(x, ahead)
        return ahead.clamp(0.0, 1.0) if self.clip else ahead


def nearest_boundary_step(norm: Norm, gaps: Tensor, slopes: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """Shortest step onto the nearest of m linearised boundaries (thesis, Eq. 3.11-3.14).

    Args:
        norm: in which the step is shortest.
        gaps: f_k - f_y at the point, (B, m).
        slopes: their gradients, (B, m, C, H, W).
        least: length that a step has at least, (B,) or one for all; it then leads past the boundary.

    Returns:
        The step, (B,C,H,W): ||step|| = |gap| / ||slope||_dual and slope . step = |gap| for the class
        of least ||step||; zero where every slope is flat.
    """
    flat = slopes.flatten(2)
    dual = flat.abs().sum(2) if norm == "linf" else flat.norm(dim=2)
    lengths = torch.where(dual > FLAT, gaps.abs() / dual.clamp_min(FLAT), torch.inf)
    length, nearest = lengths.min(1)
    picked = torch.arange(len(gaps), device=gaps.device)
    slope, size = slopes[picked, nearest], dual[picked, nearest].clamp_min(FLAT)
    direction = slope.sign() if norm == "linf" else slope / size.view(-1, 1, 1, 1)
    least = torch.as_tensor(least, dtype=length.dtype, device=length.device)
    length = torch.where(length.isfinite(), torch.maximum(length, least), torch.zeros_like(length))
    return length.view(-1, 1, 1, 1) * direction
