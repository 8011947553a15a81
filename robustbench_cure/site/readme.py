"""The leaderboard inside a Markdown file, between two marks; everything else there stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robustbench_cure.errors import UsageError
from robustbench_cure.report.sheet import Sheet, to_markdown, write_text
from robustbench_cure.report.wording import count
from robustbench_cure.site.sheets import accuracy, name
from robustbench_cure.site.standings import Board, Standing

BEGIN, END = "<!-- leaderboard: written by cure-bench site --readme -->", "<!-- end of leaderboard -->"
NOTE = (
    "Accuracy in % of all images, with 95 % intervals. Robust: the worst case, image by image, over all "
    "attacks. Published numbers are not ranked."
)


def block(boards: Sequence[Board]) -> str:
    """The boards that have a measured model, each as a small table."""
    measured = [board for board in boards if any(row.records for row in board.rows)]
    if not measured:
        return "No run is stored here yet.\n"
    return f"{NOTE}\n\n" + to_markdown([_sheet(board) for board in measured])


def _sheet(board: Board) -> Sheet:
    rows = tuple(_row(row) for row in board.rows)
    return Sheet(board.name, "", ("Model", "Rank", "Robust", "Clean", "n", "Decided by", "Number"), rows, ())


def _row(row: Standing) -> tuple[str, ...]:
    rank, n = str(row.rank or "–"), count(row.n) if row.n else "–"
    return (name(row), rank, accuracy(row.robust), accuracy(row.clean), n, row.decided or "–", row.kind)


def renewed(text: str, boards: Sequence[Board], file: str) -> str:
    """The text with its leaderboard written anew.

    Raises:
        UsageError: the marks are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UsageError(f"{file}: needs one line {BEGIN!r} and after it one line {END!r}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{block(boards)}\n{END}{rest.split(END)[1]}"


def renew(file: Path, boards: Sequence[Board]) -> None:
    """Write the leaderboard into a file.

    Raises:
        UsageError: it cannot be read or written, or has no marks.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--readme {file}: cannot be read: {error}") from None
    write_text(file, renewed(text, boards, str(file)))
