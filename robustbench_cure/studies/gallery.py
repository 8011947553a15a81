"""`cure-bench gallery`: images with the smallest perturbations that change their labels.

Source: CURE paper, figure 11. Perturbations are DeepFool's (l2, cut to the box), stretched to all grey levels
so that their structure shows; their sizes stand below them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.geometry.subspaces import L2
from robustbench_cure.protocol.request import Request
from robustbench_cure.studies import plots
from robustbench_cure.studies.engine import Columns, Study, open_study, paragraphs

LEAD = paragraphs("""
The smallest perturbation DeepFool finds for each image and network (l2, in pixels), and the image with
it added. Perturbations are stretched to the full range of grey levels, so that their size shows in the
numbers alone. The CURE paper finds them to look like objects, not noise, for robust networks.
""")


@dataclass(frozen=True)
class Settings:
    """The verb has no options of its own."""


def run(request: Request, settings: Settings) -> pd.DataFrame:
    """Load what a request names and draw it; see `measure`."""
    return measure(open_study("gallery", request, default_n=6), settings)


def measure(study: Study, settings: Settings) -> pd.DataFrame:  # noqa: ARG001 - the same for every study
    """Images, their smallest perturbations and the sums; a table with one row an image and model."""
    classes, images = study.data.classes, study.images.numpy()
    labels = [classes[k] for k in study.labels.tolist()]
    pictures: list[tuple[str, NDArray[np.float32], list[str]]] = [("image", images, [""] * len(images))]
    tables, arrays = {}, {"images": images}
    for name, classifier in study.models.items():
        x = study.images.to(classifier.device)
        before = classifier.logits(x).argmax(1)
        x_adv = deepfool(classifier, x, before, threat=L2, mode="minimal", clip=True).x_adv
        after = classifier.logits(x_adv).argmax(1)
        r = (x_adv - x).cpu()
        length, largest = r.flatten(1).norm(dim=1), r.flatten(1).abs().amax(1).clamp_min(1e-12)
        table = study.samples(
            name,
            {
                "label": labels,
                "before": [classes[k] for k in before.tolist()],
                "after": [classes[k] for k in after.tolist()],
                "l2": length.numpy(),
                "linf": largest.numpy(),
                "changed": (after != before).cpu().numpy(),
            },
        )
        changes = [f"{a} \u2192 {b}" for a, b in zip(table["before"], table["after"], strict=True)]
        pictures.append((name, x_adv.cpu().clamp(0, 1).numpy(), changes))
        pictures.append(("perturbation", plots.stretched(r), [f"l2 {v:.2f}" for v in length.tolist()]))
        arrays[name] = x_adv.cpu().numpy()
        tables[name] = table
    everything = pd.concat(tables.values(), ignore_index=True)
    study.table("gallery", everything)
    study.archive("gallery", arrays)
    study.present(
        [
            {"model": name, "of": len(table), "changed": table[table["changed"]]}
            for name, table in tables.items()
        ],
        COLUMNS,
        title="Smallest perturbations",
        lead=LEAD,
        figures=[
            study.figure(
                "gallery",
                plots.gallery(pictures, labels),
                "Images and perturbations",
                "Above: true labels. Below: before and after.",
            )
        ],
        settings={"attack": "DeepFool, l2, to the nearest boundary"},
    )
    return everything


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "changed": lambda row: f"{len(row['changed'])}/{row['of']}",
    "median l2": lambda row: f"{row['changed']['l2'].median():.3f}",
    "median l∞": lambda row: f"{row['changed']['linf'].median():.3f}",
}
