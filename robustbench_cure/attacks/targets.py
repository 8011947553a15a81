"""Which classes a targeted attack aims at, and in which order.

``logits``: by the logit at the image, descending (Croce & Hein 2020, arXiv 2003.01690: AutoAttack's targets).
``distance``: by the distance of the linearised boundary, |z_y - z_k| / ||grad (z_k - z_y)||_q, q dual to the
norm of the ball, ascending (MALT, Melamed, Yehudai & Shamir 2024, arXiv 2407.02240): a class of lower logit
may have the nearer boundary.

Deviation. Distances are computed for the `CANDIDATES` largest other logits alone, or for as many as targets
are asked for: each class costs a backward pass.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from robustbench_cure.classifier import Classifier
from robustbench_cure.threat import ThreatModel

#: By what targets are ranked.
Order: TypeAlias = Literal["logits", "distance"]
#: Classes at most, other than the label, whose distances are compared.
CANDIDATES = 20


def ranked_targets(
    classifier: Classifier, x: Tensor, y: Tensor, threat: ThreatModel, count: int, order: Order
) -> tuple[Tensor, int, int]:
    """The best ``count`` target classes of each row, best first.

    Args:
        classifier: the model under attack.
        x: images, float32 (B,C,H,W).
        y: labels, int64 (B,); never among the targets.
        threat: its norm decides distances.
        count: targets, between 1 and the number of classes less one.
        order: ``logits`` or ``distance``, see the module; other names are ``KeyError``.

    Returns:
        Classes, int64 (B, count); forward and backward passes of each row.
    """
    others = {"logits": count, "distance": min(max(count, CANDIDATES), classifier.num_classes - 1)}[order]
    ranked = torch.zeros((len(x), count), dtype=torch.int64, device=x.device)
    passes = 1 if order == "logits" else 2
    for rows in torch.split(torch.arange(len(x), device=x.device), classifier.batch_size):
        logits = classifier.logits(x[rows])
        classes = logits.scatter(1, y[rows, None], -torch.inf).topk(others, dim=1).indices
        if order == "distance":
            _, slopes = classifier.value_and_jacobian(x[rows], y[rows], classes)
            flat = slopes.flatten(2)
            dual = flat.abs().sum(2) if threat.norm == "linf" else flat.norm(dim=2)
            gaps = (logits.gather(1, y[rows, None]) - logits.gather(1, classes)).abs()
            nearest = (gaps / dual).nan_to_num(torch.inf).argsort(stable=True, dim=1)  # flat: out of reach
            classes = classes.gather(1, nearest)
        ranked[rows] = classes[:, :count]
    return ranked, passes, others if order == "distance" else 0
