"""What makes CURE work: short fine-tunings of one network under every reading of its recipe, side by side.

The CURE paper leaves the unit of h open, and prints a square where its published code takes the norm itself.
Every row of the table fine-tunes the same network for the same number of steps under another reading, and
judges it with PGD(20) at linf 8/255. Rows that the output has already are not run again.

    python benchmarks/cure_pilot.py --start resnet18s_normal --dataset folder --data-dir DIR --out FILE.csv
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd

from robustbench_cure import evaluate, load_battery, load_dataset
from robustbench_cure.adapt import Normalised
from robustbench_cure.classifier import Classifier, resolve_device
from robustbench_cure.datasets import EvalSet
from robustbench_cure.files import write_atomically
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import find
from robustbench_cure.protocol.recipes import CureRecipe, GammaPhase
from robustbench_cure.training.train import train
from robustbench_cure.zoo.loading import build_from_card, load_card_module
from robustbench_cure.zoo.models import automatic_batch_size, resolve_precision


@dataclass(frozen=True)
class Reading:
    """One reading of the recipe; what is not named is the same for all."""

    h_space: str
    power: int
    gamma: float
    h: float
    batchnorm: str = "eval"
    direction: str = "sign"
    precision: str = "fp32"  # of the regulariser
    optimizer: str = "adam"
    lr: float = 3e-4


READINGS = (
    Reading("norm", 2, 4, 1.5),  # as printed, h in normalised units
    Reading("norm", 1, 4, 1.5),
    Reading("norm", 1, 4, 3.0),  # the defaults of the published code
    Reading("px01", 1, 1, 1.5),
    Reading("px01", 1, 4, 1.5, batchnorm="train"),
    Reading("px01", 1, 4, 1.5),
    Reading("px01", 1, 1, 1.5, batchnorm="train"),
    Reading("norm", 1, 4, 3.0, batchnorm="train"),
    Reading("norm", 2, 4, 1.5, batchnorm="train"),
    Reading("px01", 2, 4, 1.5, batchnorm="train"),
    Reading("norm", 1, 16, 1.5, batchnorm="train"),
    Reading("norm", 2, 100, 1.5, batchnorm="train"),  # about px01, power 2, gamma 4 at a shorter step
    Reading("px01", 1, 1, 1.5, batchnorm="train", lr=1e-3),
    Reading("px01", 1, 1, 1.5, batchnorm="train", optimizer="sgd", lr=0.01),
    Reading("px01", 1, 1, 1.5, batchnorm="train", precision="bf16"),
    Reading("px01", 1, 1, 1.5, batchnorm="train", direction="gradient"),
    Reading("px01", 1, 1, 0.8, batchnorm="train"),
)


def main() -> None:
    """Run the readings that are missing, one row after the other."""
    options = parse()
    device = resolve_device(options.device)
    found = find(ModelCard, options.start)
    start, _ = load_card_module(found, options.weights)
    data = load_dataset(options.dataset, "train", options.data_dir).subset(options.n)
    test = load_dataset(options.dataset, "test", options.data_dir).subset(options.test_n)
    rows = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
    if not rows:
        rows.append({"steps": 0, **judge(start, found.card, test, device)})
        save(rows, options.out)
    for reading in READINGS[: options.rows or None]:
        if any(all(row.get(k) == v for k, v in asdict(reading).items()) for row in rows):
            continue
        started = time.perf_counter()
        card = found.card.model_copy(update={"training": recipe(reading, options)})
        result = train(card, data, start_module=start, device=device)
        seconds = time.perf_counter() - started
        module = build_from_card(card)
        module.net.load_state_dict(result.state_dict)
        row = {
            **asdict(reading),
            "steps": result.steps,
            "seconds": round(seconds),
            **judge(module, card, test, device),
            "hz": round(result.log[-1].hz, 3),
            "frobenius": round(result.log[-1].frobenius, 3),
        }
        rows.append(row)
        save(rows, options.out)
        print(row, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--start", default="resnet18s_normal", help="id of a model card")
    parser.add_argument("--weights", type=Path, help="of the start, instead of the card's")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--n", type=int, default=10000, help="training images")
    parser.add_argument("--epochs", type=int, default=2, help="the first of them raises h")
    parser.add_argument("--test-n", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=0, help="only the first so many readings")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def recipe(reading: Reading, options: argparse.Namespace) -> CureRecipe:
    """A reading as a training recipe."""
    return CureRecipe.model_validate(
        {
            "method": "cure",
            "start": options.start,
            "epochs": options.epochs,
            "batch_size": 128,
            "optimizer": reading.optimizer,
            "lr": reading.lr,
            "lr_final": reading.lr / 100,
            "schedule": "cosine",
            "weight_decay": 0.0,
            "augmentation": "crop-flip",
            "precision": "bf16",
            "seed": 0,
            "gamma": (GammaPhase(epochs=options.epochs, gamma=float(reading.gamma)),),
            "h": reading.h,
            "h_ramp_epochs": 1,
            "h_space": reading.h_space,
            "reg_power": reading.power,
            "batchnorm": reading.batchnorm,
            "direction": reading.direction,
            "regulariser_precision": reading.precision,
        }
    )


def judge(module: Normalised, card: ModelCard, test: EvalSet, device: object) -> dict[str, float]:
    """Clean accuracy and accuracy under PGD(20) at 8/255, per cent."""
    place = resolve_device(str(device))
    classifier = Classifier(
        module,
        num_classes=card.num_classes,
        input_shape=card.input_shape,
        device=place,
        precision=resolve_precision("auto", place),
    )
    classifier.batch_size = automatic_batch_size(classifier)
    record = evaluate(classifier, load_battery("table2"), test, n=len(test))
    return {
        "clean": round(100 * record.clean_accuracy.value, 1),
        "pgd20": round(100 * record.robust_accuracy("pgd20").value, 1),
    }


def save(rows: list[dict[str, object]], out: Path) -> None:
    """Write the table; the start's row has no reading."""
    columns = [*(field.name for field in fields(Reading)), "steps", "seconds", "clean", "pgd20"]
    table = pd.DataFrame(rows).reindex(columns=[*columns, "hz", "frobenius"])
    write_atomically(out, lambda file: table.to_csv(file, index=False))


if __name__ == "__main__":
    main()
