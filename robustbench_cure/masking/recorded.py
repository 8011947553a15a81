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

from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.evaluation.record import Record
from robustbench_cure.masking.checks import (
    MORE_STEPS,
    Finding,
    broken_alone,
    fgsm_beats_pgd,
    finding,
    noise_beats_white_box,
    not_run,
    probability_outputs,
    spsa_below_pgd,
    unstable_predictions,
)
from robustbench_cure.masking.conclusions import Conclusion, conclude, in_order
from robustbench_cure.masking.evidence import AttackResult, PairedMargins
from robustbench_cure.masking.power import controlled, on_broken
from robustbench_cure.protocol.specs import PGD, AttackSpec


@dataclass(frozen=True)
class RecordedAttacks:
    """Results of a record's attacks on some of its images, all classified correctly.

    Attributes:
        samples: those rows of the table.
        attacks: of the battery.
        flags: kind -> flag of the record.
    """

    samples: pd.DataFrame
    attacks: tuple[AttackSpec, ...]
    flags: dict[str, Flag]

    @cached_property
    def ids(self) -> list[str]:
        """Names of the m images."""
        return [str(name) for name in self.samples["sample_id"]]

    @property
    def clean_margin(self) -> Tensor:
        """J of the images themselves, float32 (m,)."""
        return _floats(self.samples["clean_margin"])

    @property
    def white_box_margin(self) -> Tensor:
        """The lowest margin that a PGD ended with, float32 (m,)."""
        return torch.stack([self._result(spec).margin for spec in self.of("pgd")]).amin(0)

    @property
    def white_box_broken(self) -> Tensor:
        """Images that an attack with gradients broke, bool (m,)."""
        return torch.stack([self._result(s).broken for s in self.attacks if s.access == "white-box"]).any(0)

    @property
    def pgd_broken(self) -> Tensor:
        """Images that a PGD broke, bool (m,)."""
        return torch.stack([self._result(spec).broken for spec in self.of("pgd")]).any(0)

    @property
    def fgsm(self) -> AttackResult:
        """Where FGSM ended on each image."""
        return self._result(self.of("fgsm")[0])

    @property
    def random(self) -> AttackResult:
        """The worst of random points around each image, of all controls of the battery."""
        results = [self._result(spec) for spec in self.controls]
        margin = torch.stack([result.margin for result in results]).amin(0)
        return AttackResult(margin, torch.stack([result.broken for result in results]).any(0))

    @property
    def controls(self) -> list[AttackSpec]:
        """Attacks that draw points and search nothing: uniform noise, and noise of other libraries."""
        return [spec for spec in self.attacks if spec.access == "control"]

    @property
    def spsa(self) -> AttackResult:
        """Where SPSA ended on each image."""
        return self._result(self.of("spsa")[0])

    @property
    def gradient_free(self) -> list[AttackSpec]:
        """Attacks that search without gradients: SPSA, Square of another library, and the like."""
        return [spec for spec in self.attacks if spec.access == "gradient-free"]

    @property
    def gradient_free_broken(self) -> Tensor:
        """Images that a gradient-free attack broke, bool (m,)."""
        return torch.stack([self._result(spec).broken for spec in self.gradient_free]).any(0)

    def attacked(self, *specs: AttackSpec) -> RecordedAttacks:
        """The same, of the images alone that one of these attacks was given."""
        rows = [self.samples[f"{spec.id}.attacked"].tolist() for spec in specs]
        return self.where(torch.tensor(rows).any(0))

    def of(self, *kinds: str) -> list[AttackSpec]:
        """The attacks of some kinds, in order."""
        return [spec for spec in self.attacks if spec.kind in kinds]

    def where(self, rows: Tensor) -> RecordedAttacks:
        """The same, of fewer images: bool (m,)."""
        return replace(self, samples=self.samples[rows.numpy()])

    def _result(self, spec: AttackSpec) -> AttackResult:
        margin = _floats(self.samples[f"{spec.id}.margin"])
        # Candidates not admitted, and images outside another attack's limit, count as the image itself.
        margin = torch.where(margin.isfinite(), margin, self.clean_margin)
        return AttackResult(
            margin, torch.tensor(self.samples[f"{spec.id}.broken"].tolist(), dtype=torch.bool)
        )


@dataclass(frozen=True)
class RecordedDiagnosis:
    """What one record says about masked gradients.

    Attributes:
        findings: in the order of `CHECKS`.
        conclusion: what they come to.
        scatter: final margins of PGD and SPSA; None: SPSA was not run, or PGD broke every image.
    """

    findings: tuple[Finding, ...]
    conclusion: Conclusion
    scatter: PairedMargins | None


def from_record(record: Record) -> RecordedDiagnosis | None:
    """What the record says; None if its battery has no PGD, or neither a gradient-free attack nor noise.

    Nor of a cascade, whose attacks are given different samples and cannot be compared on them.

    Args:
        record: a finished run.
    """
    if record.manifest.battery.cascade:
        return None
    correct = record.samples[record.clean_correct]
    every = RecordedAttacks(correct, record.attacks, {flag.kind: flag for flag in record.flags})
    if not every.of("pgd") or all(spec.gradients for spec in every.attacks) or correct.empty:
        return None
    findings, powers, scatter = [_gradients(every), _steps(record, every)], {}, None
    findings += [unstable_predictions(every), probability_outputs(every)]
    if every.of("fgsm"):
        findings.append(fgsm_beats_pgd(every))
    if every.controls:
        findings.append(noise_beats_white_box(every))
    if every.gradient_free:
        name = "gradient_free_beats_white_box"
        attacked = every.attacked(*every.gradient_free)
        broken = attacked.gradient_free_broken & ~attacked.white_box_broken
        names = " or ".join(spec.name for spec in every.gradient_free)
        findings.append(broken_alone(name, names, "gradients", broken, attacked.ids))
        powers[name] = on_broken(attacked.gradient_free_broken, attacked.white_box_broken)
    if every.of("spsa"):
        attacked = every.attacked(every.of("spsa")[0])
        powers["spsa_below_pgd"] = on_broken(attacked.spsa.broken, attacked.white_box_broken)
        survivors = attacked.where(~attacked.pgd_broken)
        if survivors.ids:
            findings.append(spsa_below_pgd(survivors))
            title = f"Images that PGD left standing, {len(survivors.ids)} of {len(attacked.ids)}"
            margins = survivors.white_box_margin, survivors.spsa.margin
            scatter = PairedMargins(title, survivors.ids, *margins)
        else:
            reason = "PGD broke every image: there is nothing to compare"
            findings.append(not_run("spsa_below_pgd", reason))
    ordered = in_order(controlled(findings, powers))
    return RecordedDiagnosis(ordered, conclude(ordered, len(correct)), scatter)


def _gradients(every: RecordedAttacks) -> Finding:
    """The flag raised before the first attack, in place of gradients of all images."""
    zero = every.flags.get("zero_gradient")
    evidence = zero.evidence if zero else "no gradient is zero on the first images"
    return Finding(check="unavailable_gradients", status="raised" if zero else "clear", evidence=evidence)


def _steps(record: Record, every: RecordedAttacks) -> Finding:
    """The same check as of a model, on the PGDs of the battery that differ in steps alone."""
    name = "more_steps_break_more"
    families: dict[str, list[PGD]] = {}
    for spec in every.attacks:
        if isinstance(spec, PGD):
            family = spec.model_dump_json(exclude={"id", "name", "steps"})
            families.setdefault(family, []).append(spec)
    longest = max(families.values(), key=lambda family: len(family))
    by_steps = sorted(longest, key=lambda spec: spec.steps)
    earlier = [spec for spec in by_steps if 2 * spec.steps <= by_steps[-1].steps]
    if not earlier:
        return not_run(name, "the battery has no PGD with half as many steps or fewer")
    rates = [record.robust_accuracy(spec.id).value for spec in by_steps]
    drop = record.robust_accuracy(earlier[-1].id).value - rates[-1]
    evidence = ", ".join(
        f"{spec.name} {100 * rate:.1f} %" for spec, rate in zip(by_steps, rates, strict=True)
    )
    return finding(name, drop > MORE_STEPS, drop, MORE_STEPS, evidence, [])


def _floats(column: pd.Series) -> Tensor:
    return torch.tensor(column.astype("float32").fillna(float("nan")).to_numpy(na_value=float("nan")))
