"""`cure-bench curvature`: spectrum of the Hessian of the loss, its norms, and where the gradient points."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.errors import UsageError
from robustbench_cure.files import write_atomically
from robustbench_cure.geometry import figures, prose
from robustbench_cure.geometry.hessian import along_sign, frobenius
from robustbench_cure.geometry.lanczos import lanczos
from robustbench_cure.geometry.page import Shown, present
from robustbench_cure.geometry.profile import eigenvalues, random_basis
from robustbench_cure.geometry.space import Space, normalised_space
from robustbench_cure.geometry.study import Study
from robustbench_cure.progress import ProgressLine

#: Inputs up to which the whole spectrum is taken by default.
DENSE = 4096
#: Seconds between two writings of unfinished spectra.
KEEP = 30.0


def curvature(
    study: Study,
    *,
    spectrum: Literal["auto", "dense", "lanczos"],
    basis: Literal["canonical", "random"],
    iterations: int,
    directions: int,
) -> pd.DataFrame:
    """Measure and write everything; returns the table of all samples.

    Args:
        study: models, images, folder, step.
        spectrum: all eigenvalues, or the ends alone; ``auto``: all up to 4,096 inputs.
        basis: of the finite differences of the whole spectrum.
        iterations: of Lanczos.
        directions: of the Frobenius norm.
    """
    d = study.images[0].numel()
    whole = spectrum == "dense" or (spectrum == "auto" and d <= DENSE)
    samples, series, bands, rows = [], {}, {}, []
    for name, classifier in study.models.items():
        space = normalised_space(classifier)
        u, y = space.inputs(study.images), study.labels.to(classifier.device)
        with ProgressLine(name, "gradients") as line:
            counter = _Counter(line, len(u) * ((d if whole else 0) + iterations + directions))
            table = _samples(space, u, y, study, iterations, directions, counter)
            if whole:
                values = _spectra(space, u, y, study, name, basis, counter)
                table["largest"], table["smallest"] = values[:, 0], values[:, -1]
                mean, std = values.mean(0), values.std(0)
                index = np.arange(d, dtype=np.float64)
                series[name] = (index, mean)
                bands[name] = (mean - std, mean + std)
        table.insert(0, "model", name)
        table.insert(1, "sample_id", study.data.ids)
        samples.append(table)
        rows.append(_row(name, table, space))
    everything = pd.concat(samples, ignore_index=True)
    study.table("samples", everything)
    shown = []
    if series:
        profile = [
            pd.DataFrame({"model": name, "index": np.arange(d), "mean": mean, "std": bands[name][1] - mean})
            for name, (_, mean) in series.items()
        ]
        study.table("profile", pd.concat(profile, ignore_index=True))
        figure = figures.lines(series, xlabel="eigenvalue index", ylabel="eigenvalue", bands=bands)
        files = figures.save(figure, study.out / "profile")
        study.files += files
        caption = (
            "All eigenvalues of the Hessian of the loss with respect to the normalised input, sorted for "
            f"each image and averaged by rank over {len(study.data)} images; the band is one standard "
            "deviation."
        )
        shown.append(Shown(files[0], "Curvature profiles of the models", caption))
    settings: dict[str, object] = {
        "step_h": study.step,
        "spectrum": "dense" if whole else "lanczos",
        "basis": basis,
        "lanczos_iterations": iterations,
        "frobenius_directions": directions,
    }
    present(
        study,
        title="Curvature of the loss",
        lead=prose.CURVATURE,
        columns=("model", "n", "largest", "smallest", "||H||_F", "||Hz||", "alignment", "units"),
        rows=rows,
        figures=shown,
        settings=settings,
    )
    return everything


class _Counter:
    """Gradients done, for the progress line."""

    def __init__(self, line: ProgressLine, total: int) -> None:
        self.line, self.total, self.done = line, total, 0

    def __call__(self, n: int) -> None:
        self.done += n
        self.line(self.done, self.total, "curvature")


def _samples(
    space: Space, u: Tensor, y: Tensor, study: Study, iterations: int, directions: int, counter: _Counter
) -> pd.DataFrame:
    ends = lanczos(space, u, y, h=study.step, iterations=iterations, seed=study.seed, advance=counter)
    norm = frobenius(space, u, y, h=study.step, directions=directions, seed=study.seed, advance=counter)
    columns = {
        "loss": space.losses(u, y),
        "gradient_norm": ends.gradient.flatten(1).norm(dim=1),
        "largest": ends.largest,
        "smallest": ends.smallest,
        "frobenius": norm,
        "hz": along_sign(space, u, y, h=study.step),
        "alignment": ends.alignment,
    }
    return pd.DataFrame({name: value.detach().cpu().double().numpy() for name, value in columns.items()})


def _spectra(
    space: Space, u: Tensor, y: Tensor, study: Study, name: str, basis: str, counter: _Counter
) -> NDArray[np.float64]:
    """Eigenvalues (n, d), image by image; what an interrupted run left is taken over."""
    d = u[0].numel()
    identity = json.dumps(study.identity(name, h=study.step, basis=basis, seed=study.seed))
    path = study.out / f"spectra-{name}.npz"
    done = _read(path, identity)
    counter(len(done) * d)
    rotation = None if basis == "canonical" else random_basis(d, study.seed, u.device)
    kept = time.monotonic()
    for row in range(len(done), len(u)):
        found = eigenvalues(space, u[row], y[row], h=study.step, basis=rotation, advance=counter)
        done.append(found.numpy().astype(np.float64))
        if time.monotonic() - kept > KEEP:
            _keep(path, identity, done)
            kept = time.monotonic()
    _keep(path, identity, done)
    study.files.append(path)
    return np.stack(done)


def _keep(path: Path, identity: str, done: list[NDArray[np.float64]]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, eigenvalues=np.stack(done).astype(np.float32), identity=np.array(identity))
    write_atomically(path, lambda file: file.write_bytes(buffer.getvalue()))


def _read(path: Path, identity: str) -> list[NDArray[np.float64]]:
    if not path.exists():
        return []
    try:
        with np.load(path, allow_pickle=False) as archive:
            same = str(archive["identity"]) == identity
            values = archive["eigenvalues"].astype(np.float64)
    except Exception:  # zipfile, NumPy and zlib each have their own
        raise UsageError(f"{path}: damaged: delete it to measure again") from None
    if not same:
        raise UsageError(f"{path}: of another measurement: choose another --out")
    return list(values)


def _row(name: str, table: pd.DataFrame, space: Space) -> list[str]:
    columns = ("largest", "smallest", "frobenius", "hz", "alignment")
    means = [f"{float(np.nanmean(table[key])):.3g}" if table[key].notna().any() else "-" for key in columns]
    return [name, str(len(table)), *means, space.name]
