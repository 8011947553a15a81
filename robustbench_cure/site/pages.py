"""The pages of the site: what each template is given. Pure functions of records."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from robustbench_cure.evaluation.flags import FLAG_KINDS
from robustbench_cure.evaluation.record import Record
from robustbench_cure.masking.checks import CHECKS
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.report import charts
from robustbench_cure.report.charts import SIDE
from robustbench_cure.report.paper import PaperTable
from robustbench_cure.report.provenance import facts
from robustbench_cure.report.render import TEMPLATES, templates
from robustbench_cure.report.table import Table
from robustbench_cure.report.tables import SEVERITIES, AccuracyRow, DistanceRow, attack_rows, protocols
from robustbench_cure.report.wording import count
from robustbench_cure.site import checklist, tables
from robustbench_cure.site.entries import FEWEST, LARGEST, SIZES, UNKNOWN, Entry, Leaderboard
from robustbench_cure.site.runs import (
    FIGURES,
    TABLES,
    MaskingSection,
    StudyFolder,
    section_of_record,
    study_files,
)

#: What the pictures of each command show.
STUDIES = {
    "curvature": ("Curvature of the loss", "Eigenvalues of the Hessian in the input: flat is robust."),
    "bounds": (
        "Bounds of Theorem 1",
        "Lower and upper bound of the distance to the boundary, and DeepFool's distance.",
    ),
    "curve": ("Accuracy and radius", "Accuracy under PGD at every radius: it should fall to chance."),
    "section": ("Decision regions", "Planes through an image and its nearest boundary."),
    "surface": (
        "Loss surface",
        "The loss along the nearest boundary's normal and a random direction.",
    ),
    "gallery": ("Gallery", "Images, the perturbations that break them, and what the model sees."),
    "distance": ("Distance of the boundary", "Average robustness: how far the nearest boundaries are."),
    "boundary": ("Curvature of the boundary", "How the boundaries nearest to the images bend."),
    "detect": ("Detection", "Whether the curvature around an image tells that it was perturbed."),
    "shared": ("Shared directions", "What the boundaries near different images have in common."),
    "subspace": ("Subspaces", "The shortest perturbations of random subspaces or frequencies alone."),
    "universal": ("Universal perturbations", "One perturbation for all images, and what it does to them."),
    "connectivity": ("Connected regions", "Paths inside the regions of the labels, and their convexity."),
    "evolution": ("Training", "Curvature and robustness by epoch."),
}
VENDOR = Path(__file__).parent / "vendor"
#: Printed where a record has no curve.
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
        entries: its rows, each with its leaderboard.
        masking: diagnoses of masked gradients, from the studies.
        studies: folder of the site -> study, geometry and masking.
    """

    slug: str
    records: tuple[Record, ...]
    card: ModelCard | None
    entries: tuple[tuple[Leaderboard, Entry], ...]
    masking: tuple[MaskingSection, ...]
    studies: tuple[tuple[str, StudyFolder], ...]

    @property
    def label(self) -> str:
        """Name of the model, or its id where it has none."""
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
    return templates().get_template(f"site/{template}").render(**context)


def _raised(records: Sequence[Record]) -> dict[str, Any]:
    """Flags of some records: raised with their evidence, and not raised."""
    kinds = {flag.kind for record in records for flag in record.flags}
    order = sorted(FLAG_KINDS.items(), key=lambda item: SEVERITIES.index(item[1].severity))
    return {
        "raised": [(kind, about) for kind, about in order if kind in kinds],
        "unraised": [about for kind, about in order if kind not in kinds],
        "versions": sorted({record.manifest.environment.version for record in records}),
    }


def index(leaderboards: Sequence[Leaderboard], papers: Sequence[PaperTable], models: Sequence[Model]) -> str:
    """The leaderboards, and what leads to the other pages."""
    records = [record for model in models for record in model.records]

    def page_of(row: Entry) -> str:
        return next(model.page for model in models if row.is_of(model.records))

    kinds = {"measured": 0, "external": 0, "published": 0}
    for leaderboard in leaderboards:
        for row in leaderboard.rows:
            kinds["published" if row.kind == "quoted" else row.kind] += 1
    return _render(
        "index.html",
        title="Robustness leaderboard",
        scripts=scripts(),
        leaderboards=leaderboards,
        page_of=page_of,
        kinds=list(kinds.items()),
        filters=_filters([row for leaderboard in leaderboards for row in leaderboard.rows]),
        ranks=tables.RANKS,
        fewest=FEWEST,
        tables=[_filled(paper) for paper in papers],
        lines=[_line(model) for model in models],
        **_raised(records),
    )


def _filters(rows: Sequence[Entry]) -> list[tuple[str, str, list[str]]]:
    """Name of a row's attribute, label, and values of each filter; those that rows have alone."""
    sizes = [*(words for _, words in SIZES), LARGEST, UNKNOWN]
    wanted = [
        ("extra", "Extra data", ["none", "some", "not declared"], {row.data_class for row in rows}),
        ("size", "Parameters", sizes, {row.size for row in rows}),
    ]
    architectures = sorted({row.architecture for row in rows}, key=lambda name: (name.casefold(), name))
    shown = [(key, label, [v for v in values if v in there]) for key, label, values, there in wanted]
    return [*shown, ("architecture", "Architecture", architectures)]


def _filled(paper: PaperTable) -> dict[str, Any]:
    cells = [cell for row in paper.rows for cell in row.cells if cell.published is not None]
    measured = [cell for cell in cells if cell.measurements]
    same = sum(any(m.same for m in cell.measurements) for cell in measured)
    return {"table": paper.table, "cells": len(cells), "filled": len(measured), "same": same}


def _line(model: Model) -> _Line:
    flags = {(f.kind, f.attack, f.evidence): f for r in model.records for f in r.flags}
    return _Line(model.label, tuple(flags.values()))


def paper(laid: PaperTable, models: Sequence[Model]) -> str:
    """The page of one paper table.

    Args:
        laid: the table as printed, with what was measured.
        models: all models of the site; those of its rows are linked.
    """
    rows = {row.id for row in laid.rows}
    measured = [(m.label, m.page) for m in models if m.records[0].manifest.model.published_row in rows]
    return _render(
        "table.html",
        title=laid.table.title,
        scripts=(),
        versions=(),
        paper=laid,
        sources=tables.sources(laid),
        models=measured,
    )


@dataclass(frozen=True)
class RawRecord:
    """Where the record behind a page lies.

    Attributes:
        name: battery, data set and n.
        place: folder below the run directory; empty: on no disk.
        files: (address or empty, name, size) of each file of it.
    """

    name: str
    place: str
    files: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class ModelPage:
    """A model's page, and the tables that are exported into its folder, by stem."""

    html: str
    tables: dict[str, list[Table]]


def model(this: Model, papers: Sequence[PaperTable], raw: Sequence[RawRecord]) -> ModelPage:
    """One model.

    Args:
        this: the model.
        papers: the published tables that its images and batteries belong to.
        raw: where each of its records lies.
    """
    groups, drawn = [], []
    exported: dict[str, list[Table]] = {}
    shown = protocols(this.records)
    for g, group in enumerate(shown):
        record = group.summary[0].record
        pairs = [("steps", charts.step_curves(record)), ("radii", charts.radius_curves(record))]
        for kind, lines in pairs:
            plot = charts.plot(lines)
            if plot is not None:
                stem, table = f"{kind}-{g + 1}", charts.curve_table(lines)
                exported[stem] = [table]
                drawn.append({"group": g, "key": f"g{g}-{kind}", "stem": stem, "plot": plot, "table": table})
        groups.append(
            {
                "protocol": group,
                "bands": charts.bands(group),
                "specs": attack_rows(record)[1:-1],
                "tables": [_split(line.record) for line in group.summary],
                "curveless": "" if pairs[1][1] else EPSLESS if pairs[0][1] else CURVELESS,
            }
        )
    lists = []
    for r, record in enumerate(this.records):
        stem, items = f"checklist-{r + 1}", checklist.checklist(record, this.card)
        exported[stem] = [checklist.checklist_table(items)]
        lists.append({"name": record.manifest.battery.name, "entries": items, "stem": stem})
    masking = []
    own = [diagnosis for record in this.records if (diagnosis := section_of_record(record)) is not None]
    for d, diagnosis in enumerate((*this.masking, *own), 1):
        exported[f"masking-{d}"] = [diagnosis.table]
        folder = next((folder for folder, study in this.studies if study is diagnosis.study), "")
        drawings = [_image(folder, path) for path in diagnosis.figures]
        masking.append({**vars(diagnosis), "stem": f"masking-{d}", "figures": drawings})
    lines_of = [(group, facts([line.record for line in group.summary])) for group in shown]
    exported["provenance"] = tables.provenance([(group.battery.name, lines) for group, lines in lines_of])
    row = this.records[0].manifest.model.published_row
    html = _render(
        "model.html",
        title=this.label,
        scripts=(),
        id=this.records[0].manifest.model.id,
        about=_about(this),
        entries=[
            {"leaderboard": leaderboard.name, "row": entry, "of": sum(bool(r.rank) for r in leaderboard.rows)}
            for leaderboard, entry in this.entries
        ],
        groups=groups,
        curves=drawn,
        papers=[p.table for p in papers if row and any(r.id == row for r in p.rows)],
        masking=masking,
        side=SIDE,
        checks=CHECKS,
        studies=[_study(folder, study) for folder, study in this.studies if study.verb != "masking"],
        checklists=lists,
        lines=[_line(this)],
        facts=lines_of,
        records=raw,
        **_raised(this.records),
    )
    return ModelPage(html, exported)


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


def _image(folder: str, path: Path) -> dict[str, Any]:
    """Address of a figure from a model's page, and its width; PNGs are made for screens of double density."""
    width = 0
    if path.suffix == ".png":
        with path.open("rb") as file:
            width = int.from_bytes(file.read(20)[16:], "big") // 2
    return {"href": f"../../{folder}/{path.name}", "width": width}


def _study(folder: str, study: StudyFolder) -> dict[str, Any]:
    name, about = STUDIES.get(study.verb, (study.verb, ""))
    return {
        "name": name,
        "models": ", ".join(study.models),
        "about": f"{about} {study.data}; {', '.join(study.models)}.".strip(),
        "figures": [_image(folder, path) for path in study_files(study, FIGURES)],
        "tables": [(path.name, f"../../{folder}/{path.name}") for path in study_files(study, TABLES)],
    }


def _split(record: Record) -> tuple[list[AccuracyRow], list[DistanceRow]]:
    rows = attack_rows(record)
    return (
        [row for row in rows if isinstance(row, AccuracyRow)],
        [row for row in rows if isinstance(row, DistanceRow)],
    )
