"""Projected gradient descent, and the ladder of step counts that one trajectory serves.

Source: Madry et al. 2018, arXiv 1706.06083; PGD(K) of the CURE paper, sections 2 and 4.

    x_0 = x + uniform noise of the ball (or x);  x_k = project(x_{k-1} + step_size * steepest(grad loss))

Deviations. (1) ``stop = "first-success"``: a row leaves at its first iterate that the reference form
misclassifies, instead of always returning the last one; that can only be stronger, makes robust
accuracy monotone in steps, and frees the batch. (2) ``stop = "never"``: the iterate of lowest margin is
returned, not the last. (3) PGD(7), PGD(20), ... with equal parameters are prefixes of one trajectory and
are computed together: `pgd_ladder`. (4) A row that stands after a search in bfloat16 is searched once more
in the reference form, from the same starts, where it stands `within_rounding`, or where the two forms'
`margins_differ`, see `to_search_again`: reduced precision shall not raise a number.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustbench_cure.attacks.inputs import check_inputs
from robustbench_cure.attacks.losses import LOSSES, margins, misclassified
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.pool import Pool
from robustbench_cure.attacks.precision import (
    logit_range,
    margins_differ,
    to_search_again,
    within_rounding,
)
from robustbench_cure.attacks.proposal import Proposal
from robustbench_cure.attacks.uniform_noise import draw
from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel

Stop = Literal["first-success", "never"]


@torch.inference_mode(False)  # where gradients are zero
def pgd(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    noise: Noise | None = None,
    steps: int,
    step_size: float,
    random_start: bool = True,
    restarts: int = 1,
    loss: str = "ce",
    stop: Stop = "first-success",
) -> Proposal:
    """PGD with ``steps`` iterations: `pgd_ladder` with one rung; see there."""
    (proposal,) = pgd_ladder(
        classifier,
        x,
        y,
        threat=threat,
        noise=noise,
        rungs=(steps,),
        step_size=step_size,
        random_start=random_start,
        restarts=restarts,
        loss=loss,
        stop=stop,
    )
    return proposal


@torch.inference_mode(False)  # where gradients are zero
def pgd_ladder(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    noise: Noise | None = None,
    rungs: tuple[int, ...],
    step_size: float,
    random_start: bool = True,
    restarts: int = 1,
    loss: str = "ce",
    stop: Stop = "first-success",
) -> list[Proposal]:
    """PGD(K) for every K of ``rungs`` from one trajectory a restart.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W) in [0, 1]; not modified.
        y: true labels, int64 (B,).
        threat: norm and eps, in units of x.
        noise: random streams of the rows; default: rows numbered from 0 under seed 0.
        rungs: step counts, strictly increasing.
        step_size: length of one step in the norm of the ball, in units of x.
        random_start: start at a uniform point of the ball instead of at x.
        restarts: independent starts; a row goes on to the next while some rung is unbroken.
        loss: ``ce``, ``margin`` or ``dlr``.
        stop: ``first-success`` or ``never``, see the module.

    Returns:
        One proposal a rung, each inside the ball and the box. A rung that was not broken gets the
        iterate of lowest margin among those that its restarts ended with (``never``: passed through).
    """
    check_inputs(classifier, x, y)
    search = _Ladder(classifier, x, y, threat, noise, rungs, step_size, random_start, restarts, loss, stop)
    return search.run()


class _Ladder:
    """State of one call of `pgd_ladder`, for all rows of the shard."""

    def __init__(
        self,
        classifier: Classifier,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        noise: Noise | None,
        rungs: tuple[int, ...],
        step_size: float,
        random_start: bool,
        restarts: int,
        loss: str,
        stop: Stop,
    ) -> None:
        if list(rungs) != sorted(set(rungs)) or not rungs or rungs[0] < 1:
            raise ValueError(f"rungs must be positive and strictly increasing, got {rungs}")
        self.classifier, self.x, self.y, self.threat = classifier, x, y, threat
        self.noise = noise or Noise.for_rows(len(x), device=x.device)
        self.rungs, self.step_size, self.random_start = rungs, step_size, random_start
        self.restarts, self.loss, self.stop = restarts if random_start else 1, LOSSES[loss], stop
        self.proposals = [Proposal.start(x) for _ in rungs]
        n, device = len(x), x.device
        self.best = torch.full(
            (len(rungs), n), torch.inf, dtype=torch.float32, device=device
        )  # margin of each proposal
        self.broken = torch.zeros((len(rungs), n), dtype=torch.bool, device=device)
        self.current = x.clone()
        self.taken = torch.zeros(n, dtype=torch.int64, device=device)  # steps of the current restart
        self.restart = torch.zeros_like(self.taken)
        self.by_a_hair = torch.zeros_like(self.broken)  # proposals whose verdict a rounding may decide
        self.wanted = torch.ones_like(self.broken)  # rungs worked for
        #: The largest of them not broken yet: where a restart ends.
        self.horizon = torch.full_like(self.taken, rungs[-1])
        self.reference = False  # form whose gradients are followed

    def run(self) -> list[Proposal]:
        self._search(torch.arange(len(self.x), device=self.x.device))
        if self.classifier.precision == "bf16" and len(self.x):
            self._look_again()
        return self.proposals

    def _search(self, chosen: Tensor) -> None:
        """Every restart of the chosen rows."""
        for rows in torch.split(chosen, self.classifier.batch_size):
            self._begin(rows)
        pool = Pool(len(self.x), self.classifier.batch_size, self.x.device, among=chosen)
        for rows in pool:
            pool.retire(self._visit(rows))

    def _look_again(self) -> None:
        """Search rows that bfloat16 may have let stand once more, with gradients of the reference form."""
        scale = logit_range(self.classifier.logits(self.x))
        wanted = self.by_a_hair.clone()
        for index, proposal in enumerate(self.proposals):
            differ = torch.zeros_like(self.broken[index])
            stand = ~self.broken[index]
            for rows in torch.split(stand.nonzero().squeeze(1), self.classifier.batch_size):
                here, labels = proposal.x_adv[rows], self.y[rows]
                exact, searched = self.classifier.logits(here), self.classifier.search_logits(here)
                differ[rows] = margins_differ(searched, exact, labels, scale[rows])
                stand[rows] = ~misclassified(exact, labels)
                self.best[index, rows] = margins(exact, labels)
            proposal.forwards += 1 + 2 * ~self.broken[index]
            proposal.searched_again = to_search_again(differ, stand)
            wanted[index] |= proposal.searched_again
        self.reference = True
        # More steps are never weaker: what is searched again for a rung is so for those above, not below.
        self.wanted = (wanted & ~self.broken).cumsum(0) > 0
        chosen = self.wanted.any(0).nonzero().squeeze(1)
        self._aim(chosen)
        self.restart[chosen] = 0
        self._search(chosen)

    def _aim(self, rows: Tensor) -> None:
        """Set where restarts of these rows end; 0: nowhere, they need no further work."""
        ladder = torch.tensor(self.rungs, device=rows.device)[:, None]
        self.horizon[rows] = (ladder * (self.wanted & ~self.broken)[:, rows]).amax(0)

    def _begin(self, rows: Tensor) -> None:
        """Put rows at the start of their current restart."""
        self.taken[rows] = 0
        start = self.x[rows]
        if self.random_start and len(rows):
            start = draw(start, self.threat, self.noise[rows], self.restart[rows])
        self.current[rows] = start

    def _visit(self, rows: Tensor) -> Tensor:
        """One step of each row; returns the rows that are done for good."""
        labels, here = self.y[rows], self.current[rows]
        logits, gradient = self.classifier.value_and_gradient(
            here, lambda z: self.loss(z, labels), reference=self.reference
        )
        self._count(rows, backward=True)
        self._judge(rows, here, logits)
        ahead = rows[self.taken[rows] < self.horizon[rows]]
        moved = self.threat.project(self.x[rows], here + self.step_size * self.threat.steepest(gradient))
        self.current[rows] = moved
        self.taken[rows] += 1
        self._land(ahead)
        ended = rows[self.taken[rows] >= self.horizon[rows]]
        self.restart[ended] += 1
        over = (self.restart[ended] >= self.restarts) | (self.horizon[ended] == 0)
        self._begin(ended[~over])
        return ended[over]

    def _judge(self, rows: Tensor, here: Tensor, logits: Tensor) -> None:
        """Take note of iterates that a forward pass has just seen for free."""
        if self.stop == "never":
            self._offer(rows, here, logits)
            return
        hit = misclassified(logits, self.y[rows])
        if bool(hit.any()):
            self._verify(rows[hit], here[hit])

    def _land(self, rows: Tensor) -> None:
        """Rows that have just reached a rung: their iterate is that rung's proposal."""
        # Where nothing follows, the evaluator's is the only look that is needed.
        last_word = (
            self.stop == "first-success" and self.restarts == 1 and self.classifier.precision == "fp32"
        )
        for index, rung in enumerate(self.rungs):
            arrived = rows[(self.taken[rows] == rung) & self._open(index, rows)]
            if len(arrived) == 0:
                continue
            here = self.current[arrived]
            if last_word and rung == self.rungs[-1]:
                self._propose(index, arrived, here)
            else:
                # In the reference form, so that a rung inside the ladder is judged as it would be alone.
                logits = self.classifier.logits(here)
                self._count(arrived)
                if self.stop == "first-success":
                    hit = misclassified(logits, self.y[arrived])
                    self._break(arrived[hit], here[hit])
                self._offer(arrived, here, logits, only=index)

    def _verify(self, rows: Tensor, here: Tensor) -> None:
        hit = misclassified(self.classifier.logits(here), self.y[rows])
        self._count(rows)
        self._break(rows[hit], here[hit])

    def _break(self, rows: Tensor, here: Tensor) -> None:
        """Adversarial iterates: proposals of every rung at or above, which need no further work."""
        if len(rows) == 0:
            return
        for index, rung in enumerate(self.rungs):
            reached = (self.taken[rows] <= rung) & self._open(index, rows)
            self._propose(index, rows[reached], here[reached])
            self.broken[index, rows[reached]] = True
        self._aim(rows)

    def _offer(self, rows: Tensor, here: Tensor, logits: Tensor, only: int | None = None) -> None:
        """Keep an iterate where its margin is the lowest of its rung (or of every rung) so far."""
        margin = margins(logits, self.y[rows])
        close = within_rounding(margin, logits)
        for index, rung in enumerate(self.rungs):
            if only is not None and index != only:
                continue
            open_ = (self.taken[rows] <= rung) & self._open(index, rows)
            better = open_ & (margin < self.best[index, rows])
            self.best[index, rows[better]] = margin[better]
            self.by_a_hair[index, rows[better]] = close[better]
            self._propose(index, rows[better], here[better])

    def _open(self, index: int, rows: Tensor) -> Tensor:
        """Rows that a rung still works for, bool (B,)."""
        return self.wanted[index, rows] & ~self.broken[index, rows]

    def _propose(self, index: int, rows: Tensor, here: Tensor) -> None:
        self.proposals[index].x_adv[rows] = here
        self.proposals[index].steps[rows] = self.taken[rows]

    def _count(self, rows: Tensor, *, backward: bool = False) -> None:
        """Charge a pass to every rung that the row is still working for."""
        for index, rung in enumerate(self.rungs):
            needed = self.taken[rows] < rung if backward else self.taken[rows] <= rung
            working = rows[needed & self._open(index, rows)]
            self.proposals[index].forwards[working] += 1
            self.proposals[index].backwards[working] += int(backward)
