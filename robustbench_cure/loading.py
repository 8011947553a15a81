"""The models and the data that a request names, loaded once for every verb."""

from __future__ import annotations

from collections.abc import Sequence

from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet, load_dataset
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.cards import Battery, ModelCard
from robustbench_cure.protocol.catalog import catalog, load_battery, roots
from robustbench_cure.protocol.naming import ModelName, resolve_model
from robustbench_cure.protocol.request import Request
from robustbench_cure.zoo.models import load_model

#: Data set that is embedded in the package, with models for it: what a request without models is about.
EMBEDDED = "digits"


def named_models(request: Request) -> tuple[ModelName, ...]:
    """The models of a request; without any, the embedded ones.

    Raises:
        UsageError: an unknown one, one that is named twice, or weights that are given for several.
    """
    if request.weights is not None and len(request.models) != 1:
        raise UsageError("--weights goes with exactly one --model")
    names = request.models or _embedded()
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        raise UsageError(f"--model {doubled[0]} is given twice")
    return tuple(resolve_model(name, request.cards) for name in names)


def _embedded() -> tuple[str, ...]:
    """Models of the embedded data set whose weights lie beside their cards, cards of the user's own apart."""
    _, package = roots()[-1]  # the last root is the package's own
    found = [file.card for file in catalog(ModelCard).values() if file.path.is_relative_to(package)]
    return tuple(sorted(c.id for c in found if c.dataset == EMBEDDED and c.weights and c.weights.file))


def named_battery(name: str | None, models: Sequence[ModelName], cards: tuple[str, ...]) -> Battery:
    """The battery with this id, or the one that all models' cards name.

    Raises:
        UsageError: unknown, or the cards name different ones.
    """
    if name is None:
        own = [model.battery for model in models if not model.card]  # networks without a card decide for all
        wanted = sorted({*own} or {model.battery for model in models})
        if len(wanted) > 1:
            raise UsageError(
                f"these models have different batteries ({', '.join(wanted)}): choose one with --battery"
            )
        (name,) = wanted
    return load_battery(name, cards=cards)


def load_all(
    models: Sequence[ModelName], request: Request, battery: Battery | None = None
) -> tuple[list[Classifier], EvalSet]:
    """The models and the data of a request.

    Args:
        models: see `named_models`.
        request: names the data set, the device and so on.
        battery: its data set is the default, before that of the first model.

    Raises:
        UsageError: one of them cannot be loaded.
    """
    dataset = request.dataset or (battery.dataset if battery else "") or models[0].dataset
    # Cards do without the data: a model that cannot be loaded is refused before anything is downloaded.
    loaded = {model.name: _load(model, request, None) for model in models if model.card}
    data = load_dataset(dataset, request.split, request.data_dir)
    if not request.models and dataset != EMBEDDED:
        raise UsageError(f"--dataset {dataset}: name a model with --model; those built in know digits alone")
    return [loaded.get(model.name) or _load(model, request, data) for model in models], data


def _load(model: ModelName, request: Request, data: EvalSet | None) -> Classifier:
    return load_model(
        model,
        weights=request.weights,
        device=request.device,
        precision=request.precision,
        batch_size=request.batch_size,
        mean=request.mean,
        std=request.std,
        data=data,
        cards=request.cards,
    )
