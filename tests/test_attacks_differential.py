"""Against torchattacks and Foolbox at the same budget: the same steps, and never a weaker attack."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_cure.attacks import deepfool, fgsm, pgd, spsa
from robustbench_cure.classifier import Classifier
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import find
from robustbench_cure.threat import ThreatModel
from robustbench_cure.zoo.loading import load_card_module

N = 100
SLACK = N // 100  # rows of a hundred on which rounding may favour a peer
THREATS = {"linf": ThreatModel("linf", Fraction(1, 10)), "l2": ThreatModel("l2", Fraction(3, 5))}
CARDS = ("digits_normal", "digits_deepfool", "digits_cure", "digits_pgd_at")

pytestmark = pytest.mark.usefixtures("quiet")
both_norms = pytest.mark.parametrize("norm", list(THREATS))


@pytest.fixture(scope="module", params=["small", *CARDS])
def classifier(request, digits_net):
    module = digits_net if request.param == "small" else load_card_module(find(ModelCard, request.param))[0]
    return Classifier(module, num_classes=10, input_shape=(1, 8, 8), batch_size=1024)


@pytest.fixture(scope="module")
def data(digits_test):
    return digits_test[0][:N].clone(), digits_test[1][:N].clone()


class Double(nn.Module):
    """The same network in float64. In float32 a peer's cross-entropy of confident rows is rounding."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).double()

    def forward(self, x):
        return self.net(x.double())


@pytest.fixture
def peer_module(classifier):
    """A copy for the peers, which switch modes and gradients."""
    return Double(classifier.module).eval()


@pytest.fixture
def network(classifier):
    """A copy of the bare network."""
    return copy.deepcopy(classifier.module)


def foolbox_run(attack, module, x, y, eps):
    import foolbox

    _, clipped, _ = attack(foolbox.PyTorchModel(module, bounds=(0, 1)), x, y, epsilons=eps)
    return clipped.detach()


def not_weaker(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert (theirs & ~ours).sum() <= SLACK, f"{theirs.sum()} broken by the peer, {ours.sum()} by us"


# --- FGSM --------------------------------------------------------------------------------------------


def test_fgsm_is_torchattacks_fgsm(classifier, peer_module, data):
    import torchattacks

    x, y = data
    theirs = torchattacks.FGSM(peer_module, eps=0.1)(x, y)
    ours = fgsm(classifier, x, y, threat=THREATS["linf"]).x_adv
    same = (ours - theirs).abs().flatten(1) < 1e-6
    assert same.float().mean() > 0.999  # the sign of a gradient that rounds to zero is nobody's


@both_norms
def test_fgsm_is_foolboxes_fast_gradient(classifier, peer_module, data, norm):
    from foolbox.attacks import L2FastGradientAttack, LinfFastGradientAttack

    x, y = data
    attack = LinfFastGradientAttack() if norm == "linf" else L2FastGradientAttack()
    theirs = foolbox_run(attack, peer_module, x, y, THREATS[norm].radius)
    ours = fgsm(classifier, x, y, threat=THREATS[norm]).x_adv
    same = (ours - theirs).abs().flatten(1) < 1e-5
    assert same.float().mean() > 0.999


# --- PGD ---------------------------------------------------------------------------------------------


def torchattacks_pgd(module, x, y, norm, steps, step_size):
    import torchattacks

    options = {"eps": THREATS[norm].radius, "alpha": step_size, "steps": steps, "random_start": False}
    return (torchattacks.PGD if norm == "linf" else torchattacks.PGDL2)(module, **options)(x, y)


def foolbox_pgd(module, x, y, norm, steps, step_size):
    from foolbox.attacks import L2PGD, LinfPGD

    attack = (LinfPGD if norm == "linf" else L2PGD)(abs_stepsize=step_size, steps=steps, random_start=False)
    return foolbox_run(attack, module, x, y, THREATS[norm].radius)


@both_norms
@pytest.mark.parametrize("peer", [torchattacks_pgd, foolbox_pgd])
def test_pgd_walks_the_peers_path_and_breaks_all_they_break(classifier, peer_module, data, judge, norm, peer):
    x, y = data
    threat, steps = THREATS[norm], 10
    step_size = threat.radius / 4
    theirs = peer(peer_module, x, y, norm, steps, step_size)
    ours = pgd(classifier, x, y, threat=threat, steps=steps, step_size=step_size, random_start=False)
    broken, lost = (
        judge(classifier.module, x, y, x_adv, norm, threat.radius) for x_adv in (ours.x_adv, theirs)
    )
    not_weaker(broken, lost)
    if peer is torchattacks_pgd and norm == "l2":
        return  # its gradients are divided by their norm plus 1e-10, which stops it where they are small
    survived = torch.from_numpy(~broken)
    if survived.sum() >= 10:  # rows we did not leave early end where theirs end
        apart = (ours.x_adv - theirs)[survived].abs().flatten(1)
        assert (apart < 1e-5).float().mean() > 0.99
        assert ((apart < 1e-5).all(1)).float().mean() > 0.75
    early = torch.from_numpy(broken) & (ours.steps < steps)
    for row in early.nonzero().flatten()[:3].tolist():  # the others are the peer's own earlier iterates
        taken = int(ours.steps[row])
        if taken:
            there = peer(peer_module, x[row : row + 1], y[row : row + 1], norm, taken, step_size)
            torch.testing.assert_close(ours.x_adv[row : row + 1], there, rtol=0, atol=1e-4)


# --- DeepFool ----------------------------------------------------------------------------------------


def distances(x, x_adv, norm):
    delta = (x_adv - x).flatten(1)
    return (delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)).numpy()


def foolbox_deepfool(module, x, y, norm):
    from foolbox.attacks import L2DeepFoolAttack, LinfDeepFoolAttack

    attack = (LinfDeepFoolAttack if norm == "linf" else L2DeepFoolAttack)(
        steps=20, candidates=10, overshoot=0.02
    )
    return foolbox_run(attack, module, x, y, None)


class Roomy(nn.Module):
    """The same network on images in [1/4, 3/4]: the box is out of the way, where implementations differ."""

    def __init__(self, module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(2 * x - 0.5)


@both_norms
def test_deepfool_comes_as_near_as_foolbox(network, data, norm):
    x = 0.25 + 0.5 * data[0][:20]
    classifier = Classifier(Roomy(network).eval(), num_classes=10, input_shape=(1, 8, 8))
    y = classifier.logits(x).argmax(1)  # distances are to the predicted label
    theirs = foolbox_deepfool(Roomy(network).eval(), x, y, norm)
    ours = deepfool(classifier, x, y, threat=THREATS[norm])
    assert ours.converged.all()
    assert (classifier.logits(ours.x_adv).argmax(1) != y).all()
    crossed = (classifier.logits(theirs).argmax(1) != y).numpy()
    assert crossed.mean() > 0.9
    ratio = distances(x, ours.x_adv, norm)[crossed] / distances(x, theirs, norm)[crossed]
    assert 0.9 < np.median(ratio) <= 1.02
    assert ratio.mean() <= 1.03


def test_deepfool_comes_as_near_as_torchattacks(network, data):
    import torchattacks

    x = 0.25 + 0.5 * data[0][:12]
    classifier = Classifier(Roomy(network).eval(), num_classes=10, input_shape=(1, 8, 8))
    y = classifier.logits(x).argmax(1)
    theirs = torchattacks.DeepFool(Roomy(network).eval(), steps=50, overshoot=0.02)(x, y)
    ours = deepfool(classifier, x, y, threat=THREATS["l2"])
    assert ours.converged.all()
    crossed = (classifier.logits(theirs).argmax(1) != y).numpy()
    near, far = (distances(x, x_adv, "l2")[crossed] for x_adv in (ours.x_adv, theirs))
    assert np.median(near) <= 1.05 * np.median(far)


@both_norms
def test_deepfool_crosses_from_the_edge_of_the_box(classifier, data, norm):
    """Most pixels of these images are 0 or nearly 1; every one of them has another label in the box."""
    x = data[0]
    y = classifier.logits(x).argmax(1)
    inside = deepfool(classifier, x, y, threat=THREATS[norm])
    assert inside.converged.all()
    assert inside.x_adv.amin() >= 0
    assert inside.x_adv.amax() <= 1
    free = deepfool(classifier, x, y, threat=THREATS[norm], clip=False)
    assert free.x_adv.amin() < 0


@both_norms
def test_bounded_deepfool_breaks_what_foolboxes_distances_say(classifier, network, data, judge, norm):
    x, y = data[0][:16], data[1][:16]
    threat = THREATS[norm]
    theirs = foolbox_deepfool(network, x, y, norm)
    lost = judge(classifier.module, x, y, theirs, norm, threat.radius)
    ours = deepfool(classifier, x, y, threat=threat, mode="bounded")
    not_weaker(judge(classifier.module, x, y, ours.x_adv, norm, threat.radius), lost)


# --- SPSA --------------------------------------------------------------------------------------------


def test_spsa_is_no_weaker_than_torchattacks(classifier, network, data, judge):
    import torchattacks

    x, y = data[0][:20], data[1][:20]
    threat = THREATS["linf"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attack = torchattacks.SPSA(
            network, eps=threat.radius, delta=0.01, lr=0.03, nb_iter=8, nb_sample=32, max_batch_size=32
        )
        theirs = attack(x, y).detach()
    ours = spsa(classifier, x, y, threat=threat, steps=8, samples=32, step_size=0.03, delta=0.01)
    broken, lost = (
        judge(classifier.module, x, y, x_adv, "linf", threat.radius) for x_adv in (ours.x_adv, theirs)
    )
    assert broken.sum() >= lost.sum() - 1
