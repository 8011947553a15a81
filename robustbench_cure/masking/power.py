"""The positive control of A and H: could attacks without gradients have broken anything?

A search that breaks nothing anywhere does not break what gradients missed either, and its silence is no
evidence. So SPSA and Square must show power where adversarial examples are known to exist: on the images that
gradients broke or, where these are few, in balls that hold a planted one (check O).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from robustbench_cure.attacks import Noise, spsa
from robustbench_cure.evaluation.verify import judge
from robustbench_cure.interop.square import square
from robustbench_cure.masking.evidence import Evidence
from robustbench_cure.masking.finding import LEVEL, Finding
from robustbench_cure.masking.planted import FEWEST, Problem, p_missed, problems

#: Share of the images broken by gradients that a search without them should break too: SPSA at the default
#: settings breaks half and more on honest networks of digits and CIFAR-10, next to no search up to a quarter.
POWER = Fraction(1, 3)


@dataclass(frozen=True)
class Power:
    """What was broken where an adversarial example is known.

    Attributes:
        found: broken.
        known: images that gradients broke, or planted problems.
        planted: whether it is the latter.
    """

    found: int
    known: int
    planted: bool = False

    @property
    def shown(self) -> bool:
        """Whether silence elsewhere says something."""
        if self.known < FEWEST:
            return False
        if self.planted:  # asked as much as PGD is by check O
            return p_missed(self.found, self.known) >= LEVEL
        return self.found >= POWER * self.known

    @property
    def words(self) -> str:
        """What was seen, for the evidence of a finding."""
        where = "planted examples" if self.planted else "images broken by gradients"
        return f"of {self.known} {where} {self.found} were broken"


def controlled(findings: Sequence[Finding], powers: Mapping[str, Power]) -> list[Finding]:
    """Findings, those that are clear without power called inconclusive.

    Args:
        findings: of one model.
        powers: by letter, of the attacks whose silence the finding rests on.
    """
    told = []
    for found in findings:
        power = powers.get(found.letter)
        if power is not None and found.status == "clear":
            evidence = f"{found.evidence}; control: {power.words}"
            status = "clear" if power.shown else "inconclusive"
            found = found.model_copy(update={"status": status, "evidence": evidence})
        told.append(found)
    return told


def on_broken(broken: Tensor, known: Tensor) -> Power:
    """Power on the images that gradients broke.

    Args:
        broken: by the attacks without gradients, bool (m,).
        known: by those with, bool (m,).
    """
    return Power(int((broken & known).sum()), int(known.sum()))


def powers(e: Evidence) -> dict[str, Power]:
    """Power of SPSA, for A, and of SPSA and Square together, for H."""
    known = e.white_box_broken
    if int(known.sum()) >= FEWEST:
        found = {"A": on_broken(e.spsa.broken, known), "H": on_broken(e.spsa.broken | e.square.broken, known)}
    else:
        found = _on_planted(e)
    e.work.finished("control")
    return found


def _on_planted(e: Evidence) -> dict[str, Power]:
    by_spsa, by_either = [], []
    with e.work.doing("control"):
        for problem in problems(e):
            by_spsa.append(_spsa_solves(e, problem))
            by_either.append(by_spsa[-1] or _square_solves(e, problem))
    tried = len(by_spsa)
    return {"A": Power(sum(by_spsa), tried, planted=True), "H": Power(sum(by_either), tried, planted=True)}


def _spsa_solves(e: Evidence, problem: Problem) -> bool:
    s, radius = e.settings, e.threat.radius
    proposal = spsa(
        problem.classifier,
        problem.x,
        problem.y,
        threat=e.threat,
        noise=Noise.for_samples(s.seed, "planted", [problem.id], problem.x.device),
        steps=s.spsa_steps,
        samples=s.spsa_samples,
        step_size=4 * radius / s.spsa_steps,  # as on the images
        delta=0.01,
    )
    return bool(judge(problem.classifier, problem.x, problem.y, proposal, e.threat).broken[0])


def _square_solves(e: Evidence, problem: Problem) -> bool:
    s = e.settings
    proposal = square(
        problem.classifier, problem.x, problem.y, threat=e.threat, queries=s.queries, seed=s.seed
    )
    return bool(judge(problem.classifier, problem.x, problem.y, proposal, e.threat).broken[0])
