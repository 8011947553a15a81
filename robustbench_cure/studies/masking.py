"""`cure-bench masking`: are gradients masked? All checks of `robustbench_cure.masking`, for any models.

Writes ``masking.json`` (conclusion and findings), ``scatter.csv`` (final margins, a row an image), the
scatter of the CURE paper's figure 7 for print, and ``index.html`` with all of it.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from robustbench_cure.classifier import Classifier
from robustbench_cure.masking.checks import CHECKS, LEVEL, MORE_POWER, Finding, statistics, to_json
from robustbench_cure.masking.conclusions import Conclusion, Diagnosis, conclude, diagnose
from robustbench_cure.masking.evidence import Measurements, PairedMargins, Settings
from robustbench_cure.progress import ProgressLine
from robustbench_cure.report.charts import SIDE, MarginScatter, margin_scatter, picture
from robustbench_cure.report.render import templates
from robustbench_cure.report.table import Column, Table, to_text
from robustbench_cure.studies import plots
from robustbench_cure.studies.engine import Study
from robustbench_cure.threat import ThreatModel

SCHEMA_VERSION = 1
#: Columns of a terminal.
WIDTH = 80
#: PGD on the horizontal axis of each scatter: key in ``masking.json`` -> title.
PGD_RUNS = {"ce": "PGD on cross-entropy", "margin": "PGD on the margin"}
#: Colours for print: SPSA lower, and not.
RED, BLUE = "#c0392b", "#0072b2"


@dataclass(frozen=True)
class ModelResult:
    """One model of the command.

    Attributes:
        name: of the model.
        diagnosis: findings and measurements.
        conclusion: from the findings.
    """

    name: str
    diagnosis: Diagnosis
    conclusion: Conclusion


def masking(
    study: Study,
    *,
    threat: ThreatModel,
    settings: Settings,
    fail_on: Sequence[str] = (),
    surrogate: Classifier | None = None,
) -> int:
    """Diagnose every model of a study, write and print the results; returns the exit code.

    Args:
        study: models, images and the folder.
        threat: the ball.
        settings: how much work is done.
        fail_on: kinds of conclusion that make the exit code 1: ``suspected``, ``not conclusive``.
        surrogate: another model, whose adversarial examples are tried.

    What an interrupted run finished is taken over.
    """
    results = []
    for name, classifier in study.models.items():
        diagnosis = _diagnose(study, name, classifier, threat, settings, surrogate)
        conclusion = conclude(diagnosis.findings, diagnosis.n, fail_on=fail_on)
        results.append(ModelResult(name, diagnosis, conclusion))
        _write_figure(study, results[-1])
        click.echo(_terminal_text(results[-1]))
    tables = [_rows(result.name, result.diagnosis.measurements) for result in results]
    study.table("scatter", pd.concat(tables, ignore_index=True))
    models = {result.name: _as_json(result, threat) for result in results}
    content = {"schema_version": SCHEMA_VERSION, "settings": asdict(settings), "models": models}
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    study.write("masking.json", lambda file: file.write_text(text, encoding="utf-8"))
    page = _page(study, threat, settings, results)
    study.write("index.html", lambda file: file.write_text(page, encoding="utf-8"))
    study.finish({"threat": str(threat), **asdict(settings)})
    click.echo(f"page: {study.out / 'index.html'}")
    return max((result.conclusion.exit_code for result in results), default=0)


def _diagnose(
    study: Study,
    name: str,
    classifier: Classifier,
    threat: ThreatModel,
    settings: Settings,
    surrogate: Classifier | None,
) -> Diagnosis:
    other = "" if surrogate is None else surrogate.model_info().weights_sha256
    cache = study.cache(name, "outcomes", threat=threat, surrogate=other, **asdict(settings))
    with ProgressLine(name, "%") as line:

        def progress(done: float, total: float, attack: str) -> None:
            line(round(100 * done / total), 100, attack)

        try:
            return diagnose(
                classifier,
                study.data,
                threat,
                settings,
                progress=progress,
                cache=cache,
                surrogate=surrogate,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"what is finished is kept: go on with the same command and --out {study.out}"
            ) from None


def _pairs(m: Measurements) -> dict[str, PairedMargins]:
    """Final margins of each PGD beside those of SPSA, by its key in ``masking.json``; none without images."""
    if not len(m):
        return {}
    margins = {"ce": m.pgd_ce.margin, "margin": m.pgd_margin().margin}
    return {key: PairedMargins(PGD_RUNS[key], m.ids, margins[key], m.spsa.margin) for key in PGD_RUNS}


def _write_figure(study: Study, result: ModelResult) -> None:
    pairs = _pairs(result.diagnosis.measurements)
    if pairs:
        stem = "scatter" if len(study.models) == 1 else f"scatter-{result.name}"
        caption = "Final margins of SPSA against those of PGD, image by image."
        study.figure(stem, _figure(list(pairs.values())), caption, caption)


def _figure(scatters: Sequence[PairedMargins]) -> Figure:
    """The scatters side by side for print."""
    with plots.style():
        figure = Figure(figsize=(3.5 * len(scatters), 3.7))
        for axes, pairs in zip(np.atleast_1d(figure.subplots(1, len(scatters))), scatters, strict=True):
            a, b = pairs.pgd.double().cpu().numpy(), pairs.spsa.double().cpu().numpy()
            low, high = min(a.min(), b.min(), 0.0), max(a.max(), b.max(), 0.0)
            room = 0.04 * (high - low or 1.0)
            span = (low - room, high + room)
            axes.plot(span, span, color="0.6", linewidth=0.8)
            axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
            axes.axvline(0, color="0.85", linewidth=0.8, zorder=0)
            below = b < a
            axes.scatter(a[~below], b[~below], s=9, color=BLUE, alpha=0.6, linewidths=0)
            axes.scatter(a[below], b[below], s=14, color=RED, marker="D", alpha=0.85, linewidths=0)
            axes.set(xlim=span, ylim=span, title=pairs.title, aspect="equal")
            axes.set_xlabel("margin J at the end of PGD")
            axes.set_ylabel("margin J at the end of SPSA")
        figure.tight_layout()
    return figure


def _rows(name: str, m: Measurements) -> pd.DataFrame:
    """The numbers behind the scatters, a row an image."""
    if not len(m):
        return pd.DataFrame({"model": []})
    attacks = {"pgd_ce": m.pgd_ce, "pgd_margin": m.pgd_margin(), "spsa": m.spsa, "square": m.square}
    columns = {
        "model": name,
        "sample_id": m.ids,
        "label": m.y.tolist(),
        "clean_margin": m.clean_margin.tolist(),
        **{f"{key}_margin": result.margin.tolist() for key, result in attacks.items()},
        **{f"{key}_broken": result.broken.tolist() for key, result in attacks.items()},
        "below": (m.spsa.margin < m.white_box_margin).tolist(),
    }
    return pd.DataFrame(columns)


def _as_json(result: ModelResult, threat: ThreatModel) -> dict[str, Any]:
    m = result.diagnosis.measurements
    return {
        "verdict": {"kind": result.conclusion.kind, "words": result.conclusion.words},
        "threat": {"norm": threat.norm, "eps": str(threat.eps)},
        "images": m.total,
        "classified_correctly": result.diagnosis.n,
        "scatter": {key: statistics(pairs) for key, pairs in _pairs(m).items()},
        "findings": [to_json(finding) for finding in result.diagnosis.findings],
    }


def _terminal_text(result: ModelResult) -> str:
    """The conclusion, a line a check, and the evidence of those raised or inconclusive."""
    findings = result.diagnosis.findings
    heads = (
        Column("check", "left"),
        Column("result", "left"),
        Column("value"),
        Column("limit", "left"),
        Column("p", "left"),
    )
    rows = tuple((f.check, f.status, f.value_words, f.limit_words, f.p_words) for f in findings)
    lines = [*textwrap.wrap(f"{result.name}: {result.conclusion.words}", WIDTH), ""]
    lines.append(to_text(Table("", "", heads, rows), indent="  "))
    lines.append(f"  Raised beyond the limit; where there is a p, it must be below {LEVEL:g} as well.")
    for f in findings:
        about = CHECKS[f.check]
        if f.status == "raised":
            lines += ["", *_wrapped(f"{f.check}: {about.title}. {_sentence(f)}")]
            lines += [*_wrapped(f"   Means: {about.means}."), *_wrapped(f"   Next: {about.do_next}.")]
        elif f.status == "inconclusive":
            lines += ["", *_wrapped(f"{f.check}: {_sentence(f)}"), *_wrapped(f"   Next: {MORE_POWER}.")]
    return "\n".join(lines) + "\n"


def _sentence(finding: Finding) -> str:
    return f"{finding.evidence[0].upper()}{finding.evidence[1:]}."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="   ")


def _page(study: Study, threat: ThreatModel, settings: Settings, results: Sequence[ModelResult]) -> str:
    data = study.data
    work = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in asdict(settings).items())
    facts = [
        ("threat model", str(threat)),
        ("data", f"{data.name} {data.split}, {len(data)} images"),
        *([("note", data.notes)] if data.notes else []),
        ("settings", work),
        ("command", study.command),
    ]
    return (
        templates()
        .get_template("masking.html")
        .render(
            models=[
                {
                    "name": result.name,
                    "conclusion": result.conclusion,
                    "findings": result.diagnosis.findings,
                    "plots": _plots(result.diagnosis.measurements),
                }
                for result in results
            ],
            checks=CHECKS,
            side=SIDE,
            facts=facts,
            files=sorted(path.name for path in study.files),
        )
    )


def _plots(m: Measurements) -> list[MarginScatter]:
    pictures = [picture(image) for image in m.x]
    return [margin_scatter(pairs, pictures) for pairs in _pairs(m).values()]
