r"""Share of the raw gradient rate that an evaluation with PGD alone reaches, start-up and loading left out.

    python benchmarks/gradient_rate.py --data cifar10-lossless.npz

The gradients that the record counts, each as dear as in a bare loop of full batches in the search form,
over the seconds of `evaluate` on all images; preflight, the clean pass, float32 checks and the record are
the rest Beside it the share without preflight, whose cost does not grow with n. Medians of rounds; the
bare loop runs before and after each. Processor seconds of one thread, which other work on the machine
disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from robustbench_cure import evaluate, load_battery, load_dataset, load_model
from robustbench_cure.attacks.losses import odds_against
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.evaluation.evaluate import admit


def main() -> None:
    """A line for each network and step count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help=".npz file of CIFAR-10 images")
    parser.add_argument("--model", nargs="+", default=["resnet18s_pgd_at", "resnet18s_cure"])
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 100])
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset("npz", "test", options.data).subset(options.n)
    print("| network | steps | gradients | bare, s | whole, s | share | without preflight | robust |")
    print("|:---|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.model:
        classifier = load_model(name, device="cpu")
        for steps in options.steps:
            print(f"| {name} | {steps} " + cells(classifier, data, steps, options.rounds), flush=True)


def cells(classifier: Classifier, data: EvalSet, steps: int, rounds: int) -> str:
    """Of one network and step count."""
    strong = load_battery("strong")
    battery = strong.model_copy(update={"attacks": tuple(s for s in strong.attacks if s.id == f"pgd{steps}")})
    spent: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        before, start = seconds_a_gradient(classifier, data), time.process_time()
        flags = admit(classifier, battery, data)
        admitted = time.process_time()
        record = evaluate(classifier, battery, data, flags=flags)
        end = time.process_time()
        bare = (before + seconds_a_gradient(classifier, data)) / 2
        backwards = record.manifest.cost[f"pgd{steps}"].backwards
        spent.append((backwards * bare, end - start, end - admitted))
    bare, whole = (statistics.median(each[k] for each in spent) for k in (0, 1))
    share, later = (statistics.median(each[0] / each[k] for each in spent) for k in (1, 2))
    robust = int((record.samples[f"pgd{steps}.attacked"] & ~record.samples[f"pgd{steps}.broken"]).sum())
    return f"| {backwards:,} | {bare:.2f} | {whole:.2f} | {share:.0%} | {later:.0%} | {robust} |"


def seconds_a_gradient(classifier: Classifier, data: EvalSet, lasting: float = 0.8) -> float:
    """Median over full batches."""
    x, y = data.images[: classifier.batch_size], data.labels[: classifier.batch_size]
    loss, spent, until = partial(odds_against, labels=y), [], time.process_time() + lasting
    while time.process_time() < until:
        start = time.process_time()
        classifier.value_and_gradient(x, loss)
        spent.append((time.process_time() - start) / len(x))
    return statistics.median(spent)


if __name__ == "__main__":
    main()
