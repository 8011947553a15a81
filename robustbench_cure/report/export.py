"""The same numbers for machines, for GitHub and for papers: CSV, Markdown, LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from robustbench_cure.evaluation.record import Record
from robustbench_cure.report.tables import (
    AccuracyRow,
    DistanceRow,
    Protocol,
    SummaryRow,
    attack_rows,
    labels,
    protocols,
)
from robustbench_cure.report.wording import count, data_words, interval, number, threat_words
from robustbench_cure.stats import Rate
from robustbench_cure.threat import format_eps

_WHOLE = ("only_this_attack", "violations")


def to_csv(records: Sequence[Record]) -> str:
    """One line a model and attack, clean and worst case included: counts, rates in [0, 1], intervals."""
    import pandas as pd

    lines = attack_data(records)
    table = pd.DataFrame(lines)
    whole = [name for name in lines[0] if name.endswith(("count", "_n")) or name in ("n", *_WHOLE)]
    return table.astype(dict.fromkeys(whole, "Int64")).to_csv(index=False, lineterminator="\n")


def attack_data(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The lines of `to_csv`: counts, rates in [0, 1], intervals; None where there is no number."""
    return [
        _csv_line(record, label, row)
        for record, label in zip(records, labels(records), strict=True)
        for row in attack_rows(record)
    ]


def _csv_line(record: Record, label: str, row: AccuracyRow | DistanceRow) -> dict[str, Any]:
    m = record.manifest
    return {
        "model": m.model.id,
        "label": label,
        "battery": m.battery.id,
        "battery_version": m.battery.version,
        "norm": m.battery.threat.norm,
        "eps": format_eps(m.battery.threat.model.eps),
        "dataset": m.data.name,
        "split": m.data.split,
        "attack": row.id,
        "kind": row.kind,
        **_rate("", row.accuracy),
        **_rate("success_", row.success),
        "only_this_attack": row.only,
        "median_distance": row.distance,
        **_rate("converged_", row.converged),
        "passes_per_sample": row.queries,
        "seconds": row.seconds,
        "violations": row.violations,
        "flags": " ".join(sorted({flag.kind for flag in m.flags})),
        "unreliable": record.unreliable,
        "status": m.status,
        "seed": m.config.seed,
        "weights_sha256": m.model.weights_sha256,
        "battery_digest": m.battery_digest,
        "data_digest": m.data.digest,
    }


def _rate(prefix: str, rate: Rate | None) -> dict[str, Any]:
    names = ("count", "n", "rate", "low", "high")
    values: tuple[Any, ...] = (None,) * 5
    if rate is not None and rate.total:
        values = (rate.count, rate.total, rate.value, *rate.interval)
    elif rate is not None:
        values = (0, 0, None, None, None)
    return {prefix + name: value for name, value in zip(names, values, strict=True)}


# --- Markdown ------------------------------------------------------------------------------------------


def to_markdown(records: Sequence[Record]) -> str:
    """A GitHub table for each protocol: models down, attacks across, accuracy with its interval."""
    return "\n".join(_markdown_protocol(protocol) for protocol in protocols(records))


def _markdown_protocol(protocol: Protocol) -> str:
    data = protocol.data
    heads = ["Model", *(f"{name} ({note})" if note else name for name, note in _columns(protocol)), "Flags"]
    lines = [
        f"### {markdown(protocol.battery.name)}",
        "",
        f"Threat model {threat_words(protocol.threat)}; data {markdown(data_words(data))}"
        + (f" ({markdown(data.notes)})" if data.notes else "")
        + ". Accuracy in % of all samples, with 95 % Wilson intervals; the worst case is per sample.",
        "",
        "| " + " | ".join(markdown(head) for head in heads) + " |",
        "|:---|" + "---:|" * (len(heads) - 2) + ":---|",
    ]
    for line in protocol.summary:
        cells = [f"{number(rate)} {interval(rate)}" for rate in _rates(line)]
        marks = list(dict.fromkeys(flag.kind for flag in line.flags))
        marks += ["partial run"] if line.partial else []
        name = markdown(line.label) + (" **unreliable**" if line.unreliable else "")
        lines.append(f"| {name} | " + " | ".join([*cells, markdown(", ".join(marks))]) + " |")
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


def to_latex(records: Sequence[Record]) -> str:
    r"""A booktabs table for each protocol; needs ``\usepackage{booktabs}`` and nothing else."""
    return "\n".join(_latex_protocol(protocol) for protocol in protocols(records))


def _latex_protocol(protocol: Protocol) -> str:
    columns = _columns(protocol)
    heads = " & ".join(latex(name) for name, _ in columns)
    sizes = [f"{latex(name)}: {note}" for name, note in columns if note]
    caption = (
        f"{latex(protocol.battery.name)}. Data: {latex(data_words(protocol.data))}"
        + (f" ({latex(protocol.data.notes)})" if protocol.data.notes else "")
        + r". Accuracy in \% of all samples, with 95\,\% Wilson intervals"
        + (f" ({'; '.join(sizes)})" if sizes else "")
        + "; the worst case is per sample."
        + (r" $\dagger$: flagged unreliable." if any(line.unreliable for line in protocol.summary) else "")
    )
    lines = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
        rf"Model & {heads} \\",
        r"\midrule",
    ]
    for line in protocol.summary:
        rates = _rates(line)
        dagger = r"$^\dagger$" if line.unreliable else ""
        lines.append(rf"{latex(line.label)}{dagger} & " + " & ".join(number(rate) for rate in rates) + r" \\")
        # Braces: a row that begins with [ would be read as the optional argument of \\.
        spans = (rf"{{\scriptsize {interval(rate)}}}" for rate in rates)
        lines.append(" & " + " & ".join(spans) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def latex(text: str) -> str:
    """Text with every character that is special to LaTeX escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


# --- both ------------------------------------------------------------------------------------------------


def _columns(protocol: Protocol) -> list[tuple[str, str]]:
    """(name, note) of each accuracy column; the note gives a sample size of its own."""
    rows = attack_rows(protocol.summary[0].record)
    found = []
    for row in rows:
        if isinstance(row, AccuracyRow):
            found.append((row.name, f"n = {count(row.accuracy.total)}" if row.limit else ""))
    return found


def _rates(line: SummaryRow) -> list[Rate]:
    return [row.accuracy for row in attack_rows(line.record) if isinstance(row, AccuracyRow)]
