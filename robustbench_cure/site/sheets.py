"""The tables of the site as sheets, for their CSV, JSON, Markdown and LaTeX twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robustbench_cure.report.paper import PaperCell, PaperTable
from robustbench_cure.report.provenance import Fact
from robustbench_cure.report.sheet import Sheet
from robustbench_cure.report.wording import count, interval, number, points
from robustbench_cure.site.standings import Accuracy, Board, Standing
from robustbench_cure.threat import format_eps

WHOSE = {"measured": "the paper's own", "quoted": "quoted there from elsewhere"}
NOTE = (
    "Accuracy in % of all samples, measured ones with 95 % Wilson intervals. Robust accuracy is the lowest "
    "number known: per sample the worst case over all attacks; published numbers are not ranked"
)


def leaderboard(board: Board) -> Sheet:
    """One board, every column."""
    heads = ("Model", "Rank", "Robust", "Clean", "n", "Decided by", "Architecture", "Extra data", "Date")
    rows = tuple(
        (
            name(row),
            str(row.rank or "–"),
            accuracy(row.robust),
            accuracy(row.clean),
            count(row.n) if row.n else "not stated",
            row.decided or "–",
            row.architecture,
            row.extra_data or "not declared",
            row.date or "–",
            row.kind,
        )
        for row in board.rows
    )
    return Sheet(board.name, NOTE, (*heads, "Number"), rows, tuple(_standing(board, r) for r in board.rows))


def name(row: Standing) -> str:
    """The label, with the flags that forbid a comparison."""
    return row.label + (" (unreliable)" if row.unreliable else "")


def accuracy(value: Accuracy) -> str:
    """A number as printed in a text table."""
    if value.rate is not None:
        return f"{number(value.rate)} {interval(value.rate)}"
    return f"{100 * value.printed:.1f}" if value.printed is not None else "–"


def _standing(board: Board, row: Standing) -> dict[str, Any]:
    return {
        "dataset": board.data,
        "split": board.split,
        "norm": board.threat.norm,
        "eps": format_eps(board.threat.eps),
        "rank": row.rank or None,
        "unranked": row.unranked,
        "model": row.label,
        "model_id": row.model_id,
        "number": row.kind,
        "how": row.how,
        **_accuracy("robust", row.robust),
        **_accuracy("clean", row.clean),
        "n": row.n or None,
        "decided_by": row.decided,
        "architecture": row.architecture,
        "extra_data": row.extra_data,
        "date": row.date,
        "flags": " ".join(sorted({flag.kind for flag in row.flags})),
        "unreliable": row.unreliable,
        "weights_sha256": row.weights,
        "tables": " ".join(row.tables),
    }


def _accuracy(prefix: str, value: Accuracy) -> dict[str, Any]:
    low, high = value.rate.interval if value.rate is not None and value.rate.total else (None, None)
    return {
        prefix: value.value,
        f"{prefix}_count": value.rate.count if value.rate is not None else None,
        f"{prefix}_low": low,
        f"{prefix}_high": high,
    }


def paper(laid: PaperTable) -> Sheet:
    """A paper's table as printed, ours beside it."""
    unit = " in %" if laid.table.unit == "%" else ""
    heads = ["Network", "Training"]
    for _, column in laid.columns:
        heads += [f"{column}, paper", "ours", "difference", "same?"]
    rows, data = [], []
    for row in laid.rows:
        cells = [row.group, row.name]
        for (column, _), cell in zip(laid.columns, row.cells, strict=True):
            cells += _printed(cell)
            data += _cell_data(laid, row.id, column, cell)
        rows.append(tuple(cells))
    note = (
        f"{laid.table.paper}. Published beside measured{unit}, measured with 95 % Wilson intervals; q: quoted"
    )
    return Sheet(laid.table.title, note, tuple(heads), tuple(rows), tuple(data))


def _printed(cell: PaperCell) -> list[str]:
    quoted = " q" if cell.published is not None and cell.published.kind == "quoted" else ""
    printed = f"{cell.published.value}{quoted}" if cell.published is not None else "–"
    if not cell.measurements:
        return [printed, cell.empty, "–", "–"]
    ours = "; ".join(f"{number(m.rate)} {interval(m.rate)}" for m in cell.measurements)
    by = "; ".join("–" if m.difference is None else points(m.difference) for m in cell.measurements)
    return [printed, ours, by, "; ".join("same" if m.same else "no" for m in cell.measurements)]


def _cell_data(laid: PaperTable, row: str, column: str, cell: PaperCell) -> list[dict[str, Any]]:
    common = {
        "table": laid.table.id,
        "row": row,
        "column": column,
        "unit": laid.table.unit,
        "published": cell.published.value if cell.published else None,
        "kind": cell.published.kind if cell.published else "",
        "locator": cell.published.locator if cell.published else "",
    }
    nothing = dict.fromkeys(("model", "count", "n", "measured", "low", "high", "difference", "same"))
    if not cell.measurements:
        return [{**common, **nothing, "reasons": cell.empty}]
    found = []
    for m in cell.measurements:
        low, high = m.rate.interval
        found.append(
            {
                **common,
                "model": m.model,
                "count": m.rate.count,
                "n": m.rate.total,
                "measured": m.rate.value,
                "low": low,
                "high": high,
                "difference": m.difference,
                "same": m.same,
                "reasons": "; ".join(m.reasons),
            }
        )
    return found


def sources(laid: PaperTable) -> Sheet:
    """Where each number of a paper's table is printed."""
    names = dict(laid.columns)
    cells = laid.table.cells
    rows = tuple((c.locator, names[c.column], f"{c.value}", WHOSE[c.kind]) for c in cells)
    data = tuple(c.model_dump(mode="json") for c in cells)
    return Sheet("Sources", laid.table.specification, ("Place", "Column", "Printed", "Whose"), rows, data)


def provenance(groups: Sequence[tuple[str, Sequence[Fact]]]) -> list[Sheet]:
    """Where the numbers of a model come from, one sheet a protocol."""
    sheets = []
    for title, facts in groups:
        rows = tuple((fact.name, "; ".join(dict.fromkeys(fact.values))) for fact in facts)
        data = tuple(
            {"protocol": title, "name": fact.name, "value": "; ".join(dict.fromkeys(fact.values))}
            for fact in facts
        )
        sheets.append(Sheet(f"Provenance: {title}", "", ("Fact", "Value"), rows, data))
    return sheets
