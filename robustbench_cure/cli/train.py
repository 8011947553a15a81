"""Verb `train`: a card's recipe, its data, its start and its output put together."""

from __future__ import annotations

import shlex

import click

from robustbench_cure.cli.options import CARDS, DATA_DIR, DEVICE, PATH, dataset, out, taking
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.request import TrainRequest


@click.command()
@click.argument("model", required=False)
@out("Weights file; default: the cache, where evaluate finds it.")
@click.option("--start", type=PATH, help="Weights to start from, not the card's.")
@dataset("Data set; default: the card's.")
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
@taking(TrainRequest)
def train(request: TrainRequest, model: str | None) -> None:
    """Train MODEL by the recipe of its card.

    Ctrl-C and SIGTERM stop it with a checkpoint. On several devices: torchrun --nproc-per-node K
    -m robustbench_cure train MODEL.
    """
    from robustbench_cure.classifier import resolve_device
    from robustbench_cure.datasets import load_dataset
    from robustbench_cure.progress import ProgressLine
    from robustbench_cure.protocol.cards import ModelCard
    from robustbench_cure.protocol.catalog import catalog, find
    from robustbench_cure.training.output import write_provenance
    from robustbench_cure.training.parallel import world
    from robustbench_cure.training.smoke import smoke_run
    from robustbench_cure.training.stopping import Stopper, seconds
    from robustbench_cure.training.train import load_start
    from robustbench_cure.training.train import train as train_card
    from robustbench_cure.zoo.loading import trained_weights

    budget = seconds(request.time_budget) if request.time_budget else None
    if request.smoke:
        device = resolve_device(request.device)
        for name in [model] if model else sorted(catalog(ModelCard, request.cards)):
            click.echo(smoke_run(find(ModelCard, name, request.cards).card, device))
        return
    if model is None:
        raise UsageError("name a model to train; `cure-bench list models` shows them")
    card = find(ModelCard, model, request.cards).card
    target = request.out or trained_weights(card.id)
    start_module, start_digest = load_start(card, request.cards, request.start)
    data = load_dataset(request.dataset or card.dataset, "train", request.data_dir)
    if request.n is not None:
        data = data.subset(request.n)
    with (
        world(resolve_device(request.device)) as (processes, place),
        Stopper(budget) as stopper,
        ProgressLine(card.id, "steps", silent=processes.rank > 0) as progress,
    ):
        result = train_card(
            card,
            data,
            start_module=start_module,
            device=place,
            out_path=target,
            progress=lambda done, total, _: progress(done, total, card.training.method),
            limit_epochs=request.epochs,
            resume=request.resume,
            stop=stopper,
            world=processes,
            half=request.half,
        )
    if processes.rank > 0:
        return
    if result.batch_parts > 1:
        click.echo(f"memory was short: every batch went through in {result.batch_parts} parts", err=True)
    if result.stopped:
        click.echo(
            f"stopped by {result.stopped} after {result.step} of {result.steps} steps; "
            "the same command with --resume goes on"
        )
        return
    write_provenance(card, data, result, start_digest, target, place)
    figures = ", ".join(f"{name} {value:.1f} %" for name, value in result.figures.items())
    click.echo(f"weights: {target}\n{figures}")
    extra = "".join(f" --cards {shlex.quote(folder)}" for folder in request.cards)
    if request.out is None and card.weights is None:
        click.echo(f"`cure-bench evaluate --model {card.id}{extra}` finds them there")
    else:
        given = f"--weights {shlex.quote(str(target))}"
        click.echo(f"to evaluate them: cure-bench evaluate --model {card.id} {given}{extra}")
