"""What lies beside a record: diagnoses of masking, figures of geometry, and the card of its model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.record import Record
from robustbench_cure.masking.checks import CHECKS, Finding, from_json
from robustbench_cure.masking.conclusions import conclude
from robustbench_cure.masking.recorded import from_record
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import Found as FoundCard
from robustbench_cure.protocol.identity import ModelInfo
from robustbench_cure.report.scatter import MarginScatter, margin_scatter
from robustbench_cure.report.sheet import Sheet
from robustbench_cure.report.wording import data_words, threat_words
from robustbench_cure.site.found import StudyFolder
from robustbench_cure.threat import ThreatModel

#: What the pictures of each command show.
STUDIES = {
    "curvature": ("Curvature of the loss", "Eigenvalues of the Hessian in the input: flat is robust."),
    "bounds": (
        "Bounds of Theorem 1",
        "Lower and upper bound of the distance to the boundary beside DeepFool's.",
    ),
    "curve": ("Accuracy and radius", "Accuracy under PGD at every radius: it should fall to chance."),
    "section": ("Decision regions", "Planes through an image and its nearest boundary."),
    "surface": ("Loss surface", "The loss along the gradient and a random direction."),
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
#: Files of a study that the site shows or gives away.
FIGURES, TABLES = (".svg",), (".csv",)


@dataclass(frozen=True)
class Panel:
    """A diagnosis of masked gradients.

    Attributes:
        kind: of the verdict.
        words: of the verdict.
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
    def sheet(self) -> Sheet:
        """The findings as a table."""
        keys = ("letter", "check", "title", "status", "value", "threshold", "evidence")
        rows = tuple((f"{f['check']}: {f['title']}", *(f[k] or "–" for k in keys[3:])) for f in self.findings)
        data = tuple({k: f[k] for k in keys} for f in self.findings)
        heads = ("Check", "Found", "Value", "Threshold", "Evidence")
        return Sheet(f"Gradient masking: {self.words}", self.about, heads, rows, data)


def belonging(studies: Sequence[StudyFolder], model: ModelInfo) -> list[StudyFolder]:
    """Studies of a model."""
    return [study for study in studies if study.names_of(model)]


def panels(studies: Sequence[StudyFolder], model: ModelInfo) -> list[Panel]:
    """Every diagnosis of a model.

    Raises:
        UsageError: a ``masking.json`` is damaged.
    """
    found = []
    for study in belonging(studies, model):
        file = study.path / "masking.json"
        if study.verb == "masking" and file.is_file():
            found += [_panel(file, study, name) for name in study.names_of(model)]
    return found


def recorded(record: Record) -> Panel | None:
    """What a record says by itself; None if its battery cannot."""
    found = from_record(record)
    if found is None:
        return None
    m = record.manifest
    findings = tuple(_finding(f) for f in found.findings)
    plot = margin_scatter(found.scatter) if found.scatter else None
    about = f"From the record alone: {m.battery.name}; {data_words(m.data)}"
    return Panel(found.conclusion.kind, found.conclusion.words, about, findings, None, m.battery.name, plot)


def _panel(file: Path, study: StudyFolder, name: str) -> Panel:
    try:
        model = json.loads(file.read_text(encoding="utf-8"))["models"][name]
        threat = threat_words(ThreatModel.parse(model["threat"]["norm"], model["threat"]["eps"]))
        findings = [from_json(f) for f in model["findings"]]
        about = f"{threat}; {study.data}, {model['classified_correctly']} of them classified correctly"
        # Drawn again from the findings: files of older versions name the checks by letters.
        conclusion = conclude(findings, int(model["classified_correctly"]))
        shown = tuple(
            _finding(found, sided="beyond" in row)
            for found, row in zip(findings, model["findings"], strict=True)
        )
        return Panel(conclusion.kind, conclusion.words, about, shown, study, name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{file}: cannot be read: {what}; run `cure-bench masking` again") from None


def _finding(found: Finding, *, sided: bool = True) -> dict[str, str]:
    """A finding as text; not sided: its file does not say on which side of the threshold it is raised."""
    about = CHECKS[found.check]
    test = f", p = {found.p_words}" if found.p_words else ""
    return {
        "check": found.check,
        "letter": about.letter,
        "title": about.title,
        "status": found.status,
        "evidence": found.evidence,
        "value": found.value_words + test,
        "threshold": found.limit_words if sided else found.limit_words.lstrip("<> "),
    }


def study_files(study: StudyFolder, suffixes: tuple[str, ...]) -> list[Path]:
    """Files a study wrote into its folder, by suffix; names that lead elsewhere are left out."""
    paths = [study.path / name for name in sorted(study.manifest.files) if name == Path(name).name]
    return [path for path in paths if path.suffix in suffixes and path.is_file() and not path.is_symlink()]


def card_of(record: Record, cards: Mapping[str, FoundCard[ModelCard]]) -> ModelCard | None:
    """The card that speaks for a record's weights, or None.

    A card with weights of its own speaks for these alone; one without for what was trained by its recipe,
    not for weights given on the command line.
    """
    model = record.manifest.model
    found = cards.get(model.id)
    if found is None:
        return None
    if found.card.weights is not None:
        return found.card if found.card.weights.sha256 == model.weights_sha256 else None
    return found.card if model.source == "card" else None
