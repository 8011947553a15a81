"""The training loop: seeded, data on the device, one method's step inside, its state in one dictionary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from robustbench_cure.adapt import Normalised
from robustbench_cure.classifier import float32_products, full_precision
from robustbench_cure.datasets import as_float
from robustbench_cure.errors import RunError
from robustbench_cure.protocol.recipes import AnyRecipe
from robustbench_cure.training import METHODS, PREPARATIONS
from robustbench_cure.training.augment import AUGMENTATIONS
from robustbench_cure.training.monitor import IMAGES, Scale, measure
from robustbench_cure.training.parallel import World, as_bytes, out_of_memory, split
from robustbench_cure.training.result import EpochRow
from robustbench_cure.training.schedule import learning_rate
from robustbench_cure.training.step import StepContext

#: (steps done, steps in all, the row of the epoch that just ended or None).
Progress: TypeAlias = Callable[[int, int, EpochRow | None], None]

#: Share of the training set kept back for the log.
HELD_OUT = 0.1
#: Share of a card's free memory that the training images may take; else they stay in main memory.
DATA_SHARE = 0.5
#: Between two checkpoints inside an epoch.
CHECKPOINT_SECONDS = 300.0


def held_out_split(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows kept back: the last tenth of a seeded permutation, at least one."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    kept = max(1, round(n * HELD_OUT))
    return order[: n - kept], order[n - kept :]


class Trainer:
    """One run. Between two steps its whole state can be taken (`state`) and put back (`restore`).

    The last step leaves the final weights: none are chosen by their log rows.

    Args:
        model: trained in place, on the device where it is.
        recipe: method, optimiser, schedule, seed.
        images: (N,C,H,W), float32 in [0, 1], or uint8 grey levels, which become that batch by batch.
        labels: int64 (N,).
        num_classes: number of logits.
        scale: of the log's attack and curvatures.
        epochs: how many to run; the learning-rate schedule spans them.
        world: the processes that train together.
        steps_per_epoch: fewer steps an epoch than the images would give; None: all.

    Attributes:
        iteration: optimiser steps made.
        total: optimiser steps of the whole run.
        log: a row for every epoch that ended.
        parts: pieces a batch is cut into; doubled whenever memory runs out.
    """

    def __init__(
        self,
        model: Normalised,
        recipe: AnyRecipe,
        images: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        scale: Scale,
        epochs: int,
        world: World | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        self.recipe, self.num_classes, self.scale = recipe, num_classes, scale
        self.world = world or World()
        self.device = next(model.parameters()).device
        self.reduced = recipe.precision == "bf16"
        self.model = model.to(memory_format=torch.channels_last) if self.reduced else model
        self.shuffle = torch.Generator().manual_seed(recipe.seed + 1)
        self.generator = torch.Generator(self.device).manual_seed(recipe.seed + 2)
        rows, kept = held_out_split(len(images), recipe.seed)
        kept = kept[:IMAGES]
        self.held_out = as_float(images[kept].to(self.device)), labels[kept].to(self.device)
        place = _place(images, self.device)
        self.x, self.y = images[rows].to(place), labels[rows].to(place)
        if recipe.method in PREPARATIONS:
            self.x = PREPARATIONS[recipe.method](model, as_float(self.x), self.y, recipe, num_classes)
        self.batch_size = min(recipe.batch_size, len(rows))
        # The ragged last batch is left out: another shuffle has its rows.
        self.per_epoch = min(len(rows) // self.batch_size, steps_per_epoch or len(rows))
        self.total = epochs * self.per_epoch
        self.optimizer = _optimizer(model, recipe)
        self.average = (
            AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))  # type: ignore[no-untyped-call]
            if recipe.ema
            else None
        )
        self.iteration, self.parts = 0, 1
        self.log: list[EpochRow] = []
        self.order = torch.zeros(0, dtype=torch.int64)
        self.losses: list[float] = []
        self.penalties: list[float] = []
        self.seconds = 0.0

    @property
    def result(self) -> Normalised:
        """The network that is measured and kept: the averaged one where the recipe has an average."""
        return self.model if self.average is None else cast(Normalised, self.average.module)

    def run(
        self, *, stop: Callable[[], str], checkpoint: Callable[[], None], progress: Progress | None = None
    ) -> str:
        """Train until the end or until asked to stop.

        Args:
            stop: asked before every step; a reason, or nothing.
            checkpoint: called after every epoch and every few minutes, and on stopping; see `state`.
            progress: called after every step.

        Returns:
            The reason it stopped before the end, or nothing.

        Raises:
            RunError: a loss that is not finite, with its epoch and iteration; memory that does not
                suffice for a single image.
        """
        saved = time.monotonic()
        while self.iteration < self.total:
            reason = stop()
            if self.world.agree(bool(reason), self.device):
                checkpoint()
                return reason or "another process"
            self.step()
            row = self._end_epoch() if self.iteration % self.per_epoch == 0 else None
            if row is not None or time.monotonic() - saved > CHECKPOINT_SECONDS:
                checkpoint()
                saved = time.monotonic()
            if progress is not None:
                progress(self.iteration, self.total, row)
        return ""

    def step(self) -> None:
        """One step of the optimiser.

        Raises:
            RunError: as `run`.
        """
        with _precision(self.recipe, self.device):
            self._step()

    def _step(self) -> None:
        started = time.perf_counter()
        index = self.iteration % self.per_epoch
        if index == 0:
            self.model.train()
            self.order = torch.randperm(len(self.x), generator=self.shuffle)
        batch = self.order[index * self.batch_size : (index + 1) * self.batch_size].to(self.x.device)
        x = AUGMENTATIONS[self.recipe.augmentation](as_float(self.x[batch].to(self.device)), self.generator)
        y = self.y[batch].to(self.device)
        rate = learning_rate(
            self.recipe.schedule, self.recipe.lr, self.recipe.lr_final, self.iteration, self.total
        )
        self.optimizer.param_groups[0]["lr"] = rate
        loss, penalty = self._backward_in_parts(x, y)
        self.world.average_gradients(self.model.parameters())
        self.losses.append(self.world.mean(loss, self.device))
        if not math.isfinite(self.losses[-1]):
            raise RunError(
                f"training: the loss is {self.losses[-1]} in epoch {self.iteration // self.per_epoch + 1}, "
                f"iteration {index + 1} of {self.per_epoch}: lower lr or the weight of the regulariser"
            )
        if penalty is not None:
            self.penalties.append(self.world.mean(penalty, self.device))
        if self.recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.iteration += 1
        self.seconds += time.perf_counter() - started

    def _backward_in_parts(self, x: Tensor, y: Tensor) -> tuple[float, float | None]:
        """Gradients of this process's share; where memory runs out, again in twice as many parts."""
        before = self.generator.get_state()
        while True:
            try:
                return self._backward(x, y, before)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if self.parts >= len(x):
                    raise RunError("training: out of memory even for a single image") from None
                self.parts *= 2
                self.optimizer.zero_grad()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _backward(self, x: Tensor, y: Tensor, random_state: Tensor) -> tuple[float, float | None]:
        mine = self.world.share(len(x))
        total, penalty = 0.0, None
        self.optimizer.zero_grad()
        for rows in split(mine, self.parts):
            self.generator.set_state(random_state)
            context = StepContext(
                self.iteration, self.per_epoch, self.num_classes, self.generator, len(x), rows
            )
            # No cache: it outlives the step inside an outer context, and would keep the first weights.
            with torch.autocast(
                self.device.type, dtype=torch.bfloat16, enabled=self.reduced, cache_enabled=False
            ):
                loss, scalars = METHODS[self.recipe.method](
                    self.model, x[rows], y[rows], self.recipe, context
                )
            share = (rows.stop - rows.start) / (mine.stop - mine.start)
            (loss * share).backward()
            total += float(loss.detach()) * share
            if "regulariser" in scalars:
                penalty = (penalty or 0.0) + float(scalars["regulariser"]) * share
        return total, penalty

    def _end_epoch(self) -> EpochRow:
        measured = measure(self.result, *self.held_out, self.scale, self.recipe.seed + 3)
        row = EpochRow(
            epoch=self.iteration // self.per_epoch,
            lr=self.optimizer.param_groups[0]["lr"],
            loss=_mean(self.losses),
            regulariser=_mean(self.penalties),
            seconds=self.seconds,
            clean=measured.clean,
            pgd=measured.pgd,
            hz=measured.hz,
            frobenius=measured.frobenius,
        )
        self.log.append(row)
        self.losses, self.penalties, self.seconds = [], [], 0.0
        return row

    # --- state ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors, numbers and containers of them."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "shuffle": self.shuffle.get_state(),
            "generator": self.generator.get_state(),
            "iteration": self.iteration,
            "order": self.order,
            "parts": self.parts,
            "losses": self.losses,
            "penalties": self.penalties,
            "seconds": self.seconds,
            "log": [vars(row) for row in self.log],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put a state back, of a run with the same arguments."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.shuffle.set_state(as_bytes(state["shuffle"]))
        self.generator.set_state(as_bytes(state["generator"]))
        self.iteration, self.order = state["iteration"], state["order"]
        self.parts, self.seconds = state["parts"], state["seconds"]
        self.losses, self.penalties = list(state["losses"]), list(state["penalties"])
        self.log = [EpochRow(**row) for row in state["log"]]
        self.model.train()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _place(images: Tensor, device: torch.device) -> torch.device:
    """The device, where the images fit; batches then never wait for main memory."""
    if device.type != "cuda":
        return device
    needed = images.numel() * images.element_size()
    return device if needed < DATA_SHARE * torch.cuda.mem_get_info(device)[0] else torch.device("cpu")


def _optimizer(model: Normalised, recipe: AnyRecipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )


def _precision(recipe: AnyRecipe, device: torch.device) -> AbstractContextManager[None]:
    """TF32 where bf16 is allowed anyway, except for differences of gradients: too few digits are left."""
    reduced = device.type == "cuda" and recipe.precision == "bf16" and recipe.method != "cure"
    return float32_products(tf32=True) if reduced else full_precision()
