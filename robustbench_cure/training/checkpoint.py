"""The state of a training run between two steps, in a file that is whole or not there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from robustbench_cure.errors import UsageError
from robustbench_cure.files import write_atomically


def path_for(weights: Path) -> Path:
    """Where the checkpoint of a run lies: beside the weights it will end with."""
    return weights.with_suffix(".checkpoint.pt")


def save(path: Path, identity: dict[str, str], state: dict[str, Any]) -> None:
    """Write a checkpoint; the one before is replaced only by a whole one.

    Args:
        path: the file.
        identity: what the run is (recipe, data, length): another run must not go on from it.
        state: tensors, numbers, and containers of them.

    Raises:
        UsageError: the place cannot be written.
    """
    write_atomically(path, lambda file: torch.save({"identity": identity, "state": state}, file))


def load(path: Path, identity: dict[str, str]) -> dict[str, Any]:
    """Read a checkpoint of the same run; nothing in it can run code.

    Raises:
        UsageError: unreadable, damaged, or of another run, with what differs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
        found, state = dict(loaded["identity"]), dict(loaded["state"])
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:  # a damaged file raises whatever its bytes happen to spell
        raise UsageError(
            f"{path}: not a checkpoint, or damaged: delete it to train from the beginning"
        ) from None
    different = [key for key in identity if found.get(key) != identity[key]]
    if different:
        raise UsageError(
            f"{path}: of another run: {', '.join(different)} differ; delete it, or choose another --out"
        )
    return state
