"""The geometry commands: closed forms for curve and plane, files, going on, equal bytes, bad input."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from made import invoke
from mpl_toolkits.mplot3d import Axes3D
from torch import nn

from robustbench_cure import files as kept
from robustbench_cure import load_dataset, load_model
from robustbench_cure.adapt import Normalised
from robustbench_cure.classifier import Classifier
from robustbench_cure.cli import boundary, geometry
from robustbench_cure.cli.main import cli
from robustbench_cure.datasets import from_arrays
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry.bounds import THRESHOLD, TwoClass, theorem
from robustbench_cure.geometry.curve import robust_rows
from robustbench_cure.geometry.hessian import alignment, spectrum
from robustbench_cure.geometry.lanczos import lanczos
from robustbench_cure.geometry.plane import Grid, normal_plane, scan
from robustbench_cure.geometry.space import normalised_space
from robustbench_cure.protocol.defaults import DEFAULTS, defaults_of
from robustbench_cure.studies import bounds as bounds_study
from robustbench_cure.studies import curvature as curvature_study
from robustbench_cure.studies import curve as curve_study
from robustbench_cure.studies import engine, plots
from robustbench_cure.studies import surface as surface_study
from robustbench_cure.studies.engine import Study
from robustbench_cure.studies.plots import FORMATS

pytestmark = pytest.mark.usefixtures("svg_only")


def refused(*arguments: str) -> str:
    with pytest.raises((UsageError, click.ClickException)) as caught:
        CliRunner().invoke(
            cli, [*arguments, "--device", "cpu"], standalone_mode=False, catch_exceptions=False
        )
    return str(caught.value)


# --- closed forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_curve_of_an_affine_model_is_that_of_its_radii(affine, norm):
    generator = np.random.default_rng(0)
    # Two classes: with more, the runner-up that PGD follows need not be the nearest.
    model = affine(generator.normal(size=(2, 12)), generator.normal(size=2) * 0.1, (3, 2, 2), batch_size=8)
    x = torch.rand((40, 3, 2, 2), generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3  # far from the box
    y = torch.from_numpy(model.logits(x).argmax(1))
    y[:5] = 1 - y[:5]  # misclassified from the start
    radii = model.radii(x, y, norm).min(1)
    eps = [Fraction(0), Fraction(1, 100), Fraction(1, 50), Fraction(1, 25), Fraction(1, 10)]
    alive = robust_rows(model.classifier, x, y, norm=norm, eps=eps, steps=40, loss="margin")
    for row, radius in zip(alive.numpy(), eps, strict=True):
        sure = np.abs(radii - float(radius)) > 0.02 * float(radius)
        assert (row == (radii > float(radius)))[sure].all()
    assert alive[0].tolist() == [False] * 5 + [True] * 35
    assert (alive[1:] <= alive[:-1]).all()
    with pytest.raises(ValueError, match="ascend"):
        robust_rows(model.classifier, x, y, norm=norm, eps=[Fraction(1), Fraction(0)])


def test_the_plane_of_an_affine_model_has_its_boundary_at_the_distance(affine):
    generator = np.random.default_rng(1)
    model = affine(generator.normal(size=(2, 12)), [0.0, 0.0], (3, 2, 2), batch_size=100)
    x = torch.rand((1, 3, 2, 2), generator=torch.Generator().manual_seed(1))
    y = torch.from_numpy(model.logits(x).argmax(1))
    distance = model.radii(x, y, "l2").min()
    plane = normal_plane(model.classifier, x[0])
    assert plane.reached
    assert plane.distance == pytest.approx(1.02 * distance, rel=1e-3)
    assert float((plane.n * plane.v).sum()) == pytest.approx(0, abs=1e-5)
    assert float(plane.n.norm()) == pytest.approx(1, abs=1e-5)
    assert float(plane.v.norm()) == pytest.approx(1, abs=1e-5)
    grid = scan(model.classifier, plane, int(y), reach=2 * plane.distance, points=41)
    inside = grid.along < distance
    # The boundary is a line across the normal: rows before it are the label's, rows beyond are not.
    clear = (grid.along - distance).abs() > 1e-3
    expected = torch.where(inside, int(y), 1 - int(y))
    assert (grid.labels[clear] == expected[clear][:, None]).all()
    assert (grid.loss[clear][inside[clear]] < THRESHOLD).all()
    assert torch.equal(normal_plane(model.classifier, x[0], seed=0).v, plane.v)
    assert not torch.equal(normal_plane(model.classifier, x[0], seed=1).v, plane.v)


def test_the_two_class_loss_crosses_log_two_where_the_label_changes(affine):
    model = affine(np.random.default_rng(2).normal(size=(4, 12)), [0.1, 0, -0.1, 0], (3, 2, 2))
    space = TwoClass(normalised_space(model.classifier))
    u = torch.rand((200, 3, 2, 2), generator=torch.Generator().manual_seed(2)) * 4 - 2
    y = torch.arange(200) % 4
    right = torch.from_numpy(model.logits(u).argmax(1)) == y
    assert ((space.losses(u, y) < THRESHOLD) == right).all()
    assert pytest.approx(math.log(2)) == THRESHOLD


def test_the_theorem_speaks_of_the_label_against_the_best_other_class(affine):
    model = affine(np.random.default_rng(4).normal(size=(4, 12)) * 0.3, [0.0] * 4, (3, 2, 2))
    u = torch.rand((30, 3, 2, 2), generator=torch.Generator().manual_seed(4))
    order = np.argsort(-model.logits(u), axis=1)
    rows = np.arange(30)
    margin = model.logits(u)[rows, order[:, 0]] - model.logits(u)[rows, order[:, 1]]
    slope = np.linalg.norm(model.weight[order[:, 0]] - model.weight[order[:, 1]], axis=1)
    space = normalised_space(model.classifier)
    found = theorem(space, u, torch.from_numpy(order[:, 0].copy()), h=0.01, iterations=6)
    assert np.allclose(found.c, math.log(2) - np.log1p(np.exp(-margin)), atol=1e-5)
    assert np.allclose(found.gradient_norm, slope / (1 + np.exp(margin)), rtol=1e-3)


def test_the_theorem_holds_on_two_affine_classes_for_small_steps(affine):
    """log(1 + exp(-J)) with J linear: the bounds are those of its quadratic model, both along the normal."""
    model = affine(np.random.default_rng(3).normal(size=(2, 12)) * 0.3, [0.0, 0.0], (3, 2, 2))
    space = normalised_space(model.classifier)
    u = torch.rand((30, 3, 2, 2), generator=torch.Generator().manual_seed(3))
    y = torch.from_numpy(model.logits(u).argmax(1))
    found = theorem(space, u, y, h=0.05, iterations=6)
    slope = float(np.linalg.norm(model.weight[0] - model.weight[1]))
    margin = torch.from_numpy(np.abs(model.logits(u)[:, 0] - model.logits(u)[:, 1]))
    p = torch.sigmoid(-margin)
    assert torch.allclose(found.gradient_norm, p * slope, rtol=1e-3)
    assert torch.allclose(found.nu, p * (1 - p) * slope**2, rtol=0.05)
    assert torch.allclose(found.along, found.gradient_norm, rtol=1e-3)  # the Hessian is along the gradient
    assert torch.allclose(found.bounds.lower, found.bounds.upper, rtol=1e-2)
    assert torch.allclose(found.quadratic, found.bounds.lower, rtol=1e-2)
    assert torch.allclose(found.deepfool, margin / slope, rtol=1e-3)  # without the overshoot


# --- the commands ------------------------------------------------------------------------------------


def test_curvature_writes_what_the_functions_give(tmp_path):
    out = tmp_path / "c"
    done = invoke(
        "curvature", "--model", "digits_cure", "--model", "digits_normal", "--n", "3", "--out", str(out)
    )
    assert done.exit_code == 0
    samples = pd.read_csv(out / "samples.csv")
    assert list(samples["model"]) == ["digits_cure"] * 3 + ["digits_normal"] * 3
    profile = pd.read_csv(out / "profile.csv")
    assert len(profile) == 128
    data = load_dataset("digits").subset(3)
    space = normalised_space(load_model("digits_cure", device="cpu"))
    values = torch.stack(
        [
            spectrum(space, u, y, h=1.2).values
            for u, y in zip(space.inputs(data.images), data.labels, strict=True)
        ]
    )
    own = profile[profile["model"] == "digits_cure"]
    assert np.allclose(own["mean"], values.double().mean(0), atol=1e-5)
    assert np.allclose(samples["largest"][:3], values[:, 0], atol=1e-5)
    assert np.allclose(own["std"], values.double().std(0, correction=0), atol=1e-5)
    u = space.inputs(data.images)
    for row in range(3):
        top = spectrum(space, u[row], data.labels[row], h=1.2).vector
        gradient = space.gradients(u[row, None], data.labels[row, None])
        assert samples["alignment"][row] == pytest.approx(float(alignment(gradient, top[None])), abs=1e-4)
    mean = samples.groupby("model")["hz"].mean()
    assert mean["digits_cure"] < 0.2 * mean["digits_normal"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["step_h"] == 1.2
    assert {"profile.svg", "alignment.svg", "index.html"} <= set(manifest["files"])
    page = (out / "index.html").read_text()
    assert "data:image/svg+xml;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert max(map(len, done.output.splitlines()[:3])) <= 80


def test_an_interrupted_profile_goes_on_to_equal_bytes(tmp_path, monkeypatch):
    common = ("curvature", "--model", "digits_pgd_at", "--n", "4", "--directions", "2", "--iterations", "3")
    invoke(*common, "--out", str(tmp_path / "whole"))
    calls = []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return spectrum(*arguments, **options)

    monkeypatch.setattr(kept, "INTERVAL", 0.0)
    monkeypatch.setattr(curvature_study, "spectrum", stopping)
    stopped = CliRunner().invoke(cli, [*common, "--out", str(tmp_path / "parts")])
    assert stopped.exit_code != 0
    found = np.load(tmp_path / "parts" / "spectra-digits_pgd_at.npz")["eigenvalues"]
    assert found.shape == (2, 64)
    calls[:] = [1] * 3  # it stops no more, and counts
    invoke(*common, "--out", str(tmp_path / "parts"))
    assert len(calls) == 3 + 2  # the other two were there
    names = {path.name for path in (tmp_path / "whole").iterdir()} - {"manifest.json", "index.html"}
    assert {"samples.csv", "profile.csv", "profile.svg", "alignment.svg", "spectra-digits_pgd_at.npz"} < names
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    other = refused(*common, "--out", str(tmp_path / "parts"))
    assert "already holds results" in other
    (tmp_path / "parts" / "manifest.json").unlink()
    assert "of another measurement" in refused(*common, "--step", "0.3", "--out", str(tmp_path / "parts"))
    (tmp_path / "parts" / "spectra-digits_pgd_at.npz").write_bytes(b"PK")
    assert "damaged" in refused(*common, "--out", str(tmp_path / "parts"))


def test_the_ends_alone_go_on_too(tmp_path, monkeypatch):
    common = ("curvature", "--model", "digits_cure", "--n", "6", "--spectrum", "lanczos", "--batch-size", "2")
    common += ("--directions", "2", "--iterations", "5")
    invoke(*common, "--out", str(tmp_path / "whole"))
    calls = []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return lanczos(*arguments, **options)

    monkeypatch.setattr(kept, "INTERVAL", 0.0)
    monkeypatch.setattr(curvature_study, "lanczos", stopping)
    assert CliRunner().invoke(cli, [*common, "--out", str(tmp_path / "parts")]).exit_code != 0
    calls[:] = [1] * 3
    invoke(*common, "--out", str(tmp_path / "parts"))
    assert len(calls) == 3 + 1  # the first two passes were there
    for name in ("samples.csv", "alignment.svg"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    # Another number of images: the common ones are the same.
    few = list(common)
    few[few.index("6")] = "4"
    invoke(*few, "--out", str(tmp_path / "few"))
    whole, part = (pd.read_csv(tmp_path / name / "samples.csv") for name in ("whole", "few"))
    pd.testing.assert_frame_equal(whole[:4], part)


def test_an_interrupted_curve_goes_on_to_equal_bytes(tmp_path, monkeypatch):
    common = ("curve", "--model", "digits_cure", "--n", "30", "--eps", "0,10/255,30/255", "--steps", "3")
    invoke(*common, "--out", str(tmp_path / "whole"))
    asked = []

    def stopping(*arguments, checkpoint, **options):
        def kept_then_stopped(rows):
            checkpoint(rows)
            if len(rows) == 2:
                raise KeyboardInterrupt

        return robust_rows(*arguments, checkpoint=kept_then_stopped, **options)

    def asking(*arguments, known, **options):
        asked.append(len(known))
        return robust_rows(*arguments, known=known, **options)

    monkeypatch.setattr(curve_study, "robust_rows", stopping)
    assert CliRunner().invoke(cli, [*common, "--out", str(tmp_path / "parts")]).exit_code != 0
    monkeypatch.setattr(curve_study, "robust_rows", asking)
    invoke(*common, "--out", str(tmp_path / "parts"))
    assert asked == [2]
    for name in ("curve.csv", "curve.svg", "curve-digits_cure.npz"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_curve_reports_its_progress():
    data = load_dataset("digits").subset(20)
    classifier = load_model("digits_cure", device="cpu", batch_size=5)
    reported = []
    eps = [Fraction(0), Fraction(1, 20), Fraction(1, 10)]
    robust_rows(classifier, data.images, data.labels, norm="linf", eps=eps, steps=4, advance=reported.append)
    assert reported == sorted(reported)
    assert reported[0] == 1
    assert reported[-1] == 3
    assert any(1 < done < 2 for done in reported)
    assert classifier.callback is None


def test_the_radii_and_steps_of_a_curve_are_those_of_the_data_set(tmp_path):
    invoke("curve", "--model", "digits_cure", "--n", "3", "--out", str(tmp_path))
    table = pd.read_csv(tmp_path / "curve.csv")
    assert list(table["eps"].astype(str))[-1] == "51/255"
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"]["pgd_steps"] == 20


def test_the_curve_command_begins_at_clean_accuracy(tmp_path):
    models = ("--model", "digits_cure", "--model", "digits_normal")
    invoke("curve", *models, "--n", "60", "--eps", "0,20/255,51/255", "--steps", "5", "--out", str(tmp_path))
    table = pd.read_csv(tmp_path / "curve.csv")
    data = load_dataset("digits").subset(60)
    for name in ("digits_cure", "digits_normal"):
        classifier = load_model(name, device="cpu")
        clean = float((classifier.logits(data.images).argmax(1) == data.labels).float().mean())
        own = table[table["model"] == name]
        assert own["accuracy"].iloc[0] == pytest.approx(clean)
        assert own["accuracy"].is_monotonic_decreasing
        assert ((own["ci_low"] <= own["accuracy"]) & (own["accuracy"] <= own["ci_high"])).all()
    last = table.groupby("model")["accuracy"].last()
    assert last["digits_cure"] > last["digits_normal"] + 0.3


def test_bounds_are_written_for_every_image_classified_correctly(tmp_path):
    done = invoke("bounds", "--model", "digits_cure", "--n", "25", "--out", str(tmp_path))
    table = pd.read_csv(tmp_path / "bounds.csv")
    known = table.dropna(subset=["lower", "upper"])
    assert len(known) > 10
    assert (known["lower"] <= known["quadratic"] * (1 + 1e-5)).all()
    assert (known["quadratic"] <= known["upper"] * (1 + 1e-5)).all()
    assert {"bounds.svg", "bounds-curvature.svg"} <= {path.name for path in tmp_path.iterdir()}
    assert (known["simple_lower"] <= known["lower"] + 1e-9).all()
    assert (known["lower"] <= known["upper"] + 1e-9).all()
    assert (known["upper"] <= known["simple_upper"] + 1e-9).all()
    assert (table["c"] > 0).all()
    assert "inside" in done.output


def test_the_bounds_are_drawn_for_the_values_of_figure_4():
    """CURE paper, figure 4: ||g|| = 1, c = 1, g.u = 0.5, so that the upper bound begins at c / g.u = 2."""
    (axes,) = bounds_study.closed_form().axes
    curves = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert {nu: curves["upper"][nu] for nu in (0, 2, 4, 8, 10)} == pytest.approx(
        {0: 2, 2: 0.7808, 4: 0.5931, 8: 0.4414, 10: 0.4}, abs=5e-5
    )
    assert {nu: curves["lower"][nu] for nu in (0, 2, 4, 8, 10)} == pytest.approx(
        {0: 1, 2: 0.6180, 4: 0.5, 8: 0.3904, 10: 0.3583}, abs=5e-5
    )


def test_the_defaults_of_a_data_set_are_those_of_the_papers():
    """A second transcription: CURE paper, section 4, figure 6; supplement, figure 4; thesis, section 4.2."""
    found = {
        name: (
            [int(255 * radius) for radius in own.radii],
            own.pgd_steps,
            own.difference_step,
            255 * own.universal_length,
        )
        for name, own in DEFAULTS.items()
    }
    assert found == {
        "cifar10": ([0, 1, 2, 3, 4, 5, 6, 7, 8], 20, 1.5, 10),
        "svhn": ([0, 2, 4, 6, 8, 10, 12], 10, 1.25, 10),
        "digits": ([0, 10, 20, 30, 40, 51], 20, 1.2, 51),
    }
    assert defaults_of("folder") == DEFAULTS["cifar10"]


def test_models_that_normalise_are_measured_behind_their_normalisation(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    module = Normalised(net, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    classifier = Classifier(module, num_classes=3, input_shape=(3, 4, 4), batch_size=8)
    images = np.random.default_rng(0).random((20, 3, 4, 4), dtype=np.float32)
    logits = classifier.logits(torch.from_numpy(images))
    labels = logits.argmax(1)
    data = from_arrays(
        "own",
        "test",
        images,
        labels.numpy(),
        ids=[f"own/{k}" for k in range(20)],
        classes=["a", "b", "c"],
    )
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    top = logits.topk(2, dim=1).values
    for verb in ("curvature", "bounds"):
        study = Study(verb=verb, models={"own": classifier}, data=data, out=tmp_path / verb)
        if verb == "bounds":
            table = bounds_study.measure(study, bounds_study.Settings(step=0.01, iterations=4))
            expected = math.log(2) - (top[:, 1] - top[:, 0]).exp().log1p()
            assert np.allclose(table["c"], expected, atol=1e-5)
            # The nearest boundary of linear logits, in normalised units.
            weight = net[1].weight.detach()
            order = logits.topk(2, dim=1).indices
            nearest = torch.stack(
                [
                    (logits.gather(1, order[:, :1]).squeeze(1) - logits[:, k])
                    / (weight[order[:, 0]] - weight[k]).norm(dim=1)
                    for k in range(3)
                ]
            )
            nearest[nearest.isnan()] = torch.inf
            assert np.allclose(table["deepfool"], nearest.amin(0), rtol=1e-3)
        else:
            settings = curvature_study.Settings(step=0.01, spectrum="dense", iterations=4, directions=2)
            table = curvature_study.measure(study, settings)
            assert np.allclose(table["loss"], losses, atol=1e-5)


def test_the_gallery_shows_what_changes_the_label(tmp_path):
    invoke(
        "gallery", "--model", "digits_cure", "--model", "digits_normal", "--n", "4", "--out", str(tmp_path)
    )
    table = pd.read_csv(tmp_path / "gallery.csv")
    archive = np.load(tmp_path / "gallery.npz")
    data = load_dataset("digits").subset(4)
    assert np.array_equal(archive["images"], data.images.numpy())
    for name in ("digits_cure", "digits_normal"):
        own = table[table["model"] == name]
        moved = torch.from_numpy(archive[name])
        after = load_model(name, device="cpu").logits(moved).argmax(1)
        assert own["after"].tolist() == after.tolist()
        assert own["changed"].all()
        lengths = (moved - data.images).flatten(1).norm(dim=1)
        assert np.allclose(own["l2"], lengths, atol=1e-5)
    medians = table.groupby("model")["l2"].median()
    assert medians["digits_cure"] > medians["digits_normal"]


def write_log(path: Path, epochs: int, scale: float = 1.0) -> Path:
    lines = ["epoch,lr,loss,regulariser,seconds,clean,pgd,hz,frobenius"]
    lines += [f"{k},1e-4,0.5,0.1,3,0.9,{0.05 * k},{scale / k},{2 * scale / k}" for k in range(1, epochs + 1)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_evolution_is_what_the_logs_say(tmp_path):
    logs = [write_log(tmp_path / "a.csv", 4), write_log(tmp_path / "b.csv", 2, 3.0)]
    out = tmp_path / "out"
    done = CliRunner().invoke(cli, ["evolution", *map(str, logs), "--out", str(out)], catch_exceptions=False)
    table = pd.read_csv(out / "evolution.csv")
    assert list(table["run"]) == ["a"] * 4 + ["b"] * 2
    assert table["frobenius"].tolist() == [2, 1, pytest.approx(2 / 3), 0.5, 6, 3]
    assert done.output.splitlines()[1].split() == ["a", "4", "0.5", "0.25", "90.0", "20.0"]
    assert done.output.splitlines()[2].split() == ["b", "2", "3", "1.5", "90.0", "10.0"]
    names = {path.name for path in out.iterdir()}
    assert names == {"evolution.csv", "evolution.svg", "index.html", "manifest.json"}
    assert json.loads((out / "manifest.json").read_text())["files"] == sorted(names - {"manifest.json"})


def test_figures_are_written_in_every_format_and_equal_ones_have_equal_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FORMATS", FORMATS)
    log = write_log(tmp_path / "a.csv", 3)
    for name in ("one", "two"):
        CliRunner().invoke(
            cli, ["evolution", str(log), "--out", str(tmp_path / name)], catch_exceptions=False
        )
    start = {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}
    files = json.loads((tmp_path / "one" / "manifest.json").read_text())["files"]
    assert {f"evolution.{kind}" for kind in start} <= set(files)
    for kind, magic in start.items():
        one, two = ((tmp_path / name / f"evolution.{kind}").read_bytes() for name in ("one", "two"))
        assert one == two
        assert one.startswith(magic)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "not a training log"),
        ("epoch,clean\n1,0.5\n", "has no column frobenius"),
        ("epoch,clean,frobenius,hz,pgd\n", "no epoch has ended yet"),
        ("epoch,clean,frobenius,hz,pgd\n1,0.5,x,1,1\n", "not numbers"),
    ],
)
def test_what_is_no_training_log_is_refused(content, message, tmp_path):
    log = tmp_path / "run.csv"
    if content is not None:
        log.write_text(content)
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(
            cli, ["evolution", str(log), "--out", str(tmp_path / "out")], catch_exceptions=False
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["section", "surface"])
def test_planes_are_drawn_around_the_image_that_the_seed_chooses(verb, tmp_path):
    for seed in ("0", "1"):
        out = tmp_path / seed
        invoke(verb, "--model", "digits_cure", "--points", "9", "--seed", seed, "--out", str(out))
        archive = np.load(out / f"{verb}.npz")
        data = load_dataset("digits").subset(1, int(seed))
        classifier = load_model("digits_cure", device="cpu")
        assert archive["digits_cure.labels"].shape == (9, 9)
        assert archive["digits_cure.labels"][4, 4] == int(classifier.logits(data.images).argmax(1))
        assert archive["digits_cure.along"][4] == pytest.approx(0, abs=1e-6)
        assert {path.suffix for path in out.glob(f"{verb}.*")} == {".svg", ".npz", ".csv"}
        n, v = (archive[f"digits_cure.{key}"].ravel().astype(float) for key in "nv")
        assert [n @ n, v @ v, n @ v] == pytest.approx([1, 1, 0], abs=1e-5)  # equal and orthogonal axes
        files = json.loads((out / "manifest.json").read_text())["files"]
        assert {f"{verb}.svg", f"{verb}.npz", f"{verb}.csv", "index.html"} == set(files)
    first, second = (np.load(tmp_path / seed / f"{verb}.npz")["digits_cure.loss"] for seed in "01")
    assert not np.array_equal(first, second)


def test_the_height_of_a_surface_is_the_negative_loss(monkeypatch):
    """CURE paper, figure 3: the image stands on top, and the loss falls away below it."""
    heights, real = [], Axes3D.plot_surface

    def draws(axes, x, y, z, **options):
        heights.append((x, y, z))
        return real(axes, x, y, z, **options)

    monkeypatch.setattr(Axes3D, "plot_surface", draws)
    along = torch.linspace(-1, 1, 5)
    loss = 0.5 + (along[:, None] - 1).abs() * 2 + along[None].abs()  # rows along r, columns along v
    figure = surface_study.surfaces({"a": Grid(along, torch.zeros(5, 5).long(), loss)}, 0)
    (v, n, z) = heights[0]
    np.testing.assert_allclose(z, -loss.numpy(), rtol=1e-6)
    np.testing.assert_allclose(v, np.broadcast_to(along.numpy(), (5, 5)))
    np.testing.assert_allclose(n, np.broadcast_to(along.numpy()[:, None], (5, 5)))
    (axes,) = figure.axes
    assert axes.get_zlim() == pytest.approx((-float(loss.max()), 0))
    assert [float(value[0]) for value in axes.lines[0].get_data_3d()] == pytest.approx([0, 0, -2.5])


def test_the_image_is_one_that_all_models_classify_correctly(tmp_path):
    """A seed whose first image one of them gets wrong: what surrounds it says nothing of its own region."""
    data, models = (
        load_dataset("digits"),
        [load_model(f"digits_{name}", device="cpu") for name in ("cure", "pgd_at")],
    )

    def right(rows) -> bool:
        return all(bool((model.logits(rows.images).argmax(1) == rows.labels).all()) for model in models)

    seed = next(seed for seed in range(200) if not right(data.subset(1, seed)))
    order = data.subset(20, seed)
    chosen = next(k for k in range(20) if right(order.take([k])))
    assert chosen > 0
    invoke(
        "section", "--model", "digits_cure", "--model", "digits_pgd_at", "--points", "3", "--seed", str(seed),
        "--out", str(tmp_path / "a"),
    )  # fmt: skip
    with np.load(tmp_path / "a" / "section.npz") as archive:
        for name in ("digits_cure", "digits_pgd_at"):
            assert archive[f"{name}.labels"][1, 1] == int(order.labels[chosen])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("curve", "--eps", "8/255,0"), "radii must ascend"),
        (("curve", "--eps", "eight"), "is not a fraction"),
        (("curve", "--norm", "l2"), "needs --eps"),
        (("curve", "--eps=-1/255"), "is negative"),
        (("curvature", "--step", "0"), "must be positive"),
        (("curvature", "--step", "nan"), "must be positive"),
        (("curvature", "--model", "digits_cur"), "did you mean"),
        (("curvature", "--n", "501"), "has only 500"),
        (("curvature", "--model", "digits_cure", "--model", "digits_cure"), "is given twice"),
        (("section", "--model", "resnet18_cure"), "has no weights yet"),
        (("surface", "--dataset", "npz"), "needs --data-dir"),
        (("bounds", "--batch-size", "none"), "use auto or a positive number"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(arguments, message, tmp_path):
    out = tmp_path / "out"
    assert message in refused(*arguments, "--out", str(out))
    assert not out.exists()


@pytest.mark.parametrize("verb", [command.name for command in (*geometry.VERBS[:-1], *boundary.VERBS)])
def test_studies_measure_in_float32_and_only_verified_searches_choose(verb, monkeypatch, tmp_path):
    """Distances, normals and differences are as good as their gradients; PGD's images are judged again."""
    asked = []

    def loads(names, request):
        asked.append(request)
        raise UsageError("enough")

    monkeypatch.setattr(engine, "load_all", loads)
    out = ("--out", str(tmp_path / "a"))
    assert refused(verb, "--n", "7", "--seed", "3", *out) == "enough"
    (request,) = asked
    assert request.precision == ("auto" if verb in ("curve", "universal") else "fp32")
    assert (request.n, request.seed, request.device) == (7, 3, "cpu")


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "out"
    file.write_text("")
    assert "is a file" in refused("curve", "--out", str(file))
    assert Path(file).read_text() == ""
