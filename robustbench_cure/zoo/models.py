"""From a name to a classifier: a card's id, or a user's own factory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from robustbench_cure.adapt import Normalised, foreign, materialise, one_line
from robustbench_cure.classifier import Classifier, Precision, has_bf16, resolve_device
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import CardFile
from robustbench_cure.protocol.identity import ModelInfo
from robustbench_cure.protocol.naming import ModelName, resolve_model
from robustbench_cure.state import state_digest
from robustbench_cure.zoo.factory import import_factory
from robustbench_cure.zoo.loading import load_card_module, load_weights

#: Least and most images a pass, where no batch size is asked for.
BATCH_RANGE = (16, 512)
#: Bytes that one pass may keep for its backward pass, for each thread of a CPU; on a card it is half of
#: what is free. More is slower: activations fall out of the cache, and above 32 MB each the C library
#: returns them to the system and takes them back at every layer.
CPU_BUDGET = 1 << 26


def load_model(
    name: str | ModelName,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    data: EvalSet | None = None,
    cards: tuple[str, ...] = (),
) -> Classifier:
    """Load a model ready to be evaluated.

    Args:
        name: a card's id, ``robustbench:NAME``, or ``package.module:factory`` for a network of your own; or
            what `resolve_model` made of it.
        weights: a .safetensors file (or .pt with tensors alone); overrides the card's.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        precision: of the search for perturbations, ``auto`` (bf16 where the processor has it),
            ``fp32`` or ``bf16``; every claim is checked in fp32.
        batch_size: images in one pass; default by device.
        mean: per channel, in units of x in [0, 1], for a factory's network; default: it normalises itself.
        std: likewise.
        data: the data set a factory's network is for: tells image shape and number of classes.
        cards: directories with further cards.

    Raises:
        UsageError: unknown model, no weights, or weights that do not fit.
    """
    place = resolve_device(device)
    if place.type == "meta":
        raise UsageError(f"--device {device}: computes nothing; use auto, cpu or cuda")
    model = resolve_model(name, cards) if isinstance(name, str) else name
    if model.card_file:
        if mean is not None or std is not None:
            raise UsageError(f"--mean and --std are for models of your own; {model} has them in its card")
        module, info, classes, shape = _from_card(model.card_file, weights)
    elif model.robustbench:
        module, info, classes, shape = _of_robustbench(model.name, weights, mean, std)
    else:
        module, info, classes, shape = _own(model.name, weights, mean, std, data)
    try:
        classifier = Classifier(
            module,
            num_classes=classes,
            input_shape=shape,
            device=place,
            precision=resolve_precision(precision, place),
            batch_size=batch_size or BATCH_RANGE[0],
            info=info,
        )
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{model}: the network cannot be copied to {place}: {one_line(error)}") from error
    if batch_size is None:
        classifier.batch_size = automatic_batch_size(classifier)
    return classifier


def automatic_batch_size(classifier: Classifier) -> int:
    """Images a pass whose forward and backward fit the device, from the bytes one image needs."""
    free = CPU_BUDGET * torch.get_num_threads()
    if classifier.device.type == "cuda":
        free = torch.cuda.mem_get_info(classifier.device)[0] // 2
    try:
        needed = max(1, classifier.bytes_per_image())
    except Exception:  # a network that cannot run at all: preflight says what is wrong with it
        return BATCH_RANGE[0]
    return max(BATCH_RANGE[0], min(BATCH_RANGE[1], free // needed))


def resolve_precision(name: str, device: torch.device) -> Precision:
    """``auto`` is bf16 where the processor multiplies it natively, else fp32."""
    if name == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if name not in ("fp32", "bf16"):
        raise UsageError(f"--precision {name}: use auto, fp32 or bf16")
    return "bf16" if name == "bf16" else "fp32"


def _from_card(
    card_file: CardFile[ModelCard], weights: str | Path | None
) -> tuple[nn.Module, ModelInfo, int, tuple[int, int, int]]:
    card = card_file.card
    module, digest = load_card_module(card_file, Path(weights).expanduser() if weights else None)
    info = ModelInfo(
        id=card.id,
        name=f"{card.name} ({Path(weights).name})" if weights else card.name,
        source=f"weights given: {Path(weights).name}" if weights else "card",
        architecture=card.architecture,
        parameters=_count(module),
        weights_sha256=digest,
        card_digest=card.digest,
        published_row=card.published_row,
        training=card.training.method,
    )
    return module, info, card.num_classes, card.input_shape


def _of_robustbench(
    name: str, weights: str | Path | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> tuple[nn.Module, ModelInfo, int, tuple[int, int, int]]:
    if weights is not None or mean is not None or std is not None:
        raise UsageError(
            f"{name}: brings its own weights and normalisation; leave out --weights, --mean, --std"
        )
    from robustbench_cure.interop.robustbench_zoo import load

    return load(name)


def _own(
    name: str,
    weights: str | Path | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    data: EvalSet | None,
) -> tuple[nn.Module, ModelInfo, int, tuple[int, int, int]]:
    if data is None:
        raise UsageError(f"{name}: a model without a card needs a data set that tells its shape and classes")
    channels, height, width = data.pixels.shape[1:]
    net = import_factory(name)
    try:
        with foreign():
            materialise(net, (channels, height, width))
    except Exception as error:  # the user's own code
        raise UsageError(
            f"{name}: the network fails on an image of shape {(channels, height, width)}: {one_line(error)}"
        ) from error
    digest = load_weights(net, Path(weights).expanduser()) if weights else ""
    module: nn.Module = net
    if mean is not None or std is not None:
        mean, std = mean or (0.0,) * channels, std or (1.0,) * channels
        if len(mean) != channels or len(std) != channels:
            numbers = f"{channels} number{'s' * (channels != 1)}"
            raise UsageError(f"--mean and --std need {numbers}, one for each channel of {data.name}")
        if min(std) <= 0:
            raise UsageError("--std: must be positive")
        module = Normalised(net, mean, std)
    info = ModelInfo(
        id="".join(c if c.isalnum() else "_" for c in name.lower()),
        name=name,
        source=f"imported from {name}" + (f", weights {Path(weights).name}" if weights else ""),
        architecture=type(net).__name__,
        parameters=_count(net),
        weights_sha256=digest or state_digest(net),
    )
    return module, info, len(data.classes), (int(channels), int(height), int(width))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
