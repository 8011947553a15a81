r"""The whole battery beside torchattacks, Foolbox, ART, AutoAttack and RobustBench, on the same images.

    python benchmarks/peers.py --model digits_pgd_at --n 64
    python benchmarks/peers.py --model resnet18s_normal --model resnet18s_pgd_at --model resnet18s_cure \
        --data cifar10.npz --n 128 --autoattack 64 --out peers

Ours is `evaluate`, whole: preflight, every attack of the battery, every check in float32. An attack's seconds
are those of its record, a PGD step checkpoint the share of the common trajectory that it needs. Peers run
each attack for itself, on all images, as their documentation calls them; with --correct they are spared the
images that are misclassified already. What every library returned is judged here alike, in float32: ball, box
and label. Rounds are interleaved, and the fastest counts. `--out DIR` keeps every figure as it comes
(rows.csv), goes on where it stopped, and draws them (peers.png, .svg).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import platform
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import libraries
import numpy as np
import torch
from torch import Tensor

from robustbench_cure import evaluate, load_battery
from robustbench_cure.attacks.losses import cross_entropy, margins
from robustbench_cure.classifier import Classifier, has_bf16, resolve_device
from robustbench_cure.datasets import EvalSet, load_dataset
from robustbench_cure.protocol.cards import Battery, ModelCard
from robustbench_cure.protocol.catalog import find
from robustbench_cure.protocol.specs import SPSA, Peer
from robustbench_cure.threat import ThreatModel
from robustbench_cure.zoo.loading import load_card_module
from robustbench_cure.zoo.models import automatic_batch_size

#: Of the strong battery: what peers have too.
COMPARED = ("fgsm", "deepfool", "pgd7", "pgd10", "pgd20", "pgd40", "pgd100", "spsa")
CLEAN, WHOLE, AUTOATTACK = "clean", "battery", "autoattack"
OURS = "robustbench-cure"


@dataclass
class Row:
    """One library on one attack; times in seconds, accuracies out of all of its n images."""

    model: str
    attack: str
    library: str
    n: int
    seconds: float
    robust: float
    note: str = ""


@dataclass
class Bench:
    """One network on one device, as we use it and as peers get it; x is what `evaluate` takes of data."""

    name: str
    ours: Classifier
    data: EvalSet
    x: Tensor
    y: Tensor
    setup: libraries.Setup
    battery: Battery
    rounds: int
    correct: bool

    def accuracy(self, x_adv: Tensor | None, n: int) -> float:
        """Share of the first n images classified correctly; images outside ball or box are no attack."""
        x, y = self.x[:n], self.y[:n]
        right = margins(self.ours.logits(x), y) >= 0
        if x_adv is not None:
            x_adv = x_adv.detach().float()
            feasible = self.battery.threat.contains(x, x_adv)
            feasible &= ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
            right &= ~(feasible & (margins(self.ours.logits(x_adv), y) < 0))
        return float(right.float().mean())

    def timed(self, run: libraries.Run, n: int) -> tuple[float, float]:
        """Seconds of one run on the first n images, and the robust accuracy that it leaves."""
        x, y = self.x[:n], self.y[:n]
        chosen = (
            margins(self.ours.logits(x), y) >= 0 if self.correct else torch.ones_like(y, dtype=torch.bool)
        )
        x_adv = x.clone()
        with silent(), clock(x.device) as seconds:
            x_adv[chosen] = run(x[chosen], y[chosen])
        return seconds[0], self.accuracy(x_adv, n)


def main() -> None:
    """Race on every network, then print and draw."""
    options = parse()
    warnings.simplefilter("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = Rows(options.out)
    for name in options.model:
        bench = prepare(name, options)
        machine(bench, options)
        race(bench, options, rows)
        if options.autoattack:
            race_autoattack(bench, options, rows)
        table(rows, name)
    together(rows, options.model)
    if options.out:
        draw(rows.all, options.out)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, help="id of a model card; repeatable")
    parser.add_argument("--weights", type=Path, help=".safetensors, instead of the card's")
    parser.add_argument("--data", type=Path, help=".npz file or image folder; default: the card's data set")
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--spsa-n", type=int, default=16, help="images for SPSA")
    parser.add_argument("--spsa-steps", type=int, default=100, help="of 2 * 128 passes each")
    parser.add_argument("--autoattack", type=int, default=0, metavar="N", help="images; 0: without")
    parser.add_argument("--libraries", default="torchattacks,foolbox,art")
    parser.add_argument("--correct", action="store_true", help="spare peers what is misclassified already")
    parser.add_argument("--batch-size", type=int, default=128, help="of the peers; try several")
    parser.add_argument("--our-batch-size", type=int, default=0, help="0: automatic, as in an evaluation")
    parser.add_argument("--eps", default="8/255", help="in linf; the PGD step is a quarter of it")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of our search")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for rows.csv, environment.json and the plot")
    return parser.parse_args()


def prepare(name: str, options: argparse.Namespace) -> Bench:
    """Network, images and battery."""
    device = resolve_device(options.device)
    found = find(ModelCard, name)
    module, _ = load_card_module(found, options.weights)
    module = module.to(device)
    if options.data is None:
        data = load_dataset(found.card.dataset)
    else:
        data = load_dataset("npz" if options.data.suffix == ".npz" else "folder", "test", options.data)
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    ours = Classifier(
        module, num_classes=found.card.num_classes, input_shape=found.card.input_shape, device=device,
        precision=precision,
    )  # fmt: skip
    ours.batch_size = options.our_batch_size or automatic_batch_size(ours)
    battery = the_battery(options)
    setup = libraries.Setup(module, battery.threat.radius, found.card.num_classes, options.batch_size)
    chosen = data.subset(min(options.n, len(data)))  # as `evaluate` will
    x, y = chosen.images.to(device), chosen.labels.to(device)
    return Bench(name, ours, data, x, y, setup, battery, options.rounds, options.correct)


def the_battery(options: argparse.Namespace) -> Battery:
    """The strong battery without what no peer has, at the radius asked for."""
    strong = load_battery("strong")
    step = f"{ThreatModel.parse('linf', options.eps).eps / 4}"
    specs = []
    for spec in strong.attacks:
        if spec.id in COMPARED:
            changed = {"step_size": step} if spec.kind == "pgd" else {}
            if isinstance(spec, SPSA):
                changed = {"limit": options.spsa_n, "steps": options.spsa_steps}
            specs.append(spec.model_copy(update=changed))
    threat = ThreatModel.parse(strong.threat.norm, options.eps)
    return strong.model_copy(update={"attacks": tuple(specs), "threat": threat})


# --- the race -------------------------------------------------------------------------------------------


def race(bench: Bench, options: argparse.Namespace, rows: Rows) -> None:
    """Our battery and every peer's attacks, round by round."""
    n = len(bench.x)
    chosen = [name for name in options.libraries.split(",") if name and libraries.installed(name)]
    for number in range(bench.rounds):
        seed(number)
        if rows.open(bench.name, WHOLE, OURS, number):
            ours(bench, rows, number)
        for library in chosen:
            if rows.open(bench.name, CLEAN, library, number):
                with clock(bench.x.device) as seconds, torch.no_grad():
                    for part in bench.x.split(options.batch_size):
                        bench.setup.module(part)
                rows.add(Row(bench.name, CLEAN, library, n, seconds[0], bench.accuracy(None, n)), number)
            for spec in bench.battery.attacks:
                run = libraries.runner(library, spec, bench.setup)
                if run is not None and rows.open(bench.name, spec.id, library, number):
                    count = min(spec.limit or n, n)
                    seconds, robust = bench.timed(run, count)
                    note = libraries.note(library, spec)
                    rows.add(Row(bench.name, spec.id, library, count, seconds, robust, note), number)


def ours(bench: Bench, rows: Rows, number: int) -> None:
    """One `evaluate` of the whole battery: a row for each attack and one for all of it."""
    n = len(bench.x)
    with clock(bench.x.device) as seconds:
        record = evaluate(bench.ours, bench.battery, bench.data, n=n, seed=number)
    clean = record.clean_accuracy.value
    cost = record.manifest.cost
    rows.add(Row(bench.name, CLEAN, OURS, n, cost["clean"].seconds, clean), number)
    for spec in bench.battery.attacks:
        rate = record.robust_accuracy(spec.id)
        rows.add(Row(bench.name, spec.id, OURS, rate.total, cost[spec.id].seconds, rate.value), number)
    worst = record.worst_case_accuracy.value
    rows.add(Row(bench.name, WHOLE, OURS, n, seconds[0], worst, "with preflight and checks"), number)


def race_autoattack(bench: Bench, options: argparse.Namespace, rows: Rows) -> None:
    """AutoAttack standard here, called plainly, and by RobustBench's benchmark(): one round."""
    n = options.autoattack
    spec = Peer(id=AUTOATTACK, name="AutoAttack", limit=0, kind="autoattack:standard")
    battery = bench.battery.model_copy(update={"attacks": (spec,)})
    if rows.open(bench.name, AUTOATTACK, OURS, 0):
        with silent(), clock(bench.x.device) as seconds:
            record = evaluate(bench.ours, battery, bench.data, n=n)
        robust = record.robust_accuracy(AUTOATTACK).value
        rows.add(Row(bench.name, AUTOATTACK, OURS, n, seconds[0], robust), 0)
    for library, make in (
        ("pyautoattack", libraries.plain_autoattack),
        ("robustbench", libraries.robustbench_run),
    ):
        if rows.open(bench.name, AUTOATTACK, library, 0):
            with silent(), clock(bench.x.device) as seconds:
                x_adv = make(bench.setup)(bench.x[:n], bench.y[:n])
            rows.add(Row(bench.name, AUTOATTACK, library, n, seconds[0], bench.accuracy(x_adv, n)), 0)


class Rows:
    """Figures as they come, in memory and in ``rows.csv``; the fastest round of each counts."""

    def __init__(self, out: Path | None) -> None:
        self.path = out / "rows.csv" if out else None
        self.kept: list[tuple[int, Row]] = []
        if self.path and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                for line in csv.DictReader(file):
                    number = int(line.pop("round"))
                    plain = {**line, "n": int(line["n"])}
                    plain |= {key: float(line[key]) for key in ("seconds", "robust")}
                    self.kept.append((number, Row(**plain)))

    @property
    def all(self) -> list[Row]:
        """The fastest round of each; accuracies are the lowest of the rounds."""
        best: dict[tuple[str, str, str], Row] = {}
        for _, row in self.kept:
            key = (row.model, row.attack, row.library)
            old = best.get(key, row)
            best[key] = Row(**{**asdict(row), "seconds": min(old.seconds, row.seconds),
                               "robust": min(old.robust, row.robust)})  # fmt: skip
        return list(best.values())

    def open(self, model: str, attack: str, library: str, number: int) -> bool:
        """Whether this is still to be measured."""
        done = {(i, row.model, row.attack, row.library) for i, row in self.kept}
        return (number, model, attack, library) not in done

    def add(self, row: Row, number: int) -> None:
        """Keep a figure, and say it."""
        self.kept.append((number, row))
        print(f"  {row.model} {row.attack} {row.library}: {row.seconds:.2f} s, {row.robust:.1%}", flush=True)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["round", *(field.name for field in fields(Row))])
            if fresh:
                writer.writeheader()
            writer.writerow({"round": number, **asdict(row)})


# --- what is printed ------------------------------------------------------------------------------------


def machine(bench: Bench, options: argparse.Namespace) -> None:
    """Print what the figures depend on, and keep it."""
    device = bench.x.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        name = str(capabilities.get("cpu_name") or platform.processor() or platform.machine())
    packages = ("torch", "robustbench-cure", *libraries.DISTRIBUTIONS)
    found = {
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": {package: libraries.installed(package) for package in packages},
        "ours": f"search in {bench.ours.precision}, {'folded' if bench.ours.folded else 'not folded'}",
        "batch_size": {"ours": bench.ours.batch_size, "peers": options.batch_size},
        "peers_see": "correctly classified images" if options.correct else "all images",
        "data": f"{bench.data.name}, n = {len(bench.x)}",
        "threat": str(bench.battery.threat),
        "raw_gradients_per_second": round(raw_rate(bench)),
    }
    print(f"{bench.name}: {json.dumps(found)}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"environment-{bench.name}.json"
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def raw_rate(bench: Bench, lasting: float = 3.0) -> float:
    """Images a second through one forward pass and its input gradient: what no gradient attack exceeds."""
    x = bench.x[: bench.ours.batch_size]
    labels = bench.y[: len(x)]
    deadline, best = time.perf_counter() + lasting, math.inf
    while time.perf_counter() < deadline:
        with clock(x.device) as seconds:
            bench.ours.value_and_gradient(x, lambda z: cross_entropy(z, labels))
        best = min(best, seconds[0])
    return len(x) / best


def table(rows: Rows, model: str) -> None:
    """Print a network's figures as a Markdown table."""
    print(f"\n{model}\n")
    print("| attack | n | ours, s | fastest peer, s | ratio | robust, ours | robust, peers |")
    print("|:---|---:|---:|---:|---:|---:|---:|")
    for each in compared(rows.all, model):
        others = ", ".join(f"{row.robust:.1%} {row.library}" for row in each.peers)
        print(
            f"| {each.attack} | {each.mine.n} | {each.mine.seconds:.2f} | {each.seconds:.2f} {each.who} "
            f"| {each.seconds / each.mine.seconds:.1f} | {each.mine.robust:.1%} | {others} |"
        )
    print()


def together(rows: Rows, models: list[str]) -> None:
    """Print the whole battery over all networks."""
    wholes = [[c for c in compared(rows.all, model) if c.mine.attack == WHOLE] for model in models]
    for name in dict.fromkeys(each.who for whole in wholes for each in whole):
        found = [each for whole in wholes for each in whole if each.who == name]
        if len(found) == len(models) > 1:
            mine, theirs = sum(c.mine.seconds for c in found), sum(c.seconds for c in found)
            print(
                f"all {len(models)} networks: {mine:.1f} s, {name} {theirs:.1f} s, {theirs / mine:.1f} times"
            )


@dataclass
class Compared:
    """One attack: ours, the peers that have it, and the fastest of them."""

    attack: str
    mine: Row
    peers: list[Row]
    seconds: float
    who: str


def compared(rows: list[Row], model: str) -> list[Compared]:
    """Attack by attack, then the whole: our one run against the sum of the fastest peer of each attack.

    A library that has not every attack is compared on those that it has: the seconds of our record for them.
    """
    found: list[Compared] = []
    for attack in (CLEAN, *COMPARED, AUTOATTACK):
        here = [row for row in rows if (row.model, row.attack) == (model, attack)]
        mine = next((row for row in here if row.library == OURS), None)
        peers = [row for row in here if row.library != OURS]
        if mine and peers:
            fastest = min(peers, key=lambda row: row.seconds)
            found.append(Compared(attack, mine, peers, fastest.seconds, fastest.library))
    parts = [each for each in found if each.attack != AUTOATTACK]
    whole = next((row for row in rows if (row.model, row.attack, row.library) == (model, WHOLE, OURS)), None)
    if whole and len(parts) == 1 + len(COMPARED):
        found.append(Compared(WHOLE, whole, [], sum(each.seconds for each in parts), "fastest of each"))
        for library in sorted({row.library for each in parts for row in each.peers}):
            theirs = [row for each in parts for row in each.peers if row.library == library]
            if len(theirs) == len(parts):
                seconds = sum(row.seconds for row in theirs)
                found.append(Compared(f"{WHOLE}, {library}", whole, [], seconds, library))
    return found


def draw(rows: list[Row], out: Path) -> None:
    """Seconds of ours and of each peer, by attack and network, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row.model for row in rows))
    attacks = [a for a in (CLEAN, *COMPARED, AUTOATTACK) if any(row.attack == a for row in rows)]
    names = [OURS, "torchattacks", "foolbox", "art", "pyautoattack", "robustbench"]
    names = [name for name in names if any(row.library == name for row in rows)]
    colours = dict(
        zip(names, ("#1b5e9b", "#d98032", "#5b9a5b", "#9a6fb0", "#8a8a8a", "#c2b280"), strict=False)
    )
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(3.6 * len(models), 0.42 * len(attacks) + 1.6), sharey=True, squeeze=False
    )
    for axis, model in zip(axes[0], models, strict=True):
        for place, attack in enumerate(attacks):
            here = {row.library: row.seconds for row in rows if (row.model, row.attack) == (model, attack)}
            if here:
                axis.hlines(place, min(here.values()), max(here.values()), color="#dddddd", zorder=1)
            for library, seconds in here.items():
                axis.scatter(
                    seconds, place, s=46 if library == OURS else 26, color=colours[library], zorder=2
                )
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(model, fontsize=10)
        axis.set_xlabel("seconds")
        axis.grid(axis="x", color="#eeeeee")
        axis.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0][0].set_yticks(range(len(attacks)), attacks)
    axes[0][0].invert_yaxis()
    marks = [
        pyplot.Line2D([], [], marker="o", linestyle="", color=colours[name], label=name) for name in names
    ]
    figure.legend(handles=marks, loc="upper center", ncols=2 * len(models), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    for suffix in ("png", "svg"):
        figure.savefig(out / f"peers.{suffix}", dpi=160)


# --- small things ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def clock(device: torch.device) -> Iterator[list[float]]:
    """Seconds that the block takes, in a list of one."""
    seconds = [0.0]
    _wait(device)
    start = time.perf_counter()
    yield seconds
    _wait(device)
    seconds[0] = time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Peers print as they work."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def seed(number: int) -> None:
    """Peers draw from the global generators."""
    torch.manual_seed(number)
    np.random.seed(number)


if __name__ == "__main__":
    main()
