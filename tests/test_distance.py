"""Distances of boundaries and average robustness against closed forms, and the command."""

from __future__ import annotations

import itertools
import math
from functools import partial

import made
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from robustbench_cure import load_dataset, load_model
from robustbench_cure.classifier import Classifier
from robustbench_cure.cli.main import cli
from robustbench_cure.geometry.distance import FIRST, GRID, RATIO, SHARE, one_step, smallest
from robustbench_cure.studies import distance as distance_study

pytestmark = pytest.mark.usefixtures("svg_only")

SHAPE, SIZE = (3, 8, 8), 192
images = partial(made.images, shape=SHAPE)


@pytest.fixture
def plane(affine):
    generator = np.random.default_rng(0)
    return affine(generator.standard_normal((10, SIZE)) / 8, generator.standard_normal(10) / 8, SHAPE)


@pytest.fixture
def two(affine):
    """Two classes: the sign of the gradient is the shortest way in linf."""
    weight = np.random.default_rng(1).standard_normal(SIZE)
    return affine(np.stack([np.zeros(SIZE), weight]), [0.0, -weight.sum() / 2], SHAPE)


def exact(model, x: torch.Tensor, norm: str) -> np.ndarray:
    label = torch.from_numpy(model.logits(x).argmax(1))
    return np.where((r := model.radii(x, label, norm)) > 0, r, np.inf).min(1)


# --- distances --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_distances_of_an_affine_model_are_exact_after_one_step(plane, norm):
    x = images(40)
    found = smallest(plane.classifier, x, norm=norm)
    np.testing.assert_allclose(found.length.numpy(), 1.02 * exact(plane, x, norm), rtol=1e-3)
    assert found.length.dtype == torch.float64
    assert (found.steps == 1).all()


def test_a_label_that_never_changes_has_no_distance():
    constant = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 3))
    with torch.no_grad():
        constant[1].weight.zero_()
        constant[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    model = Classifier(constant, num_classes=3, input_shape=SHAPE)
    assert smallest(model, images(4)).length.isnan().all()
    step = one_step(model, images(4))
    assert not step.reached
    assert step.changed == 0
    assert step.lengths("l2").isnan().all()


# --- one step for all images ----------------------------------------------------------------------------


def test_the_grid_goes_from_a_tenth_of_a_grey_level_to_all_of_them():
    assert GRID[0] == pytest.approx(0.1 / 255)
    assert GRID[-1] == 1
    assert all(b / a == pytest.approx(RATIO) for a, b in itertools.pairwise(GRID[:-1]))
    assert 1 < GRID[-1] / GRID[-2] <= RATIO + 1e-9


def test_one_step_is_as_long_as_nine_images_in_ten_need(two):
    x = images(50)
    needed = np.sort(exact(two, x, "linf"))[math.ceil(SHARE * 50) - 1]
    step = one_step(two.classifier, x)
    first = next(eps for eps in GRID if eps > needed)
    assert needed > FIRST
    assert step.eps == pytest.approx(first)
    assert step.reached
    assert step.changed == pytest.approx(float((exact(two, x, "linf") < first).mean()))
    np.testing.assert_allclose(step.lengths("linf").numpy(), first)
    np.testing.assert_allclose(step.lengths("l2").numpy(), first * SIZE**0.5)


def test_success_need_not_be_monotone_and_the_first_length_that_reaches_it_counts():
    """The label changes between two walls only: long steps lead past both."""

    class Slab(nn.Module):
        def forward(self, x):
            mean = x.flatten(1).mean(1)
            inside = 0.05 - (mean - 0.65).abs()  # label 1 for means between 0.6 and 0.7
            return torch.stack((torch.zeros_like(inside), inside), 1)

    model = Classifier(Slab(), num_classes=2, input_shape=SHAPE)
    x = torch.full((20, *SHAPE), 0.5)
    step = one_step(model, x)
    assert step.reached
    assert step.eps == pytest.approx(next(eps for eps in GRID if eps > 0.1))
    far = torch.cat([x[:15], torch.full((5, *SHAPE), 0.3)])  # no length puts both groups inside at once
    step = one_step(model, far)
    assert not step.reached
    assert step.changed == 0.75
    assert step.eps == pytest.approx(next(eps for eps in GRID if eps > 0.1))


def test_the_direction_is_kept_where_the_loss_is_zero_in_float32(affine):
    """A confident network: the usual cross-entropy has no gradient left."""
    weight = 1000 * np.random.default_rng(2).standard_normal(SIZE)
    model = affine(np.stack([np.zeros(SIZE), weight]), [0.0, -weight.sum() / 2], SHAPE)
    x = images(20)
    step = one_step(model.classifier, x)
    assert step.reached
    way = np.where(model.logits(x).argmax(1) == 1, -1, 1)[:, None] * np.sign(weight)
    np.testing.assert_array_equal(step.direction.flatten(1).numpy(), way)


def test_rows_do_not_touch_each_other(two):
    x = images(10)
    whole = smallest(two.classifier, x).length
    rows = torch.cat([smallest(two.classifier, row[None]).length for row in x])
    torch.testing.assert_close(whole, rows, rtol=1e-4, atol=0)


# --- the command -------------------------------------------------------------------------------------

invoke = partial(made.invoke, "distance")


@pytest.fixture
def coarse(monkeypatch):
    """A tenth of the radii: the command's own work is what counts."""
    monkeypatch.setattr("robustbench_cure.geometry.distance.GRID", GRID[::10])


def test_the_command_writes_numbers_that_follow_from_its_images(tmp_path, coarse):
    run = invoke(
        "--model", "digits_normal", "--model", "digits_cure", "--n", "20", "--out", str(tmp_path / "a")
    )  # fmt: skip
    assert run.exit_code == 0
    rows = pd.read_csv(tmp_path / "a" / "distance-images.csv")
    table = pd.read_csv(tmp_path / "a" / "distance.csv")
    assert table[["model", "norm"]].to_numpy().tolist() == [
        [model, norm] for model in ("digits_normal", "digits_cure") for norm in ("l2", "linf")
    ]
    assert len(rows) == 80
    for _, line in table.iterrows():
        part = rows[(rows["model"] == line["model"]) & (rows["norm"] == line["norm"])]
        assert line["rho"] == pytest.approx((part["distance"] / part["image_norm"]).mean())
        assert line["n"] == 20
        assert line["ci_low"] < line["rho"] < line["ci_high"]
        size = line["eps_fgsm"] * (8 if line["norm"] == "l2" else 1)
        assert line["rho_fgsm"] == pytest.approx((size / part["image_norm"]).mean(), rel=0.2)
        assert line["rho_fgsm"] > line["rho"]
        assert f"{line['rho']:.2g}" in run.output
    normal, cure = table[table["norm"] == "l2"]["rho"]
    assert cure > 1.2 * normal
    assert max(len(line) for line in run.output.splitlines() if not line.startswith("page")) <= 80


def test_rho_divides_by_the_images_own_length_in_the_same_norm(tmp_path, coarse):
    """Thesis, Eq. 3.10 and section 3.2: ||r||_p / ||x||_p, l-infinity over l-infinity."""
    invoke("--model", "digits_normal", "--n", "10", "--out", str(tmp_path / "a"))
    rows = pd.read_csv(tmp_path / "a" / "distance-images.csv").set_index("norm")
    data = load_dataset("digits").subset(10)
    model = load_model("digits_normal", device="cpu", precision="fp32")
    x = data.images.flatten(1).double()
    for norm, size in (("l2", x.square().sum(1).sqrt()), ("linf", x.abs().amax(1))):
        part = rows.loc[norm]
        assert part["sample_id"].tolist() == list(data.ids)
        length = smallest(model, data.images, norm=norm).length
        np.testing.assert_allclose(part["distance"], length, rtol=1e-5)
        np.testing.assert_allclose(part["rho"], length / size, rtol=1e-5)


def test_an_interrupted_command_goes_on_to_equal_bytes(tmp_path, monkeypatch, coarse):
    arguments = ["--model", "digits_normal", "--n", "12", "--batch-size", "4"]
    invoke(*arguments, "--out", str(tmp_path / "whole"))
    real, calls = smallest, []

    def stops(*given, **options):
        calls.append(options["norm"])
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(distance_study, "smallest", stops)
    monkeypatch.setattr("robustbench_cure.files.INTERVAL", 0.0)
    CliRunner().invoke(cli, ["distance", *arguments, "--device", "cpu", "--out", str(tmp_path / "parts")])
    assert not (tmp_path / "parts" / "manifest.json").exists()
    assert calls == ["l2"] * 3 + ["linf"] * 3
    assert invoke(*arguments, "--out", str(tmp_path / "parts")).exit_code == 0
    assert calls[6:] == ["linf"]
    for name in ("distance.csv", "distance-images.csv", "distance.svg", "distance-digits_normal.npz"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_one_step_does_not_reach_is_said_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("robustbench_cure.geometry.distance.GRID", GRID[:3])
    run = invoke("--model", "digits_cure", "--norm", "linf", "--n", "8", "--out", str(tmp_path / "a"))
    assert run.exit_code == 0
    (line,) = [text for text in run.output.splitlines() if text.startswith("digits_cure")]
    assert line.split()[-3:] == ["0", "%", "-"]
    assert pd.read_csv(tmp_path / "a" / "distance.csv")["rho_fgsm"].isna().all()
