"""What training hands back, and the file it leaves."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import RunError
from robustbench_cure.evaluation.provenance import environment
from robustbench_cure.files import write_atomically, write_text
from robustbench_cure.protocol.cards import ModelCard


@dataclass(frozen=True)
class EpochRow:
    """One line of the training log; rates lie in [0, 1].

    Attributes:
        epoch: from 1.
        lr: learning rate of the epoch's last step.
        loss: mean of the minimised loss.
        regulariser: mean of the unweighted regulariser over the steps that had one; 0 without.
        seconds: of training alone.
        clean: accuracy on the held-out images.
        pgd: accuracy on them under the monitoring attack.
        hz: length of the Hessian times the sign of the gradient, see `monitor`.
        frobenius: Frobenius norm of the Hessian.
    """

    epoch: int
    lr: float
    loss: float
    regulariser: float
    seconds: float
    clean: float
    pgd: float
    hz: float
    frobenius: float


@dataclass(frozen=True)
class TrainingResult:
    """A trained network and how it came about, or how far it got.

    Attributes:
        state_dict: of the bare network (without the input normalisation), contiguous, on the CPU.
        log: one row an epoch.
        figures: per cent, by name, on the held-out images: ``held_out_clean`` and ``held_out_pgd``.
        seed: of the recipe.
        recipe_digest: of the recipe, hex.
        sha256: of the weights file, hex; empty if none was written.
        stopped: why the run stopped before its end; empty: it did not.
        step: optimiser steps made, since the run's first.
        steps: optimiser steps of the whole run.
        batch_parts: pieces a batch was cut into because memory ran out; 1: it never did.
    """

    state_dict: dict[str, Tensor]
    log: list[EpochRow]
    figures: dict[str, float]
    seed: int
    recipe_digest: str
    sha256: str = field(default="")
    stopped: str = ""
    step: int = 0
    steps: int = 0
    batch_parts: int = 1


def portable_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, contiguous, sharing no memory with the network."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
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
