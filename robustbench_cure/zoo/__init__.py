"""Architectures by name: what a model card's `architecture` and `architecture_args` build."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from torch import nn

from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.catalog import did_you_mean
from robustbench_cure.protocol.naming import ROBUSTBENCH
from robustbench_cure.zoo.digits_cnn import digits_cnn
from robustbench_cure.zoo.lenet import lenet
from robustbench_cure.zoo.resnet import resnet18
from robustbench_cure.zoo.wrn import wrn

#: Name -> builder. A builder takes (num_classes, in_channels) and keyword-only options with defaults.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "digits_cnn": digits_cnn,
    "lenet": lenet,
    "resnet18": resnet18,
    "wrn": wrn,
}


def build(
    architecture: str,
    num_classes: int,
    in_channels: int,
    args: Mapping[str, int | float | str | bool],
) -> nn.Module:
    """A freshly initialised network that maps normalised images to logits.

    Args:
        architecture: key of `ARCHITECTURES`, or ``robustbench:`` and a network of RobustBench.
        num_classes: width of the last layer.
        in_channels: channels of one image.
        args: options of the builder; each must have the type of the option's default.

    Raises:
        UsageError: unknown architecture or option, wrong type, or a value the builder refuses.
    """
    if architecture.startswith(ROBUSTBENCH):
        from robustbench_cure.interop.architectures import network  # slow to import, and rarely asked for

        if in_channels != 3:
            raise UsageError(f"architecture {architecture!r}: takes 3 channels, not {in_channels}")
        return network(architecture.removeprefix(ROBUSTBENCH), num_classes, args)
    if architecture not in ARCHITECTURES:
        hint = did_you_mean(architecture, ARCHITECTURES) or f"; known: {', '.join(ARCHITECTURES)}"
        raise UsageError(f"unknown architecture {architecture!r}{hint}")
    builder = ARCHITECTURES[architecture]
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(builder).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name, value in args.items():
        if name not in options:
            hint = did_you_mean(name, options) or f"; it takes: {', '.join(options) or 'none'}"
            raise UsageError(f"architecture {architecture!r}: unknown argument {name!r}{hint}")
        wanted = type(options[name])
        if type(value) is not wanted:
            raise UsageError(
                f"architecture {architecture!r}: argument {name!r} must be {wanted.__name__}, not {value!r}"
            )
    try:
        return builder(num_classes, in_channels, **args)
    except (ValueError, TypeError) as error:
        raise UsageError(f"architecture {architecture!r}: {error}") from None
