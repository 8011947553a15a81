"""Continuous batching: the living rows of a shard are worked on in full batches.

An iterative attack keeps its state for a whole shard and visits a batch of living rows at a time. A
row that is done leaves, and the next one takes its place, so that the batch stays full although rows
end at different steps. Lowest indices go first: the order of visits depends on nothing but the shard
and the batch size, and a row's own trajectory not even on those, beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Pool:
    """Iterate over index tensors of living rows until none is left.

    Args:
        n: rows.
        size: rows visited at a time.
        device: of the index tensors.
        among: int64 indices of the rows that live at first; default: all.

    Usage: ``for rows in pool: ...; pool.retire(rows[done])``.
    """

    def __init__(
        self, n: int, size: int, device: torch.device | str = "cpu", *, among: Tensor | None = None
    ) -> None:
        self.size = max(1, size)
        self.living = torch.full((n,), among is None, device=device)
        if among is not None:
            self.living[among] = True

    def retire(self, rows: Tensor) -> None:
        """Take rows out for good."""
        self.living[rows] = False

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            rows = self.living.nonzero().squeeze(1)[: self.size]
            if len(rows) == 0:
                return
            yield rows
