"""The gate: exact tests against enumeration, one verdict for every case, outputs, and proof on real runs."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.stats import binom

from robustbench_cure import evaluate, load_battery, load_dataset, load_model
from robustbench_cure.cards import PGD, Battery
from robustbench_cure.classifier import Classifier
from robustbench_cure.cli import cli
from robustbench_cure.errors import UsageError
from robustbench_cure.flags import Flag
from robustbench_cure.gate.command import update
from robustbench_cure.gate.compare import compare
from robustbench_cure.gate.paired import Flips, sample_size, tail
from robustbench_cure.gate.render import terminal, to_annotations, to_json, to_junit, to_markdown
from robustbench_cure.gate.verdict import EXIT_CODES, ORDER, Rules, conclude, judge_rows
from robustbench_cure.record import Record
from robustbench_cure.session import find_records
from robustbench_cure.shards import merge

# --- statistics ---------------------------------------------------------------------------------------


def test_flips_are_counted_on_both_sides():
    before = np.array([1, 1, 1, 0, 0, 0, 1, 0], bool)
    after = np.array([1, 0, 0, 1, 0, 0, 1, 0], bool)
    assert Flips.between(before, after) == Flips(n=8, before=4, after=3, lost=2, gained=1)
    assert Flips.between(before, after).change == -1 / 8
    assert Flips.between(after, before).change == 1 / 8


@pytest.mark.parametrize(("more", "fewer"), [(0, 0), (1, 0), (3, 1), (5, 5), (7, 0), (2, 6)])
def test_the_exact_test_counts_coin_tosses(more, fewer):
    tosses = list(itertools.product((0, 1), repeat=more + fewer))
    assert tail(more, fewer) == pytest.approx(sum(sum(t) >= more for t in tosses) / len(tosses))


def test_the_deciding_number_is_the_first_that_decides():
    flips = Flips(n=100, before=50, after=47, lost=4, gained=1)
    n = flips.deciding_n(0.01)
    assert tail(round(4 * n / 100), round(n / 100)) < 0.01
    assert tail(round(4 * (n - 1) / 100), round((n - 1) / 100)) >= 0.01
    assert Flips(100, 50, 50, 3, 3).deciding_n(0.01) is None
    assert Flips(100, 50, 40, 10, 0).deciding_n(0.01) == 100


@pytest.mark.parametrize("tolerance", [0.005, 0.01, 0.05])
def test_the_sample_size_notices_a_fall_of_twice_the_tolerance(tolerance):
    """By simulation of whole comparisons, through the verdict itself."""
    n = sample_size(tolerance, 0.01)
    generator, rules = np.random.default_rng(0), Rules(tolerance=tolerance)

    def noticed(n: int) -> float:
        losses = generator.binomial(n, 2 * tolerance, size=400)
        return float(np.mean([verdict(Flips(n, n, n - k, k, 0), rules) == "regression" for k in losses]))

    assert noticed(n) >= 0.85
    assert noticed(n // 3) < 0.85


def test_a_tolerance_that_would_take_millions_is_refused():
    with pytest.raises(ValueError, match="more than 10,000,000 samples"):
        sample_size(1e-8, 0.01)


# --- the verdict --------------------------------------------------------------------------------------


DEFAULT = Rules()


def verdict(
    worst: Flips, rules: Rules = DEFAULT, clean: Flips | None = None, attack: Flips | None = None
) -> str:
    still = clean or Flips(worst.n, worst.n, worst.n, 0, 0)
    rows = [("clean accuracy", "clean", still), ("worst case", "worst", worst)]
    rows[1:1] = [("PGD", "attack", attack)] if attack else []
    return conclude(judge_rows(rows, rules), rules).kind


def flips(lost: int, gained: int, n: int = 500, before: int = 200) -> Flips:
    return Flips(n, before, before + gained - lost, lost, gained)


@pytest.mark.parametrize(
    ("worst", "kind"),
    [
        (flips(0, 0), "pass"),
        (flips(5, 0), "pass"),  # one point: the tolerance
        (flips(6, 0), "inconclusive"),  # p = 1/64
        (flips(7, 0), "regression"),  # p = 1/128
        (flips(20, 14), "inconclusive"),
        (flips(40, 10), "regression"),
        (flips(0, 6), "pass"),
        (flips(0, 7), "suspicious rise"),
        (flips(14, 20), "pass"),
        (flips(10, 40), "suspicious rise"),
    ],
)
def test_tolerance_and_chance_decide_together(worst, kind):
    assert verdict(worst) == kind
    assert EXIT_CODES[kind] == int(kind != "pass")


def test_a_rise_with_the_clean_accuracy_is_an_improvement_and_a_fall_of_it_a_regression():
    assert verdict(flips(0, 30), clean=flips(0, 20)) == "pass"
    assert verdict(flips(0, 30), clean=flips(0, 5)) == "suspicious rise"
    assert verdict(flips(0, 0), clean=flips(20, 0)) == "regression"
    assert verdict(flips(0, 0), clean=flips(0, 20)) == "pass"


def test_an_attack_alone_alarms_only_where_it_is_sure():
    assert verdict(flips(0, 0), attack=flips(6, 0)) == "pass"
    assert verdict(flips(0, 0), attack=flips(20, 0)) == "regression"
    assert verdict(flips(0, 0), attack=flips(0, 20)) == "suspicious rise"
    many = [("clean", "clean", flips(0, 0)), ("worst", "worst", flips(0, 0))]
    nine = many + [(f"a{i}", "attack", flips(8, 0)) for i in range(9)]  # 1/256 > 0.01/9
    one = [*many, ("a0", "attack", flips(8, 0))]
    assert conclude(judge_rows(nine, Rules()), Rules()).kind == "pass"
    assert conclude(judge_rows(one, Rules()), Rules()).kind == "regression"


def test_the_floor_is_absolute():
    assert verdict(flips(0, 0, before=200), Rules(floor=0.4)) == "pass"
    assert verdict(flips(1, 0, before=200), Rules(floor=0.4)) == "regression"


def test_inconclusive_says_how_many_samples_would_decide():
    rows = judge_rows([("clean", "clean", flips(0, 0)), ("worst case", "worst", flips(20, 12))], Rules())
    n = flips(20, 12).deciding_n(0.01)
    assert f"about {n:,} samples would decide" in conclude(rows, Rules()).words[0]


def test_accepted_verdicts_keep_their_name_and_lose_their_exit_code():
    rules = Rules(accept=("inconclusive",))
    rows = judge_rows([("clean", "clean", flips(0, 0)), ("worst case", "worst", flips(6, 0))], rules)
    assert (conclude(rows, rules).kind, conclude(rows, rules).exit_code) == ("inconclusive", 0)
    assert set(ORDER) == set(EXIT_CODES)


def test_false_alarms_are_no_more_frequent_than_the_level():
    """Two runs that differ by chance alone: every sample may flip either way."""
    generator = np.random.default_rng(0)
    kinds = []
    for _ in range(2000):
        lost, gained = generator.binomial(500, 0.02, size=2)
        kinds.append(verdict(flips(int(lost), int(gained))))
    for kind in ("regression", "suspicious rise"):
        assert kinds.count(kind) <= binom.ppf(0.9999, 2000, 0.01)


# --- records ------------------------------------------------------------------------------------------


def short() -> Battery:
    battery = load_battery("digits")
    kept = ("fgsm", "deepfool", "pgd20", "pgd100_margin")
    return battery.model_copy(update={"attacks": tuple(a for a in battery.attacks if a.id in kept)})


def judged(classifier: Classifier, n: int = 200, **options) -> Record:
    return evaluate(classifier, options.pop("battery", short()), load_dataset("digits"), n=n, **options)


@pytest.fixture(scope="module")
def before() -> Record:
    return judged(load_model("digits_cure", device="cpu"))


def with_columns(record: Record, **columns) -> Record:
    return Record(record.manifest, record.samples.assign(**columns))


def with_manifest(record: Record, **parts) -> Record:
    return Record(record.manifest.model_copy(update=parts), record.samples)


def test_a_record_passes_beside_itself_in_any_order_of_its_rows(before):
    found = compare(
        Record(before.manifest, before.samples.iloc[::-1].reset_index(drop=True)), before, Rules()
    )
    assert found.verdict.kind == "pass"
    assert found.notes == ()
    assert all((row.flips.lost, row.flips.gained) == (0, 0) for row in found.rows)
    assert [row.flips.before / row.flips.n for row in found.rows] == [
        before.clean_accuracy.value,
        *(before.robust_accuracy(a.id).value for a in before.attacks),
        before.worst_case_accuracy.value,
    ]


def test_a_subset_is_compared_on_the_samples_both_have(before):
    part = before.samples[before.samples["rank"] < 50].reset_index(drop=True)
    found = compare(Record(before.manifest, part), before, Rules())
    assert found.verdict.kind == "pass"
    assert {row.flips.n for row in found.rows} == {50}
    assert found.notes == ("samples: 50 now, 200 before",)


def test_flips_in_the_table_are_those_in_the_samples(before):
    standing = before.samples[before.worst_case].index[:9]
    broken = before.samples["fgsm.broken"].copy()
    broken[standing] = True
    found = compare(with_columns(before, **{"fgsm.broken": broken}), before, Rules())
    lost = {row.name: row.flips.lost for row in found.rows}
    assert lost == {
        "clean accuracy": 0,
        "FGSM": 9,
        "l∞ DeepFool": 0,
        "PGD(20)": 0,
        "PGD(100) margin": 0,
        "worst case": 9,
    }
    assert found.verdict.kind == "regression"


def test_what_cannot_be_compared_is_said_in_words(before):
    def reasons(new: Record) -> str:
        found = compare(new, before, Rules())
        assert (found.verdict.kind, found.verdict.exit_code, found.rows) == ("not comparable", 2, ())
        return "; ".join(found.verdict.words)

    fewer = tuple(
        a.model_copy(update={"steps": 2}) if a.id == "pgd20" else a for a in before.attacks if a.id != "fgsm"
    )
    battery = before.manifest.battery.model_copy(update={"attacks": fewer})
    text = reasons(with_manifest(before, battery=battery, battery_digest=battery.digest))
    assert "attack fgsm only before" in text
    assert "pgd20.steps 2 now, 20 before" in text
    assert "deepfool" not in text
    pixels = before.samples["image_sha256"].copy()
    pixels[:3] = "0" * 64
    assert "3 of 200 samples have other pixels" in reasons(with_columns(before, image_sha256=pixels))
    labels = (before.samples["label"] + 1) % 10
    assert "200 of 200 samples have another label" in reasons(with_columns(before, label=labels))
    others = before.samples["sample_id"] + "x"
    assert "no sample is in both" in reasons(with_columns(before, sample_id=others))
    random = [Flag(kind="stochastic", evidence="seen")]
    assert "the new run is flagged unreliable: stochastic" in reasons(with_manifest(before, flags=random))


# --- outputs ------------------------------------------------------------------------------------------


@pytest.fixture
def fallen(before):
    broken = before.samples["fgsm.broken"] | True
    return compare(with_columns(before, **{"fgsm.broken": broken}), before, Rules())


def test_the_terminal_fits_and_names_the_reason(fallen):
    text = terminal([fallen])
    assert max(map(len, text.splitlines())) <= 80
    assert "digits_cure: REGRESSION" in text
    assert "worst case fell by" in text


def test_junit_is_well_formed_and_fails_what_failed(fallen, before):
    suites = ET.fromstring(to_junit([fallen, compare(before, before, Rules())]))
    assert [suite.get("failures") for suite in suites] == ["2", "0"]
    failed = [case.get("name") for case in suites.iter("testcase") if case.find("failure") is not None]
    assert failed == ["FGSM", "worst case"]
    other = with_columns(before, sample_id=before.samples["sample_id"] + "x")
    suites = ET.fromstring(to_junit([compare(other, before, Rules())]))
    assert next(iter(suites)).get("errors") == "1"


def test_hostile_names_stay_text(before):
    model = before.manifest.model.model_copy(update={"id": "a]]>\x1b[31m|<b>::error::\n%0A"})
    found = compare(with_manifest(before, model=model), before, Rules())
    assert "\x1b" not in terminal([found]) + to_markdown([found], Rules()) + to_junit([found])
    assert ET.fromstring(to_junit([found])) is not None
    (line,) = to_annotations([found])
    assert line.startswith("::notice title=")
    assert line.count("::error") == 0
    assert "\n" not in line
    assert "<b>" not in to_markdown([found], Rules())


def test_json_holds_everything_and_agrees(fallen):
    found = json.loads(to_json([fallen], Rules(floor=0.1)))
    assert (found["verdict"], found["exit_code"]) == ("regression", 1)
    rows = {row["name"]: row for row in found["models"][0]["rows"]}
    assert rows["worst case"]["lost"] == rows["worst case"]["before"] - rows["worst case"]["now"]
    assert rows["worst case"]["p_fall"] == pytest.approx(0.5 ** rows["worst case"]["lost"])
    assert found["rules"] == {"tolerance": 0.01, "floor": 0.1, "level": 0.01, "accept": []}


# --- the commands -------------------------------------------------------------------------------------


def invoke(*arguments: object):
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False)


def test_compare_and_update_from_the_command_line(tmp_path, before, monkeypatch):
    before.save(tmp_path / "base" / "digits_cure")
    worse = with_columns(before, **{"fgsm.broken": before.samples["fgsm.broken"] | True})
    worse.save(tmp_path / "new" / "digits_cure")
    base, new = tmp_path / "base", tmp_path / "new"
    assert invoke("compare", base, base).return_value == 0
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    files = ["--markdown", tmp_path / "m.md", "--junit", tmp_path / "j.xml", "--json", tmp_path / "c.json"]
    result = invoke("compare", new, base, *files, "--github")
    assert result.return_value == 1
    assert "::error title=digits_cure%3A regression::" in result.output
    assert (tmp_path / "summary.md").read_text() == (tmp_path / "m.md").read_text() + "\n"
    assert json.loads((tmp_path / "c.json").read_text())["verdict"] == "regression"
    shown = invoke("baseline", "update", new, base).output
    assert "digits_cure: REGRESSION" in shown
    assert invoke("compare", new, base).return_value == 0
    assert sorted(p.name for p in (base / "digits_cure").iterdir()) == ["manifest.json", "samples.parquet"]
    assert sorted(p.name for p in base.iterdir()) == ["digits_cure"]
    assert (
        "digits_cure: new, worst case 0.0 % of 200"
        in invoke("baseline", "update", new, tmp_path / "x").output
    )


def test_an_update_that_cannot_be_written_leaves_the_old_baseline(tmp_path, before, monkeypatch):
    place = tmp_path / "base" / "digits_cure"
    before.save(place)
    old = (place / "samples.parquet").read_bytes()
    with_columns(before, **{"fgsm.broken": before.samples["fgsm.broken"] | True}).save(tmp_path / "new")

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Record, "save", full)
    with pytest.raises(UsageError, match="No space left on device"):
        update(tmp_path / "new", place)
    assert (place / "samples.parquet").read_bytes() == old
    assert [p.name for p in (tmp_path / "base").iterdir()] == ["digits_cure"]


def test_bad_input_is_one_line(tmp_path, before):
    before.save(tmp_path / "a" / "digits_cure")
    other = with_manifest(before, model=before.manifest.model.model_copy(update={"id": "other"}))
    other.save(tmp_path / "b" / "other")
    before.save(tmp_path / "b" / "digits_cure")
    with pytest.raises(UsageError, match="has no run of other, which the baseline"):
        invoke("compare", tmp_path / "a", tmp_path / "b")
    with pytest.raises(UsageError, match="no such run directory"):
        invoke("compare", tmp_path / "nowhere", tmp_path / "a")
    unreliable = with_manifest(before, flags=[Flag(kind="stochastic", evidence="x")])
    unreliable.save(tmp_path / "c")
    with pytest.raises(UsageError, match="cannot be a baseline"):
        invoke("baseline", "update", tmp_path / "c", tmp_path / "d")
    for options, words in ((("--n", "auto"), "go together"), (("--tolerance", "1"), "go together")):
        with pytest.raises(UsageError, match=words):
            invoke("evaluate", *options)


def test_evaluate_sizes_itself(tmp_path):
    arguments = (
        "--model",
        "digits_normal",
        "--battery",
        "digits",
        "--out",
        tmp_path / "r",
        "--device",
        "cpu",
    )
    invoke("evaluate", *arguments, "--n", "auto", "--tolerance", "20")
    record = Record.load(tmp_path / "r" / "digits_normal")
    assert record.n == sample_size(0.2, 0.01)
    assert math.isclose(record.n, 24, abs_tol=4)


# --- proof on real runs -------------------------------------------------------------------------------


def kind(new: Record, before: Record) -> tuple[str, int]:
    found = compare(new, before, Rules()).verdict
    return found.kind, found.exit_code


@pytest.mark.slow
def test_attacks_cut_to_a_tenth_of_their_steps_are_noticed(before, monkeypatch):
    """As printed the run is not comparable; claimed to be the same battery, it is a suspicious rise."""
    monkeypatch.setattr(PGD, "check", lambda self, threat: None)  # batteries refuse two steps themselves
    weak = tuple(
        a.model_copy(update={"steps": a.steps // 10}) if hasattr(a, "steps") else a for a in short().attacks
    )
    new = judged(
        load_model("digits_cure", device="cpu"), battery=short().model_copy(update={"attacks": weak})
    )
    assert kind(new, before) == ("not comparable", 2)
    claimed = with_manifest(
        new, battery=before.manifest.battery, battery_digest=before.manifest.battery_digest
    )
    assert kind(claimed, before) == ("suspicious rise", 1)


def changed(change) -> Classifier:
    module = copy.deepcopy(load_model("digits_cure", device="cpu").module)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        change(module)
    return Classifier(module, num_classes=10, input_shape=(1, 8, 8), batch_size=256)


@pytest.mark.slow
def test_noise_on_the_weights_and_a_zeroed_layer_are_regressions(before):
    def noise(module):
        for parameter in module.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)

    def zero(module):
        [part for part in module.modules() if isinstance(part, torch.nn.Conv2d)][1].weight.zero_()

    assert kind(judged(changed(noise)), before) == ("regression", 1)
    assert kind(judged(changed(zero)), before) == ("regression", 1)
    assert kind(judged(changed(lambda module: None)), before) == ("pass", 0)


@pytest.mark.slow
def test_what_does_not_change_the_model_passes(before, tmp_path):
    assert kind(judged(load_model("digits_cure", device="cpu", batch_size=37)), before) == ("pass", 0)
    assert kind(judged(load_model("digits_cure", device="cpu", precision="fp32")), before) == ("pass", 0)
    assert kind(judged(load_model("digits_cure", device="cpu"), seed=7), before) == ("pass", 0)
    for part in (1, 2):
        judged(
            load_model("digits_cure", device="cpu"), out=tmp_path / str(part), shard=(part, 2), shard_size=100
        )
    joined = merge([tmp_path / "1", tmp_path / "2"], tmp_path / "joined")
    assert kind(joined, before) == ("pass", 0)


# --- what the documentation promises ------------------------------------------------------------------


def test_the_committed_baseline_and_the_workflow_are_what_the_documentation_says():
    root = Path(__file__).parents[1]
    records = find_records((root / "reports" / "measured" / "digits",))
    assert [r.manifest.model.id for r in records] == [
        "digits_cure",
        "digits_deepfool",
        "digits_normal",
        "digits_pgd_at",
    ]
    workflow = (root / ".github" / "workflows" / "robustness.yml").read_text()
    steps = re.findall(r"cure-bench (\w+)", workflow)
    assert steps == ["selftest", "evaluate", "compare"]
    assert all(verb in cli.commands for verb in steps)
    gate = (root / "docs" / "gate.md").read_text()
    assert "1,055 at 0.5 points, 527 at 1, 262 at 2, 104 at 5" in gate
    assert [sample_size(t, 0.01) for t in (0.005, 0.01, 0.02, 0.05)] == [1055, 527, 262, 104]
