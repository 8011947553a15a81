"""What a finished record already says about masked gradients, without the model.

Its attacks stop at the first success, so that final margins can be compared only where PGD had none: the
scatter holds these images. What needs the model is left to `cure-bench masking`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from robustbench_cure.evaluation.record import Record
from robustbench_cure.masking import scatter
from robustbench_cure.masking.checks import MORE_STEPS
from robustbench_cure.masking.comparisons import alone, finding, random_noise, single_step
from robustbench_cure.masking.comparisons import scatter as scatter_check
from robustbench_cure.masking.finding import Finding, not_run
from robustbench_cure.masking.power import controlled, on_broken
from robustbench_cure.masking.verdict import Verdict, conclude, flag_findings
from robustbench_cure.protocol.specs import PGD, AttackSpec

#: Kinds of attack that follow gradients.
SIGHTED = ("fgsm", "pgd", "deepfool")


@dataclass(frozen=True)
class Column:
    """Where an attack of a record ended."""

    margin: Tensor
    broken: Tensor


@dataclass(frozen=True)
class Recorded:
    """Outcomes of a record's attacks on some of its images, all classified correctly.

    Attributes:
        samples: those rows of the table.
        attacks: of the battery.
    """

    samples: pd.DataFrame
    attacks: tuple[AttackSpec, ...]

    @cached_property
    def ids(self) -> list[str]:
        """Names of the images."""
        return [str(name) for name in self.samples["sample_id"]]

    @property
    def clean_margin(self) -> Tensor:
        """J of the images themselves."""
        return _floats(self.samples["clean_margin"])

    @property
    def white_box_margin(self) -> Tensor:
        """The lowest margin that a PGD ended with."""
        return torch.stack([self._column(spec).margin for spec in self.of("pgd")]).amin(0)

    @property
    def white_box_broken(self) -> Tensor:
        """Images that an attack with gradients broke."""
        return torch.stack([self._column(spec).broken for spec in self.of(*SIGHTED)]).any(0)

    @property
    def iterated_broken(self) -> Tensor:
        """Images that a PGD broke."""
        return torch.stack([self._column(spec).broken for spec in self.of("pgd")]).any(0)

    @property
    def fgsm(self) -> Column:
        """FGSM."""
        return self._column(self.of("fgsm")[0])

    @property
    def random(self) -> Column:
        """Uniform noise."""
        return self._column(self.of("uniform_noise")[0])

    @property
    def spsa(self) -> Column:
        """SPSA."""
        return self._column(self.of("spsa")[0])

    def of(self, *kinds: str) -> list[AttackSpec]:
        """The attacks of some kinds, in order."""
        return [spec for spec in self.attacks if spec.kind in kinds]

    def where(self, rows: Tensor) -> Recorded:
        """The same, of fewer images."""
        return replace(self, samples=self.samples[rows.numpy()])

    def _column(self, spec: AttackSpec) -> Column:
        margin = _floats(self.samples[f"{spec.id}.margin"])
        # Refused proposals, and images that another attack's limit left out, count as the image itself.
        margin = torch.where(margin.isfinite(), margin, self.clean_margin)
        return Column(margin, torch.tensor(self.samples[f"{spec.id}.broken"].tolist(), dtype=torch.bool))


@dataclass(frozen=True)
class Panel:
    """The masking section of one record.

    Attributes:
        findings: in order of their letters.
        verdict: what they come to.
        plot: the scatter; None: SPSA was not run, or PGD broke every image.
    """

    findings: tuple[Finding, ...]
    verdict: Verdict
    plot: scatter.Panel | None


def from_record(record: Record) -> Panel | None:
    """What the record says; None if its battery has no attack with gradients and one without.

    Args:
        record: a finished run.
    """
    correct = record.samples[record.clean_correct]
    every = Recorded(correct, record.attacks)
    if not every.of("pgd") or not every.of("spsa", "uniform_noise") or correct.empty:
        return None
    findings, powers = [*_of_flags(record), _steps(record, every)], {}
    if every.of("fgsm"):
        findings.append(single_step(every))
    if every.of("uniform_noise"):
        findings.append(random_noise(every))
    plot = None
    if every.of("spsa"):
        seen = every.where(torch.tensor(correct[f"{every.of('spsa')[0].id}.attacked"].tolist()))
        broken = seen.spsa.broken & ~seen.white_box_broken
        findings.append(alone("H", "black box", "SPSA", "gradients", broken, seen.ids))
        powers = dict.fromkeys("AH", on_broken(seen.spsa.broken, seen.white_box_broken))
        standing = seen.where(~seen.iterated_broken)
        if standing.ids:
            findings.append(scatter_check(standing))
            name = f"Images that PGD left standing, {len(standing.ids)} of {len(seen.ids)}"
            plot = scatter.panel(name, standing.ids, standing.white_box_margin, standing.spsa.margin)
        else:
            findings.append(not_run("A", "scatter", "PGD broke every image: there is nothing to compare"))
    findings = sorted(controlled(findings, powers), key=lambda f: f.letter)
    return Panel(tuple(findings), conclude(findings, len(correct)), plot)


def _of_flags(record: Record) -> list[Finding]:
    """B, K and L: what was seen before the first attack."""
    flags = {flag.kind: flag for flag in record.flags}
    zero = flags.get("zero_gradient")
    about = zero.evidence if zero else "no gradient is zero on the first images"
    gradients = Finding(letter="B", check="gradients", status="raised" if zero else "clear", evidence=about)
    return [gradients, *flag_findings(flags)]


def _steps(record: Record, every: Recorded) -> Finding:
    """C: what further steps add, from the PGD entries that differ in step count alone."""
    families: dict[str, list[PGD]] = {}
    for spec in every.attacks:
        if isinstance(spec, PGD):
            family = spec.model_dump_json(exclude={"id", "name", "steps"})
            families.setdefault(family, []).append(spec)
    longest = max(families.values(), key=lambda family: len(family))
    by_steps = sorted(longest, key=lambda spec: spec.steps)
    earlier = [spec for spec in by_steps if 2 * spec.steps <= by_steps[-1].steps]
    if not earlier:
        return not_run("C", "steps", "the battery has no PGD with half as many steps or fewer")
    rates = [record.robust_accuracy(spec.id).value for spec in by_steps]
    drop = record.robust_accuracy(earlier[-1].id).value - rates[-1]
    evidence = ", ".join(
        f"{spec.name} {100 * rate:.1f} %" for spec, rate in zip(by_steps, rates, strict=True)
    )
    return finding("C", "steps", drop > MORE_STEPS, drop, MORE_STEPS, evidence, [])


def _floats(column: pd.Series) -> Tensor:
    return torch.tensor(column.astype("float32").fillna(float("nan")).to_numpy(na_value=float("nan")))
