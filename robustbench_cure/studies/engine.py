"""What every geometry command starts from and ends with: models, images, a folder of figures and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from robustbench_cure.classifier import Classifier, with_memory
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.preflight import first_pass
from robustbench_cure.evaluation.provenance import environment
from robustbench_cure.files import refuse_files, write_atomically
from robustbench_cure.geometry.space import STEPS
from robustbench_cure.loading import load_all, named_models
from robustbench_cure.protocol.request import Request

#: Images among which one that all models classify correctly is looked for.
LOOKED_AT = 64


@dataclass
class Study:
    """Models side by side on the same images, and where what is found goes.

    Attributes:
        verb: the command, which names the folder.
        models: name -> classifier, in the order given.
        data: the images.
        out: the folder.
        step: of finite differences, in the units of `geometry.space`.
        seed: of every random choice.
        command: the command line.
        dataset: as `--dataset` names it.
        files: what was written so far.
    """

    verb: str
    models: dict[str, Classifier]
    data: EvalSet
    out: Path
    step: float
    seed: int
    command: str
    dataset: str = ""
    files: list[Path] = field(default_factory=list)

    @cached_property
    def images(self) -> Tensor:
        """Images, float32 (N,C,H,W) in [0, 1]."""
        return self.data.images

    @property
    def labels(self) -> Tensor:
        """True labels, int64 (N,)."""
        return self.data.labels

    def identity(self, model: str, **settings: object) -> dict[str, str]:
        """What must agree for unfinished work of a model to be gone on with."""
        info = self.models[model].model_info()
        scale = max(map(abs, info.answers), default=0.0) or 1.0
        return {
            "verb": self.verb,
            "weights": info.weights_sha256,
            "answers": " ".join(f"{answer / scale:.2f}" for answer in info.answers),
            "precision": self.models[model].precision,
            "data": self.data.digest,
            **{key: str(value) for key, value in sorted(settings.items())},
        }

    def table(self, name: str, rows: pd.DataFrame) -> None:
        """Write ``<name>.csv``."""
        self.write(name + ".csv", lambda file: rows.to_csv(file, index=False, lineterminator="\n"))

    def write(self, name: str, fill: Callable[[Path], object]) -> None:
        """Write a file of the folder, whole or not at all."""
        path = self.out / name
        write_atomically(path, fill)
        self.files.append(path)

    def finish(self, settings: dict[str, Any]) -> None:
        """Write ``manifest.json``, and say what there is."""
        first = next(iter(self.models.values()))
        content = {
            "verb": self.verb,
            "command": self.command,
            "models": {name: c.model_info().model_dump(mode="json") for name, c in self.models.items()},
            "data": {
                "name": self.data.name,
                "split": self.data.split,
                "n": len(self.data),
                "digest": self.data.digest,
                "notes": self.data.notes,
            },
            "seed": self.seed,
            "precision": first.precision,
            "settings": settings,
            "environment": environment(first.device).model_dump(mode="json"),
            "files": sorted(path.name for path in self.files),
        }
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        write_atomically(self.out / "manifest.json", lambda file: file.write_text(text, encoding="utf-8"))


def open_study(
    verb: str,
    request: Request,
    *,
    step: float | None,
    default_n: int,
    command: str,
    first_by_seed: bool = False,
) -> Study:
    """Load what a request names.

    Args:
        verb: the command.
        request: models, data, device.
        step: of the finite differences; None: that of the data set.
        default_n: images, where the request does not say.
        command: the command line, for the provenance.
        first_by_seed: images that all models classify correctly, in the order that the seed gives.

    Raises:
        UsageError: a model or the data cannot be loaded, or the folder is taken.
    """
    names = named_models(request)
    dataset = request.dataset or names[0].dataset
    out = request.out or Path("runs") / f"{verb}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    refuse_files(out)
    if (out / "manifest.json").exists():
        raise UsageError(f"--out {out}: already holds results; choose another --out")
    classifiers, data = load_all(names, request)
    seed = 0 if request.seed is None else request.seed
    wanted = min(default_n, len(data)) if request.n is None else request.n
    looked_at = max(wanted, min(LOOKED_AT, len(data))) if first_by_seed else wanted
    data = data.subset(looked_at, seed if first_by_seed else 0)
    models: dict[str, Classifier] = {}
    for given, classifier in zip(names, classifiers, strict=True):
        try:
            with_memory(classifier, partial(first_pass, classifier, data))
        except UsageError as error:
            raise UsageError(f"{given}: {error}") from error
        name = classifier.model_info().id
        if name in models:
            raise UsageError(f"two models are called {name}: rename one")
        models[name] = classifier
    if first_by_seed:
        data = _first_right(data, list(models.values()), wanted)
    if step is None:
        step = STEPS.get(dataset, STEPS["cifar10"])
    return Study(verb, models, data, out, step, seed, command, dataset)


def _first_right(data: EvalSet, models: list[Classifier], wanted: int) -> EvalSet:
    """The first images that all models classify correctly, if there are enough; else the first at all.

    What surrounds a misclassified image says nothing of its own region.
    """
    right = torch.ones(len(data), dtype=torch.bool)
    for model in models:
        right &= model.logits(data.images.to(model.device)).argmax(1).cpu() == data.labels
    rows = right.nonzero().flatten().tolist()
    return data.take(rows[:wanted] if len(rows) >= wanted else range(wanted))
