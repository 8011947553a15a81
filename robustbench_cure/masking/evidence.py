"""Measurements of one model: attacks on the images it classifies correctly, each run once and verified."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from robustbench_cure.attacks import Candidates, Noise, fgsm, pgd, pgd_checkpoints, spsa, uniform_noise
from robustbench_cure.attacks.losses import margins, misclassified
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.evaluation.verify import verify
from robustbench_cure.files import Cache
from robustbench_cure.interop.square import square
from robustbench_cure.threat import ThreatModel

#: Multiples of `Settings.steps` after which one PGD trajectory is verified.
MULTIPLES = (Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4))
#: Multiples of the radius that are tried as well; 0: the ball that holds every image.
RADII = (2, 4, 0)
#: Step sizes of PGD that are tried beside a quarter of the radius, as shares of it.
STEP_LENGTHS = (0.05, 1.0)

#: Called with the passes done, the passes in all and the name of the attack under way.
Progress = Callable[[float, float, str], None]


def no_progress(_done: float, _total: float, _name: str) -> None:
    """Progress of a diagnosis that nobody watches."""


@dataclass(frozen=True)
class Settings:
    """How much work the checks do.

    Attributes:
        steps: of the PGD that is examined, even; one check goes to four times as many.
        spsa_steps: Adam steps of SPSA.
        spsa_samples: directions for each of its estimates.
        draws: points of random noise.
        restarts: of the PGD with several starts.
        queries: of the Square attack.
        planted: images on which the binarization test is made.
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
class AttackResult:
    """Where an attack ended on each of m images that are classified correctly.

    Attributes:
        margin: J there in the reference form of the model, float32 (m,); that of the image where the
            candidate was not admitted.
        broken: the candidate is verified to be adversarial, bool (m,).
        searched: J there in the form that attacks search with, float32 (m,); None: not known.
    """

    margin: Tensor
    broken: Tensor
    searched: Tensor | None = None


class ComparedAttacks(Protocol):
    """Results of attacks on the same m images: measured now (`Measurements`) or read from a record."""

    @property
    def ids(self) -> Sequence[str]:
        """Names of the m images."""

    @property
    def flags(self) -> Mapping[str, Flag]:
        """Kind -> flag raised before the first attack."""

    @property
    def clean_margin(self) -> Tensor:
        """J of the images themselves, float32 (m,)."""

    @property
    def white_box_margin(self) -> Tensor:
        """The lowest margin that PGD ended with, float32 (m,)."""

    @property
    def white_box_broken(self) -> Tensor:
        """Images that a white-box attack broke, bool (m,)."""

    @property
    def pgd_broken(self) -> Tensor:
        """Images that PGD broke, bool (m,)."""

    @property
    def fgsm(self) -> AttackResult:
        """Where FGSM ended on each image."""

    @property
    def random(self) -> AttackResult:
        """The worst of random points around each image."""

    @property
    def spsa(self) -> AttackResult:
        """Where SPSA ended on each image."""


@dataclass(frozen=True)
class PairedMargins:
    """Final margins of PGD and of SPSA on the same images: the scatter of the CURE paper's figure 7.

    Attributes:
        title: which PGD and which images.
        ids: names of the images.
        pgd: margins that PGD ended with, float32 (m,).
        spsa: likewise of SPSA.
    """

    title: str
    ids: Sequence[str]
    pgd: Tensor
    spsa: Tensor


class Measurements:
    """Images classified correctly, and what attacks did to them.

    Args:
        classifier: the model.
        data: images; those misclassified are left out.
        threat: the ball.
        settings: how much work is done.
        flags: raised by `preflight` on this model.
        progress: see `Progress`.
        cache: results of an interrupted run, which are taken over; None: store nothing.
        surrogate: another model, whose adversarial examples are tried.

    Attributes:
        x, y: images and labels of the m rows that are left.
        ids: their names.
        flags: kind -> flag.
        total: images in all: the denominator of accuracies.
        clean_margin: J of the images, float32 (m,).
        results: name -> result of the attacks that were run so far.
    """

    def __init__(
        self,
        classifier: Classifier,
        data: EvalSet,
        threat: ThreatModel,
        settings: Settings,
        *,
        flags: Sequence[Flag],
        progress: Progress = no_progress,
        cache: Cache | None = None,
        surrogate: Classifier | None = None,
    ) -> None:
        self.classifier, self.threat, self.settings, self.surrogate = classifier, threat, settings, surrogate
        self.cache = cache
        self.flags = {flag.kind: flag for flag in flags}
        x, y = data.images.to(classifier.device), data.labels.to(classifier.device)
        logits = classifier.logits(x)
        correct = (~misclassified(logits, y)).nonzero().squeeze(1)
        self.total = len(data)
        self.x, self.y = x[correct], y[correct]
        self.ids = tuple(data.ids[row] for row in correct.tolist())
        self.clean_margin = margins(logits, y)[correct]
        self.results: dict[str, AttackResult] = {}
        each = passes(settings)
        planned = {name: count * len(self) for name, count in each.items()}
        if surrogate is None:
            del planned["transferred"]
        planned["control"] = min(settings.planted, len(self)) * (each["spsa"] + each["square"])
        self.work = Work(planned, classifier, progress)

    def __len__(self) -> int:
        return len(self.ids)

    # --- attacks ------------------------------------------------------------------------------------------

    @property
    def fgsm(self) -> AttackResult:
        """Where FGSM ended: one step as long as the radius."""
        return self._run("fgsm", lambda: fgsm(self.classifier, self.x, self.y, threat=self.threat))

    @property
    def pgd_ce(self) -> AttackResult:
        """PGD on cross-entropy; the iterate of lowest margin."""
        return self._run("pgd_ce", lambda: self._pgd("ce", stop="never"))

    @property
    def pgd_stopped(self) -> AttackResult:
        """The same trajectory, stopped at the first iterate that is verified to be adversarial."""
        return self._run("pgd_stopped", lambda: self._pgd("ce", stop="first-success"))

    def pgd_margin(self, multiple: Fraction = MULTIPLES[1]) -> AttackResult:
        """PGD on the margin after a multiple of the steps; one trajectory serves all multiples."""
        names = {m: f"pgd_margin_x{float(m):g}" for m in MULTIPLES}
        if names[multiple] not in self.results:
            self._run_all({names[m]: self.threat for m in MULTIPLES}, "pgd_margin", self._pgd_checkpoints)
        return self.results[names[multiple]]

    @property
    def restarted(self) -> AttackResult:
        """PGD on the margin from several starts."""
        restarts = self.settings.restarts
        return self._run("restarted", lambda: self._pgd("margin", stop="first-success", restarts=restarts))

    def with_step(self, step: float) -> AttackResult:
        """PGD on the margin with another step size, a share of the radius."""
        return self._run(f"stepped_{step:g}", lambda: self._pgd("margin", stop="first-success", step=step))

    def at_radius(self, multiple: int) -> AttackResult:
        """PGD on the margin in a larger ball; 0: the one that holds every image."""
        ball = wider(self.threat, multiple, self.x.shape[1:].numel())
        step = 0.05 if multiple == 0 else 0.25
        return self._run(
            f"radius_{multiple}",
            lambda: self._pgd("margin", stop="first-success", step=step, threat=ball),
            ball,
        )

    @property
    def spsa(self) -> AttackResult:
        """Where SPSA ended: its iterate of lowest margin."""
        noise = self.noise("spsa")
        return self._run("spsa", lambda: self.search_spsa(self.classifier, self.x, self.y, noise, "never"))

    @property
    def square(self) -> AttackResult:
        """Where the Square attack ended after the queries of the settings."""
        return self._run("square", lambda: self.search_square(self.classifier, self.x, self.y))

    @property
    def random(self) -> AttackResult:
        """The worst of many random points of the ball."""
        return self._run(
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
    def transferred(self) -> AttackResult:
        """PGD on the margin of the surrogate, verified on the model.

        Raises:
            ValueError: there is no surrogate.
        """
        if self.surrogate is None:
            raise ValueError("there is no surrogate")
        other = self.surrogate
        return self._run("transferred", lambda: self._pgd("margin", stop="never", attacked=other))

    @property
    def white_box_margin(self) -> Tensor:
        """The lower of the margins the two PGD runs ended with, float32 (m,)."""
        return torch.minimum(self.pgd_ce.margin, self.pgd_margin().margin)

    @property
    def white_box_broken(self) -> Tensor:
        """Rows that FGSM or one of the PGD runs broke, bool (m,)."""
        return self.fgsm.broken | self.pgd_broken

    @property
    def pgd_broken(self) -> Tensor:
        """Rows that one of the PGD runs broke, bool (m,)."""
        return self.pgd_ce.broken | self.pgd_margin().broken

    # --- one attack ---------------------------------------------------------------------------------------

    def noise(self, name: str) -> Noise:
        """Random streams of the rows for one purpose."""
        return Noise.for_samples(self.settings.seed, name, list(self.ids), self.x.device)

    def search_spsa(
        self, classifier: Classifier, x: Tensor, y: Tensor, noise: Noise, stop: str = "first-success"
    ) -> Candidates:
        """SPSA with these settings against any classifier: the model, or one of the binarization test."""
        steps = self.settings.spsa_steps
        return spsa(
            classifier,
            x,
            y,
            threat=self.threat,
            noise=noise,
            steps=steps,
            samples=self.settings.spsa_samples,
            # Four times the radius in all: Adam's steps are about its learning rate long.
            step_size=4 * self.threat.radius / steps,
            delta=0.01,
            stop=stop,  # type: ignore[arg-type]
        )

    def search_square(self, classifier: Classifier, x: Tensor, y: Tensor) -> Candidates:
        """The Square attack with these settings, likewise."""
        s = self.settings
        return square(classifier, x, y, threat=self.threat, queries=s.queries, seed=s.seed)

    def verified(self, candidate: Candidates, threat: ThreatModel | None = None) -> AttackResult:
        """The result of an attack that returned this candidate.

        Args:
            candidate: images (m,C,H,W) as the attack returned them.
            threat: the ball that it was given; None: that of these measurements.
        """
        rows = verify(self.classifier, self.x, self.y, candidate, threat or self.threat)
        margin = rows.margin.to(self.x.device)
        admitted = margin.isfinite()
        final = torch.where(admitted.view(-1, *[1] * (self.x.dim() - 1)), candidate.x_adv, self.x)
        parts = torch.split(final, self.classifier.batch_size)
        logits = torch.cat([self.classifier.search_logits(part) for part in parts])
        return AttackResult(
            margin=torch.where(admitted, margin, self.clean_margin),
            broken=rows.broken.to(self.x.device),
            searched=margins(logits, self.y),
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
    ) -> Candidates:
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

    def _pgd_checkpoints(self) -> list[Candidates]:
        return pgd_checkpoints(
            self.classifier,
            self.x,
            self.y,
            threat=self.threat,
            noise=self.noise("pgd/margin"),
            checkpoints=tuple(int(m * self.settings.steps) for m in MULTIPLES),
            step_size=0.25 * self.threat.radius,
            loss="margin",
            stop="never",
        )

    def _run(
        self, name: str, attack: Callable[[], Candidates], threat: ThreatModel | None = None
    ) -> AttackResult:
        if name not in self.results:
            self._run_all({name: threat or self.threat}, name, lambda: [attack()])
        return self.results[name]

    def _run_all(
        self, balls: dict[str, ThreatModel], planned: str, attack: Callable[[], list[Candidates]]
    ) -> None:
        """Run an attack and verify its candidates, or take the results from the cache."""
        known = {name: self._cached(name) for name in balls}
        if any(result is None for result in known.values()):
            with self.work.doing(planned):
                candidates = attack()
            known = {
                name: self.verified(candidate, ball)
                for (name, ball), candidate in zip(balls.items(), candidates, strict=True)
            }
        self.results |= {name: result for name, result in known.items() if result is not None}
        self.work.finished(planned)
        if self.cache is not None:
            self.cache.write(
                {
                    f"{name}.{field}": getattr(result, field).cpu().numpy()
                    for name, result in self.results.items()
                    for field in ("margin", "broken", "searched")
                }
            )

    def _cached(self, name: str) -> AttackResult | None:
        rows = {} if self.cache is None else self.cache.rows
        if f"{name}.searched" not in rows:
            return None
        fields = {f: np.asarray(rows[f"{name}.{f}"]) for f in ("margin", "broken", "searched")}
        return AttackResult(**{f: torch.from_numpy(a).to(self.x.device) for f, a in fields.items()})


def passes(settings: Settings) -> dict[str, float]:
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


class Work:
    """Passes through the network, planned and done.

    Args:
        planned: name of an attack -> passes it takes at most.
        classifier: counts the passes.
        progress: see `Progress`.
    """

    def __init__(self, planned: dict[str, float], classifier: Classifier, progress: Progress) -> None:
        self.planned, self.classifier, self.progress = planned, classifier, progress
        self.total = sum(planned.values())
        self.done = 0.0

    @contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Report while an attack is under way."""
        before = self._passes()

        def report() -> None:
            share = min(self.planned[name], self._passes() - before)
            self.progress(self.done + share, self.total, name.replace("_", " "))

        self.classifier.callback = report
        try:
            yield
        finally:
            self.classifier.callback = None

    def finished(self, name: str) -> None:
        """Count an attack as done, whether it took fewer passes than planned or none."""
        self.done += self.planned[name]

    def _passes(self) -> int:
        return self.classifier.forwards + 2 * self.classifier.backwards
