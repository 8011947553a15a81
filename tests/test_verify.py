"""Adversarial examples of others: what holds lowers the best known number, what does not is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from robustbench_cure import evaluate, load_battery, load_dataset, load_model
from robustbench_cure.attacks import fgsm
from robustbench_cure.cli import main as cli
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.external import Evidence, read_images
from robustbench_cure.site.entries import leaderboards
from robustbench_cure.site.runs import scan

EPS = 51 / 255


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A weak run on 30 digits, and FGSM images of somebody for the same 30."""
    net = load_model("digits_normal", precision="fp32")
    data = load_dataset("digits").subset(30)
    battery = load_battery("digits")
    noise = battery.model_copy(update={"attacks": battery.attacks[:1]})
    place = tmp_path_factory.mktemp("runs")
    run = evaluate(net, noise, load_dataset("digits"), n=30, out=place / "weak")
    x_adv = fgsm(net, data.images, data.labels, threat=battery.threat, noise=None).x_adv
    broken = net.logits(x_adv).argmax(1) != data.labels
    return run, data, x_adv, broken, place


@pytest.fixture
def verify(capsys, monkeypatch, tmp_path):
    """Run the command on a file, in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(file: Path, *more: str):
        arguments = ["verify-adv", str(file), "--model", "digits_normal", "--out", "out", *map(str, more)]
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return call


def stored(path: Path, x_adv, ids) -> Path:
    np.savez(path, x_adv=x_adv.numpy(), ids=np.array(ids))
    return path


def test_what_holds_lowers_the_best_known_number(made, verify, tmp_path):
    run, data, x_adv, broken, place = made
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    file = stored(tmp_path / "x.npz", x_adv[order], [data.ids[i] for i in order])
    code, out, _ = verify(file, "--against", place / "weak", "--source", "Somebody, FGSM")
    assert code == 0
    correct = torch.tensor(run.clean_correct.to_numpy(dtype=bool))
    assert f"they break {int((broken & correct).sum())} of the {int(correct.sum())}" in out
    expected = int((torch.tensor(run.worst_case.to_numpy(dtype=bool)) & ~broken).sum())
    assert expected < run.worst_case_accuracy.count
    (board,) = leaderboards([run], [Evidence.load(tmp_path / "out")])
    external = next(row for row in board.rows if row.kind == "external")
    assert (external.robust.rate.count, external.robust.rate.total) == (expected, 30)
    assert external.decided == "Somebody, FGSM"
    assert f"is now {100 * expected / 30:.1f} %" in out
    assert len(scan([tmp_path / "out"]).external) == 1


def test_our_own_stored_images_can_be_verified(made, verify, tmp_path):
    _, data, x_adv, broken, _ = made
    metadata = {"sample_ids": json.dumps(list(data.ids))}
    save_file({"a": x_adv, "b": data.images}, tmp_path / "x.safetensors", metadata)
    code, _, err = verify(tmp_path / "x.safetensors")
    assert code == 2
    assert "choose one with --tensor" in err
    code, out, _ = verify(tmp_path / "x.safetensors", "--tensor", "a")
    assert code == 0
    rows = pd.read_parquet(tmp_path / "out" / "samples.parquet")
    assert rows["broken"].tolist() == broken.tolist()
    assert rows["sample_id"].tolist() == list(data.ids)
    code, out, _ = verify(tmp_path / "x.safetensors", "--tensor", "b", "--out", "other")
    assert code == 1  # unperturbed images break nothing
    assert "they break 0 of" in out
    assert not (tmp_path / "other").exists()


def test_without_ids_the_first_images_of_the_split_are_meant(verify, tmp_path):
    data, net = load_dataset("digits"), load_model("digits_normal", precision="fp32")
    first = data.take(range(8))
    threat = load_battery("digits").threat
    x_adv = fgsm(net, first.images, first.labels, threat=threat, noise=None).x_adv
    np.savez(tmp_path / "x.npz", x_adv=x_adv.numpy().astype(np.float64))
    assert verify(tmp_path / "x.npz")[0] == 0
    assert Evidence.load(tmp_path / "out").samples["sample_id"].tolist() == list(first.ids)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda x, x_adv: x + 1.01 * (x_adv - x).sign() * EPS, "outside the"),
        (lambda x, x_adv: torch.where(x == 0, x - 0.1, x_adv), "outside the box"),
        (lambda x, x_adv: torch.full_like(x, torch.nan), "not finite"),
    ],
)
def test_what_does_not_hold_is_refused_and_breaks_nothing(made, verify, tmp_path, spoil, reason):
    _, data, x_adv, _, place = made
    file = stored(tmp_path / "x.npz", spoil(data.images, x_adv), data.ids)
    code, out, _ = verify(file, "--against", place / "weak")
    assert code == 1
    assert "0 admitted; they break 0" in out
    assert f"refused: {reason}" in out
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_threat_model_is_refused(made, verify, tmp_path):
    _, data, x_adv, _, place = made
    card = tmp_path / "cards" / "attacks"
    card.mkdir(parents=True)
    root = Path(cli.__file__).resolve().parents[2]
    text = (root / "attacks/digits.toml").read_text()
    (card / "wide.toml").write_text(
        text.replace('id = "digits"', 'id = "wide"', 1).replace("51/255", "60/255")
    )
    file = stored(tmp_path / "x.npz", x_adv, data.ids)
    code, out, err = verify(
        file, "--against", place / "weak", "--battery", "wide", "--cards", tmp_path / "cards"
    )
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert "no record there is about digits_normal, digits and linf 60/255" in line
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_model_is_refused_beside_one_that_fits(made, verify, tmp_path):
    _, data, x_adv, _, place = made
    battery = load_battery("digits")
    battery = battery.model_copy(update={"attacks": battery.attacks[:1]})
    evaluate(load_model("digits_cure"), battery, load_dataset("digits"), n=30, out=tmp_path / "other")
    file = stored(tmp_path / "x.npz", x_adv, data.ids)
    for runs in (["other"], [place / "weak", "other"]):
        code, out, err = verify(file, *(word for run in runs for word in ("--against", run)))
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith("cure-bench: error: --against other: no record there is about digits_normal")
        assert not (tmp_path / "out").exists()


def damaged(path: Path, kind: str, x_adv, ids) -> Path:
    match kind:
        case "suffix":
            file = path / "x.pt"
            torch.save(x_adv, file)
            return file
        case "pickle":
            np.savez(path / "x.npz", x_adv=np.array([{"a": 1}], dtype=object))
        case "garbage":
            (path / "x.npz").write_bytes(b"no archive")
        case "safetensors":
            (path / "x.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0garbage")
            return path / "x.safetensors"
        case "missing":
            return path / "nothing.npz"
        case "unknown":
            stored(path / "x.npz", x_adv, ["nobody", *ids[1:]])
        case "twice":
            stored(path / "x.npz", x_adv, [ids[1], *ids[1:]])
        case "count":
            stored(path / "x.npz", x_adv, ids[1:])
        case "shape":
            stored(path / "x.npz", x_adv.repeat(1, 3, 1, 1), ids)
        case "flat":
            stored(path / "x.npz", x_adv.flatten(1), ids)
        case "integers":
            stored(path / "x.npz", x_adv.long(), ids)
    return path / "x.npz"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("suffix", "give a .safetensors or .npz file"),
        ("pickle", "not a readable .npz file"),
        ("garbage", "not a readable .npz file"),
        ("safetensors", "not a readable .safetensors file"),
        ("missing", "cannot be read: No such file"),
        ("unknown", "has no sample 'nobody'; ids are like"),
        ("twice", "is given twice"),
        ("count", "30 images and 29 ids"),
        ("shape", "images of shape (3, 8, 8); digits has (1, 8, 8)"),
        ("flat", "expected images (N, C, H, W)"),
        ("integers", "must be float in [0, 1] or uint8"),
    ],
)
def test_bad_files_are_one_line(made, verify, tmp_path, kind, words):
    _, data, x_adv, _, _ = made
    code, out, err = verify(damaged(tmp_path, kind, x_adv, list(data.ids)))
    assert code == 2
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_damaged_evidence_is_named(made, verify, tmp_path):
    _, data, x_adv, _, _ = made
    verify(stored(tmp_path / "x.npz", x_adv, data.ids))
    (tmp_path / "out" / "samples.parquet").write_bytes(b"")
    with pytest.raises(UsageError, match=r"samples\.parquet: cannot be read"):
        scan([tmp_path / "out"])
    (tmp_path / "out" / "external.json").write_text('{"schema_version": 1}')
    with pytest.raises(UsageError, match=r"external\.json: source: Field required"):
        scan([tmp_path / "out"])


def test_bytes_are_read_as_grey_levels(tmp_path):
    np.savez(tmp_path / "x.npz", x_adv=np.full((2, 1, 4, 4), 51, np.uint8))
    given = read_images(tmp_path / "x.npz")
    assert given.images.unique().tolist() == pytest.approx([0.2])
    assert given.ids is None
