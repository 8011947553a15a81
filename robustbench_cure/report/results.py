"""The results of records as tables: a row a model and attack for programs, a row a model for readers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robustbench_cure.evaluation.record import Record
from robustbench_cure.report.table import Cell, Column, Table
from robustbench_cure.report.tables import (
    AccuracyRow,
    DistanceRow,
    Protocol,
    SummaryRow,
    accuracy_rows,
    attack_rows,
    labels,
    protocols,
)
from robustbench_cure.report.wording import count, data_words, interval, number, threat_words
from robustbench_cure.stats import Rate
from robustbench_cure.threat import format_eps


def attack_table(records: Sequence[Record]) -> Table:
    """A row a model and attack, clean and worst case included: counts, rates in [0, 1], intervals.

    It is for programs: it has data and no printed columns. None stands where there is no number.
    """
    data = [
        _attack(record, label, row)
        for record, label in zip(records, labels(records), strict=True)
        for row in attack_rows(record)
    ]
    return Table("Attacks", "", (), (), tuple(data))


def protocol_tables(records: Sequence[Record]) -> list[Table]:
    """A table for each protocol: models down, attacks across, accuracy with its interval, flags."""
    return [_protocol(protocol) for protocol in protocols(records)]


def _attack(record: Record, label: str, row: AccuracyRow | DistanceRow) -> dict[str, Any]:
    m = record.manifest
    return {
        "model": m.model.id,
        "label": label,
        "battery": m.battery.id,
        "battery_version": m.battery.version,
        "norm": m.battery.threat.norm,
        "eps": format_eps(m.battery.threat.eps),
        "dataset": m.data.name,
        "split": m.data.split,
        "attack": row.id,
        "kind": row.kind,
        **_rate("", row.accuracy),
        **_rate("success_", row.success),
        "only_this_attack": row.only,
        "median_distance": row.distance,
        **_rate("converged_", row.converged),
        "passes_per_sample": row.queries,
        "seconds": row.seconds,
        "violations": row.violations,
        "flags": " ".join(sorted({flag.kind for flag in record.flags})),
        **_audited(record),
        "unreliable": record.unreliable,
        "status": m.status,
        "seed": m.config.seed,
        "weights_sha256": m.model.weights_sha256,
        "battery_digest": m.battery_digest,
        "data_digest": m.data.digest,
    }


def _audited(record: Record) -> dict[str, Any]:
    """What the audit found, on every row: draws, those broken, and the bound as a share of all samples."""
    audit = record.audit
    if audit is None:
        return dict.fromkeys(("audit_draws", "audit_broken", "audit_bound"))
    bound = audit.bound if audit.draws else None
    return {"audit_draws": audit.draws, "audit_broken": audit.broken, "audit_bound": bound}


def _rate(prefix: str, rate: Rate | None) -> dict[str, Any]:
    names = ("count", "n", "rate", "low", "high")
    values: tuple[Any, ...] = (None,) * 5
    if rate is not None and rate.total:
        values = (rate.count, rate.total, rate.value, *rate.interval)
    elif rate is not None:
        values = (0, 0, None, None, None)
    return {prefix + name: value for name, value in zip(names, values, strict=True)}


def _protocol(protocol: Protocol) -> Table:
    data = protocol.data
    note = (
        f"Threat model {threat_words(protocol.threat)}; data {data_words(data)}"
        + (f" ({data.notes})" if data.notes else "")
        + ". Accuracy in % of all samples, with 95 % Wilson intervals; the worst case is per sample."
    )
    audits = [
        f"{line.label}: {line.record.audit.words}"
        for line in protocol.summary
        if line.record.audit is not None
    ]
    note += "".join(f" {words}." for words in audits)
    attacks = [
        Column(row.name, note=f"n = {count(row.accuracy.total)}" if row.limit else "")
        for row in accuracy_rows(protocol.summary[0].record)
    ]
    return Table(
        protocol.battery.name,
        note,
        (Column("Model", "left", "text"), *attacks, Column("Flags", "left", "text", in_latex=False)),
        tuple(_model(line) for line in protocol.summary),
        unreliable=frozenset(i for i, line in enumerate(protocol.summary) if line.unreliable),
    )


def _model(line: SummaryRow) -> tuple[str | Cell, ...]:
    rates = [row.accuracy for row in accuracy_rows(line.record)]
    flags = list(dict.fromkeys(flag.kind for flag in line.flags))
    flags += ["partial run"] if line.partial else []
    return (line.label, *(Cell(number(rate), interval(rate)) for rate in rates), ", ".join(flags))
