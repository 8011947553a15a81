"""How far a diagnosis is: passes through the network, done and planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from robustbench_cure.classifier import Classifier

Progress = Callable[[float, float, str], None]


def unheard(_done: float, _total: float, _doing: str) -> None:
    """Nobody is told."""


class Work:
    """Planned pieces of work and those done.

    Args:
        planned: name -> passes it takes at most.
        classifier: counts the passes.
        progress: told the passes done, the passes in all and what is being done.
    """

    def __init__(self, planned: dict[str, float], classifier: Classifier, progress: Progress) -> None:
        self.planned, self.classifier, self.progress = planned, classifier, progress
        self.total = sum(planned.values())
        self.done = 0.0

    @contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Report while a piece is under way."""
        before = self._passes()

        def beat() -> None:
            share = min(self.planned[name], self._passes() - before)
            self.progress(self.done + share, self.total, name.replace("_", " "))

        self.classifier.callback = beat
        try:
            yield
        finally:
            self.classifier.callback = None

    def finished(self, name: str) -> None:
        """A piece is done, with fewer passes than planned or without any."""
        self.done += self.planned[name]

    def _passes(self) -> int:
        return self.classifier.forwards + 2 * self.classifier.backwards
