"""What lies in run directories: records, studies of geometry and masking, other people's attacks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.external import MANIFEST as EXTERNAL
from robustbench_cure.evaluation.external import Evidence
from robustbench_cure.evaluation.record import Record
from robustbench_cure.protocol.identity import ModelInfo
from robustbench_cure.protocol.schema import describe

#: List of a site's files; a folder that has one is a site and holds copies of records, not records.
SITE = "site.json"


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
        """The command."""
        return self.manifest.verb

    @property
    def models(self) -> dict[str, StudiedModel]:
        """By name; empty for studies that are about no weights."""
        return self.manifest.models

    def names_of(self, model: ModelInfo) -> list[str]:
        """What it calls a model; nothing if it is not about it."""
        return [name for name, studied in self.models.items() if studied.is_about(model)]

    @property
    def data(self) -> str:
        """Images it was made on, in words."""
        data = self.manifest.data
        return f"{data.name} {data.split}, {data.n} image{'s' * (data.n != 1)}"


@dataclass(frozen=True)
class Found:
    """Everything found, each kind in order of its path."""

    records: tuple[Record, ...] = ()
    studies: tuple[StudyFolder, ...] = ()
    external: tuple[Evidence, ...] = ()


def scan(runs: Sequence[Path]) -> Found:
    """Look through directories and all folders in them.

    Args:
        runs: run directories, or folders of them; a folder met twice counts once.

    Raises:
        UsageError: no such directory, or a run that is damaged, unfinished or only a part.
    """
    seen: set[Path] = set()
    records: list[Record] = []
    studies: list[StudyFolder] = []
    external: list[Evidence] = []
    for run in runs:
        if not run.is_dir():
            raise UsageError(f"{run}: no such run directory")
        for folder, names in _folders(run):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            if EXTERNAL in names:
                external.append(Evidence.load(folder))
            if "manifest.json" in names:
                manifest = _manifest(folder / "manifest.json")
                if "battery" in manifest:
                    records.append(_record(folder))
                elif "verb" in manifest:
                    studies.append(_study(folder, manifest))
    return Found(tuple(records), tuple(studies), tuple(external))


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
