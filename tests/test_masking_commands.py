"""`cure-bench masking` and `selftest`: files, going on, exit codes, bad input; the section of reports."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from made import with_columns
from scipy.stats import binomtest
from torch import nn

from robustbench_cure import evaluate, load_battery, load_dataset, load_model
from robustbench_cure.attacks import Candidates
from robustbench_cure.cli.main import cli
from robustbench_cure.errors import CureBenchError, UsageError
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.evaluation.record import Record
from robustbench_cure.masking import evidence
from robustbench_cure.masking.checks import CHECKS, statistics
from robustbench_cure.masking.evidence import PairedMargins
from robustbench_cure.masking.obfuscated import ZeroGradient
from robustbench_cure.masking.recorded import from_record
from robustbench_cure.protocol.specs import Peer
from robustbench_cure.report.charts import margin_scatter
from robustbench_cure.report.render import render_report
from robustbench_cure.studies import selftest

#: Checks that are clear only where gradient-free attacks show power.
NEED_POWER = ["spsa_below_pgd", "gradient_free_beats_white_box"]
QUICK = "--steps 4 --spsa-steps 4 --spsa-samples 4 --queries 10 --draws 2 --restarts 2 --planted 10"


def obfuscated() -> nn.Module:
    """A gradient-obfuscating model, as a user would name it: tests module and function."""
    return ZeroGradient(load_model("digits_cure", device="cpu").module)


def invoke(*arguments: str):
    return CliRunner().invoke(
        cli, [*arguments, "--device", "cpu"], catch_exceptions=False, standalone_mode=False
    )


def masking(out: Path, *more: str, model: str = "digits_cure", n: int = 60):
    return invoke("masking", "--model", model, "--n", str(n), "--out", str(out), *QUICK.split(), *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("masking") / "m"
    assert masking(out, "--surrogate", "digits_normal").return_value == 0
    return out


def test_json_table_and_plots_tell_the_same(folder):
    found = json.loads((folder / "masking.json").read_text())
    one = found["models"]["digits_cure"]
    rows = pd.read_csv(folder / "scatter.csv")
    assert len(rows) == one["classified_correctly"] <= one["images"] == 60
    assert [f["check"] for f in one["findings"]] == list(CHECKS)
    assert "".join(f["letter"] for f in one["findings"]) == "ABCDEFGHIJKLMNOP"  # for readers of old files
    for key in ("ce", "margin"):
        pgd, spsa = rows[f"pgd_{key}_margin"], rows["spsa_margin"]
        below, above = int((spsa < pgd).sum()), int((spsa > pgd).sum())
        assert (one["scatter"][key]["below"], one["scatter"][key]["above"]) == (below, above)
        p = binomtest(below, below + above, alternative="greater").pvalue
        assert one["scatter"][key]["sign_test_p"] == pytest.approx(p)
        assert one["scatter"][key]["pearson_r"] == pytest.approx(np.corrcoef(pgd, spsa)[0, 1], abs=1e-5)
    both = rows[["pgd_ce_margin", "pgd_margin_margin"]].min(axis=1)
    assert (rows["below"] == (rows["spsa_margin"] < both)).all()
    assert ((rows["spsa_margin"] < 0) == rows["spsa_broken"]).all()
    names = {path.name for path in folder.iterdir()}
    assert {f"scatter.{kind}" for kind in ("svg", "pdf", "png", "csv")} < names
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) <= names
    assert manifest["settings"]["threat"] == "linf 51/255"


def test_every_point_of_the_page_carries_its_id_and_its_margins(folder):
    rows = pd.read_csv(folder / "scatter.csv")
    page = (folder / "index.html").read_text()
    assert page.count('class="tip"') == 2 * len(rows)
    first = rows.iloc[0]
    assert page.count(f">{first.sample_id}</text>") == 2
    assert f"PGD {first.pgd_ce_margin:.3f}" in page
    assert f"SPSA {first.spsa_margin:.3f}" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_points_lie_where_their_margins_say(folder):
    class Dots(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[tuple[float, float]] = []

        def handle_starttag(self, tag, attrs):
            values = dict(attrs)
            if tag == "circle":
                self.found.append((float(values["cx"]), float(values["cy"])))
            elif tag == "path" and values.get("class") == "dot":
                x, y = values["d"].removeprefix("M").split("m")[0].split()
                self.found.append((float(x), float(y)))

    parser = Dots()
    parser.feed((folder / "index.html").read_text())
    rows = pd.read_csv(folder / "scatter.csv")
    x, y = np.array(parser.found[: len(rows)]).T
    # A point lies below the diagonal of the 360 by 360 plot exactly where SPSA ended lower.
    assert int((360 - y < x - 0.02).sum()) == int((rows.spsa_margin < rows.pgd_ce_margin - 1e-3).sum())
    assert np.corrcoef(np.sort(x), np.sort(rows.pgd_ce_margin))[0, 1] > 0.9999
    assert np.corrcoef(np.sort(-y), np.sort(rows.spsa_margin))[0, 1] > 0.9999


def test_a_suspected_model_fails_only_where_that_is_asked(tmp_path):
    model = "test_masking_commands:obfuscated"
    result = masking(tmp_path / "a", "--dataset", "digits", "--fail-on", "suspected", model=model)
    assert result.return_value == 1
    assert "suspected: spsa_below_pgd, unavailable_gradients" in result.output.replace("\n", " ")
    assert "Next: use the margin loss" in result.output
    assert max(map(len, result.output.splitlines()[:-1])) <= 80
    unasked = masking(tmp_path / "b", "--dataset", "digits", model=model, n=20)
    assert (unasked.return_value, "suspected: " in unasked.output) == (0, True)
    few = masking(tmp_path / "c", "--fail-on", "not conclusive", "--steps", "20", n=20)
    assert (few.return_value, "not conclusive: too few points" in few.output) == (1, True)


def test_gradient_free_attacks_that_could_break_nothing_prove_nothing(tmp_path):
    weak = ["--steps", "20", "--planted", "0", "--spsa-samples", "2", "--queries", "2"]
    result = masking(tmp_path / "m", *weak, "--fail-on", "not conclusive")
    assert result.return_value == 1
    assert "digits_cure: not conclusive: no power in spsa_below_pgd" in result.output
    assert "Next: give the gradient-free attacks more work" in result.output
    assert max(map(len, result.output.splitlines()[:-1])) <= 80
    found = json.loads((tmp_path / "m" / "masking.json").read_text())["models"]["digits_cure"]["findings"]
    assert [f["check"] for f in found if f["status"] == "inconclusive"] == NEED_POWER
    lines = [line.split() for line in result.output.splitlines()]
    (row,) = [words for words in lines if words[:2] == ["spsa_below_pgd", "inconclusive"]]
    assert row[-4:] == [f"{found[0]['value']:.3g}", ">", "0.05", f"{found[0]['p']:.2g}"]
    (row,) = [words for words in lines if words[:1] == ["uninformative_gradients"]]
    assert row[-2:] == ["<", "0.5"]
    assert "> 0.05, p &lt; 0.01</td>" in (tmp_path / "m" / "index.html").read_text().replace("&gt;", ">")
    assert ">inconclusive</span>" in (tmp_path / "m" / "index.html").read_text()


def test_an_interrupted_diagnosis_goes_on_and_ends_the_same(tmp_path, folder, monkeypatch):
    calls = []
    honest = evidence.square

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "square", stop)
    with pytest.raises(CureBenchError, match="interrupted; what is finished is kept: go on with the same"):
        masking(tmp_path / "m", "--surrogate", "digits_normal")
    assert not (tmp_path / "m" / "manifest.json").exists()

    def counted(*arguments, **options):
        calls.append("square")
        return honest(*arguments, **options)

    monkeypatch.setattr(evidence, "square", counted)
    monkeypatch.setattr(evidence, "spsa", stop)  # was finished: not asked for again
    masking(tmp_path / "m", "--surrogate", "digits_normal")
    assert calls == ["square"]
    for name in ("masking.json", "scatter.csv", "scatter.svg", "outcomes-digits_cure.npz"):
        assert (tmp_path / "m" / name).read_bytes() == (folder / name).read_bytes(), name


def test_outcomes_of_other_settings_are_refused(tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "square", stop)
    with pytest.raises(CureBenchError, match="interrupted"):
        masking(tmp_path / "m")
    with pytest.raises(UsageError, match="of another measurement"):
        masking(tmp_path / "m", "--eps", "8/255")


def test_two_models_share_a_folder(tmp_path):
    out = tmp_path / "two"
    invoke(
        "masking",
        "--model",
        "digits_cure",
        "--model",
        "digits_normal",
        "--n",
        "12",
        "--out",
        str(out),
        *QUICK.split(),
    )
    assert set(json.loads((out / "masking.json").read_text())["models"]) == {"digits_cure", "digits_normal"}
    assert (out / "scatter-digits_cure.svg").exists()
    assert set(pd.read_csv(out / "scatter.csv")["model"]) == {"digits_cure", "digits_normal"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--eps", "0"), "--eps 0: must be positive"),
        (("--eps", "many"), "is not a fraction"),
        (("--norm", "l2"), "--norm l2 needs --eps"),
        (("--surrogate", "nobody"), "nobody"),
        (("--surrogate", "resnet18s_pgd_at"), "takes images of shape (3, 32, 32)"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, words):
    with pytest.raises(UsageError) as caught:
        masking(tmp_path / "m", *arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_an_odd_number_of_steps_is_refused(tmp_path):
    result = CliRunner().invoke(cli, ["masking", "--steps", "5", "--out", str(tmp_path / "m")])
    assert result.exit_code == 2
    assert "5 is odd" in result.output


# --- from a record ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record() -> Record:
    battery = load_battery("digits")
    kept = tuple(a for a in battery.attacks if a.id in ("uniform_noise", "fgsm", "pgd20", "pgd100", "spsa"))
    short = [
        a.model_copy(update={"limit": 60, "steps": 30, "samples": 32}) if a.id == "spsa" else a for a in kept
    ]
    battery = battery.model_copy(update={"attacks": tuple(short)})
    return evaluate(load_model("digits_pgd_at", device="cpu"), battery, load_dataset("digits"), n=80)


def test_an_honest_record_raises_nothing_and_shows_the_survivors(record):
    diagnosis = from_record(record)
    assert "".join(CHECKS[f.check].letter for f in diagnosis.findings) == "ABCFGHKL"
    assert diagnosis.conclusion.kind == "no evidence"
    assert "under 8 of 16 checks" in diagnosis.conclusion.words
    samples = record.samples
    standing = samples["spsa.attacked"] & ~samples["pgd20.broken"] & ~samples["pgd100.broken"]
    assert len(diagnosis.scatter.ids) == int(standing.sum()) > 10
    worst = samples[["pgd20.margin", "pgd100.margin"]].min(axis=1)[standing]
    below = int((samples["spsa.margin"][standing] < worst).sum())
    assert statistics(diagnosis.scatter)["below"] == below
    assert sum(point.below for point in margin_scatter(diagnosis.scatter).points) == below


def test_findings_of_a_record_follow_its_columns(record):
    samples = record.samples
    standing = (
        ~samples[["fgsm.broken", "pgd20.broken", "pgd100.broken"]].any(axis=1) & samples["spsa.attacked"]
    )

    def raised(**columns) -> str:
        findings = from_record(with_columns(record, **columns)).findings
        return ", ".join(f.check for f in findings if f.status == "raised")

    lower = samples["spsa.margin"].where(~standing, samples["pgd100.margin"] - 5)
    assert raised(**{"spsa.margin": lower}) == "spsa_below_pgd"
    assert raised(**{"spsa.broken": samples["spsa.broken"] | standing}) == "gradient_free_beats_white_box"
    assert (
        raised(**{"uniform_noise.broken": samples["uniform_noise.broken"] | standing})
        == "noise_beats_white_box"
    )
    assert raised(**{"fgsm.broken": samples["fgsm.broken"] | standing}) == "fgsm_beats_pgd"
    assert raised(**{"pgd100.broken": samples["pgd100.broken"] | standing}) == "more_steps_break_more"


def test_pgd_that_has_no_margin_in_a_record_ended_at_the_image_itself(record):
    samples = record.samples
    broken = samples[["fgsm.broken", "pgd20.broken", "pgd100.broken"]].any(axis=1)
    standing = ~broken & samples["spsa.attacked"]
    columns = {name: samples[name].mask(standing) for name in ("pgd20.margin", "pgd100.margin")}
    columns["spsa.margin"] = samples["spsa.margin"].mask(standing, samples["clean_margin"] - 5)
    diagnosis = from_record(with_columns(record, **columns))
    assert diagnosis.scatter.pgd.tolist() == samples["clean_margin"][standing].tolist()
    assert statistics(diagnosis.scatter)["below"] == int(standing.sum())


@pytest.mark.parametrize(
    ("kind", "white_box"),
    [("autoattack:apgd-ce", True), ("torchattacks:CW", True), ("autoattack:square", False)],
)
def test_white_box_in_a_record_is_every_attack_that_takes_gradients(record, kind, white_box):
    """An image that noise breaks is no finding where another library broke it by gradients."""
    samples = record.samples
    standing = ~samples[["fgsm.broken", "pgd20.broken", "pgd100.broken"]].any(axis=1) & record.clean_correct
    columns = {name.replace("fgsm.", "peer."): samples[name] for name in samples if name.startswith("fgsm.")}
    columns["peer.broken"] = standing
    columns["uniform_noise.broken"] = samples["uniform_noise.broken"] | standing
    noisy = with_columns(record, **columns)
    peer = Peer(id="peer", name="Peer", kind=kind, limit=0)
    battery = record.manifest.battery
    battery = battery.model_copy(update={"attacks": (*battery.attacks, peer)})
    both = Record(noisy.manifest.model_copy(update={"battery": battery}), noisy.samples)
    (found,) = [f for f in from_record(both).findings if f.check == "noise_beats_white_box"]
    assert found.status == ("clear" if white_box else "raised")


def test_a_record_without_power_is_inconclusive(record):
    diagnosis = from_record(with_columns(record, **{"spsa.broken": record.samples["spsa.broken"] & False}))
    assert [f.check for f in diagnosis.findings if f.status == "inconclusive"] == NEED_POWER
    assert diagnosis.conclusion.kind == "not conclusive"


def test_flags_of_a_record_raise_their_checks(record):
    kinds = ("zero_gradient", "stochastic", "probabilities")
    flags = [Flag(kind=kind, evidence=f"seen {kind}") for kind in kinds]
    diagnosis = from_record(Record(record.manifest.model_copy(update={"flags": flags}), record.samples))
    raised = ["unavailable_gradients", "unstable_predictions", "probability_outputs"]
    assert [f.check for f in diagnosis.findings if f.status == "raised"] == raised
    assert diagnosis.conclusion.words.startswith(f"suspected: {', '.join(raised)} (n = ")


def test_a_record_whose_images_are_all_broken_has_no_plot(record):
    samples = record.samples
    diagnosis = from_record(with_columns(record, **{"pgd20.broken": samples["pgd20.attacked"]}))
    assert diagnosis.scatter is None
    assert diagnosis.findings[0].status == "not run"
    assert "every image" in diagnosis.findings[0].evidence


def test_a_battery_without_gradient_free_attacks_has_no_section(record):
    attacks = tuple(a for a in record.attacks if a.kind in ("fgsm", "pgd"))
    battery = record.manifest.battery.model_copy(update={"attacks": attacks})
    bare = Record(record.manifest.model_copy(update={"battery": battery}), record.samples)
    assert from_record(bare) is None
    assert 'id="masking"' not in render_report([bare], {})
    assert 'id="masking"' in render_report([record], {})


# --- selftest -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("raised", "holds"), [([], [True, *[False] * 4]), ([*CHECKS], [False, *[True] * 4])])
def test_selftest_notices_checks_that_raise_nothing_or_everything(monkeypatch, raised, holds):
    """The honest model must raise none, each gradient-obfuscating one its own."""
    monkeypatch.setattr(selftest, "diagnosis", lambda name, device: SimpleNamespace(raised=raised))
    assert [one.holds for one in selftest._masking("cpu")] == holds


@pytest.fixture(scope="module")
def remembered_spsa():
    """SPSA as it is, computed once: every self-test asks it the same."""
    honest, answers = selftest.spsa, []

    def spsa(*arguments, **options):
        if not answers:
            answers.append(honest(*arguments, **options))
        return answers[0]

    return spsa


def test_the_selftest_holds_here_and_says_so_in_its_file(tmp_path, monkeypatch, remembered_spsa):
    """Its closed forms are computed; of the diagnoses, see the tests of masking, one alone is asked for."""
    monkeypatch.setattr(selftest, "spsa", remembered_spsa)
    monkeypatch.setattr(
        selftest, "_masking", lambda device: [selftest.Assertion("the diagnoses", True, device)]
    )
    result = invoke("selftest", "--out", str(tmp_path / "t.json"))
    assert result.return_value == 0, result.output
    tried = json.loads((tmp_path / "t.json").read_text())["tried"]
    assert [one["what"] for one in tried[7:]] == ["the diagnoses"]
    assert all(one["holds"] for one in tried)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "spsa", "deepfool"])
def test_selftest_notices_an_attack_that_does_nothing(monkeypatch, remembered_spsa, name):
    monkeypatch.setattr(selftest, "spsa", remembered_spsa)
    monkeypatch.setattr(selftest, name, lambda classifier, x, *a, **k: Candidates.start(x))
    failed = [one.what for one in selftest._closed_forms(torch.device("cpu")) if not one.holds]
    spoken = {"fgsm": "FGSM", "pgd": "PGD", "spsa": "SPSA", "deepfool": "DeepFool"}[name]
    assert failed
    assert all(what.startswith(spoken) for what in failed)


def test_selftest_notices_an_attack_that_leaves_the_ball_and_ends_with_one(monkeypatch, remembered_spsa):
    def far(classifier, x, y, *, threat, **options):
        candidates = Candidates.start(x)
        candidates.x_adv = 1 - x
        return candidates

    monkeypatch.setattr(selftest, "spsa", remembered_spsa)
    monkeypatch.setattr(selftest, "fgsm", far)
    monkeypatch.setattr(selftest, "_masking", lambda device: [])
    assert selftest.selftest("cpu", None) == 1


def test_margins_of_nan_never_reach_the_json(tmp_path, monkeypatch):
    """A table of numbers that JSON cannot hold would be a page half-written."""
    pairs = PairedMargins("", "abc", torch.zeros(3), torch.zeros(3))
    text = json.dumps(statistics(pairs), allow_nan=False)
    assert json.loads(text)["pearson_r"] is None
