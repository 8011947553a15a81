"""`cure-bench universal`: one perturbation for all images, for any models, and what it does to others."""

from __future__ import annotations

import io
from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.files import Kept
from robustbench_cure.geometry import prose
from robustbench_cure.geometry.baselines import DRAWS, baselines, by_length
from robustbench_cure.geometry.label_graph import moves, sentence
from robustbench_cure.geometry.universal import Method, Universal, fooled, labels_with, universal
from robustbench_cure.progress import ProgressLine
from robustbench_cure.stats import Rate
from robustbench_cure.studies import plots as figures
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.page import Shown, present
from robustbench_cure.threat import Norm, ThreatModel, format_eps

#: Radii by data set, l-infinity: the thesis' 10 grey levels; on digits that of its table.
RADII = {"digits": "51/255"}
RADIUS = "10/255"
#: Radius in l2, as a share of the images' mean length: the thesis' 2,000 of about 50,000.
SHARE = 0.04
#: Held-out images on the page.
SHOWN = 6


def radius_of(study: Study, norm: Norm) -> str:
    """The radius where none is given."""
    if norm == "linf":
        return RADII.get(study.dataset, RADIUS)
    return f"{SHARE * float(study.images.flatten(1).norm(dim=1).mean()):.2f}"


def universal_perturbations(
    study: Study, *, norm: Norm, xi: str | None, method: Method, delta: float, passes: int
) -> pd.DataFrame:
    """Universal perturbations of all models (thesis, chapter 4), each judged on all of them; the table.

    Half of the images are for seeking, the other half for judging.

    Args:
        study: models, images, folder, seed.
        norm: of the perturbation.
        xi: its largest length; None: that of the data set.
        method: how it is sought.
        delta: share of the images that may keep their label while it is sought.
        passes: over the images, at most.

    What an interrupted run finished is taken over, pass by pass.

    Raises:
        UsageError: fewer than four images.
    """
    if len(study.data) < 4:
        raise UsageError(f"--n {len(study.data)}: a universal perturbation needs at least 4 images")
    threat = ThreatModel.parse(norm, xi or radius_of(study, norm))
    half = len(study.data) // 2
    seek, test = study.data.take(range(half)), study.data.take(range(half, len(study.data)))
    found = {name: _seek(study, name, seek, threat, method, delta, passes) for name in study.models}
    zero = torch.zeros(test.images.shape[1:])
    clean = {name: labels_with(classifier, test.images, zero) for name, classifier in study.models.items()}
    curves, moved = {}, {}
    for name, classifier in study.models.items():
        others = baselines(classifier, seek.images, norm=norm, seed=study.seed)
        directions = {"universal": found[name].v[None], **others}
        curves[name] = by_length(classifier, test.images, clean[name], threat, directions)
        after = labels_with(classifier, test.images, found[name].v)
        moved[name] = moves(clean[name], after, test.classes)
    table = pd.DataFrame(
        [_row(name, found[name], curves[name], moved[name], half, len(test)) for name in study.models]
    )
    study.table("universal", table)
    _write(study, "universal-lengths", curves)
    _write(study, "universal-labels", moved)
    _write_vectors(study, found)
    shown = [_pictures(study, found, test, clean, moved), _lengths(study, threat, curves)]
    if len(study.models) > 1:
        shown.append(_transfer(study, found, test, clean))
    present(
        study,
        title="Universal perturbations",
        lead=prose.UNIVERSAL,
        columns=("model", "passes", "l2", "sought", "fooled", "95 %", "random", "most often becomes"),
        rows=[_cells(row) for row in table.to_dict("records")],
        figures=shown,
        settings={
            "norm": norm,
            "xi": format_eps(threat.eps),
            "method": method,
            "delta": delta,
            "passes": passes,
            "sought_on": f"{half} images, cut to [0, 1]",
            "judged_on": f"{len(test)} others, cut to [0, 1]",
            "random": f"mean of {DRAWS} vectors",
        },
    )
    return table


def _write(study: Study, name: str, tables: dict[str, pd.DataFrame]) -> None:
    """One table of all models, the model's name last."""
    rows = pd.concat([table.assign(model=model) for model, table in tables.items()], ignore_index=True)
    study.table(name, rows)


def _write_vectors(study: Study, found: dict[str, Universal]) -> None:
    """``universal.npz``: each model's perturbation under its name."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: state.v.numpy() for name, state in found.items()})  # type: ignore[arg-type]
    study.write("universal.npz", lambda file: file.write_bytes(buffer.getvalue()))


def _seek(
    study: Study,
    name: str,
    images: EvalSet,
    threat: ThreatModel,
    method: Method,
    delta: float,
    passes: int,
) -> Universal:
    """The perturbation of one model, from where an interrupted run left it."""
    settings = {
        "threat": threat,
        "method": method,
        "delta": delta,
        "passes": passes,
        "seed": study.seed,
        "images": "cut to the box",
    }
    kept = Kept(study.out / f"universal-{name}.npz", study.identity(name, **settings))
    known = None
    if kept.rows:
        v, last = (torch.from_numpy(kept.rows[key]) for key in ("v", "last"))
        known = Universal(v, last, tuple(kept.rows["fooled"].tolist()))
    done = (known.passes if known else 0) * len(images)
    with ProgressLine(name, "images") as line:

        def advance(n: int) -> None:
            nonlocal done
            done += n
            line(done, passes * len(images), f"pass {-(-done // len(images))}")

        state = universal(
            study.models[name],
            images.images,
            threat=threat,
            method=method,
            delta=delta,
            passes=passes,
            seed=study.seed,
            known=known,
            keep=lambda s: kept.write(
                {"v": s.v.numpy(), "last": s.last.numpy(), "fooled": np.array(s.fooled)}
            ),
            advance=advance,
        )
    study.files.append(kept.path)
    return state


def _row(
    name: str, state: Universal, curve: pd.DataFrame, moved: pd.DataFrame, sought: int, n: int
) -> dict[str, object]:
    """What one perturbation does to the ``n`` held-out images, on its own model."""
    rate = Rate(int(moved["count"].sum()), n)
    label, share = _favourite(moved)
    noise = curve[(curve["perturbation"] == "random") & (curve["radii"] == 1)].iloc[0]
    low, high = rate.interval
    return {
        "model": name,
        "passes": state.passes,
        "l2": float(state.v.norm()),
        "linf": float(state.v.abs().max()),
        "fooled_sought": max(state.fooled),
        "n_sought": sought,
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


def _cells(row: dict[Hashable, Any]) -> list[str]:
    label = f"{row['most_frequent_label']} ({100 * row['share_of_it']:.0f} %)"
    return [
        row["model"],
        str(row["passes"]),
        f"{row['l2']:.2f}",
        f"{100 * row['fooled_sought']:.1f}",
        f"{100 * row['fooled']:.1f}",
        f"{100 * row['ci_low']:.1f}-{100 * row['ci_high']:.1f}",
        f"{100 * row['random']:.1f}",
        label if row["most_frequent_label"] else "-",
    ]


def _favourite(moved: pd.DataFrame) -> tuple[str, float]:
    """The label that most fooled images become, and its share of them; nothing of none."""
    if moved.empty:
        return "", 0.0
    counts = moved.groupby("after", sort=False)["count"].sum()
    return str(counts.idxmax()), float(counts.max() / counts.sum())


def _lengths(study: Study, threat: ThreatModel, curves: dict[str, pd.DataFrame]) -> Shown:
    """Those shares, one panel a model (thesis, Fig. 4.9)."""
    unit, label = (255, "l∞ length, grey levels") if threat.norm == "linf" else (1, "l2 length, pixels")
    series = {
        name: {
            str(key): (unit * part["length"].to_numpy(), 100 * part["fooled"].to_numpy())
            for key, part in curve.groupby("perturbation", sort=False)
        }
        for name, curve in curves.items()
    }
    figure = figures.panels(series, xlabel=label, ylabel="fooled (%)")
    files = figures.save(figure, study.out / "universal-lengths")
    study.files += files
    return Shown(
        files[0],
        "Fooled images by length",
        f"Held-out images, by the length of what is added; random: the mean of {DRAWS} vectors.",
    )


def _pictures(
    study: Study,
    found: dict[str, Universal],
    test: EvalSet,
    clean: dict[str, Tensor],
    moved: dict[str, pd.DataFrame],
) -> Shown:
    """The perturbations stretched to all grey levels, and images with them added."""
    few = test.take(range(min(SHOWN, len(test))))
    blank = np.ones((1, *few.images.shape[1:]), np.float32)
    rows: list[tuple[str, NDArray[np.float32], list[str]]] = []
    rows.append(("image", np.concatenate([blank, few.images.numpy()]), [""] * (1 + len(few))))
    for name, classifier in study.models.items():
        v = found[name].v
        stretched = 0.5 + v / (2 * v.abs().max().clamp_min(1e-12))
        before, after = clean[name][: len(few)], labels_with(classifier, few.images, v)
        seen = [
            f"{few.classes[a]} \u2192 {few.classes[b]}"
            for a, b in zip(before.tolist(), after.tolist(), strict=True)
        ]
        images = torch.cat([stretched[None], (few.images + v).clamp(0, 1)]).numpy()
        rows.append((name, images, [f"l\u221e {float(v.abs().max()) * 255:.0f}/255", *seen]))
    titles = ["perturbation", *(few.classes[k] for k in few.labels.tolist())]
    files = figures.save(figures.gallery(rows, titles), study.out / "universal")
    study.files += files
    return Shown(
        files[0],
        "Universal perturbations and images with them",
        "Above: true labels of held-out images. Below: label before and after. Perturbations are stretched. "
        "Where labels go: " + "; ".join(f"{name}: {sentence(rows)}" for name, rows in moved.items()) + ".",
    )


def _transfer(study: Study, found: dict[str, Universal], test: EvalSet, clean: dict[str, Tensor]) -> Shown:
    """Every perturbation on every model (thesis, Table 4.2)."""
    names = list(study.models)
    shares = np.array(
        [
            [
                float(fooled(classifier, test.images, clean[on], found[of].v).double().mean())
                for on, classifier in study.models.items()
            ]
            for of in names
        ]
    )
    rows = pd.DataFrame(shares, columns=names)
    rows.insert(0, "sought_on", names)
    study.table("universal-transfer", rows)
    figure = figures.matrix(100 * shares, names, xlabel="added to the images of", ylabel="sought on")
    files = figures.save(figure, study.out / "universal-transfer")
    study.files += files
    return Shown(
        files[0], "Every perturbation on every model", "Per cent of held-out images that are fooled."
    )
