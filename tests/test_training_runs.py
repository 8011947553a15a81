"""What a training run promises: going on after a stop, several processes, little memory, its log."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import METHOD, Data, card, context, quadratic
from torch import nn

from robustbench_cure.adapt import Normalised
from robustbench_cure.cli.main import cli, main
from robustbench_cure.datasets import from_arrays
from robustbench_cure.errors import RunError, UsageError
from robustbench_cure.threat import ThreatModel
from robustbench_cure.training import METHODS, PREPARATIONS
from robustbench_cure.training.cure import curvature_penalty
from robustbench_cure.training.loop import Trainer
from robustbench_cure.training.monitor import DIRECTIONS, SCALES, Scale, measure
from robustbench_cure.training.output import checkpoint_path, in_half_precision
from robustbench_cure.training.parallel import World, split
from robustbench_cure.training.stopping import Stopper, seconds
from robustbench_cure.training.train import train
from robustbench_cure.zoo import build
from robustbench_cure.zoo.loading import load_weights

SEED = "seed = 0\n"


def extended(method: str, keys: str, **options):
    """A tiny card with further keys in its recipe."""
    return card(method, replace=((SEED, SEED + keys),), **options)


def trainer(model_card, data, **options) -> Trainer:
    torch.manual_seed(0)
    model = Normalised(build(model_card.architecture, 10, 1, model_card.architecture_args), (0.3,), (0.4,))
    return Trainer(
        model,
        model_card.training,
        data.images,
        data.labels,
        num_classes=10,
        scale=SCALES["digits"],
        epochs=model_card.training.epochs,
        **options,
    )


def read_log(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


class StopAt:
    """Asks to stop once so many steps were made."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self) -> str:
        self.left -= 1
        return "the test" if self.left < 0 else ""


# --- stopping and going on ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [9, 14])  # at the end of the first epoch, inside the second
def test_a_stopped_run_goes_on_to_the_bytes_of_one_that_was_not(digits, method, step, tmp_path):
    keys = "clip_norm = 1.0\nema = 0.9\n"
    if method == "cure":
        keys += 'direction = "gradient"\n'
    tiny = extended(method, keys, epochs=2)
    whole = train(tiny, digits, start_module=None, out_path=tmp_path / "whole.safetensors")
    path = tmp_path / "parts.safetensors"
    first = train(tiny, digits, start_module=None, out_path=path, stop=StopAt(step))
    assert (first.stopped, first.step, first.steps) == ("the test", step, 18)
    assert not path.exists()
    assert checkpoint_path(path).exists()
    second = train(tiny, digits, start_module=None, out_path=path, resume=True)
    assert second.stopped == ""
    assert second.sha256 == whole.sha256
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not checkpoint_path(path).exists()
    for a, b in zip(second.log, whole.log, strict=True):
        same = {k: v for k, v in vars(a).items() if k != "seconds"}
        assert same == {k: v for k, v in vars(b).items() if k != "seconds"}
    rows = read_log(tmp_path / "parts.csv")
    assert [int(row["epoch"]) for row in rows] == [1, 2]


def test_half_precision_is_stored_and_loaded_as_float32(digits, tmp_path):
    tiny = card("standard", epochs=1)
    full = train(tiny, digits, start_module=None, out_path=tmp_path / "full.safetensors")
    half = train(tiny, digits, start_module=None, out_path=tmp_path / "half.safetensors", half=True)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    net = build(tiny.architecture, 10, 1, tiny.architecture_args)
    assert load_weights(net, tmp_path / "half.safetensors") == half.sha256
    for key, value in net.state_dict().items():
        wanted = full.state_dict[key]
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted.half().to(wanted.dtype))


def test_a_weight_too_large_for_half_precision_is_refused():
    assert in_half_precision({"steps": torch.tensor(70_000)})["steps"] == 70_000
    with pytest.raises(RunError, match="big: does not fit into half precision"):
        in_half_precision({"big": torch.tensor([1.0, 7e4])})


@pytest.mark.parametrize("method", ["standard", "static_fgsm"])
def test_bytes_train_the_network_that_their_float_images_train(method):
    levels = np.random.default_rng(0).integers(0, 256, (80, 1, 8, 8), np.uint8)
    data = from_arrays("noise", "train", levels, np.arange(80) % 10)
    as_bytes = train(card(method), data, start_module=None, limit_epochs=1)
    as_floats = train(card(method), Data(data.images, data.labels), start_module=None, limit_epochs=1)
    assert as_bytes.figures == as_floats.figures
    for name, value in as_bytes.state_dict.items():
        assert torch.equal(value, as_floats.state_dict[name])


def test_training_keeps_grey_levels_as_bytes():
    data = from_arrays("grey", "train", np.zeros((80, 1, 8, 8), np.uint8), np.arange(80) % 10)
    model = Normalised(build("digits_cnn", 10, 1, {"hidden": 16}), (0.3,), (0.4,))
    options = {"num_classes": 10, "scale": SCALES["digits"], "epochs": 1}
    kept = Trainer(model, card("standard").training, data.pixels, data.labels, **options)
    assert kept.x.dtype == torch.uint8
    assert kept.held_out[0].dtype == torch.float32


def test_a_checkpoint_is_asked_for_and_belongs_to_its_run(digits, tmp_path):
    path = tmp_path / "w.safetensors"
    train(card("standard"), digits, start_module=None, out_path=path, stop=StopAt(3))
    with pytest.raises(UsageError, match="go on with --resume"):
        train(card("standard"), digits, start_module=None, out_path=path)
    with pytest.raises(UsageError, match="of another run: recipe differ"):
        train(card("standard", lr=1e-4), digits, start_module=None, out_path=path, resume=True)
    other = Data(digits.images, digits.labels, digest="other")
    with pytest.raises(UsageError, match="of another run: data differ"):
        train(card("standard"), other, start_module=None, out_path=path, resume=True)
    with pytest.raises(UsageError, match="number of epochs"):
        train(card("standard"), digits, start_module=None, out_path=path, resume=True, limit_epochs=1)
    checkpoint_path(path).write_bytes(checkpoint_path(path).read_bytes()[:500])
    with pytest.raises(UsageError, match="not a checkpoint, or damaged"):
        train(card("standard"), digits, start_module=None, out_path=path, resume=True)


def test_a_checkpoint_cannot_run_code(digits, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").touch, ())

    path = tmp_path / "w.safetensors"
    torch.save({"identity": {}, "state": Evil()}, checkpoint_path(path))
    with pytest.raises(UsageError, match="not a checkpoint"):
        train(card("standard"), digits, start_module=None, out_path=path, resume=True)
    assert not (tmp_path / "pwned").exists()


def test_resuming_without_a_checkpoint_begins(digits, tmp_path):
    a = train(card("standard", epochs=1), digits, start_module=None, out_path=tmp_path / "a.safetensors")
    b = train(
        card("standard", epochs=1),
        digits,
        start_module=None,
        out_path=tmp_path / "b.safetensors",
        resume=True,
    )
    assert a.sha256 == b.sha256


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(digits, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    honest = METHODS["standard"]

    def spoilt(model, x, y, recipe, context):
        loss, scalars = honest(model, x, y, recipe, context)
        return (loss * torch.nan if context.iteration == 12 else loss), scalars

    monkeypatch.setitem(METHODS, "standard", spoilt)
    with pytest.raises(
        RunError, match=r"nan in epoch 2, iteration 4 of 9.*last good state is kept in .*w\.check"
    ):
        train(card("standard"), digits, start_module=None, out_path=path)
    state = torch.load(checkpoint_path(path), weights_only=True)["state"]
    assert state["iteration"] == 9
    assert all(v.isfinite().all() for v in state["model"].values())
    assert not path.exists()


def test_time_budgets_are_read_and_kept():
    assert [seconds(t) for t in ("90s", "45m", "1.5h")] == [90, 2700, 5400]
    for text in ("90", "0s", "-1m", "1d", "m"):
        with pytest.raises(UsageError, match="--time-budget"):
            seconds(text)
    stopper = Stopper(0.05)
    assert stopper() == ""
    time.sleep(0.06)
    assert stopper() == "the time budget"
    assert Stopper()() == ""


def test_signals_are_reasons_and_the_second_interrupt_is_at_once():
    with Stopper() as stopper:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopper() == "SIGTERM"
    with Stopper() as stopper:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopper() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_command_stops_on_a_signal_and_goes_on(tmp_path):
    out = tmp_path / "w.safetensors"
    command = [sys.executable, "-m", "robustbench_cure", "train", "digits_normal", "--out", str(out)]
    command += ["--n", "400", "--epochs", "12"]
    # One thread: a tiny network's second one would only wait for other processes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 60
    while not checkpoint_path(out).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped by SIGTERM after" in text
    assert not out.exists()
    with pytest.raises(SystemExit) as end:
        main([*command[3:], "--resume"])
    assert end.value.code == 0
    assert out.exists()
    provenance = json.loads((tmp_path / "w.json").read_text())
    assert provenance["data"]["n"] == 400
    assert provenance["epochs"] == 12
    assert provenance["weights"]["sha256"]
    assert provenance["environment"]["torch"] == torch.__version__


# --- batches in parts --------------------------------------------------------------------------------


def test_a_range_is_cut_into_nearly_equal_pieces():
    assert split(slice(3, 10), 3) == [slice(3, 5), slice(5, 7), slice(7, 10)]
    assert split(slice(0, 2), 4) == [slice(0, 1), slice(1, 2)]
    assert [World(r, 4).share(10) for r in range(4)] == [slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 10)]


@pytest.mark.parametrize("method", METHODS)
def test_short_memory_halves_the_batch_and_changes_nothing_else(digits, method, monkeypatch):
    honest = METHODS[method]
    sizes = []

    def hungry(model, x, y, recipe, context):
        sizes.append(len(x))
        if len(x) > 10:
            raise torch.OutOfMemoryError("out of memory")
        return honest(model, x, y, recipe, context)

    plain = card(method, optimizer="sgd", lr=0.05)  # Adam would magnify rounding: its first steps are signs
    whole = trainer(plain, digits)
    for _ in range(3):
        whole.step()
    monkeypatch.setitem(METHODS, method, hungry)
    parts = trainer(plain, digits)
    for _ in range(3):
        parts.step()
    assert parts.parts == 4
    assert sizes[:7] == [32, 16, 8, 8, 8, 8, 8]
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_memory_for_not_even_one_image_is_a_clear_end(digits, monkeypatch):
    def hungry(model, x, y, recipe, context):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(METHODS, "standard", hungry)
    with pytest.raises(RunError, match="out of memory even for a single image"):
        trainer(card("standard"), digits).step()

    def broken(model, x, y, recipe, context):
        raise RuntimeError("something else")

    monkeypatch.setitem(METHODS, "standard", broken)
    with pytest.raises(RuntimeError, match="something else"):
        trainer(card("standard"), digits).step()


# --- several processes -------------------------------------------------------------------------------

#: Adam would magnify rounding: its first steps are signs.
SGD = {"optimizer": "sgd", "lr": 0.05}
TWO = """
SGD = {"optimizer": "sgd", "lr": 0.05}
import sys
from pathlib import Path
from tiny import Data, card
from robustbench_cure.datasets import load_dataset
from robustbench_cure.training.parallel import world
from robustbench_cure.training.train import train
import torch
torch.set_num_threads(1)
data = load_dataset("digits", "train")
data = Data(data.images[:320].clone(), data.labels[:320].clone())
with world(torch.device("cpu")) as (processes, device):
    for method in ("standard", "pgd_at", "cure"):
        out = Path(sys.argv[1]) / f"{method}.safetensors"
        train(card(method, epochs=1, **SGD), data, start_module=None, out_path=out, world=processes)
"""


def test_two_processes_train_what_one_trains(digits, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for method in ("standard", "pgd_at", "cure"):
        alone = train(card(method, epochs=1, **SGD), digits, start_module=None)
        net = build("digits_cnn", 10, 1, {"hidden": 16})
        load_weights(net, tmp_path / f"{method}.safetensors")
        for key, value in net.state_dict().items():
            assert torch.allclose(value, alone.state_dict[key], atol=1e-4), (method, key)
        # Each process alone would have gone elsewhere: the second half of every batch counts.
        half = card(method, epochs=1, **SGD, replace=(("batch_size = 32", "batch_size = 16"),))
        other = train(half, digits, start_module=None).state_dict
        assert not all(torch.allclose(v, other[k], atol=1e-4) for k, v in net.state_dict().items())


def test_what_cannot_be_shared_is_refused(digits):
    with pytest.raises(UsageError, match="a batch of 32 cannot be shared by 3"):
        train(card("standard"), digits, start_module=None, world=World(0, 3))
    with pytest.raises(UsageError, match="batch-norm over several processes needs CUDA"):
        World(0, 2).adapt(nn.BatchNorm2d(3), torch.device("cpu"))


# --- options of a recipe -----------------------------------------------------------------------------


def test_clipping_shortens_the_gradient_and_keeps_its_direction(digits):
    def step(clip: float) -> tuple[torch.Tensor, float]:
        run = trainer(extended("standard", f"clip_norm = {clip}\n", optimizer="sgd", lr=1.0), digits)
        run.step()
        gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()])
        return gradient, float(gradient.norm())

    free, length = step(0.0)
    cut, short = step(length / 2)
    assert short == pytest.approx(length / 2, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(free, cut, dim=0) > 0.9999
    assert step(length * 2)[1] == pytest.approx(length)


def test_the_average_is_the_exponential_one_and_is_what_is_kept(digits):
    run = trainer(extended("standard", "ema = 0.75\n"), digits)
    expected = None
    for _ in range(4):
        run.step()
        now = [p.detach().clone() for p in run.model.parameters()]
        # The first value is taken as it is.
        expected = (
            now if expected is None else [0.75 * e + 0.25 * p for e, p in zip(expected, now, strict=True)]
        )
    kept = list(run.result.parameters())
    assert all(torch.allclose(k, e, atol=1e-7) for k, e in zip(kept, expected, strict=True))
    assert not all(torch.allclose(k, p) for k, p in zip(kept, run.model.parameters(), strict=True))
    result = train(extended("standard", "ema = 0.9999\n", epochs=1), digits, start_module=None)
    assert result.figures["held_out_clean"] < 50  # nearly the random start: the average, not the last weights


def test_static_images_are_made_once_by_the_start_and_magnified(digits):
    start = Normalised(build("digits_cnn", 10, 1, {"hidden": 16}), (0.3,), (0.4,))
    state = train(card("standard", epochs=20), digits, start_module=None).state_dict
    start.net.load_state_dict(state)
    x, y = digits.images[:100], digits.labels[:100]
    with torch.no_grad():
        right = start(x).argmax(1) == y
    assert right.float().mean() > 0.8
    for method in PREPARATIONS:
        recipe = card(method, replace=(("steps = 2", "steps = 20"),) if "deepfool" in method else ()).training
        once = PREPARATIONS[method](start, x, y, recipe, 10)
        assert once.min() >= 0
        assert once.max() <= 1
        assert torch.equal(once[~right], x[~right])
        assert (once[right] != x[right]).flatten(1).any(1).all()
        twice = PREPARATIONS[method](start, x, y, recipe.model_copy(update={"magnification": 2.0}), 10)
        assert torch.allclose(twice, (x + 2 * (once - x)).clamp(0, 1), atol=1e-6)
        with torch.no_grad():
            fooled = start(once).argmax(1) != y
        assert fooled[right].float().mean() > (0.95 if method == "static_deepfool" else 0.03)
    fgsm = PREPARATIONS["static_fgsm"](start, x, y, card("static_fgsm").training, 10)
    assert (fgsm - x).abs().max() <= 10 / 255 + 1e-6
    seen = []

    def spy(model, images, labels, recipe, context):
        seen.append(images.clone())
        return honest(model, images, labels, recipe, context)

    honest = METHODS["static_deepfool"]
    METHODS["static_deepfool"] = spy
    try:
        train(card("static_deepfool", start="other", epochs=2), digits, start_module=start)
    finally:
        METHODS["static_deepfool"] = honest
    first, second = (torch.cat(seen[k : k + 9]).flatten(1) for k in (0, 9))
    assert {tuple(r.tolist()) for r in first} == {tuple(r.tolist()) for r in second}


def test_along_the_gradient_the_penalty_is_that_of_the_gradient(digits):
    A, b, loss = quadratic(7)
    u = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradient = u @ A + b
    z = gradient / gradient.norm(dim=1, keepdim=True)
    penalty, parts = curvature_penalty(loss, u, 0.5, 2, "gradient")
    assert torch.allclose(parts.direction, z)
    assert torch.allclose(penalty, (0.5 * z @ A).square().sum(1).mean())


def test_the_regulariser_is_reduced_only_where_the_card_says_so(digits):
    torch.manual_seed(0)
    model = Normalised(build("digits_cnn", 10, 1, {"hidden": 16}), (0.3,), (0.4,))
    x, y = digits.images[:16], digits.labels[:16]
    kinds = []
    model.net.register_forward_hook(lambda module, given, out: kinds.append(out.dtype))
    full = card("cure", replace=(('precision = "fp32"', 'precision = "bf16"'),))
    half = card("cure", replace=((SEED, SEED + 'regulariser_precision = "bf16"\n'),))
    values = {}
    for name, tiny in {"full": full, "half": half}.items():
        kinds.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            _, scalars = METHODS["cure"](model, x, y, tiny.training, context())
        values[name] = float(scalars["regulariser"])
        assert kinds == [torch.bfloat16] + [torch.float32 if name == "full" else torch.bfloat16] * 2
    assert values["half"] == pytest.approx(values["full"], rel=0.1)


# --- the log -----------------------------------------------------------------------------------------


def test_the_monitor_measures_the_curvature_of_a_linear_network():
    """Cross-entropy over linear logits has the Hessian W'(diag p - pp')W, known in full."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False))
    model = Normalised(net, (0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    x, y = torch.rand(64, 3, 2, 2), torch.arange(64) % 5
    h = 1e-2
    figures = measure(model, x, y, Scale(ThreatModel.parse("linf", "8/255"), h), 0)
    u = ((x - model.mean) / model.std).flatten(1)
    weight = net[1].weight.detach()
    hz, frobenius = [], []
    for row, label in zip(u, y, strict=True):
        p = (weight @ row).softmax(0)
        hessian = weight.T @ (torch.diag(p) - p[:, None] * p[None]) @ weight
        target = nn.functional.one_hot(label, 5).float()
        z = (weight.T @ (p - target)).sign()
        hz.append(float((hessian @ (z / z.norm())).norm()))
        frobenius.append(float(hessian.norm()))
    assert figures.hz == pytest.approx(sum(hz) / 64, rel=0.02)
    assert figures.frobenius == pytest.approx(sum(frobenius) / 64, rel=0.2)  # an estimate from few directions
    assert DIRECTIONS >= 10
    with torch.no_grad():
        assert figures.clean == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
    assert figures.pgd <= figures.clean
    assert measure(model, x, y, Scale(ThreatModel.parse("linf", "8/255"), h), 0) == figures


def test_the_monitor_attacks_with_the_radius_of_the_published_table():
    """A second transcription: CURE paper, table 2 (8/255); supplement (SVHN, 12/255)."""
    found = {name: (scale.threat.norm, 255 * scale.threat.eps, scale.h) for name, scale in SCALES.items()}
    assert found == {
        "cifar10": ("linf", 8, 1.5),
        "svhn": ("linf", 12, 1.25),
        "digits": ("linf", 51, 1.2),
    }


def test_the_log_is_on_disk_as_csv_and_for_tensorboard(digits, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = tmp_path / "w.safetensors"
    train(card("cure"), digits, start_module=None, out_path=path, stop=StopAt(12))
    log = train(card("cure"), digits, start_module=None, out_path=path, resume=True).log
    rows = read_log(tmp_path / "w.csv")
    assert len(rows) == len(log) == 3
    for row, entry in zip(rows, log, strict=True):
        assert {key: float(value) for key, value in row.items()} == pytest.approx(vars(entry))
        assert float(row["hz"]) > 0
        assert float(row["frobenius"]) > 0
    events = accumulator.EventAccumulator(str(tmp_path / "w.tensorboard"))
    events.Reload()
    for name in ("loss", "regulariser", "clean", "pgd", "hz", "frobenius", "lr"):
        points = events.Scalars(name)
        assert [point.step for point in points] == [1, 2, 3]
        assert [point.value for point in points] == pytest.approx(
            [getattr(row, name) for row in log], rel=1e-5
        )


# --- the command -------------------------------------------------------------------------------------


def test_a_smoke_run_tries_a_recipe_without_data_or_start(tmp_path):
    done = CliRunner().invoke(cli, ["train", "svhn_resnet18_cure", "--smoke", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "svhn_resnet18_cure: cure, 3 steps of 8, loss" in done.output
    assert math.isfinite(float(done.output.split("loss ")[1].split(",")[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "name a model to train"),
        (["train", "digits_normal", "--time-budget", "soon"], "write a number and a unit"),
        (["train", "digits_normal", "--start", "x.safetensors"], "starts from random weights"),
        (["train", "digits_cure", "--start", "x.safetensors"], "cannot be read"),
        (["train", "resnet18_cure"], "model 'resnet18_normal' has no weights yet"),
        (["train", "digits_normal", "--n", "5000"], "has only 1297 train samples"),
    ],
)
def test_bad_requests_are_one_line(arguments, message, tmp_path):
    done = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "w.safetensors")])
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_every_method_has_a_recipe_in_these_tests():
    assert set(METHOD) == set(METHODS)
