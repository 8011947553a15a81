"""Records to typed rows: pure functions, counts in, `Rate`s out. Nothing here knows of per cent or HTML.

Two denominators, never mixed. *Accuracy* is out of all samples a row covers, misclassified ones
included. *Success* is out of the samples an attack was given: those classified correctly without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from robustbench_cure.evaluation.audit import DRAWS
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.evaluation.record import Record
from robustbench_cure.protocol.cards import Battery
from robustbench_cure.protocol.identity import DataInfo
from robustbench_cure.protocol.specs import AttackSpec, DeepFool
from robustbench_cure.report.wording import spec_words
from robustbench_cure.stats import Rate
from robustbench_cure.threat import ThreatModel

if TYPE_CHECKING:
    import pandas as pd

SEVERITIES = ("unreliable", "warning", "note")


@dataclass(frozen=True)
class AccuracyRow:
    """Accuracy without an attack, under one attack, or under the worst attack for each sample.

    Attributes:
        kind: what the row is about.
        id: attack id, "clean", "audit" or "worst".
        name: as printed.
        spec: all hyper-parameters in words; empty for the worst case.
        limit: the attack covers the first `limit` samples, or so many were audited; 0: all.
        accuracy: correct (and not broken), out of the samples covered; of an audit: of those drawn.
        success: broken, out of the clean-correct samples attacked; None for the clean pass.
        only: samples no other attack of the battery broke; None unless an attack that was given all samples.
        distance: median distance of the broken images in the norm of the threat model, units of x.
        queries: mean forward plus backward passes for an attacked sample (clean: for a sample).
        seconds: time of the pass; None for the worst case.
        violations: candidates not admitted; None unless an attack.
        converged: ended by the attack's own criterion, out of the attacked; None if it has none.
    """

    kind: Literal["clean", "attack", "audit", "worst"]
    id: str
    name: str
    spec: str
    limit: int
    accuracy: Rate
    success: Rate | None = None
    only: int | None = None
    distance: float | None = None
    queries: float | None = None
    seconds: float | None = None
    violations: int | None = None
    converged: Rate | None = None


@dataclass(frozen=True)
class DistanceRow:
    """A minimal-norm attack: its product is a distance, not an accuracy at a radius.

    Attributes:
        converged: reached a boundary, out of the attacked samples.
        distance: median distance of the converged ones, in the norm of the threat model, units of x.
        accuracy: samples robust at the battery's radius: correct, and no adversarial image inside the ball.
        success: verified inside the ball, out of the attacked samples.
    """

    id: str
    name: str
    spec: str
    limit: int
    converged: Rate
    distance: float | None
    accuracy: Rate
    success: Rate
    only: int | None
    queries: float | None
    seconds: float | None
    violations: int
    kind: Literal["minimal"] = "minimal"


@dataclass(frozen=True)
class SummaryRow:
    """One model in one line.

    Attributes:
        label: name, made unique among the models shown together.
        deciding: name of the attack with the lowest robust accuracy among those that cover every sample
            (the first of equals), empty if nothing was broken. Attacks on a subset are compared only
            where there are no others. Of a cascade, its audit included: "most by" the one that broke most.
        flags: most severe first.
    """

    label: str
    record: Record
    clean: Rate
    worst: Rate
    deciding: str
    flags: tuple[Flag, ...]
    unreliable: bool
    partial: bool


@dataclass(frozen=True)
class Protocol:
    """Records of one battery on the same images: what may stand side by side."""

    battery: Battery
    threat: ThreatModel
    data: DataInfo
    summary: tuple[SummaryRow, ...]


def attack_rows(record: Record) -> list[AccuracyRow | DistanceRow]:
    """The clean pass, each attack in battery order, the audit, and the worst case over all of them."""
    cost = record.manifest.cost.get("clean")
    clean = AccuracyRow(
        "clean",
        "clean",
        "clean",
        "no attack",
        0,
        record.clean_accuracy,
        queries=(cost.forwards + cost.backwards) / record.n if cost and record.n else None,
        seconds=cost.seconds if cost else None,
    )
    worst = AccuracyRow(
        "worst", "worst", "worst case", "", 0, record.worst_case_accuracy, success=_worst_success(record)
    )
    only = {} if record.manifest.battery.cascade else only_this(record)
    rows = [_attack_row(record, spec, only.get(spec.id)) for spec in record.attacks]
    return [clean, *rows, *_audit_row(record), worst]


def accuracy_rows(record: Record) -> list[AccuracyRow]:
    """Those of `attack_rows` whose accuracy is a share of all samples: no minimal-norm attack, no audit."""
    rows = attack_rows(record)
    return [row for row in rows if isinstance(row, AccuracyRow) and row.kind != "audit"]


def _audit_row(record: Record) -> list[AccuracyRow]:
    """All attacks of the audit together, on the samples that it drew."""
    battery, audit = record.manifest.battery, record.audit
    if battery.audit is None or audit is None:
        return []
    table, specs = record.samples, battery.audit.attacks
    names = ["audit", *(spec.id for spec in specs)]
    costs = [record.manifest.cost[name] for name in names if name in record.manifest.cost]
    sampled = int((table[DRAWS] > 0).sum())
    robust = Rate(sampled - audit.lost, sampled)
    return [
        AccuracyRow(
            "audit",
            "audit",
            f"{battery.audit.name} audit",
            "; ".join(f"{spec.name}: {spec_words(spec, battery.threat)}" for spec in specs),
            sampled,
            robust,
            success=Rate(audit.lost, sampled),
            queries=sum(cost.forwards + cost.backwards for cost in costs) / sampled if sampled else None,
            seconds=sum(cost.seconds for cost in costs) if costs else None,
            violations=sum(int((table[f"{spec.id}.violation"].fillna("") != "").sum()) for spec in specs),
        )
    ]


def _attack_row(record: Record, spec: AttackSpec, only: int | None) -> AccuracyRow | DistanceRow:
    table, threat = record.samples, record.manifest.battery.threat
    attacked, broken = table[f"{spec.id}.attacked"], table[f"{spec.id}.broken"]
    passes = table.loc[attacked, [f"{spec.id}.forwards", f"{spec.id}.backwards"]].sum().sum()
    cost = record.manifest.cost.get(spec.id)
    has_criterion = isinstance(spec, DeepFool)
    converged = attacked & table[f"{spec.id}.converged"].fillna(False).astype(bool)
    common = {
        "id": spec.id,
        "name": spec.name,
        "spec": spec_words(spec, threat),
        "limit": spec.limit,
        "accuracy": record.robust_accuracy(spec.id),
        "success": record.success_rate(spec.id),
        "only": only,
        "queries": float(passes) / int(attacked.sum()) if attacked.any() else None,
        "seconds": cost.seconds if cost else None,
        "violations": int((table[f"{spec.id}.violation"].fillna("") != "").sum()),
    }
    share = Rate(int(converged.sum()), int(attacked.sum()))
    distances = table[f"{spec.id}.{threat.norm}"]
    if isinstance(spec, DeepFool) and spec.mode == "minimal":
        return DistanceRow(**common, converged=share, distance=_median(distances[converged]))  # type: ignore[arg-type]
    return AccuracyRow(
        "attack",
        **common,  # type: ignore[arg-type]
        distance=_median(distances[broken]),
        converged=share if has_criterion else None,
    )


def _median(values: pd.Series) -> float | None:
    known = values.dropna().astype("float64")
    return float(known.median()) if len(known) else None


def _worst_success(record: Record) -> Rate:
    correct = record.clean_correct
    return Rate(int((correct & ~record.worst_case).sum()), int(correct.sum()))


def only_this(record: Record) -> dict[str, int]:
    """How many samples each attack broke that no other attack of the battery did, by attack id."""
    broken = {spec.id: record.samples[f"{spec.id}.broken"] for spec in record.attacks}
    times = sum(column.astype("int64") for column in broken.values())
    return {name: int((column & (times == 1)).sum()) for name, column in broken.items()}


def summary(records: Sequence[Record]) -> list[SummaryRow]:
    """One row a model, in the order given."""
    rows = []
    for record, label in zip(records, labels(records), strict=True):
        flags = tuple(sorted(record.flags, key=lambda flag: SEVERITIES.index(flag.about.severity)))
        rows.append(
            SummaryRow(
                label,
                record,
                record.clean_accuracy,
                record.worst_case_accuracy,
                deciding_attack(record),
                flags,
                record.unreliable,
                record.manifest.status != "complete",
            )
        )
    return rows


def deciding_attack(record: Record) -> str:
    """Which attack decides the worst case, in words; see `SummaryRow`."""
    if record.manifest.battery.cascade:
        broken = {spec.name: int(record.samples[f"{spec.id}.broken"].sum()) for spec in record.every_attack}
        most = max(broken, key=lambda name: broken[name])
        return f"most by {most}" if broken[most] else ""
    whole = [spec for spec in record.attacks if int(record.covered(spec.id).sum()) == record.n]
    able = [spec for spec in whole or record.attacks if record.samples[f"{spec.id}.broken"].any()]
    return min(able, key=lambda spec: record.robust_accuracy(spec.id).value).name if able else ""


def labels(records: Sequence[Record]) -> list[str]:
    """Model names, made unique by the id and then by a number where two are equal."""
    names = [record.manifest.model.name or record.manifest.model.id for record in records]
    for attempt in range(2):
        twice = {name for name, n in Counter(names).items() if n > 1}
        count: Counter[str] = Counter()
        for i, name in enumerate(names):
            if name in twice:
                count[name] += 1
                names[i] = f"{name} ({records[i].manifest.model.id if attempt == 0 else count[name]})"
    return names


def protocols(records: Sequence[Record]) -> list[Protocol]:
    """Records grouped by battery and data, in order of first appearance."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        manifest = record.manifest
        groups.setdefault((manifest.battery_digest, manifest.data.digest), []).append(record)
    result = []
    for members in groups.values():
        first = members[0].manifest
        result.append(Protocol(first.battery, first.battery.threat, first.data, tuple(summary(members))))
    return result
