"""A comparison for people, for continuous integration and for machines."""

from __future__ import annotations

import json
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

from robustbench_cure.evaluation.record import Record
from robustbench_cure.gate.compare import Comparison, Difference
from robustbench_cure.gate.verdict import VERDICTS, Finding, Row, Rules, Verdict, conclude
from robustbench_cure.gate.wording import (
    difference,
    headline,
    interval,
    rate,
    reason,
    rules_in_words,
    sentences,
)
from robustbench_cure.report.export import markdown
from robustbench_cure.report.terminal import WIDTH, clean_text
from robustbench_cure.report.wording import count, points

SCHEMA_VERSION = 1
#: What stands beside a row of the table.
MARKS = {"fell": "fell", "rose": "rose", "may have fallen": "fell?", "below the minimum": "low"}
NAME = 18


def overall(comparisons: Sequence[Comparison], rules: Rules) -> Verdict:
    """Verdict and exit code of all models together."""
    findings: list[Finding] = [row.finding for c in comparisons for row in c.rows]
    findings += ["not comparable" for c in comparisons if c.hindrances]
    return conclude(findings, rules)


def terminal(comparisons: Sequence[Comparison], rules: Rules) -> str:
    """Tables and reasons; no line is longer than 80 columns."""
    blocks = []
    for c in comparisons:
        lines = _wrapped(headline(c), "")
        if c.rows:
            lines += ["", *_table(c), ""]
        for text in sentences(c, rules):
            lines += _wrapped(text, "  - ")
        if c.notes:
            lines += _wrapped("; ".join(map(difference, c.notes)), "  other: ")
        blocks.append("\n".join(lines))
    if len(comparisons) > 1:
        blocks.append(f"together: {overall(comparisons, rules).kind.upper()}")
    return "\n\n".join(blocks)


def to_markdown(comparisons: Sequence[Comparison], rules: Rules) -> str:
    """For a job's summary or a comment."""
    parts = [f"## Robustness gate: {overall(comparisons, rules).kind}", "", rules_in_words(rules), ""]
    for c in comparisons:
        parts += [f"### {_md(c.model)}: {c.verdict.kind}", ""]
        parts += [*(f"- {_md(text)}" for text in sentences(c, rules)), ""]
        if c.rows:
            parts += [
                f"| n = {count(c.n)}, in % | before | now | change | 95 % interval | lost | gained | |",
                "|:---|---:|---:|---:|:---:|---:|---:|:---|",
            ]
            for row in c.rows:
                f = row.accuracy.flips
                cells = [_md(_name(row, c)), rate(f, f.before), rate(f, f.after), points(f.change)]
                cells += [interval(f), str(f.lost), str(f.gained), MARKS.get(row.finding, "")]
                parts.append(f"| {' | '.join(cells)} |")
            parts.append("")
        if c.notes:
            parts += [f"Other differences: {_md('; '.join(map(difference, c.notes)))}.", ""]
    return "\n".join(parts)


def to_junit(comparisons: Sequence[Comparison], rules: Rules) -> str:
    """A suite a model, a case an accuracy. What fails the gate is a failure, what hinders it an error."""
    root = ET.Element("testsuites", name="cure-bench compare")
    for c in comparisons:
        suite = ET.SubElement(root, "testsuite", name=clean_text(c.model))
        if c.hindrances:
            case = ET.SubElement(suite, "testcase", classname=clean_text(c.model), name="comparison")
            message = clean_text("; ".join(sentences(c, rules)))
            ET.SubElement(case, "error", type="not comparable", message=message)
        for row in c.rows:
            case = ET.SubElement(
                suite, "testcase", classname=clean_text(c.model), name=clean_text(row.accuracy.name)
            )
            text = clean_text(reason(row, c, rules))
            if conclude([row.finding], rules).exit_code:
                ET.SubElement(case, "failure", type=VERDICTS[row.finding], message=text)
            else:
                ET.SubElement(case, "system-out").text = text
    for element in (root, *root):
        for key, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error")):
            element.set(key, str(len(list(element.iter(tag)))))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def to_annotations(comparisons: Sequence[Comparison], rules: Rules) -> list[str]:
    """Workflow commands, which GitHub shows beside a change: one a model."""
    lines = []
    for c in comparisons:
        good = "notice" if c.verdict.kind == "pass" else "warning"
        level = "error" if c.verdict.exit_code else good
        title, text = f"{c.model}: {c.verdict.kind}", "; ".join(sentences(c, rules))
        lines.append(f"::{level} title={_property(title)}::{_data(text)}")
    return lines


def to_json(comparisons: Sequence[Comparison], rules: Rules) -> str:
    """Everything, for machines. Rates and tolerances are shares, not per cent."""
    verdict = overall(comparisons, rules)
    content = {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict.kind,
        "exit_code": verdict.exit_code,
        "rules": {
            "tolerance": float(rules.tolerance),
            "min_robust": None if rules.min_robust is None else float(rules.min_robust),
            "level": rules.level,
            "accept": list(rules.accept),
        },
        "models": [_model(c, rules) for c in comparisons],
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _model(c: Comparison, rules: Rules) -> dict[str, Any]:
    return {
        "model": c.model,
        "verdict": c.verdict.kind,
        "exit_code": c.verdict.exit_code,
        "reasons": sentences(c, rules),
        "hindrances": [_difference(d) for d in c.hindrances],
        "other_differences": [_difference(d) for d in c.notes],
        "new": _run(c.new),
        "baseline": _run(c.baseline),
        "accuracies": [_accuracy(row, c, rules) for row in c.rows],
    }


def _accuracy(row: Row, c: Comparison, rules: Rules) -> dict[str, Any]:
    f = row.accuracy.flips
    unclear = row.finding == "may have fallen"
    return {
        "id": row.accuracy.id,
        "name": row.accuracy.name,
        "finding": row.finding,
        "n": f.n,
        "before": f.before,
        "now": f.after,
        "lost": f.lost,
        "gained": f.gained,
        "change": f.change,
        "change_low": f.interval[0],
        "change_high": f.interval[1],
        "p_fall": f.p_fall,
        "p_rise": f.p_rise,
        "level": row.level,
        "decides_at": f.decides_at(rules.tolerance, rules.level) if unclear else None,
        "reason": reason(row, c, rules),
    }


def _difference(found: Difference) -> dict[str, str]:
    return {"what": found.what, "now": found.now, "before": found.before}


def _run(record: Record | None) -> dict[str, Any] | None:
    if record is None:
        return None
    m = record.manifest
    return {
        "path": str(record.path) if record.path else None,
        "model": m.model.id,
        "weights_sha256": m.model.weights_sha256,
        "battery": m.battery.id,
        "battery_digest": m.battery_digest,
        "data_digest": m.data.digest,
        "n": record.n,
        "started": m.started,
        "git_commit": m.environment.git_commit,
    }


def _table(c: Comparison) -> list[str]:
    head = f"  {f'n = {count(c.n)}, in %':<{NAME}} before   now  change  95 % interval   lost gained"
    lines = [head]
    for row in c.rows:
        f = row.accuracy.flips
        name = clean_text(_name(row, c))
        name = name if len(name) <= NAME else name[: NAME - 1] + "…"
        lines.append(
            f"  {name:<{NAME}}  {rate(f, f.before):>5} {rate(f, f.after):>5}  {points(f.change):>6}  "
            f"{interval(f):<14} {f.lost:>5} {f.gained:>6}  {MARKS.get(row.finding, '')}".rstrip()
        )
    return lines


def _name(row: Row, c: Comparison) -> str:
    n = row.accuracy.flips.n
    return row.accuracy.name if n == c.n else f"{row.accuracy.name} (n = {count(n)})"


def _wrapped(text: str, start: str) -> list[str]:
    return textwrap.wrap(clean_text(text), WIDTH, initial_indent=start, subsequent_indent=" " * len(start))


def _md(text: str) -> str:
    return markdown(clean_text(text))


def _data(text: str) -> str:
    return clean_text(text).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
