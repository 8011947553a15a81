"""Progress of long work: one line of a terminal, drawn anew, and plain lines now and then in a pipe."""

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
        silent: say nothing: another process speaks.
    """

    def __init__(self, title: str, unit: str = "samples", *, silent: bool = False) -> None:
        self.title, self.unit, self.silent = title, unit, silent
        self.redraw = sys.stderr.isatty()
        self.bar: tqdm[None] | None = None
        self.started = self.last = time.monotonic()
        self.first: float | None = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: float, total: float, doing: str) -> None:
        """Report ``done`` of ``total``, and what comes next."""
        if self.silent:
            return
        if self.first is None:
            self.first = done  # a resumed run starts here: the time left follows from what was done since
        if self.redraw:
            if self.bar is None:
                self.bar = tqdm(
                    total=total,
                    initial=done,
                    desc=self.title,
                    unit=f" {self.unit}",
                    leave=False,
                    dynamic_ncols=True,
                )
            self.bar.n = done
            self.bar.set_postfix_str(doing[:40], refresh=False)
            self.bar.refresh()
            return
        now = time.monotonic()
        if now - self.last < INTERVAL:
            return
        self.last = now
        spent = now - self.started
        left = (
            f", {_duration(spent * (total - done) / (done - self.first))} left" if done > self.first else ""
        )
        sys.stderr.write(f"{self.title}: {done:g}/{total:g} {self.unit}, {_duration(spent)}{left}, {doing}\n")
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    """Seconds as a person who waits reads them: 45 s, 12 min, 3.1 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
