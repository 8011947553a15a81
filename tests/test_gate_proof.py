"""Proof on real runs: what the gate must notice, and what it must let pass."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from robustbench_cure import evaluate, load_battery, load_dataset, load_model
from robustbench_cure.attacks import Candidates
from robustbench_cure.classifier import Classifier
from robustbench_cure.evaluation.record import Record
from robustbench_cure.evaluation.registry import ATTACKS
from robustbench_cure.evaluation.storage import find_records, merge
from robustbench_cure.gate.compare import Comparison, compare
from robustbench_cure.gate.outcome import Rules
from robustbench_cure.protocol.cards import Battery

ROOT = Path(__file__).parents[1]


def short() -> Battery:
    battery = load_battery("digits")
    kept = ("fgsm", "deepfool", "pgd20", "pgd100_margin")
    return battery.model_copy(update={"attacks": tuple(a for a in battery.attacks if a.id in kept)})


def judged(classifier: Classifier, **options) -> Record:
    return evaluate(classifier, short(), load_dataset("digits"), n=200, **options)


def cure(**options) -> Classifier:
    return load_model("digits_cure", device="cpu", **options)


@pytest.fixture(scope="module")
def before() -> Record:
    return judged(cure())


def outcome(new: Record, before: Record) -> tuple[str, int]:
    result = compare(new, before, Rules()).outcome
    return result.kind, result.exit_code


# --- what must be noticed -----------------------------------------------------------------------------


def tenth(attack: Callable[..., Candidates]) -> Callable[..., Candidates]:
    """The attack, with a tenth of the steps that it was asked for."""

    def weaker(*arguments, steps: int, **options) -> Candidates:
        return attack(*arguments, steps=max(1, steps // 10), **options)

    return weaker


def test_attacks_that_do_a_tenth_of_their_steps_are_a_suspicious_rise(before):
    weak = ATTACKS | {kind: tenth(ATTACKS[kind]) for kind in ("pgd", "deepfool")}
    assert outcome(judged(cure(), attacks=weak), before) == ("suspicious rise", 1)


def test_one_attack_that_got_weaker_is_noticed_behind_a_worst_case_that_stays(before):
    """DeepFool and the margin still break what PGD(20) no longer does."""

    def weak(*arguments, steps: int, **options) -> Candidates:
        return ATTACKS["pgd"](*arguments, steps=2 if steps == 20 else steps, **options)

    found = compare(judged(cure(), attacks=ATTACKS | {"pgd": weak}), before, Rules())
    findings = {row.accuracy.id: row.finding for row in found.rows}
    assert (findings["pgd20"], findings["worst_case"]) == ("rose", "held")
    assert found.outcome.kind == "suspicious rise"


def changed(change: Callable[[nn.Module], None]) -> Classifier:
    module = copy.deepcopy(cure().module)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        change(module)
    return Classifier(module, num_classes=10, input_shape=(1, 8, 8), batch_size=256)


def noise(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter += 0.3 * parameter.std() * torch.randn_like(parameter)


def zero(module: nn.Module) -> None:
    [part for part in module.modules() if isinstance(part, nn.Conv2d)][1].weight.zero_()


@pytest.mark.parametrize("change", [noise, zero])
def test_noise_on_the_weights_and_a_zeroed_layer_are_regressions(before, change):
    assert outcome(judged(changed(change)), before) == ("regression", 1)


def test_the_copy_that_was_changed_passes_unchanged(before):
    assert outcome(judged(changed(lambda module: None)), before) == ("pass", 0)


# --- what must pass -----------------------------------------------------------------------------------


def most(found: Comparison) -> float:
    """Largest share of the samples that any accuracy lost or gained."""
    return max(max(r.accuracy.pairs.lost, r.accuracy.pairs.gained) / r.accuracy.pairs.n for r in found.rows)


@pytest.mark.parametrize(
    ("options", "settings", "allowed"),
    [
        ({"batch_size": 37}, {}, 0.01),
        ({"precision": "fp32"}, {}, 0.02),
        ({"precision": "fp32"}, {"seed": 7}, 0.05),
        ({}, {"seed": 8}, 0.05),
    ],
)
def test_another_batch_size_precision_or_seed_passes_within_the_stated_error(
    before, options, settings, allowed
):
    found = compare(judged(cure(**options), **settings), before, Rules())
    assert (found.outcome.kind, found.outcome.exit_code) == ("pass", 0)
    assert most(found) <= allowed


def test_two_parts_joined_pass_without_a_discordant_pair(before, tmp_path):
    for part in (1, 2):
        judged(cure(), out=tmp_path / str(part), shard=(part, 2), shard_size=100)
    joined = merge([tmp_path / "1", tmp_path / "2"], tmp_path / "joined")
    found = compare(joined, before, Rules())
    assert (found.outcome.kind, most(found)) == ("pass", 0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_device_passes_within_the_stated_error(before):
    found = compare(judged(load_model("digits_cure", device="cuda")), before, Rules())
    assert found.outcome.kind == "pass"
    assert most(found) <= 0.03


# --- what is kept, and what others copy ---------------------------------------------------------------


def test_the_kept_baseline_is_of_the_networks_and_the_battery_that_ship():
    records = find_records((ROOT / "reports" / "measured" / "digits",))
    names = ["digits_cure", "digits_deepfool", "digits_normal", "digits_pgd_at"]
    assert [record.manifest.model.id for record in records] == names
    digests = {record.manifest.battery_digest for record in records}
    assert digests == {load_battery("digits").digest}
    for record in records:
        shipped = load_model(record.manifest.model.id, device="cpu").model_info()
        assert record.manifest.model.weights_sha256 == shipped.weights_sha256
        assert record.manifest.data.digest == load_dataset("digits").subset(record.n).digest


def blocks(language: str) -> list[str]:
    page = (ROOT / "docs" / "gate.md").read_text()
    return [part.split("\n", 1)[1].split("```")[0] for part in page.split("```" + language)[1:]]


def test_workflows_are_yaml_whose_steps_are_complete():
    own = (ROOT / ".github" / "workflows" / "robustness.yml").read_text()
    template, _ = blocks("yaml")
    for text in (own, template):
        flow = yaml.load(text, Loader=yaml.BaseLoader)
        assert {"name", "on", "jobs"} <= flow.keys()
        steps = [step for job in flow["jobs"].values() for step in job["steps"]]
        assert all(("uses" in step) != ("run" in step) for step in steps)
        gate = next(step["run"] for step in steps if "cure-bench compare" in step.get("run", ""))
        assert "--github" in gate


def test_the_hook_of_the_documentation_runs(tmp_path):
    """As `pre-commit` would call it, on a network of ours in the place of the user's."""
    _, hook = blocks("yaml")
    entry = yaml.safe_load(hook)["repos"][0]["hooks"][0]["entry"]
    entry = entry.replace("my_pkg.nets:make --dataset cifar10", "digits_normal --battery digits")
    assert "digits_normal" in entry
    baseline = ROOT / "reports" / "measured" / "digits" / "digits_normal"
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines" / "mine").symlink_to(baseline)
    done = subprocess.run(
        ["bash", "-c", entry], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "digits_normal: PASS" in done.stdout
