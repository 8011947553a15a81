"""Types of command line options that click has no own ones for."""

from __future__ import annotations

from typing import Any

import click


class NumberRange(click.FloatRange):
    """A range of numbers without "not a number", which click lets through: it is neither below nor above."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number: float = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number
