"""The tables of the site, for its CSV, JSON, Markdown and LaTeX files, and for a README."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from robustbench_cure.errors import UsageError
from robustbench_cure.files import write_text
from robustbench_cure.report.paper import PaperCell, PaperTable
from robustbench_cure.report.provenance import Fact
from robustbench_cure.report.table import Table, columns, markdown, to_markdown
from robustbench_cure.report.wording import count, interval, number, points, quantity
from robustbench_cure.site.entries import Entry, Leaderboard, ReportedAccuracy
from robustbench_cure.threat import format_eps

WHOSE = {"measured": "the paper's own", "quoted": "quoted there from elsewhere"}
#: How a rank is read, in two sentences.
RANKS = (
    "A rank is an interval: its best end counts the models that are significantly more robust, plus one, its "
    "worst end all models that are not significantly less robust. Significant is what the exact two-sided "
    "McNemar test finds on the shared images, with Holm's correction over all pairs of the table at 5 %."
)
NOTE = (
    "Accuracy in % of all samples, measured ones with 95 % Wilson intervals; SE: standard error of the "
    "robust accuracy in points. Robust accuracy is the worst case over all attacks, sample by sample"
)
#: Lines of a README between which the leaderboard is written.
BEGIN, END = "<!-- leaderboard: written by cure-bench site --readme -->", "<!-- end of leaderboard -->"
README_NOTE = (
    "Accuracy in % of all images, with 95 % intervals. Robust: the worst case, image by image, over all "
    "attacks; SE: its standard error in points; audit: by how many points full AutoAttack would lower it at "
    f"most, with 95 % confidence. {RANKS}"
)


def leaderboard_table(leaderboard: Leaderboard) -> Table:
    """One leaderboard with every column."""
    shown = (
        "Model",
        "Rank",
        "Robust",
        "SE",
        "Clean",
        "n",
        "Audit",
        "Decided by",
        "Architecture",
        "Parameters",
    )
    more = ("Extra data", "Passes an image", "Seconds", "Share of the gradient rate", "Date", "Number")
    rows = tuple(
        (
            name(row),
            row.rank or "–",
            accuracy(row.robust),
            standard_error(row),
            accuracy(row.clean),
            count(row.n) if row.n else "not stated",
            audit(row),
            row.decided or "–",
            row.architecture,
            count(row.parameters) if row.parameters else "–",
            row.extra_data or "not declared",
            quantity(row.cost.passes) if row.cost else "–",
            quantity(row.cost.seconds) if row.cost else "–",
            share(row),
            row.date or "–",
            row.kind,
        )
        for row in leaderboard.rows
    )
    return Table(
        leaderboard.name,
        f"{NOTE}; {leaderboard.note}" if leaderboard.note else f"{NOTE}. {RANKS}",
        columns(*shown, *more),
        rows,
        tuple(_entry(leaderboard, r) for r in leaderboard.rows),
    )


def pairs_table(leaderboard: Leaderboard) -> Table:
    """Every two ranked models of a leaderboard: how many samples only one withstands, and the p-values."""
    heads = ("Model", "and model", "only the first", "only the second", "p", "p, Holm", "separable")
    data = tuple(
        {
            "leaderboard": leaderboard.name,
            "first": pair.first.label,
            "first_weights_sha256": pair.first.weights,
            "second": pair.second.label,
            "second_weights_sha256": pair.second.weights,
            "n": pair.counts.n,
            "first_only": pair.counts.lost,
            "second_only": pair.counts.gained,
            "p": pair.p,
            "p_holm": pair.adjusted,
            "separable": pair.separable,
        }
        for pair in leaderboard.pairs
    )
    rows = tuple(
        (
            pair.first.label,
            pair.second.label,
            count(pair.counts.lost),
            count(pair.counts.gained),
            f"{pair.p:.2g}",
            f"{pair.adjusted:.2g}",
            "yes" if pair.separable else "no",
        )
        for pair in leaderboard.pairs
    )
    note = (
        "Samples that stand in one of two models only; exact two-sided McNemar test, which allows for what "
        "audits leave open, with Holm's correction over all pairs of the table, 5 %"
    )
    return Table(leaderboard.name, note, columns(*heads), rows, data)


def name(row: Entry) -> str:
    """The label, with the flags that forbid a comparison."""
    return row.label + (" (unreliable)" if row.unreliable else "")


def accuracy(value: ReportedAccuracy) -> str:
    """A number as printed in a text table."""
    if value.rate is not None:
        return f"{number(value.rate)} {interval(value.rate)}"
    return f"{100 * value.printed:.1f}" if value.printed is not None else "–"


def standard_error(row: Entry) -> str:
    """Of the robust accuracy in points, ``"2.1"``."""
    return "–" if row.standard_error is None else f"{100 * row.standard_error:.1f}"


def audit(row: Entry) -> str:
    """Points by which AutoAttack would lower the number at most, ``"≤ 0.6"``, or ``"full"``."""
    if row.audit is None:
        return "–"
    # Rounded up: a bound must not be printed smaller than it is.
    return f"≤ {ceil(1000 * row.audit.bound - 1e-9) / 10:.1f}" if row.audit.bound else "full"


def share(row: Entry) -> str:
    """Share of the raw gradient rate in per cent, ``"64 %"``."""
    return "–" if row.cost is None or row.cost.share is None else f"{100 * row.cost.share:.0f} %"


def _entry(leaderboard: Leaderboard, row: Entry) -> dict[str, Any]:
    return {
        "dataset": leaderboard.data,
        "split": leaderboard.split,
        "norm": leaderboard.threat.norm,
        "eps": format_eps(leaderboard.threat.eps),
        "data_digest": leaderboard.digest,
        "protocol": leaderboard.protocol,
        "rank": row.rank or None,
        "rank_low": row.rank_low or None,
        "rank_high": row.rank_high or None,
        "not_separable_from": "; ".join(leaderboard.tied_with(row)),
        "unranked": row.unranked,
        "model": row.label,
        "model_id": row.model_id,
        "number": row.kind,
        "how": row.how,
        **_accuracy("robust", row.robust),
        "robust_standard_error": row.standard_error,
        **_accuracy("clean", row.clean),
        "n": row.n or None,
        "audit": row.audit.words if row.audit else "",
        "audit_draws": row.audit.draws if row.audit else None,
        "audit_broken": row.audit.broken if row.audit else None,
        "audit_bound": row.audit.bound if row.audit else None,
        "published_autoattack": row.named.get("AutoAttack"),
        "published_external": row.named.get("External"),
        "decided_by": row.decided,
        "architecture": row.architecture,
        "parameters": row.parameters or None,
        "extra_data": row.extra_data,
        "passes_per_image": row.cost.passes if row.cost else None,
        "seconds": row.cost.seconds if row.cost else None,
        "gradient_rate_share": row.cost.share if row.cost else None,
        "date": row.date,
        "flags": " ".join(sorted({flag.kind for flag in row.flags})),
        "unreliable": row.unreliable,
        "weights_sha256": row.weights,
        "tables": " ".join(row.tables),
    }


def _accuracy(prefix: str, value: ReportedAccuracy) -> dict[str, Any]:
    low, high = value.rate.interval if value.rate is not None and value.rate.total else (None, None)
    return {
        prefix: value.value,
        f"{prefix}_count": value.rate.count if value.rate is not None else None,
        f"{prefix}_low": low,
        f"{prefix}_high": high,
    }


def paper_comparison(laid: PaperTable) -> Table:
    """A paper's table as printed, with our measurements in columns of their own."""
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
    note = f"{laid.table.paper}. Published and measured{unit}, measured with 95 % Wilson intervals; q: quoted"
    return Table(laid.table.title, note, columns(*heads), tuple(rows), tuple(data))


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
    rows = []
    for m in cell.measurements:
        low, high = m.rate.interval
        rows.append(
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
    return rows


def sources(laid: PaperTable) -> Table:
    """Where each number of a paper's table is printed."""
    names = dict(laid.columns)
    cells = laid.table.cells
    rows = tuple((c.locator, names[c.column], f"{c.value}", WHOSE[c.kind]) for c in cells)
    data = tuple(c.model_dump(mode="json") for c in cells)
    heads = columns("Place", "Column", "Printed", "Whose")
    return Table("Sources", "", heads, rows, data)


def provenance(groups: Sequence[tuple[str, Sequence[Fact]]]) -> list[Table]:
    """Where the numbers of a model come from, one table a protocol."""
    tables = []
    for title, facts in groups:
        rows = tuple((fact.name, "; ".join(dict.fromkeys(fact.values))) for fact in facts)
        data = tuple(
            {"protocol": title, "name": fact.name, "value": "; ".join(dict.fromkeys(fact.values))}
            for fact in facts
        )
        tables.append(Table(f"Provenance: {title}", "", columns("Fact", "Value"), rows, data))
    return tables


# --- in a README: between two marks; everything else there stays as it is ----------------------------------


def block(leaderboards: Sequence[Leaderboard]) -> str:
    """The measured rows of ranked leaderboards as small tables in Markdown; names of other protocols."""
    ranked = [board for board in leaderboards if board.ranks]
    others = [board.name for board in leaderboards if board.battery is not None]
    parts = [f"{README_NOTE}\n\n" + to_markdown([_small(board) for board in ranked])] if ranked else []
    if not ranked:
        parts.append("No run of the reference protocol is stored here yet.\n")
    if others:
        listed = "".join(f"- {markdown(name)}\n" for name in others)
        parts.append(f"Other protocols, not ranked:\n\n{listed}")
    return "\n".join(parts)


def _small(leaderboard: Leaderboard) -> Table:
    heads = columns("Model", "Rank", "Robust", "SE", "Audit", "Clean", "n", "Decided by", "Number")
    return Table(
        leaderboard.name, leaderboard.note, heads, tuple(_row(row) for row in leaderboard.rows if row.records)
    )


def _row(row: Entry) -> tuple[str, ...]:
    n = count(row.n) if row.n else "–"
    robust = (accuracy(row.robust), standard_error(row), audit(row))
    return (name(row), row.rank or "–", *robust, accuracy(row.clean), n, row.decided or "–", row.kind)


def renewed(text: str, leaderboards: Sequence[Leaderboard], file: str) -> str:
    """The text with its leaderboard written anew.

    Raises:
        UsageError: the marks are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"{file}: needs one line {BEGIN!r} and after it one line {END!r}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{block(leaderboards)}\n{END}{rest.split(END)[1]}"


def renew(file: Path, leaderboards: Sequence[Leaderboard]) -> None:
    """Write the leaderboard into a file.

    Raises:
        UsageError: it cannot be read or written, or has no marks.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--readme {file}: cannot be read: {error}") from None
    write_text(file, renewed(text, leaderboards, str(file)))
