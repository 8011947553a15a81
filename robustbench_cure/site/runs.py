"""What lies in run directories: records, studies of geometry and masking, verified attacks of others.

And what belongs to the model of a record among it: its studies, its diagnoses of masked gradients, its card.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.external import MANIFEST as EXTERNAL
from robustbench_cure.evaluation.external import Evidence
from robustbench_cure.evaluation.record import Record
from robustbench_cure.masking.checks import CHECKS, Finding, from_json
from robustbench_cure.masking.conclusions import conclude
from robustbench_cure.masking.recorded import from_record
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import CardFile
from robustbench_cure.protocol.identity import ModelInfo
from robustbench_cure.protocol.schema import describe
from robustbench_cure.report.charts import MarginScatter, margin_scatter
from robustbench_cure.report.table import Table, columns
from robustbench_cure.report.wording import data_words, threat_words
from robustbench_cure.threat import ThreatModel

#: List of a site's files; a folder that has one is a site and holds copies of records, not records.
SITE = "site.json"

#: Files of a study that the site shows or offers; of one figure or table in two formats the first counts.
FIGURES, TABLES = (".svg", ".png"), (".csv", ".parquet")


class StudiedModel(BaseModel):
    """The part of a `ModelInfo` that says which model a study is about."""

    weights_sha256: str = ""
    tensors_sha256: str = ""
    answers: list[float] = []

    def is_about(self, model: ModelInfo) -> bool:
        """Whether this is the same function with the same weights."""
        return model.same_as(model.model_copy(update=self.model_dump()))


class _Images(BaseModel):
    name: str = ""
    split: str = ""
    n: int = 0


class StudyManifest(BaseModel):
    """The part of a study's ``manifest.json`` that the site reads; the commands write more."""

    verb: Annotated[str, Field(pattern=r"^[a-z][a-z-]{0,30}$")]
    models: dict[str, StudiedModel] = {}
    data: _Images = _Images()
    files: list[str] = []


@dataclass(frozen=True)
class StudyFolder:
    """What `cure-bench masking`, `curvature`, `bounds`, `curve`, `section`, ... left behind."""

    path: Path
    manifest: StudyManifest

    @property
    def verb(self) -> str:
        """Name of the command that wrote it."""
        return self.manifest.verb

    @property
    def models(self) -> dict[str, StudiedModel]:
        """The studied models by name; empty for studies that are about no weights."""
        return self.manifest.models

    def names_of(self, model: ModelInfo) -> list[str]:
        """The names under which a model was studied; none if the study is not about it."""
        return [name for name, studied in self.models.items() if studied.is_about(model)]

    @property
    def data(self) -> str:
        """Images it was made on, in words."""
        data = self.manifest.data
        return f"{data.name} {data.split}, {data.n} image{'s' * (data.n != 1)}"


@dataclass(frozen=True)
class Runs:
    """Everything in some run directories, each kind in order of its path.

    Attributes:
        records: finished runs.
        studies: folders of the geometry and masking commands.
        external: verified adversarial images of others.
        roots: the directories that were scanned.
    """

    records: tuple[Record, ...] = ()
    studies: tuple[StudyFolder, ...] = ()
    external: tuple[Evidence, ...] = ()
    roots: tuple[Path, ...] = ()

    def place(self, record: Record) -> str | None:
        """Folder of a record below the directory it was read from, with ``/``; None: it is on no disk."""
        for root in self.roots:
            if record.path is not None and record.path.is_relative_to(root):
                place = record.path.relative_to(root).as_posix()
                return "" if place == "." else place
        return None


def scan(runs: Sequence[Path]) -> Runs:
    """Look through directories and all folders in them.

    Args:
        runs: run directories, or folders of them; a folder met twice counts once.

    Raises:
        UsageError: no such directory, or a run that is damaged, unfinished or only a part.
    """
    visited: set[Path] = set()
    records: list[Record] = []
    studies: list[StudyFolder] = []
    external: list[Evidence] = []
    for run in runs:
        if not run.is_dir():
            raise UsageError(f"{run}: no such run directory")
        for folder, names in _folders(run):
            if folder.resolve() in visited:
                continue
            visited.add(folder.resolve())
            if EXTERNAL in names:
                external.append(Evidence.load(folder))
            if "manifest.json" in names:
                manifest = _manifest(folder / "manifest.json")
                if "battery" in manifest:
                    records.append(_record(folder))
                elif "verb" in manifest:
                    studies.append(_study(folder, manifest))
    return Runs(tuple(records), tuple(studies), tuple(external), tuple(runs))


def _folders(run: Path) -> Iterator[tuple[Path, set[str]]]:
    for place, folders, names in os.walk(run):
        if SITE in names:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(place), set(names)


def _manifest(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None
    return data if isinstance(data, dict) else {}


def _record(folder: Path) -> Record:
    record = Record.load(folder)
    if record.manifest.status == "partial":
        raise UsageError(
            f"{folder}: only part {record.manifest.config.shard} of a run; "
            "join the parts with `cure-bench merge`"
        )
    return record


def _study(folder: Path, manifest: dict[str, Any]) -> StudyFolder:
    try:
        return StudyFolder(folder, StudyManifest.model_validate(manifest))
    except ValidationError as error:
        raise UsageError(f"{folder / 'manifest.json'}: {describe(error)}") from None


# --- of one model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskingSection:
    """A diagnosis of masked gradients, as a model's page shows it.

    Attributes:
        kind: of the conclusion.
        words: of the conclusion.
        about: threat model and images.
        findings: name, letter, title, status, value, threshold and evidence of each check, as text.
        study: where it was made; None: from a record alone.
        name: of the model there, or of the battery.
        plot: the scatter of a record.
    """

    kind: str
    words: str
    about: str
    findings: tuple[dict[str, str], ...]
    study: StudyFolder | None
    name: str
    plot: MarginScatter | None = None

    @property
    def figures(self) -> list[Path]:
        """Scatter plots of this model that the study drew."""
        if self.study is None:
            return []
        own = ("scatter.svg",) if len(self.study.models) == 1 else (f"scatter-{self.name}.svg",)
        return [path for path in study_files(self.study, FIGURES) if path.name in own]

    @property
    def table(self) -> Table:
        """The findings as a table."""
        keys = ("letter", "check", "title", "status", "value", "threshold", "evidence")
        rows = tuple((f"{f['check']}: {f['title']}", *(f[k] or "–" for k in keys[3:])) for f in self.findings)
        data = tuple({k: f[k] for k in keys} for f in self.findings)
        heads = columns("Check", "Result", "Value", "Threshold", "Evidence")
        return Table(f"Gradient masking: {self.words}", self.about, heads, rows, data)


def studies_of(studies: Sequence[StudyFolder], model: ModelInfo) -> list[StudyFolder]:
    """The studies that are about a model, in the order given."""
    return [study for study in studies if study.names_of(model)]


def masking_sections(studies: Sequence[StudyFolder], model: ModelInfo) -> list[MaskingSection]:
    """Every diagnosis of a model that `cure-bench masking` wrote.

    Raises:
        UsageError: a ``masking.json`` is damaged.
    """
    return [
        _section(study.path / "masking.json", study, name)
        for study in studies_of(studies, model)
        if study.verb == "masking" and (study.path / "masking.json").is_file()
        for name in study.names_of(model)
    ]


def section_of_record(record: Record) -> MaskingSection | None:
    """The diagnosis from the attacks of a record alone; None if its battery does not allow one."""
    diagnosis = from_record(record)
    if diagnosis is None:
        return None
    m, conclusion = record.manifest, diagnosis.conclusion
    findings = tuple(_finding(f) for f in diagnosis.findings)
    plot = margin_scatter(diagnosis.scatter) if diagnosis.scatter else None
    about = f"From the record alone: {m.battery.name}; {data_words(m.data)}"
    return MaskingSection(conclusion.kind, conclusion.words, about, findings, None, m.battery.name, plot)


def _section(file: Path, study: StudyFolder, name: str) -> MaskingSection:
    try:
        model = json.loads(file.read_text(encoding="utf-8"))["models"][name]
        threat = threat_words(ThreatModel.parse(model["threat"]["norm"], model["threat"]["eps"]))
        findings = [from_json(f) for f in model["findings"]]
        about = f"{threat}; {study.data}, {model['classified_correctly']} of them classified correctly"
        # Concluded again from the findings: files of older versions name the checks by letters.
        conclusion = conclude(findings, int(model["classified_correctly"]))
        shown = tuple(
            _finding(finding, sided="beyond" in row)
            for finding, row in zip(findings, model["findings"], strict=True)
        )
        return MaskingSection(conclusion.kind, conclusion.words, about, shown, study, name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{file}: cannot be read: {what}; run `cure-bench masking` again") from None


def _finding(finding: Finding, *, sided: bool = True) -> dict[str, str]:
    """A finding as text; not sided: its file does not state on which side of the threshold it is raised."""
    about = CHECKS[finding.check]
    test = f", p = {finding.p_words}" if finding.p_words else ""
    return {
        "check": finding.check,
        "letter": about.letter,
        "title": about.title,
        "status": finding.status,
        "evidence": finding.evidence,
        "value": finding.value_words + test,
        "threshold": finding.limit_words if sided else finding.limit_words.lstrip("<> "),
    }


def study_files(study: StudyFolder, suffixes: tuple[str, ...]) -> list[Path]:
    """Files a study wrote into its folder, sorted by name; names that lead elsewhere are left out.

    Args:
        study: the folder and its manifest.
        suffixes: formats, the preferred one first: of ``profile.svg`` and ``profile.png`` one is returned.
    """
    paths = [study.path / name for name in study.manifest.files if name == Path(name).name]
    files = [path for path in paths if path.suffix in suffixes and path.is_file() and not path.is_symlink()]
    by_preference = sorted(files, key=lambda path: suffixes.index(path.suffix), reverse=True)
    return sorted({path.stem: path for path in by_preference}.values())


def card_of(record: Record, cards: Mapping[str, CardFile[ModelCard]]) -> ModelCard | None:
    """The card that is about a record's weights, or None.

    A card with weights of its own is about these alone; one without about what was trained by its recipe, not
    about weights given on the command line.
    """
    model = record.manifest.model
    file = cards.get(model.id)
    if file is None:
        return None
    if file.card.weights is not None:
        return file.card if file.card.weights.sha256 == model.weights_sha256 else None
    return file.card if model.source == "card" else None
