r"""When bounded DeepFool may give a row up: images that still stand, and seconds, by PATIENCE.

    python benchmarks/deepfool.py --data cifar10-lossless.npz

The left column never gives a row up and linearises all candidates at every step: what the others leave
standing beyond it is what giving up costs. On adversarially trained digits 6 is as good as that, 5 and
less are not.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks.losses import margins
from robustbench_cure.threat import ThreatModel

deepfool = importlib.import_module("robustbench_cure.attacks.deepfool")

STEPS = 50
PATIENCES = (STEPS, 8, 6, 5, 4, 3)
DIGITS = ("digits_pgd_at", "digits_cure", "digits_deepfool")
SHIPPED = {name: getattr(deepfool, name) for name in ("REACH", "REACH_STALLED", "CONTENDERS")}
SMALL = ("resnet18s_pgd_at", "resnet18s_cure", "resnet18s_deepfool", "resnet18s_normal")


def main() -> None:
    """A line of the table for each network and radius."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help=".npz file of CIFAR-10 images")
    parser.add_argument("--n", type=int, default=512)
    options = parser.parse_args()
    print("| standing (seconds) |" + "".join(f" {patience} |" for patience in PATIENCES))
    print("|:---|" + "---:|" * len(PATIENCES))
    for name in DIGITS + SMALL:
        small = name in SMALL
        data = load_dataset("npz", "test", options.data) if small else load_dataset("digits")
        data = data.subset(min(options.n, len(data)))
        for eps in ("4/255", "8/255") if small else ("25/255", "51/255"):
            cells = [cell(name, data.images, data.labels, eps, patience) for patience in PATIENCES]
            print(f"| {name}, {eps} |" + "".join(f" {each} |" for each in cells), flush=True)


def cell(name: str, images, labels, eps: str, patience: int) -> str:  # type: ignore[no-untyped-def]
    """Correctly classified images that stand, and the seconds it took."""
    classifier = load_model(name, device="cpu")
    right = margins(classifier.logits(images), labels) >= 0
    deepfool.PATIENCE = patience
    if patience == STEPS:
        chosen = {"REACH": 0.0, "REACH_STALLED": 0.0, "CONTENDERS": classifier.num_classes}
    else:
        chosen = SHIPPED
    for setting, value in chosen.items():
        setattr(deepfool, setting, value)
    start = time.perf_counter()
    candidates = deepfool.deepfool(
        classifier, images[right], labels[right], threat=ThreatModel.parse("linf", eps), mode="bounded",
        steps=STEPS,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return f"{int((~candidates.converged).sum())} ({seconds:.1f})"


if __name__ == "__main__":
    main()
