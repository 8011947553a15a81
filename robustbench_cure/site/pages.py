"""The pages of the site: what each template is given. Pure functions of what was found."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from robustbench_cure.evaluation.flags import FLAG_KINDS
from robustbench_cure.evaluation.record import Record
from robustbench_cure.masking.checks import CHECKS
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.report import figure
from robustbench_cure.report.paper import PaperTable
from robustbench_cure.report.provenance import facts
from robustbench_cure.report.render import TEMPLATES, environment
from robustbench_cure.report.scatter import SIDE
from robustbench_cure.report.sheet import Sheet
from robustbench_cure.report.tables import SEVERITIES, AccuracyRow, DistanceRow, attack_rows, protocols
from robustbench_cure.report.wording import count
from robustbench_cure.site import checklist, curves, sheets
from robustbench_cure.site.beside import FIGURES, STUDIES, TABLES, Panel, recorded, study_files
from robustbench_cure.site.found import StudyFolder
from robustbench_cure.site.standings import Board, Standing

VENDOR = Path(__file__).parent / "vendor"
#: Said where a record has no curve.
CURVELESS = (
    "No steps curve: the battery has no PGD without restarts that stops at its first success. "
    "No eps curve: it has no minimal-norm attack; cure-bench curve makes one."
)
EPSLESS = "No eps curve in this record: the battery has no minimal-norm attack; cure-bench curve makes one."


@dataclass(frozen=True)
class Script:
    """A script inside a page, and the hash by which the page's security policy knows it."""

    text: str

    @property
    def hash(self) -> str:
        """Source expression of the Content-Security-Policy."""
        digest = hashlib.sha256(self.text.encode()).digest()
        return f"sha256-{base64.b64encode(digest).decode()}"


@cache
def scripts() -> tuple[Script, ...]:
    """DataTables, and what the leaderboard adds to it."""
    files = (VENDOR / "datatables.min.js", TEMPLATES / "site" / "site.js")
    return tuple(Script(file.read_text(encoding="utf-8")) for file in files)


@dataclass(frozen=True)
class Model:
    """Everything about one model, known by its weights.

    Attributes:
        slug: name of its folder.
        records: its runs.
        card: what its authors declare.
        standings: its rows, each with its board.
        panels: diagnoses of masking.
        studies: folder of the site -> study, geometry and masking.
    """

    slug: str
    records: tuple[Record, ...]
    card: ModelCard | None
    standings: tuple[tuple[Board, Standing], ...]
    panels: tuple[Panel, ...]
    studies: tuple[tuple[str, StudyFolder], ...]

    @property
    def label(self) -> str:
        """The model's name."""
        model = self.records[0].manifest.model
        return model.name or model.id

    @property
    def page(self) -> str:
        """Address of its page, from the index."""
        return f"models/{self.slug}/index.html"


@dataclass(frozen=True)
class _Line:
    """A model's flags, for the flags section."""

    label: str
    flags: tuple[Any, ...]


def _render(template: str, **context: Any) -> str:
    return environment().get_template(f"site/{template}").render(**context)


def _raised(records: Sequence[Record]) -> dict[str, Any]:
    """Flags of some records: raised with their evidence, and not raised."""
    kinds = {flag.kind for record in records for flag in record.flags}
    order = sorted(FLAG_KINDS.items(), key=lambda item: SEVERITIES.index(item[1].severity))
    return {
        "raised": [(kind, about) for kind, about in order if kind in kinds],
        "unraised": [about for kind, about in order if kind not in kinds],
        "versions": sorted({record.manifest.environment.version for record in records}),
    }


def index(boards: Sequence[Board], papers: Sequence[PaperTable], models: Sequence[Model]) -> str:
    """The leaderboard."""
    records = [record for model in models for record in model.records]

    def page_of(row: Standing) -> str:
        return next(model.page for model in models if row.is_about(model.records[0].manifest.model))

    kinds = {"measured": 0, "external": 0, "published": 0}
    for board in boards:
        for row in board.rows:
            kinds["published" if row.kind == "quoted" else row.kind] += 1
    return _render(
        "index.html",
        title="Robustness leaderboard",
        scripts=scripts(),
        boards=boards,
        page_of=page_of,
        kinds=list(kinds.items()),
        tables=[_filled(paper) for paper in papers],
        lines=[_line(model) for model in models],
        **_raised(records),
    )


def _filled(paper: PaperTable) -> dict[str, Any]:
    cells = [cell for row in paper.rows for cell in row.cells if cell.published is not None]
    measured = [cell for cell in cells if cell.measurements]
    same = sum(any(m.same for m in cell.measurements) for cell in measured)
    return {"table": paper.table, "cells": len(cells), "filled": len(measured), "same": same}


def _line(model: Model) -> _Line:
    flags = {(f.kind, f.attack, f.evidence): f for r in model.records for f in r.flags}
    return _Line(model.label, tuple(flags.values()))


def paper(laid: PaperTable, models: Sequence[Model]) -> str:
    """One paper table."""
    able = {row.id for row in laid.rows}
    found = [(m.label, m.page) for m in models if m.records[0].manifest.model.published_row in able]
    return _render(
        "table.html",
        title=laid.table.title,
        scripts=(),
        versions=(),
        paper=laid,
        sources=sheets.sources(laid),
        models=found,
    )


@dataclass(frozen=True)
class ModelPage:
    """A model's page, and the sheets whose twins lie beside it, by stem."""

    html: str
    sheets: dict[str, list[Sheet]]


def model(this: Model, papers: Sequence[PaperTable], raw: Sequence[dict[str, Any]]) -> ModelPage:
    """One model.

    Args:
        this: the model.
        papers: the published tables that its images and batteries belong to.
        raw: for each record its name and the files (address, name, size) it can be downloaded as.
    """
    groups, drawn, twins = [], [], {}
    found = protocols(this.records)
    for g, group in enumerate(found):
        record = group.summary[0].record
        pairs = [("steps", curves.steps(record)), ("radii", curves.radii(record))]
        for kind, lines in pairs:
            plot = curves.plot(lines)
            if plot is not None:
                stem, sheet = f"{kind}-{g + 1}", curves.sheet(lines)
                twins[stem] = [sheet]
                drawn.append({"group": g, "key": f"g{g}-{kind}", "stem": stem, "plot": plot, "sheet": sheet})
        groups.append(
            {
                "protocol": group,
                "bands": figure.bands(group),
                "specs": attack_rows(record)[1:-1],
                "tables": [_split(line.record) for line in group.summary],
                "curveless": "" if pairs[1][1] else EPSLESS if pairs[0][1] else CURVELESS,
            }
        )
    lists = []
    for r, record in enumerate(this.records):
        stem, items = f"checklist-{r + 1}", checklist.checklist(record, this.card)
        twins[stem] = [checklist.sheet(items)]
        lists.append({"name": record.manifest.battery.name, "entries": items, "stem": stem})
    panels = []
    own = [panel for record in this.records if (panel := recorded(record)) is not None]
    for p, panel in enumerate((*this.panels, *own)):
        twins[f"masking-{p + 1}"] = [panel.sheet]
        folder = next((folder for folder, study in this.studies if study is panel.study), "")
        drawings = [f"../../{folder}/{path.name}" for path in panel.figures]
        panels.append({**vars(panel), "stem": f"masking-{p + 1}", "figures": drawings})
    lines_of = [(group, facts([line.record for line in group.summary])) for group in found]
    twins["provenance"] = sheets.provenance([(group.battery.name, lines) for group, lines in lines_of])
    row = this.records[0].manifest.model.published_row
    html = _render(
        "model.html",
        title=this.label,
        scripts=(),
        id=this.records[0].manifest.model.id,
        about=_about(this),
        standings=[
            {"board": board.name, "row": standing, "of": sum(bool(r.rank) for r in board.rows)}
            for board, standing in this.standings
        ],
        groups=groups,
        curves=drawn,
        papers=[p.table for p in papers if row and any(r.id == row for r in p.rows)],
        masking=panels,
        side=SIDE,
        checks=CHECKS,
        studies=[_study(folder, study) for folder, study in this.studies if study.verb != "masking"],
        checklists=lists,
        lines=[_line(this)],
        facts=lines_of,
        records=raw,
        **_raised(this.records),
    )
    return ModelPage(html, twins)


def _about(this: Model) -> list[tuple[str, str]]:
    info = this.records[0].manifest.model
    lines = [
        ("Id", info.id),
        ("Architecture", f"{info.architecture}, {count(info.parameters)} parameters"),
        ("Training", info.training),
        ("Extra data", this.card.extra_data if this.card else "not declared: no card is about these weights"),
        ("Licence", this.card.license if this.card else ""),
        ("Paper", this.card.paper if this.card else ""),
        ("Weights", f"SHA-256 {info.weights_sha256[:16]}…"),
    ]
    return [(name, value) for name, value in lines if value]


def _study(folder: str, study: StudyFolder) -> dict[str, Any]:
    name, about = STUDIES.get(study.verb, (study.verb, ""))
    return {
        "name": name,
        "models": ", ".join(study.models),
        "about": f"{about} {study.data}; {', '.join(study.models)}.".strip(),
        "figures": [f"../../{folder}/{path.name}" for path in study_files(study, FIGURES)],
        "tables": [(path.name, f"../../{folder}/{path.name}") for path in study_files(study, TABLES)],
    }


def _split(record: Record) -> tuple[list[AccuracyRow], list[DistanceRow]]:
    rows = attack_rows(record)
    return (
        [row for row in rows if isinstance(row, AccuracyRow)],
        [row for row in rows if isinstance(row, DistanceRow)],
    )


def tables_of(boards: Sequence[Board]) -> Mapping[str, list[Sheet]]:
    """The leaderboard's sheets, by stem."""
    return {"leaderboard": [sheets.leaderboard(board) for board in boards]}
