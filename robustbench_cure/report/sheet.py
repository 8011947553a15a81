"""A table for other programs and for papers: CSV, JSON, Markdown and LaTeX of one thing."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_cure.files import write_atomically
from robustbench_cure.report.export import latex, markdown

SUFFIXES = ("csv", "json", "md", "tex")


@dataclass(frozen=True)
class Sheet:
    """One table, as it is printed and as it is computed with.

    Attributes:
        title: what it shows.
        note: what a reader must know: units, intervals, denominators; may be empty.
        heads: heads of the printed columns; the first is aligned to the left, the others to the right.
        rows: printed cells, one for each head.
        data: the same rows for programs: rates in [0, 1] with their counts, nothing rounded. Every row
            has the same keys.
    """

    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    data: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.heads) for row in self.rows):
            raise ValueError(f"{self.title}: a row has not one cell for each head")


def to_csv(sheets: Sequence[Sheet]) -> str:
    """The data of all sheets below one another; sheets of one file share their keys."""
    data = [row for sheet in sheets for row in sheet.data]
    file = io.StringIO()
    if data:
        writer = csv.DictWriter(file, data[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(data)
    return file.getvalue()


def to_json(sheets: Sequence[Sheet]) -> str:
    """A list of tables, each with its title, its note and its rows."""
    tables = [
        {
            "title": sheet.title,
            "note": sheet.note,
            "rows": [{key: _plain(value) for key, value in row.items()} for row in sheet.data],
        }
        for sheet in sheets
    ]
    return json.dumps({"schema_version": 1, "tables": tables}, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_markdown(sheets: Sequence[Sheet], level: int = 3) -> str:
    """A GitHub table for each sheet, under a heading of this level."""
    return "\n".join(_markdown(sheet, level) for sheet in sheets)


def _markdown(sheet: Sheet, level: int) -> str:
    lines = [f"{'#' * level} {markdown(sheet.title)}", ""]
    lines += [markdown(sheet.note), ""] if sheet.note else []
    lines.append("| " + " | ".join(map(markdown, sheet.heads)) + " |")
    lines.append("|:---|" + "---:|" * (len(sheet.heads) - 1))
    lines += ["| " + " | ".join(map(markdown, row)) + " |" for row in sheet.rows]
    return "\n".join(lines) + "\n"


def to_latex(sheets: Sequence[Sheet]) -> str:
    r"""A booktabs table for each sheet; needs ``\usepackage{booktabs}`` and nothing else."""
    return "\n".join(_latex(sheet) for sheet in sheets)


def _latex(sheet: Sheet) -> str:
    caption = ". ".join(latex(text.rstrip(".")) for text in (sheet.title, sheet.note) if text)
    lines = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{caption}.}}",
        rf"\begin{{tabular}}{{l{'r' * (len(sheet.heads) - 1)}}}",
        r"\toprule",
        " & ".join(map(latex, sheet.heads)) + r" \\",
        r"\midrule",
    ]
    # Braces: a row that begins with [ would be read as the optional argument of \\.
    lines += [" & ".join(f"{{{latex(cell)}}}" for cell in row) + r" \\" for row in sheet.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def twins(stem: str, sheets: Sequence[Sheet]) -> dict[str, str]:
    """File name -> text of the four twins of some tables."""
    texts = (to_csv(sheets), to_json(sheets), to_markdown(sheets), to_latex(sheets))
    return {f"{stem}.{suffix}": text for suffix, text in zip(SUFFIXES, texts, strict=True)}


def write_text(path: Path, text: str) -> None:
    """Write text whole or not at all; what UTF-8 cannot hold is replaced."""
    write_atomically(path, lambda file: file.write_bytes(text.encode("utf-8", "replace")))
