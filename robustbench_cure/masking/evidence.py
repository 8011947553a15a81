"""The attack runs that the checks look at, each made once, and the settings they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from robustbench_cure.attacks import Noise, Proposal, fgsm, pgd, spsa, uniform_noise
from robustbench_cure.attacks.losses import margins
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.judge import judge
from robustbench_cure.threat import ThreatModel


@dataclass(frozen=True)
class Settings:
    """How much work the checks do.

    Attributes:
        steps: of the PGD that is under suspicion; the check of steps goes to four times as many.
        spsa_steps: Adam steps of SPSA.
        spsa_samples: directions for each of its estimates.
        draws: points of random noise.
        restarts: of the check of restarts.
        queries: of the Square attack.
        seed: of everything random.
    """

    steps: int = 100
    spsa_steps: int = 20
    spsa_samples: int = 64
    draws: int = 50
    restarts: int = 5
    queries: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """Where an attack ended, for every image that is classified correctly.

    Attributes:
        x_adv: what it proposed.
        margin: J there in the reference form, float32 (m,); that of the image where the proposal was refused.
        broken: judged, bool (m,).
    """

    x_adv: Tensor
    margin: Tensor
    broken: Tensor


class Evidence:
    """Images classified correctly, and what attacks did to them.

    Args:
        classifier: the model.
        data: images; those misclassified are left out.
        threat: ball.
        settings: how much work is done.
        announce: told what is being done.

    Attributes:
        x, y: images and labels of the m rows that are left.
        ids: their names.
    """

    def __init__(
        self,
        classifier: Classifier,
        data: EvalSet,
        threat: ThreatModel,
        settings: Settings,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.classifier, self.threat, self.settings, self.announce = classifier, threat, settings, announce
        x, y = data.images.to(classifier.device), data.labels.to(classifier.device)
        logits = classifier.logits(x)
        right = (logits.argmax(1) == y).nonzero().squeeze(1)
        self.total = len(data)
        self.x, self.y = x[right], y[right]
        self.ids = tuple(data.ids[row] for row in right.tolist())
        self.clean_margin = margins(logits, y)[right]

    def __len__(self) -> int:
        return len(self.ids)

    def noise(self, name: str) -> Noise:
        """Random streams of the rows for one purpose."""
        return Noise.for_samples(self.settings.seed, name, list(self.ids), self.x.device)

    def outcome(
        self, proposal: Proposal, threat: ThreatModel | None = None, *, rows: Tensor | None = None
    ) -> Outcome:
        """Judge a proposal for all rows, or for some."""
        x = self.x if rows is None else self.x[rows]
        y = self.y if rows is None else self.y[rows]
        clean = self.clean_margin if rows is None else self.clean_margin[rows]
        verdict = judge(self.classifier, x, y, proposal, threat or self.threat)
        margin = verdict.margin.to(x.device)
        return Outcome(
            proposal.x_adv, torch.where(margin.isfinite(), margin, clean), verdict.broken.to(x.device)
        )

    def run_pgd(
        self,
        *,
        steps: int,
        loss: str,
        step: float = 0.25,
        restarts: int = 1,
        threat: ThreatModel | None = None,
        name: str = "pgd",
    ) -> Outcome:
        """PGD that goes on to its end; ``step`` is a share of the radius."""
        ball = threat or self.threat
        self.announce(f"PGD({steps}), {loss}")
        proposal = pgd(
            self.classifier,
            self.x,
            self.y,
            threat=ball,
            noise=self.noise(name),
            steps=steps,
            step_size=step * ball.radius,
            restarts=restarts,
            loss=loss,
            stop="never" if restarts == 1 else "first-success",
        )
        return self.outcome(proposal, ball)

    @cached_property
    def fgsm(self) -> Outcome:
        """FGSM."""
        self.announce("FGSM")
        return self.outcome(fgsm(self.classifier, self.x, self.y, threat=self.threat))

    @cached_property
    def pgd_ce(self) -> Outcome:
        """PGD on cross-entropy, to its end."""
        return self.run_pgd(steps=self.settings.steps, loss="ce")

    @cached_property
    def pgd_margin(self) -> Outcome:
        """PGD on the margin, to its end."""
        return self.run_pgd(steps=self.settings.steps, loss="margin")

    @cached_property
    def white_box_margin(self) -> Tensor:
        """The lower of the margins the two PGD runs ended with, (m,)."""
        return torch.minimum(self.pgd_ce.margin, self.pgd_margin.margin)

    @cached_property
    def white_box_broken(self) -> Tensor:
        """Rows that FGSM or one of the PGD runs broke, bool (m,)."""
        return self.fgsm.broken | self.pgd_ce.broken | self.pgd_margin.broken

    @cached_property
    def spsa(self) -> Outcome:
        """SPSA, to its end."""
        self.announce("SPSA")
        steps = self.settings.spsa_steps
        return self.outcome(
            spsa(
                self.classifier,
                self.x,
                self.y,
                threat=self.threat,
                noise=self.noise("spsa"),
                steps=steps,
                samples=self.settings.spsa_samples,
                # Four times the radius in all: Adam's steps are about its learning rate long.
                step_size=4 * self.threat.radius / steps,
                delta=0.01,
                stop="never",
            )
        )

    @cached_property
    def random(self) -> Outcome:
        """The worst of many random points of the ball."""
        self.announce("random noise")
        return self.outcome(
            uniform_noise(
                self.classifier,
                self.x,
                self.y,
                threat=self.threat,
                noise=self.noise("uniform_noise"),
                draws=self.settings.draws,
            )
        )
