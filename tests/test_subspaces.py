"""Perturbations confined to subspaces, against affine and spherical boundaries and the thesis' constants."""

from __future__ import annotations

import math
import re
from functools import partial

import made
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from made import Sphere
from scipy.fft import dctn

from robustbench_cure.attacks.deepfool import deepfool
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.classifier import Classifier
from robustbench_cure.cli.main import cli
from robustbench_cure.datasets import load_dataset
from robustbench_cure.errors import UsageError
from robustbench_cure.geometry.distance import smallest
from robustbench_cure.geometry.subspaces import frequency_band, random_subspaces, zeta
from robustbench_cure.studies import subspace as subspace_study
from robustbench_cure.studies.engine import Study
from robustbench_cure.threat import ThreatModel
from robustbench_cure.zoo.models import load_model

pytestmark = pytest.mark.usefixtures("svg_only")

L2 = ThreatModel.unbounded("l2")
SHAPE = (3, 8, 8)
SIZE = math.prod(SHAPE)
images = partial(made.images, shape=SHAPE)


def distances(model: Classifier, x: torch.Tensor, basis: torch.Tensor | None = None) -> torch.Tensor:
    return smallest(model, x, basis=basis).length


def streams(n: int, seed: int = 0) -> Noise:
    return Noise.for_samples(seed, "subspace", [str(row) for row in range(n)])


@pytest.fixture
def plane(affine):
    """A random affine classifier of 10 classes."""
    generator = np.random.default_rng(0)
    return affine(generator.normal(size=(10, SIZE)), generator.normal(size=10), SHAPE)


def exact(plane, x: torch.Tensor, basis: torch.Tensor) -> np.ndarray:
    """min_k |f_k - f_y| / ||Q'(w_k - w_y)|| of each row, in float64."""
    logits = plane.logits(x)
    label = logits.argmax(1)
    out = []
    for row, y in enumerate(label):
        q = basis[row % len(basis)].flatten(1).double().numpy()
        slopes = np.delete(plane.weight - plane.weight[y], y, axis=0)
        gaps = np.delete(logits[row] - logits[row, y], y)
        out.append((np.abs(gaps) / np.linalg.norm(slopes @ q.T, axis=1)).min())
    return np.array(out)


# --- subspaces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 7, SIZE])
def test_random_bases_are_orthonormal_and_belong_to_their_stream(m):
    basis = random_subspaces(SHAPE, m, streams(3))
    assert basis.shape == (3, m, *SHAPE)
    flat = basis.flatten(2)
    torch.testing.assert_close(flat @ flat.transpose(1, 2), torch.eye(m).expand(3, m, m), rtol=0, atol=1e-5)
    again = random_subspaces(SHAPE, m, streams(3)[torch.tensor([2])])
    torch.testing.assert_close(again[0], basis[2], rtol=0, atol=1e-6)
    assert not torch.allclose(basis[0], basis[1])
    assert not torch.allclose(random_subspaces(SHAPE, m, streams(3, seed=1)), basis)


def test_random_subspaces_point_nowhere_in_particular():
    """A fixed unit vector keeps m/d of its squared length on average: chance level sqrt(m/d)."""
    m, n = 12, 400
    flat = random_subspaces(SHAPE, m, streams(n)).flatten(2)
    for axis in (torch.eye(SIZE)[5], torch.full((SIZE,), SIZE**-0.5)):
        share = (flat @ axis).square().sum(1)
        assert float(share.mean()) == pytest.approx(m / SIZE, abs=4 * float(share.std()) / n**0.5)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_band_holds_its_frequencies_and_no_others(width):
    bands = [frequency_band(SHAPE, band, width) for band in range(8 // width)]
    for band, basis in enumerate(bands):
        assert basis.shape == (1, 3 * width**2, *SHAPE)
        spectrum = dctn(basis[0].double().numpy(), axes=(2, 3), norm="ortho")
        block = slice(band * width, (band + 1) * width)
        assert np.square(spectrum[:, :, block, block]).sum() == pytest.approx(3 * width**2, rel=1e-6)
    flat = torch.cat(bands, 1)[0].flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)), rtol=0, atol=1e-6)
    lowest = bands[0][0]
    assert torch.allclose(lowest[0, 0], torch.full((8, 8), 1 / 8))  # constant in the first channel
    assert not lowest[0, 1:].any()


@pytest.mark.parametrize(("band", "width"), [(-1, 2), (4, 2), (0, 9), (0, 0)])
def test_a_band_outside_the_image_is_refused(band, width):
    with pytest.raises(ValueError, match="no band"):
        frequency_band(SHAPE, band, width)


# --- DeepFool in a subspace --------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 3, 40])
def test_the_distance_in_a_subspace_of_an_affine_model_is_exact(plane, m):
    x, basis = images(20), random_subspaces(SHAPE, m, streams(20))
    found = distances(plane.classifier, x, basis).numpy()
    np.testing.assert_allclose(found, 1.02 * exact(plane, x, basis), rtol=1e-3)


def test_one_basis_serves_all_rows_and_rows_do_not_touch_each_other(plane):
    x, basis = images(6), frequency_band(SHAPE, 1, 2)
    found = distances(plane.classifier, x, basis).numpy()
    np.testing.assert_allclose(found, 1.02 * exact(plane, x, basis), rtol=1e-3)
    own = random_subspaces(SHAPE, 5, streams(6))
    whole = distances(plane.classifier, x, own)
    rows = torch.cat([distances(plane.classifier, x[k : k + 1], own[k : k + 1]) for k in range(6)])
    torch.testing.assert_close(whole, rows, rtol=1e-5, atol=0)


def test_perturbations_lie_in_the_span_and_change_the_label_of_a_network(digits_net, digits_test):
    model = Classifier(digits_net, num_classes=10, input_shape=(1, 8, 8))
    x = digits_test[0][:30]
    basis = random_subspaces((1, 8, 8), 6, streams(30))
    label = model.logits(x).argmax(1)
    found = deepfool(model, x, label, threat=L2, mode="minimal", clip=False, basis=basis)
    r, flat = (found.x_adv - x).flatten(1), basis.flatten(2)
    inside = torch.einsum("bm,bmd->bd", torch.einsum("bd,bmd->bm", r, flat), flat)
    torch.testing.assert_close(inside, r, rtol=0, atol=1e-5 * float(r.abs().max()))
    assert found.converged.float().mean() > 0.9
    assert (model.logits(found.x_adv).argmax(1) != label)[found.converged].all()


@pytest.mark.parametrize("shape", [(6, *SHAPE), (2, 6, *SHAPE), (3, 6, 9, 9, 9)])
def test_a_basis_that_does_not_fit_the_images_is_refused_with_both_shapes(plane, shape):
    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    options = {"threat": L2, "clip": False, "basis": torch.ones(shape)}
    words = re.escape(f"basis of shape {shape} for images of shape {tuple(x.shape)}")
    with pytest.raises(ValueError, match=words):
        deepfool(plane.classifier, x, y, **options, mode="minimal")
    with pytest.raises(ValueError, match="a basis needs mode 'minimal', the l2 norm and clip=False"):
        deepfool(plane.classifier, x, y, **options, mode="bounded")


def test_the_whole_space_is_a_subspace_and_smaller_ones_are_farther(digits_net, digits_test):
    model = Classifier(digits_net, num_classes=10, input_shape=(1, 8, 8))
    x = digits_test[0][:40]
    free = distances(model, x)
    all_of_it = distances(model, x, random_subspaces((1, 8, 8), 64, streams(40)))
    torch.testing.assert_close(all_of_it, free, rtol=1e-3, atol=0)
    few = distances(model, x, random_subspaces((1, 8, 8), 4, streams(40)))
    assert (few > free)[~few.isnan()].all()


def test_inside_a_sphere_the_step_is_newtons_along_the_projection():
    sphere = Classifier(Sphere(), num_classes=2, input_shape=SHAPE)
    offset = torch.randn((9, SIZE), generator=torch.Generator().manual_seed(0))
    offset = offset / offset.norm(dim=1, keepdim=True) * 0.3
    basis = random_subspaces(SHAPE, SIZE // 2, streams(9))
    along = (basis.flatten(2) @ offset[:, :, None]).squeeze(2).norm(dim=1)
    expected = 1.02 * (0.16 - 0.09) / (2 * along)
    found = distances(sphere, 0.5 + offset.view(-1, *SHAPE), basis)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-3)


def test_a_subspace_along_the_boundary_never_gets_there(affine):
    weight = np.zeros((2, SIZE))
    weight[1, 0] = 1.0
    model = affine(weight, [0.6, 0.0], SHAPE)
    basis = torch.eye(SIZE)[1:4].view(1, 3, *SHAPE)
    assert distances(model.classifier, images(3) * 0.5, basis).isnan().all()
    reaching = torch.eye(SIZE)[0:4].view(1, 4, *SHAPE)
    assert not distances(model.classifier, images(3) * 0.5, reaching).isnan().any()


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "bounded", "clip": False},
        {"mode": "minimal", "clip": True},
        {"mode": "minimal", "clip": False, "threat": ThreatModel.parse("linf", "8/255")},
        {"mode": "minimal", "clip": False, "basis": torch.zeros(4, *SHAPE)},
        {"mode": "minimal", "clip": False, "basis": torch.zeros(2, 4, *SHAPE)},
        {"mode": "minimal", "clip": False, "basis": torch.zeros(3, 4, 3, 8, 7)},
    ],
)
def test_a_basis_that_would_not_be_kept_to_is_refused(plane, options):
    x = images(3)
    arguments = {"threat": L2, "basis": random_subspaces(SHAPE, 2, streams(3))} | options
    with pytest.raises(ValueError, match="basis"):
        deepfool(plane.classifier, x, torch.zeros(3, dtype=torch.int64), **arguments)


# --- theory ------------------------------------------------------------------------------------------


def test_zeta_has_the_values_of_the_thesis():
    """Section 5.4: [0.8, 1.3] from m = 250 on, at delta = 0.05."""
    values = {1: (0.0957, 1087), 10: (0.3712, 4.9488), 100: (0.7112, 1.5175), 1000: (0.8965, 1.1227)}
    for m, (low, high) in values.items():
        assert zeta(m, 0.05) == (pytest.approx(low, abs=5e-5), pytest.approx(high, rel=5e-4))
    low, high = zeta(250, 0.05)
    assert low > 0.8
    assert high < 1.3
    for m in (1, 5, 50):
        assert zeta(m, 0.01)[0] < zeta(m, 0.1)[0] < 1 < zeta(m, 0.1)[1] < zeta(m, 0.01)[1]


@pytest.mark.parametrize("m", [2, 12, 48])
def test_beta_of_an_affine_model_is_one_and_keeps_to_its_interval(plane, m):
    n = 200
    x = images(n)
    beta = distances(plane.classifier, x, random_subspaces(SHAPE, m, streams(n))) / distances(
        plane.classifier, x
    )
    beta *= (m / SIZE) ** 0.5
    low, high = subspace_study._interval(m, 10)
    assert float(((beta >= low) & (beta <= high)).double().mean()) >= subspace_study.AFFINE_PROBABILITY
    if m >= 12:  # for lines and planes the mean is larger than 1
        assert float(beta.mean()) == pytest.approx(1, abs=0.1)


# --- the command -------------------------------------------------------------------------------------

invoke = partial(made.invoke, "subspace")


def test_the_command_writes_numbers_that_follow_from_its_images(tmp_path):
    run = invoke(
        "--model", "digits_cure", "--n", "20", "--dimensions", "1,4,16", "--out", str(tmp_path / "a")
    )  # fmt: skip
    assert run.exit_code == 0
    rows = pd.read_csv(tmp_path / "a" / "subspace-images.csv")
    table = pd.read_csv(tmp_path / "a" / "subspace.csv")
    assert table["m"].tolist() == [1, 4, 16]
    assert len(rows) == 60
    for _, line in table.iterrows():
        part = rows[rows["m"] == line["m"]].dropna()
        beta = (line["m"] / 64) ** 0.5 * part["l2_in_subspace"] / part["l2"]
        assert line["beta"] == pytest.approx(beta.mean())
        every = rows[rows["m"] == line["m"]]["beta"].fillna(math.inf)
        assert line["median"] == pytest.approx(every.median())
        assert line["std"] == pytest.approx(beta.std())
        assert line["n"] == len(part) >= 19
        assert line["images"] == 20
        low, high = (math.sqrt(z) for z in zeta(line["m"], 0.1 / 22))
        assert (line["affine_low"], line["affine_high"]) == (pytest.approx(low), pytest.approx(high))
        assert line["inside"] == pytest.approx(((every >= low) & (every <= high)).mean())
        assert line["rho"] == pytest.approx((part["l2"] / part["image_norm"]).mean())
        assert line["rho_in_subspace"] == pytest.approx((part["l2_in_subspace"] / part["image_norm"]).mean())
        assert f"{line['beta']:.3f}{'*' * (len(part) < 20)} " in run.output
    page = (tmp_path / "a" / "index.html").read_text(encoding="utf-8")
    assert "affine" in page
    assert "to the first change of label" in page
    assert "data:image/svg+xml" in page
    # Lengths are those of cut perturbations of the very images, each in the subspace of its own stream.
    model, data = load_model("digits_cure", device="cpu", precision="fp32"), load_dataset("digits").subset(20)
    noise = Noise.for_samples(0, "subspace", data.ids)
    for m in (1, 4):
        basis = random_subspaces((1, 8, 8), m, noise)
        found = smallest(model, data.images, basis=basis, cut=True).length.numpy()
        np.testing.assert_allclose(rows[rows["m"] == m]["l2_in_subspace"], found, rtol=1e-3)
    np.testing.assert_allclose(
        rows[rows["m"] == 1]["l2"], smallest(model, data.images, cut=True).length, rtol=1e-3
    )
    np.testing.assert_allclose(
        rows[rows["m"] == 1]["image_norm"], data.images.flatten(1).norm(dim=1), rtol=1e-6
    )


def test_the_draws_depend_on_the_seed_and_not_on_the_batch(tmp_path):
    arguments = ["--model", "digits_normal", "--n", "12", "--dimensions", "3"]
    for name, more in {"a": [], "b": ["--batch-size", "5"], "c": ["--seed", "1"]}.items():
        assert invoke(*arguments, *more, "--out", str(tmp_path / name)).exit_code == 0
    a, b, c = (pd.read_csv(tmp_path / name / "subspace-images.csv") for name in "abc")
    np.testing.assert_allclose(a["l2_in_subspace"], b["l2_in_subspace"], rtol=1e-3)
    np.testing.assert_allclose(a["l2"], c["l2"], rtol=1e-3)
    assert (np.abs(a["l2_in_subspace"] / c["l2_in_subspace"] - 1) > 1e-2).mean() > 0.9


def test_without_dimensions_they_are_those_of_the_thesis_and_a_line(tmp_path):
    """Table 5.1: d/m of 4, 16, 36, 64 and 100."""
    assert invoke("--model", "digits_normal", "--n", "2", "--out", str(tmp_path / "a")).exit_code == 0
    assert pd.read_csv(tmp_path / "a" / "subspace.csv")["m"].tolist() == [1, 2, 4, 16]
    assert subspace_study.RATIOS == (4, 16, 36, 64, 100)


def test_the_interval_of_affine_classifiers_in_numbers():
    """delta = 0.1 / (2 x 11); zeta of 12 worked out by hand."""
    log = math.log(220)
    low = 1 / (1 + 2 * math.sqrt(log / 12) + log / 6)
    root = 220 ** (-1 / 6)
    high = 1 / max(root / math.e, 1 - math.sqrt(2 * (1 - root)))
    assert subspace_study._interval(12, 10) == (pytest.approx(low**0.5), pytest.approx(high**0.5))
    assert subspace_study._interval(12, 10) == (
        pytest.approx(0.5556, abs=1e-4),
        pytest.approx(2.5843, abs=1e-4),
    )


def table_of(whole, inside, norms, m=4) -> pd.DataFrame:
    whole, inside = np.array(whole, float), np.array(inside, float)
    beta = (m / 64) ** 0.5 * inside / whole
    return pd.DataFrame(
        {"model": "a", "subspace": "s", "m": m, "l2": whole, "l2_in_subspace": inside, "beta": beta,
         "image_norm": norms}
    )  # fmt: skip


def test_images_without_a_perturbation_are_infinitely_far_in_the_median_and_marked_in_the_mean():
    nan = math.nan
    rows = table_of([1, 1, 1, 1, nan], [4, 8, nan, nan, 5], [2, 4, 2, 2, 2])
    row = subspace_study._row(rows, "random", 64, 10)
    assert (row["n"], row["images"]) == (2, 5)
    assert row["beta"] == pytest.approx((1 + 2) / 2)
    assert math.isinf(row["median"])  # of 1, 2, inf, inf; the last has no shortest to compare with
    assert row["inside"] == 0.5
    cells = [cell(row) for cell in subspace_study.COLUMNS.values()]
    assert cells[4:8] == ["1.500*", "inf", "0.707*", "2/5"]
    assert subspace_study._row(rows[:3], "random", 64, 10)["median"] == 2
    assert subspace_study._row(rows[:2], "random", 64, 10)["inside"] == 1


def test_beta_of_a_band_is_the_ratio_of_means_of_relative_lengths():
    """Eq. 3.20: sqrt(m/d) rho_S / rho, by hand; the mean of ratios would be 1.5, without norms 1.33."""
    rows = table_of([1, 2], [4, 16], [2, 1])
    row = subspace_study._row(rows, "dct", 64, 10)
    assert (row["rho"], row["rho_in_subspace"]) == (pytest.approx(1.25), pytest.approx(9))
    assert row["beta"] == pytest.approx(0.25 * 9 / 1.25)
    assert subspace_study._row(rows, "random", 64, 10)["beta"] == pytest.approx(1.5)


def test_unfinished_work_of_other_subspaces_or_another_seed_is_not_taken_over(tmp_path):
    arguments = ["--model", "digits_normal", "--n", "4", "--out", str(tmp_path / "a")]
    assert invoke(*arguments, "--dimensions", "2").exit_code == 0
    (tmp_path / "a" / "manifest.json").unlink()
    for other in (["--dimensions", "3"], ["--dimensions", "2", "--seed", "1"], ["--subspaces", "dct"]):
        with pytest.raises(UsageError, match="of another measurement"):
            invoke(*arguments, *other)


def test_an_interrupted_command_goes_on_to_equal_bytes(tmp_path, monkeypatch):
    arguments = ["--model", "digits_normal", "--n", "8", "--dimensions", "2,8"]
    invoke(*arguments, "--out", str(tmp_path / "whole"))
    real, calls = subspace_study.smallest, []

    def stops(*given, **options):
        calls.append(len(given[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given, **options)

    monkeypatch.setattr(subspace_study, "smallest", stops)
    CliRunner().invoke(
        cli, ["subspace", *arguments, "--device", "cpu", "--out", str(tmp_path / "parts")]
    )  # fmt: skip
    assert not (tmp_path / "parts" / "manifest.json").exists()
    before = len(calls)
    assert invoke(*arguments, "--out", str(tmp_path / "parts")).exit_code == 0
    assert len(calls) - before == 1  # the last subspace alone
    for name in ("subspace.csv", "subspace-images.csv", "subspace.svg", "subspace-digits_normal.npz"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_bands_of_frequencies(tmp_path):
    run = invoke(
        "--model", "digits_normal", "--n", "10", "--subspaces", "dct", "--width", "2",
        "--out", str(tmp_path / "a"),
    )  # fmt: skip
    assert run.exit_code == 0
    table = pd.read_csv(tmp_path / "a" / "subspace.csv")
    assert table["subspace"].tolist() == ["dct-0", "dct-1", "dct-2", "dct-3"]
    assert (table["m"] == 4).all()
    assert "in interval" not in run.output
    rows = pd.read_csv(tmp_path / "a" / "subspace-images.csv")
    for _, line in table.iterrows():
        part = rows[rows["subspace"] == line["subspace"]].dropna()
        means = [(part[key] / part["image_norm"]).mean() for key in ("l2_in_subspace", "l2")]
        assert line["beta"] == pytest.approx(0.25 * means[0] / means[1])


@pytest.mark.parametrize("sensitive", [0, 2, 5])
def test_the_band_that_a_classifier_looks_at_is_named(affine, tmp_path, sensitive):
    """It sees one frequency, on the diagonal: in its band lies the shortest way of all, in no other any."""
    wave = frequency_band((1, 8, 8), sensitive, 1)[0, 0].flatten().numpy()
    data = load_dataset("digits").subset(12)
    bias = -float(np.median(data.images.flatten(1).numpy() @ wave))
    model = affine(np.stack([np.zeros(64), wave]), [0.0, bias], (1, 8, 8)).classifier
    study = Study(verb="subspace", models={"one": model}, data=data, out=tmp_path / "a")
    table = subspace_study.measure(study, subspace_study.Settings("dct")).set_index("subspace")
    assert list(table.index) == [f"dct-{band}" for band in range(8)]
    for band in range(8):
        found = table.loc[f"dct-{band}"]
        if band == sensitive:
            assert found["n"] == 12
            assert found["beta"] == pytest.approx((1 / 64) ** 0.5, rel=1e-2)
        else:  # what rounding leaves of other frequencies is a million times farther
            assert found["median"] > 1e3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dimensions", "0,4"], "must ascend from 1"),
        (["--dimensions", "4,4"], "must ascend"),
        (["--dimensions", "4;8"], "whole numbers"),
        (["--dimensions", "65"], "the images have 64 inputs"),
        (["--width", "2"], "--width belongs to --subspaces dct"),
        (["--subspaces", "dct", "--dimensions", "4"], "--dimensions belongs to --subspaces random"),
        (["--subspaces", "dct", "--width", "9"], "the images are 8 x 8"),
    ],
)
def test_bad_requests_are_refused_before_any_work(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        invoke("--model", "digits_normal", "--n", "4", *arguments, "--out", str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()
