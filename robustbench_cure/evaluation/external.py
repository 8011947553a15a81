"""Other people's adversarial examples: what is stored of them once they were checked.

On disk, a directory:

    external.json      who was attacked, on which data, under which threat model; where the file came from
    samples.parquet    one row a given image: what verification gave

Read by the site, which lowers the best known number of a model by them, under the name *external*.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from robustbench_cure.attacks.candidates import Candidates
from robustbench_cure.classifier import Classifier, with_memory
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.preflight import preflight
from robustbench_cure.evaluation.record import Environment, Record, write_table
from robustbench_cure.evaluation.verify import verify
from robustbench_cure.files import write_text
from robustbench_cure.protocol.cards import Battery, Threat
from robustbench_cure.protocol.identity import DataInfo, ModelInfo
from robustbench_cure.protocol.schema import describe

SCHEMA_VERSION = 1
MANIFEST = "external.json"
COLUMNS: dict[str, str] = {
    "sample_id": "string",
    "image_sha256": "string",
    "label": "int64",
    "broken": "bool",  # verified: misclassified, inside ball and box, finite
    "pred": "int64",
    "margin": "float32",  # NaN where nothing admissible was given
    "linf": "float32",  # distance from the image, units of x
    "l2": "float32",
    "violation": "string",  # why the image was not admitted; empty if it was
}


class Submission(BaseModel):
    """Everything about a file of adversarial examples but its rows."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    #: Who made them and how, as declared.
    source: str
    file: str
    file_sha256: str
    model: ModelInfo
    battery: str
    battery_version: int
    threat: Threat
    data: DataInfo
    environment: Environment
    checked: str

    def applies_to(self, record: Record) -> bool:
        """Whether it is about the same model, data set and threat model."""
        other = record.manifest
        return (
            self.model.same_as(other.model)
            and (self.data.name, self.data.split) == (other.data.name, other.data.split)
            and self.threat == other.battery.threat
        )


@dataclass(frozen=True)
class Evidence:
    """A checked file.

    Attributes:
        submission: see `Submission`.
        samples: see `COLUMNS`.
    """

    submission: Submission
    samples: pd.DataFrame

    def save(self, path: Path) -> None:
        """Write table and manifest, each atomically, the manifest last."""
        write_table(path / "samples.parquet", self.samples)
        text = json.dumps(self.submission.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
        write_text(path / MANIFEST, text)

    @classmethod
    def load(cls, path: Path) -> Evidence:
        """Read what `save` wrote.

        Raises:
            UsageError: damaged, or of another schema.
        """
        file, table = path / MANIFEST, path / "samples.parquet"
        try:
            submission = Submission.model_validate_json(file.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise UsageError(f"{file}: {describe(error)}") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{file}: cannot be read: {error}") from None
        if submission.schema_version != SCHEMA_VERSION:
            raise UsageError(f"{file}: schema version {submission.schema_version}, not {SCHEMA_VERSION}")
        try:
            samples = pd.read_parquet(table, dtype_backend="numpy_nullable")[list(COLUMNS)].astype(COLUMNS)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"{table}: cannot be read: {reason}; check the file again") from None
        return cls(submission, samples)

    def applies_to(self, record: Record) -> bool:
        """Whether it is about the same model, data set and threat model."""
        return self.submission.applies_to(record)

    def breaks(self, record: Record) -> pd.Series:
        """Which samples of a record it broke, matched by id and pixels; bool, index as the record's."""
        broken = self.samples[self.samples["broken"]]
        keys = set(zip(broken["sample_id"], broken["image_sha256"], strict=True))
        pairs = zip(record.samples["sample_id"], record.samples["image_sha256"], strict=True)
        found = record.clean_correct.copy()
        found[:] = [pair in keys for pair in pairs]
        return found


# --- files of adversarial examples -------------------------------------------------------------------------

#: Array of the images in an .npz file, and of their ids.
IMAGES, IDS = "x_adv", "ids"


@dataclass(frozen=True)
class Given:
    """What a file holds.

    Attributes:
        images: (N,C,H,W) as stored.
        ids: names of the samples; None: the first N of the split, in its order.
        sha256: of the file.
    """

    images: Tensor
    ids: tuple[str, ...] | None
    sha256: str


def read_images(file: Path, tensor: str = "") -> Given:
    """Read a .safetensors or .npz file of adversarial examples.

    Args:
        file: a safetensors file with the ids as a JSON list under ``sample_ids`` of its metadata, as
            `evaluate --save-adversarials` writes them, or an .npz file with ``x_adv`` and ``ids``.
        tensor: name of the images where the file holds several.

    Raises:
        UsageError: another format, damaged, or no images of a floating or 8-bit type.
    """
    try:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror or error}") from None
    readers = {".safetensors": _safetensors, ".npz": _npz}
    if file.suffix not in readers:
        raise UsageError(f"{file}: give a .safetensors or .npz file")
    images, ids = readers[file.suffix](file, tensor)
    if images.dim() != 4 or not len(images):
        raise UsageError(f"{file}: expected images (N, C, H, W), got the shape {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        images = images.float() / 255
    if not images.is_floating_point():
        raise UsageError(f"{file}: images must be float in [0, 1] or uint8, not {images.dtype}")
    if ids is not None and len(ids) != len(images):
        raise UsageError(f"{file}: {len(images)} images and {len(ids)} ids")
    twice = [name for name, n in Counter(ids or ()).items() if n > 1]
    if twice:
        raise UsageError(f"{file}: sample {twice[0]!r} is given twice")
    return Given(images.float(), ids, sha256)


def _safetensors(file: Path, tensor: str) -> tuple[Tensor, tuple[str, ...] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as archive:
            name = _choose(file, list(archive.keys()), tensor)
            ids = (archive.metadata() or {}).get("sample_ids")
            names = None if ids is None else tuple(map(str, json.loads(ids)))
            return archive.get_tensor(name), names
    except (SafetensorError, ValueError, TypeError) as error:
        raise UsageError(f"{file}: not a readable .safetensors file: {error}") from None


def _npz(file: Path, tensor: str) -> tuple[Tensor, tuple[str, ...] | None]:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            names = [name for name in archive.files if name != IDS]
            images = archive[_choose(file, names, tensor or (IMAGES if IMAGES in names else ""))]
            ids = tuple(map(str, archive[IDS].tolist())) if IDS in archive.files else None
            return torch.from_numpy(images), ids
    except UsageError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib each have their own
        raise UsageError(f"{file}: not a readable .npz file: {error}") from None


def _choose(file: Path, names: list[str], wanted: str) -> str:
    if wanted in names:
        return wanted
    if len(names) == 1 and not wanted:
        return names[0]
    if wanted:
        raise UsageError(f"{file}: no tensor {wanted!r}; it has {', '.join(names) or 'none'}")
    raise UsageError(f"{file}: holds {', '.join(names) or 'nothing'}: choose one with --tensor")


def match(given: Given, data: EvalSet, file: Path) -> EvalSet:
    """The original images, in the order of the file.

    Raises:
        UsageError: an unknown id, too many images, or images of another shape.
    """
    if given.images.shape[1:] != data.pixels.shape[1:]:
        shapes = tuple(given.images.shape[1:]), tuple(data.pixels.shape[1:])
        raise UsageError(f"{file}: images of shape {shapes[0]}; {data.name} has {shapes[1]}")
    if given.ids is None:
        if len(given.images) > len(data):
            raise UsageError(f"{file}: {len(given.images)} images; {data.name} {data.split} has {len(data)}")
        return data.take(range(len(given.images)))
    rows = {name: row for row, name in enumerate(data.ids)}
    unknown = [name for name in given.ids if name not in rows]
    if unknown:
        example = f"{data.ids[0]!r}"
        raise UsageError(
            f"{file}: {data.name} {data.split} has no sample {unknown[0]!r}; ids are like {example}"
        )
    return data.take([rows[name] for name in given.ids])


def check(classifier: Classifier, battery: Battery, originals: EvalSet, images: Tensor) -> pd.DataFrame:
    """Verify images row by row.

    Args:
        classifier: the model.
        battery: its threat model is the one in question.
        originals: what the images were made from.
        images: float32 (N,C,H,W).

    Returns:
        A row an image, see `COLUMNS`, and ``correct``: whether the model classifies the
        original correctly.

    Raises:
        UsageError: the model does not fit the data, or is random or batch-dependent: one lucky pass is no
            proof.
    """
    unreliable = [f for f in preflight(classifier, originals) if f.about.severity == "unreliable"]
    if unreliable:
        raise UsageError(
            f"{unreliable[0].about.title.lower()}: {unreliable[0].evidence}; nothing can be verified on it"
        )
    x, y = originals.images.to(classifier.device), originals.labels.to(classifier.device)
    candidates = Candidates.start(x)
    candidates.x_adv = images.to(x.device)
    threat = battery.threat
    verification = with_memory(classifier, lambda: verify(classifier, x, y, candidates, threat))
    correct = with_memory(classifier, lambda: classifier.logits(x).argmax(1) == y)
    table = pd.DataFrame(
        {
            "sample_id": list(originals.ids),
            "image_sha256": list(originals.hashes),
            "label": y.cpu().numpy(),
            "broken": verification.broken.numpy(),
            "pred": verification.pred.numpy(),
            "margin": verification.margin.numpy(),
            "linf": verification.linf.numpy(),
            "l2": verification.l2.numpy(),
            "violation": verification.violation,
        }
    ).astype(COLUMNS)
    return table.assign(correct=correct.cpu().numpy())
