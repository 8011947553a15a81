"""When to stop before the end: a time budget, Ctrl-C, or the signal a job queue sends."""

from __future__ import annotations

import re
import signal
import threading
import time
from types import FrameType, TracebackType

from robustbench_cure.errors import UsageError

_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """Read "90s", "45m" or "1.5h".

    Raises:
        UsageError: another form, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"--time-budget {text}: write a number and a unit, such as 90s, 45m or 1.5h")
    return float(match[1]) * _UNITS[match[2]]


class Stopper:
    """Ask it between two steps: ``stopper()`` is the reason to stop, or nothing.

    Inside ``with``, SIGINT and SIGTERM become reasons; a second SIGINT interrupts at once.

    Args:
        budget: seconds from now; None: no limit.
    """

    def __init__(self, budget: float | None = None) -> None:
        self.deadline = None if budget is None else time.monotonic() + budget
        self.signal = ""

    def __call__(self) -> str:
        """The reason to stop, or nothing."""
        if self.signal:
            return self.signal
        over = self.deadline is not None and time.monotonic() >= self.deadline
        return "the time budget" if over else ""

    def __enter__(self) -> Stopper:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
