"""Flags that follow from a table: counted by hand, made anew on reading, shown wherever flags are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import made
import pytest
from scipy.stats import binomtest

from robustbench_cure.cli import main as cli
from robustbench_cure.evaluation.flags import FLAG_KINDS, Flag, derived_flags
from robustbench_cure.evaluation.record import Record
from robustbench_cure.report.render import render_report
from robustbench_cure.report.terminal import terminal_table
from robustbench_cure.site.checklist import checklist

KIND = "cross_entropy_weaker"
DERIVED = sorted(kind for kind, about in FLAG_KINDS.items() if about.origin == "derived")
STORED = Path(__file__).parents[1] / "reports" / "measured" / "digits"
PGD = made.PGD | {"id": "ce", "name": "PGD"}
MARGIN = PGD | {"id": "other", "name": "margin", "loss": "margin"}


def pair(lost: int, gained: int, n: int = 100, ce=PGD, other=MARGIN) -> Record:
    """Of n correct samples the other attack alone breaks ``lost``, cross-entropy alone ``gained``."""
    rest = "." * (n - lost - gained)
    marks = {"ce": "." * lost + "x" * gained + rest, "other": "x" * lost + "." * gained + rest}
    evidence = {spec["id"]: marks[spec["id"]] for spec in (ce, other)}
    return made.record(made.battery(ce, other), "1" * n, evidence, data={"classes": list("0123456789")})


def raised(record: Record) -> list[Flag]:
    return [flag for flag in derived_flags(record) if flag.kind == KIND]


@pytest.mark.parametrize(
    ("lost", "gained", "n", "there"),
    [
        (0, 0, 100, False),
        (7, 0, 100, True),  # 7 points, p = 0.008
        (6, 0, 100, False),  # 6 points, p = 0.016
        (30, 0, 1000, False),  # 3 points are not more than 3
        (31, 0, 1000, True),
        (20, 12, 100, False),  # 8 points that chance explains
        (0, 20, 100, False),  # cross-entropy is the stronger one
    ],
)
def test_another_loss_must_break_more_than_three_points_and_chance(lost, gained, n, there):
    record = pair(lost, gained, n)
    found = raised(record)
    p = binomtest(lost, lost + gained, alternative="greater").pvalue if lost + gained else 1.0
    assert bool(found) == there == (lost - gained > 0.03 * n and p <= 0.01)
    if there:
        assert (found[0].value, found[0].threshold, found[0].attack) == ((lost - gained) / n, 0.03, "ce")
        assert f"{lost} are broken by the latter alone, {gained} by the former alone" in found[0].evidence


def test_more_steps_are_no_other_loss_and_deepfool_is_one():
    longer = MARGIN | {"steps": 40}
    assert not raised(pair(20, 0, other=longer))
    assert raised(pair(20, 0, other=MARGIN | {"loss": "dlr", "steps": 10}))
    assert raised(pair(20, 0, other=made.DEEPFOOL | {"id": "other"}))
    assert not raised(pair(20, 0, other=made.FGSM | {"id": "other"}))
    assert not raised(pair(20, 0, ce=PGD | {"loss": "margin"}))


def test_only_samples_that_both_attacks_cover_count():
    """The other attack sees 50 of 100: 5 lost of them are 10 points, with p = 0.03; 7 are enough."""
    assert not raised(pair(5, 0, other=MARGIN | {"limit": 50}))
    (flag,) = raised(pair(7, 0, other=MARGIN | {"limit": 50}))
    assert flag.value == 7 / 50


@pytest.mark.parametrize(("alone", "there"), [(0, False), (1, True)])
def test_what_a_black_box_attack_broke_alone_is_a_share_of_the_samples_it_saw(alone, there):
    """One of 50 is 2 %; of the 200 of the record it would be half a per cent, and no flag."""
    evidence = {"ce": "." * 200, "spsa": "x" * alone + "." * (50 - alone) + "-" * 150}
    record = made.record(made.battery(PGD, made.SPSA | {"limit": 50}), "1" * 200, evidence)
    found = [flag for flag in derived_flags(record) if flag.kind == "black_box_stronger"]
    assert bool(found) == there
    if there:
        assert (found[0].value, found[0].attack) == (1 / 50, "spsa")
        assert found[0].evidence.startswith("1 of 50 ")


def test_stored_records_say_it_although_they_were_made_before():
    record = Record.load(STORED / "digits_cure")
    (flag,) = [flag for flag in record.flags if flag.kind == KIND]
    samples, correct = record.samples, record.clean_correct
    left = {a: int((correct & ~samples[f"{a}.broken"]).sum()) for a in ("pgd100", "deepfool")}
    assert flag.value == (left["pgd100"] - left["deepfool"]) / 500 > 0.2
    assert f"{left['pgd100']} hold under PGD(100)" in flag.evidence
    assert [f.kind for f in Record.load(STORED / "digits_normal").flags] == []


def test_flags_that_follow_from_the_table_are_made_anew_on_reading(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(STORED / "digits_normal", run)
    manifest = json.loads((run / "manifest.json").read_text())
    stale = [Flag(kind=kind, evidence="old").model_dump() for kind in ("zero_gradient", *DERIVED)]
    (run / "manifest.json").write_text(json.dumps(manifest | {"flags": stale}))
    assert [flag.kind for flag in Record.load(run).flags] == ["zero_gradient"]


def test_the_flag_is_shown_wherever_flags_are(tmp_path):
    record = Record.load(STORED / "digits_cure")
    about = FLAG_KINDS[KIND]
    for text in (terminal_table([record]), render_report([record], {})):
        assert about.title in text
    assert f"{KIND}: {about.title}" in terminal_table([record])
    assert not record.unreliable
    shutil.copytree(STORED / "digits_cure", tmp_path / "run" / "digits_cure")
    with pytest.raises(SystemExit) as end:
        cli.main(["site", str(tmp_path / "run"), "--out", str(tmp_path / "site")])
    assert end.value.code == 0
    page = (tmp_path / "site" / "index.html").read_text()
    assert page.count(about.title) >= 2  # at the model, and explained


def test_fail_on_names_the_flag_and_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = "evaluate --model digits_normal --battery digits --n 10 --device cpu --out"

    def code(out: str, *more: str) -> int:
        with pytest.raises(SystemExit) as end:
            cli.main([*line.split(), out, *more])
        return end.value.code

    assert code("a", "--fail-on", "fewer_samples", "--fail-on", "stochastic") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("failed: ")
    assert {"fewer_samples", "digits_normal"} <= set(last.split())
    assert "stochastic" not in last
    assert code("b", "--fail-on", "stochastic") == 0
    assert code("a", "--resume") == 0
    capsys.readouterr()
    assert code("c", "--fail-on", "everything") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "'everything' is not one of" in said
    assert not (tmp_path / "c").exists()


SPSA = {
    "id": "spsa",
    "kind": "spsa",
    "name": "SPSA",
    "limit": 0,
    "steps": 20,
    "samples": 8,
    "step_size": "2/255",
    "delta": 0.01,
    "stop": "first-success",
}
SQUARE = {"id": "square", "kind": "autoattack:square", "name": "Square", "limit": 0}
APGD = {"id": "apgd", "kind": "autoattack:apgd-ce", "name": "APGD", "limit": 0}


@pytest.mark.parametrize(
    ("one", "other", "alone"),
    [
        (MARGIN, SPSA, True),
        (MARGIN, SQUARE, True),  # gradient-free, whatever library it is of
        (APGD, SPSA, True),  # white-box, likewise
        (APGD, SQUARE, True),
        (SQUARE, SPSA, False),  # nothing white-box to compare with
        (APGD, MARGIN, False),
    ],
)
@pytest.mark.parametrize("as_many", [False, True])
def test_flag_and_checklist_agree_on_what_is_gradient_free(one, other, alone, as_many):
    """The second attack breaks 20 of 100 samples, the first the same or none."""
    marks = {"20": "x" * 20 + "." * 80, "0": "." * 100}
    evidence = {one["id"]: marks["20" if as_many else "0"], other["id"]: marks["20"]}
    record = made.record(made.battery(one, other), "1" * 100, evidence)
    flagged = "black_box_stronger" in {flag.kind for flag in record.flags}
    (item,) = (item for item in checklist(record, None) if item.name.startswith("Gradient-free"))
    if not alone:
        assert (flagged, item.status) == (False, "not in the record")
    elif as_many:
        assert (flagged, item.status) == (False, "met")
    else:
        assert (flagged, item.status) == (True, "not met")


@pytest.mark.parametrize("spec", [PGD, MARGIN, APGD])
@pytest.mark.parametrize("free", [SPSA, SQUARE])
def test_what_an_attack_may_see_stands_on_its_specification(spec, free):
    white_box, gradient_free = made.battery(spec | {"id": "a"}, free | {"id": "b"}).attacks
    assert white_box.gradients
    assert not gradient_free.gradients
