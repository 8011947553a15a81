"""Where labels first change on the way along a perturbation or a line, against walls at known places."""

from __future__ import annotations

import math
from functools import partial

import made
import numpy as np
import pytest
import torch
from torch import nn

from robustbench_cure.classifier import Classifier
from robustbench_cure.geometry import distance as module
from robustbench_cure.geometry.distance import along_line, along_segment, smallest

SHAPE, SIZE = (3, 8, 8), 192
images = partial(made.images, shape=SHAPE)


class Walls(nn.Module):
    """Label 1 where the mean over pixels lies in one of some intervals, label 0 elsewhere."""

    def __init__(self, *intervals: tuple[float, float]) -> None:
        super().__init__()
        self.intervals = intervals

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        inside = torch.stack([torch.minimum(mean - low, high - mean) for low, high in self.intervals]).amax(0)
        return torch.stack((torch.zeros_like(inside), inside), 1)


def walls(*intervals, **options) -> Classifier:
    return Classifier(Walls(*intervals), num_classes=2, input_shape=SHAPE, **options)


def grey(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous()


UP = torch.full((1, *SHAPE), SIZE**-0.5)  # a unit length along it is SIZE**-0.5 in every pixel
ZERO = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("place", [0.003, 0.2, 0.55, 0.999])
def test_a_segment_is_cut_where_the_label_first_changes(place):
    model, x = walls((0.2 + 0.6 * place, 9)), grey(0.2)
    share = along_segment(model, x, ZERO, grey(0.8) - x)
    assert share.dtype == torch.float64
    assert float(share) == pytest.approx(place, rel=1e-3, abs=1e-6)


def test_a_nearer_change_counts_though_the_label_comes_back():
    """Wide enough for a step of the scan; beyond it label 0 again, then the wall at the end."""
    step = 0.6 / module.SEGMENT_STEPS
    model, x = walls((0.4, 0.4 + 1.01 * step), (0.79, 9)), grey(0.2)
    assert float(along_segment(model, x, ZERO, grey(0.8) - x)) == pytest.approx(1 / 3, rel=1e-4)


def test_a_change_that_rounding_hides_is_at_the_end():
    assert float(along_segment(walls((5, 9)), grey(0.2), ZERO, grey(0.8) - 0.2)) == 1


@pytest.mark.parametrize(
    ("low", "high", "t"), [(-9, 0.1, 0.4), (0.7, 9, 0.2), (-9, 0.4, 0.1), (0.501, 9, 1e-3)]
)
def test_along_a_line_the_nearer_way_counts(low, high, t):
    """From 0.5: walls below it and above it, the nearer on either side."""
    model = walls((low, high), (2, 9))
    for way in (UP, -UP):
        assert float(along_line(model, grey(0.5), ZERO, way)) == pytest.approx(t * SIZE**0.5, rel=1e-3)


def test_a_line_that_never_changes_has_no_length_and_a_far_wall_has_one():
    assert along_line(walls((-9, -8)), grey(0.5) * 0, ZERO, UP * 0).isnan().all()
    assert float(along_line(walls((50, 90)), grey(0.5), ZERO, UP)) == pytest.approx(
        49.5 * SIZE**0.5, rel=1e-3
    )


def test_rows_do_not_touch_each_other_and_batches_do_not_count(monkeypatch):
    x, labels = grey(*np.linspace(0.1, 0.59, 11).tolist()), torch.zeros(11, dtype=torch.int64)
    whole = along_line(walls((0.6, 9)), x, labels, UP.expand_as(x))
    np.testing.assert_allclose(whole.numpy(), (0.6 - np.linspace(0.1, 0.59, 11)) * SIZE**0.5, rtol=1e-3)
    small = along_line(walls((0.6, 9), batch_size=3), x, labels, UP.expand_as(x))
    torch.testing.assert_close(small, whole, rtol=1e-6, atol=0)
    monkeypatch.setattr(module, "LENGTHS_PER_PASS", 3)
    torch.testing.assert_close(
        along_line(walls((0.6, 9)), x, labels, UP.expand_as(x)), whole, rtol=1e-6, atol=0
    )
    assert along_segment(walls((0.6, 9)), x[:0], labels[:0], x[:0]).shape == (0,)


# --- smallest perturbations --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_cut_distances_of_an_affine_model_are_without_the_overshoot(affine, norm):
    generator = np.random.default_rng(0)
    plane = affine(generator.normal(size=(10, SIZE)), generator.normal(size=10), SHAPE)
    x = images(30)
    label = torch.from_numpy(plane.logits(x).argmax(1))
    radii = plane.radii(x, label, norm)
    exact = np.where(radii > 0, radii, np.inf).min(1)
    np.testing.assert_allclose(smallest(plane.classifier, x, norm=norm, cut=True).length, exact, rtol=1e-3)
    np.testing.assert_allclose(smallest(plane.classifier, x, norm=norm).length, 1.02 * exact, rtol=1e-3)


def test_deepfool_goes_one_way_of_a_line_and_both_are_looked_along():
    """In front a wall at 0.3, behind one at 0.1 that the slope at the image does not show."""

    class Behind(nn.Module):
        def forward(self, x):
            mean = x.flatten(1).mean(1)
            beyond = torch.maximum(mean - 0.8, 100 * (0.4 - mean) - 0.5)
            return torch.stack((torch.zeros_like(beyond), beyond), 1)

    model, x = Classifier(Behind(), num_classes=2, input_shape=SHAPE), grey(0.5)
    basis = UP[:, None]
    one_way = smallest(model, x, basis=basis)
    both = smallest(model, x, basis=basis, cut=True)
    assert float(one_way.length) == pytest.approx(1.02 * 0.3 * SIZE**0.5, rel=1e-3)
    assert float(both.length) == pytest.approx((0.1 + 0.005) * SIZE**0.5, rel=1e-3)
    assert (int(one_way.steps), int(both.steps)) == (1, 0)


def test_on_a_network_lines_are_as_short_as_a_dense_scan_finds(digits_net, digits_test):
    model, x = Classifier(digits_net, num_classes=10, input_shape=(1, 8, 8)), digits_test[0][:20]
    label = model.logits(x).argmax(1)
    v = torch.randn((20, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    v /= v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    found = smallest(model, x, basis=v[:, None], cut=True).length
    dense = torch.full((20,), math.inf, dtype=torch.float64)
    for t in np.arange(0.01, 12, 0.01):
        changed = (model.logits(x + t * v).argmax(1) != label) | (model.logits(x - t * v).argmax(1) != label)
        dense = torch.where(changed & dense.isinf(), t, dense)
    sure = dense.isfinite()
    assert int(sure.sum()) > 15
    assert (found[sure] <= dense[sure] + 1e-6).all()
    assert (found[sure] >= dense[sure] - 0.01 - 1e-6).all()
    old = smallest(model, x, basis=v[:, None]).length
    assert (found <= old * (1 + 1e-6))[~old.isnan()].all()
    assert (found < 0.9 * old).any()
