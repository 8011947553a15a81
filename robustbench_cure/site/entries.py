"""The leaderboard: entries by data set, split and threat model. Pure functions of records.

Numbers are compared within one *leaderboard* alone: one data set, one split, one threat model. What is
ranked is the best known number of each model, the lowest robust accuracy that evidence on its own weights
supports: the worst case, sample by sample, over every attack of every record, and over verified adversarial
examples of others. Published numbers are entries too, unranked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd

from robustbench_cure.evaluation.external import Evidence
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.evaluation.record import Record
from robustbench_cure.protocol.cards import PublishedCell, PublishedRow, PublishedTable
from robustbench_cure.protocol.identity import ModelInfo, known_tensors
from robustbench_cure.report.tables import SEVERITIES, deciding_attack
from robustbench_cure.report.wording import threat_words
from robustbench_cure.stats import Rate
from robustbench_cure.threat import ThreatModel

Kind = Literal["measured", "external", "published", "quoted"]


@dataclass(frozen=True)
class ReportedAccuracy:
    """A number of the leaderboard: counted, or printed; neither: `reason` says why there is none.

    Attributes:
        rate: as counted.
        printed: as a share, from a paper.
        reason: why there is no number.
    """

    rate: Rate | None = None
    printed: float | None = None
    reason: str = ""

    @property
    def value(self) -> float | None:
        """The accuracy as a share in [0, 1]; None where there is none."""
        return self.rate.value if self.rate is not None and self.rate.total else self.printed


@dataclass(frozen=True)
class Entry:
    """One row of a leaderboard.

    Attributes:
        kind: where the number comes from.
        rank: among the models of the leaderboard; 0: not ranked, see `unranked`.
        unranked: why not.
        label: name of the model.
        model_id: id of its card; empty for published rows.
        robust: lowest robust accuracy known.
        how: what that number is, in words.
        clean: accuracy without an attack.
        n: samples; 0: not stated.
        decided: the attack under which alone the accuracy is lowest.
        architecture: as recorded or printed.
        extra_data: training data beyond the data set's own; empty: not declared.
        date: of the measurement, ISO; empty: none.
        flags: of the records, severest first, one of each kind and evidence.
        records: what it was measured from; empty for published rows.
        group: number of the model in `by_model`; -1 for published rows.
        tables: ids of the published tables it was printed in.
    """

    kind: Kind
    label: str
    robust: ReportedAccuracy
    how: str
    clean: ReportedAccuracy
    n: int
    decided: str
    architecture: str
    model_id: str = ""
    extra_data: str = ""
    date: str = ""
    flags: tuple[Flag, ...] = ()
    records: tuple[Record, ...] = ()
    group: int = -1
    tables: tuple[str, ...] = ()
    rank: int = 0
    unranked: str = ""

    @property
    def unreliable(self) -> bool:
        """Whether a flag says that these numbers cannot be compared."""
        return any(flag.about.severity == "unreliable" for flag in self.flags)

    @property
    def model(self) -> ModelInfo | None:
        """Who was measured; None for published rows."""
        return self.records[0].manifest.model if self.records else None

    @property
    def weights(self) -> str:
        """SHA-256 of the weights; empty for published rows."""
        return self.model.weights_sha256 if self.model else ""

    def is_of(self, records: Sequence[Record]) -> bool:
        """Whether it was measured from some of these records, which are all that one model has."""
        return any(own is record for own in self.records for record in records)


@dataclass(frozen=True)
class Leaderboard:
    """Rows that may be compared: one data set, one split, one threat model."""

    data: str
    split: str
    threat: ThreatModel
    rows: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """Data set and threat model in words, ``"cifar10, l∞ 8/255"``."""
        part = "" if self.split == "test" else f" ({self.split})"
        return f"{self.data}{part}, {threat_words(self.threat)}"

    @property
    def key(self) -> str:
        """The name for addresses: letters, digits and hyphens."""
        text = f"{self.data}-{self.split}-{self.threat}"
        return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())


def leaderboards(
    records: Sequence[Record],
    external: Sequence[Evidence] = (),
    published: Sequence[PublishedTable] = (),
    extra_data: Callable[[Record], str] = lambda _: "",
) -> list[Leaderboard]:
    """The leaderboards; those with measurements come first, then by data set and radius.

    Args:
        records: finished runs.
        external: verified adversarial examples.
        published: printed tables; those without a threat model or not in per cent are left out.
        extra_data: what is declared of a record's model.
    """
    complete(records, external)
    places: dict[tuple[str, str, ThreatModel], list[Entry]] = {}
    for (group, _), members in _groups(records).items():
        data, threat = members[0].manifest.data, members[0].manifest.battery.threat
        rows = _measured(members, group, external, extra_data(members[0]))
        places.setdefault((data.name, data.split, threat), []).extend(rows)
    for (dataset, threat), entries in _published(published).items():
        places.setdefault((dataset, "test", threat), []).extend(entries)
    ranked = [Leaderboard(*place, tuple(_ranked(rows))) for place, rows in places.items()]
    return sorted(ranked, key=lambda b: (not any(r.records for r in b.rows), b.data, b.split, b.threat.eps))


def complete(records: Sequence[Record], external: Sequence[Evidence] = ()) -> None:
    """Give models without a digest of tensors that of their weights file, in place; see `known_tensors`."""
    holders = [record.manifest for record in records] + [evidence.submission for evidence in external]
    known = known_tensors(holder.model for holder in holders)
    for holder in holders:
        model = holder.model
        if not model.tensors_sha256 and model.weights_sha256 in known:
            update = {"tensors_sha256": known[model.weights_sha256]}
            holder.model = model.model_copy(update=update)


def by_model(records: Sequence[Record]) -> list[list[Record]]:
    """Records put together by the model they are of, in order of the first of each.

    In a group the record that says most of the model comes first. An older record has no answers, and agrees
    with every function of its weights: it joins them where there is only one, and else stands alone.
    """
    complete(records)
    place = {id(record): k for k, record in enumerate(records)}
    groups: list[list[Record]] = []
    for record in sorted(records, key=lambda r: _says_least(r.manifest.model)):
        model = record.manifest.model
        own = [g for g in groups if all(r.manifest.model.same_as(model) for r in g)]
        if own and (model.answers or len(own) == 1):
            own[0].append(record)
        else:
            groups.append([record])
    return sorted(groups, key=lambda group: min(place[id(record)] for record in group))


def _says_least(model: ModelInfo) -> tuple[bool, bool]:
    return not model.answers, model.source != "card"


def _groups(records: Sequence[Record]) -> dict[tuple[int, object], list[Record]]:
    """Records of the same model on the same images under the same threat model: one body of evidence.

    By the model's number in `by_model`, and what tells images and threat models apart.
    """
    groups: dict[tuple[int, object], list[Record]] = {}
    for number, members in enumerate(by_model(records)):
        for record in members:
            m = record.manifest
            terms = (m.data.name, m.data.split, m.data.digest, m.battery.threat)
            groups.setdefault((number, terms), []).append(record)
    return groups


def joined(records: Sequence[Record]) -> pd.Series:
    """Samples that no attack of any of these records of one group broke; bool."""
    # One digest of the data: the same samples in the same order.
    robust = records[0].worst_case
    for record in records[1:]:
        robust = robust & record.worst_case
    return robust


def _measured(
    records: list[Record], group: int, external: Sequence[Evidence], extra_data: str
) -> list[Entry]:
    robust = joined(records)
    by_power = [(r.robust_accuracy(s.id).value, r, s) for r in records for s in r.attacks]
    attacks = {s.model_dump_json(exclude={"id", "name"}) for _, _, s in by_power}
    batteries = dict.fromkeys(f"{r.manifest.battery.id} v{r.manifest.battery.version}" for r in records)
    strongest = min(records, key=lambda r: r.worst_case_accuracy.value)
    model, data = records[0].manifest.model, records[0].manifest.data
    flags = {(f.kind, f.attack, f.evidence): f for r in records for f in r.flags}
    row = Entry(
        kind="measured",
        label=model.name or model.id,
        model_id=model.id,
        robust=ReportedAccuracy(Rate(int(robust.sum()), len(robust))),
        how=f"worst case of {len(attacks)} attack{'s' * (len(attacks) != 1)}, {' + '.join(batteries)}",
        clean=ReportedAccuracy(records[0].clean_accuracy),
        n=data.n,
        decided=deciding_attack(strongest),
        architecture=model.architecture,
        extra_data=extra_data,
        date=max(r.manifest.finished[:10] for r in records),
        flags=tuple(sorted(flags.values(), key=lambda f: SEVERITIES.index(f.about.severity))),
        records=tuple(records),
        group=group,
    )
    theirs = [e for e in external if e.applies_to(records[0])]
    left = robust.copy()
    for evidence in theirs:
        left &= ~evidence.breaks(records[0]).to_numpy(dtype=bool)
    if left.sum() == robust.sum():
        return [row]
    names = dict.fromkeys(e.submission.source or e.submission.file for e in theirs)
    lowered = replace(
        row,
        kind="external",
        robust=ReportedAccuracy(Rate(int(left.sum()), len(left))),
        how=f"with verified images of others; {100 * row.robust.rate.value:.1f} % by our own attacks"
        if row.robust.rate
        else "",
        decided="; ".join(names),
        date=max(e.submission.checked[:10] for e in theirs),
    )
    return [lowered, replace(row, unranked="other people's images are stronger: see the external row")]


def _published(tables: Sequence[PublishedTable]) -> dict[tuple[str, ThreatModel], list[Entry]]:
    """Printed rows by data set and threat model; a row of several tables counts once: its lowest."""
    places: dict[tuple[str, ThreatModel], dict[str, list[tuple[PublishedTable, PublishedRow]]]] = {}
    for table in tables:
        if table.threat is not None and table.unit == "%":
            rows = places.setdefault((table.dataset, table.threat), {})
            for row in table.rows:
                rows.setdefault(row.id, []).append((table, row))
    return {place: [_printed(printed) for printed in rows.values()] for place, rows in places.items()}


def _printed(printed: list[tuple[PublishedTable, PublishedRow]]) -> Entry:
    row = printed[0][1]
    cells: list[tuple[PublishedTable, PublishedCell]] = [
        (table, cell) for table, _ in printed for cell in table.cells if cell.row == row.id
    ]
    clean = next((cell for _, cell in cells if cell.column == "clean"), None)
    attacked = [(table, cell) for table, cell in cells if cell.column != "clean"]
    table, lowest = min(attacked, key=lambda pair: pair[1].value) if attacked else (printed[0][0], None)
    name = table.heads.get(lowest.column, lowest.column) if lowest else ""
    quoted = lowest is not None and lowest.kind == "quoted"
    return Entry(
        kind="quoted" if quoted else "published",
        label=f"{row.group}, {row.name}",
        robust=ReportedAccuracy(printed=lowest.value / 100, reason="")
        if lowest
        else ReportedAccuracy(reason="none is printed"),
        how="; ".join(part for part in (_how(len(attacked), quoted), row.note) if part),
        clean=ReportedAccuracy(printed=clean.value / 100)
        if clean
        else ReportedAccuracy(reason="none is printed"),
        n=table.n,
        decided=name,
        architecture=row.group,
        extra_data=row.extra_data,
        tables=tuple(dict.fromkeys(t.id for t, _ in printed)),
        unranked="published, not measured here",
    )


def _how(printed: int, quoted: bool) -> str:
    lowest = f"lowest of {printed} printed" if printed > 1 else "as printed"
    return f"{lowest}, from another paper" if quoted else lowest


def _ranked(rows: Sequence[Entry]) -> list[Entry]:
    """Highest robust accuracy first, what cannot be compared last; equal numbers share a rank."""

    def reason(row: Entry) -> str:
        if row.unranked:
            return row.unranked
        if row.unreliable:
            return "flagged unreliable: these numbers cannot be compared"
        if any(other.group == row.group and other.n > row.n for other in rows):
            return "the same model was measured on more samples"
        return ""

    # What an external row lowered stands right below it, not where its own number would put it.
    lowered = [row for row in rows if row.kind == "external"]

    def height(row: Entry) -> float:
        own = [other for other in lowered if other.group == row.group and other.n == row.n]
        return (own[0] if own else row).robust.value or 0.0

    noted = [replace(row, unranked=reason(row)) for row in rows]
    order = sorted(noted, key=lambda r: (r.unreliable, -height(r), r.label, r.n, r.kind))
    able = [row for row in order if not row.unranked]
    values = [row.robust.value for row in able]
    return [row if row.unranked else replace(row, rank=1 + values.index(row.robust.value)) for row in order]
