"""The page of a geometry command: one HTML file with its figures inside, and the table for the terminal."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from robustbench_cure.report.render import templates
from robustbench_cure.studies.engine import Study


@dataclass(frozen=True)
class Shown:
    """A figure on the page."""

    path: Path
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The SVG itself, as an address."""
        data = base64.b64encode(self.path.read_bytes()).decode()
        return f"data:image/svg+xml;base64,{data}"


def present(
    study: Study,
    *,
    title: str,
    lead: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    figures: Sequence[Shown],
    settings: dict[str, object],
    note: str = "",
) -> None:
    """Write ``index.html`` and ``manifest.json``; print the table and where everything is.

    Args:
        study: what was measured.
        title: of the page.
        lead: what the figures show and how they are read.
        columns: heads of the table.
        rows: its cells, the first of each row naming the model.
        figures: with their captions.
        settings: how it was measured, for the manifest and the page.
        note: what the heads mean, for the terminal; the page says it in its lead.
    """
    data = study.data
    facts = [
        ("data", f"{data.name} {data.split}, {len(data)} image{'s' * (len(data) != 1)}"),
        *((name.replace("_", " "), str(value)) for name, value in settings.items()),
        ("seed", str(study.seed)),
        *([("note", data.notes)] if data.notes else []),
        ("command", study.command),
    ]
    text = render(
        title=title,
        verb=study.verb,
        lead=lead,
        columns=columns,
        rows=rows,
        figures=figures,
        facts=facts,
        files=[path.name for path in study.files],
    )
    study.write("index.html", lambda file: file.write_text(text, encoding="utf-8"))
    study.finish(settings)
    click.echo(plain_table(columns, rows))
    if note:
        click.echo(note)
    click.echo(f"page: {study.out / 'index.html'}")


def render(
    *,
    title: str,
    verb: str,
    lead: Sequence[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    figures: Sequence[Shown],
    facts: Sequence[tuple[str, str]],
    files: Sequence[str],
) -> str:
    """The page itself; arguments as those of `present`, ``facts`` being its provenance."""
    return (
        templates()
        .get_template("study.html")
        .render(
            title=title,
            eyebrow=f"cure-bench {verb}",
            lead=lead,
            columns=columns,
            rows=rows,
            figures=figures,
            facts=facts,
            files=sorted(files),
        )
    )


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, the first to the left and numbers to the right."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)
