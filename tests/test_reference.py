"""The reference protocol: hidden gradients are found out, and its bound holds on the records that ship."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from robustbench_cure import load_battery, load_dataset, load_model
from robustbench_cure.classifier import Classifier
from robustbench_cure.evaluation.audit import drawn
from robustbench_cure.evaluation.evaluate import evaluate
from robustbench_cure.evaluation.record import Record
from robustbench_cure.masking.obfuscated import OBFUSCATED
from robustbench_cure.protocol.catalog import ranking_protocol
from robustbench_cure.stats import upper_bound

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


# --- the records that ship ---------------------------------------------------------------------------------

MEASURED = Path(__file__).parents[1] / "reports" / "measured"


def shipped(protocol):
    """Records in `reports/measured` of one reference protocol, by network and images."""
    found = [Record.load(path.parent) for path in sorted(MEASURED.glob("*/*/samples.parquet"))]
    found = [record for record in found if ranking_protocol(record.manifest.battery) == protocol]
    return {(r.manifest.model.id, r.manifest.data.digest, r.manifest.battery.threat): r for r in found}


FULL, CHEAP = shipped("autoattack"), shipped("reference")
names = [f"{model}-{threat}" for model, _, threat in FULL]


@pytest.mark.parametrize("key", FULL, ids=names)
def test_the_reference_agrees_with_autoattack_in_full(key):
    """Within 0.2 points by its search alone, 0.4 on digits, where docs/reference.md says why."""
    full, cheap = FULL[key], CHEAP[key]
    robust = cheap.robust(cheap.attacks)
    apart = 0.004 if key[0].startswith("digits") else 0.002
    assert abs(int(robust.sum()) - full.worst_case_accuracy.count) <= apart * full.n
    assert int((robust != full.worst_case).sum()) <= 0.005 * full.n
    assert bool(cheap.audit.lost) == any(flag.kind == "search_weaker_than_reference" for flag in cheap.flags)
    assert cheap.audit.bound + 1e-9 >= (robust & ~full.worst_case).sum() / full.n


@pytest.mark.parametrize("draws", [20, 50, 100])
@pytest.mark.parametrize("key", FULL, ids=names)
def test_the_bound_of_an_audit_covers_what_autoattack_takes(key, draws):
    """1,000 audits of searches of three strengths: the bound holds in 95 of 100, and says something."""
    full, cheap = FULL[key], CHEAP[key]
    for record, attacks in ((cheap, cheap.attacks), (cheap, cheap.attacks[:1]), (full, full.attacks[:1])):
        robust = record.robust(attacks).to_numpy(dtype=bool)
        if int(robust.sum()) <= draws:
            continue
        final = [record.samples[f"{s.id}.margin"].to_numpy(dtype=float, na_value=np.inf) for s in attacks]
        margins, broken = np.min(final, axis=0)[robust], ~full.worst_case.to_numpy(dtype=bool)[robust]
        found = [int(drawn(margins, draws, seed)[broken].sum()) for seed in range(1000)]
        covered = [upper_bound(k, draws) >= broken.mean() for k in found]
        assert np.mean(covered) >= 0.95
        assert np.mean([upper_bound(k, draws) for k in found]) < broken.mean() + 4 / np.sqrt(draws)


def test_the_stored_rows_of_the_authors_code_say_what_the_records_say():
    """Image by image, on the 512 original images: `benchmarks/autoattack.py` wrote them."""
    text = (MEASURED.parents[1] / "benchmarks/measured/autoattack/rows.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    theirs = [row for row in rows if (row["what"], row["norm"], row["n"]) == ("pyautoattack", "linf", "512")]
    assert {row["model"] for row in theirs} == {f"resnet18s_{name}" for name in ("pgd_at", "cure", "normal")}
    for row in theirs:
        (full,) = [r for (model, _, _), r in FULL.items() if model == row["model"]]
        robust = dict(zip(full.samples["sample_id"], full.worst_case, strict=True))
        assert "".join("01"[bool(robust[name])] for name in sorted(robust)) == row["robust"]


def test_every_shipped_network_has_both():
    assert set(FULL) == set(CHEAP)
    assert len({model for model, _, _ in FULL}) == 8
