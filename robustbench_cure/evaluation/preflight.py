"""Checks of a model before it is attacked: can its numbers mean anything?

What makes an evaluation meaningless is an error; what makes it unreliable is a flag of severity
`unreliable`, which the evaluation refuses unless told otherwise; what makes it doubtful is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from robustbench_cure.adapt import one_line
from robustbench_cure.attacks.losses import margin, odds_against
from robustbench_cure.attacks.precision import disagreement, typical_range
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.flags import Flag

#: Images looked at, and images evaluated one by one.
SAMPLE, ALONE = 64, 8
#: Length of a shift to points near an image, in each pixel, and what flags say of them.
NEAR, MOVED = 8 / 255, " moved by noise of 8/255"
#: Largest difference between two evaluations of one image, relative to the scale of the logits.
REPEAT_TOLERANCE = 1e-3


def preflight(classifier: Classifier, data: EvalSet) -> list[Flag]:
    """Look at the model's output and gradients on the first images, and near them.

    A model whose bfloat16 form differs from its float32 form falls back to float32.

    Args:
        classifier: the model to be evaluated.
        data: where its images come from.

    Returns:
        The flags raised, possibly none.

    Raises:
        UsageError: the model does not fit the data (input shape, number of classes), fails, or returns NaN.
    """
    first = data.take(range(min(SAMPLE, len(data))))
    x, y = first.images.to(classifier.device), first.labels.to(classifier.device)
    logits = first_pass(classifier, data)
    near = _near(x)
    with _one_line_errors(data, ", or near them"):
        beside = classifier.logits(near)
        points, labels = torch.cat((x, near)), torch.cat((y, y))
        found = [
            _one_output(classifier),
            _holes(beside),
            _extra(logits, data),
            _probabilities(logits),
            # Some networks answer properly on images as they are stored, and nowhere else.
            _repeatable(classifier, x, logits) or _repeatable(classifier, near, beside, MOVED),
            _no_gradient(classifier),
            *_gradients(classifier, points, labels, typical_range(logits)),
        ]
    return [flag for flag in found if flag]


def _near(x: Tensor) -> Tensor:
    """The images, each pixel moved by up to `NEAR`; shape of ``x``."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(x.shape, generator=generator, dtype=torch.float32).to(x.device)
    return (x + NEAR * (2 * noise - 1)).clamp(0, 1)


@contextmanager
def _one_line_errors(data: EvalSet, where: str = "") -> Iterator[None]:
    """What the user's own network raises, in one line.

    Raises:
        UsageError: it did.
    """
    try:
        yield
    except (torch.OutOfMemoryError, UsageError):
        raise
    except Exception as error:
        size = (min(SAMPLE, len(data)), *data.pixels.shape[1:])
        raise UsageError(
            f"the model failed on images of shape {size} of {data.name}{where}: {one_line(error)}"
        ) from error


def first_pass(classifier: Classifier, data: EvalSet) -> Tensor:
    """Logits of the first images, float32 (B, L), where model and data fit each other.

    Raises:
        UsageError: they do not (input shape, number of classes), or the model fails, returns something else
            than logits, or NaN.
    """
    x = data.take(range(min(SAMPLE, len(data)))).images.to(classifier.device)
    if tuple(x.shape[1:]) != tuple(classifier.input_shape):
        raise UsageError(
            f"the model takes images of shape {classifier.input_shape}, {data.name} has {tuple(x.shape[1:])}"
        )
    with _one_line_errors(data):
        logits = classifier.logits(x)
    if tuple(logits.shape) in ((len(x),), (len(x), 1)):
        raise UsageError(
            f"the model returns one number for each image, which can tell two classes apart; {data.name} has "
            f"{len(data.classes)}"
        )
    if logits.dim() != 2 or len(logits) != len(x):
        raise UsageError(f"the model must return logits of shape (B, classes), got {tuple(logits.shape)}")
    classes = logits.shape[1]
    # An archive knows only the labels that occur in it.
    enough = classes >= len(data.classes) if data.name.startswith("npz") else classes == len(data.classes)
    if not enough:
        raise UsageError(f"the model has {classes} outputs, {data.name} has {len(data.classes)} classes")
    if not bool(logits.isfinite().all()):
        bad = int((~logits.isfinite()).any(1).sum())
        raise UsageError(
            f"the model returns NaN or infinite logits for {bad} of {len(x)} images of {data.name}"
        )
    return logits


def _holes(logits: Tensor) -> Flag | None:
    bad = int((~logits.isfinite()).any(1).sum())
    if not bad:
        return None
    evidence = f"NaN or infinite logits for {bad} of {len(logits)} images{MOVED}"
    return Flag(kind="non_finite_nearby", evidence=evidence, value=bad, threshold=0)


def _one_output(classifier: Classifier) -> Flag | None:
    if not classifier.one_output:
        return None
    return Flag(kind="one_output", evidence=f"one output, read as the {classifier.one_output}")


def _no_gradient(classifier: Classifier) -> Flag | None:
    return Flag(kind="no_gradient", evidence=classifier.no_gradient) if classifier.no_gradient else None


def _extra(logits: Tensor, data: EvalSet) -> Flag | None:
    outputs, classes = logits.shape[1], len(data.classes)
    if outputs > classes:
        return Flag(kind="extra_outputs", evidence=f"{outputs:,} outputs, {classes} classes in {data.name}")
    return None


def _probabilities(logits: Tensor) -> Flag | None:
    inside = bool((logits >= -1e-6).all()) and bool((logits <= 1 + 1e-6).all())
    if inside and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
        return Flag(kind="probabilities", evidence=f"all {len(logits)} rows lie in [0, 1] and sum to 1")
    return None


def _repeatable(classifier: Classifier, x: Tensor, logits: Tensor, where: str = "") -> Flag | None:
    logits = logits.nan_to_num()  # what is not finite near an image is told by the run
    scale = float(logits.abs().amax().clamp_min(1e-3))
    again = float((classifier.logits(x).nan_to_num() - logits).abs().amax()) / scale
    if again > REPEAT_TOLERANCE:
        return Flag(
            kind="stochastic",
            evidence=f"logits of the same images{where} differ by {again:.1%} of their scale "
            "between two passes",
            value=again,
            threshold=REPEAT_TOLERANCE,
        )
    alone = torch.cat([classifier.logits(image[None]) for image in x[:ALONE]]).nan_to_num()
    apart = float((alone - logits[: len(alone)]).abs().amax()) / scale
    if apart > REPEAT_TOLERANCE:
        return Flag(
            kind="batch_dependent",
            evidence=f"logits of images{where} alone and in a batch of {len(x)} differ by {apart:.1%} of "
            "their scale",
            value=apart,
            threshold=REPEAT_TOLERANCE,
        )
    return None


def _gradients(classifier: Classifier, x: Tensor, y: Tensor, scale: float) -> list[Flag | None]:
    """Flags of the gradients at images, the first half, and near them.

    Both tests look at those of cross-entropy in the reference form, which are computed once.
    """
    parts = []
    for rows in torch.split(torch.arange(len(x), device=x.device), classifier.batch_size):
        labels = y[rows]

        def losses(logits: Tensor, labels: Tensor = labels) -> list[Tensor]:
            return [odds_against(logits, labels), margin(logits, labels)]

        parts.append(classifier.value_and_gradients(x[rows], losses, 2, reference=True))
    logits, gradients = (torch.cat(each) for each in zip(*parts, strict=True))
    zero = (gradients.flatten(2) == 0).all(2)
    at, beside = torch.split(zero, len(x) // 2)
    return [
        _zero_gradients(at) or _zero_gradients(beside, MOVED),
        _search_precision(classifier, x, y, scale, (logits, gradients[:, 0])),
    ]


def _zero_gradients(zero: Tensor, where: str = "") -> Flag | None:
    """Of images whose gradient of cross-entropy, of the margin, is zero; bool (B, 2)."""
    counts = dict(zip(("cross-entropy", "margin"), zero.sum(0).tolist(), strict=True))
    worst = max(counts.values()) / len(zero)
    if worst == 0:
        return None
    parts = ", ".join(f"{count} of {len(zero)} images ({name})" for name, count in counts.items())
    return Flag(
        kind="zero_gradient", evidence=f"gradient exactly zero for {parts}{where}", value=worst, threshold=0.0
    )


def _search_precision(
    classifier: Classifier, x: Tensor, y: Tensor, scale: float, exact: tuple[Tensor, Tensor]
) -> Flag | None:
    try:
        reason = disagreement(classifier, x, y, scale, exact)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's own code, which ran in float32
        reason = f"the model fails in bfloat16: {one_line(error)}"
    if reason:
        classifier.fall_back(reason)
    return Flag(kind="search_in_fp32", evidence=classifier.fallback) if classifier.fallback else None
