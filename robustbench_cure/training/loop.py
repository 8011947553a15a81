"""The training loop: seeded, data on the device, a log row an epoch, one method's step inside."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from robustbench_cure.classifier import Normalised, full_precision
from robustbench_cure.errors import RunError
from robustbench_cure.recipes import CureRecipe, DeepFoolRecipe, PGDRecipe, StandardRecipe
from robustbench_cure.threat import ThreatModel
from robustbench_cure.training import METHODS
from robustbench_cure.training.augment import AUGMENTATIONS
from robustbench_cure.training.pgd_at import last_iterate
from robustbench_cure.training.result import EpochRow
from robustbench_cure.training.schedule import learning_rate
from robustbench_cure.training.step import StepContext, evaluation_mode

AnyRecipe: TypeAlias = StandardRecipe | PGDRecipe | DeepFoolRecipe | CureRecipe
#: (steps done, steps in all, the row of the epoch that just ended or None).
Progress: TypeAlias = Callable[[int, int, EpochRow | None], None]

#: Share of the training set kept back, and how many of those images the epoch's log looks at.
HELD_OUT, MONITORED = 0.1, 500
#: Steps of the monitoring PGD; its step size is a quarter of the radius.
MONITOR_STEPS = 10


def held_out_split(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows kept back: the last tenth of a seeded permutation, at least one."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    kept = max(1, round(n * HELD_OUT))
    return order[: n - kept], order[n - kept :]


def run(
    model: Normalised,
    recipe: AnyRecipe,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    monitor: ThreatModel,
    epochs: int,
    on_epoch: Callable[[EpochRow], None],
    progress: Progress | None = None,
) -> list[EpochRow]:
    """Train a network in place.

    Args:
        model: on the device where training happens.
        recipe: method, optimiser, schedule, seed.
        images: float32 (N,C,H,W) in [0, 1]; moved to the model's device whole.
        labels: int64 (N,).
        num_classes: number of logits.
        monitor: ball of the PGD that the log reports.
        epochs: how many to run; the learning-rate schedule spans them.
        on_epoch: called after every epoch, with the model in training mode.
        progress: called after every step.

    Returns:
        The log. The last step leaves the final weights: none are chosen by their log rows.

    Raises:
        RunError: a loss that is not finite, with its epoch and iteration.
    """
    device = next(model.parameters()).device
    shuffle = torch.Generator().manual_seed(recipe.seed + 1)
    generator = torch.Generator(device).manual_seed(recipe.seed + 2)
    rows, kept = held_out_split(len(images), recipe.seed)
    x_held, y_held = images[kept[:MONITORED]].to(device), labels[kept[:MONITORED]].to(device)
    x_all, y_all = images[rows].to(device), labels[rows].to(device)
    batch_size = min(recipe.batch_size, len(rows))
    per_epoch = len(rows) // batch_size  # the ragged last batch is left out: another shuffle has its rows
    total = epochs * per_epoch
    optimizer = _optimizer(model, recipe)
    log: list[EpochRow] = []
    reduced = recipe.precision == "bf16"
    if reduced:
        model.to(memory_format=torch.channels_last)
    with _precision(recipe, device):
        for epoch in range(epochs):
            model.train()
            started = time.perf_counter()
            losses, penalties = [], []
            batches = torch.randperm(len(rows), generator=shuffle).to(device)[: per_epoch * batch_size]
            for index, batch in enumerate(batches.view(per_epoch, batch_size)):
                iteration = epoch * per_epoch + index
                rate = learning_rate(recipe.schedule, recipe.lr, recipe.lr_final, iteration, total)
                optimizer.param_groups[0]["lr"] = rate
                x = AUGMENTATIONS[recipe.augmentation](x_all[batch], generator)
                context = StepContext(iteration, per_epoch, num_classes, generator)
                # No cache: it outlives the step inside an outer context, and would keep the first weights.
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced, cache_enabled=False):
                    loss, scalars = METHODS[recipe.method](model, x, y_all[batch], recipe, context)
                losses.append(loss.detach().item())
                if not math.isfinite(losses[-1]):
                    raise RunError(
                        f"training: the loss is {losses[-1]} in epoch {epoch + 1}, iteration {index + 1} of "
                        f"{per_epoch}: lower lr or the weight of the regulariser"
                    )
                if "regulariser" in scalars:
                    penalties.append(float(scalars["regulariser"]))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if progress is not None and index + 1 < per_epoch:
                    progress(iteration + 1, total, None)
            seconds = time.perf_counter() - started
            clean, pgd = _monitor(model, x_held, y_held, monitor, recipe.seed)
            row = EpochRow(epoch + 1, rate, _mean(losses), _mean(penalties), seconds, clean, pgd)
            log.append(row)
            on_epoch(row)
            if progress is not None:
                progress((epoch + 1) * per_epoch, total, row)
    return log


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _optimizer(model: Normalised, recipe: AnyRecipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )


def _monitor(model: Normalised, x: Tensor, y: Tensor, threat: ThreatModel, seed: int) -> tuple[float, float]:
    """Clean accuracy and accuracy under PGD, with the same random starts every epoch."""
    generator = torch.Generator(x.device).manual_seed(seed + 3)
    clean = robust = 0
    with evaluation_mode(model), torch.no_grad():
        for part, label in zip(torch.split(x, 128), torch.split(y, 128), strict=True):
            clean += int((model(part).argmax(1) == label).sum())
            x_adv = last_iterate(model, part, label, threat, threat.radius / 4, MONITOR_STEPS, generator)
            robust += int((model(x_adv).argmax(1) == label).sum())
    return clean / len(x), robust / len(x)


def _precision(recipe: AnyRecipe, device: torch.device) -> AbstractContextManager[None]:
    """TF32 where bf16 is allowed anyway, except for differences of gradients: too few digits are left."""
    reduced = device.type == "cuda" and recipe.precision == "bf16" and recipe.method != "cure"
    return _tf32() if reduced else full_precision()


@contextmanager
def _tf32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
