"""`cure-bench verify-adv`: other people's adversarial examples, checked as our own attacks are.

What holds is stored, see `robustbench_cure.evaluation.external`, and lowers the best known number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robustbench_cure.cli.options import (
    BATCH_SIZE,
    CARDS,
    DATA,
    DEVICE,
    MODEL_HELP,
    NETWORK,
    PATH,
    out,
    taking,
)
from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.request import VerifyRequest
from robustbench_cure.stats import Rate

if TYPE_CHECKING:
    import pandas as pd

    from robustbench_cure.evaluation.external import Evidence, Submission
    from robustbench_cure.evaluation.record import Record
    from robustbench_cure.protocol.cards import Battery


@click.command("verify-adv")
@click.argument("file", type=PATH)
@click.option("--model", required=True, metavar="ID", help=MODEL_HELP + ".")
@click.option("--battery", metavar="ID", help="Whose threat model counts; default: the card's.")
@click.option("--against", multiple=True, type=PATH, help="Run whose numbers it lowers; repeatable.")
@click.option("--source", default="", help="Who made the images, and how; printed on the leaderboard.")
@click.option("--tensor", default="", metavar="NAME", help="Which tensor, where the file holds several.")
@DATA
@NETWORK
@DEVICE
@BATCH_SIZE
@out("Folder; default: runs/external-<time>.")
@CARDS
@taking(VerifyRequest)
def verify_adv(request: VerifyRequest, file: Path, model: str) -> int:
    """Check other people's adversarial examples.

    What holds lowers the best known number on the site, as external.

    FILE is .safetensors (ids as a JSON list under `sample_ids` of the metadata) or .npz (`x_adv`, `ids`);
    images are (N, C, H, W), float in [0, 1]. Without ids: the first N of the split, in its order. Exit
    code 1: an image was refused, or none breaks a sample.
    """
    from robustbench_cure.evaluation.external import COLUMNS, Evidence, Submission, check, match, read_images
    from robustbench_cure.evaluation.provenance import environment
    from robustbench_cure.evaluation.storage import find_records, now
    from robustbench_cure.loading import load_all, named_battery, named_models

    given = read_images(file, request.tensor)
    runs = {run: find_records((run,)) for run in request.against}
    models = named_models(replace(request, models=(model,)))
    battery = named_battery(request.battery, models, request.cards)
    (classifier,), data = load_all(models, replace(request, models=(model,)), battery)
    originals = match(given, data, file)
    about = originals.info()
    submission = Submission(
        source=request.source,
        file=file.name,
        file_sha256=given.sha256,
        model=classifier.model_info(),
        battery=battery.id,
        battery_version=battery.version,
        threat=battery.threat,
        data=about.model_copy(update={"total": about.total or len(data)}),
        environment=environment(classifier.device, request.command),
        checked=now(),
    )
    records = _concerned(submission, runs)  # before anything is checked or said
    table = check(classifier, battery, originals, given.images)
    for line in _found(table, battery):
        click.echo(line)
    broken = bool((table["broken"] & table["correct"]).any())
    if broken:
        place = request.out or Path("runs") / f"external-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
        evidence = Evidence(submission, table[list(COLUMNS)])
        evidence.save(place)
        for line in _lowered(evidence, records):
            click.echo(line)
        click.echo(f"evidence: {place}; `cure-bench site` takes it into account where it lies among the runs")
    return int(not broken or bool((table["violation"] != "").any()))


def _concerned(submission: Submission, runs: Mapping[Path, Sequence[Record]]) -> list[Record]:
    """The records that a file is about; a run that has none was named by mistake."""
    found = []
    for run, records in runs.items():
        own = [record for record in records if submission.applies_to(record)]
        if not own:
            about = f"{submission.model.id}, {submission.data.name} and {submission.threat}"
            raise UsageError(f"--against {run}: no record there is about {about}")
        found += own
    return found


def _found(table: pd.DataFrame, battery: Battery) -> list[str]:
    refused = Counter(table.loc[table["violation"] != "", "violation"])
    n, broken = len(table), int((table["broken"] & table["correct"]).sum())
    correct = int(table["correct"].sum())
    lines = [
        f"{n} images under {battery.threat}: {n - sum(refused.values())} admitted; "
        f"they break {broken} of the {correct} samples that the model classifies correctly"
    ]
    lines += [f"  {count} refused: {reason}" for reason, count in sorted(refused.items())]
    return lines


def _lowered(evidence: Evidence, records: Sequence[Record]) -> list[str]:
    from robustbench_cure.report.table import clean_text
    from robustbench_cure.report.wording import interval, percent

    lines = []
    for record in records:
        name = clean_text(f"{record.manifest.model.id}, {record.manifest.battery.id}, n = {record.n}")
        before = record.worst_case_accuracy
        left = record.worst_case & ~evidence.breaks(record)
        after = Rate(int(left.sum()), record.n)
        if after == before:
            lines.append(f"{name}: {percent(before)} stays: our attacks broke these samples too")
        else:
            words = [f"{percent(rate)} {interval(rate)}" for rate in (before, after)]
            lines.append(f"{name}: {words[0]} is now {words[1]}, external")
    return lines
