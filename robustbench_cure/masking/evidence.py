"""The attack runs that the checks look at: each is made once, kept, and judged like any other attack."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from robustbench_cure.attacks import Noise, Proposal, fgsm, pgd, pgd_ladder, spsa, uniform_noise
from robustbench_cure.attacks.losses import margins, misclassified
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.evaluation.verify import judge
from robustbench_cure.files import Cache
from robustbench_cure.interop.square import square
from robustbench_cure.masking.work import Progress, Work, unheard
from robustbench_cure.threat import ThreatModel

#: Multiples of the steps under suspicion that one trajectory is looked at.
MULTIPLES = (Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4))
#: Multiples of the radius under suspicion that are tried; 0: the ball which holds every image.
RADII = (2, 4, 0)
#: Lengths of a PGD step that are tried beside a quarter of the radius, as shares of it.
STEP_LENGTHS = (0.05, 1.0)


@dataclass(frozen=True)
class Settings:
    """How much work the checks do.

    Attributes:
        steps: of the PGD that is under suspicion, even; the check of steps goes to four times as many.
        spsa_steps: Adam steps of SPSA.
        spsa_samples: directions for each of its estimates.
        draws: points of random noise.
        restarts: of the check of restarts.
        queries: of the Square attack.
        planted: images around which an adversarial example is planted.
        seed: of everything random.
    """

    steps: int = 100
    spsa_steps: int = 20
    spsa_samples: int = 64
    draws: int = 50
    restarts: int = 5
    queries: int = 500
    planted: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """Where an attack ended, for every image that is classified correctly.

    Attributes:
        margin: J there in the reference form, float32 (m,); that of the image where the proposal was refused.
        broken: judged, bool (m,).
        searched: J there in the form that attacks search with, float32 (m,).
    """

    margin: Tensor
    broken: Tensor
    searched: Tensor


class Evidence:
    """Images classified correctly, and what attacks did to them.

    Args:
        classifier: the model.
        data: images; those misclassified are left out.
        threat: ball.
        settings: how much work is done.
        progress: told how many passes are done, of how many, and what comes next.
        kept: outcomes of an interrupted diagnosis, gone on with; None: start afresh and keep nothing.
        surrogate: another model, whose adversarial examples are tried.

    Attributes:
        x, y: images and labels of the m rows that are left.
        ids: their names.
        total: images in all: the denominator of accuracies.
        clean_margin: J of the images, float32 (m,).
    """

    def __init__(
        self,
        classifier: Classifier,
        data: EvalSet,
        threat: ThreatModel,
        settings: Settings,
        *,
        progress: Progress = unheard,
        kept: Cache | None = None,
        surrogate: Classifier | None = None,
    ) -> None:
        self.classifier, self.threat, self.settings, self.surrogate = classifier, threat, settings, surrogate
        self.kept = kept
        x, y = data.images.to(classifier.device), data.labels.to(classifier.device)
        logits = classifier.logits(x)
        right = (~misclassified(logits, y)).nonzero().squeeze(1)
        self.total = len(data)
        self.x, self.y = x[right], y[right]
        self.ids = tuple(data.ids[row] for row in right.tolist())
        self.clean_margin = margins(logits, y)[right]
        self.outcomes: dict[str, Outcome] = {}
        each = plan(settings)
        planned = {name: passes * len(self) for name, passes in each.items()}
        if surrogate is None:
            del planned["transferred"]
        planned["control"] = min(settings.planted, len(self)) * (each["spsa"] + each["square"])
        self.work = Work(planned, classifier, progress)

    def __len__(self) -> int:
        return len(self.ids)

    # --- attacks ------------------------------------------------------------------------------------------

    @property
    def fgsm(self) -> Outcome:
        """FGSM."""
        return self._made("fgsm", lambda: fgsm(self.classifier, self.x, self.y, threat=self.threat))

    @property
    def pgd_ce(self) -> Outcome:
        """PGD on cross-entropy; the iterate of lowest margin."""
        return self._made("pgd_ce", lambda: self._pgd("ce", stop="never"))

    @property
    def pgd_stopped(self) -> Outcome:
        """The same trajectory, stopped at the first iterate that is verified to be adversarial."""
        return self._made("pgd_stopped", lambda: self._pgd("ce", stop="first-success"))

    def pgd_margin(self, multiple: Fraction = MULTIPLES[1]) -> Outcome:
        """PGD on the margin after a multiple of the steps; one trajectory serves all multiples."""
        names = {m: f"pgd_margin_x{float(m):g}" for m in MULTIPLES}
        if names[multiple] not in self.outcomes:
            self._make({names[m]: self.threat for m in MULTIPLES}, "pgd_margin", self._ladder)
        return self.outcomes[names[multiple]]

    @property
    def restarted(self) -> Outcome:
        """PGD on the margin from several starts."""
        return self._made(
            "restarted",
            lambda: self._pgd("margin", stop="first-success", restarts=self.settings.restarts),
        )

    def stepped(self, step: float) -> Outcome:
        """PGD on the margin with steps of another length, a share of the radius."""
        return self._made(f"stepped_{step:g}", lambda: self._pgd("margin", stop="first-success", step=step))

    def at_radius(self, multiple: int) -> Outcome:
        """PGD on the margin in a larger ball; 0: the one that holds every image."""
        ball = wider(self.threat, multiple, self.x.shape[1:].numel())
        step = 0.05 if multiple == 0 else 0.25
        return self._made(
            f"radius_{multiple}",
            lambda: self._pgd("margin", stop="first-success", step=step, threat=ball),
            ball,
        )

    @property
    def spsa(self) -> Outcome:
        """SPSA; the iterate of lowest margin."""
        steps = self.settings.spsa_steps
        return self._made(
            "spsa",
            lambda: spsa(
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
            ),
        )

    @property
    def square(self) -> Outcome:
        """The Square attack."""
        s = self.settings
        return self._made(
            "square",
            lambda: square(
                self.classifier, self.x, self.y, threat=self.threat, queries=s.queries, seed=s.seed
            ),
        )

    @property
    def random(self) -> Outcome:
        """The worst of many random points of the ball."""
        return self._made(
            "random",
            lambda: uniform_noise(
                self.classifier,
                self.x,
                self.y,
                threat=self.threat,
                noise=self.noise("uniform_noise"),
                draws=self.settings.draws,
            ),
        )

    @property
    def transferred(self) -> Outcome:
        """PGD on the margin of the surrogate, judged on the model."""
        if self.surrogate is None:
            raise ValueError("there is no surrogate")
        other = self.surrogate
        return self._made("transferred", lambda: self._pgd("margin", stop="never", attacked=other))

    @property
    def white_box_margin(self) -> Tensor:
        """The lower of the margins the two PGD runs ended with, (m,)."""
        return torch.minimum(self.pgd_ce.margin, self.pgd_margin().margin)

    @property
    def white_box_broken(self) -> Tensor:
        """Rows that FGSM or one of the PGD runs broke, bool (m,)."""
        return self.fgsm.broken | self.iterated_broken

    @property
    def iterated_broken(self) -> Tensor:
        """Rows that one of the PGD runs broke, bool (m,)."""
        return self.pgd_ce.broken | self.pgd_margin().broken

    # --- one run ------------------------------------------------------------------------------------------

    def noise(self, name: str) -> Noise:
        """Random streams of the rows for one purpose."""
        return Noise.for_samples(self.settings.seed, name, list(self.ids), self.x.device)

    def outcome(self, proposal: Proposal, threat: ThreatModel | None = None) -> Outcome:
        """Judge a proposal."""
        verdict = judge(self.classifier, self.x, self.y, proposal, threat or self.threat)
        margin = verdict.margin.to(self.x.device)
        admitted = margin.isfinite()
        shown = torch.where(admitted.view(-1, *[1] * (self.x.dim() - 1)), proposal.x_adv, self.x)
        size = self.classifier.batch_size
        seen = [self.classifier.search_logits(part) for part in torch.split(shown, size)]
        return Outcome(
            margin=torch.where(admitted, margin, self.clean_margin),
            broken=verdict.broken.to(self.x.device),
            searched=margins(torch.cat(seen), self.y),
        )

    def _pgd(
        self,
        loss: str,
        *,
        stop: str,
        step: float = 0.25,
        restarts: int = 1,
        threat: ThreatModel | None = None,
        attacked: Classifier | None = None,
    ) -> Proposal:
        ball = threat or self.threat
        return pgd(
            attacked or self.classifier,
            self.x,
            self.y,
            threat=ball,
            noise=self.noise("pgd" if loss == "ce" else f"pgd/{loss}"),
            steps=self.settings.steps,
            step_size=step * ball.radius,
            restarts=restarts,
            loss=loss,
            stop=stop,  # type: ignore[arg-type]
        )

    def _ladder(self) -> list[Proposal]:
        return pgd_ladder(
            self.classifier,
            self.x,
            self.y,
            threat=self.threat,
            noise=self.noise("pgd/margin"),
            rungs=tuple(int(m * self.settings.steps) for m in MULTIPLES),
            step_size=0.25 * self.threat.radius,
            loss="margin",
            stop="never",
        )

    def _made(
        self,
        name: str,
        attack: Callable[[], Proposal],
        threat: ThreatModel | None = None,
    ) -> Outcome:
        if name not in self.outcomes:
            self._make({name: threat or self.threat}, name, lambda: [attack()])
        return self.outcomes[name]

    def _make(
        self, balls: dict[str, ThreatModel], planned: str, attack: Callable[[], list[Proposal]]
    ) -> None:
        """Run an attack and judge its proposals, or take them from an earlier run."""
        found = {name: self._recall(name) for name in balls}
        if any(outcome is None for outcome in found.values()):
            with self.work.doing(planned):
                proposals = attack()
            found = {
                name: self.outcome(proposal, ball)
                for (name, ball), proposal in zip(balls.items(), proposals, strict=True)
            }
        self.outcomes |= {name: outcome for name, outcome in found.items() if outcome is not None}
        self.work.finished(planned)
        if self.kept is not None:
            self.kept.write(
                {
                    f"{name}.{field}": getattr(outcome, field).cpu().numpy()
                    for name, outcome in self.outcomes.items()
                    for field in ("margin", "broken", "searched")
                }
            )

    def _recall(self, name: str) -> Outcome | None:
        rows = {} if self.kept is None else self.kept.rows
        if f"{name}.searched" not in rows:
            return None
        fields = {f: np.asarray(rows[f"{name}.{f}"]) for f in ("margin", "broken", "searched")}
        return Outcome(**{f: torch.from_numpy(a).to(self.x.device) for f, a in fields.items()})


def plan(settings: Settings) -> dict[str, float]:
    """Passes for each image that every attack takes at most; a backward pass counts as two."""
    run = 3.0 * settings.steps
    return {
        "fgsm": 3.0,
        "random": float(settings.draws),
        "pgd_ce": run,
        "pgd_stopped": run,
        "pgd_margin": run * float(MULTIPLES[-1]),
        "restarted": run * settings.restarts,
        **{f"stepped_{step:g}": run for step in STEP_LENGTHS},
        **{f"radius_{multiple}": run for multiple in RADII},
        "spsa": 2.0 * settings.spsa_samples * settings.spsa_steps,
        "square": float(settings.queries),
        "transferred": run,
    }


def wider(threat: ThreatModel, multiple: int, pixels: int) -> ThreatModel:
    """The ball of a multiple of the radius; 0, or where that would be smaller: one that holds every image.

    Args:
        threat: the ball.
        multiple: of its radius.
        pixels: numbers in an image, C * H * W.
    """
    every = Fraction(1) if threat.norm == "linf" else Fraction(math.isqrt(pixels) + 1)
    return ThreatModel(threat.norm, min(threat.eps * multiple, every) if multiple else every)
