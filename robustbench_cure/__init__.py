"""How robust is this image classifier really, and can the number be trusted?

    from robustbench_cure import evaluate, load_battery, load_dataset, load_model

    record = evaluate(load_model("digits_cure"), load_battery("digits"), load_dataset("digits"))
    print(record.worst_case_accuracy.value, record.worst_case_accuracy.interval)

The names below are imported when first used, so that cards can be listed without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from robustbench_cure.version import __version__

if TYPE_CHECKING:
    from robustbench_cure.classifier import Classifier
    from robustbench_cure.datasets import EvalSet, from_arrays, load_dataset
    from robustbench_cure.evaluation.evaluate import evaluate
    from robustbench_cure.evaluation.record import Record
    from robustbench_cure.evaluation.storage import merge
    from robustbench_cure.protocol.cards import Battery
    from robustbench_cure.protocol.catalog import load_battery
    from robustbench_cure.threat import ThreatModel
    from robustbench_cure.zoo.models import load_model

_HOMES = {
    "Battery": "protocol.cards",
    "Classifier": "classifier",
    "EvalSet": "datasets",
    "Record": "evaluation.record",
    "ThreatModel": "threat",
    "evaluate": "evaluation.evaluate",
    "from_arrays": "datasets",
    "load_battery": "protocol.catalog",
    "load_dataset": "datasets",
    "load_model": "zoo.models",
    "merge": "evaluation.storage",
}

__all__ = [
    "Battery",
    "Classifier",
    "EvalSet",
    "Record",
    "ThreatModel",
    "__version__",
    "evaluate",
    "from_arrays",
    "load_battery",
    "load_dataset",
    "load_model",
    "merge",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"robustbench_cure.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'robustbench_cure' has no attribute {name!r}")
