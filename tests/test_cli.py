"""The command as people use it: quick answers, whole runs, runs cut short, split and joined."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from made import BATTERY_CARD
from PIL import Image
from safetensors import safe_open

from robustbench_cure.cli import inventory
from robustbench_cure.cli import main as cli
from robustbench_cure.cli.main import main
from robustbench_cure.datasets import DATASETS
from robustbench_cure.evaluation.record import Record

QUICK = ("--help", "list models", "list batteries", "list attacks", "list datasets", "validate", "where")

OWN = """\
import os, time
import torch
from torch import nn

class Linear(nn.Sequential):
    def __init__(self, shape):
        pixels = shape[0] * shape[1] * shape[2]
        super().__init__(nn.Flatten(), nn.Linear(pixels, 3))
        with torch.no_grad():
            self[1].weight.copy_(torch.linspace(1, 40, 3 * pixels).view(3, pixels).sin())
            self[1].bias.copy_(-self[1].weight.sum(1) / 2)

    def forward(self, x):
        time.sleep(float(os.environ.get("NAP", "0")))
        return super().forward(x)

class Constant(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] * 1.0

def grey(): return Linear((1, 2, 2))
def colour(): return Linear((3, 4, 4))
def constant(): return Constant()
"""

TOY = "--model own_nets:grey --battery tiny --dataset npz --data-dir toy.npz"
#: Three shards, the last of them not full.
N = 1100


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model, a battery and images of one's own."""
    (tmp_path / "cards" / "attacks").mkdir(parents=True)
    (tmp_path / "cards" / "attacks" / "tiny.toml").write_text(BATTERY_CARD)
    (tmp_path / "own_nets.py").write_text(OWN)
    generator = np.random.default_rng(0)
    x = generator.uniform(0, 1, (N, 1, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "toy.npz", x=x, y=generator.integers(0, 3, N))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CURE_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CURE_BENCH_CARDS", str(tmp_path / "cards"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    # Cards are read once in a process for each set of folders.
    from robustbench_cure.protocol.catalog import catalog

    catalog.cache_clear()
    yield tmp_path
    catalog.cache_clear()
    sys.modules.pop("own_nets", None)


@pytest.fixture
def command(capsys):
    """Run a command line in this process; returns what it printed."""

    def run(line, code=0):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(line))
        printed = capsys.readouterr()
        assert stop.value.code == code, printed.err
        return printed

    return run


def process(line, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "robustbench_cure", *shlex.split(line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# --- quick answers ------------------------------------------------------------------------------------


def test_what_needs_no_torch_imports_none():
    """Half a second each then, where torch alone would take two."""
    code = f"""\
import contextlib, io, sys
from robustbench_cure.cli.main import main
for line in {QUICK}:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main(line.split())
    except SystemExit as stop:
        assert stop.code == 0
    assert out.getvalue().strip(), line
heavy = {{"torch", "torchvision", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "jinja2", "PIL"}}
sys.exit(",".join(sorted(heavy & sys.modules.keys())) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "line",
    ["", *QUICK[:6], *(f"{verb} --help" for verb in ("evaluate", "report", "merge", "train", "validate"))],
)
def test_what_is_printed_fits_80_columns(command, line):
    printed = command(line).out
    assert printed.strip()
    assert max(map(len, printed.split("\n"))) <= 80


def test_the_module_is_the_command(command):
    done = subprocess.run(
        [sys.executable, "-m", "robustbench_cure", "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == command("--version").out
    assert done.stdout.startswith("cure-bench, version ")


def test_the_listed_data_sets_are_those_that_load(command):
    assert inventory.DATASET_SUMMARIES.keys() == DATASETS.keys()
    lines = command("list datasets").out.split("\n")[1:]
    assert [line.split()[0] for line in lines if line and line[0] != " "] == list(DATASETS)


def test_listings_wrap_words_and_lose_none(place, command):
    name = "a battery with " + "quite " * 30 + "a name"
    text = BATTERY_CARD.replace('"tiny"', '"wordy"', 1).replace('name = "tiny"', f'name = "{name}"')
    (place / "cards" / "attacks" / "wordy.toml").write_text(text)
    printed = command("list batteries").out
    assert max(map(len, printed.split("\n"))) <= 80
    assert printed.count("quite") == 30


# --- whole runs ---------------------------------------------------------------------------------------


def test_a_run_writes_the_files_it_names_and_reports_can_be_written_again(tmp_path, command):
    models = ("digits_normal", "digits_cure")
    line = f"evaluate --model {models[0]} --model {models[1]} --battery digits --n 8 --out {tmp_path}/X"
    printed = command(line)
    out = tmp_path / "X"
    assert f"report: {out}/report.html" in printed.out
    names = re.search(r"tables: (.*) in ", printed.out)[1].split(", ")
    reports = [out / name for name in ("report.html", *names)]
    assert {path.name for path in reports} == {"report.html", "results.csv", "results.md", "results.tex"}
    assert {path.name for path in out.iterdir()} == {path.name for path in reports} | set(models)
    for model in models:
        record = Record.load(out / model)
        assert record.manifest.environment.command == f"cure-bench {line}"
        assert (record.n, record.manifest.status, record.manifest.model.id) == (8, "complete", model)
        assert model in printed.out
    table = [text for text in printed.out.split("\n") if str(out) not in text]
    assert max(map(len, table + printed.err.split("\n"))) <= 80
    before = [path.read_bytes() for path in reports]
    again = command(f"report {out}")
    assert [path.read_bytes() for path in reports] == before
    assert again.out == printed.out
    command(f"report {out}/{models[0]} {out}/{models[1]} --out {tmp_path}/elsewhere")
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == sorted(p.name for p in reports)


def test_a_pipe_gets_plain_lines(place, command, monkeypatch):
    monkeypatch.setattr("robustbench_cure.progress.INTERVAL", 0.0)
    lines = command(f"evaluate {TOY} --out run").err.split("\n")
    assert lines[0] == "tiny"
    assert lines[1].startswith(f"npz:toy all, {N} of {N} samples; device ")
    assert lines[-1] == ""
    assert len(lines) > 6
    for line in lines[2:-1]:
        told = r"own_nets_grey: \d+/1100 samples, \d+ s(, \d+ s left)?, (clean pass|FGSM|shard written)"
        assert re.fullmatch(told, line)


def test_a_run_without_a_place_makes_one(place, command):
    out = command(f"evaluate {TOY} --n 10").out
    (folder,) = (place / "runs").iterdir()
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", folder.name)
    assert f"report: runs/{folder.name}/report.html" in out


def test_a_network_without_parameters_can_be_judged(place, command):
    command(f"evaluate {TOY} --n 20 --out run".replace(":grey", ":constant"))
    info = Record.load(place / "run" / "own_nets_constant").manifest.model
    assert (info.parameters, info.architecture) == (0, "Constant")


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_mean_and_std_stand_before_a_network_of_ones_own(place, command, kind):
    grey = np.random.default_rng(3).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(12) // 4
    if kind == "npz":
        np.savez("mine.npz", x=grey, y=labels)
        where = "--dataset npz --data-dir mine.npz"
    else:
        for k, image in enumerate(grey):
            path = Path("mine/test") / "abc"[k // 4] / f"{k:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        where = "--dataset folder --data-dir mine"
    command(
        f"evaluate --model own_nets:colour --battery tiny {where} --mean .5,.4,.3 --std .2,.3,.4 --out run"
    )
    record = Record.load(place / "run" / "own_nets_colour")
    assert record.manifest.data.name == f"{kind}:mine"
    net = sys.modules["own_nets"].colour()
    x = torch.from_numpy(grey.transpose(0, 3, 1, 2).copy()).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    logits = net((x - mean) / std).detach()
    rows = record.samples.sort_values("sample_id", ignore_index=True)
    assert rows["clean_pred"].tolist() == logits.argmax(1).tolist()
    own = logits.gather(1, torch.from_numpy(labels)[:, None]).squeeze(1)
    others = logits.scatter(1, torch.from_numpy(labels)[:, None], -torch.inf).amax(1)
    assert np.allclose(rows["clean_margin"].astype(float), own - others, atol=1e-5)


def test_saved_adversarials_lie_in_the_run(place, command):
    command(f"evaluate {TOY} --n 20 --save-adversarials --out run")
    (file,) = (place / "run" / "own_nets_grey" / "adversarials").iterdir()
    with safe_open(file, "pt") as saved:
        x_adv = saved.get_tensor("fgsm")
    rows = Record.load(place / "run" / "own_nets_grey").samples
    assert x_adv.shape == (int(rows["fgsm.attacked"].sum()), 1, 2, 2)


def test_trained_weights_are_used_as_the_command_says(place, command):
    said = command("train digits_normal --epochs 1 --out 'my weights.safetensors'").out
    line = said.strip().split("\n")[-1].partition("cure-bench ")[2]
    assert shlex.split(line) == [
        "evaluate",
        "--model",
        "digits_normal",
        "--weights",
        "my weights.safetensors",
    ]
    command(f"{line} --battery tiny --n 10 --dataset digits --out run")
    info = Record.load(place / "run" / "digits_normal").manifest.model
    assert info.source == "weights given: my weights.safetensors"
    assert info.name.endswith("(my weights.safetensors)")


def test_trained_weights_of_a_card_without_its_own_are_found(place, command):
    models = place / "cards" / "models"
    models.mkdir()
    source = Path(inventory.__file__).parents[2] / "models" / "digits" / "digits_normal.toml"
    text = source.read_text().split("[weights]")[0].replace('id = "digits_normal"', 'id = "mine"')
    (models / "mine.toml").write_text(text)
    said = command("train mine --epochs 1").out
    assert "weights: " in said
    assert "`cure-bench evaluate --model mine` finds them there" in said
    command("evaluate --model mine --battery tiny --n 10 --out run")
    assert Record.load(place / "run" / "mine").n == 10


def test_the_help_names_every_verb_once_under_what_it_is_for():
    listed = [verb for verbs in cli.SECTIONS.values() for verb in verbs]
    assert sorted(listed) == sorted(cli.cli.commands)


# --- runs cut short, split and joined -----------------------------------------------------------------


def table(run: Path) -> bytes:
    return (run / "own_nets_grey" / "samples.parquet").read_bytes()


def test_parts_of_a_run_join_to_the_whole(place, command):
    command(f"evaluate {TOY} --out whole")
    for part in (1, 2):
        said = command(f"evaluate {TOY} --shard {part}/2 --out part{part}").out
        assert f"part{part}" in said
        assert "cure-bench merge" in said
        assert not (place / f"part{part}" / "report.html").exists()
    command("merge part2 part1 --out joined")
    assert table(place / "joined") == table(place / "whole")
    for name in ("results.md", "results.tex"):
        assert (place / "joined" / name).read_bytes() == (place / "whole" / name).read_bytes()
    joined, whole = (pd.read_csv(place / name / "results.csv") for name in ("joined", "whole"))
    assert joined.drop(columns="seconds").equals(whole.drop(columns="seconds"))
    assert (place / "joined" / "report.html").exists()
    assert len(pd.read_parquet(place / "joined" / "own_nets_grey" / "samples.parquet")) == N


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_cut_short_goes_on_to_the_same_bytes(place, command, how):
    command(f"evaluate {TOY} --out whole --batch-size 64")
    line = f"evaluate {TOY} --batch-size 64 --out cut"
    work = process(line, env=os.environ | {"NAP": "0.03"})
    shards = place / "cut" / "own_nets_grey" / "shards"
    try:
        deadline = time.monotonic() + 60
        while not (shards / "0000.json").exists() and work.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        work.send_signal(how)
        out, err = work.communicate(timeout=60)
    finally:
        work.kill()
    assert not (shards / "0002.json").exists()
    assert not (place / "cut" / "own_nets_grey" / "samples.parquet").exists()
    assert out == ""
    if how == signal.SIGINT:
        assert work.returncode == 130
        (last,) = err.splitlines()[2:]  # after the two lines that every run begins with
        assert last.startswith("cure-bench: error: interrupted")
        assert "--resume --out cut" in last
        assert [path for path in shards.iterdir() if path.name.startswith(".")] == []
    before = (shards / "0000.parquet").stat().st_mtime_ns
    command(f"{line} --resume")
    assert (shards / "0000.parquet").stat().st_mtime_ns == before
    assert table(place / "cut") == table(place / "whole")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_a_terminal_that_lacks_a_character_gets_a_question_mark(encoding):
    done = subprocess.run(
        [sys.executable, "-m", "robustbench_cure", "list", "batteries"],
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert ("l∞" if encoding == "utf-8" else "l?") + " 4/255" in " ".join(
        done.stdout.decode(encoding).split()
    )
