"""`cure-bench masking`: findings, scatter, page and verdict of one or more models."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
import pandas as pd

from robustbench_cure.classifier import Classifier
from robustbench_cure.files import Cache
from robustbench_cure.masking import scatter
from robustbench_cure.masking.evidence import Evidence, Settings
from robustbench_cure.masking.explanations import EXPLANATIONS, STRONGER
from robustbench_cure.masking.finding import LEVEL, Finding
from robustbench_cure.masking.verdict import Diagnosis, Verdict, conclude, diagnose
from robustbench_cure.progress import ProgressLine
from robustbench_cure.report.render import environment
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.engine import Study
from robustbench_cure.threat import ThreatModel

SCHEMA_VERSION = 1
#: Columns of a terminal.
WIDTH = 80
#: What the plots are called, by the PGD on their horizontal axes.
PANELS = ("PGD on cross-entropy", "PGD on the margin")


def masking(
    study: Study,
    *,
    threat: ThreatModel,
    settings: Settings,
    fail_on: Sequence[str] = (),
    surrogate: Classifier | None = None,
) -> int:
    """Diagnose every model of a study, write what was found, and say it; returns the exit code.

    Args:
        study: models, images and the folder.
        threat: the ball in question.
        settings: how much work is done.
        fail_on: kinds of verdict that make the exit code 1: ``suspected``, ``not conclusive``.
        surrogate: another model, for the check of transfer.

    What an interrupted run finished is taken over.
    """
    told, written, tables = [], {}, []
    codes = [0]
    for name, classifier in study.models.items():
        diagnosis = _diagnose(study, name, classifier, threat, settings, surrogate)
        verdict = conclude(diagnosis.findings, diagnosis.n, fail_on=fail_on)
        codes.append(verdict.exit_code)
        panels = _draw(study, name, diagnosis.evidence) if diagnosis.n else []
        tables.append(_rows(name, diagnosis.evidence))
        written[name] = _as_json(diagnosis, verdict, threat)
        told.append((name, verdict, diagnosis, panels))
        click.echo(_in_terminal(name, verdict, diagnosis.findings))
    study.table("scatter", pd.concat(tables, ignore_index=True))
    content = {"schema_version": SCHEMA_VERSION, "settings": asdict(settings), "models": written}
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    study.write("masking.json", lambda file: file.write_text(text, encoding="utf-8"))
    page = _page(study, threat, settings, told)
    study.write("index.html", lambda file: file.write_text(page, encoding="utf-8"))
    study.finish({"threat": str(threat), **asdict(settings)})
    click.echo(f"page: {study.out / 'index.html'}")
    return max(codes)


def _diagnose(
    study: Study,
    name: str,
    classifier: Classifier,
    threat: ThreatModel,
    settings: Settings,
    surrogate: Classifier | None,
) -> Diagnosis:
    other = "" if surrogate is None else surrogate.model_info().weights_sha256
    identity = study.identity(name, threat=threat, surrogate=other, **asdict(settings))
    kept = Cache(study.out / f"outcomes-{name}.npz", identity)
    with ProgressLine(name, "%") as line:

        def progress(done: float, total: float, doing: str) -> None:
            line(round(100 * done / total), 100, doing)

        try:
            return diagnose(
                classifier, study.data, threat, settings, progress=progress, kept=kept, surrogate=surrogate
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"what is finished is kept: go on with the same command and --out {study.out}"
            ) from None


def _draw(study: Study, name: str, e: Evidence) -> list[scatter.Panel]:
    """Write the plots of one model for print, and return them for the page."""
    pairs = list(zip(PANELS, (e.pgd_ce.margin, e.pgd_margin().margin), strict=True))
    stem = "scatter" if len(study.models) == 1 else f"scatter-{name}"
    drawing = scatter.figure([(title, margin, e.spsa.margin) for title, margin in pairs])
    study.files += figures.save(drawing, study.out / stem)
    pictures = [scatter.picture(image) for image in e.x]
    return [scatter.panel(title, e.ids, margin, e.spsa.margin, pictures) for title, margin in pairs]


def _rows(name: str, e: Evidence) -> pd.DataFrame:
    """The numbers behind the plots, a row an image."""
    if not len(e):
        return pd.DataFrame({"model": []})
    named = {"pgd_ce": e.pgd_ce, "pgd_margin": e.pgd_margin(), "spsa": e.spsa, "square": e.square}
    columns = {
        "model": name,
        "sample_id": e.ids,
        "label": e.y.tolist(),
        "clean_margin": e.clean_margin.tolist(),
        **{f"{key}_margin": outcome.margin.tolist() for key, outcome in named.items()},
        **{f"{key}_broken": outcome.broken.tolist() for key, outcome in named.items()},
        "below": (e.spsa.margin < e.white_box_margin).tolist(),
    }
    return pd.DataFrame(columns)


def _as_json(diagnosis: Diagnosis, verdict: Verdict, threat: ThreatModel) -> dict[str, Any]:
    e = diagnosis.evidence
    found = [{"title": EXPLANATIONS[f.letter].title, **f.model_dump(mode="json")} for f in diagnosis.findings]
    plots = {}
    if diagnosis.n:
        pairs = zip(("ce", "margin"), (e.pgd_ce.margin, e.pgd_margin().margin), strict=True)
        plots = {key: scatter.statistics(margin, e.spsa.margin) for key, margin in pairs}
    return {
        "verdict": {"kind": verdict.kind, "words": verdict.words},
        "threat": {"norm": threat.norm, "eps": str(threat.eps)},
        "images": e.total,
        "classified_correctly": diagnosis.n,
        "scatter": plots,
        "findings": found,
    }


def _in_terminal(name: str, verdict: Verdict, findings: Sequence[Finding]) -> str:
    """A verdict, a line a check, and the evidence of those raised or inconclusive."""
    head = f"     {'check':<40} {'found':<12} {'value':>7} {'limit':<6} p"
    lines = [*textwrap.wrap(f"{name}: {verdict.words}", WIDTH), "", head]
    for f in findings:
        numbers = f"{f.value_words:>7} {f.limit_words:<6} {f.p_words}"
        lines.append(f"  {f.letter}  {EXPLANATIONS[f.letter].title:<40} {f.status:<12} {numbers}".rstrip())
    lines.append(f"  Raised beyond the limit; where there is a p, it must be below {LEVEL:g} as well.")
    for f in findings:
        if f.status == "raised":
            about = EXPLANATIONS[f.letter]
            lines += ["", *_wrapped(f"{f.letter}: {f.evidence}.")]
            lines += [*_wrapped(f"   Means: {about.means}."), *_wrapped(f"   Next: {about.do_next}.")]
        elif f.status == "inconclusive":
            lines += ["", *_wrapped(f"{f.letter}: {f.evidence}."), *_wrapped(f"   Next: {STRONGER}.")]
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="   ")


def _page(
    study: Study,
    threat: ThreatModel,
    settings: Settings,
    told: Sequence[tuple[str, Verdict, Diagnosis, list[scatter.Panel]]],
) -> str:
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
        environment()
        .get_template("masking.html")
        .render(
            told=[
                {"name": name, "verdict": verdict, "n": d.n, "findings": d.findings, "panels": panels}
                for name, verdict, d, panels in told
            ],
            explanations=EXPLANATIONS,
            side=scatter.SIDE,
            facts=facts,
            files=sorted(path.name for path in study.files),
        )
    )
