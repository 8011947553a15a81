"""A user's own network: ``pkg.mod:make_net`` imported and called. This runs the user's code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from robustbench_cure.errors import UsageError


def import_factory(spec: str) -> nn.Module:
    """Import ``pkg.mod:make_net`` and call it without arguments.

    Args:
        spec: module and attribute; modules of the current directory are found.

    Raises:
        UsageError: not of this form, not importable, or the result is no `nn.Module`.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{spec!r}: write PACKAGE.MODULE:FUNCTION, a function without arguments")
    with _current_directory_importable():
        try:
            factory: Any = importlib.import_module(module_name)
            for name in attribute.split("."):
                factory = getattr(factory, name)
        except AttributeError as error:
            raise UsageError(f"{spec}: {error}") from None
        except Exception as error:  # whatever the user's module raises is theirs to read
            raise UsageError(f"{spec}: importing it failed: {_one_line(error)}") from None
        if isinstance(factory, nn.Module) or not callable(factory):
            kind = type(factory).__name__
            raise UsageError(f"{spec}: is a {kind}; name a function that returns the network")
        try:
            module = factory()
        except Exception as error:  # as above
            raise UsageError(f"{spec}: calling it without arguments failed: {_one_line(error)}") from None
    if not isinstance(module, nn.Module):
        raise UsageError(f"{spec}: returned {type(module).__name__}, not a torch.nn.Module")
    return module


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
