"""Continuous batching: the rows of a shard that are still attacked are worked on in full batches.

An iterative attack keeps its state for a whole shard and visits a batch of active rows at a time. A row that
is done is dropped, and the next one takes its place, so that the batch stays full although rows end at
different steps. Lowest indices go first: the order of visits depends only on the shard and the batch size,
and the trajectory of one row not even on those, beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class ActiveSet:
    """Iterate over batches of active rows until none is left.

    Args:
        n: number of rows.
        size: rows in a batch, at most.
        device: of the index tensors.
        among: rows that are active at first, bool (n,); default: all.

    Usage: ``for rows in active: ...; active.drop(rows[done])``, with ``rows`` int64 (B,), ascending.
    """

    def __init__(
        self, n: int, size: int, device: torch.device | str = "cpu", *, among: Tensor | None = None
    ) -> None:
        self.size = max(1, size)
        self.active = torch.ones(n, dtype=torch.bool, device=device) if among is None else among.clone()

    def drop(self, rows: Tensor) -> None:
        """Remove rows, int64 (m,), for good."""
        self.active[rows] = False

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            rows = self.active.nonzero().squeeze(1)[: self.size]
            if len(rows) == 0:
                return
            yield rows
