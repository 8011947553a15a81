"""The last lines of `cure-bench evaluate`: plain text that fits 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from robustbench_cure.evaluation.flags import FlagKind
from robustbench_cure.evaluation.record import Record
from robustbench_cure.report.table import WIDTH, Column, Table, clean_text, fit, to_text
from robustbench_cure.report.tables import (
    SEVERITIES,
    AccuracyRow,
    DistanceRow,
    Protocol,
    accuracy_rows,
    attack_rows,
    protocols,
)
from robustbench_cure.report.wording import data_words, interval, number, percent, threat_words

#: Characters of a model's or an attack's name.
NAME = 22


def terminal_table(records: Sequence[Record]) -> str:
    """Accuracy of each model under each attack; no line is longer than `WIDTH`.

    One model is shown line by line with every interval; several side by side, in as many blocks of
    columns as the width asks for, with the interval of the worst case.
    """
    return "\n\n".join(_protocol(protocol) for protocol in protocols(records)) + "\n"


def _protocol(protocol: Protocol) -> str:
    head = [fit(protocol.battery.name, WIDTH), fit(_place(protocol), WIDTH)]
    if protocol.data.notes:
        head.append(fit(protocol.data.notes, WIDTH))
    body = _one(protocol) if len(protocol.summary) == 1 else _several(protocol)
    foot = []
    for name, line in zip(_names(protocol), protocol.summary, strict=True):
        if line.record.audit is not None:
            foot += _wrapped(
                f"{fit(name, 40)}: {percent(line.worst)} {interval(line.worst)}; {line.record.audit.words}"
            )
    for name, line in zip(_names(protocol), protocol.summary, strict=True):
        titles = dict.fromkeys(flag.about.title for flag in line.flags)
        marks = [*(["UNRELIABLE"] if line.unreliable else []), *(["partial run"] if line.partial else [])]
        if titles or marks:
            foot += _wrapped(f"! {fit(name, 40)}: {'; '.join([*marks, *titles])}")
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
    rows = []
    for row in attack_rows(line.record):
        if isinstance(row, DistanceRow):
            rows.append((row.name, percent(row.converged), "converged", ""))
            continue
        rate = row.accuracy
        size = f"n = {rate.total}" if row.limit or row.kind != "attack" else ""
        if row.kind == "audit":
            size = f"of {rate.total} survivors" if rate.total else ""
        rows.append((row.name, percent(rate), interval(rate), size))
    heads = (
        Column("", "left", most=NAME),
        Column("", least=len("100.0 %")),
        Column("", "left", least=len("[37.2, 45.7]") + 1),
        Column("", "left"),
    )
    return [fit(line.label, WIDTH), to_text(Table("", "", heads, tuple(rows)), indent="  ")]


def _several(protocol: Protocol) -> list[str]:
    tables = [accuracy_rows(line.record) for line in protocol.summary]
    heads = [Column("\naccuracy in %", "left", most=NAME)]
    cells: list[list[str]] = [[name] for name in _names(protocol)]
    for rows in zip(*tables, strict=True):
        words = [fit(word, 12) for word in clean_text(rows[0].name).split()] or [""]
        heads.append(Column(f"{words[0]}\n{fit(' '.join(words[1:]), 12)}" if words[1:] else f"\n{words[0]}"))
        for line, row in zip(cells, rows, strict=True):
            line.append(_cell(row))
    return [to_text(Table("", "", tuple(heads), tuple(map(tuple, cells))))]


def _cell(row: AccuracyRow) -> str:
    rate = row.accuracy
    return f"{number(rate)} {interval(rate):>12}" if row.kind == "worst" else number(rate)
