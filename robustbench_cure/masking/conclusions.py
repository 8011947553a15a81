"""From measurements to findings, and from findings to a conclusion and an exit code."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.evaluation.preflight import preflight
from robustbench_cure.files import Cache
from robustbench_cure.masking.checks import CHECKS, OF_FLAGS, Finding
from robustbench_cure.masking.evidence import Measurements, Progress, Settings, no_progress
from robustbench_cure.masking.power import controlled, powers
from robustbench_cure.threat import ThreatModel

#: Images classified correctly below which it means nothing that no check is raised.
FEWEST = 50

Kind = Literal["no evidence", "suspected", "not conclusive"]


@dataclass(frozen=True)
class Conclusion:
    """What the findings come to.

    Attributes:
        kind: the three there are; "not masked" is not among them.
        words: as printed.
        exit_code: 0, or 1 where this kind is asked to fail.
    """

    kind: Kind
    words: str
    exit_code: int


@dataclass(frozen=True)
class Diagnosis:
    """Everything about one model.

    Attributes:
        findings: in the order of `CHECKS`.
        n: images classified correctly, which the findings rest on.
        measurements: the attacks, for figures.
    """

    findings: tuple[Finding, ...]
    n: int
    measurements: Measurements

    @property
    def raised(self) -> list[str]:
        """Names of the checks that were raised, in the same order."""
        return [finding.check for finding in self.findings if finding.status == "raised"]


def conclude(findings: Sequence[Finding], n: int, *, fail_on: Collection[str] = ()) -> Conclusion:
    """The conclusion from some findings: words and exit code in one place, so that they cannot disagree.

    Args:
        findings: of one model.
        n: images they rest on.
        fail_on: kinds of conclusion that are failures.
    """
    kind, words = _words(findings, n)
    return Conclusion(kind, words, int(kind in fail_on))


def _words(findings: Sequence[Finding], n: int) -> tuple[Kind, str]:
    by_status = {
        status: [finding.check for finding in findings if finding.status == status]
        for status in ("raised", "clear", "inconclusive")
    }
    if by_status["raised"]:
        return "suspected", f"suspected: {', '.join(by_status['raised'])} (n = {n})"
    clear = len(by_status["clear"])
    if n < FEWEST or not clear:
        return "not conclusive", f"not conclusive: too few points (n = {n}, {FEWEST} are needed)"
    if by_status["inconclusive"]:
        return (
            "not conclusive",
            f"not conclusive: no power in {', '.join(by_status['inconclusive'])} (n = {n})",
        )
    return "no evidence", f"no evidence of masking under {clear} of {len(CHECKS)} checks (n = {n})"


def in_order(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Findings in the order of `CHECKS`."""
    order = list(CHECKS)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.check)))


def diagnose(
    classifier: Classifier,
    data: EvalSet,
    threat: ThreatModel,
    settings: Settings | None = None,
    *,
    progress: Progress = no_progress,
    cache: Cache | None = None,
    surrogate: Classifier | None = None,
) -> Diagnosis:
    """Run every check on a model.

    Args:
        classifier: the model.
        data: images; those classified correctly are attacked.
        threat: the ball.
        settings: how much work is done; None: the defaults.
        progress: called with the passes done, the passes in all and the attack under way.
        cache: where results are stored, so that an interrupted diagnosis can go on; None: nowhere.
        surrogate: another model, whose adversarial examples are tried.

    Raises:
        UsageError: the model does not fit the data.
    """
    flags = preflight(classifier, data)
    m = Measurements(
        classifier,
        data,
        threat,
        settings or Settings(),
        flags=flags,
        progress=progress,
        cache=cache,
        surrogate=surrogate,
    )
    findings = [about.run(m) for name, about in CHECKS.items() if len(m) or name in OF_FLAGS]
    if len(m):
        findings = controlled(findings, powers(m))
    return Diagnosis(tuple(findings), len(m), m)
