"""Progress of long work: one living line on a terminal, a plain line now and then in a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

#: Seconds between two plain lines.
INTERVAL = 10.0


class ProgressLine:
    """Show how far some work is, on standard error.

    Args:
        title: what is being done, e.g. the model's id.
        unit: what is counted.
    """

    def __init__(self, title: str, unit: str = "samples") -> None:
        self.title, self.unit = title, unit
        self.living = sys.stderr.isatty()
        self.bar: tqdm[None] | None = None
        self.started = self.last = time.monotonic()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: float, total: float, doing: str) -> None:
        """Report ``done`` of ``total``, and what comes next."""
        if self.living:
            if self.bar is None:
                self.bar = tqdm(
                    total=total, desc=self.title, unit=f" {self.unit}", leave=False, dynamic_ncols=True
                )
            self.bar.n = done
            self.bar.set_postfix_str(doing[:40], refresh=False)
            self.bar.refresh()
            return
        now = time.monotonic()
        if now - self.last < INTERVAL:
            return
        self.last = now
        sys.stderr.write(
            f"{self.title}: {done:g}/{total:g} {self.unit}, {now - self.started:.0f} s, {doing}\n"
        )
        sys.stderr.flush()
