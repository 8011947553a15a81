"""The reference protocol: hidden gradients are found out, and its bound holds on the records that ship."""

from __future__ import annotations

import pytest

from robustbench_cure import load_battery, load_dataset, load_model
from robustbench_cure.classifier import Classifier
from robustbench_cure.evaluation.evaluate import evaluate
from robustbench_cure.masking.obfuscated import OBFUSCATED

#: Models whose gradients point somewhere still: the search itself sees through them.
SEEN_THROUGH = ("saturated logits", "softmax output")


def shortened(steps=20, queries=400):
    """The reference at the digits' radius, with an audit of fewer steps and queries, and so weaker."""
    battery = load_battery("reference").at("51/255")
    attacks = tuple(
        spec.model_copy(update={"queries": queries} if spec.kind == "square" else {"steps": steps})
        for spec in battery.audit.attacks
    )
    return battery.model_copy(update={"audit": battery.audit.model_copy(update={"attacks": attacks})})


@pytest.fixture(scope="module")
def honest():
    return evaluated(load_model("digits_pgd_at").module)


def evaluated(module):
    classifier = Classifier(module, num_classes=10, input_shape=(1, 8, 8))
    data, battery = load_dataset("digits"), shortened()
    return evaluate(classifier, battery, data, n=32, audit=0, allow_unreliable=True)


def test_an_honest_network_passes_its_audit(honest):
    assert honest.audit.lost == 0
    assert 8 < honest.worst_case_accuracy.count < 24


@pytest.mark.parametrize("name", OBFUSCATED)
def test_every_gradient_obfuscating_network_is_caught_by_the_audit_or_broken_by_the_search(name, honest):
    record = evaluated(OBFUSCATED[name](load_model("digits_pgd_at").module))
    raised = {flag.kind for flag in record.flags}
    if name in SEEN_THROUGH:  # as robust as the network behind it, and no more
        assert record.robust(record.attacks).sum() == honest.audit.survivors
        return
    assert record.audit.lost > 0
    assert "search_weaker_than_reference" in raised
    if name == "random":
        assert record.unreliable
    else:  # what gradients miss, queries find
        assert record.audit.survivors > honest.audit.survivors + 8
        assert "black_box_stronger" in raised
