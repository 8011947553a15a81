"""The command `cure-bench`: its verbs in sections, its exit codes, and one line for every error."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Any, NoReturn

import click

from robustbench_cure.cli import (
    boundary,
    evaluate,
    gate,
    geometry,
    inventory,
    masking,
    site,
    train,
    verify,
)
from robustbench_cure.errors import CureBenchError
from robustbench_cure.version import __version__


class StoppedError(CureBenchError):
    """Ctrl-C; the message may say what is left and how to go on."""

    exit_code = 130


#: Verbs by what they are for, in the order of the help.
SECTIONS = {
    "Evaluate": ("evaluate", "report", "merge", "list", "where", "validate"),
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

    Without options, `cure-bench evaluate` evaluates the embedded digits models and writes a report.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _verb in (
    *(evaluate.evaluate, evaluate.report, evaluate.merge),
    *(inventory.list_, inventory.where, inventory.validate),
    *(verify.verify_adv, *gate.VERBS, *masking.VERBS),
    *(site.site, site.export, site.import_numbers),
    *(train.train, *geometry.VERBS, *boundary.VERBS),
):
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
