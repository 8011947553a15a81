"""`cure-bench shared`: directions that the boundaries near many images share, and what they do to others.

Source: thesis, sections 6.3 to 6.5 and 7.4, Figs. 6.3, 6.9, 7.6 and 7.7, Table 7.1, see `geometry.shared`.
The first images are to learn subspaces from, the others to evaluate them on. Vectors of a subspace are added
to images and cut to [0, 1] with them, as universal perturbations are; noise and curvature are not cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.files import Cache
from robustbench_cure.geometry.boundary import Nearest, projected_hessian, steps_of
from robustbench_cure.geometry.hessian import on_sphere, random_basis
from robustbench_cure.geometry.shared import (
    EXTREMES,
    SharedSubspaces,
    common,
    cosines,
    curvatures_along,
    extreme_eigenvectors,
    in_inputs,
    most_curved,
    random_in,
    random_outside,
    relative_curvatures,
    share_inside,
)
from robustbench_cure.geometry.universal import fooled
from robustbench_cure.protocol.request import Request
from robustbench_cure.stats import Rate
from robustbench_cure.studies import plots
from robustbench_cure.studies.boundary import DENSE, nearest_of
from robustbench_cure.studies.engine import (
    Columns,
    Shown,
    Study,
    counter,
    open_study,
    paragraphs,
    refuse_longer,
    refuse_step,
)
from robustbench_cure.studies.plots import Values

#: d/m of the thesis' subspace of shared directions: 3,072 to 200.
RATIO = 16
#: Lengths of the noise inside and outside the shared directions, in mean lengths of the images.
LENGTHS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
#: Shared directions on the page.
PICTURES = 6

LEAD = paragraphs("""
Do boundaries near different images have something in common? From the boundaries near some of the images
come three subspaces: S_f of their normals, S_c of the directions along which they bend towards the images
on average, and the u_i, the directions along which they bend most, of either sign. All are evaluated on
the others.

"Attack", "difference" and "shift" are the shares of their length that adversarial perturbations, differences
of two images and the shift of an image by a pixel have among the first m directions u_i; a random vector has
sqrt(m/d). The thesis finds 0.6 for adversarial ones and less than chance for differences. "rho 1" is how much
more boundaries bend along u_1 than along a random direction. S_c, S_f and "any" are the shares of the n
unseen images whose label a vector of the length named below changes, drawn from the subspace or from all
inputs. S_f has no more dimensions than there are normals.

The thesis finds that universal perturbations live in S_c, as boundaries bend towards the images along it,
while they bend away along most directions: random vectors of it fool most images, and noise
in the shared directions changes labels where the same noise outside of them does not.
""")
NOTE = """\
attack, difference, shift: their share in the shared directions, {chance:.2f} by chance;
rho 1: curvature along the first of these, 1 along random ones;
S_c, S_f, any: images fooled along curved directions, normals, all inputs."""


@dataclass(frozen=True)
class Settings:
    """Options of the verb.

    Attributes:
        step: of the differences, l2 in pixels; None: each image's distance of the boundary.
        directions: random ones that the relative curvature is measured against.
        learn: images to learn from, each at the cost of 2 (d - 1) gradients; None: half of all.
        dimension: m of the subspaces; None: a sixteenth of the inputs.
        xi: l2 length, pixels, of the vectors that are to change labels; None: a fifth of what random noise
            needs for it (thesis, section 6.4.1), taken as sqrt(d) times the median distance of each model's
            boundaries.
        draws: random vectors of every subspace.
    """

    step: float | None = None
    directions: int = 100
    learn: int | None = None
    dimension: int | None = None
    xi: Fraction | None = None
    draws: int = 10


@dataclass(frozen=True)
class Unseen:
    """Images that nothing was learned from, and their boundaries.

    Attributes:
        classifier: the model.
        data: the images.
        near: their nearest boundaries.
        seed: of every random choice.
    """

    classifier: Classifier
    data: EvalSet
    near: Nearest
    seed: int

    @property
    def rows(self) -> Tensor:
        """Numbers of the images with a boundary, int64, on the CPU."""
        return self.near.exists.nonzero().flatten().cpu()


@dataclass(frozen=True)
class _Findings:
    """One model's subspaces, their evaluation on unseen images, and the model's row of the table.

    Attributes:
        subspaces: learned.
        rho: relative curvature along every u_i, (m,).
        curvature: along random vectors of the subspaces, by dimension.
        fooling: unseen images fooled by such vectors, by dimension.
        noise: labels changed by noise inside and outside the u_i, by length.
        row: of the table.
    """

    subspaces: SharedSubspaces
    rho: Values
    curvature: pd.DataFrame
    fooling: pd.DataFrame
    noise: pd.DataFrame
    row: dict[str, Any]


def run(request: Request, settings: Settings) -> pd.DataFrame:
    """Load what a request names and measure it; see `measure`."""
    refuse_step(settings.step)
    return measure(open_study("shared", request, default_n=100), settings)


def measure(study: Study, settings: Settings) -> pd.DataFrame:
    """Shared subspaces of all models, evaluated on unseen images; one row a model.

    An interrupted run is continued, image by image.

    Raises:
        UsageError: too few images, too many inputs or dimensions, lengths beyond the box, no boundaries.
    """
    m = settings.dimension or max(1, study.inputs // RATIO)
    first = len(study.data) // 2 if settings.learn is None else settings.learn
    _refuse(study, settings, first, m)
    learn, test = study.data.take(range(first)), study.data.take(range(first, len(study.data)))
    unseen = {}
    for name, classifier in study.models.items():
        near = nearest_of(name, classifier, test.images)
        if not bool(near.exists.any()):
            raise UsageError(f"{name}: DeepFool finds no boundary near the {len(test)} images to evaluate on")
        unseen[name] = Unseen(classifier, test, near, study.seed)
    findings = {name: _measure_model(study, name, learn, unseen[name], m, settings) for name in study.models}
    table = pd.DataFrame([finding.row for finding in findings.values()])
    study.present(
        table,
        COLUMNS,
        title="Shared directions",
        lead=LEAD,
        figures=_figures(study, findings, learn),
        settings={
            "dimension": m,
            "dimension_of_S_f": ", ".join(f"{f.row['m_S_f']} ({name})" for name, f in findings.items()),
            "length": ", ".join(f"{f.row['length']:.3g} ({name})" for name, f in findings.items()),
            "step_h": "the distance of each image's boundary" if settings.step is None else settings.step,
            "draws": settings.draws,
            "directions": settings.directions,
            "learnt_on": f"{first} images",
            "judged_on": f"{len(test)} others; vectors are cut to [0, 1] with them, noise is not",
        },
        note=NOTE.format(chance=table["chance"].iloc[0]),
    )
    return table


def _refuse(study: Study, settings: Settings, first: int, m: int) -> None:
    """Refuse what cannot be measured, before anything is."""
    d, n = study.inputs, len(study.data)
    if n < 4:
        raise UsageError(f"--n {n}: shared directions need at least 4 images")
    if d > DENSE:
        raise UsageError(f"the images have {d} inputs: all curvatures are taken up to {DENSE}")
    if m >= d:
        raise UsageError(f"--dimension {m}: the images have {d} inputs")
    refuse_longer("--step", settings.step, d)
    refuse_longer("--xi", settings.xi, d)
    if not 2 <= first <= n - 2:
        raise UsageError(f"--learn {first}: of {n} images, 2 must be left at least (--n)")
    needed = images_needed(m, d)
    if first < needed:
        raise UsageError(f"--learn {first}: {m} shared dimensions need {needed} images to learn from")


def _measure_model(
    study: Study, name: str, learn: EvalSet, unseen: Unseen, m: int, settings: Settings
) -> _Findings:
    """Everything that is measured of one model."""
    step, draws = settings.step, settings.draws
    usual = float(unseen.near.distance.nanmedian()) * study.inputs**0.5 / 5
    length = usual if settings.xi is None else float(settings.xi)
    subspaces = _learn(study, name, learn, m, step)
    rho = _relative(unseen, subspaces, step, settings.directions)
    curvature = curvature_by_dimension(unseen, subspaces, step, draws)
    fooling = fooling_by_dimension(unseen, subspaces, length, draws)
    row = _row(name, unseen, subspaces, rho, fooling, curvature) | {"length": length}
    return _Findings(subspaces, rho, curvature, fooling, changed_by_noise(unseen, subspaces), row)


# --- learning --------------------------------------------------------------------------------------------


def images_needed(m: int, d: int) -> int:
    """Images to learn m shared directions from: fewer than 2 m columns have no m directions to share."""
    return math.ceil(2 * m / min(2 * EXTREMES, d - 1))


def _learn(study: Study, name: str, images: EvalSet, m: int, step: float | None) -> SharedSubspaces:
    """The subspaces of one model; images that an interrupted run finished are not measured again.

    Raises:
        UsageError: too few of the images have a boundary.
    """
    cache = study.cache(name, learn=len(images), m=m, h=step, seed=study.seed)
    if "curved" not in cache.rows:
        normals, directions, mean = _boundaries(study, name, images, m, step, cache)
        _refuse_few(name, len(normals), images, m)
        singular, flat = common(normals)
        _, shared = common(directions)
        parts = {"singular": singular, "flat": flat, "curved": most_curved(mean, m), "shared": shared[:m]}
        # In the memory order that a file has: products round by it, and a continued run reads the file.
        cache.rows = {key: np.ascontiguousarray(part.numpy()) for key, part in parts.items()}
        cache.rows["images"] = np.array(len(normals))
        cache.write(cache.rows)
    tensors = {key: torch.from_numpy(cache.rows[key]) for key in ("singular", "flat", "curved", "shared")}
    return SharedSubspaces(**tensors, images=int(cache.rows["images"]))


def _refuse_few(name: str, usable: int, images: EvalSet, m: int) -> None:
    needed = images_needed(m, images.pixels[0].numel())
    if usable < needed:
        raise UsageError(
            f"{name}: {usable} of the {len(images)} images to learn from have a boundary, {m} shared "
            f"dimensions need {needed} (--learn)"
        )


def _boundaries(
    study: Study, name: str, images: EvalSet, m: int, step: float | None, cache: Cache
) -> tuple[Tensor, Tensor, Tensor]:
    """Normals r/||r|| (k, d), extreme eigenvectors (any, d) and the mean projected Hessian (d, d)."""
    classifier, d, n = study.models[name], study.inputs, len(images)
    x, rows = images.images, cache.rows
    near = nearest_of(name, classifier, x)
    _refuse_few(name, int(near.exists.sum()), images, m)  # before the gradients, not after
    h = steps_of(near, step)
    rotation = random_basis(d - 1, study.seed, classifier.device)
    done = int(rows["done"]) if rows else 0
    normals = list(rows["normals"]) if rows else []
    curvatures = list(rows["curvatures"]) if rows else []
    total = torch.from_numpy(rows["total"]) if rows else torch.zeros((d, d), dtype=torch.float64)
    cost = 2 * (d - 1)
    with counter(name, "gradients", n * cost, "curvature") as advance:
        advance.done = done * cost
        for row in range(done, n):
            if bool(near.exists[row]):
                at = near.point[row], near.own[row], near.other[row]
                frame, matrix = projected_hessian(
                    classifier, *at, h=float(h[row]), rotation=rotation, advance=advance
                )
                if not bool(matrix.isnan().any()):
                    r = (near.point[row] - x[row].to(classifier.device)).flatten()
                    normals.append((r / r.norm()).cpu().numpy())
                    curvatures.append(extreme_eigenvectors(frame, matrix).cpu().numpy())
                    total += in_inputs(frame, matrix).cpu().double()
            if row + 1 < n:
                cache.update(
                    {
                        "done": np.array(row + 1),
                        "normals": np.array(normals, np.float32).reshape(-1, d),
                        "curvatures": np.array(curvatures, np.float32),
                        "total": total.numpy(),
                    }
                )
    stacked = np.concatenate(curvatures) if curvatures else np.zeros((0, d), np.float32)
    return (
        torch.from_numpy(np.array(normals, np.float32).reshape(-1, d)),
        torch.from_numpy(stacked),
        total / max(1, len(normals)),
    )


# --- on unseen images ------------------------------------------------------------------------------------


def _relative(unseen: Unseen, subspaces: SharedSubspaces, step: float | None, references: int) -> Values:
    """Relative curvature along every u_i, 1 along random directions, averaged over the images; (m,)."""
    near, ids = unseen.near[unseen.rows], [unseen.data.ids[row] for row in unseen.rows.tolist()]
    noise = Noise.for_samples(unseen.seed, "shared/relative", ids, unseen.classifier.device)
    h = steps_of(near, step)
    values = relative_curvatures(
        unseen.classifier, near, subspaces.shared, h=h, references=references, noise=noise
    )
    mean: Values = values.nanmean(0).cpu().numpy()
    return mean


def vectors(subspaces: SharedSubspaces, draws: int, seed: int) -> Iterator[tuple[str, int, Tensor]]:
    """Random unit vectors of the first m dimensions of S_c and S_f, and of all inputs.

    Yields:
        The subspace, m, and one vector a row, float32 (draws, d).
    """
    d = subspaces.curved.shape[1]
    streams = [str(k) for k in range(draws)]
    for kind, basis in (("S_c", subspaces.curved), ("S_f", subspaces.flat)):
        noise = Noise.for_samples(seed, f"shared/{kind}", streams)
        for m in _dimensions(len(subspaces.curved), len(basis)):
            yield kind, m, random_in(basis[:m], noise, 0)
    yield "any", d, on_sphere(Noise.for_samples(seed, "shared/any", streams), (d,), 0)


def _dimensions(m: int, most: int) -> list[int]:
    """Powers of two, the m that was asked for, and all there are."""
    powers = (2**k for k in range(most.bit_length()))
    return sorted({*powers, min(m, most), most})


def curvature_by_dimension(
    unseen: Unseen, subspaces: SharedSubspaces, step: float | None, draws: int
) -> pd.DataFrame:
    """S(x): curvature of boundaries along random vectors of a subspace, by its dimension (thesis, Fig. 6.9a).

    Returns:
        Mean over images and draws, standard deviations over images (of their means over draws) and over draws
        (of their means over images); 1/pixel.
    """
    near = unseen.near[unseen.rows]
    rows = []
    for kind, m, unit in vectors(subspaces, draws, unseen.seed):
        along = curvatures_along(unseen.classifier, near, unit, h=steps_of(near, step))
        by_image = along[~along.isnan().any(1)].cpu().numpy()
        row = {"subspace": kind, "m": m, "draws": draws, "n": len(by_image)}
        row |= {"mean": by_image.mean() if len(by_image) else np.nan}
        row |= {"std": by_image.mean(1).std() if len(by_image) else np.nan}
        rows.append(row | {"std_draws": by_image.mean(0).std() if len(by_image) else np.nan})
    return pd.DataFrame(rows)


def fooling_by_dimension(
    unseen: Unseen, subspaces: SharedSubspaces, length: float, draws: int
) -> pd.DataFrame:
    """Unseen images that get another label by vectors of a subspace, by its dimension (thesis, Fig. 6.9b).

    Returns:
        Mean share over draws, its standard deviation and largest; the interval is that of the mean as if each
        of the n images had been tried once.
    """
    classifier, x = unseen.classifier, unseen.data.images.to(unseen.classifier.device)
    labels = classifier.logits(x).argmax(1)
    rows = []
    for kind, m, unit in vectors(subspaces, draws, unseen.seed):
        shares = [
            float(fooled(classifier, x, labels, length * v.view(x[0].shape)).double().mean()) for v in unit
        ]
        mean = float(np.mean(shares))
        low, high = Rate(round(mean * len(x)), len(x)).interval
        row = {"subspace": kind, "m": m, "draws": draws, "fooled": mean, "best": max(shares), "n": len(x)}
        rows.append(row | {"std": float(np.std(shares)), "ci_low": low, "ci_high": high})
    return pd.DataFrame(rows)


def changed_by_noise(unseen: Unseen, subspaces: SharedSubspaces) -> pd.DataFrame:
    """Unseen images that get another label by noise of their own, inside the u_i and outside (Fig. 7.7)."""
    x = unseen.data.images.to(unseen.classifier.device)
    labels = unseen.classifier.logits(x).argmax(1)
    usual = float(x.flatten(1).norm(dim=1).mean())
    noise = Noise.for_samples(unseen.seed, "shared/noise", unseen.data.ids)
    units = {
        "inside": random_in(subspaces.shared, noise, 0),
        "outside": random_outside(subspaces.shared, noise, 1),
        "anywhere": on_sphere(noise, (x[0].numel(),), 2),
    }
    rows = []
    for kind, unit in units.items():
        for share in LENGTHS:
            moved = x + share * usual * unit.to(x).view_as(x)
            changed = unseen.classifier.logits(moved).argmax(1) != labels
            rate = Rate(int(changed.sum()), len(x))
            row = {"noise": kind, "length": share, "changed": rate.value, "n": len(x)}
            rows.append(row | dict(zip(("ci_low", "ci_high"), rate.interval, strict=True)))
    return pd.DataFrame(rows)


def _projections(unseen: Unseen, subspaces: SharedSubspaces) -> dict[str, float]:
    """Mean share of their length that vectors have among the u_i (thesis, Table 7.1)."""
    x, rows = unseen.data.images, unseen.rows
    noise = Noise.for_samples(unseen.seed, "shared/random", unseen.data.ids)
    kinds = {
        "random": on_sphere(noise, tuple(x.shape[1:]), 0),
        "adversarial": unseen.near.point.cpu()[rows] - x[rows],
        "difference": x - x.roll(1, 0),
        "shift": torch.gradient(x, dim=3)[0],
    }
    return {kind: float(share_inside(subspaces.shared, v).nanmean()) for kind, v in kinds.items()}


def _row(
    name: str,
    unseen: Unseen,
    subspaces: SharedSubspaces,
    rho: Values,
    fooling: pd.DataFrame,
    curvature: pd.DataFrame,
) -> dict[str, Any]:
    """One model's row of the table: subspaces at the dimension asked for, or at all there are of fewer."""
    m, d = subspaces.curved.shape
    dimensions = {"S_c": m, "S_f": min(m, len(subspaces.flat)), "any": d}
    row = {
        "model": name,
        "images": subspaces.images,
        "n": len(unseen.data),
        "n_boundary": len(unseen.rows),
        "m": m,
        "m_S_f": dimensions["S_f"],
        "chance": (len(subspaces.shared) / d) ** 0.5,
        **_projections(unseen, subspaces),
        "rho_1": float(rho[0]),
        "rho_mean": float(rho.mean()),
    }
    fools, curves = (table.set_index(["subspace", "m"]) for table in (fooling, curvature))
    for kind, at in dimensions.items():
        row[f"fooled_{kind}"] = fools.loc[(kind, at), "fooled"]
        for key in ("std", "ci_low", "ci_high"):
            row[f"fooled_{kind}_{key}"] = fools.loc[(kind, at), key]
        row[f"curvature_{kind}"] = curves.loc[(kind, at), "mean"]
        row[f"curvature_{kind}_std"] = curves.loc[(kind, at), "std"]
    return row


COLUMNS: Columns = {
    "model": lambda row: row["model"],
    "n": lambda row: str(row["n"]),
    "attack": lambda row: f"{row['adversarial']:.2f}",
    "difference": lambda row: f"{row['difference']:.2f}",
    "shift": lambda row: f"{row['shift']:.2f}",
    "rho 1": lambda row: f"{row['rho_1']:.1f}",
    "S_c": lambda row: f"{100 * row['fooled_S_c']:.0f} %",
    "S_f": lambda row: f"{100 * row['fooled_S_f']:.0f} %",
    "any": lambda row: f"{100 * row['fooled_any']:.0f} %",
}


# --- figures ---------------------------------------------------------------------------------------------


def _figures(study: Study, findings: dict[str, _Findings], learn: EvalSet) -> list[Shown]:
    subspaces = {name: finding.subspaces for name, finding in findings.items()}
    return [
        _draw_curvature(study, {name: finding.curvature for name, finding in findings.items()}),
        _draw_fooling(study, {name: finding.fooling for name, finding in findings.items()}),
        _draw_noise(study, {name: finding.noise for name, finding in findings.items()}),
        _draw_relative(study, {name: finding.rho for name, finding in findings.items()}),
        _draw_singular(study, subspaces, learn),
        *_draw_angles(study, subspaces),
        _draw_pictures(study, subspaces),
    ]


def _draw_curvature(study: Study, tables: dict[str, pd.DataFrame]) -> Shown:
    """S(x) by the dimension that the vectors are drawn from (thesis, Fig. 6.9a)."""
    study.tables("shared-bending", tables)
    figure = _by_dimension(tables, "mean", ylabel="S(x) (1/pixel)")
    for axes in figure.axes:
        plots.reference(axes)
    return study.figure(
        "shared-bending",
        figure,
        "Curvature of boundaries along vectors of the subspaces",
        "Curvature of the boundaries near unseen images along vectors drawn from the first m dimensions; "
        "above 0 they bend towards the images. Mean over images and draws; the band is one standard "
        "deviation over images. S_c: curved directions; S_f: normals; any: no subspace.",
    )


def _draw_fooling(study: Study, tables: dict[str, pd.DataFrame]) -> Shown:
    """Fooled images by the dimension that the vectors are drawn from (thesis, Fig. 6.9b)."""
    study.tables("shared-fooling", tables)
    figure = _by_dimension(tables, "fooled", ylabel="fooled (%)", scale=100)
    figure.axes[0].set_ylim(bottom=0)
    return study.figure(
        "shared-fooling",
        figure,
        "Unseen images fooled by vectors of the subspaces",
        "The same vectors, of the length named below, each for all unseen images; mean over draws, the band "
        "is one standard deviation over draws.",
    )


def _by_dimension(tables: dict[str, pd.DataFrame], column: str, *, ylabel: str, scale: float = 1) -> Figure:
    """A column of every subspace against m, with its standard deviation as a band; one panel a model."""
    curves: dict[str, dict[str, plots.Points]] = {}
    bands: dict[str, list[Values]] = {}
    for name, table in tables.items():
        curves[name], bands[name] = {}, []
        widest = table[table["subspace"] != "any"]["m"].to_numpy(dtype=np.float64)
        for kind, part in table.groupby("subspace", sort=False):
            m, mean, std = (part[key].to_numpy(dtype=np.float64) for key in ("m", column, "std"))
            if kind == "any":  # all inputs, whatever m: a level line next to the others
                m, mean, std = np.array([widest.min(), widest.max()]), mean.repeat(2), std.repeat(2)
            curves[name][str(kind)] = (m, scale * mean)
            bands[name].append(scale * std)
    figure = plots.panels(curves, xlabel="dimension m", ylabel=ylabel)
    for axes, name in zip(figure.axes, tables, strict=True):
        for line, (m, mean), std in zip(axes.lines, curves[name].values(), bands[name], strict=True):
            axes.fill_between(m, mean - std, mean + std, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_autoscaley_on(True)  # again: with the bands
        axes.autoscale_view()
    return figure


def _draw_noise(study: Study, tables: dict[str, pd.DataFrame]) -> Shown:
    """Labels changed by noise inside and outside the shared directions (thesis, Fig. 7.7)."""
    study.tables("shared-noise", tables)
    curves = {
        name: {
            str(kind): (part["length"].to_numpy(), 100 * part["changed"].to_numpy())
            for kind, part in table.groupby("noise", sort=False)
        }
        for name, table in tables.items()
    }
    return study.figure(
        "shared-noise",
        plots.panels(curves, xlabel="length of noise / of image", ylabel="labels changed (%)"),
        "Labels changed by noise inside and outside the shared directions",
        "Noise of each unseen image's own, inside the shared directions u_i, outside, and anywhere.",
    )


def _by_index(study: Study, name: str, values: Mapping[str, Values], key: str, column: str) -> None:
    """Write a table of values by index, from 1: ``key`` names the rows' owner, ``column`` the values."""
    tables = [
        pd.DataFrame({key: owner, "index": np.arange(1, len(v) + 1), column: v})
        for owner, v in values.items()
    ]
    study.table(name, pd.concat(tables, ignore_index=True))


def _index_figure(values: Mapping[str, Values], xlabel: str, ylabel: str) -> Figure:
    """Values over their index, from 1."""
    series = {name: (np.arange(1, len(v) + 1, dtype=np.float64), v) for name, v in values.items()}
    figure = plots.lines(series, xlabel=xlabel, ylabel=ylabel)
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_relative(study: Study, relative: dict[str, Values]) -> Shown:
    """Relative curvature along every u_i (thesis, Fig. 7.6)."""
    _by_index(study, "shared-relative", relative, "model", "rho")
    figure = _index_figure(relative, "i", "rho of u_i")
    plots.reference(figure.axes[0], 1)
    return study.figure(
        "shared-relative",
        figure,
        "Relative curvature along the shared directions",
        "How much more boundaries near unseen images bend along u_i than along random directions (1).",
    )


def _draw_singular(study: Study, subspaces: dict[str, SharedSubspaces], learn: EvalSet) -> Shown:
    """Singular values of the normals, and those of as many random directions (thesis, Fig. 6.3)."""
    noise = Noise.for_samples(study.seed, "shared/singular", learn.ids)
    random, _ = common(on_sphere(noise, (study.inputs,), 0))
    tensors = {name: known.singular for name, known in subspaces.items()} | {"random": random}
    values = {name: v.double().numpy() for name, v in tensors.items()}
    _by_index(study, "shared-singular", values, "model", "value")
    return study.figure(
        "shared-singular",
        _index_figure(values, "index", "singular value"),
        "Singular values of the normals",
        "Singular values of the matrix of normals: the further from random directions, the more they share.",
    )


def _draw_angles(study: Study, subspaces: dict[str, SharedSubspaces]) -> list[Shown]:
    """Principal angles between S_c of the first model and of the others, and of two random subspaces."""
    if len(subspaces) < 2:
        return []
    (first, known), *others = subspaces.items()
    noise = Noise.for_samples(study.seed, "shared/angles", ["one", "other"])
    gaussians = noise.normal(tuple(known.curved.shape), 0)
    one, other = (torch.linalg.qr(gaussian.T)[0].T for gaussian in gaussians)
    values = {f"{first}, {name}": cosines(known.curved, rest.curved).numpy() for name, rest in others}
    values["random"] = cosines(one, other).numpy()
    _by_index(study, "shared-angles", values, "subspaces", "cosine")
    return [
        study.figure(
            "shared-angles",
            _index_figure(values, "index", "cosine of the principal angle"),
            "Principal angles between the curved subspaces of two models",
            "1: shared; 0: orthogonal.",
        )
    ]


def _draw_pictures(study: Study, subspaces: dict[str, SharedSubspaces]) -> Shown:
    """The first shared directions, stretched to all grey levels (thesis, Fig. 7.6)."""
    count = min(PICTURES, *(len(known.shared) for known in subspaces.values()))
    shape = tuple(study.images.shape[1:])
    rows: list[tuple[str, NDArray[np.float32], list[str]]] = [
        (name, plots.stretched(known.shared[:count].view(count, *shape)), [""] * count)
        for name, known in subspaces.items()
    ]
    return study.figure(
        "shared",
        plots.gallery(rows, [f"u{k + 1}" for k in range(count)]),
        "Shared directions of curvature",
        "The first shared directions u_i, stretched.",
    )
