"""RobustBench's networks without weights, as architectures of cards.

``architecture = "robustbench:wide_resnet.WideResNet"`` builds a class of its architectures with the card's
``architecture_args``; ``"robustbench:Carmon2019Unlabeled"`` the network of an entry, normalisation and all.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

from robustbench_cure.errors import UsageError
from robustbench_cure.interop.robustbench import import_robustbench
from robustbench_cure.interop.robustbench_zoo import entry
from robustbench_cure.protocol.catalog import did_you_mean
from robustbench_cure.protocol.naming import ROBUSTBENCH

#: What a card can write as an option.
Scalar: TypeAlias = int | float | str | bool


def network(name: str, num_classes: int, args: Mapping[str, Scalar]) -> nn.Module:
    """A freshly initialised network of RobustBench.

    Args:
        name: after the prefix: ``module.Class`` of ``robustbench.model_zoo.architectures``, or an entry as in
            `robustbench_parts`.
        num_classes: handed on where the class takes it.
        args: options of the class; an entry has none.

    Raises:
        UsageError: unknown network or option, wrong type, or a value that is refused.
    """
    import_robustbench()
    try:
        return _entry(name, args) if "/" in name or "." not in name else _built(name, num_classes, args)
    except UsageError as error:
        raise UsageError(f"architecture {ROBUSTBENCH}{name}: {error}") from None


def _entry(name: str, args: Mapping[str, Scalar]) -> nn.Module:
    _, _, _, found = entry(name)
    if args:
        raise UsageError("an entry takes no arguments")
    module: nn.Module = found["model"]()
    return module


def _built(name: str, num_classes: int, args: Mapping[str, Scalar]) -> nn.Module:
    builder = _builder(*name.split(".", 1))
    parameters = inspect.signature(builder).parameters
    for key, value in args.items():
        if key not in parameters or key == "num_classes":  # which is the card's own
            hint = did_you_mean(key, parameters) or f"; it takes: {', '.join(parameters)}"
            raise UsageError(f"unknown argument {key!r}{hint}")
        default = parameters[key].default
        if isinstance(default, bool | int | float | str) and type(value) is not type(default):
            raise UsageError(f"argument {key!r} must be {type(default).__name__}, not {value!r}")
    given = {"num_classes": num_classes} if "num_classes" in parameters else {}
    try:
        module = builder(**given, **args)
    except Exception as error:  # asserts and whatever else a constructor makes of a wrong value
        reason = " ".join(str(error).split()) or f"{type(error).__name__} for {dict(args)}"
        raise UsageError(reason) from None
    if not isinstance(module, nn.Module):
        raise UsageError(f"is no network but a {type(module).__name__}")
    return module


def _builder(file: str, name: str) -> Callable[..., Any]:
    """A class or function that the file itself defines."""
    try:
        module = importlib.import_module(f"robustbench.model_zoo.architectures.{file}")
    except ImportError as error:
        raise UsageError(f"cannot be imported: {error}") from None
    own = {key: value for key, value in vars(module).items() if _home(value) == module.__name__}
    if not callable(own.get(name)):
        raise UsageError(f"{file} has no {name!r}{did_you_mean(name, own)}")
    builder: Callable[..., Any] = own[name]
    return builder


def _home(value: object) -> str:
    return getattr(value, "__module__", "")
