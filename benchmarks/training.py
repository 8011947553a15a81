"""Seconds a training step takes: CURE beside plain training and PGD(7) adversarial training, in one run.

The same network, batch, precision and optimiser; steps of all methods interleaved, the median counts.
The CURE paper (section 4) says that CURE is cheaper than adversarial training; the ratio is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from robustbench_cure.classifier import resolve_device
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import find
from robustbench_cure.protocol.recipes import CureRecipe, GammaPhase, PGDRecipe, StandardRecipe
from robustbench_cure.training.loop import Trainer
from robustbench_cure.training.monitor import SCALES
from robustbench_cure.zoo.loading import build_from_card


def main() -> None:
    """Time every method and print one row each."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    card = find(ModelCard, options.model).card
    methods = recipes(options)
    images = torch.rand(
        (options.batch_size * 2, *card.input_shape), generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(len(images)) % card.num_classes
    trainers = {}
    for name, recipe in methods.items():
        torch.manual_seed(0)
        model = build_from_card(card).to(device)
        trainers[name] = Trainer(
            model,
            recipe,
            images,
            labels,
            num_classes=card.num_classes,
            scale=SCALES[card.dataset],
            epochs=1000,
        )
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(options.steps + 1):
        for name, trainer in trainers.items():
            synchronise(device)
            started = time.perf_counter()
            trainer.step()
            synchronise(device)
            if turn:  # the first step of each warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"{options.model} on {device}, batch {options.batch_size}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, median of {options.steps} steps"
    )
    print(f"{'method':<34}{'s/step':>9}{'x plain':>9}{'x PGD-7':>9}")
    for name, median in medians.items():
        plain, adversarial = medians["plain, fp32"], medians["PGD(7) adversarial, fp32"]
        print(f"{name:<34}{median:9.3f}{median / plain:9.2f}{median / adversarial:9.2f}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet18s_normal", help="id of a model card: its network is used")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


def recipes(options: argparse.Namespace) -> dict[str, Any]:
    """The methods to time; h is constant, so that every step has its regulariser."""
    shared: dict[str, Any] = {
        "start": "",
        "epochs": 1000,
        "batch_size": options.batch_size,
        "optimizer": "sgd",
        "lr": 1e-3,
        "lr_final": 1e-3,
        "schedule": "constant",
        "weight_decay": 0.0,
        "augmentation": "crop-flip",
        "seed": 0,
    }
    curvature: dict[str, Any] = {
        "method": "cure",
        "gamma": (GammaPhase(epochs=1000, gamma=4.0),),
        "h": 1.5,
        "h_ramp_epochs": 0,
        "h_space": "norm",
        "reg_power": 2,
        "batchnorm": "eval",
    }
    attack = {"method": "pgd_at", "eps": "8/255", "step_size": "2/255", "steps": 7}
    out: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        out[f"plain, {precision}"] = StandardRecipe(**shared, method="standard", precision=precision)
        out[f"PGD(7) adversarial, {precision}"] = PGDRecipe(**shared, **attack, precision=precision)
        out[f"CURE, {precision}"] = CureRecipe(
            **shared, **curvature, precision=precision, regulariser_precision="fp32"
        )
    out["CURE, bf16, regulariser too"] = CureRecipe(
        **shared, **curvature, precision="bf16", regulariser_precision="bf16"
    )
    return out


def synchronise(device: torch.device) -> None:
    """Wait for what was started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
