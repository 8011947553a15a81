"""`cure-bench verify-adv`: other people's adversarial examples, checked as our own attacks are.

A file holds images (N,C,H,W) in [0, 1] and, if it can, the ids of the samples they were made from. The
judge asks the same of each as of a proposal of an attack: inside the ball, inside the box, finite, and
misclassified in float32. What holds is stored, see `external`, and lowers the best known number.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robustbench_cure import load_battery
from robustbench_cure.attacks.proposal import Proposal
from robustbench_cure.classifier import Classifier, with_memory
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.external import COLUMNS, Evidence, Submission
from robustbench_cure.evaluation.preflight import preflight
from robustbench_cure.evaluation.provenance import environment
from robustbench_cure.evaluation.record import Record
from robustbench_cure.evaluation.storage import find_records, now
from robustbench_cure.evaluation.verify import judge
from robustbench_cure.loading import card_dataset, load_all
from robustbench_cure.protocol.cards import Battery, ModelCard
from robustbench_cure.protocol.catalog import find
from robustbench_cure.protocol.identity import DataInfo
from robustbench_cure.protocol.request import Request
from robustbench_cure.report.terminal import clean_text
from robustbench_cure.report.wording import interval, percent
from robustbench_cure.stats import Rate

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
    """Judge images row by row.

    Args:
        classifier: the model.
        battery: its threat model is the one in question.
        originals: what the images were made from.
        images: float32 (N,C,H,W).

    Returns:
        A row an image, see `external.COLUMNS`, and ``correct``: whether the model classifies the
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
    proposal = Proposal.start(x)
    proposal.x_adv = images.to(x.device)
    threat = battery.threat.model
    verdict = with_memory(classifier, lambda: judge(classifier, x, y, proposal, threat))
    correct = with_memory(classifier, lambda: classifier.logits(x).argmax(1) == y)
    table = pd.DataFrame(
        {
            "sample_id": list(originals.ids),
            "image_sha256": list(originals.hashes),
            "label": y.cpu().numpy(),
            "broken": verdict.broken.numpy(),
            "pred": verdict.pred.numpy(),
            "margin": verdict.margin.numpy(),
            "linf": verdict.linf.numpy(),
            "l2": verdict.l2.numpy(),
            "violation": verdict.violation,
        }
    ).astype(COLUMNS)
    return table.assign(correct=correct.cpu().numpy())


def verify_file(
    file: Path,
    request: Request,
    *,
    tensor: str = "",
    against: Sequence[Path] = (),
    source: str = "",
    out: Path | None = None,
    command: str = "",
) -> int:
    """Check a file, store what holds, and say what it does to the best known numbers.

    Returns:
        0 if every image was admitted and one of them at least broke a sample; else 1.

    Raises:
        UsageError: bad input, or a run that the file is not about; before anything is written.
    """
    given = read_images(file, tensor)
    runs = {run: find_records((run,)) for run in against}
    (model,) = request.models
    card = None if ":" in model else find(ModelCard, model, request.cards).card
    battery = load_battery(request.battery or (card.battery if card else "strong"), cards=request.cards)
    dataset = request.dataset or battery.dataset or card_dataset(model, request.cards)
    classifiers, data = load_all((model,), dataset, request)
    originals = match(given, data, file)
    submission = Submission(
        source=source,
        file=file.name,
        file_sha256=given.sha256,
        model=classifiers[0].model_info(),
        battery=battery.id,
        battery_version=battery.version,
        threat=battery.threat,
        data=_data(originals, len(data)),
        environment=environment(classifiers[0].device, command),
        checked=now(),
    )
    records = _concerned(submission, runs)  # before anything is checked or said
    table = check(classifiers[0], battery, originals, given.images)
    for line in _found(table, battery):
        click.echo(line)
    broken = bool((table["broken"] & table["correct"]).any())
    if broken:
        out = out or Path("runs") / f"external-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
        evidence = Evidence(submission, table[list(COLUMNS)])
        evidence.save(out)
        for line in _lowered(evidence, records):
            click.echo(line)
        click.echo(f"evidence: {out}; `cure-bench site` takes it into account where it lies among the runs")
    return int(not broken or bool((table["violation"] != "").any()))


def _concerned(submission: Submission, runs: Mapping[Path, Sequence[Record]]) -> list[Record]:
    """The records that a file is about; a run that has none was named by mistake."""
    found = []
    for run, records in runs.items():
        own = [record for record in records if submission.applies_to(record)]
        if not own:
            about = f"{submission.model.id}, {submission.data.name} and {submission.threat.model}"
            raise UsageError(f"--against {run}: no record there is about {about}")
        found += own
    return found


def _data(originals: EvalSet, total: int) -> DataInfo:
    return DataInfo(
        name=originals.name,
        split=originals.split,
        n=len(originals),
        total=originals.total or total,
        digest=originals.digest,
        classes=list(originals.classes),
        notes=originals.notes,
    )


def _found(table: pd.DataFrame, battery: Battery) -> list[str]:
    refused = Counter(table.loc[table["violation"] != "", "violation"])
    n, broken = len(table), int((table["broken"] & table["correct"]).sum())
    correct = int(table["correct"].sum())
    lines = [
        f"{n} images under {battery.threat.model}: {n - sum(refused.values())} admitted; "
        f"they break {broken} of the {correct} samples that the model classifies correctly"
    ]
    lines += [f"  {count} refused: {reason}" for reason, count in sorted(refused.items())]
    return lines


def _lowered(evidence: Evidence, records: Sequence[Record]) -> list[str]:
    lines = []
    for record in records:
        name = clean_text(f"{record.manifest.model.id}, {record.manifest.battery.id}, n = {record.n}")
        before = record.worst_case_accuracy
        left = record.worst_case & ~evidence.breaks(record)
        after = Rate(int(left.sum()), record.n)
        if after == before:
            lines.append(f"{name}: {percent(before)} stays: our attacks broke these samples too")
        else:
            words = [f"{percent(rate)} {interval(rate)}" for rate in (before, after)]
            lines.append(f"{name}: {words[0]} is now {words[1]}, external")
    return lines
