"""The log of a run on disk: a CSV file, and TensorBoard events where that package is installed."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from robustbench_cure.files import write_atomically
from robustbench_cure.training.result import EpochRow


class Journal:
    """Write rows as epochs end.

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
        write_atomically(self.path, lambda file: file.write_text(text.getvalue(), encoding="utf-8"))
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
