"""What a training run writes: checkpoints, the log, the weights, and where they come from."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import RunError, UsageError
from robustbench_cure.evaluation.provenance import environment
from robustbench_cure.files import write_atomically, write_text
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.training.result import EpochRow, TrainingResult

# --- checkpoints: the state of a run between two steps ---------------------------------------------------


def checkpoint_path(weights: Path) -> Path:
    """Where the checkpoint of a run lies: beside the weights it will end with."""
    return weights.with_suffix(".checkpoint.pt")


def save_checkpoint(path: Path, identity: dict[str, str], state: dict[str, Any]) -> None:
    """Write a checkpoint; the one before is replaced only by a whole one.

    Args:
        path: the file.
        identity: what the run is (recipe, data, length): another run must not go on from it.
        state: tensors, numbers, and containers of them.

    Raises:
        UsageError: the place cannot be written.
    """
    write_atomically(path, lambda file: torch.save({"identity": identity, "state": state}, file))


def load_checkpoint(path: Path, identity: dict[str, str]) -> dict[str, Any]:
    """Read a checkpoint of the same run; nothing in it can run code.

    Raises:
        UsageError: unreadable, damaged, or of another run, with what differs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
        saved, state = dict(loaded["identity"]), dict(loaded["state"])
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:  # a damaged file raises whatever its bytes happen to spell
        raise UsageError(
            f"{path}: not a checkpoint, or damaged: delete it to train from the beginning"
        ) from None
    different = [key for key in identity if saved.get(key) != identity[key]]
    if different:
        raise UsageError(
            f"{path}: of another run: {', '.join(different)} differ; delete it, or choose another --out"
        )
    return state


# --- log ---------------------------------------------------------------------------------------------------


class LogWriter:
    """The log of a run: a CSV file, and TensorBoard events where that package is installed.

    Args:
        weights: the file the run will end with; ``<stem>.csv`` and ``<stem>.tensorboard/`` lie beside it.
        log: rows of the epochs before, where the run goes on.
    """

    def __init__(self, weights: Path, log: list[EpochRow]) -> None:
        self.path = weights.with_suffix(".csv")
        self.rows = list(log)
        self.events = _writer(weights.with_suffix(".tensorboard"), purge_from=len(log) + 1)

    def add(self, row: EpochRow) -> None:
        """Append the row of the epoch that just ended; the CSV file is whole at any moment."""
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(EpochRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        write_text(self.path, text.getvalue())
        if self.events is not None:
            for name, value in asdict(row).items():
                if name != "epoch":
                    self.events.add_scalar(name, value, row.epoch)
            self.events.flush()

    def close(self) -> None:
        """Let go of the files."""
        if self.events is not None:
            self.events.close()


def _writer(folder: Path, purge_from: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_from)


# --- weights -----------------------------------------------------------------------------------------------


def portable_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, contiguous, sharing no memory with the network."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}


def in_half_precision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in half precision, float16; counters stay as they are.

    Raises:
        RunError: a weight is too large for it.
    """
    small = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    for key, value in small.items():
        if not bool(value.isfinite().all()):
            raise RunError(f"{key}: does not fit into half precision; train without --half")
    return small


def save_weights(state: dict[str, Tensor], path: Path, recipe_json: str) -> str:
    """Write a safetensors file, whole or not at all; the recipe is kept in its header.

    Returns:
        SHA-256 of the file, hex: equal tensors and recipe give equal bytes.

    Raises:
        UsageError: the place cannot be written.
    """
    # One key: the order of several in the header is not reproducible.
    data = safetensors.torch.save(state, metadata={"recipe": recipe_json})
    write_atomically(path, lambda file: file.write_bytes(data))
    return hashlib.sha256(data).hexdigest()


def write_provenance(
    card: ModelCard,
    data: EvalSet,
    result: TrainingResult,
    start_digest: str,
    target: Path,
    device: torch.device,
) -> None:
    """Write ``<stem>.json``: how the weights came about."""
    recipe = card.training
    content = {
        "model": card.id,
        "architecture": card.architecture,
        "architecture_args": dict(card.architecture_args),
        "weights": {"file": target.name, "sha256": result.sha256},
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": recipe.digest,
        "start": {"model": recipe.start, "sha256": start_digest},
        "data": {"name": data.name, "notes": data.notes, "n": len(data), "digest": data.digest},
        "epochs": len(result.log),
        "steps": result.steps,
        "seconds": round(sum(row.seconds for row in result.log), 1),
        "seed": result.seed,
        "figures": {name: round(value, 2) for name, value in result.figures.items()},
        "environment": environment(device).model_dump(mode="json"),
    }
    write_text(target.with_suffix(".json"), json.dumps(content, indent=2) + "\n")
