"""A user's own network: ``pkg.mod:make_net`` imported and called. This runs the user's code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustbench_cure.adapt import foreign, one_line, unwrapped
from robustbench_cure.errors import UsageError


def import_factory(spec: str) -> nn.Module:
    """Import ``pkg.mod:make_net`` and call it without arguments.

    What the code sets for all of PyTorch (data type, device, recording of gradients) is put back; the
    network comes without the wrappers of compilation and parallel training.

    Args:
        spec: module and attribute; modules of the current directory are found, now and by later imports.

    Raises:
        UsageError: not of this form, not importable, or the result is no `nn.Module`.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{spec!r}: write PACKAGE.MODULE:FUNCTION, a function without arguments")
    with _current_directory_first(), _defaults_kept():
        try:
            with foreign():
                factory: Any = importlib.import_module(module_name)
            for name in attribute.split("."):
                factory = getattr(factory, name)
        except AttributeError as error:
            raise UsageError(f"{spec}: {error}") from None
        except Exception as error:  # whatever the user's module raises is theirs to read
            raise UsageError(f"{spec}: importing it failed: {_named(error)}") from None
        if isinstance(factory, nn.Module) or not callable(factory):
            kind = type(factory).__name__
            raise UsageError(f"{spec}: is a {kind}; name a function that returns the network")
        try:
            with foreign():
                module = factory()
        except Exception as error:  # as above
            raise UsageError(f"{spec}: calling it without arguments failed: {_named(error)}") from None
    if not isinstance(module, nn.Module):
        raise UsageError(f"{spec}: returned {type(module).__name__}, not a torch.nn.Module")
    return unwrapped(module)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


@contextmanager
def _current_directory_first() -> Iterator[None]:
    """First on the path for a while, last afterwards: networks import as late as in their first pass."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)


@contextmanager
def _defaults_kept() -> Iterator[None]:
    dtype, device, recording = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        torch.set_grad_enabled(recording)
