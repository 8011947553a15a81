"""The embedded example tells apart what it should, and its cards state what the evaluator measures."""

from __future__ import annotations

import pytest

from robustbench_cure import evaluate, load_battery, load_dataset, load_model
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import find

MODELS = ("digits_normal", "digits_pgd_at", "digits_deepfool", "digits_cure")


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, float]]:
    """Per cent on the 500 test digits, from the evaluator, in float32 throughout."""
    battery = load_battery("digits")
    kept = tuple(attack for attack in battery.attacks if attack.id in ("fgsm", "pgd20"))
    short = battery.model_copy(update={"attacks": kept})
    measured = {}
    for name in MODELS:
        record = evaluate(load_model(name, device="cpu", precision="fp32"), short, load_dataset("digits"))
        assert record.flags == [], name
        rates = {attack.id: record.robust_accuracy(attack.id).value for attack in kept}
        measured[name] = {"clean": 100 * record.clean_accuracy.value}
        measured[name] |= {key: 100 * rate for key, rate in rates.items()}
    return measured


def test_cards_state_what_is_measured(figures):
    for name in MODELS:
        stated = find(ModelCard, name).card.figures
        # One sample in 500 is 0.2 points; another processor may round a few samples over the boundary.
        assert stated == pytest.approx(figures[name], abs=0.81), name


def test_every_model_classifies(figures):
    assert all(figures[name]["clean"] >= 95 for name in MODELS)


def test_only_the_undefended_model_breaks_down(figures):
    assert figures["digits_normal"]["pgd20"] <= 5
    assert figures["digits_cure"]["pgd20"] >= 40
    assert figures["digits_pgd_at"]["pgd20"] >= 40


def test_one_step_suffices_only_where_the_loss_is_flat(figures):
    def gap(name: str) -> float:
        return figures[name]["fgsm"] - figures[name]["pgd20"]

    assert gap("digits_cure") <= 8
    assert gap("digits_pgd_at") > 2 * gap("digits_cure")
    assert figures["digits_normal"]["fgsm"] <= 5  # a step that follows the gradient; by rounding it was 19
