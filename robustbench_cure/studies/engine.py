"""What every study starts from and ends with: models and images, and a folder of figures, tables, one page.

A study is a file of this folder, named as its verb: its introduction, the options of its own as `Settings`,
and `run`, which opens a `Study` for a request and hands it to `measure`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from robustbench_cure.classifier import Classifier, with_memory
from robustbench_cure.datasets import EvalSet
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.preflight import first_pass
from robustbench_cure.evaluation.provenance import environment
from robustbench_cure.evaluation.record import write_table
from robustbench_cure.files import Cache, refuse_files, write_atomically, write_text
from robustbench_cure.loading import load_all, named_models
from robustbench_cure.progress import ProgressLine
from robustbench_cure.protocol.request import Request
from robustbench_cure.report.render import templates
from robustbench_cure.report.table import Table, to_text
from robustbench_cure.report.table import columns as table_columns
from robustbench_cure.studies import plots

#: One row of a table, by column.
ModelRow: TypeAlias = Mapping[Any, Any]
#: What stands under each head of the table on the page and in the terminal.
Columns: TypeAlias = Mapping[str, Callable[[ModelRow], str]]
Arrays: TypeAlias = dict[str, NDArray[np.generic]]

#: Images among which those that all models classify correctly are taken.
CANDIDATES = 64


# --- progress --------------------------------------------------------------------------------------------


class Counter:
    """Work done so far, on a progress line.

    Attributes:
        done: units of work that are done.
        doing: what comes next.
    """

    def __init__(self, line: ProgressLine, total: float, doing: str) -> None:
        self.line, self.total, self.doing = line, total, doing
        self.done = 0

    def __call__(self, n: int) -> None:
        """Count n units more."""
        self.done += n
        self.line(self.done, self.total, self.doing)


@contextmanager
def counter(title: str, unit: str, total: float, doing: str = "") -> Iterator[Counter]:
    """A progress line that counts; arguments as those of `ProgressLine` and `Counter`."""
    with ProgressLine(title, unit) as line:
        yield Counter(line, total, doing)


# --- folder and page -------------------------------------------------------------------------------------


def paragraphs(text: str) -> tuple[str, ...]:
    """Paragraphs of a text, which empty lines part, each on one line."""
    return tuple(" ".join(part.split()) for part in text.strip().split("\n\n"))


def results_folder(verb: str, out: Path | None) -> Path:
    """The folder for results; default: named by verb and time, below ``runs``.

    Raises:
        UsageError: it is a file, lies below one, or holds results already.
    """
    out = out or Path("runs") / f"{verb}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    refuse_files(out)
    if (out / "manifest.json").exists():
        raise UsageError(f"--out {out}: already holds results; choose another --out")
    return out


#: Bytes of a table that is still written as CSV, which people can read; larger ones are Parquet.
LARGEST_CSV = 60_000


@dataclass(frozen=True)
class Shown:
    """A figure on the page.

    Attributes:
        path: its SVG file.
        alt: what it shows, for readers who do not see it.
        caption: text below it.
    """

    path: Path
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The SVG itself, as an address."""
        data = base64.b64encode(self.path.read_bytes()).decode()
        return f"data:image/svg+xml;base64,{data}"


@dataclass(kw_only=True)
class Results:
    """A folder of results, and the files that it will name.

    Attributes:
        verb: the command.
        out: the folder.
        command: the command line.
        files: written so far.
    """

    verb: str
    out: Path
    command: str = ""
    files: list[Path] = field(default_factory=list)

    def write(self, name: str, fill: Callable[[Path], object]) -> None:
        """Write a file of the folder, whole or not at all."""
        path = self.out / name
        write_atomically(path, fill)
        self.files.append(path)

    def table(self, name: str, rows: pd.DataFrame) -> None:
        """Write a table as ``<name>.csv``, or beyond `LARGEST_CSV` bytes as ``<name>.parquet``."""
        text = rows.to_csv(index=False, lineterminator="\n").encode()
        if len(text) <= LARGEST_CSV:
            self.write(name + ".csv", lambda file: file.write_bytes(text))
        else:
            self.files.append(self.out / f"{name}.parquet")
            write_table(self.files[-1], rows)

    def tables(self, name: str, by_model: Mapping[str, pd.DataFrame]) -> None:
        """Write one table for all models, see `table`; the model's name is the last column."""
        self.table(name, pd.concat([rows.assign(model=m) for m, rows in by_model.items()], ignore_index=True))

    def archive(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write arrays as ``<name>.npz``, compressed."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        self.write(name + ".npz", lambda file: file.write_bytes(buffer.getvalue()))

    def figure(self, name: str, figure: Figure, alt: str, caption: str) -> Shown:
        """Write a figure in every format.

        Args:
            name: of the files, without an ending.
            figure: it.
            alt: see `Shown`.
            caption: see `Shown`.
        """
        files = plots.save(figure, self.out / name)
        self.files += files
        return Shown(files[0], alt, caption)

    def page(
        self,
        *,
        title: str,
        lead: Sequence[str],
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        figures: Sequence[Shown],
        facts: Sequence[tuple[str, str]],
    ) -> None:
        """Write ``index.html``: one file with its figures inside.

        Args:
            title: of the page.
            lead: paragraphs: what the figures show and how they are read.
            columns: heads of the table.
            rows: its cells, the first of each row naming the model.
            figures: with their captions.
            facts: where the numbers come from, name and value.
        """
        template = templates().get_template("study.html")
        text = template.render(
            title=title,
            eyebrow=f"cure-bench {self.verb}",
            lead=lead,
            columns=columns,
            rows=rows,
            figures=figures,
            facts=facts,
            files=sorted(path.name for path in self.files),
        )
        self.write("index.html", lambda file: file.write_text(text, encoding="utf-8"))

    def manifest(self, **content: object) -> None:
        """Write ``manifest.json``: verb, command, the content given, and the files."""
        whole = {"verb": self.verb, "command": self.command, **content}
        whole["files"] = sorted(path.name for path in self.files)
        write_text(self.out / "manifest.json", json.dumps(whole, indent=2, allow_nan=False) + "\n")

    def echo(self, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
        """Print the table, a note, and where the page is."""
        cells = tuple(map(tuple, rows))
        click.echo(to_text(Table("", "", table_columns(*columns), cells)))
        if note:
            click.echo(note)
        click.echo(f"page: {self.out / 'index.html'}")


# --- studies ---------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Study(Results):
    """Models side by side on the same images, and the folder of their results.

    Attributes:
        models: name -> classifier, in the order given.
        data: the images.
        seed: of every random choice.
        dataset: as `--dataset` names it.
    """

    models: dict[str, Classifier]
    data: EvalSet
    seed: int = 0
    dataset: str = ""

    @cached_property
    def images(self) -> Tensor:
        """Images, float32 (N,C,H,W) in [0, 1]."""
        return self.data.images

    @property
    def labels(self) -> Tensor:
        """True labels of the images, int64 (N,)."""
        return self.data.labels

    @property
    def inputs(self) -> int:
        """Inputs of an image, d = C H W."""
        return self.images[0].numel()

    def identity(self, model: str, **settings: object) -> dict[str, str]:
        """What must agree for the cached work of a model to be continued."""
        info = self.models[model].model_info()
        scale = max(map(abs, info.answers), default=0.0) or 1.0
        return {
            "verb": self.verb,
            "weights": info.weights_sha256,
            "answers": " ".join(f"{answer / scale:.2f}" for answer in info.answers),
            "precision": self.models[model].precision,
            "data": self.data.digest,
            **{key: str(value) for key, value in sorted(settings.items())},
        }

    def cache(self, model: str, name: str | None = None, **settings: object) -> Cache:
        """Finished rows of a model, in ``<name>-<model>.npz``; they belong to the results.

        Args:
            model: its name.
            name: beginning of the file's name; None: the verb.
            settings: must agree, besides weights and data, for finished rows to be used.

        Raises:
            UsageError: the file is damaged, or of another measurement.
        """
        path = self.out / f"{name or self.verb}-{model}.npz"
        cache = Cache(path, self.identity(model, **settings))
        self.files.append(path)
        return cache

    def by_image(
        self,
        cache: Cache,
        measure: Callable[[range], Mapping[str, Tensor | NDArray[Any]]],
        *,
        size: int,
        count: int | None = None,
        prefix: str = "",
        advance: Counter | None = None,
        cost: int | None = None,
    ) -> Arrays:
        """Measure all images in order, and cache them; those in the cache are not measured again.

        Args:
            cache: of the model.
            measure: columns of some images, each with one entry an image.
            size: images measured together.
            count: images; None: all of the study. Pairs of points, or what else is counted, will do.
            prefix: of the columns' names in the cache.
            advance: counts the work.
            cost: units of work an image, which ``measure`` counts itself; None: an image is a unit, counted
                here.

        Returns:
            All columns by name, without the prefix.
        """
        count = len(self.data) if count is None else count
        names = [name for name in cache.rows if name.startswith(prefix)]
        done = len(cache.rows[names[0]]) if names else 0
        if advance is not None and done:
            advance(done * (cost or 1))
        for start in range(done, count, size):
            rows = range(start, min(start + size, count))
            for name, column in measure(rows).items():
                new = column.detach().cpu().numpy() if isinstance(column, Tensor) else column
                old = cache.rows.get(prefix + name)
                cache.rows[prefix + name] = new if old is None else np.concatenate([old, new])
            cache.update(cache.rows)
            if advance is not None and cost is None:
                advance(len(rows))
        cache.write(cache.rows)
        return {name[len(prefix) :]: rows for name, rows in cache.rows.items() if name.startswith(prefix)}

    def samples(self, model: str, columns: Mapping[str, Any]) -> pd.DataFrame:
        """A table with one row an image, the model and the image's id in the first columns."""
        return pd.DataFrame({"model": model, "sample_id": self.data.ids, **columns})

    def present(
        self,
        rows: pd.DataFrame | Sequence[ModelRow],
        columns: Columns,
        *,
        title: str,
        lead: Sequence[str],
        figures: Sequence[Shown],
        settings: dict[str, object],
        note: str = "",
    ) -> None:
        """Write table, page and manifest; print the table and where the page is.

        Args:
            rows: a table, which is written as ``<verb>.csv``, or rows for page and terminal alone.
            columns: head -> cell of a row. Heads that end in spaces are shown without: two may read the same.
            title: of the page.
            lead: paragraphs: what the figures show and how they are read.
            figures: with their captions.
            settings: how it was measured, for the manifest and the page.
            note: what the heads mean, for the terminal; the page says it in its lead.
        """
        if isinstance(rows, pd.DataFrame):
            self.table(self.verb, rows)
            rows = rows.to_dict("records")
        cells = [[cell(row) for cell in columns.values()] for row in rows]
        n = f"{len(self.data)} image{'s' * (len(self.data) != 1)}"
        facts = [
            ("data", f"{self.data.name} {self.data.split}, {n}"),
            *((name.replace("_", " "), str(value)) for name, value in settings.items()),
            ("seed", str(self.seed)),
            *([("note", self.data.notes)] if self.data.notes else []),
            ("command", self.command),
        ]
        heads = [head.rstrip() for head in columns]
        self.page(title=title, lead=lead, columns=heads, rows=cells, figures=figures, facts=facts)
        self.finish(settings)
        self.echo(heads, cells, note)

    def finish(self, settings: dict[str, Any]) -> None:
        """Write ``manifest.json``: models, data, settings, software and files."""
        first = next(iter(self.models.values()))
        self.manifest(
            models={name: c.model_info().model_dump(mode="json") for name, c in self.models.items()},
            data={
                "name": self.data.name,
                "split": self.data.split,
                "n": len(self.data),
                "digest": self.data.digest,
                "notes": self.data.notes,
            },
            seed=self.seed,
            precision=first.precision,
            settings=settings,
            environment=environment(first.device).model_dump(mode="json"),
        )


def open_study(
    verb: str,
    request: Request,
    *,
    default_n: int,
    precision: str | None = "fp32",
    all_correct: bool = False,
) -> Study:
    """Load the models and images of a request.

    Args:
        verb: the command.
        request: models, data, device.
        default_n: images, where the request does not say.
        precision: of the models. Distances, normals and differences are only as good as the gradients they
            are taken from. None: that of the request, for searches whose results are verified.
        all_correct: images that all models classify correctly, in the order that the seed gives.

    Raises:
        UsageError: a model or the data cannot be loaded, or the folder is taken.
    """
    if precision is not None:
        request = replace(request, precision=precision)
    names = named_models(request)
    dataset = request.dataset or names[0].dataset
    out = results_folder(verb, request.out)
    classifiers, data = load_all(names, request)
    seed = 0 if request.seed is None else request.seed
    wanted = min(default_n, len(data)) if request.n is None else request.n
    candidates = max(wanted, min(CANDIDATES, len(data))) if all_correct else wanted
    data = data.subset(candidates, seed if all_correct else 0)
    models: dict[str, Classifier] = {}
    for given, classifier in zip(names, classifiers, strict=True):
        try:
            with_memory(classifier, partial(first_pass, classifier, data))
        except UsageError as error:
            raise UsageError(f"{given}: {error}") from error
        name = classifier.model_info().id
        if name in models:
            raise UsageError(f"two models are called {name}: rename one")
        models[name] = classifier
    if all_correct:
        data = _classified_correctly(data, list(models.values()), wanted)
    return Study(
        verb=verb, out=out, command=request.command, models=models, data=data, seed=seed, dataset=dataset
    )


def _classified_correctly(data: EvalSet, models: list[Classifier], wanted: int) -> EvalSet:
    """The first images that all models classify correctly, if there are enough; else the first at all.

    The surroundings of a misclassified image say nothing of its own region.
    """
    right = torch.ones(len(data), dtype=torch.bool)
    for model in models:
        right &= model.logits(data.images.to(model.device)).argmax(1).cpu() == data.labels
    rows = right.nonzero().flatten().tolist()
    return data.take(rows[:wanted] if len(rows) >= wanted else range(wanted))


# --- settings --------------------------------------------------------------------------------------------


def refuse_step(step: float | None) -> None:
    """Refuse a ``--step`` that is no length (UsageError); None is the default of the study."""
    if step is not None and not 0 < step < float("inf"):
        raise UsageError(f"--step {step:g}: must be positive")


def refuse_longer(option: str, length: float | Fraction | None, d: int) -> None:
    """Refuse an l2 length, in pixels, that no two points of the box [0, 1]^d are apart.

    Raises:
        UsageError: naming the option.
    """
    if length is not None and length > d**0.5:
        raise UsageError(f"{option}: longer than the diagonal of the images' box, {d**0.5:.4g} pixels")
