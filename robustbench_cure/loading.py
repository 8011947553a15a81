"""The models and the data that a request names."""

from __future__ import annotations

import math

from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet, load_dataset
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import catalog, find
from robustbench_cure.protocol.request import Request
from robustbench_cure.zoo.models import ROBUSTBENCH, load_model


def named_models(request: Request) -> tuple[str, ...]:
    """The models of a request; without any, the embedded ones.

    Raises:
        UsageError: one is named twice, or weights are given for several.
    """
    if request.weights is not None and len(request.models) != 1:
        raise UsageError("--weights goes with exactly one --model")
    models = request.models or tuple(
        sorted(m for m in catalog(ModelCard, request.cards) if m.startswith("digits_"))
    )
    doubled = [m for m in models if models.count(m) > 1]
    if doubled:
        raise UsageError(f"--model {doubled[0]} is given twice")
    return models


def load_all(models: tuple[str, ...], dataset: str, request: Request) -> tuple[list[Classifier], EvalSet]:
    """The models and the data of a request.

    Raises:
        UsageError: one of them cannot be loaded.
    """
    # Cards do without the data: a model that cannot be loaded is refused before anything is downloaded.
    loaded = {model: _classifier(model, request, None) for model in models if ":" not in model}
    data = load_dataset(dataset, request.split, request.data_dir)
    if not request.models and dataset != "digits":
        raise UsageError(f"--dataset {dataset}: name a model with --model; those built in know digits alone")
    return [loaded.get(model) or _classifier(model, request, data) for model in models], data


def card_dataset(model: str, cards: tuple[str, ...]) -> str:
    """The data set of a model's card.

    Raises:
        UsageError: a model without a card.
    """
    if model.startswith(ROBUSTBENCH):
        from robustbench_cure.interop.robustbench_zoo import parts

        return parts(model)[0]
    if ":" in model:
        raise UsageError(f"{model}: a model without a card needs --dataset")
    return find(ModelCard, model, cards).card.dataset


def _classifier(model: str, request: Request, data: EvalSet | None) -> Classifier:
    return load_model(
        model,
        weights=request.weights,
        device=request.device,
        precision=request.precision,
        batch_size=parse_batch_size(request.batch_size),
        mean=parse_numbers("--mean", request.mean),
        std=parse_numbers("--std", request.std),
        data=data,
        cards=request.cards,
    )


def parse_batch_size(text: str) -> int | None:
    """``auto`` or a positive number."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--batch-size {text}: use auto or a positive number")
    return int(text)


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """``.49,.48,.45`` as numbers."""
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: write numbers separated by commas, .49,.48,.45") from None
    if not all(math.isfinite(number) for number in numbers):
        raise UsageError(f"{option} {text}: the numbers must be finite")
    return numbers
