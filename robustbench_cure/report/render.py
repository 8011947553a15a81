"""The report: one HTML file that opens from disk, and its tables as CSV, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.flags import FLAG_KINDS
from robustbench_cure.evaluation.record import Record
from robustbench_cure.files import write_text
from robustbench_cure.masking.checks import CHECKS
from robustbench_cure.masking.recorded import from_record
from robustbench_cure.protocol.cards import PublishedTable
from robustbench_cure.protocol.catalog import catalog
from robustbench_cure.report import charts, wording
from robustbench_cure.report.charts import SIDE, margin_scatter
from robustbench_cure.report.paper import tables_for
from robustbench_cure.report.provenance import facts
from robustbench_cure.report.results import attack_table, protocol_tables
from robustbench_cure.report.table import to_csv, to_latex, to_markdown
from robustbench_cure.report.tables import SEVERITIES, AccuracyRow, DistanceRow, attack_rows, protocols

TEMPLATES = Path(__file__).parent / "templates"


@cache
def templates() -> Environment:
    """The template environment: everything is escaped, and an undefined name is an error."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (
        *(wording.percent, wording.number, wording.interval, wording.points, wording.count),
        *(wording.distance, wording.quantity, wording.threat_words, wording.data_words),
        *(charts.shape, charts.colour),
    )
    env.filters.update({function.__name__: function for function in filters})
    return env


def render_report(records: Sequence[Record], published: dict[str, PublishedTable]) -> str:
    """The whole report as one self-contained HTML page; equal records give equal bytes.

    Args:
        records: one or more finished runs; those of one battery on the same images stand side by side.
        published: published tables by id; those the batteries are laid out as are shown.

    Raises:
        UsageError: no records.
    """
    if not records:
        raise UsageError("no runs to report")
    groups = protocols(records)
    raised = {flag.kind for record in records for flag in record.flags}
    diagnoses = [
        (line.label, diagnosis, margin_scatter(diagnosis.scatter) if diagnosis.scatter else None)
        for group in groups
        for line in group.summary
        if (diagnosis := from_record(line.record)) is not None
    ]
    order = sorted(FLAG_KINDS.items(), key=lambda item: SEVERITIES.index(item[1].severity))
    return (
        templates()
        .get_template("report.html")
        .render(
            title=_title(records),
            many=len({record.manifest.model.name for record in records}) > 1,
            groups=[
                {
                    "protocol": group,
                    "bands": charts.bands(group),
                    "specs": attack_rows(group.summary[0].record)[1:-1],
                    "tables": [_split(line.record) for line in group.summary],
                }
                for group in groups
            ],
            papers=tables_for(records, published),
            masking=diagnoses,
            checks={
                name: about
                for name, about in CHECKS.items()
                if any(f.check == name for _, diagnosis, _ in diagnoses for f in diagnosis.findings)
            },
            side=SIDE,
            raised=[(kind, about) for kind, about in order if kind in raised],
            unraised=[about for kind, about in order if kind not in raised],
            facts=[(group, facts([line.record for line in group.summary])) for group in groups],
            versions=sorted({record.manifest.environment.version for record in records}),
            dates=sorted({record.manifest.finished[:10] for record in records if record.manifest.finished}),
            lines=[line for group in groups for line in group.summary],
        )
    )


def _title(records: Sequence[Record]) -> str:
    names = list(dict.fromkeys(record.manifest.model.name for record in records))
    return f"{len(names)} models" if len(names) > 2 else " and ".join(names)


def _split(record: Record) -> tuple[list[AccuracyRow], list[DistanceRow]]:
    rows = attack_rows(record)
    return (
        [row for row in rows if isinstance(row, AccuracyRow)],
        [row for row in rows if isinstance(row, DistanceRow)],
    )


def write_reports(
    records: Sequence[Record], out: Path, published: dict[str, PublishedTable] | None = None
) -> list[Path]:
    """Write ``results.csv``, ``results.md``, ``results.tex`` and ``report.html``, each atomically.

    Args:
        records: one or more finished runs.
        out: directory, made if it does not exist.
        published: published tables by id; None takes the cards'.

    Returns:
        The files written, in that order.

    Raises:
        UsageError: no records, or `out` cannot be written.
    """
    if published is None:
        published = {name: file.card for name, file in catalog(PublishedTable).items()}
    page, results = render_report(records, published), protocol_tables(records)
    texts = {
        "results.csv": to_csv([attack_table(records)]),
        "results.md": to_markdown(results),
        "results.tex": to_latex(results),
        "report.html": page,
    }
    for name, text in texts.items():
        write_text(out / name, text)
    return [out / name for name in texts]
