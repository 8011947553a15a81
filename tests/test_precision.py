"""What a search in bfloat16 may cost: nothing that float32 would have found."""

from __future__ import annotations

from functools import partial

import made
import pytest
import torch
from torch import nn

from robustbench_cure import load_dataset, load_model
from robustbench_cure.attacks import apgd, deepfool, fgsm, pgd, pgd_checkpoints, spsa, uniform_noise
from robustbench_cure.attacks.losses import misclassified
from robustbench_cure.attacks.noise import Noise
from robustbench_cure.attacks.precision import (
    ROUNDING,
    disagreement,
    typical_range,
    within_rounding,
)
from robustbench_cure.attacks.spsa import gradient_estimate
from robustbench_cure.classifier import Classifier
from robustbench_cure.datasets import from_arrays
from robustbench_cure.evaluation.evaluate import evaluate
from robustbench_cure.evaluation.preflight import preflight
from robustbench_cure.threat import ThreatModel

SHAPE, BALL = (1, 2, 2), ThreatModel("linf", "1/10")


def reduced(x: torch.Tensor) -> bool:
    """Whether this is a pass in bfloat16; the look at the values keeps torch.fx from tracing it away."""
    return float(x.detach().amax()) > -1 and torch.is_autocast_enabled("cpu")


class Reversed(nn.Module):
    """Two classes, logits of size 64, beside a third far off; in bfloat16 the margin goes the other way.

    Args:
        centre: margin of the grey image.
        reach: what a ball of 1/10 takes away from it, or adds.
        honest: distance of every pixel from grey at which bfloat16 is right all the same.
    """

    def __init__(self, centre: float, reach: float, honest: float = 1.0) -> None:
        super().__init__()
        self.centre, self.slope, self.honest = centre, reach / 0.1 / 4, honest

    def forward(self, x):
        way = self.slope * (x - 0.5).sum((1, 2, 3))
        right = ((x - 0.5).abs() - self.honest).abs().amax((1, 2, 3)) < 1e-6
        margin = self.centre + (torch.where(right, way, -way) if reduced(x) else way)
        first = torch.full_like(margin, 64.0)
        return torch.stack((first, first - margin, -first), 1)


TOLERANCE = 64 * 2.0**-7


def broken(attack: str, centre: float, reach: float) -> tuple[bool, int]:
    """Whether bf16 search breaks it in the end, and the work it took."""
    x, y = torch.full((1, *SHAPE), 0.5), torch.zeros(1, dtype=torch.int64)
    # SPSA compares the two precisions where it starts, a hundredth away.
    net = Reversed(centre, reach, honest=0.01 if attack == "spsa" else 1.0)
    model = Classifier(net, num_classes=3, input_shape=SHAPE, precision="bf16")
    if attack == "spsa":
        found = spsa(model, x, y, threat=BALL, steps=10, samples=16, step_size=0.02)
    else:
        found = pgd(model, x, y, threat=BALL, steps=10, step_size=0.025, random_start=False, loss=attack)
    work = found.forwards if attack == "spsa" else found.backwards
    return bool(misclassified(model.logits(found.x_adv), y)), int(work)


@pytest.mark.parametrize("attack", ["ce", "margin", "spsa"])
def test_what_one_rounding_decides_is_searched_in_float32(attack):
    """Half the tolerance would miss it, twice as much would search what is sound."""
    assert broken(attack, 0.3 * TOLERANCE, 0.4 * TOLERANCE)[0]  # ends at 0.7 of it
    stands, twice = broken(attack, 0.6 * TOLERANCE, 0.7 * TOLERANCE)  # ends at 1.3 of it
    assert not stands
    assert twice == broken(attack, 5 * TOLERANCE, 0.7 * TOLERANCE)[1]


@pytest.mark.parametrize("delta", [1e-3, 1e-4])
def test_spsa_is_not_blind_where_bfloat16_hides_its_differences(delta):
    """Margins and gradients agree, and yet most pixels at a distance of 1e-4 are the same in bfloat16."""
    data, ball = load_dataset("digits").subset(20), ThreatModel("linf", "51/255")
    x, y, stand = data.images, data.labels, []
    for precision in ("fp32", "bf16"):
        model = load_model("digits_cure", precision=precision)
        found = spsa(model, x, y, threat=ball, steps=20, samples=32, step_size=0.02, delta=delta)
        stand.append(int((~misclassified(model.logits(found.x_adv), y)).sum()))
    assert disagreement(model, x, y, typical_range(model.logits(x))) == ""
    assert stand[1] <= stand[0] + 1


def test_bfloat16_is_used_inside_inference_mode_too():
    net = load_model("digits_cure", precision="fp32").module
    with torch.inference_mode():
        model = Classifier(net, num_classes=10, input_shape=(1, 8, 8), precision="bf16")
    assert (model.precision, model.fallback) == ("bf16", "")


def test_the_tolerance_is_one_rounding_of_the_largest_logit():
    z = torch.tensor([[64.0, 0.0], [-3.0, -64.0], [1000.0, 999.0]])
    for share, inside in ((0.95, True), (1.05, False)):
        margin = share * 2.0**-7 * torch.tensor([64.0, 64.0, 1000.0])
        assert within_rounding(margin, z).tolist() == [inside] * 3
        assert within_rounding(-margin, z).tolist() == [inside] * 3
    assert ROUNDING == 2.0**-7


@pytest.mark.parametrize("attack", [uniform_noise, fgsm, deepfool])
def test_what_looks_once_or_seldom_looks_in_float32(attack):
    options = {"draws": 5} if attack is uniform_noise else {}
    x, y = torch.full((8, *SHAPE), 0.5), torch.zeros(8, dtype=torch.int64)
    found = {}
    for precision in ("fp32", "bf16"):
        model = Classifier(Reversed(0.2, 0.5), num_classes=3, input_shape=SHAPE, precision=precision)
        found[precision] = attack(model, x, y, threat=BALL, **options).x_adv
    assert torch.equal(found["fp32"], found["bf16"])


class Offset(nn.Module):
    def __init__(self, net: nn.Module, offset: float) -> None:
        super().__init__()
        self.net, self.offset = net, offset

    def forward(self, x):
        return self.net(x) + self.offset


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_a_common_offset_of_the_logits_hides_nothing(offset):
    """No label and no loss sees it; logits in bfloat16 would have eight bits for it and the differences."""
    data = load_dataset("digits").subset(16)
    x, y = data.images, data.labels
    net = Offset(load_model("digits_cure", precision="fp32").module, offset).eval()
    model = Classifier(net, num_classes=10, input_shape=(1, 8, 8), precision="bf16")
    estimates = [
        gradient_estimate(model, x, y, Noise.for_rows(16), 0, 64, 0.01, reference=reference).flatten(1)
        for reference in (False, True)
    ]
    assert float(torch.cosine_similarity(*estimates).median()) > 0.98
    assert disagreement(model, x, y, typical_range(model.logits(x))) == ""


def test_only_the_layer_of_the_logits_stays_in_float32():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3)
    )
    model = Classifier(net, num_classes=3, input_shape=SHAPE, precision="bf16")
    kinds = [part.weight.dtype for part in model._search.modules() if hasattr(part, "weight")]
    assert kinds == [torch.bfloat16, torch.bfloat16, torch.float32]


# --- networks that need float32 inside ------------------------------------------------------------------


class Inside(nn.Module):
    """Adds and takes away a thousand: the same function, and in bfloat16 another one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.net = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), net
        with torch.no_grad():
            for layer, bias in ((self.up, 1000.0), (self.down, -1000.0)):
                layer.weight.fill_(1)
                layer.bias.fill_(bias)

    def forward(self, x):
        return self.net(self.down(self.up(x)))


PGD = made.PGD | {"id": "pgd", "name": "PGD", "steps": 10, "step_size": "51/1020"}
digits_battery = partial(made.battery, eps="51/255", dataset="digits")


def test_a_network_that_needs_float32_is_searched_in_float32():
    data = load_dataset("digits").subset(60)
    base = load_model("digits_normal", precision="fp32").module
    model = Classifier(Inside(base).eval(), num_classes=10, input_shape=(1, 8, 8), precision="bf16")
    record = evaluate(model, digits_battery(PGD), data)
    flags = [flag for flag in record.flags if flag.kind == "search_in_fp32"]
    assert [flag.attack for flag in flags] == [""]
    assert record.manifest.config.precision == model.precision == "fp32"
    plain = evaluate(load_model("digits_normal", precision="fp32"), digits_battery(PGD), data)
    assert abs(record.worst_case_accuracy.count - plain.worst_case_accuracy.count) <= 1


class Astray(nn.Module):
    """Two classes by the mean of sixteen pixels; in bfloat16 logits of bright images are the other way round.

    Args:
        lost: pixels whose slope bfloat16 does not see, though it sees their values.
    """

    def __init__(self, lost: int = 0) -> None:
        super().__init__()
        self.seen = torch.arange(16).view(1, 4, 4) >= lost

    def forward(self, x):
        reduces = reduced(x)
        if reduces:
            x = torch.where(self.seen, x, x.detach())
        score = (x - 0.3).mean((1, 2, 3))
        z = torch.stack((-score, score), 1)
        return torch.where(score[:, None] > 0.3, -z, z) if reduces else z


def compared(net: Astray, x: torch.Tensor) -> str:
    model = Classifier(net, num_classes=2, input_shape=(1, 4, 4), precision="bf16")
    return disagreement(model, x, torch.arange(len(x)) % 2, typical_range(model.logits(x)))


def test_two_classes_agree_on_their_boundary_too():
    """There the logits have no range, and every error would be larger than a share of it."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.rand((64, 1, 4, 4), generator=generator)
    model = Classifier(net, num_classes=2, input_shape=(1, 4, 4), precision="bf16")
    y = model.logits(x).argmax(1)
    near = deepfool(model, x, y, threat=ThreatModel("l2", "1"), overshoot=1e-3, clip=False).x_adv
    assert float((model.logits(near).diff(dim=1).abs()).median()) < 1e-2 * typical_range(model.logits(x))
    assert disagreement(model, near, y, typical_range(model.logits(x))) == ""


def test_one_image_in_twenty_may_disagree():
    x = torch.linspace(0.1, 0.25, 320).view(20, 1, 4, 4)
    x[0] += 0.6
    assert compared(Astray(), x) == ""
    x[1] += 0.6
    found = compared(Astray(), x)
    assert found.startswith("margins of 2 ")
    assert found.endswith("of 20 images differ between bfloat16 and float32")


def test_gradients_are_compared_where_logits_agree():
    """Without a share s of equal slopes the cosine is the root of 1 - s: 0.901 and 0.866."""
    x = torch.linspace(0.1, 0.25, 320).view(20, 1, 4, 4)
    assert compared(Astray(lost=3), x) == ""
    told = "gradients of 20 of 20 images differ between bfloat16 and float32"
    assert compared(Astray(lost=4), x) == told
    assert compared(Astray(lost=4), x[:0]) == ""


@pytest.mark.parametrize("name", ["digits_normal", "digits_pgd_at", "digits_cure"])
def test_sound_networks_are_searched_in_bfloat16(name):
    model = load_model(name, precision="bf16")
    assert not [flag for flag in preflight(model, load_dataset("digits")) if flag.kind == "search_in_fp32"]
    assert model.precision == "bf16"


def test_an_attack_that_returns_another_dtype_is_told_so():
    """Comparing the precisions there would fail, and with it the whole run."""

    def double(model, x, y, **hyper):
        candidates = pgd(model, x, y, **hyper)
        candidates.x_adv = candidates.x_adv.double()
        return candidates

    model, data = load_model("digits_normal", precision="bf16"), load_dataset("digits").subset(20)
    record = evaluate(model, digits_battery(PGD), data, attacks={"pgd": double})
    assert record.samples["pgd.violation"].str.contains("torch.float64").sum() == record.clean_accuracy.count


class Thrown(nn.Module):
    """Honest but near its boundary: there bfloat16 is shown the negative, and thrown back to where it is not.

    Args:
        gap: of the two largest logits below which it is near; the images' own are larger.
        confident: factor of the logits of grey levels of 255, where images lie and attacks do not.
    """

    def __init__(self, net: nn.Module, gap: float, confident: float = 1.0) -> None:
        super().__init__()
        self.net, self.gap, self.confident = net, gap, confident

    def forward(self, x):
        z = self.net(x)
        grey = ((x * 16 - (x * 16).round()).abs() < 1e-3).flatten(1).all(1)[:, None]
        if reduced(x):
            first, second = z.topk(2, 1).values.unbind(1)
            near = (first - second < self.gap)[:, None] & ~grey
            z = torch.where(near, self.net(1 - x), z)
        return torch.where(grey, z * self.confident, z)


@pytest.mark.parametrize("attack", [partial(pgd, steps=20, step_size=0.05), partial(apgd, steps=20)])
@pytest.mark.parametrize(("gap", "confident"), [(3.0, 1.0), (3.0, 100.0)])
def test_a_search_that_is_thrown_back_from_the_boundary_is_made_in_float32(attack, gap, confident):
    """Most rows end where nothing is to be seen of it, and some of them would stand."""
    data, ball = load_dataset("digits").subset(200), ThreatModel("linf", "51/255")
    net = Thrown(load_model("digits_pgd_at", precision="fp32").module, gap, confident).eval()
    models = {
        p: Classifier(net, num_classes=10, input_shape=(1, 8, 8), precision=p) for p in ("fp32", "bf16")
    }
    right = ~misclassified(models["fp32"].logits(data.images), data.labels)
    x, y = data.images[right], data.labels[right]
    found = {p: attack(model, x, y, threat=ball) for p, model in models.items()}
    stand = {p: ~misclassified(models["fp32"].logits(found[p].x_adv), y) for p in found}
    assert int(stand["fp32"].sum()) > 80
    assert int((stand["bf16"] & ~stand["fp32"]).sum()) == 0
    assert bool(found["bf16"].searched_again[stand["bf16"]].all())
    assert found["fp32"].searched_again is None


def test_a_checkpoint_is_searched_again_as_it_would_be_alone_and_longer_ones_with_it():
    data, ball = load_dataset("digits").subset(100), ThreatModel("linf", "51/255")
    net = Thrown(load_model("digits_pgd_at", precision="fp32").module, 3.0).eval()
    model = Classifier(net, num_classes=10, input_shape=(1, 8, 8), precision="bf16")
    options = {"threat": ball, "step_size": 0.05}
    short, long = pgd_checkpoints(model, data.images, data.labels, checkpoints=(3, 20), **options)
    alone = pgd(model, data.images, data.labels, steps=3, **options)
    assert torch.equal(short.x_adv, alone.x_adv)
    assert torch.equal(short.searched_again, alone.searched_again)
    broken = [misclassified(model.logits(p.x_adv), data.labels) for p in (short, long)]
    assert not bool((broken[0] & ~broken[1]).any())


def test_what_is_adversarial_already_is_not_lost_by_another_search():
    data, ball = load_dataset("digits").subset(100), ThreatModel("linf", "51/255")
    net = Thrown(load_model("digits_pgd_at", precision="fp32").module, 3.0).eval()
    model = Classifier(net, num_classes=10, input_shape=(1, 8, 8), precision="bf16")
    options = {"threat": ball, "steps": 20, "step_size": 0.05}
    stopped, never = (
        pgd(model, data.images, data.labels, stop=stop, **options) for stop in ("first-success", "never")
    )
    broken = [misclassified(model.logits(p.x_adv), data.labels) for p in (stopped, never)]
    assert int((broken[0] & ~broken[1]).sum()) <= 1
    assert not bool((never.searched_again & broken[1]).all())


class OnlyFar(made.Wrapped):
    """Honest on the images and near them; further away bfloat16 is shown the negative, if pixel 0 is dark."""

    def forward(self, x):
        far = (x[:, :, 1:] - 0.5).abs().amax((1, 2, 3), keepdim=True) > 0.07
        return self.net(torch.where(far & (x[:, :, :1, :1] < 0.5), 1 - x, x) if reduced(x) else x)


@pytest.mark.parametrize("dark", [10, 200])
@pytest.mark.parametrize("attack", ["pgd", "spsa"])
def test_a_row_that_bfloat16_leads_astray_is_searched_in_float32(attack, dark):
    """Images that preflight looks at are no pledge for the points that an attack goes to.

    One row in twenty weighs as much as all: none may stand that float32 breaks.
    """
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        net[1].weight[:, 0] = 0  # the pixel that marks an image moves nothing
        net[1].weight[1] = -net[1].weight[0]
        net[1].bias.copy_(-net[1].weight.sum(1) / 2)
        net[1].bias[0] += 0.2 * net[1].weight[0].abs().sum()  # the boundary lies a tenth away
    x = 0.49 + 0.02 * torch.rand((200, 1, 4, 4), generator=generator)
    x[:, :, 0, 0] = (torch.randperm(200, generator=generator) >= dark).float()[:, None]
    data = from_arrays("toy", "test", x, torch.zeros(200, dtype=torch.int64), classes="ab")
    spec = PGD | {"step_size": "1/40"}
    if attack == "spsa":
        spec = {"id": "spsa", "name": "SPSA", "kind": "spsa", "limit": 0, "steps": 10, "samples": 16}
        spec |= {"step_size": "1/40", "delta": 0.01, "stop": "first-success"}
    record = {}
    for precision in ("fp32", "bf16"):
        model = Classifier(OnlyFar(net), num_classes=2, input_shape=(1, 4, 4), precision=precision)
        record[precision] = evaluate(model, digits_battery(spec), data)
    assert record["bf16"].manifest.config.precision == "bf16"
    stand = {precision: ~record[precision].samples[f"{attack}.broken"].astype(bool) for precision in record}
    # SPSA's queries may be led astray at an iterate that is not.
    assert int((stand["bf16"] & ~stand["fp32"]).sum()) <= (attack == "spsa")
    (flag,) = [flag for flag in record["bf16"].flags if flag.kind == "searched_again"]
    assert flag.attack == attack
    assert flag.evidence == f"{flag.value:.0f} of 200 samples"
    assert not [flag for flag in record["fp32"].flags if flag.kind == "searched_again"]


def test_only_rows_that_are_still_robust_are_compared_with_float32():
    """Three passes for each: at the image, and twice at the proposal; none for those that are broken."""
    data, model = load_dataset("digits").subset(8), load_model("digits_pgd_at", precision="bf16")
    x, y = data.images, data.labels.clone()
    y[:4] = (y[:4] + 1) % 10
    options = {"threat": ThreatModel("linf", "1/255"), "step_size": 1 / 255, "random_start": False}
    found = pgd(model, x, y, steps=2, **options)
    assert found.forwards.tolist() == [2] * 4 + [2 + 1 + 3] * 4
    assert int(found.forwards.sum()) == model.forwards
    for shared in pgd_checkpoints(model, x, y, checkpoints=(1, 2), **options):
        assert shared.forwards[:4].tolist() == [2] * 4


class Misleading(nn.Module):
    """Bfloat16 leads away from the boundary, in steps of 1/20.

    Args:
        near: margin after one step; after two it is large.
        third: a third logit, beside two of about 64.
    """

    def __init__(self, near: float = 0.3, third: float = -64.0) -> None:
        super().__init__()
        self.near, self.third = near, third

    def forward(self, x):
        u = (x - 0.5).mean((1, 2, 3))
        away = torch.where(u > -0.075, self.near, 3.0)
        margin = 0.4 + 2 * u if reduced(x) else torch.where(u > -0.01, 0.4 - 20 * u, away)
        first = torch.full_like(margin, 64.0)
        return torch.stack((first, first - margin, torch.full_like(margin, self.third)), 1)


@pytest.mark.parametrize(("third", "again"), [(63.0, True), (-64.0, False)])
def test_margins_are_compared_on_the_scale_of_the_image_s_logits(third, again):
    """An error of 0.4 is much where logits differ by 1, and little where they differ by 128."""
    x, y = torch.full((2, *SHAPE), 0.5), torch.zeros(2, dtype=torch.int64)
    model = Classifier(Misleading(0.7, third), num_classes=3, input_shape=SHAPE, precision="bf16")
    found = pgd(model, x, y, threat=BALL, steps=1, step_size=0.05, random_start=False)
    assert found.searched_again.tolist() == [again] * 2
    assert misclassified(model.logits(found.x_adv), y).tolist() == [again] * 2


def test_a_longer_checkpoint_is_never_left_more_robust_than_a_shorter_one():
    x, y = torch.full((2, *SHAPE), 0.5), torch.zeros(2, dtype=torch.int64)
    options = {"threat": BALL, "step_size": 0.05, "random_start": False}
    model = Classifier(Misleading(), num_classes=3, input_shape=SHAPE, precision="bf16")
    short, long = pgd_checkpoints(model, x, y, checkpoints=(1, 2), **options)
    assert bool(misclassified(model.logits(short.x_adv), y).all())
    assert torch.equal(long.x_adv, short.x_adv)
    # Alone, the long search ends where nothing is uncertain.
    alone = pgd(model, x, y, steps=2, **options)
    assert not bool(misclassified(model.logits(alone.x_adv), y).any())


class Slope(nn.Module):
    """A margin that a rounding may decide after one step of 1/20, and that is negative after two."""

    def forward(self, x):
        margin = 0.4 - 6 * (x - 0.5).mean((1, 2, 3))
        first = torch.full_like(margin, 64.0)
        return torch.stack((first, first - margin, -first), 1)


def test_a_checkpoint_that_is_broken_takes_no_part_in_the_second_search():
    x, y = torch.full((2, *SHAPE), 0.5), torch.zeros(2, dtype=torch.int64)
    model = Classifier(Slope(), num_classes=3, input_shape=SHAPE, precision="bf16")
    options = {"threat": BALL, "step_size": 0.05, "random_start": False}
    short, long = pgd_checkpoints(model, x, y, checkpoints=(1, 2), **options)
    assert (short.backwards.tolist(), long.backwards.tolist()) == ([1 + 1] * 2, [2] * 2)
    assert misclassified(model.logits(short.x_adv), y).tolist() == [False] * 2
    assert misclassified(model.logits(long.x_adv), y).tolist() == [True] * 2


class Lowest(nn.Module):
    """A margin that is lowest, 1, at 0.03 below the image; in bfloat16 its slope has the other sign."""

    def forward(self, x):
        u = (x - 0.5).mean((1, 2, 3))
        margin = 1 - 20 * u if reduced(x) else 1 + 20 * (u + 0.03).abs()
        return torch.stack((margin, torch.zeros_like(margin)), 1)


def test_spsa_s_search_in_float32_keeps_its_best_iterate():
    x, y = torch.full((4, *SHAPE), 0.5), torch.zeros(4, dtype=torch.int64)
    model = Classifier(Lowest(), num_classes=2, input_shape=SHAPE, precision="bf16")
    found = spsa(model, x, y, threat=BALL, steps=5, samples=64, step_size=0.02)
    assert bool(found.searched_again.all())
    assert float(model.logits(found.x_adv).amax()) < 1.3  # steps of 0.02 pass the lowest point
