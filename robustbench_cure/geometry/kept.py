"""Finished rows of a long measurement, kept in a file, so that an interrupted command can go on."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from robustbench_cure.errors import UsageError
from robustbench_cure.files import write_atomically

Arrays = Mapping[str, NDArray[np.generic]]

#: Seconds between two writings of unfinished work.
INTERVAL = 30.0


class Kept:
    """One .npz file of finished rows.

    Args:
        path: the file; read at once if it is there.
        identity: what must agree for its rows to be gone on with.

    Attributes:
        rows: what an earlier run left; empty: nothing.

    Raises:
        UsageError: the file is damaged, or of another measurement.
    """

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        self.path = path
        self.identity = json.dumps(identity)
        self.rows: dict[str, NDArray[np.generic]] = self._read() if path.exists() else {}
        self.last = time.monotonic()

    def keep(self, rows: Arrays) -> None:
        """Write the rows, if the last time is long enough ago."""
        if time.monotonic() - self.last >= INTERVAL:
            self.write(rows)

    def write(self, rows: Arrays) -> None:
        """Write the rows; equal rows give equal bytes."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, identity=np.array(self.identity), **rows)  # type: ignore[arg-type]
        write_atomically(self.path, lambda file: file.write_bytes(buffer.getvalue()))
        self.last = time.monotonic()

    def _read(self) -> dict[str, NDArray[np.generic]]:
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
            same = str(found.pop("identity")) == self.identity
        except Exception:  # zipfile, NumPy and zlib each have their own
            raise UsageError(f"{self.path}: damaged: delete it to measure again") from None
        if not same:
            raise UsageError(f"{self.path}: of another measurement: choose another --out")
        return found
