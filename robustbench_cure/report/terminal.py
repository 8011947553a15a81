"""The last lines of `cure-bench evaluate`: plain text that fits 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from robustbench_cure.evaluation.flags import FlagKind
from robustbench_cure.evaluation.record import Record
from robustbench_cure.report.tables import (
    SEVERITIES,
    AccuracyRow,
    DistanceRow,
    Protocol,
    attack_rows,
    protocols,
)
from robustbench_cure.report.wording import data_words, interval, number, percent, threat_words

WIDTH = 80
NAME = 22


def terminal_table(records: Sequence[Record]) -> str:
    """Accuracy of each model under each attack; no line is longer than `WIDTH`.

    One model is shown line by line with every interval; several side by side, in as many blocks of
    columns as the width asks for, with the interval of the worst case.
    """
    return "\n\n".join(_protocol(protocol) for protocol in protocols(records)) + "\n"


def _protocol(protocol: Protocol) -> str:
    head = [_fit(protocol.battery.name, WIDTH), _fit(_place(protocol), WIDTH)]
    if protocol.data.notes:
        head.append(_fit(protocol.data.notes, WIDTH))
    body = _one(protocol) if len(protocol.summary) == 1 else _several(protocol)
    foot = []
    for name, line in zip(_names(protocol), protocol.summary, strict=True):
        titles = dict.fromkeys(flag.about.title for flag in line.flags)
        marks = [*(["UNRELIABLE"] if line.unreliable else []), *(["partial run"] if line.partial else [])]
        if titles or marks:
            foot += _wrapped(f"! {_fit(name, 40)}: {'; '.join([*marks, *titles])}")
    foot += _explained({flag.kind: flag.about for line in protocol.summary for flag in line.flags})
    return "\n".join(text.rstrip() for text in [*head, "", *body, *([""] if foot else []), *foot])


def _explained(raised: Mapping[str, FlagKind]) -> list[str]:
    """What every flag means and what to do, under the name that `--fail-on` knows it by."""
    lines = []
    for kind in sorted(raised, key=lambda kind: SEVERITIES.index(raised[kind].severity)):
        about = raised[kind]
        lines += ["", *_wrapped(f"{kind}: {about.title}")]
        lines += [*_wrapped(f"  Means: {about.means}."), *_wrapped(f"  Next: {about.do_next}.")]
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _place(protocol: Protocol) -> str:
    return f"{threat_words(protocol.threat)}; {data_words(protocol.data)}"


def _names(protocol: Protocol) -> list[str]:
    """The label of one model; of several the ids, which are shorter, where they differ."""
    ids = [line.record.manifest.model.id for line in protocol.summary]
    labels = [line.label for line in protocol.summary]
    return ids if 1 < len(ids) == len(set(ids)) else labels


def _one(protocol: Protocol) -> list[str]:
    line = protocol.summary[0]
    rows = attack_rows(line.record)
    wide = min(max(len(clean_text(row.name)) for row in rows), NAME)
    lines = [_fit(line.label, WIDTH)]
    for row in rows:
        if isinstance(row, DistanceRow):
            lines.append(f"  {_fit(row.name, wide):<{wide}}  {percent(row.converged):>7}  converged")
            continue
        rate = row.accuracy
        size = f"n = {rate.total}" if row.limit or row.kind != "attack" else ""
        lines.append(
            f"  {_fit(row.name, wide):<{wide}}  {percent(rate):>7}  {interval(rate):<13}  {size}".rstrip()
        )
    return lines


def _several(protocol: Protocol) -> list[str]:
    columns: list[list[str]] = []
    tables = [
        [row for row in attack_rows(line.record) if isinstance(row, AccuracyRow)] for line in protocol.summary
    ]
    for rows in zip(*tables, strict=True):
        words = [_fit(word, 12) for word in clean_text(rows[0].name).split()]
        head = ["", *words] if len(words) == 1 else [words[0], _fit(" ".join(words[1:]), 12)]
        columns.append([*head, *(_cell(row) for row in rows)])
    names = ["", "accuracy in %", *(_fit(name, NAME) for name in _names(protocol))]
    left = max(len(name) for name in names)
    blocks: list[list[list[str]]] = [[]]
    used = left
    for column in columns:
        need = 2 + max(len(cell) for cell in column)
        if used + need > WIDTH and blocks[-1]:
            blocks.append([])
            used = left
        blocks[-1].append(column)
        used += need
    lines: list[str] = []
    for block in blocks:
        lines += [""] if lines else []
        widths = [max(len(cell) for cell in column) for column in block]
        for i, name in enumerate(names):
            line = "".join(f"  {column[i]:>{w}}" for column, w in zip(block, widths, strict=True))
            lines.append(f"{name:<{left}}{line}".rstrip())
    return lines


def _cell(row: AccuracyRow) -> str:
    rate = row.accuracy
    return f"{number(rate)} {interval(rate):>12}" if row.kind == "worst" else number(rate)


def clean_text(text: str) -> str:
    """Text without control characters or line ends, which could move the cursor or change colours."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _fit(text: str, width: int) -> str:
    text = clean_text(text)
    return text if len(text) <= width else text[: width - 1] + "…"
