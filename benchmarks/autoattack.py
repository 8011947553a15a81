r"""AutoAttack by its authors' code and natively, and the search of the battery `reference`, side by side.

    python benchmarks/autoattack.py --data cifar10-lossless.npz --model resnet18s_pgd_at \
        --model resnet18s_cure --norm linf --n 512
    python benchmarks/autoattack.py --table          # prints the table of what is stored, runs nothing

Claims: native robust accuracy is within 0.2 points of the authors' code, per sample at least 99.5 % agree,
and the search agrees within 0.2 points at a small part of the cost. One thread; seconds are those of the
processor, so that other work on the machine does not count; whole runs, clean pass and checks included,
loading not. What is done is kept in `measured/autoattack/rows.csv`, and not done again.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from robustbench_cure import load_battery, load_dataset, load_model
from robustbench_cure.evaluation.evaluate import evaluate
from robustbench_cure.report.table import Table, columns, to_markdown

HERE = Path(__file__).parent
ROWS = HERE / "measured" / "autoattack" / "rows.csv"
LIBRARY, NATIVE, SEARCH = "pyautoattack", "autoattack", "search of reference"
EPS = {"linf": "8/255", "l2": "1/2"}


@dataclass(frozen=True)
class Row:
    """One run: which images it left robust, one character each in the order of their ids, and seconds."""

    model: str
    norm: str
    n: int
    what: str
    seconds: float
    robust: str

    @property
    def count(self) -> int:
        """Images left robust."""
        return self.robust.count("1")


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help=".npz file of CIFAR-10 images")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--norm", choices=list(EPS), default="linf")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--only", action="append", choices=[LIBRARY, NATIVE, SEARCH], default=[])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = stored()
    for name in () if options.table else options.model:
        for what in options.only or (SEARCH, NATIVE, LIBRARY):
            if not any((r.model, r.norm, r.n, r.what) == (name, options.norm, options.n, what) for r in rows):
                rows.append(measure(name, what, options.norm, options.n, options.data))
                write(rows)
    print(to_markdown([table(rows)]))


def measure(name: str, what: str, norm: str, n: int, data: Path) -> Row:
    """One run of one of the three."""
    classifier = load_model(name, device="cpu")
    images = load_dataset("npz", "test", data).subset(n)
    suffix = "" if norm == "linf" else "_l2"
    run: Callable[[], dict[str, bool]]
    if what == LIBRARY:
        from pyautoattack import AutoAttack

        radius = load_battery(f"autoattack{suffix}").threat.radius
        names = {"linf": "Linf", "l2": "L2"}
        whole = AutoAttack(classifier.module, norm=names[norm], eps=radius, version="standard", device="cpu")

        def run() -> dict[str, bool]:
            found = whole.run_standard_evaluation(images.images, images.labels, batch_size=n)[0]
            right = classifier.logits(images.images).argmax(1) == images.labels
            still = right & (classifier.logits(found).argmax(1) == images.labels)
            return dict(zip(images.ids, still.tolist(), strict=True))

    else:
        battery = load_battery(f"{'autoattack' if what == NATIVE else 'reference'}{suffix}")
        battery = battery.model_copy(update={"audit": None})

        def run() -> dict[str, bool]:
            record = evaluate(classifier, battery, images)
            return dict(zip(record.samples["sample_id"], record.worst_case, strict=True))

    started = time.process_time()
    robust = run()
    seconds = time.process_time() - started
    row = Row(
        name, norm, n, what, round(seconds, 2),
        "".join("01"[bool(robust[key])] for key in sorted(robust)),
    )  # fmt: skip
    print(f"{name} {norm} {what}: {row.seconds} s, {row.count} of {n} robust", flush=True)
    return row


def stored() -> list[Row]:
    """What was measured before."""
    if not ROWS.exists():
        return []
    with ROWS.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{**line, "n": int(line["n"]), "seconds": float(line["seconds"])})
            for line in csv.DictReader(file)
        ]  # fmt: skip


def write(rows: list[Row]) -> None:
    """Keep what is measured."""
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    with ROWS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def table(rows: list[Row]) -> Table:
    """The three side by side, for each network and norm."""
    heads = ("Network", "l_p", "n", "Robust, authors' code", "native", "agree", "search", "agree")
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.model, row.norm, row.n), {})[row.what] = row
    lines = []
    for (model, norm, n), runs in found.items():
        library = runs.get(LIBRARY)
        cells = [model, norm, f"{n}", f"{library.count}" if library else "–"]
        for what in (NATIVE, SEARCH):
            run = runs.get(what)
            cells += [f"{run.count}" if run else "–", agreement(run, library)]
        times = [runs[what].seconds if what in runs else None for what in (LIBRARY, NATIVE, SEARCH)]
        cells += ["–" if seconds is None else f"{seconds:.1f}" for seconds in times]
        cells += [ratio(times[0], seconds) for seconds in times[1:]]
        lines.append(tuple(cells))
    more = ("Seconds, authors' code", "native", "search", "native faster", "search faster")
    return Table("AutoAttack", "", columns(*heads, *more), tuple(lines))


def agreement(run: Row | None, library: Row | None) -> str:
    """Share of the images of which both say the same."""
    if run is None or library is None:
        return "–"
    same = sum(a == b for a, b in zip(run.robust, library.robust, strict=True))
    return f"{100 * same / len(run.robust):.1f} %"


def ratio(slow: float | None, fast: float | None) -> str:
    """How many times as long the slow one takes."""
    return f"{slow / fast:.1f}x" if slow and fast else "–"


if __name__ == "__main__":
    main()
