"""Writing files so that a reader never sees half of one, and a cache for interrupted work."""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from robustbench_cure.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[np.generic]]

#: Seconds between two writings of unfinished work.
INTERVAL = 30.0


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it into place.

    Args:
        path: the file; its folder is made if need be.
        write: gets the temporary file.

    Raises:
        UsageError: the disk is full or the place is not writable; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text whole or not at all; what UTF-8 cannot hold is replaced. See `write_atomically`."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8", errors="replace"))


def refuse_files(out: Path) -> None:
    """Refuse a folder for results that is a file, or lies below one (UsageError)."""
    for part in (out, *out.parents):
        if part.exists() and not part.is_dir():
            raise UsageError(f"--out {out}: {part} is a file, not a directory; choose another --out")


class Cache:
    """One .npz file of finished rows, from which interrupted work continues.

    Args:
        path: the file; read at once if it is there.
        identity: what must agree for its rows to be used.

    Attributes:
        rows: arrays by name that an earlier run finished; empty without one.

    Raises:
        UsageError: the file is damaged, or of another measurement.
    """

    def __init__(self, path: Path, identity: dict[str, str]) -> None:
        self.path = path
        self.identity = json.dumps(identity)
        self.rows: dict[str, NDArray[np.generic]] = self._read() if path.exists() else {}
        self.last = time.monotonic()

    def update(self, rows: Arrays) -> None:
        """Write the rows, unless the last time was less than `INTERVAL` ago."""
        if time.monotonic() - self.last >= INTERVAL:
            self.write(rows)

    def write(self, rows: Arrays) -> None:
        """Write the rows; equal rows give equal bytes."""
        import numpy as np

        buffer = io.BytesIO()
        np.savez_compressed(buffer, identity=np.array(self.identity), **rows)  # type: ignore[arg-type]
        write_atomically(self.path, lambda file: file.write_bytes(buffer.getvalue()))
        self.last = time.monotonic()

    def _read(self) -> dict[str, NDArray[np.generic]]:
        import numpy as np

        try:
            with np.load(self.path, allow_pickle=False) as archive:
                rows = {name: archive[name] for name in archive.files}
            same = str(rows.pop("identity")) == self.identity
        except Exception:  # zipfile, NumPy and zlib each have their own
            raise UsageError(f"{self.path}: damaged: delete it to measure again") from None
        if not same:
            raise UsageError(f"{self.path}: of another measurement: choose another --out")
        return rows
