"""A comparison for people, for continuous integration and for machines."""

from __future__ import annotations

import json
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

from robustbench_cure.gate.compare import Comparison
from robustbench_cure.gate.verdict import ORDER, Row, Rules
from robustbench_cure.report.export import markdown
from robustbench_cure.report.terminal import WIDTH, clean_text
from robustbench_cure.stats import Rate

SCHEMA_VERSION = 1
SIGNS = {"pass": "ok", "inconclusive": "?", "suspicious rise": "!", "regression": "!"}


def overall(comparisons: Sequence[Comparison]) -> str:
    """The worst verdict of several models."""
    return max((c.verdict.kind for c in comparisons), key=ORDER.index)


def exit_code(comparisons: Sequence[Comparison]) -> int:
    """The exit code of several models: that of the worst."""
    return max(c.verdict.exit_code for c in comparisons)


def terminal(comparisons: Sequence[Comparison]) -> str:
    """Tables and reasons that fit 80 columns."""
    blocks = []
    for c in comparisons:
        lines = [f"{clean_text(c.model)}: {c.verdict.kind.upper()}"]
        if c.rows:
            lines.append(f"  {'in %':<24} {'before':>7} {'now':>7} {'change':>7}  {'lost':>5} {'gained':>6}")
            lines += [_line(row) for row in c.rows]
        if c.verdict.kind != "pass":
            for words in c.verdict.words:
                lines += textwrap.wrap(
                    clean_text(words), WIDTH, initial_indent="  - ", subsequent_indent="    "
                )
        for note in c.notes:
            lines += textwrap.wrap(clean_text(note), WIDTH, initial_indent="  (", subsequent_indent="   ")
            lines[-1] += ")" if len(lines[-1]) < WIDTH else ""
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def to_markdown(comparisons: Sequence[Comparison], rules: Rules) -> str:
    """For a job summary or a comment."""
    parts = [f"## Robustness gate: {overall(comparisons)}", "", _rules_in_words(rules), ""]
    for c in comparisons:
        parts += [f"### {_md(c.model)}: {c.verdict.kind}", ""]
        if c.verdict.kind != "pass":
            parts += [*(f"- {_md(words)}" for words in c.verdict.words), ""]
        if c.rows:
            parts += ["| in % | before | now | change | lost | gained | |", "|---|--:|--:|--:|--:|--:|---|"]
            parts += [
                f"| {_md(row.name)} | {_rate(row, row.flips.before)} | {_rate(row, row.flips.after)} | "
                f"{100 * row.flips.change:+.1f} | {row.flips.lost} | {row.flips.gained} | {row.verdict} |"
                for row in c.rows
            ]
            parts.append("")
        parts += [*(f"- {_md(note)}" for note in c.notes), *([""] if c.notes else [])]
    return "\n".join(parts)


def to_junit(comparisons: Sequence[Comparison]) -> str:
    """A suite a model, a case an accuracy; errors are what cannot be compared."""
    root = ET.Element("testsuites", name="cure-bench compare")
    for c in comparisons:
        cases: list[tuple[str, str, str]] = [(row.name, row.verdict, row.words) for row in c.rows]
        if not cases:
            cases = [("comparison", c.verdict.kind, "; ".join(c.verdict.words))]
        failing = c.verdict.exit_code != 0
        bad = [
            case for case in cases if failing and case[1] in ("regression", "suspicious rise", "inconclusive")
        ]
        broken = [case for case in cases if case[1] == "not comparable"]
        suite = ET.SubElement(
            root,
            "testsuite",
            name=_xml(c.model),
            tests=str(len(cases)),
            failures=str(len(bad)),
            errors=str(len(broken)),
        )
        for name, verdict, words in cases:
            case = ET.SubElement(suite, "testcase", classname=_xml(c.model), name=_xml(name))
            if (name, verdict, words) in bad:
                ET.SubElement(case, "failure", type=verdict, message=_xml(words))
            elif (name, verdict, words) in broken:
                ET.SubElement(case, "error", type=verdict, message=_xml(words))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def to_annotations(comparisons: Sequence[Comparison]) -> list[str]:
    """Workflow commands that GitHub shows beside a change."""
    lines = []
    for c in comparisons:
        level = "error" if c.verdict.exit_code else ("notice" if c.verdict.kind == "pass" else "warning")
        text = "; ".join(c.verdict.words) if c.verdict.kind != "pass" else "no accuracy fell or rose"
        title = f"{c.model}: {c.verdict.kind}"
        lines.append(f"::{level} title={_property(title)}::{_escaped(text)}")
    return lines


def to_json(comparisons: Sequence[Comparison], rules: Rules) -> str:
    """Everything, for machines."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "verdict": overall(comparisons),
        "exit_code": exit_code(comparisons),
        "rules": {
            "tolerance": rules.tolerance,
            "floor": rules.floor,
            "level": rules.level,
            "accept": list(rules.accept),
        },
        "models": [_as_json(c) for c in comparisons],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _as_json(c: Comparison) -> dict[str, Any]:
    return {
        "model": c.model,
        "verdict": c.verdict.kind,
        "exit_code": c.verdict.exit_code,
        "reasons": list(c.verdict.words) if c.verdict.kind != "pass" else [],
        "notes": list(c.notes),
        "rows": [
            {
                "name": row.name,
                "kind": row.kind,
                "n": row.flips.n,
                "before": row.flips.before,
                "now": row.flips.after,
                "lost": row.flips.lost,
                "gained": row.flips.gained,
                "p_fall": row.flips.p_fall,
                "p_rise": row.flips.p_rise,
                "verdict": row.verdict,
                "words": row.words,
            }
            for row in c.rows
        ],
    }


def _line(row: Row) -> str:
    f = row.flips
    name = clean_text(row.name)
    name = name if len(name) <= 24 else name[:23] + "…"
    word = "" if row.verdict == "pass" else row.verdict
    return (
        f"  {name:<24} {_rate(row, f.before):>7} {_rate(row, f.after):>7} {100 * f.change:>+7.1f}  "
        f"{f.lost:>5} {f.gained:>6}  {word}"
    ).rstrip()


def _rate(row: Row, count: int) -> str:
    value = Rate(count, row.flips.n).value
    return "n/a" if value != value else f"{100 * value:.1f}"


def _rules_in_words(rules: Rules) -> str:
    floor = "" if rules.floor is None else f", floor {100 * rules.floor:g} %"
    return (
        f"Tolerance {100 * rules.tolerance:g} points{floor}, exact McNemar test at {100 * rules.level:g} %."
    )


def _md(text: str) -> str:
    return markdown(clean_text(text))


def _xml(text: str) -> str:
    return clean_text(text)


def _escaped(text: str) -> str:
    return clean_text(text).replace("%", "%25")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
