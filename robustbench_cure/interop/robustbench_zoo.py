"""RobustBench's models: ``--model robustbench:Carmon2019Unlabeled`` or ``robustbench:cifar100/Linf/NAME``.

Architectures and weights come through RobustBench's own loader, into this package's cache. Pickles are read
with ``weights_only``, and the SHA-256 of every file is written down at its first download: a file that
changes afterwards is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from robustbench_cure.errors import UsageError
from robustbench_cure.files import write_atomically
from robustbench_cure.interop.robustbench import import_robustbench
from robustbench_cure.protocol.catalog import cache_dir, did_you_mean
from robustbench_cure.protocol.identity import ModelInfo
from robustbench_cure.protocol.naming import ROBUSTBENCH_DATASETS, robustbench_parts


def known(dataset: str, threat: str) -> dict[str, dict[str, Any]]:
    """RobustBench's entries of a data set and threat model.

    Raises:
        UsageError: RobustBench cannot be imported, or has no such threat model.
    """
    import_robustbench()
    from robustbench.model_zoo.enums import BenchmarkDataset
    from robustbench.model_zoo.models import model_dicts

    threats = {each.value: entries for each, entries in model_dicts[BenchmarkDataset(dataset)].items()}
    if threat not in threats:
        raise UsageError(
            f"robustbench: {dataset} has no threat model {threat!r}; it has {', '.join(threats)}"
        )
    found: dict[str, dict[str, Any]] = threats[threat]
    return found


def entry(name: str) -> tuple[str, str, str, dict[str, Any]]:
    """Data set, threat model, model and RobustBench's entry of a name, see `robustbench_parts`.

    Raises:
        UsageError: there is no such entry.
    """
    dataset, threat, model = robustbench_parts(name)
    entries = known(dataset, threat)
    if model not in entries:
        hint = did_you_mean(model, entries)
        raise UsageError(f"{name}: RobustBench has no such model for {dataset} {threat}{hint}")
    return dataset, threat, model, entries[model]


def load(name: str) -> tuple[nn.Module, ModelInfo, int, tuple[int, int, int]]:
    """A RobustBench model with its weights.

    Args:
        name: see `robustbench_parts`.

    Returns:
        The network in evaluation mode, what the record says of it, its classes and its image shape.

    Raises:
        UsageError: unknown, neither here nor to be downloaded, changed since then, or not tensors alone.
    """
    dataset, threat, model, _ = entry(name)
    folder = cache_dir() / "robustbench"
    place = folder / dataset / threat
    _verify(place, model)
    from robustbench import utils

    try:
        with _tensors_alone(), contextlib.redirect_stdout(io.StringIO()):
            module: nn.Module = utils.load_model(model, folder, dataset, threat)
    except Exception as error:
        if not _files(place, model):
            raise UsageError(
                f"{name}: its weights are not in {place} and could not be downloaded "
                f"({' '.join(str(error).split())[:120] or type(error).__name__}); try again with a network"
            ) from error
        raise UsageError(f"{name}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    classes, shape = ROBUSTBENCH_DATASETS[dataset]
    info = ModelInfo(
        id="robustbench_" + "".join(c if c.isalnum() else "_" for c in f"{dataset}_{threat}_{model}".lower()),
        name=f"{model} (RobustBench)",
        source=f"RobustBench, {dataset} {threat}",
        architecture=type(module).__name__,
        parameters=sum(p.numel() for p in module.parameters()),
        weights_sha256=_record(place, model),
        training="RobustBench",
        published_row=f"robustbench/{model.lower()}",
    )
    return module, info, classes, shape


def _files(place: Path, model: str) -> list[Path]:
    return sorted([*place.glob(f"{model}.pt"), *place.glob(f"{model}.pt_m*.pt")])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(place: Path, model: str) -> None:
    """Compare files with the digests of their first download."""
    for path in _files(place, model):
        written = path.with_name(path.name + ".sha256")
        if written.exists() and written.read_text(encoding="utf-8").strip() != _digest(path):
            raise UsageError(
                f"{path}: changed since it was downloaded (sha256); delete it to download it again"
            )


def _record(place: Path, model: str) -> str:
    """Write down the digests of files that are new; returns that of the file, or of all of them together."""
    digests = []
    for path in _files(place, model):
        digests.append(_digest(path))
        written = path.with_name(path.name + ".sha256")
        if not written.exists():
            write_atomically(written, partial(Path.write_text, data=digests[-1] + "\n", encoding="utf-8"))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """torch.load with weights_only, whatever the caller's default."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
