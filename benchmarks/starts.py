r"""PGD from many random starts, here and in torchattacks: images that stand, mean and standard error.

    python benchmarks/starts.py --model resnet18s_pgd_at --model resnet18s_cure --data cifar10-lossless.npz

One run of PGD is off by an image or two for its start alone. This tells luck from weakness.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import torch
import torchattacks

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks import Noise, pgd
from robustbench_cure.attacks.losses import margins
from robustbench_cure.threat import ThreatModel


def main() -> None:
    """A line of the table for each network and number of steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, help="id of a model card; repeatable")
    parser.add_argument("--data", type=Path, required=True, help=".npz file of images")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--steps", type=int, nargs="+", default=[7, 10, 20])
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of our search")
    options = parser.parse_args()
    threat = ThreatModel.parse("linf", "8/255")
    print("| images that stand | here | torchattacks |\n|:---|---:|---:|", flush=True)
    for name in options.model:
        classifier = load_model(name, device="cpu", precision=options.precision)
        data = load_dataset("npz", "test", options.data).subset(options.n)
        right = margins(classifier.logits(data.images), data.labels) >= 0
        x, y = data.images[right], data.labels[right]
        for steps in options.steps:
            standing: dict[str, list[int]] = {"here": [], "torchattacks": []}
            for start in range(options.starts):
                noise = Noise.for_rows(len(x), seed=start)
                candidates = pgd(classifier, x, y, threat=threat, noise=noise, steps=steps, step_size=2 / 255)
                torch.manual_seed(start)
                peer = torchattacks.PGD(classifier.module, eps=threat.radius, alpha=2 / 255, steps=steps)
                for who, x_adv in (("here", candidates.x_adv), ("torchattacks", peer(x, y))):
                    standing[who].append(int((margins(classifier.logits(x_adv), y) >= 0).sum()))
            cells = " | ".join(told(counts) for counts in standing.values())
            print(f"| {name}, PGD({steps}), of {len(x)} | {cells} |", flush=True)


def told(counts: list[int]) -> str:
    """Mean and its standard error."""
    error = statistics.stdev(counts) / math.sqrt(len(counts))
    return f"{statistics.mean(counts):.1f} ± {error:.1f}"


if __name__ == "__main__":
    main()
