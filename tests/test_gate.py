"""The gate: exact tests against enumeration, one outcome for every case, incompatibilities, every output."""

from __future__ import annotations

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from made import with_columns
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm

from robustbench_cure import evaluate, load_battery, load_dataset, load_model
from robustbench_cure.cli.main import StoppedError, cli
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.evaluation.record import Record
from robustbench_cure.gate import baseline
from robustbench_cure.gate.compare import compare, compare_runs
from robustbench_cure.gate.outcome import (
    EXIT_CODES,
    ORDER,
    OUTCOMES,
    AccuracyChange,
    Rules,
    conclude,
    find_changes,
)
from robustbench_cure.gate.render import (
    overall,
    sentences,
    summary,
    terminal,
    to_annotations,
    to_json,
    to_junit,
)
from robustbench_cure.stats import NOISE, DiscordantPairs, chances, sample_size, tail
from robustbench_cure.threat import ThreatModel

ONE = Fraction(1, 100)
RULES = Rules()

# --- statistics ---------------------------------------------------------------------------------------


def discordant(lost: int, gained: int, n: int = 500, before: int = 200) -> DiscordantPairs:
    return DiscordantPairs(n, before, before + gained - lost, lost, gained)


def test_flips_are_counted_on_both_sides():
    before = np.array([1, 1, 1, 0, 0, 0, 1, 0], bool)
    after = np.array([1, 0, 0, 1, 0, 0, 1, 0], bool)
    assert DiscordantPairs.between(before, after) == DiscordantPairs(n=8, before=4, after=3, lost=2, gained=1)
    assert DiscordantPairs.between(before, after).change == -1 / 8
    assert DiscordantPairs.between(after, before).change == 1 / 8
    assert discordant(0, 0, 0, 0).change == 0


@pytest.mark.parametrize(("more", "fewer"), [(0, 0), (1, 0), (3, 1), (5, 5), (7, 0), (2, 6)])
def test_the_exact_test_counts_coin_tosses(more, fewer):
    tosses = list(itertools.product((0, 1), repeat=more + fewer))
    assert tail(more, fewer) == pytest.approx(sum(sum(t) >= more for t in tosses) / len(tosses))


@pytest.mark.parametrize(("lost", "gained"), [(40, 25), (3, 200), (512, 512)])
def test_both_one_sided_p_values_are_exact_sums(lost, gained):
    pairs, changed = lost + gained, discordant(lost, gained, n=2000)
    falls = sum(Fraction(math.comb(pairs, k), 2**pairs) for k in range(lost, pairs + 1))
    rises = sum(Fraction(math.comb(pairs, k), 2**pairs) for k in range(gained, pairs + 1))
    assert (changed.p_fall, changed.p_rise) == pytest.approx((float(falls), float(rises)), rel=1e-9)


def test_the_tolerance_is_exact():
    """In floating point 0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996."""
    assert not discordant(7, 0, n=100).fell_beyond(Fraction(7, 100))
    assert not discordant(29, 0, n=100).fell_beyond(Fraction(29, 100))
    assert discordant(30, 0, n=100).fell_beyond(Fraction(29, 100))
    assert not discordant(0, 7, n=100).rose_beyond(Fraction(7, 100))
    assert discordant(2, 10, n=100).rose_beyond(Fraction(7, 100))
    assert not discordant(5, 10, n=100).rose_beyond(Fraction(7, 100))
    assert not discordant(10, 5, n=100).fell_beyond(Fraction(7, 100))


def likeliest(lost: int, gained: int, n: int, difference: float) -> float:
    """Score statistic at a difference, the nuisance parameter found by a search instead of a formula."""

    def unlikely(q: float) -> float:
        gains, losses = (c * np.log(p) if c else 0.0 for c, p in ((gained, q + difference), (lost, q)))
        return -(gains + losses + (n - lost - gained) * np.log(1 - 2 * q - difference))

    inside = (max(0.0, -difference) + 1e-14, (1 - difference) / 2 - 1e-14)
    q = minimize_scalar(unlikely, bounds=inside, method="bounded", options={"xatol": 1e-13}).x
    return (gained - lost - n * difference) / np.sqrt(n * (2 * q + difference - difference**2))


INTERVALS = [(7, 1, 500), (2, 12, 50), (40, 40, 200), (3, 1, 2000), (10, 0, 50)]


@pytest.mark.parametrize(("lost", "gained", "n"), INTERVALS)
def test_the_interval_is_the_score_interval(lost, gained, n):
    z, change = norm.isf(0.025), (gained - lost) / n
    low = brentq(lambda d: likeliest(lost, gained, n, d) - z, -0.9, change - 1e-9)
    high = brentq(lambda d: likeliest(lost, gained, n, d) + z, change + 1e-9, 0.9)
    assert discordant(lost, gained, n).interval == pytest.approx((low, high), abs=1e-6)


@given(st.integers(1, 3000), st.data())
def test_the_interval_is_antisymmetric_holds_the_change_and_stays_inside(n, data):
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    low, high = discordant(lost, gained, n).interval
    assert -1 <= low <= discordant(lost, gained, n).change <= high <= 1
    assert discordant(gained, lost, n).interval == pytest.approx((-high, -low), abs=1e-9)


def test_the_interval_without_flips_has_its_closed_form_and_covers():
    z2 = norm.isf(0.025) ** 2
    assert discordant(0, 0, 500).interval == pytest.approx((-z2 / (500 + z2), z2 / (500 + z2)))
    assert discordant(0, 0, 0, 0).interval == (-1, 1)
    assert discordant(500, 0).interval == pytest.approx((-1, (z2 - 500) / (z2 + 500)))
    generator = np.random.default_rng(0)
    counts = generator.multinomial(400, [0.04, 0.01, 0.95], size=2000)
    covered = [low <= -0.03 <= high for low, high in (discordant(a, b, 400).interval for a, b, _ in counts)]
    assert 0.935 < np.mean(covered) < 0.965


@pytest.mark.parametrize("tolerance", [Fraction(0), ONE, Fraction(1, 30)])
@pytest.mark.parametrize(("lose", "gain"), [(0.0, 0.0), (0.02, 0.0), (0.03, 0.01), (0.01, 0.05)])
def test_chances_are_those_of_an_enumeration(tolerance, lose, gain):
    n, level = 60, 0.01
    expected = {"pass": 0.0, "inconclusive": 0.0, "regression": 0.0}
    logs = [sum(np.log(np.arange(1, k + 1))) for k in range(n + 1)]
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            stay = n - lost - gained
            parts = ((lost, lose), (gained, gain), (stay, 1 - lose - gain))
            if any(k and not p for k, p in parts):
                continue
            chance = np.exp(
                logs[n] - sum(logs[k] for k, _ in parts) + sum(k * np.log(p) for k, p in parts if k)
            )
            found = outcome(discordant(lost, gained, n), Rules(tolerance, level=level))
            expected["pass" if found == "suspicious rise" else found] += chance
    found = chances(n, lose, gain, tolerance, level)
    assert found == pytest.approx(tuple(expected.values()), abs=1e-8)


def test_chances_count_the_case_in_which_every_sample_flips():
    """Three losses of three are beyond chance at 1/8, two of two, at 1/4, are not."""
    assert chances(3, 1.0, 0.0, Fraction(0), 0.2) == pytest.approx((0, 0, 1))
    assert chances(3, 0.5, 0.5, Fraction(0), 0.2) == pytest.approx((1 / 2, 3 / 8, 1 / 8))


@pytest.mark.parametrize("tolerance", [Fraction(1, 200), ONE, Fraction(1, 20)])
def test_the_sample_size_is_the_first_that_notices_twice_the_tolerance(tolerance):
    n, lose = sample_size(tolerance, 0.01), 2 * float(tolerance) + NOISE
    assert chances(n, lose, NOISE, tolerance, 0.01).fell >= 0.9
    assert chances(n - 1, lose, NOISE, tolerance, 0.01).fell < 0.9
    assert chances(n // 2, lose, NOISE, tolerance, 0.01).fell < 0.9


def test_a_tolerance_that_would_take_millions_is_refused():
    with pytest.raises(ValueError, match=r"of 0\.0001 points would take over 10,000,000 samples"):
        sample_size(Fraction(1, 10**6), 0.01)


@pytest.mark.parametrize(("lost", "gained"), [(6, 0), (20, 12), (10, 4), (40, 33)])
def test_the_deciding_number_of_samples_decides(lost, gained):
    held = discordant(lost, gained)
    assert outcome(held) == "inconclusive"
    n = held.decides_at(ONE, 0.01)
    assert n > held.n
    counts = np.random.default_rng(0).multinomial(
        n, [lost / 500, gained / 500, 1 - (lost + gained) / 500], 1500
    )
    unclear = [outcome(discordant(int(a), int(b), n, n)) == "inconclusive" for a, b, _ in counts]
    assert np.mean(unclear) < 0.13
    assert chances(held.n, lost / 500, gained / 500, ONE, 0.01).unclear > 0.1


def test_a_deciding_number_is_more_than_there_are():
    assert discordant(0, 0).decides_at(ONE, 0.01) == 501  # nothing flips: any number decides


def test_where_no_number_decides_that_is_said():
    assert discordant(2000, 1999, 10_000).decides_at(Fraction(0), 1e-6) is None


# --- the outcome --------------------------------------------------------------------------------------


def rows(
    worst: DiscordantPairs,
    rules: Rules,
    clean: DiscordantPairs | None,
    attacks: list[DiscordantPairs],
    same: bool,
):
    accuracies = [AccuracyChange("clean", "clean", "clean", clean or discordant(0, 0, worst.n, worst.n))]
    accuracies += [AccuracyChange(f"a{i}", f"A{i}", "attack", f) for i, f in enumerate(attacks)]
    return find_changes(
        [*accuracies, AccuracyChange("worst_case", "worst", "worst", worst)], rules, same_weights=same
    )


def outcome(
    worst: DiscordantPairs, rules: Rules = RULES, clean: DiscordantPairs | None = None, attacks=(), same=False
) -> str:
    return conclude([row.finding for row in rows(worst, rules, clean, list(attacks), same)], rules).kind


@pytest.mark.parametrize(
    ("worst", "kind"),
    [
        (discordant(0, 0), "pass"),
        (discordant(5, 0), "pass"),  # one point: the tolerance
        (discordant(6, 0), "inconclusive"),  # p = 1/64
        (discordant(7, 0), "regression"),  # p = 1/128
        (discordant(20, 14), "inconclusive"),
        (discordant(40, 10), "regression"),
        (discordant(0, 6), "pass"),
        (discordant(0, 7), "suspicious rise"),
        (discordant(14, 20), "pass"),
        (discordant(10, 40), "suspicious rise"),
        (discordant(0, 0, n=1, before=1), "pass"),
        (
            discordant(1, 0, n=1, before=1),
            "inconclusive",
        ),  # a gate that can show nothing does not pass a fall
        (discordant(0, 0, n=10_000), "pass"),
        (discordant(100, 0, n=10_000), "pass"),  # certain, and tolerated
        (discordant(101, 0, n=10_000), "regression"),
    ],
)
def test_tolerance_and_chance_decide_together(worst, kind):
    assert outcome(worst) == kind
    assert EXIT_CODES[kind] == int(kind != "pass")


def test_the_level_itself_is_beyond_chance():
    assert outcome(discordant(6, 0), Rules(level=1 / 64)) == "regression"
    assert outcome(discordant(0, 6), Rules(level=1 / 64)) == "suspicious rise"
    assert outcome(discordant(6, 0), Rules(level=0.99 / 64)) == "inconclusive"
    assert chances(600, 0.012, 0, ONE, 1 / 64).unclear == pytest.approx(0, abs=1e-9)


def test_a_rise_needs_another_network_and_another_clean_accuracy_to_be_explained():
    risen, moved, still = discordant(0, 30), discordant(0, 20), discordant(0, 5)
    assert outcome(risen, clean=moved) == "pass"
    assert outcome(risen, clean=moved, same=True) == "suspicious rise"
    assert outcome(risen, clean=still) == "suspicious rise"
    assert outcome(discordant(0, 0), clean=discordant(20, 0)) == "regression"
    assert outcome(discordant(0, 0), clean=discordant(0, 20)) == "pass"
    assert outcome(risen, clean=discordant(20, 0)) == "regression"
    assert outcome(discordant(0, 0), clean=moved, same=True) == "pass"  # no attack is behind a clean accuracy


def test_an_attack_alone_alarms_only_where_it_is_sure():
    assert outcome(discordant(0, 0), attacks=[discordant(6, 0)]) == "pass"
    assert outcome(discordant(0, 0), attacks=[discordant(20, 0)]) == "regression"
    assert outcome(discordant(0, 0), attacks=[discordant(0, 20)]) == "suspicious rise"
    assert outcome(discordant(0, 0), attacks=[discordant(8, 0)]) == "regression"
    assert outcome(discordant(0, 0), attacks=[discordant(8, 0)] * 9) == "pass"  # 1/256 > 0.01/9
    assert outcome(discordant(8, 0), attacks=[discordant(8, 0)] * 9) == "regression"


def test_the_minimum_is_absolute_and_exact():
    assert outcome(discordant(0, 0, before=200), Rules(min_robust=Fraction(4, 10))) == "pass"
    assert outcome(discordant(1, 0, before=200), Rules(min_robust=Fraction(4, 10))) == "regression"
    assert (
        outcome(discordant(0, 0), Rules(min_robust=Fraction(1, 2)), attacks=[discordant(0, 30)])
        == "regression"
    )


def test_verdicts_and_exit_codes_are_ordered_and_accepted():
    assert set(OUTCOMES.values()) == set(ORDER) == set(EXIT_CODES)
    found = conclude(["held", "may have fallen"], Rules(accept=("inconclusive",)))
    assert (found.kind, found.exit_code) == ("inconclusive", 0)
    # What is accepted hides nothing that is not, though a rise is worse than what is inconclusive.
    found = conclude(["rose", "may have fallen"], Rules(accept=("suspicious rise",)))
    assert (found.kind, found.exit_code) == ("inconclusive", 1)
    assert conclude(["not comparable", "fell"], Rules()).exit_code == 2


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_false_alarms_of_two_equal_runs_are_rare(noise):
    """Nine accuracies with noise of their own; n = 500, where inconclusive must not be the usual answer."""
    generator = np.random.default_rng(0)
    kinds = []
    for pairs in generator.binomial(500, noise, size=(1000, 9, 2)):
        each = [discordant(int(a), int(b)) for a, b in pairs]
        kinds.append(outcome(each[0], attacks=each[1:]))
    alarms = kinds.count("regression") + kinds.count("suspicious rise")
    assert alarms <= 40  # four families of tests at 1 % each
    assert kinds.count("inconclusive") <= (15 if noise == 0.005 else 130)


# --- records ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def before() -> Record:
    battery = load_battery("digits")
    quick = tuple(a.model_copy(update={"limit": 0}) for a in battery.attacks if a.id in ("fgsm", "pgd7"))
    limited = next(a for a in battery.attacks if a.id == "uniform_noise").model_copy(update={"limit": 40})
    battery = battery.model_copy(update={"attacks": (*quick, limited)})
    return evaluate(load_model("digits_cure", device="cpu"), battery, load_dataset("digits"), n=200)


def with_manifest(record: Record, **parts) -> Record:
    return Record(record.manifest.model_copy(update=parts), record.samples)


def with_battery(record: Record, **parts) -> Record:
    battery = record.manifest.battery.model_copy(update=parts)
    return with_manifest(record, battery=battery, battery_digest=battery.digest)


def with_model(record: Record, **parts) -> Record:
    return with_manifest(record, model=record.manifest.model.model_copy(update=parts))


def broken(record: Record, attack: str = "fgsm", count: int = 1000) -> Record:
    """The record with so many more samples broken by an attack."""
    column = record.samples[f"{attack}.broken"].copy()
    column[record.samples.index[record.worst_case][:count]] = True
    return with_columns(record, **{f"{attack}.broken": column})


def test_a_record_passes_beside_itself_in_any_order_of_its_rows(before):
    shuffled = Record(before.manifest, before.samples.iloc[::-1].reset_index(drop=True))
    found = compare(shuffled, before, RULES)
    assert (found.outcome.kind, found.notes, found.incompatibilities) == ("pass", (), ())
    assert all((row.accuracy.pairs.lost, row.accuracy.pairs.gained) == (0, 0) for row in found.rows)
    assert [row.accuracy.pairs.before / row.accuracy.pairs.n for row in found.rows] == [
        before.clean_accuracy.value,
        *(before.robust_accuracy(a.id).value for a in before.attacks),
        before.worst_case_accuracy.value,
    ]


def test_of_a_smaller_run_its_samples_are_compared(before):
    part = before.samples[before.samples["rank"] < 50].reset_index(drop=True)
    for new, old in ((Record(before.manifest, part), before), (before, Record(before.manifest, part))):
        found = compare(new, old, RULES)
        assert found.outcome.kind == "pass"
        assert [row.accuracy.pairs.n for row in found.rows] == [50, 50, 50, 40, 50]
        assert found.n == 50
        assert [note.what for note in found.notes] == ["samples"]


def test_of_an_attack_with_a_limit_the_samples_count_that_it_covers_in_both(before):
    """Another order of the subset: of its first 40 samples, only some are among the first 40 of before."""
    order = before.samples["rank"]
    turned = with_columns(before, rank=(order + 190) % 200)
    (row,) = (r for r in compare(turned, before, RULES).rows if r.accuracy.id == "uniform_noise")
    assert (
        row.accuracy.pairs.n
        == 30
        == int((before.covered("uniform_noise") & (turned.samples["rank"] < 40)).sum())
    )


def test_flips_in_the_table_are_those_in_the_samples(before):
    found = compare(broken(before, count=9), before, RULES)
    lost = {row.accuracy.id: row.accuracy.pairs.lost for row in found.rows}
    assert lost == {"clean": 0, "fgsm": 9, "pgd7": 0, "uniform_noise": 0, "worst_case": 9}
    assert (found.outcome.kind, found.outcome.exit_code) == ("regression", 1)
    risen = compare(before, broken(before, count=9), RULES)
    assert {row.accuracy.id: row.accuracy.pairs.gained for row in risen.rows} == lost
    assert (risen.outcome.kind, risen.outcome.exit_code) == ("suspicious rise", 1)


def differences(new: Record, before: Record) -> dict[str, tuple[str, str]]:
    """What makes two records incompatible: its name -> (now, before)."""
    found = compare(new, before, RULES)
    assert (found.outcome.kind, found.outcome.exit_code, found.rows) == ("not comparable", 2, ())
    assert all(
        d.what in text for d, text in zip(found.incompatibilities, sentences(found, RULES), strict=False)
    )
    return {d.what: (d.now, d.before) for d in found.incompatibilities}


def test_what_differs_in_the_protocol_is_named(before):
    fewer = [a for a in before.attacks if a.id != "fgsm"]
    fewer[0] = fewer[0].model_copy(update={"steps": 2})
    assert differences(with_battery(before, attacks=tuple(fewer)), before) == {
        "attack fgsm": ("absent", "present"),  # not every parameter of an attack that is not there
        "attack pgd7, steps": ("2", "7"),
    }
    assert differences(with_battery(before, threat=ThreatModel("linf", "8/255"), version=2), before) == {
        "threat model, eps": ("8/255", "51/255"),
        "battery version": ("2", "1"),
    }
    # Another text is another digest and the same protocol.
    assert compare(with_battery(before, notes="Other words."), before, RULES).outcome.kind == "pass"


def test_what_differs_in_the_data_is_named(before):
    pixels = before.samples["image_sha256"].copy()
    pixels[:3] = "0" * 64
    ((what, (now, _)),) = differences(with_columns(before, image_sha256=pixels), before).items()
    assert ("image_sha256" in what, re.findall(r"\d+", now)) == (True, ["3", "200"])
    labels = (before.samples["label"] + 1) % 10
    ((what, (now, _)),) = differences(with_columns(before, label=labels), before).items()
    assert (what, re.findall(r"\d+", now)) == ("labels", ["200", "200"])
    others = before.samples["sample_id"].copy()
    moved = differences(with_columns(before, sample_id=others + "x"), before)["sample ids"]
    assert [re.findall(r"\d+", side) for side in moved] == [["200"], ["200"]]
    others[:2] += "x"  # 198 in both, and still somebody chose other samples
    moved = differences(with_columns(before, sample_id=others), before)["sample ids"]
    assert [re.findall(r"\d+", side) for side in moved] == [["2"], ["2"]]
    svhn = before.manifest.data.model_copy(update={"name": "svhn"})
    assert differences(with_manifest(before, data=svhn), before) == {"data set": ("svhn test", "digits test")}
    random = with_manifest(before, flags=[Flag(kind="stochastic", evidence="seen")])
    now, then = differences(random, before)["reliability"]
    assert ("stochastic" in now, then) == (True, "reliable")


def test_other_code_around_the_same_weights_is_noted(before):
    answers = [2.0, -1.0, 0.5]
    known = with_model(before, answers=answers)
    turned = with_model(before, answers=[-a for a in answers])
    (note,) = compare(turned, known, RULES).notes
    assert (note.now, "weights" in note.what) == ("other", True)
    retrained = with_model(turned, weights_sha256="0" * 64, tensors_sha256="0" * 64)
    assert note not in compare(retrained, known, RULES).notes


def test_flags_that_differ_are_noted_with_their_attacks(before):
    kinds = [
        Flag(kind="side_effects", evidence="seen", attack="fgsm"),
        Flag(kind="search_in_fp32", evidence="all"),
    ]
    flagged = with_manifest(before, flags=kinds)
    (note,) = (n for n in compare(flagged, before, RULES).notes if n.what == "flags")
    assert set(note.now.split(", ")) - set(note.before.split(", ")) == {
        "search_in_fp32",
        "side_effects (fgsm)",
    }


def test_a_sample_that_is_there_twice_is_an_error(before):
    ids = before.samples["sample_id"].copy()
    ids[1] = ids[0]
    with pytest.raises(UsageError, match=re.escape(str(ids[0]))):
        compare(with_columns(before, sample_id=ids), before, RULES)


def test_models_are_paired_by_their_ids_and_none_is_forgotten(before):
    other = with_model(before, id="other")
    found = compare_runs([before, other], [other, before], RULES)
    assert [c.model for c in found] == ["digits_cure", "other"]
    assert overall(found, RULES).exit_code == 0
    for new, old, presence, remedy in (
        ([before], [before, other], ("absent", "present"), "Evaluate"),
        ([before, other], [before], ("present", "absent"), "cure-bench baseline update"),
    ):
        found = compare_runs(new, old, RULES)
        assert [c.outcome.kind for c in found] == ["pass", "not comparable"]
        assert overall(found, RULES).exit_code == 2
        (lone,) = found[1].incompatibilities
        assert (lone.what, (lone.now, lone.before)) == ("model", presence)
        assert remedy in sentences(found[1], RULES)[1]
    (found,) = compare_runs([other], [before], RULES)  # a run of one model against another one
    assert [note.what for note in found.notes] == ["model"]
    with pytest.raises(UsageError, match="digits_cure"):
        compare_runs([before, before], [before, other], RULES)


# --- words --------------------------------------------------------------------------------------------


def test_alarms_name_the_cause_that_the_weights_allow(before):
    retrained = with_model(before, weights_sha256="0" * 64, tensors_sha256="0" * 64)
    fallen, risen = broken(before), before
    assert "stronger" in sentences(compare(fallen, before, RULES), RULES)[0]
    assert "weaker" in sentences(compare(risen, fallen, RULES), RULES)[0]
    assert "cure-bench masking" in sentences(compare(retrained, fallen, RULES), RULES)[0]
    assert "weights" not in sentences(compare(broken(retrained), before, RULES), RULES)[0]


def per_cents(text: str) -> list[float]:
    """Numbers with a digit behind the point, in order."""
    return [float(number) for number in re.findall(r"\d+\.\d", text)]


def test_a_pass_states_what_it_rules_out_and_inconclusive_what_would_decide(before):
    found = compare(before, before, RULES)
    low = 100 * norm.isf(0.025) ** 2 / (200 + norm.isf(0.025) ** 2)
    assert round(low, 1) in per_cents(sentences(found, RULES)[0])
    one = compare(broken(before, count=1), before, RULES)
    low, high = discordant(1, 0, 200).interval
    assert -low > high
    assert round(-100 * low, 1) in per_cents(sentences(one, RULES)[0])
    found = compare(broken(before, count=5), before, RULES)
    assert found.outcome.kind == "inconclusive"
    n = next(r for r in found.rows if r.accuracy.id == "worst_case").accuracy.pairs.decides_at(ONE, 0.01)
    text = sentences(found, RULES)[0]
    stated = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", text)]
    assert any(n <= number < 1.1 * n for number in stated)
    few = with_manifest(broken(before, count=5), data=before.manifest.data.model_copy(update={"total": 200}))
    limited = sentences(compare(few, before, RULES), RULES)[0]
    assert limited.startswith(text)
    assert re.findall(r"\d+", limited.removeprefix(text)) == ["200"]


# --- outputs ------------------------------------------------------------------------------------------


@pytest.fixture
def fallen(before):
    return compare(broken(before), before, RULES)


def test_the_terminal_fits_and_names_the_reason(before, fallen):
    hostile = with_model(before, id="a\x1b[31m\nb" * 20)
    absent = compare_runs([before, with_model(before, id="x" * 100)], [before], RULES)
    changed = with_battery(before, attacks=before.attacks[:1], version=3)
    for found in ([fallen], absent, [compare(hostile, before, RULES)], [compare(changed, before, RULES)]):
        text = terminal(found, RULES)
        assert max(map(len, text.splitlines())) <= 80
        assert "\x1b" not in text
    text = terminal([fallen], RULES)
    assert text.split("\n")[0].split(": ") == ["digits_cure", "REGRESSION"]
    assert re.search(r"worst case fell .* p = ", " ".join(text.split()))
    assert re.search(r"FGSM .* fell$", text, re.MULTILINE)
    assert "uniform noise (n =" not in text.split("\n")[2]  # the head; the row says its own n
    assert "(n = 40)" in summary([fallen], RULES)


def test_junit_is_well_formed_and_fails_what_failed(fallen, before):
    apart = compare(with_battery(before, version=2), before, RULES)
    root = ET.fromstring(to_junit([fallen, compare(before, before, RULES), apart], RULES))
    suites = [(s.get("tests"), s.get("failures"), s.get("errors")) for s in root]
    assert suites == [("5", "2", "0"), ("5", "0", "0"), ("1", "0", "1")]
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("11", "2", "1")
    failed = [case.get("name") for case in root.iter("testcase") if case.find("failure") is not None]
    assert failed == ["FGSM", "worst case"]
    assert root.find(".//error").get("message").startswith("battery version: 2")
    unclear = compare(broken(before, count=5), before, RULES)
    for accept, count in (((), "1"), (("inconclusive",), "0")):
        assert ET.fromstring(to_junit([unclear], Rules(accept=accept))).get("failures") == count


def test_hostile_names_reach_no_format_as_markup(before):
    name = "a|b\n::error::<b>x</b>%0A\x00"
    spec = before.attacks[0].model_copy(update={"name": name})
    new = with_model(with_battery(before, attacks=(spec, *before.attacks[1:])), id=name)
    found = [compare(new, new, RULES)]
    assert found[0].outcome.kind == "pass"
    assert ET.fromstring(to_junit(found, RULES)) is not None
    (line,) = to_annotations(found, RULES)
    assert line.startswith("::notice title=a|b %3A%3Aerror%3A%3A")
    assert not re.search(r"\n|%0A", line)
    text = summary(found, RULES)
    assert "<b>" not in text
    assert "::error" not in text.split("\n")[0]
    assert json.loads(to_json(found, RULES))["models"][0]["model"] == name


def test_annotations_have_the_severity_of_the_exit_code(before, fallen):
    unclear = compare(broken(before, count=5), before, Rules(accept=("inconclusive",)))
    levels = [
        line.split(" ")[0] for line in to_annotations([fallen, unclear], Rules(accept=("inconclusive",)))
    ]
    assert levels == ["::error", "::warning"]


def test_json_holds_everything_and_agrees(fallen):
    rules = Rules(min_robust=Fraction(1, 10))
    found = json.loads(to_json([fallen], rules))
    assert (found["verdict"], found["exit_code"]) == ("regression", 1)
    (model,) = found["models"]
    held = {row["id"]: row for row in model["accuracies"]}
    worst = held["worst_case"]
    assert worst["lost"] == worst["before"] - worst["now"] > 0
    assert worst["p_fall"] == pytest.approx(0.5 ** worst["lost"])
    assert worst["change_low"] < worst["change"] < worst["change_high"] < 0
    assert [held[k]["level"] for k in ("worst_case", "fgsm")] == pytest.approx([0.01, 0.01 / 3])
    assert model["new"]["weights_sha256"] == model["baseline"]["weights_sha256"]
    assert found["rules"] == {"tolerance": 0.01, "min_robust": 0.1, "level": 0.01, "accept": []}


# --- the commands -------------------------------------------------------------------------------------


def invoke(*arguments: object):
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False)


@pytest.fixture
def saved(tmp_path, before) -> tuple[Path, Path]:
    """A new run that fell, and its baseline."""
    before.save(tmp_path / "base" / "digits_cure")
    broken(before).save(tmp_path / "new" / "digits_cure")
    return tmp_path / "new", tmp_path / "base"


def test_compare_writes_what_it_says(saved, tmp_path, monkeypatch):
    new, base = saved
    assert invoke("compare", base, base).return_value == 0
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    files = ["--markdown", tmp_path / "m.md", "--junit", tmp_path / "j.xml", "--json", tmp_path / "c.json"]
    result = invoke("compare", new, base, *files, "--github")
    assert result.return_value == 1
    assert "::error title=digits_cure%3A regression::" in result.output
    assert (tmp_path / "summary.md").read_text() == (tmp_path / "m.md").read_text() + "\n"
    assert json.loads((tmp_path / "c.json").read_text())["verdict"] == "regression"
    assert ET.parse(tmp_path / "j.xml").getroot().get("failures") == "2"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "where"))
    with pytest.raises(UsageError, match="GITHUB_STEP_SUMMARY"):
        invoke("compare", new, base, "--github")


def test_options_change_the_exit_code(saved, before):
    new, base = saved
    least = f"{100 * before.worst_case_accuracy.value:g}"
    assert invoke("compare", base, base, "--min-robust", least).return_value == 0
    assert invoke("compare", base, base, "--min-robust", float(least) + 0.1).return_value == 1
    assert invoke("compare", new, base, "--tolerance", "50").return_value == int(float(least) > 50)
    assert invoke("compare", base, new).return_value == 1
    assert invoke("compare", base, new, "--accept", "suspicious rise").return_value == 0
    assert invoke("compare", new, base, "--accept", "suspicious rise").return_value == 1


def test_update_shows_the_change_and_replaces_the_baseline(saved, before, tmp_path):
    new, base = saved
    (base / "other").mkdir()
    with_model(before, id="other").save(base / "other")
    assert "digits_cure: REGRESSION" in invoke("baseline", "update", new, base).output
    assert sorted(p.name for p in (base / "digits_cure").iterdir()) == ["manifest.json", "samples.parquet"]
    assert sorted(p.name for p in base.iterdir()) == ["digits_cure", "other"]
    assert invoke("compare", new / "digits_cure", base / "digits_cure").return_value == 0
    shown = invoke("baseline", "update", new, tmp_path / "fresh").output
    assert "digits_cure: new" in shown
    assert re.findall(r"[\d.]+", shown.split("worst case")[1].split("\n")[0]) == ["0.0", "0.0", "1.9", "200"]
    one = tmp_path / "alone"
    one.mkdir()
    invoke("baseline", "update", new / "digits_cure", one)  # a run of one model is its own folder
    assert sorted(p.name for p in one.iterdir()) == ["manifest.json", "samples.parquet"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", range(1, 7))
def test_an_update_that_fails_anywhere_leaves_the_old_baseline(tmp_path, before, monkeypatch, failure, at):
    """Two models, so two copies and four renames: each of them fails once."""
    base, new = tmp_path / "base", tmp_path / "new"
    for name in ("one", "two"):
        with_model(before, id=name).save(base / name)
        broken(with_model(before, id=name)).save(new / name)
    old, steps = snapshot(base), iter(range(1, 100))
    save, rename = Record.save, Path.rename

    def failing(work):
        def step(self, *arguments):
            if next(steps) == at:
                raise failure
            return work(self, *arguments)

        return step

    monkeypatch.setattr(Record, "save", failing(save))
    monkeypatch.setattr(Path, "rename", failing(rename))
    expected = UsageError if isinstance(failure, OSError) else StoppedError
    with pytest.raises(expected):
        invoke("baseline", "update", new, base)
    assert snapshot(base) == old
    monkeypatch.undo()
    invoke("baseline", "update", new, base)
    assert snapshot(base) != old


def test_bad_input_is_one_line(tmp_path, before):
    before.save(tmp_path / "a" / "digits_cure")
    with pytest.raises(UsageError, match="no such run directory"):
        invoke("compare", tmp_path / "nowhere", tmp_path / "a")
    with_manifest(before, flags=[Flag(kind="stochastic", evidence="x")]).save(tmp_path / "c")
    with pytest.raises(UsageError, match="cannot be a baseline"):
        invoke("baseline", "update", tmp_path / "c", tmp_path / "d")
    with pytest.raises(UsageError, match="new run itself"):
        invoke("baseline", "update", tmp_path / "a", tmp_path / "a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"mine: .*not a run"):
        invoke("baseline", "update", tmp_path / "a" / "digits_cure", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    for words in (("--n", "auto"), ("--tolerance", "1")):
        with pytest.raises(UsageError, match="go together"):
            invoke("evaluate", *words)
    with pytest.raises(UsageError, match="0 and 25"):
        invoke("evaluate", "--n", "auto", "--tolerance", "0")


@pytest.mark.parametrize(
    "words",
    ["--tolerance nan", "--tolerance -1", "--tolerance 51", "--min-robust 101", "--level 0", "--tolerance x"],
)
def test_numbers_out_of_range_are_usage_errors(tmp_path, before, words, capsys):
    from robustbench_cure.cli.main import main

    before.save(tmp_path / "a")
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path / "a"), str(tmp_path / "a"), *words.split()])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_evaluate_sizes_itself_and_says_where_there_are_too_few(tmp_path):
    common = ("evaluate", "--model", "digits_normal", "--battery", "digits", "--device", "cpu", "--n", "auto")
    invoke(*common, "--tolerance", "20", "--out", tmp_path / "few")
    assert Record.load(tmp_path / "few" / "digits_normal").n == sample_size(Fraction(1, 5), 0.01) < 40


# --- what the documentation promises ------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


def commands(text: str) -> list[list[str]]:
    """Every `cure-bench` command of a page or workflow, its folded lines joined."""
    import shlex

    text = re.sub(r"\n +(?=--)", " ", text)
    found = re.findall(r"^[- ]*(?:run: |entry: )?(?:bash -c ')?(cure-bench [^#`\n']*)", text, re.MULTILINE)
    inner = re.findall(r"&& (cure-bench [^#`\n'&]*)", text)
    return [shlex.split(line.split("&&")[0].split("|")[0]) for line in (*found, *inner)]


@pytest.mark.parametrize("page", ["docs/gate.md", ".github/workflows/robustness.yml"])
def test_documented_commands_are_commands(page):
    told = commands((ROOT / page).read_text())
    assert {"compare", "evaluate"} <= {words[1] for words in told}
    for _, verb, *words in told:
        command = cli.commands[verb]
        if verb == "baseline":
            command, words = command.commands[words[0]], words[1:]
        command.make_context(verb, words)


def test_the_documentation_quotes_what_the_code_computes():
    page = (ROOT / "docs" / "gate.md").read_text()
    sizes = [sample_size(Fraction(t), 0.01) for t in ("1/200", "1/100", "1/50", "1/20")]
    assert "{:,} at 0.5 points, {:,} at 1, {:,} at 2, {:,} at 5".format(*sizes) in page
    row = re.search(r"^\| −2 \| 0.5 % \|.*\| ([\d.]+) / ([\d.]+) / ([\d.]+) \| [^|]*\|$", page, re.MULTILINE)
    exact = [100 * chance for chance in chances(1000, 0.025, 0.005, ONE, 0.01)]
    assert [float(part) for part in row.groups()] == pytest.approx(exact, abs=0.7)


def test_failing_updates_put_back_nothing_that_was_not_there(tmp_path, before, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Record, "save", full)
    with pytest.raises(UsageError, match="No space left"):
        baseline.replace({tmp_path / "base" / "one": before})
    assert list((tmp_path / "base").iterdir()) == []
