"""Training on several devices: every process works on its share of each batch, and gradients are averaged.

Started by ``torchrun --nproc-per-node K -m robustbench_cure train ID``, which says through the environment
who a process is. Gradients are averaged in one exchange after the backward pass instead of by
`DistributedDataParallel`: its hooks do not expect the second backward pass that CURE is made of.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustbench_cure.errors import UsageError


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Args:
        rank: number of this process; 0 writes files and talks.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def share(self, n: int) -> slice:
        """The rows of a batch of ``n`` that are this process's."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes; shares must be equally large."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        means = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def mean(self, value: float, device: torch.device) -> float:
        """A number averaged over the processes; infinite or NaN in one is so in all."""
        if self.size == 1:
            return value
        numbers = torch.tensor([value], dtype=torch.float64, device=device)
        dist.all_reduce(numbers)
        return float(numbers) / self.size

    def agree(self, wish: bool, device: torch.device) -> bool:
        """Whether any process wishes it, so that all act alike."""
        return wish if self.size == 1 else self.mean(float(wish), device) > 0

    def adapt(self, model: nn.Module, device: torch.device) -> None:
        """Give the network's parts batch-norm that sees the whole batch.

        Raises:
            UsageError: on processors, for which PyTorch has no such layer.
        """
        if self.size == 1 or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            return
        if device.type != "cuda":
            raise UsageError(
                "batch-norm over several processes needs CUDA devices: train this network in one process"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]


@contextmanager
def world(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that ``torchrun`` started, and take this one's device; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()


def split(rows: slice, parts: int) -> list[slice]:
    """A range of rows cut into at most ``parts`` pieces of nearly equal length."""
    count = rows.stop - rows.start
    parts = min(parts, count)
    edges = [rows.start + k * count // parts for k in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether this is a device's or the processor's memory running out."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def as_bytes(state: Tensor) -> Tensor:
    """A random state as `torch.Generator` takes it back."""
    return state.cpu().to(torch.uint8)
