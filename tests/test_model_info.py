"""RobustBench's claims, against its own definition of them and counts made by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from made import CLEAN, EVIDENCE, FGSM, PGD, SPSA, battery, evidence, record

from robustbench_cure.cli import main as cli
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.protocol.cards import ModelCard
from robustbench_cure.protocol.catalog import find
from robustbench_cure.site.robustbench import claims
from robustbench_cure.site.runs import Runs

PATH = Path("model_info/cifar10/Linf/tiny.json")


def cifar(**more):
    data = {"name": "cifar10", "total": 10_000}
    return record(battery(FGSM, PGD, SPSA), CLEAN, EVIDENCE, data=data, **more)


def test_a_claim_says_what_the_record_says_and_no_more():
    claim = claims(Runs((cifar(),)), {"link": "https://x", "name": "", "venue": "CVPR 2019"})[PATH]
    note = "reported: worst case of 3 attacks, mini v1, 10 of 10,000 test images, robustbench-cure 0.1.0; "
    assert claim == {
        "link": "https://x",
        "venue": "CVPR 2019",
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "architecture": "lenet",
        "eps": "8/255",
        "clean_acc": "80.00",
        "reported": "30.00",
        "footnote": note + f"SHA-256 of the weights {'ab' * 32}",
        "unreliable": False,
    }


def test_a_claim_is_the_worst_case_over_all_batteries():
    more = record(battery(FGSM, id="more"), CLEAN, {"fgsm": ".....x..--"}, data={"name": "cifar10"})
    (claim,) = claims(Runs((cifar(), more)), {}).values()
    assert claim["reported"] == "20.00"
    assert "mini v1 + more v1" in claim["footnote"]


def test_images_of_others_are_external_and_flags_unreliable():
    run = cifar(flags=[Flag(kind="stochastic", evidence="3 of 64")])
    (claim,) = claims(Runs((run,), (), (evidence(run, [6, 7]),)), {}).values()
    assert (claim["reported"], claim["external"], claim["unreliable"]) == ("30.00", "10.00", True)
    assert "autoattack_acc" not in claim


def test_the_card_declares_additional_data():
    card = find(ModelCard, "resnet18s_normal").card
    model = {"id": card.id, "weights_sha256": card.weights.sha256}
    (claim,) = claims(Runs((cifar(model=model),)), {}).values()
    assert claim["additional_data"] is False


def test_what_robustbench_has_no_place_for_is_refused():
    with pytest.raises(UsageError, match="no data set 'digits'"):
        claims(Runs((record(battery(FGSM), "1", {"fgsm": "."}),)), {})
    other = cifar(model={"weights_sha256": "cd" * 32})
    with pytest.raises(UsageError, match="two runs claim it"):
        claims(Runs((cifar(), other)), {})


def test_the_command_writes_the_file_and_names_what_is_missing(tmp_path, capsys):
    cifar().save(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["export", "--robustbench", f"{tmp_path}/run", "--out", f"{tmp_path}/o", "--authors", "A, B"]
        )
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "left out: link, name, venue, additional_data" in out
    assert json.loads((tmp_path / "o" / PATH).read_text())["authors"] == "A, B"
    with pytest.raises(SystemExit) as end:
        cli.main(["export", "--robustbench", str(tmp_path / "o")])
    assert end.value.code == 2
    assert "no run in there" in capsys.readouterr().err


def test_every_key_is_one_of_robustbenchs():
    from robustbench_cure.interop.robustbench import import_robustbench

    import_robustbench()
    from robustbench.model_zoo.enums import ThreatModel
    from robustbench.utils import ACC_FIELDS, ModelInfo

    run = cifar()
    (claim,) = claims(
        Runs((run,), (), (evidence(run, [6, 7]),)), dict.fromkeys(("link", "name"), "x")
    ).values()
    fields = {field.name for field in dataclasses.fields(ModelInfo)} | set(ACC_FIELDS[ThreatModel.Linf])
    assert set(claim) <= fields | {"unreliable"}  # its files have that one, its dataclass has not
