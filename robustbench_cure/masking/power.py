"""The positive control: could gradient-free attacks have broken anything?

A search that breaks nothing anywhere does not break what gradients missed either, and its silence is no
evidence. So SPSA and Square must show power where adversarial examples are known to exist: on the images that
gradients broke or, where these are few, on the problems of the binarization test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from robustbench_cure.attacks import Noise
from robustbench_cure.masking.binarization import FEWEST, Problem, p_missed, problems
from robustbench_cure.masking.checks import LEVEL, Finding
from robustbench_cure.masking.evidence import Measurements

#: Share of the images broken by gradients that a gradient-free search should break too: SPSA at the default
#: settings breaks half and more on honest networks of digits and CIFAR-10, next to no search up to a quarter.
POWER = Fraction(1, 3)


@dataclass(frozen=True)
class Power:
    """How many adversarial examples that are known to exist gradient-free attacks found.

    Attributes:
        broken: images, or problems, that the attacks broke.
        known: images that gradients broke, or problems of the binarization test.
        binarized: whether it is the latter.
    """

    broken: int
    known: int
    binarized: bool = False

    @property
    def enough(self) -> bool:
        """Whether it means something that such attacks break nothing elsewhere."""
        if self.known < FEWEST:
            return False
        if self.binarized:  # as much as PGD must solve
            return p_missed(self.broken, self.known) >= LEVEL
        return self.broken >= POWER * self.known

    @property
    def words(self) -> str:
        """The counts, for the evidence of a finding."""
        where = "problems of the binarization test" if self.binarized else "images broken by gradients"
        return f"of {self.known} {where} {self.broken} were broken"


def controlled(findings: Sequence[Finding], powers: Mapping[str, Power]) -> list[Finding]:
    """Findings, those that are clear without power called inconclusive.

    Args:
        findings: of one model.
        powers: name of a check -> power of the attacks that break nothing where it is clear.
    """
    result = []
    for finding in findings:
        power = powers.get(finding.check)
        if power is not None and finding.status == "clear":
            evidence = f"{finding.evidence}; control: {power.words}"
            status = "clear" if power.enough else "inconclusive"
            finding = finding.model_copy(update={"status": status, "evidence": evidence})
        result.append(finding)
    return result


def on_broken(broken: Tensor, known: Tensor) -> Power:
    """Power on the images that gradients broke.

    Args:
        broken: by gradient-free attacks, bool (m,).
        known: by white-box attacks, bool (m,).
    """
    return Power(int((broken & known).sum()), int(known.sum()))


def powers(m: Measurements) -> dict[str, Power]:
    """Power of SPSA, and of SPSA and Square together, by the check that rests on them."""
    known = m.white_box_broken
    if int(known.sum()) >= FEWEST:
        spsa, either = (on_broken(b, known) for b in (m.spsa.broken, m.spsa.broken | m.square.broken))
    else:
        spsa, either = _on_problems(m)
    m.work.finished("control")
    return {"spsa_below_pgd": spsa, "gradient_free_beats_white_box": either}


def _on_problems(m: Measurements) -> tuple[Power, Power]:
    by_spsa, by_either = [], []
    with m.work.doing("control"):
        for problem in problems(m):
            by_spsa.append(_spsa_solves(m, problem))
            by_either.append(by_spsa[-1] or _square_solves(m, problem))
    tried = len(by_spsa)
    return Power(sum(by_spsa), tried, binarized=True), Power(sum(by_either), tried, binarized=True)


def _spsa_solves(m: Measurements, problem: Problem) -> bool:
    noise = Noise.for_samples(m.settings.seed, "planted", [problem.id], problem.x.device)
    return problem.solved(m.search_spsa(problem.classifier, problem.x, problem.y, noise))


def _square_solves(m: Measurements, problem: Problem) -> bool:
    return problem.solved(m.search_square(problem.classifier, problem.x, problem.y))
