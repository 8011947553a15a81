"""Published tables with the measured numbers next to the printed ones, and why they may differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from robustbench_cure.evaluation.record import Record
from robustbench_cure.protocol.cards import PublishedCell, PublishedTable
from robustbench_cure.report.tables import labels
from robustbench_cure.report.wording import count
from robustbench_cure.stats import Rate

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Measurement:
    """One of our numbers for a printed one.

    Attributes:
        model: label of the model it was measured on.
        rate: accuracy as measured.
        difference: measured minus published, as a share (0.012 is 1.2 points); None if nothing is printed.
        reasons: why the two were not made by the same specification; empty: none is known.
    """

    model: str
    rate: Rate
    difference: float | None
    reasons: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether data, battery and number of samples are those of the table, as far as it states them."""
        return not self.reasons


@dataclass(frozen=True)
class PaperCell:
    """A printed number (None: the paper has none), and what was measured or why nothing was."""

    published: PublishedCell | None
    measurements: tuple[Measurement, ...]
    empty: str


@dataclass(frozen=True)
class PaperRow:
    """One printed row: a model, with a cell for each column of the table."""

    id: str
    name: str
    group: str
    cells: tuple[PaperCell, ...]


@dataclass(frozen=True)
class PaperTable:
    """A published table as printed: `columns` are (id, name) pairs, each row has a cell for each."""

    table: PublishedTable
    columns: tuple[tuple[str, str], ...]
    rows: tuple[PaperRow, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every reason of the table once, in order: the footnotes."""
        cells = (cell for row in self.rows for cell in row.cells)
        return tuple(dict.fromkeys(r for cell in cells for m in cell.measurements for r in m.reasons))


def paper_table(records: Record | Sequence[Record], table: PublishedTable) -> PaperTable:
    """Lay out a published table with every measurement that belongs to one of its cells.

    A record belongs to a row by its model's `published_row`, and to an attack's column by the attack's
    id. Records of a battery laid out as another table are left out, and where the battery of this table
    was run, so are attacks under another threat model and records that repeat a cell with another battery.
    """
    records = [records] if isinstance(records, Record) else list(records)
    named = list(zip(labels(records), records, strict=True))
    own = [record for _, record in named if record.manifest.battery.published == table.id]
    columns = tuple(dict.fromkeys(cell.column for cell in table.cells))
    names = {spec.id: spec.name for record in [*records, *own] for spec in record.attacks} | table.heads
    rows = []
    for row in table.rows:
        able = [
            (label, record)
            for label, record in named
            if record.manifest.model.published_row == row.id
            and record.manifest.battery.published in (table.id, "")
        ]
        rows.append(
            PaperRow(row.id, row.name, row.group, tuple(_cell(able, own, table, row.id, c) for c in columns))
        )
    return PaperTable(table, tuple((c, names.get(c, c)) for c in columns), tuple(rows))


def _cell(
    able: list[tuple[str, Record]], own: list[Record], table: PublishedTable, row: str, column: str
) -> PaperCell:
    published = table.cell(row, column)
    if able and column != "clean":
        able = [(label, r) for label, r in able if any(spec.id == column for spec in r.attacks)]
        if not able:
            return PaperCell(published, (), "the battery has no such attack")
        if own:
            threat = own[0].manifest.battery.threat
            able = [(n, r) for n, r in able if r.manifest.battery.threat == threat]
    first_hand = [(label, r) for label, r in able if r.manifest.battery.published == table.id]
    measured = tuple(_measure(n, r, table, published, column) for n, r in first_hand or able)
    return PaperCell(published, measured, "" if measured else NOT_MEASURED)


def _measure(
    label: str, record: Record, table: PublishedTable, published: PublishedCell | None, column: str
) -> Measurement:
    rate = record.clean_accuracy if column == "clean" else record.robust_accuracy(column)
    scale = 0.01 if table.unit == "%" else 1.0
    difference = rate.value - scale * published.value if published and rate.total else None
    return Measurement(label, rate, difference, reasons(record, table, rate.total, published))


def reasons(record: Record, table: PublishedTable, n: int, cell: PublishedCell | None) -> tuple[str, ...]:
    """Why a measured number and a printed one do not share their specification; empty if they may.

    Args:
        record: where the number was measured.
        table: where the other was printed.
        n: samples behind the measured number.
        cell: the printed number, if there is one.
    """
    manifest, differences = record.manifest, []
    data = manifest.data
    if cell is not None and cell.kind == "quoted":
        differences.append(
            "the paper quotes this number from elsewhere: another network, possibly another attack"
        )
    if data.name != table.dataset:
        differences.append(f"data set {data.name} instead of {table.dataset}")
    elif data.split != "test":
        differences.append(f"split {data.split}, not the test set")
    wanted = table.n or data.total
    if n < wanted:
        differences.append(f"{count(n)} of {count(wanted)} test images")
    if manifest.battery.published != table.id:
        differences.append(f"battery {manifest.battery.id} is not the one of this table")
    differences += [f"flag: {flag.about.title.lower()}" for flag in record.flags if flag.kind == "lossy_data"]
    if record.unreliable:
        differences.append("run flagged unreliable")
    if manifest.status != "complete":
        differences.append("run is partial")
    return tuple(dict.fromkeys(differences))


def tables_for(records: Sequence[Record], published: dict[str, PublishedTable]) -> list[PaperTable]:
    """The published tables that the batteries of these records are laid out as, in order."""
    wanted = dict.fromkeys(record.manifest.battery.published for record in records)
    return [paper_table(records, published[name]) for name in wanted if name in published]
