"""How robust is this image classifier really, and can the number be trusted?

    from robustbench_cure import evaluate, load_battery, load_dataset, load_model

    record = evaluate(load_model("digits_cure"), load_battery("digits"), load_dataset("digits"))
    print(record.worst_case_accuracy.value, record.worst_case_accuracy.interval)

The names below are imported when first used, so that cards can be listed without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustbench_cure.cards import Battery
    from robustbench_cure.classifier import Classifier
    from robustbench_cure.datasets import EvalSet, from_arrays, load_dataset
    from robustbench_cure.evaluation import evaluate
    from robustbench_cure.record import Record
    from robustbench_cure.shards import merge
    from robustbench_cure.threat import ThreatModel
    from robustbench_cure.zoo.models import load_model

__version__ = "0.1.0"

_HOMES = {
    "Battery": "cards",
    "Classifier": "classifier",
    "EvalSet": "datasets",
    "Record": "record",
    "ThreatModel": "threat",
    "evaluate": "evaluation",
    "from_arrays": "datasets",
    "load_dataset": "datasets",
    "load_model": "zoo.models",
    "merge": "shards",
}

__all__ = [
    "Battery",
    "Classifier",
    "EvalSet",
    "Record",
    "ThreatModel",
    "evaluate",
    "from_arrays",
    "load_battery",
    "load_dataset",
    "load_model",
    "merge",
]


def load_battery(name: str, *, cards: tuple[str, ...] = ()) -> Battery:
    """The battery with this id.

    Args:
        name: see ``cure-bench list batteries``.
        cards: directories with further cards.

    Raises:
        UsageError: unknown id.
    """
    from robustbench_cure.cards import Battery
    from robustbench_cure.catalog import find

    return find(Battery, name, cards).card


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"robustbench_cure.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'robustbench_cure' has no attribute {name!r}")
