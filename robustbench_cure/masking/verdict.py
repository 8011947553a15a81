"""From findings to words and an exit code: one function, so that the two cannot disagree."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.evaluation.preflight import preflight
from robustbench_cure.files import Cache
from robustbench_cure.masking.checks import CHECKS
from robustbench_cure.masking.evidence import Evidence, Settings
from robustbench_cure.masking.finding import Finding
from robustbench_cure.masking.power import controlled, powers
from robustbench_cure.masking.work import Progress, unheard
from robustbench_cure.threat import ThreatModel

#: Images classified correctly below which silence says nothing.
FEWEST = 50

Kind = Literal["no evidence", "suspected", "not conclusive"]


@dataclass(frozen=True)
class Verdict:
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
        findings: in order of their letters.
        n: images classified correctly, which the findings rest on.
        evidence: the runs, for figures.
    """

    findings: tuple[Finding, ...]
    n: int
    evidence: Evidence


def conclude(findings: Sequence[Finding], n: int, *, fail_on: Collection[str] = ()) -> Verdict:
    """The verdict of some findings.

    Args:
        findings: of one model.
        n: images they rest on.
        fail_on: kinds of verdict that are failures.
    """
    kind, words = _words(findings, n)
    return Verdict(kind, words, int(kind in fail_on))


def _words(findings: Sequence[Finding], n: int) -> tuple[Kind, str]:
    raised = [finding.letter for finding in findings if finding.status == "raised"]
    if raised:
        return "suspected", f"suspected: {', '.join(raised)} (n = {n})"
    ran = [finding.letter for finding in findings if finding.status == "clear"]
    if n < FEWEST or not ran:
        return "not conclusive", f"not conclusive: too few points (n = {n}, {FEWEST} are needed)"
    silent = [finding.letter for finding in findings if finding.status == "inconclusive"]
    if silent:
        return "not conclusive", f"not conclusive: no power in {', '.join(silent)} (n = {n})"
    return "no evidence", f"no evidence of masking under checks {_span(ran)} (n = {n})"


def _span(letters: Sequence[str]) -> str:
    """First and last letter where none is missing in between, else all of them."""
    whole = [chr(code) for code in range(ord(letters[0]), ord(letters[-1]) + 1)]
    if list(letters) == whole and len(letters) > 2:
        return f"{letters[0]}..{letters[-1]}"
    return ", ".join(letters)


def diagnose(
    classifier: Classifier,
    data: EvalSet,
    threat: ThreatModel,
    settings: Settings | None = None,
    *,
    progress: Progress = unheard,
    kept: Cache | None = None,
    surrogate: Classifier | None = None,
) -> Diagnosis:
    """Run every check on a model.

    Args:
        classifier: the model.
        data: images; those classified correctly are attacked.
        threat: the ball in question.
        settings: how much work is done.
        progress: told passes done, passes in all, and what is being done.
        kept: where outcomes are kept, so that an interrupted diagnosis can go on.
        surrogate: another model, for the check of transfer.

    Raises:
        UsageError: the model does not fit the data.
    """
    flags = {flag.kind: flag for flag in preflight(classifier, data)}
    evidence = Evidence(
        classifier, data, threat, settings or Settings(), progress=progress, kept=kept, surrogate=surrogate
    )
    findings = flag_findings(flags)
    if len(evidence):
        found = [check(evidence) for check in CHECKS.values()]
        findings += controlled(found, powers(evidence))
    return Diagnosis(tuple(sorted(findings, key=lambda f: f.letter)), len(evidence), evidence)


def flag_findings(flags: Mapping[str, Flag]) -> list[Finding]:
    """K and L: what was seen before the first attack."""
    findings = []
    for letter, name, kinds in (
        ("K", "unstable", ("stochastic", "batch_dependent")),
        ("L", "probabilities", ("probabilities",)),
    ):
        seen = [flags[kind].evidence for kind in kinds if kind in flags]
        findings.append(
            Finding(
                letter=letter,
                check=name,
                status="raised" if seen else "clear",
                evidence="; ".join(seen) or "nothing seen",
            )
        )
    return findings
