"""`cure-bench universal`: one perturbation for all images, and what it does to others.

Source: thesis, chapter 4, Tables 4.1 and 4.2, Figs. 4.7 and 4.9, see `geometry.universal`. Half of the images
are for the search, the other half for the rates. Compare "fooled" with "random": noise of the same length.

The graph of labels (thesis, section 4.3, Fig. 4.7) has a vertex for each label and an edge from i to j if
most fooled images of label i become j. The thesis finds few components, and a few dominant labels that many
edges lead to. Deviation: "most" is the plurality, the label that more of them become than any other, the
first of equals.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry.universal import (
    DRAWS,
    Method,
    Universal,
    baselines,
    fooled,
    labels_with,
    universal,
)
from robustbench_cure.protocol.defaults import defaults_of
from robustbench_cure.protocol.request import Request
from robustbench_cure.stats import Rate
from robustbench_cure.studies import plots
from robustbench_cure.studies.engine import Columns, ModelRow, Shown, Study, counter, open_study, paragraphs
from robustbench_cure.studies.plots import Values
from robustbench_cure.threat import Norm, ThreatModel, format_eps

#: Length in l2, as a share of the images' mean length: the thesis' 2,000 of about 50,000.
L2_SHARE = 0.04
#: Lengths at which perturbations are compared, in units of the largest length of the universal one.
LENGTHS = np.linspace(0, 2, 11)
#: Held-out images on the page.
PICTURES = 6

LEAD = paragraphs("""
One perturbation added to every image, computed on half of the images (by DeepFool on one after the other, or
by the gradient of batches; kept short) and evaluated on the other half, on both with the sum cut to [0, 1]:
what counts is an image. "Sought" and "fooled" are the shares of images, in per cent, whose predicted label
changes on the one and on the other; "random" is that of noise of the largest length allowed, on average over
several vectors.

The thesis finds such perturbations for all networks it looks at; they carry over to other networks, and most
images end at the same few labels. Below the pictures: for how many labels some images change, which labels
most of the images of each become, and how many parts the graph of these changes has. What is counted is the
change of the prediction, right or wrong: robust accuracy is another number.
""")


@dataclass(frozen=True)
class Settings:
    """Options of the verb.

    Attributes:
        norm: of the perturbation.
        xi: its largest length, pixels in [0, 1]; None: that of the data set.
        method: the thesis' algorithm, or ascent on batches.
        delta: share of the images that may keep their label during the search.
        passes: over the images, at most.
    """

    norm: Norm = "linf"
    xi: Fraction | None = None
    method: Method = "deepfool"
    delta: float = 0.2
    passes: int = 10


@dataclass(frozen=True)
class _HeldOut:
    """Images that the search did not see, and the labels that each model predicts for them."""

    data: EvalSet
    clean: dict[str, Tensor]


def run(request: Request, settings: Settings) -> pd.DataFrame:
    """Load what a request names and measure it; see `measure`."""
    return measure(open_study("universal", request, default_n=1000, precision=None), settings)


def measure(study: Study, settings: Settings) -> pd.DataFrame:
    """Universal perturbations of all models, each rated on all of them; one row a model.

    An interrupted run is continued, pass by pass.

    Raises:
        UsageError: fewer than four images.
    """
    if len(study.data) < 4:
        raise UsageError(f"--n {len(study.data)}: a universal perturbation needs at least 4 images")
    threat = ThreatModel(settings.norm, settings.xi or default_length(study, settings.norm))
    half = len(study.data) // 2
    first, test = study.data.take(range(half)), study.data.take(range(half, len(study.data)))
    perturbations = {name: _search(study, name, first, threat, settings) for name in study.models}
    zero = torch.zeros(test.images.shape[1:])
    held_out = _HeldOut(
        test, {name: labels_with(model, test.images, zero) for name, model in study.models.items()}
    )
    curves, changes = {}, {}
    for name, classifier in study.models.items():
        v, clean = perturbations[name].v, held_out.clean[name]
        others = baselines(classifier, first.images, norm=settings.norm, seed=study.seed)
        curves[name] = by_length(classifier, test.images, clean, threat, {"universal": v[None], **others})
        changes[name] = label_changes(clean, labels_with(classifier, test.images, v), test.classes)
    table = pd.DataFrame(
        [
            _row(name, perturbations[name], curves[name], changes[name], half, len(test))
            for name in study.models
        ]
    )
    study.tables("universal-lengths", curves)
    study.tables("universal-labels", changes)
    study.archive("universal", {name: state.v.numpy() for name, state in perturbations.items()})
    figures = [
        _draw_pictures(study, perturbations, held_out, changes),
        _draw_lengths(study, threat, curves),
    ]
    if len(study.models) > 1:
        figures.append(_draw_transfer(study, perturbations, held_out))
    study.present(
        table,
        COLUMNS,
        title="Universal perturbations",
        lead=LEAD,
        figures=figures,
        settings={
            "norm": settings.norm,
            "xi": format_eps(threat.eps),
            "method": settings.method,
            "delta": settings.delta,
            "passes": settings.passes,
            "sought_on": f"{half} images, cut to [0, 1]",
            "judged_on": f"{len(test)} others, cut to [0, 1]",
            "random": f"mean of {DRAWS} vectors",
        },
    )
    return table


def default_length(study: Study, norm: Norm) -> Fraction:
    """The largest length where none is given: that of the data set, or a share of the images' lengths."""
    if norm == "linf":
        return defaults_of(study.dataset).universal_length
    return Fraction(f"{L2_SHARE * float(study.images.flatten(1).norm(dim=1).mean()):.2f}")


def _search(study: Study, name: str, images: EvalSet, threat: ThreatModel, settings: Settings) -> Universal:
    """The perturbation of one model, from where an interrupted run left it."""
    cache = study.cache(
        name,
        threat=threat,
        method=settings.method,
        delta=settings.delta,
        passes=settings.passes,
        seed=study.seed,
        images="cut to the box",
    )
    known = None
    if cache.rows:
        v, last = (torch.from_numpy(cache.rows[key]) for key in ("v", "last"))
        known = Universal(v, last, tuple(cache.rows["fooled"].tolist()))
    with counter(name, "images", settings.passes * len(images)) as advance:
        advance.done = (known.passes if known else 0) * len(images)

        def count(n: int) -> None:
            advance.doing = f"pass {-(-(advance.done + n) // len(images))}"
            advance(n)

        return universal(
            study.models[name],
            images.images,
            threat=threat,
            method=settings.method,
            delta=settings.delta,
            passes=settings.passes,
            seed=study.seed,
            known=known,
            checkpoint=lambda s: cache.write(
                {"v": s.v.numpy(), "last": s.last.numpy(), "fooled": np.array(s.fooled)}
            ),
            advance=count,
        )


# --- tables ----------------------------------------------------------------------------------------------


def by_length(
    classifier: Classifier, x: Tensor, clean: Tensor, threat: ThreatModel, directions: dict[str, Tensor]
) -> pd.DataFrame:
    """Shares of fooled images for every direction at every length of `LENGTHS`; mean and largest of draws.

    Args:
        classifier: the model.
        x: images, float32 (B,C,H,W) in [0, 1].
        clean: labels predicted for them, int64 (B,).
        threat: norm and radius that lengths are given in.
        directions: as those of `baselines`; a zero one is added as it is.
    """
    rows = []
    for name, draws in directions.items():
        sizes = threat.distance(torch.zeros_like(draws), draws).clamp_min(1e-30).view(-1, 1, 1, 1)
        for radii in LENGTHS:
            length = radii * threat.radius
            shares = [float(fooled(classifier, x, clean, v).double().mean()) for v in draws / sizes * length]
            rows.append(
                {
                    "perturbation": name,
                    "radii": radii,
                    "length": length,
                    "fooled": float(np.mean(shares)),
                    "most": max(shares),
                    "draws": len(shares),
                }
            )
    return pd.DataFrame(rows)


def label_changes(before: Tensor, after: Tensor, classes: tuple[str, ...]) -> pd.DataFrame:
    """One row for each change of label that occurs: before, after, count; and images with the label before.

    Args:
        before: labels, int64 (B,).
        after: labels, int64 (B,).
        classes: their names.
    """
    images = Counter(before.tolist())
    counted = Counter((i, j) for i, j in zip(before.tolist(), after.tolist(), strict=True) if i != j)
    rows = [(classes[i], classes[j], n, images[i]) for (i, j), n in sorted(counted.items())]
    return pd.DataFrame(rows, columns=["before", "after", "count", "images"])


def label_graph(changes: pd.DataFrame) -> dict[str, str]:
    """Edges: for each label that is left, the one that most of its fooled images become.

    Args:
        changes: as those of `label_changes`.
    """
    edges: dict[str, str] = {}
    for row in changes.sort_values("count", ascending=False, kind="stable").itertuples():
        edges.setdefault(str(row.before), str(row.after))
    return edges


def components(graph: dict[str, str]) -> list[set[str]]:
    """Sets of labels that edges connect, in either direction."""
    out: list[set[str]] = []
    for edge in graph.items():
        touching = [part for part in out if part & set(edge)]
        out = [part for part in out if part not in touching] + [set(edge).union(*touching)]
    return out


def describe(changes: pd.DataFrame) -> str:
    """The graph in words: labels with fooled images, those that most edges lead to, and its components."""
    graph = label_graph(changes)
    if not graph:
        return "no image is fooled"
    dominant = Counter(graph.values()).most_common(2)
    to = ", ".join(f"{label} (of {count})" for label, count in dominant)
    return f"images of {len(graph)} labels are fooled, most become {to}; components: {len(components(graph))}"


def _row(
    name: str, state: Universal, curve: pd.DataFrame, changes: pd.DataFrame, searched: int, n: int
) -> dict[str, Any]:
    """Rates of one perturbation on the ``n`` held-out images, on its own model."""
    rate = Rate(int(changes["count"].sum()), n)
    label, share = _most_frequent(changes)
    noise = curve[(curve["perturbation"] == "random") & (curve["radii"] == 1)].iloc[0]
    low, high = rate.interval
    return {
        "model": name,
        "passes": state.passes,
        "l2": float(state.v.norm()),
        "linf": float(state.v.abs().max()),
        "fooled_sought": max(state.fooled),
        "n_sought": searched,
        "fooled": rate.value,
        "n": rate.total,
        "ci_low": low,
        "ci_high": high,
        "random": float(noise["fooled"]),
        "most_frequent_label": label,
        "share_of_it": share,
        "random_most": float(noise["most"]),
        "random_draws": int(noise["draws"]),
    }


def _most_frequent(changes: pd.DataFrame) -> tuple[str, float]:
    """The label that most fooled images become, and its share of them; nothing of none."""
    if changes.empty:
        return "", 0.0
    counts = changes.groupby("after", sort=False)["count"].sum()
    return str(counts.idxmax()), float(counts.max() / counts.sum())


def _label(row: ModelRow) -> str:
    label = row["most_frequent_label"]
    return f"{label} ({100 * row['share_of_it']:.0f} %)" if label else "-"


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "passes": lambda row: str(row["passes"]),
    "l2": lambda row: f"{row['l2']:.2f}",
    "sought": lambda row: f"{100 * row['fooled_sought']:.1f}",
    "fooled": lambda row: f"{100 * row['fooled']:.1f}",
    "95 %": lambda row: f"{100 * row['ci_low']:.1f}-{100 * row['ci_high']:.1f}",
    "random": lambda row: f"{100 * row['random']:.1f}",
    "most often becomes": _label,
}


# --- figures ---------------------------------------------------------------------------------------------


def _draw_lengths(study: Study, threat: ThreatModel, curves: dict[str, pd.DataFrame]) -> Shown:
    """Shares of fooled images by length, one panel a model (thesis, Fig. 4.9)."""
    unit, label = (255, "l∞ length, grey levels") if threat.norm == "linf" else (1, "l2 length, pixels")
    series = {
        name: {
            str(key): (unit * part["length"].to_numpy(), 100 * part["fooled"].to_numpy())
            for key, part in curve.groupby("perturbation", sort=False)
        }
        for name, curve in curves.items()
    }
    return study.figure(
        "universal-lengths",
        plots.panels(series, xlabel=label, ylabel="fooled (%)"),
        "Fooled images by length",
        f"Held-out images, by the length of what is added; random: the mean of {DRAWS} vectors.",
    )


def _draw_pictures(
    study: Study,
    perturbations: dict[str, Universal],
    held_out: _HeldOut,
    changes: dict[str, pd.DataFrame],
) -> Shown:
    """The perturbations stretched to all grey levels, and images with them added."""
    few = held_out.data.take(range(min(PICTURES, len(held_out.data))))
    classes = few.classes
    blank = np.ones((1, *few.images.shape[1:]), np.float32)
    first = np.concatenate([blank, few.images.numpy()])
    rows: list[tuple[str, NDArray[np.float32], list[str]]] = [("image", first, [""] * (1 + len(few)))]
    for name, classifier in study.models.items():
        v = perturbations[name].v
        before, after = held_out.clean[name][: len(few)], labels_with(classifier, few.images, v)
        captions = [
            f"{classes[a]} \u2192 {classes[b]}" for a, b in zip(before.tolist(), after.tolist(), strict=True)
        ]
        images = np.concatenate([plots.stretched(v[None]), (few.images + v).clamp(0, 1).numpy()])
        rows.append((name, images, [f"l\u221e {float(v.abs().max()) * 255:.0f}/255", *captions]))
    titles = ["perturbation", *(classes[k] for k in few.labels.tolist())]
    return study.figure(
        "universal",
        plots.gallery(rows, titles),
        "Universal perturbations and images with them",
        "Above: true labels of held-out images. Below: label before and after. Perturbations are stretched. "
        "Where labels go: " + "; ".join(f"{name}: {describe(part)}" for name, part in changes.items()) + ".",
    )


def _draw_transfer(study: Study, perturbations: dict[str, Universal], held_out: _HeldOut) -> Shown:
    """Every perturbation on every model (thesis, Table 4.2)."""
    names, x = list(study.models), held_out.data.images
    shares = np.array(
        [
            [
                float(fooled(classifier, x, held_out.clean[on], perturbations[of].v).double().mean())
                for on, classifier in study.models.items()
            ]
            for of in names
        ]
    )
    rows = pd.DataFrame(shares, columns=names)
    rows.insert(0, "sought_on", names)
    study.table("universal-transfer", rows)
    return study.figure(
        "universal-transfer",
        _matrix(100 * shares, names),
        "Every perturbation on every model",
        "Per cent of held-out images that are fooled.",
    )


def _matrix(values: Values, names: list[str]) -> Figure:
    """A square of per cents (k, k), each written in its field, the models of the search downward."""
    with plots.style():
        side = 1.6 + 0.75 * len(names)
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.subplots()
        axes.imshow(values, cmap="Blues", vmin=0, vmax=100)
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                ink = "white" if value > 60 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel("added to the images of")
        axes.set_ylabel("sought on")
        return figure
