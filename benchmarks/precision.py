"""Does a search in bfloat16 leave samples standing that one in float32 breaks, beyond what a seed does?

Attacks of the digits and the white-box battery, each with several seeds in both precisions, on the networks
of the package. For each attack two counts, averaged over the seeds:

    reduced    samples that stand in bfloat16 and that float32 breaks from the same seed
    reseeded   samples that stand in float32 with the next seed and that float32 breaks with this one

Where ``reduced`` is not larger than ``reseeded``, reduced precision costs no more than luck. DeepFool draws
nothing: its second count is zero. The error is two standard errors of the difference over the seeds.

    python benchmarks/precision.py --data cifar10-lossless.npz --out benchmarks/measured/precision.csv
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks import Noise
from robustbench_cure.attacks.losses import misclassified
from robustbench_cure.classifier import Classifier
from robustbench_cure.evaluation.registry import ATTACKS
from robustbench_cure.threat import ThreatModel

DIGITS = ("digits_normal", "digits_deepfool", "digits_pgd_at", "digits_cure")
CIFAR10 = ("resnet18s_normal", "resnet18s_deepfool", "resnet18s_pgd_at", "resnet18s_cure")


def attacks(radius: float) -> dict[str, tuple[str, dict[str, object]]]:
    """Name -> kind and parameters."""
    pgd = {"step_size": radius / 4}
    return {
        "PGD(20)": ("pgd", pgd | {"steps": 20}),
        "PGD(20) margin": ("pgd", pgd | {"steps": 20, "loss": "margin"}),
        "DeepFool": ("deepfool", {"mode": "bounded"}),
        "SPSA": ("spsa", {"steps": 20, "samples": 32, "step_size": radius / 5}),
    }


def standing(
    classifier: Classifier, x: Tensor, y: Tensor, threat: ThreatModel, seed: int
) -> dict[str, Tensor]:
    """Attack -> which samples it leaves standing, bool (B,); judged in float32."""
    found = {}
    for name, (kind, options) in attacks(threat.radius).items():
        noise = Noise.for_rows(len(x), seed)
        x_adv = ATTACKS[kind](classifier, x, y, threat=threat, noise=noise, **options).x_adv
        found[name] = ~misclassified(classifier.logits(x_adv), y)
    return found


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="CIFAR-10 archive for the ResNets."
)
@click.option("--n", default=200, show_default=True, help="Digits; of CIFAR-10 a quarter as many.")
@click.option("--seeds", default=6, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path | None, n: int, seeds: int, out: Path) -> None:
    """Compare the two precisions."""
    rows = []
    for name in DIGITS + (CIFAR10 if data else ()):
        digits = name in DIGITS
        images = (load_dataset("digits") if digits else load_dataset("npz", "test", data)).subset(
            n if digits else n // 4
        )
        threat = ThreatModel("linf", "51/255" if digits else "8/255")
        both = {p: load_model(name, precision=p) for p in ("bf16", "fp32")}
        right = ~misclassified(both["fp32"].logits(images.images), images.labels)
        x, y = images.images[right], images.labels[right]
        sets = {
            p: [standing(model, x, y, threat, seed) for seed in range(seeds)] for p, model in both.items()
        }
        for attack in sets["fp32"][0]:
            reduced, exact = (
                torch.stack([found[attack] for found in sets[p]]).numpy() for p in ("bf16", "fp32")
            )
            lost = (reduced & ~exact).sum(1)
            luck = (np.roll(exact, -1, axis=0) & ~exact).sum(1)
            error = 2 * (lost - luck).std(ddof=1) / seeds**0.5 if seeds > 1 else float("nan")
            rows.append(
                {
                    "model": name,
                    "attack": attack,
                    "n": len(x),
                    "standing bf16": reduced.sum(1).mean(),
                    "standing fp32": exact.sum(1).mean(),
                    "reduced": lost.mean(),
                    "reseeded": luck.mean(),
                    "error": error,
                }
            )
            click.echo(" ".join(f"{key} {value}" for key, value in rows[-1].items()), err=True)
    pd.DataFrame(rows).to_csv(out, index=False, float_format="%.2f")


if __name__ == "__main__":
    main()
