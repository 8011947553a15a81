"""The command line: one thin function a verb. No logic lives here, and torch is imported late."""

from __future__ import annotations

import os
import shlex
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

import click

from robustbench_cure.cli import boundary as boundary_cli
from robustbench_cure.cli import gate as gate_cli
from robustbench_cure.cli import geometry as geometry_cli
from robustbench_cure.cli import inventory
from robustbench_cure.cli import masking as masking_cli
from robustbench_cure.errors import CureBenchError, UsageError
from robustbench_cure.evaluation.flags import FLAG_KINDS
from robustbench_cure.version import __version__

CARDS = click.option(
    "--cards", multiple=True, metavar="DIR", help="Directory with further cards; repeatable."
)
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
DATA_DIR = click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Where the data are: a folder, or the .npz file."
)


class StoppedError(CureBenchError):
    """Ctrl-C; the message may say what is left and how to go on."""

    exit_code = 130


#: Verbs by what they are for, in the order of the help.
SECTIONS = {
    "Judge": ("evaluate", "report", "merge", "list", "where", "validate"),
    "Trust": ("masking", "selftest", "compare", "baseline", "verify-adv"),
    "Publish": ("site", "export", "import"),
    "Train": ("train", "evolution"),
    "Loss around images": ("curvature", "bounds", "curve", "section", "surface", "gallery"),
    "Boundaries and regions": (
        "distance", "boundary", "detect", "shared", "subspace", "universal", "connectivity",
    ),
}  # fmt: skip


class _Verbs(click.Group):
    """Verbs by section; catches Ctrl-C before click does, which would forget what was said of it."""

    def format_commands(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for section, verbs in SECTIONS.items():
            with formatter.section(section):
                rows = [(verb.ljust(width), self.commands[verb].get_short_help_str(100)) for verb in verbs]
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise StoppedError("; ".join(["interrupted", *map(str, error.args)])) from None


@click.group(
    cls=_Verbs, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="cure-bench")
@click.pass_context
def cli(context: click.Context) -> None:
    """How robust is this image classifier really, and can the number be trusted?

    Without options, `cure-bench evaluate` judges the embedded digits models and writes a report.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@click.option(
    "--model", "models", multiple=True, metavar="ID", help="Card id, or package.module:factory; repeatable."
)
@click.option("--battery", metavar="ID", help="Protocol; default: the model card's own.")
@click.option("--eps", metavar="EPS", help='Another radius for the battery, as "4/255"; steps follow it.')
@click.option("--dataset", metavar="NAME", help="Data set; default: the battery's or the model's.")
@DATA_DIR
@click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True)
@click.option(
    "--n",
    type=gate_cli.Samples(),
    metavar="N",
    help="Number of samples, or auto: as --tolerance needs; default: what the battery asks for.",
)
@click.option("--tolerance", type=gate_cli.POINTS, help="With --n auto: that of `compare`, in points.")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights file, instead of the card's.")
@click.option("--mean", metavar="M,M,M", help="Channel means of a model of your own, pixels in [0, 1].")
@click.option("--std", metavar="S,S,S", help="Channel standard deviations, likewise.")
@DEVICE
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Of the search; every success is verified in fp32.",
)
@click.option("--batch-size", default="auto", show_default=True, help="Images a pass.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Of the attacks; default: the battery's.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory; default: runs/<battery>-<time>.")
@click.option("--resume", is_flag=True, help="Go on with the run that --out holds.")
@click.option("--shard", metavar="I/K", help="Do the I-th of K parts; join them with `cure-bench merge`.")
@click.option(
    "--shard-size",
    type=click.IntRange(1),
    metavar="N",
    help="Samples that are written, resumed and split together; the same for all parts; default: 512.",
)
@click.option("--save-adversarials", is_flag=True, help="Keep every attack's images, float32.")
@click.option(
    "--allow-unreliable", is_flag=True, help="Evaluate a random or batch-dependent model, marked as such."
)
@click.option(
    "--fail-on",
    multiple=True,
    type=click.Choice(list(FLAG_KINDS)),
    metavar="FLAG",
    help="Flag that makes the exit code 1 if it is raised; repeatable.",
)
@CARDS
@click.pass_obj
def evaluate(words: list[str] | None, /, fail_on: tuple[str, ...], **options: object) -> int:
    """Judge models by a battery of attacks and write a report."""
    from robustbench_cure.cli.evaluate import run
    from robustbench_cure.evaluation.flags import failures
    from robustbench_cure.protocol.request import Request

    command = shlex.join(["cure-bench", *(words or [])])
    failed = failures(run(Request(**gate_cli.sized(options)), command=command), fail_on)
    for line in failed:
        click.echo(line)
    return int(bool(failed))


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where to write; default: into the run, if it is one."
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write the report of finished runs again, from their records alone."""
    from robustbench_cure.cli.evaluate import write_and_name
    from robustbench_cure.evaluation.storage import find_records

    if out is None and len(runs) > 1:
        raise UsageError("several runs: say where the report goes with --out")
    write_and_name(find_records(runs), out or runs[0])


@cli.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the site.")
@click.option(
    "--readme", type=click.Path(path_type=Path), help="Renew the leaderboard in this Markdown file."
)
@CARDS
def site(runs: tuple[Path, ...], out: Path, readme: Path | None, cards: tuple[str, ...]) -> None:
    """Write a static site: leaderboard, models, paper tables.

    RUNS are run directories, or folders of them at any depth; what `masking`, `curvature` and the other
    studies left there is shown with the models it is about. Without RUNS: the published tables alone.
    """
    from robustbench_cure.site.command import write_site

    write_site(runs, out, readme, cards)


@cli.command()
@click.option(
    "--robustbench",
    "run",
    required=True,
    type=click.Path(path_type=Path),
    help="Run to write RobustBench's model_info of.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path(), help="Folder of model_info/; default: here."
)
@click.option("--link", default="", help="Of the paper.")
@click.option("--name", default="", help="Title of the paper.")
@click.option("--authors", default="", help="Separated by commas.")
@click.option("--venue", default="", help='As "CVPR 2019".')
@CARDS
def export(run: Path, out: Path, cards: tuple[str, ...], **said: str) -> None:
    """Write the records of a run in the form of other benchmarks."""
    from robustbench_cure.site.model_info import export as write

    write(run, out, said, cards)


@cli.command("import")
@click.option(
    "--robustbench",
    "folder",
    required=True,
    type=click.Path(path_type=Path),
    help="model_info folder of a clone of RobustBench.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of cards, for --cards of `site`."
)
def import_numbers(folder: Path, out: Path) -> None:
    """Read the numbers of other benchmarks as published rows."""
    from robustbench_cure.site.published_models import import_model_info

    import_model_info(folder, out)


@cli.command("verify-adv")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, metavar="ID", help="Card id, or package.module:factory.")
@click.option("--battery", metavar="ID", help="Whose threat model counts; default: the card's.")
@click.option("--against", multiple=True, type=click.Path(path_type=Path), help="Run to lower; repeatable.")
@click.option("--source", default="", help="Who made the images, and how; printed on the leaderboard.")
@click.option("--tensor", default="", metavar="NAME", help="Which tensor, where the file holds several.")
@click.option("--dataset", metavar="NAME", help="Data set; default: the battery's or the model's.")
@DATA_DIR
@click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True)
@click.option("--weights", type=click.Path(path_type=Path), help="Weights file, instead of the card's.")
@click.option("--mean", metavar="M,M,M", help="Channel means of a model of your own, pixels in [0, 1].")
@click.option("--std", metavar="S,S,S", help="Channel standard deviations, likewise.")
@DEVICE
@click.option("--batch-size", default="auto", show_default=True, help="Images a pass.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder; default: runs/external-<time>.")
@CARDS
@click.pass_obj
def verify_adv(words: list[str] | None, /, file: Path, **options: Any) -> int:
    """Check other people's adversarial examples.

    What holds lowers the best known number on the site, as external.

    FILE is .safetensors (ids as a JSON list under `sample_ids` of the metadata) or .npz (`x_adv`, `ids`);
    images are (N, C, H, W), float in [0, 1]. Without ids: the first N of the split, in its order. Exit
    code 1: an image was refused, or none breaks a sample.
    """
    from robustbench_cure.protocol.request import Request
    from robustbench_cure.verify import verify_file

    own = {key: options.pop(key) for key in ("tensor", "against", "source", "out")}
    request = Request(models=(options.pop("model"),), **options)
    return verify_file(file, request, **own, command=shlex.join(["cure-bench", *(words or [])]))


@cli.command()
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory to make.")
def merge(parts: tuple[Path, ...], out: Path) -> None:
    """Join the parts that `evaluate --shard I/K` wrote, and write the report."""
    from robustbench_cure.cli.evaluate import write_and_name
    from robustbench_cure.evaluation.storage import merge_runs

    write_and_name(merge_runs(parts, out), out)


@cli.command()
@click.argument("model", required=False)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Weights file; default: the cache, where evaluate finds it.",
)
@click.option("--start", type=click.Path(path_type=Path), help="Weights to start from, not the card's.")
@click.option("--dataset", metavar="NAME", help="Data set; default: the card's.")
@DATA_DIR
@click.option("--n", type=click.IntRange(2), help="Train on so many random images of the set.")
@click.option("--epochs", type=click.IntRange(1), help="End after so many epochs; the schedule is shortened.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint that a stopped run left.")
@click.option("--time-budget", metavar="TIME", help="Stop after 90s, 45m or 2h, with a checkpoint.")
@click.option(
    "--smoke", is_flag=True, help="Three steps on 64 images, nothing kept; without MODEL: all cards."
)
@click.option("--half", is_flag=True, help="Store the weights in half precision, half the size.")
@DEVICE
@CARDS
def train(model: str | None, **options: object) -> None:
    """Train MODEL by the recipe of its card.

    Ctrl-C and SIGTERM stop it with a checkpoint. On several devices: torchrun --nproc-per-node K
    -m robustbench_cure train MODEL.
    """
    from robustbench_cure.training.command import train_model

    train_model(model, **options)  # type: ignore[arg-type]


@cli.command("list")
@click.argument("what", type=click.Choice(["models", "batteries", "attacks", "datasets"]))
@CARDS
def list_(what: str, cards: tuple[str, ...]) -> None:
    """Show what can be named."""
    click.echo(inventory.listing(what, cards))


@cli.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@CARDS
def validate(files: tuple[Path, ...], cards: tuple[str, ...]) -> None:
    """Check FILES, or every card that can be found, and what they refer to."""
    click.echo(inventory.validate(files, cards))


@cli.command()
@CARDS
def where(cards: tuple[str, ...]) -> None:
    """Say where cards, weights and data are looked for."""
    click.echo(inventory.where(cards))


for _verb in (*geometry_cli.VERBS, *boundary_cli.VERBS, *masking_cli.VERBS, *gate_cli.VERBS):
    cli.add_command(_verb)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command; every failure is one line on standard error and an exit code.

    Exit codes: 0 good, 1 regression or failed check, 2 usage or bad input, 3 run error, 130 interrupted.
    With CURE_BENCH_DEBUG set, a failure that nothing here foresaw shows its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal without ∞ shows a question mark
            stream.reconfigure(errors="replace")
    try:
        words = sys.argv[1:] if arguments is None else arguments
        code = cli(args=words, prog_name="cure-bench", standalone_mode=False, obj=words)
    except CureBenchError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if os.environ.get("CURE_BENCH_DEBUG"):
            raise
        what = f"{type(error).__name__}: {error}"
        _fail(f"unexpected {what}; CURE_BENCH_DEBUG=1 shows where it comes from; please report it", 3)
    except BaseException as error:  # somebody else's code wants to end the program: that is no success
        _fail(f"stopped by {type(error).__name__}: {error}", 3)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"cure-bench: error: {' '.join(message.split())}", err=True)
    sys.exit(code)
