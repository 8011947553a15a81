"""One table, and every form it is written in: CSV, JSON, Markdown, LaTeX and plain text of 80 columns."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

#: Columns of a terminal.
WIDTH = 80
#: Between two columns of plain text.
GAP = "  "
SUFFIXES = ("csv", "json", "md", "tex")
MARKDOWN_RULES = {"left": ":---", "right": "---:", "center": ":---:"}


@dataclass(frozen=True)
class Column:
    """A printed column.

    Attributes:
        name: its head; a line end makes two lines of it in plain text and is a space elsewhere.
        align: of head and cells.
        kind: ``text`` may be broken into lines where plain text is too wide, ``number`` and ``code`` may not.
        note: what holds for this column alone, as ``n = 512``; in brackets behind the head, in LaTeX in the
            caption.
        least: characters that the column has at least in plain text.
        most: characters after which a cell is cut in plain text; 0: none.
        in_latex: whether LaTeX, which is read on paper, has room for it.
    """

    name: str
    align: Literal["left", "right", "center"] = "right"
    kind: Literal["text", "number", "code"] = "number"
    note: str = ""
    least: int = 0
    most: int = 0
    in_latex: bool = True

    @property
    def head(self) -> str:
        """The head in one line, without the note."""
        return self.name.replace("\n", " ").strip()


@dataclass(frozen=True)
class Cell:
    """A number with its interval, which LaTeX prints below it in small print and others behind it."""

    text: str
    interval: str

    def __str__(self) -> str:
        return f"{self.text} {self.interval}"


@dataclass(frozen=True)
class Table:
    """A table as it is printed and as it is computed with.

    Attributes:
        title: what it shows; may be empty.
        note: what a reader must know: units, intervals, denominators; may be empty.
        columns: the printed columns.
        rows: printed cells, one for each column.
        data: the same rows for programs: rates in [0, 1] with their counts, nothing rounded. Every row has
            the same keys.
        unreliable: numbers of the rows that may not be compared with others; every form marks them.

    Raises:
        ValueError: a row has not one cell for each column.
    """

    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    data: tuple[dict[str, Any], ...] = ()
    unreliable: frozenset[int] = field(default=frozenset())

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: a row has not one cell for each column")


def columns(*names: str) -> tuple[Column, ...]:
    """Columns of these names: the first is aligned to the left, the others to the right."""
    return (Column(names[0], "left", "text"), *map(Column, names[1:]))


# --- for programs ----------------------------------------------------------------------------------------


def to_csv(tables: Sequence[Table]) -> str:
    """The data of all tables below one another; tables of one file share their keys. No number: empty."""
    data = [row for table in tables for row in table.data]
    file = io.StringIO()
    if data:
        writer = csv.DictWriter(file, data[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _plain(value) for key, value in row.items()} for row in data)
    return file.getvalue()


def to_json(tables: Sequence[Table]) -> str:
    """A list of tables, each with its title, its note and its rows. No number: null."""
    content = [
        {
            "title": table.title,
            "note": table.note,
            "rows": [{key: _plain(value) for key, value in row.items()} for row in table.data],
        }
        for table in tables
    ]
    return json.dumps({"schema_version": 1, "tables": content}, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- Markdown --------------------------------------------------------------------------------------------


def to_markdown(tables: Sequence[Table], level: int = 3) -> str:
    """A GitHub table for each, under its title as a heading of this level."""
    return "\n".join(_markdown(table, level) for table in tables)


def _markdown(table: Table, level: int) -> str:
    lines = [f"{'#' * level} {markdown(table.title)}", ""] if table.title else []
    lines += [markdown(table.note), ""] if table.note else []
    heads = [f"{c.head} ({c.note})" if c.note else c.head for c in table.columns]
    lines.append("| " + " | ".join(map(markdown, heads)) + " |")
    lines.append("|" + "".join(f"{MARKDOWN_RULES[c.align]}|" for c in table.columns))
    for number, row in enumerate(table.rows):
        # A cell with its interval is of our own making, and its brackets are no link.
        first, *others = (str(cell) if isinstance(cell, Cell) else markdown(cell) for cell in row)
        first += " **unreliable**" if number in table.unreliable else ""
        lines.append("| " + " | ".join([first, *others]) + " |")
    return "\n".join(lines) + "\n"


def markdown(text: str) -> str:
    """Text that GitHub shows as it is: no markup, no HTML, no table cell or line ends."""
    flat = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", flat)


# --- LaTeX -----------------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "∞": r"$\infty$",
    "−": "$-$",
    "\n": " ",
}


def to_latex(tables: Sequence[Table]) -> str:
    r"""A booktabs table for each; needs ``\usepackage{booktabs}`` and nothing else."""
    return "\n".join(_latex(table) for table in tables)


def _latex(table: Table) -> str:
    kept = [i for i, column in enumerate(table.columns) if column.in_latex]
    notes = "; ".join(f"{c.head}: {c.note}" for c in table.columns if c.note)
    parts = [latex(text.rstrip(".")) for text in (table.title, table.note, notes) if text]
    parts += [r"$\dagger$: flagged unreliable"] if table.unreliable else []
    lines = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{'. '.join(parts)}.}}",
        rf"\begin{{tabular}}{{{''.join(table.columns[i].align[0] for i in kept)}}}",
        r"\toprule",
        " & ".join(latex(table.columns[i].head) for i in kept) + r" \\",
        r"\midrule",
    ]
    for number, row in enumerate(table.rows):
        cells = [row[i] for i in kept]
        texts = [_cell(latex(cell.text if isinstance(cell, Cell) else cell)) for cell in cells]
        texts[0] += r"$^\dagger$" if number in table.unreliable else ""
        lines.append(" & ".join(texts) + r" \\")
        if any(isinstance(cell, Cell) for cell in cells):
            small = [rf"{{\scriptsize {latex(c.interval)}}}" if isinstance(c, Cell) else "" for c in cells]
            lines.append(" & ".join(small) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _cell(text: str) -> str:
    # A row that begins with [ would be read as the optional argument of the \\ before it.
    return f"{{{text}}}" if text.startswith(("[", "*")) else text


def latex(text: str) -> str:
    """Text with every character that is special to LaTeX escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


# --- plain text ------------------------------------------------------------------------------------------


def to_text(table: Table, indent: str = "") -> str:
    """Aligned columns in lines of at most `WIDTH` characters; titles and notes are left to the caller.

    What is too wide is broken: the last column into lines where it is ``text``, else the columns into blocks
    below one another, each with the first column. A single cell that is wider, such as a path, is left whole.
    A table whose columns have no names has no head.
    """
    named = any(column.name for column in table.columns)
    lines: list[list[str]] = [[] for _ in table.columns]
    height = max((column.name.count("\n") + 1 for column in table.columns), default=1) if named else 0
    for column, cells in zip(table.columns, lines, strict=True):
        head = column.name.split("\n") if named else []
        cells += [""] * (height - len(head)) + head
    for row in table.rows:
        for column, cells, cell in zip(table.columns, lines, row, strict=True):
            text = str(cell)
            cells.append(fit(text, column.most) if column.most else clean_text(text))
    widths = [max(c.least, *map(len, cells)) for c, cells in zip(table.columns, lines, strict=True)]
    room = WIDTH - len(indent)
    if table.columns[-1].kind == "text" and sum(widths) + len(GAP) * (len(widths) - 1) > room:
        return _wrapped_last(table.columns, lines, widths, indent)
    blocks, used = [[0]], widths[0]
    for i in range(1, len(widths)):
        if used + len(GAP) + widths[i] > room and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(i)
        used += len(GAP) + widths[i]
    parts = []
    for block in blocks:
        printed = [
            indent + GAP.join(_aligned(lines[i][k], widths[i], table.columns[i]) for i in block)
            for k in range(len(lines[0]))
        ]
        parts.append("\n".join(line.rstrip() for line in printed))
    return "\n\n".join(parts)


def _wrapped_last(
    heads: Sequence[Column], lines: Sequence[Sequence[str]], widths: Sequence[int], indent: str
) -> str:
    left = len(indent) + sum(widths[:-1]) + len(GAP) * (len(widths) - 1)
    printed = []
    for k in range(len(lines[0])):
        start = indent + "".join(
            _aligned(lines[i][k], widths[i], heads[i]) + GAP for i in range(len(widths) - 1)
        )
        first, *more = textwrap.wrap(lines[-1][k], max(WIDTH - left, 20)) or [""]
        printed += [start + first, *(" " * left + text for text in more)]
    return "\n".join(line.rstrip() for line in printed)


def _aligned(text: str, width: int, column: Column) -> str:
    place = {"left": str.ljust, "right": str.rjust, "center": str.center}[column.align]
    return place(text, width)


def clean_text(text: str) -> str:
    """Text without control characters or line ends, which could move the cursor or change colours."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def fit(text: str, width: int) -> str:
    """Clean text of at most so many characters; what is cut ends in an ellipsis."""
    text = clean_text(text)
    return text if len(text) <= width else text[: width - 1] + "…"


# --- files -----------------------------------------------------------------------------------------------


def exports(stem: str, tables: Sequence[Table], suffixes: Iterable[str] = SUFFIXES) -> dict[str, str]:
    """File name -> text of some tables in several forms.

    Args:
        stem: of the file names.
        tables: what is written, in one file of each form.
        suffixes: the forms: ``csv``, ``json``, ``md``, ``tex``.
    """
    writers = {"csv": to_csv, "json": to_json, "md": to_markdown, "tex": to_latex}
    return {f"{stem}.{suffix}": writers[suffix](tables) for suffix in suffixes}
