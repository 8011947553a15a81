"""Two records side by side: may they be compared, and what changed?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from robustbench_cure.cards import Battery
from robustbench_cure.gate.paired import Flips
from robustbench_cure.gate.verdict import Row, Rules, Verdict, conclude, judge_rows
from robustbench_cure.record import Record


@dataclass(frozen=True)
class Comparison:
    """One model, now and before.

    Attributes:
        model: its id.
        new: the record under test.
        baseline: what it is held against.
        rows: every accuracy; empty where they cannot be compared.
        verdict: what it comes to.
        notes: what differs without hindering the comparison.
    """

    model: str
    new: Record
    baseline: Record
    rows: tuple[Row, ...]
    verdict: Verdict
    notes: tuple[str, ...]


def compare(new: Record, baseline: Record, rules: Rules) -> Comparison:
    """Hold a record against another one, sample by sample.

    Args:
        new: a finished run.
        baseline: a finished run of the same protocol; of its samples those that both have are compared.
        rules: what is tolerated.
    """
    model = new.manifest.model.id
    reasons = hindrances(new, baseline)
    if reasons:
        return Comparison(model, new, baseline, (), conclude([], rules, reasons), ())
    rows = judge_rows(_flips(new, baseline), rules)
    return Comparison(model, new, baseline, tuple(rows), conclude(rows, rules), tuple(_notes(new, baseline)))


def hindrances(new: Record, baseline: Record) -> list[str]:
    """Why two records cannot be compared, in words; empty: they can."""
    found = []
    for name, record in (("the new run", new), ("the baseline", baseline)):
        if record.unreliable:
            kinds = sorted({f.kind for f in record.manifest.flags if f.about.severity == "unreliable"})
            found.append(f"{name} is flagged unreliable: {', '.join(kinds)}")
    if new.manifest.battery_digest != baseline.manifest.battery_digest:
        parts = battery_differences(new.manifest.battery, baseline.manifest.battery)
        found.append(
            f"the battery differs ({new.manifest.battery_digest[:8]} now, "
            f"{baseline.manifest.battery_digest[:8]} before): {'; '.join(parts) or 'in its text'}"
        )
    found += _other_data(new, baseline)
    return found


def battery_differences(new: Battery, baseline: Battery) -> list[str]:
    """What differs between two batteries: ``pgd20.steps 2 now, 20 before``."""
    attacks = [{spec.id for spec in battery.attacks} for battery in (new, baseline)]
    both = attacks[0] & attacks[1]
    a, b = (
        _flat({**battery.model_dump(mode="json"), "attacks": _of(battery, both)})
        for battery in (new, baseline)
    )
    silent = ("name", "notes", "source")
    only = [(attacks[0] - both, "only now"), (attacks[1] - both, "only before")]
    return [f"attack {name} {when}" for names, when in only for name in sorted(names)] + [
        f"{key} {a.get(key, 'absent')} now, {b.get(key, 'absent')} before"
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key) and key.rpartition(".")[2] not in silent
    ]


def _of(battery: Battery, ids: set[str]) -> list[dict[str, object]]:
    return [spec.model_dump(mode="json") for spec in battery.attacks if spec.id in ids]


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Nested tables as dotted keys; attacks by their ids instead of their places."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list) and all(isinstance(item, dict) and "id" in item for item in value):
        return {k: v for item in value for k, v in _flat(item, str(item["id"])).items()}
    else:
        return {prefix: value}
    return {
        k: v for key, item in pairs for k, v in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _other_data(new: Record, baseline: Record) -> list[str]:
    a, b = new.manifest.data, baseline.manifest.data
    ids = set(new.samples["sample_id"]) & set(baseline.samples["sample_id"])
    if not ids:
        return [f"no sample is in both: {a.name} {a.split} now, {b.name} {b.split} before"]
    columns = ["sample_id", "image_sha256", "label"]
    both = new.samples[columns].merge(baseline.samples[columns], on="sample_id", suffixes=("", "_before"))
    images = int((both["image_sha256"] != both["image_sha256_before"]).sum())
    labels = int((both["label"] != both["label_before"]).sum())
    found = []
    if images:
        found.append(f"{images} of {len(both)} samples have other pixels than before (image_sha256 differs)")
    if labels:
        found.append(f"{labels} of {len(both)} samples have another label than before")
    return found


def _flips(new: Record, baseline: Record) -> list[tuple[str, Literal["clean", "attack", "worst"], Flips]]:
    a, b = new.samples.set_index("sample_id"), baseline.samples.set_index("sample_id")
    ids = [name for name in a.index if name in b.index]
    held: list[tuple[str, Literal["clean", "attack", "worst"], Flips]] = [
        ("clean accuracy", "clean", _between(baseline, new, baseline.clean_correct, new.clean_correct, ids))
    ]
    for spec in new.attacks:
        before, after = (r.clean_correct & ~r.samples[f"{spec.id}.broken"] for r in (baseline, new))
        covered = set(_ids(new, new.covered(spec.id))) & set(_ids(baseline, baseline.covered(spec.id)))
        common = [name for name in ids if name in covered]
        held.append((spec.name, "attack", _between(baseline, new, before, after, common)))
    worst = _between(baseline, new, baseline.worst_case, new.worst_case, ids)
    return [*held, ("worst case", "worst", worst)]


def _between(baseline: Record, new: Record, before: pd.Series, after: pd.Series, ids: Sequence[str]) -> Flips:
    a, b = (
        pd.Series(np.asarray(series, dtype=bool), index=record.samples["sample_id"]).loc[list(ids)]
        for record, series in ((baseline, before), (new, after))
    )
    return Flips.between(a.to_numpy(), b.to_numpy())


def _ids(record: Record, rows: pd.Series) -> list[str]:
    return [str(name) for name in record.samples["sample_id"][rows]]


def _notes(new: Record, baseline: Record) -> list[str]:
    """Differences that do not hinder: they are within what the tests allow for, or wanted."""
    a, b = new.manifest, baseline.manifest
    pairs = (
        ("model", a.model.id, b.model.id),
        ("weights", a.model.weights_sha256[:8], b.model.weights_sha256[:8]),
        ("seed", a.config.seed, b.config.seed),
        ("precision of the search", a.config.precision, b.config.precision),
        ("device", a.environment.device_name, b.environment.device_name),
        ("version", a.environment.version, b.environment.version),
        ("torch", a.environment.torch, b.environment.torch),
        ("samples", new.n, baseline.n),
    )
    return [f"{name}: {now} now, {before} before" for name, now, before in pairs if now != before]
