"""Two records of one protocol: may they be compared, and what changed?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.record import Record
from robustbench_cure.gate.outcome import AccuracyChange, Outcome, Row, Rules, conclude, find_changes
from robustbench_cure.protocol.cards import Battery
from robustbench_cure.stats import DiscordantPairs

if TYPE_CHECKING:
    import pandas as pd

#: Keys of batteries and attacks that are text alone.
TEXT = {"name", "source", "notes", "published"}


@dataclass(frozen=True)
class Difference:
    """Something that two runs do not share.

    Attributes:
        what: in words.
        now: of the new run.
        before: of the baseline.
    """

    what: str
    now: str
    before: str


@dataclass(frozen=True)
class Comparison:
    """One model, now and before.

    Attributes:
        model: its id.
        new: the run under test; None: there is none.
        baseline: what it is held against; None: there is none.
        rows: every accuracy; none where they cannot be compared.
        incompatibilities: why they cannot be compared.
        notes: what differs and is no incompatibility: the tests allow for it, or it is what is being tested.
        outcome: pass or not, with its exit code.
    """

    model: str
    new: Record | None
    baseline: Record | None
    rows: tuple[Row, ...]
    incompatibilities: tuple[Difference, ...]
    notes: tuple[Difference, ...]
    outcome: Outcome

    @property
    def n(self) -> int:
        """Number of samples that are compared; 0 where the runs are not comparable."""
        return self.rows[0].accuracy.pairs.n if self.rows else 0

    @property
    def same_weights(self) -> bool:
        """Whether the very same weights were evaluated."""
        return bool(self.new and self.baseline and _same(self.new, self.baseline))


def compare_runs(new: Sequence[Record], baseline: Sequence[Record], rules: Rules) -> list[Comparison]:
    """Compare model by model; where each run has one record, these two, whatever their models are called.

    A model that only one of the runs has cannot be compared, which is an outcome of its own.

    Raises:
        UsageError: a run has a model twice.
    """
    if len(new) == len(baseline) == 1:
        return [compare(new[0], baseline[0], rules)]
    now, before = _by_model(new), _by_model(baseline)
    return [_paired(name, now.get(name), before.get(name), rules) for name in sorted(now.keys() | before)]


def compare(new: Record, baseline: Record, rules: Rules) -> Comparison:
    """Hold a record against another one, sample by sample.

    Args:
        new: a finished run.
        baseline: a finished run of the same protocol; where one has fewer samples, these are compared.
        rules: what is tolerated.
    """
    model, reasons = new.manifest.model.id, tuple(incompatibilities(new, baseline))
    if reasons:
        return Comparison(model, new, baseline, (), reasons, (), conclude(["not comparable"], rules))
    rows = find_changes(accuracies(new, baseline), rules, same_weights=_same(new, baseline))
    outcome = conclude([row.finding for row in rows], rules)
    return Comparison(model, new, baseline, rows, (), tuple(_notes(new, baseline)), outcome)


def incompatibilities(new: Record, baseline: Record) -> list[Difference]:
    """Why two records cannot be compared; empty: they can."""
    reasons = []
    if new.unreliable or baseline.unreliable:
        reasons.append(Difference("reliability", _reliability(new), _reliability(baseline)))
    return [*reasons, *_protocols(new.manifest.battery, baseline.manifest.battery), *_data(new, baseline)]


def accuracies(new: Record, baseline: Record) -> list[AccuracyChange]:
    """Clean accuracy, every attack's and the worst case, on the samples that both runs have."""
    ids = _common(new, baseline)

    def robust(record: Record, which: pd.Series, names: list[str]) -> np.ndarray:
        column = which.set_axis(record.samples["sample_id"]).loc[names]
        return column.to_numpy(dtype=bool)

    def between(before: pd.Series, after: pd.Series, names: list[str]) -> DiscordantPairs:
        return DiscordantPairs.between(robust(baseline, before, names), robust(new, after, names))

    changes = [
        AccuracyChange("clean", "clean", "clean", between(baseline.clean_correct, new.clean_correct, ids))
    ]
    for spec in new.attacks:
        before, after = (record.robust_under(spec.id) for record in (baseline, new))
        covered = robust(baseline, baseline.covered(spec.id), ids) & robust(new, new.covered(spec.id), ids)
        names = [name for name, inside in zip(ids, covered, strict=True) if inside]
        changes.append(AccuracyChange(spec.id, spec.name, "attack", between(before, after, names)))
    # An audit finds more in a larger draw: it is compared where both are of all survivors, and else left out.
    audits = [record.audit for record in (baseline, new)]
    whole = all(audit is not None and audit.whole for audit in audits)
    before, after = (
        record.worst_case if whole or audit is None else record.robust(record.attacks)
        for record, audit in zip((baseline, new), audits, strict=True)
    )
    worst = between(before, after, ids)
    least = int(robust(new, new.worst_case, ids).sum())
    return [*changes, AccuracyChange("worst_case", "worst case", "worst", worst, least)]


# --- protocols ------------------------------------------------------------------------------------------


def _protocols(new: Battery, baseline: Battery) -> list[Difference]:
    """What differs between two batteries: ``attack pgd20, steps: 2 now, 20 before``; texts do not count."""
    if new.digest == baseline.digest:
        return []
    shared = {spec.id for spec in new.every_attack} & {spec.id for spec in baseline.every_attack}
    now, before = _flat(new, shared), _flat(baseline, shared)
    keys = [key for key in dict.fromkeys([*now, *before]) if now.get(key) != before.get(key)]
    return [Difference(key, now.get(key, "absent"), before.get(key, "absent")) for key in keys]


def _flat(battery: Battery, detailed: set[str]) -> dict[str, str]:
    """Every key that can change a number, in words, and its value; of the other attacks that they exist."""
    content = battery.model_dump(mode="json", exclude={"attacks", "audit", "threat", *TEXT})
    flat = {f"battery {key}": str(value) for key, value in content.items()}
    flat |= {f"threat model, {key}": str(value) for key, value in battery.model_dump()["threat"].items()}
    if battery.audit:
        flat["audit samples"] = str(battery.audit.samples)
    for spec in battery.every_attack:
        flat[f"attack {spec.id}"] = "present"
        if spec.id in detailed:
            values = spec.model_dump(mode="json", exclude={"id", *TEXT}).items()
            flat |= {f"attack {spec.id}, {key}": str(value) for key, value in values}
    return flat


# --- data -------------------------------------------------------------------------------------------------


def _data(new: Record, baseline: Record) -> list[Difference]:
    """Other samples, pixels or labels. One run may have only part of the other's samples."""
    a, b = new.manifest.data, baseline.manifest.data
    differences = []
    if (a.name, a.split) != (b.name, b.split):
        differences.append(Difference("data set", f"{a.name} {a.split}", f"{b.name} {b.split}"))
    now, before = (set(_ids(record)) for record in (new, baseline))
    if not now & before or (now - before and before - now):
        differences.append(
            Difference("sample ids", f"{len(now - before)} of their own", f"{len(before - now)} of their own")
        )
    columns = ["sample_id", "image_sha256", "label"]
    both = new.samples[columns].merge(baseline.samples[columns], on="sample_id", suffixes=("", "_before"))
    for column, what in (("image_sha256", "pixels (image_sha256)"), ("label", "labels")):
        others = int((both[column] != both[f"{column}_before"]).sum())
        if others:
            differences.append(
                Difference(
                    what, f"other in {others:,} of {len(both):,} samples", f"data digest {b.digest[:8]}"
                )
            )
    return differences


def _common(new: Record, baseline: Record) -> list[str]:
    before = set(_ids(baseline))
    return [name for name in _ids(new) if name in before]


def _ids(record: Record) -> list[str]:
    ids = [str(name) for name in record.samples["sample_id"]]
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise UsageError(f"{record.path or 'record'}: sample {twice} is there twice; evaluate again")
    return ids


# --- models -----------------------------------------------------------------------------------------------


def _by_model(records: Sequence[Record]) -> dict[str, Record]:
    by_id: dict[str, Record] = {}
    for record in records:
        name = record.manifest.model.id
        if name in by_id:
            raise UsageError(
                f"{name} is in two places, {by_id[name].path} and {record.path}: name one of them"
            )
        by_id[name] = record
    return by_id


def _paired(name: str, new: Record | None, baseline: Record | None, rules: Rules) -> Comparison:
    if new and baseline:
        return compare(new, baseline, rules)
    lone = Difference("model", *("present" if record else "absent" for record in (new, baseline)))
    return Comparison(name, new, baseline, (), (lone,), (), conclude(["not comparable"], rules))


def _notes(new: Record, baseline: Record) -> list[Difference]:
    a, b = new.manifest, baseline.manifest
    same_weights = a.model.same_weights(b.model)
    weights = ["same"] * 2 if same_weights else [m.model.weights_sha256[:8] for m in (a, b)]
    pairs = (
        ("model", a.model.id, b.model.id),
        ("weights", *weights),
        ("samples", f"{new.n:,}", f"{baseline.n:,}"),
        ("seed", a.config.seed, b.config.seed),
        ("search in", a.config.precision, b.config.precision),
        ("device", a.environment.device_name, b.environment.device_name),
        ("torch", a.environment.torch, b.environment.torch),
        ("version", a.environment.version, b.environment.version),
        ("audit", _audited(new), _audited(baseline)),
        ("flags", _flags(new), _flags(baseline)),
    )
    noted = [Difference(what, str(now), str(before)) for what, now, before in pairs if now != before]
    if same_weights and not _same(new, baseline):
        noted.insert(0, Difference("code, mean or std around the same weights", "other", "as they were"))
    return noted


def _audited(record: Record) -> str:
    audit = record.audit
    return "none" if audit is None else "all survivors" if audit.whole else f"{audit.draws:,} draws"


def _flags(record: Record) -> str:
    kinds = {f"{flag.kind} ({flag.attack})" if flag.attack else flag.kind for flag in record.flags}
    return ", ".join(sorted(kinds)) or "none"


def _reliability(record: Record) -> str:
    kinds = {flag.kind for flag in record.flags if flag.about.severity == "unreliable"}
    return f"unreliable ({', '.join(sorted(kinds))})" if kinds else "reliable"


def _same(new: Record, baseline: Record) -> bool:
    return new.manifest.model.same_as(baseline.manifest.model)
