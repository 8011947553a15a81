"""Every card in the tree is right, and every wrong card is refused by file and field."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from robustbench_cure.errors import UsageError
from robustbench_cure.protocol.cards import Battery, ModelCard, PublishedTable, parse_card, read_card
from robustbench_cure.protocol.catalog import FOLDERS, catalog, find
from robustbench_cure.protocol.specs import FGSM, PGD, SPSA, DeepFool, UniformNoise
from robustbench_cure.threat import ThreatModel, format_eps

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"model": ModelCard, "battery": Battery, "published table": PublishedTable}


@pytest.fixture(autouse=True)
def _fresh_catalog(monkeypatch):
    monkeypatch.delenv("CURE_BENCH_CARDS", raising=False)
    catalog.cache_clear()
    yield
    catalog.cache_clear()


def models() -> dict[str, ModelCard]:
    return {name: found.card for name, found in catalog(ModelCard).items()}


def batteries() -> dict[str, Battery]:
    return {name: found.card for name, found in catalog(Battery).items()}


def tables() -> dict[str, PublishedTable]:
    return {name: found.card for name, found in catalog(PublishedTable).items()}


# --- the cards in the tree ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_card_in_the_tree_is_in_the_catalog(kind):
    files = sorted((ROOT / FOLDERS[kind]).rglob("*.toml"))
    assert files
    assert sorted(catalog(kind)) == sorted(path.stem for path in files)


def test_the_papers_networks_have_cards():
    expected = {f"resnet18_{how}" for how in ("normal", "deepfool", "cure", "pgd_at")}
    expected |= {f"wrn_{how}" for how in ("normal", "cure", "pgd_at")}
    expected |= {f"svhn_resnet18_{how}" for how in ("normal", "deepfool", "cure")}
    assert expected <= set(models())


def test_models_point_at_batteries_rows_and_starts_that_exist():
    for name, found in catalog(ModelCard).items():
        card = found.card
        battery = batteries()[card.battery]
        assert battery.dataset in ("", card.dataset), name
        if card.published_row:
            rows = {row.id for row in tables()[battery.published].rows}
            assert card.published_row in rows, name
        if card.training.start:
            start = models()[card.training.start]
            same = (
                "dataset",
                "architecture",
                "architecture_args",
                "num_classes",
                "input_shape",
                "mean",
                "std",
            )
            assert [getattr(card, field) for field in same] == [getattr(start, field) for field in same], name
        assert found.path.parent.name == card.dataset, name
        if card.weights and card.weights.file:
            assert (found.path.parent / card.weights.file).is_file(), name


@pytest.mark.parametrize(
    ("name", "phases", "h", "ramp", "augmentation"),
    [
        ("resnet18_cure", [(20, 4)], 1.5, 5, "crop-flip"),
        ("wrn_cure", [(20, 8)], 1.5, 5, "crop-flip"),
        ("svhn_resnet18_cure", [(10, 4), (5, 8), (5, 12)], 1.25, 0, "crop"),
    ],
)
def test_cure_recipes_are_the_papers_in_the_reading_that_works(name, phases, h, ramp, augmentation):
    recipe = models()[name].training
    assert recipe.method == "cure"
    # In pixels gamma weighs about five times what it does in normalised inputs: a quarter is taken.
    assert [(phase.epochs, 4 * phase.gamma) for phase in recipe.gamma] == phases
    assert (recipe.h, recipe.h_ramp_epochs, recipe.h_space, recipe.reg_power) == (h, ramp, "px01", 1)
    assert (recipe.epochs, recipe.optimizer, recipe.lr, recipe.lr_final) == (20, "adam", 1e-4, 1e-6)
    assert (recipe.batch_size, recipe.batchnorm, recipe.augmentation) == (128, "train", augmentation)
    assert "unit h" in models()[name].notes


@pytest.mark.parametrize(("name", "epochs"), [("resnet18_deepfool", 20), ("svhn_resnet18_deepfool", 10)])
def test_deepfool_fine_tuning_recipes(name, epochs):
    recipe = models()[name].training
    assert (recipe.method, recipe.epochs, recipe.norm) == ("deepfool", epochs, "l2")
    assert (recipe.overshoot, recipe.steps, recipe.candidates) == (0.02, 10, 10)
    assert (recipe.optimizer, recipe.lr, recipe.lr_final) == ("adam", 1e-4, 1e-6)


def test_normalisation_constants():
    for name, card in models().items():
        if card.dataset == "cifar10":
            assert card.mean == (0.4914, 0.4822, 0.4465), name
            assert card.std == (0.2023, 0.1994, 0.2010), name
        if card.dataset == "svhn":
            assert card.mean == (0.4377, 0.4438, 0.4728), name
            assert card.std == (0.1980, 0.2010, 0.1970), name


# --- batteries ---------------------------------------------------------------------------------------

GRADIENTS = [
    "uniform_noise",
    "fgsm",
    "deepfool",
    "pgd7",
    "pgd10",
    "pgd20",
    "pgd40",
    "pgd100",
    "pgd100_margin",
]
PROTOCOLS = {
    "table1": ("cifar10", "4/255", "table1", ["fgsm", "deepfool", "pgd7", "pgd20"]),
    "table2": ("cifar10", "8/255", "table2", ["pgd20"]),
    "table3": ("svhn", "12/255", "table3", ["pgd10"]),
    "strong": (
        "",
        "8/255",
        "",
        [*GRADIENTS, "spsa"],
    ),
    "white_box": ("", "8/255", "", GRADIENTS),
    "strong_l2": ("", "1/2", "", GRADIENTS),
    "digits": (
        "digits",
        "51/255",
        "",
        ["uniform_noise", "fgsm", "deepfool", "pgd7", "pgd20", "pgd100", "pgd100_margin", "spsa"],
    ),
}
NAMES = {"fgsm": "FGSM", "deepfool": "l∞ DeepFool", "spsa": "SPSA", "uniform_noise": "uniform noise"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_battery_threat_and_attacks(name):
    dataset, eps, published, ids = PROTOCOLS[name]
    battery = batteries()[name]
    assert (battery.dataset, battery.published, battery.n) == (dataset, published, 0)
    norm = "l2" if name.endswith("_l2") else "linf"
    assert (battery.threat.norm, battery.threat.text) == (norm, eps)
    assert battery.threat.eps == Fraction(eps)
    assert [attack.id for attack in battery.attacks] == ids


@pytest.mark.parametrize("name", PROTOCOLS)
def test_battery_hyper_parameters(name):
    battery = batteries()[name]
    eps = battery.threat.eps
    for attack in battery.attacks:
        if isinstance(attack, PGD):
            assert Fraction(attack.step_size) == eps / 4
            assert attack.random_start
            assert attack.stop == "first-success"
            if attack.loss == "ce":
                assert attack.id == f"pgd{attack.steps}"
                assert attack.name == f"PGD({attack.steps})"
                assert attack.restarts == 1
            else:
                assert (attack.id, attack.name) == ("pgd100_margin", "PGD(100) margin")
                assert (attack.steps, attack.loss) == (100, "margin")
                assert attack.restarts == (2 if name == "digits" else 1)
        else:
            assert attack.name == NAMES[attack.id].replace(
                "l∞", "l2" if battery.threat.norm == "l2" else "l∞"
            )
        if isinstance(attack, DeepFool):
            assert (attack.mode, attack.steps, attack.overshoot) == ("bounded", 50, 0.02)
            assert (attack.candidates, attack.clip) == (10, True)
        if isinstance(attack, UniformNoise):
            assert attack.draws == 10
        if not isinstance(attack, SPSA):
            assert attack.limit == 0


@pytest.mark.parametrize(
    ("name", "limit", "steps", "samples", "step_size"),
    [("strong", 256, 100, 128, "0.01"), ("digits", 100, 40, 32, "0.02")],
)
def test_spsa_budget(name, limit, steps, samples, step_size):
    (spsa,) = [attack for attack in batteries()[name].attacks if isinstance(attack, SPSA)]
    assert (spsa.limit, spsa.steps, spsa.samples, spsa.step_size) == (limit, steps, samples, step_size)
    assert (spsa.delta, spsa.stop) == (0.01, "first-success")


def test_the_white_box_battery_is_the_strong_one_without_spsa():
    strong, white_box = batteries()["strong"], batteries()["white_box"]
    assert white_box.attacks == strong.attacks[:-1]
    assert white_box.threat == strong.threat


def test_published_columns_are_attacks_of_the_battery():
    for name, battery in batteries().items():
        if battery.published:
            table = tables()[battery.published]
            known = {"clean"} | {attack.id for attack in battery.attacks}
            assert {cell.column for cell in table.cells} <= known, name
            assert table.dataset == battery.dataset, name


def test_changelog_names_every_battery_with_its_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name, battery in batteries().items():
        assert f"`{name}` (version {battery.version})" in text


def test_hyper_holds_every_parameter_with_fractions_as_floats():
    battery = batteries()["digits"]
    hyper = {attack.id: attack.hyper for attack in battery.attacks}
    assert hyper["pgd20"] == {
        "steps": 20,
        "step_size": 51 / 1020,
        "random_start": True,
        "restarts": 1,
        "loss": "ce",
        "stop": "first-success",
    }
    assert hyper["fgsm"] == {}
    assert hyper["spsa"]["step_size"] == 0.02
    assert batteries()["table2"].attacks[0].hyper["step_size"] == pytest.approx(2 / 255, abs=0)


# --- digests -----------------------------------------------------------------------------------------

OTHER_WORD = {"margin": "dlr", "ce": "margin", "first-success": "never", "bounded": "minimal"}


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 2
    return OTHER_WORD.get(value, "1/7")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_digest_changes_with_every_hyper_parameter(name):
    battery = batteries()[name]
    seen = {battery.digest}
    for index, attack in enumerate(battery.attacks):
        for key in [*attack.hyper, "limit"]:
            other = attack.model_copy(update={key: changed(getattr(attack, key))})
            attacks = (*battery.attacks[:index], other, *battery.attacks[index + 1 :])
            variant = battery.model_copy(update={"attacks": attacks}).digest
            assert variant not in seen, f"{attack.id}.{key}"
            seen.add(variant)
    threat = ThreatModel(battery.threat.norm, "1/3")
    assert battery.model_copy(update={"threat": threat}).digest not in seen


@pytest.mark.parametrize("name", ["strong", "strong_l2", "table1", "digits"])
def test_a_battery_at_another_radius_is_another_protocol_whose_steps_follow(name):
    whole = find(Battery, name).card
    half = whole.at(format_eps(whole.threat.eps / 2))
    assert half.threat.eps == whole.threat.eps / 2
    assert half.threat.norm == whole.threat.norm
    assert half.digest != whole.digest
    assert half.published == ""
    assert half.id.startswith(f"{name}_at_")
    for one, other in zip(whole.attacks, half.attacks, strict=True):
        assert other.hyper.get("step_size", 0) == pytest.approx(one.hyper.get("step_size", 0) / 2)
        rest = {key: value for key, value in one.hyper.items() if key != "step_size"}
        assert {key: value for key, value in other.hyper.items() if key != "step_size"} == rest
    assert whole.at(format_eps(whole.threat.eps)) is whole
    back = half.at(format_eps(whole.threat.eps))
    assert [attack.hyper for attack in back.attacks] == [attack.hyper for attack in whole.attacks]


def test_parameters_of_peers_that_hold_a_radius_do_not_follow():
    spec = {"id": "a", "kind": "torchattacks:PGD", "name": "A", "limit": 0}
    fields = find(Battery, "strong").card.model_dump(exclude={"attacks"})
    plain = Battery(**fields, attacks=(spec | {"steps": 3},))
    assert plain.at("1/255").threat.text == "1/255"
    with pytest.raises(ValueError, match=r"'a'.*alpha"):
        Battery(**fields, attacks=(spec | {"alpha": "2/255"},)).at("1/255")


def test_digest_does_not_depend_on_key_order():
    text = (ROOT / "attacks" / "table2.toml").read_text(encoding="utf-8")
    reordered = text.replace("steps = 20\n", "").replace('kind = "pgd"\n', 'kind = "pgd"\nsteps = 20\n')
    assert reordered != text
    assert parse_card(Battery, reordered, "x", "table2").digest == batteries()["table2"].digest


# --- published numbers, transcribed a second time ----------------------------------------------------

MEASURED, QUOTED = "measured", "quoted"
PUBLISHED = {
    "table1": {
        ("resnet18/normal", "fgsm"): (38.0, MEASURED),
        ("resnet18/normal", "deepfool"): (11.0, MEASURED),
        ("resnet18/normal", "pgd7"): (0.5, MEASURED),
        ("resnet18/normal", "pgd20"): (0.2, MEASURED),
        ("resnet18/adv_finetune_deepfool", "fgsm"): (61.0, MEASURED),
        ("resnet18/adv_finetune_deepfool", "deepfool"): (57.5, MEASURED),
        ("resnet18/adv_finetune_deepfool", "pgd7"): (57.2, MEASURED),
        ("resnet18/adv_finetune_deepfool", "pgd20"): (56.9, MEASURED),
    },
    "table2": {
        ("resnet18/normal", "clean"): (94.9, MEASURED),
        ("resnet18/normal", "pgd20"): (0.0, MEASURED),
        ("resnet18/cure", "clean"): (81.2, MEASURED),
        ("resnet18/cure", "pgd20"): (36.3, MEASURED),
        ("resnet18/pgd_at", "clean"): (79.4, QUOTED),
        ("resnet18/pgd_at", "pgd20"): (43.7, QUOTED),
        ("wrn28_10/normal", "clean"): (94.6, MEASURED),
        ("wrn28_10/normal", "pgd20"): (0.0, MEASURED),
        ("wrn28_10/cure", "clean"): (83.1, MEASURED),
        ("wrn28_10/cure", "pgd20"): (41.4, MEASURED),
        ("wrn28_10/pgd_at", "clean"): (87.3, QUOTED),
        ("wrn28_10/pgd_at", "pgd20"): (45.8, QUOTED),
    },
    "table3": {
        ("resnet18/normal", "clean"): (96.3, MEASURED),
        ("resnet18/normal", "pgd10"): (0.9, MEASURED),
        ("resnet18/cure", "clean"): (91.1, MEASURED),
        ("resnet18/cure", "pgd10"): (28.4, MEASURED),
        ("resnet18/pgd_at", "clean"): (93, QUOTED),
        ("resnet18/pgd_at", "pgd10"): (33, QUOTED),
    },
    "text_accuracy": {
        ("wrn28_10/cure", "pgd40"): (41.1, MEASURED),
        ("wrn28_10/cure", "pgd100"): (41.1, MEASURED),
        ("wrn28_10/cure", "spsa"): (44.5, MEASURED),
    },
    "text_alignment": {
        ("resnet18/normal", "alignment"): (0.43, MEASURED),
        ("resnet18/adv_finetune_deepfool", "alignment"): (0.90, MEASURED),
        ("chance", "alignment"): (0.02, MEASURED),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    table = tables()[name]
    printed = [((cell.row, cell.column), (cell.value, cell.kind)) for cell in table.cells]
    assert len(dict(printed)) == len(printed)
    assert dict(printed) == PUBLISHED[name]
    assert all("CVPR 2019" in cell.locator for cell in table.cells)
    assert {row.id for row in table.rows} == {row for row, _ in PUBLISHED[name]}


def test_locators_name_their_row():
    for name in ("table1", "table2", "table3"):
        labels = {row.id: row.name for row in tables()[name].rows}
        for cell in tables()[name].cells:
            assert f"row {labels[cell.row]}" in cell.locator
            assert ("quoted" in cell.locator) == (cell.kind == "quoted")


def test_a_cell_the_paper_does_not_have_is_none():
    assert tables()["table1"].cell("resnet18/normal", "clean") is None


# --- strictness --------------------------------------------------------------------------------------


def refusal(kind: type, text: str, stem: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_card(kind, text, f"somewhere/{stem}.toml", stem)
    message = str(caught.value)
    assert message.startswith(f"somewhere/{stem}.toml: ")
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def spoil(relative: str, old: str, new: str) -> str:
    text = (ROOT / relative).read_text(encoding="utf-8")
    assert text.count(old) >= 1, f"{old!r} is not in {relative}"
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "field", "what"),
    [
        ("steps = 20", 'steps = "20"', "attacks.0.pgd.steps", "integer"),
        ("steps = 20", "steps = true", "attacks.0.pgd.steps", "integer"),
        ("steps = 20", "steps = 20.0", "attacks.0.pgd.steps", "integer"),
        ("steps = 20", "steps = 0", "attacks.0.pgd.steps", "greater than or equal to 1"),
        ("steps = 20", "steps = 20\nmomentum = 0.9", "attacks.0.pgd.momentum", "unknown key"),
        ("steps = 20\n", "", "attacks.0.pgd.steps", "required"),
        ("random_start = true", "random_start = 1", "attacks.0.pgd.random_start", "boolean"),
        ('loss = "ce"', 'loss = "cross-entropy"', "attacks.0.pgd.loss", "'ce'"),
        ('kind = "pgd"', 'kind = "pdg"', "attacks.0", "pdg"),
        ('id = "pgd20"', 'id = "PGD 20"', "attacks.0.pgd.id", "pattern"),
        ("version = 1", "version = 1\ncolour = 3", "colour", "unknown key"),
        ("version = 1", "version = true", "version", "integer"),
        ('norm = "linf"', 'norm = "l7"', "threat.norm", "linf"),
        ('eps = "8/255"', 'eps = "0.03x"', "threat.eps", "'0.03x' is not a fraction"),
        ('eps = "8/255"', 'eps = "-8/255"', "threat.eps", "negative"),
        ('eps = "8/255"', 'eps = "8/0"', "threat.eps", "not a fraction"),
        ('eps = "8/255"', 'eps = "nan"', "threat.eps", "not a fraction"),
        ('eps = "8/255"', "eps = 0.03", "threat.eps", "string"),
        ('step_size = "2/255"', 'step_size = "2//255"', "attacks.0.pgd.step_size", "not a fraction"),
        ('step_size = "2/255"', 'step_size = "1/2550"', "attacks.pgd20", "cannot cross the ball"),
        ("[threat]", "[threat", "not valid TOML", ""),
    ],
)
def test_a_wrong_battery_is_refused_by_field(old, new, field, what):
    message = refusal(Battery, spoil("attacks/table2.toml", old, new), "table2")
    assert f"{field}:" in message
    assert what in message


def test_spsa_that_cannot_reach_the_ball_is_refused():
    message = refusal(
        Battery, spoil("attacks/strong.toml", 'step_size = "0.01"', 'step_size = "1/10000"'), "strong"
    )
    assert "attacks.spsa:" in message
    assert "cannot reach the ball" in message


def test_two_attacks_with_one_id_are_refused():
    message = refusal(Battery, spoil("attacks/table1.toml", 'id = "pgd7"', 'id = "pgd20"'), "table1")
    assert "'pgd20' appears twice" in message


@pytest.mark.parametrize(
    ("old", "new", "field", "what"),
    [
        ("mean = [0.4377, 0.4438, 0.4728]", "mean = [0.4377]", "mean", "3 numbers"),
        ("mean = [0.4377,", 'mean = ["0.4377",', "mean.0", "number"),
        ("std = [0.1980,", "std = [0.0,", "std", "positive"),
        ("std = [0.1980,", "std = [nan,", "std", "finite"),
        ("num_classes = 10", "num_classes = 1", "num_classes", "greater than or equal to 2"),
        ('dataset = "svhn"', 'dataset = "imagenet"', "dataset", "'svhn'"),
        ("gamma = 3.0", "gamma = inf", "training.cure.gamma.2.gamma", "finite"),
        (
            "epochs = 5\ngamma = 3.0",
            "epochs = 6\ngamma = 3.0",
            "training.cure",
            "21 epochs",
        ),
        ("\nh = 1.25", "\nh = 0.0", "training.cure.h", "greater than 0"),
        ("\nreg_power = 1", "\nreg_power = 3", "training.cure.reg_power", "1 or 2"),
        ("lr = 1e-4", 'lr = "1e-4"', "training.cure.lr", "number"),
        ('method = "cure"', 'method = "magic"', "training", "magic"),
        ('battery = "table3"\n', "", "battery", "required"),
        ("[training]", '[weights]\nfile = "w.pt"\nsha256 = "0"\n[training]', "weights.sha256", "pattern"),
    ],
)
def test_a_wrong_model_card_is_refused_by_field(old, new, field, what):
    text = spoil("models/svhn/svhn_resnet18_cure.toml", old, new)
    message = refusal(ModelCard, text, "svhn_resnet18_cure")
    assert field in message
    assert what in message


@pytest.mark.parametrize(
    "source", ['file = "../w.safetensors"', 'file = "w.pt"', 'file = "w.safetensors"\nurl = "u"', ""]
)
def test_weights_are_one_safetensors_file_or_url(source):
    section = f'[weights]\n{source}\nsha256 = "{"0" * 64}"\n[training]'
    text = spoil("models/svhn/svhn_resnet18_cure.toml", "[training]", section)
    assert ": weights: " in refusal(ModelCard, text, "svhn_resnet18_cure")


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("value = 38.0", "value = nan", "cells.0.value"),
        ("value = 38.0", 'value = "38.0"', "cells.0.value"),
        ('kind = "measured"', 'kind = "guessed"', "cells.0.kind"),
        ('row = "resnet18/normal"', 'row = "resnet18/nomal"', "cells"),
        ("n = 0", "n = -1", "n"),
    ],
)
def test_a_wrong_published_table_is_refused_by_field(old, new, field):
    message = refusal(PublishedTable, spoil("reports/published/table1.toml", old, new), "table1")
    assert f"{field}: " in message


def test_every_complaint_is_on_one_line():
    text = spoil("attacks/table2.toml", "steps = 20", "steps = 0\nmomentum = 1").replace('"8/255"', '"x"')
    message = refusal(Battery, text, "table2")
    assert all(part in message for part in ("steps:", "momentum:", "threat.eps:"))


def test_the_id_must_be_the_file_name():
    text = (ROOT / "attacks/table2.toml").read_text(encoding="utf-8")
    assert ": id: 'table2'" in refusal(Battery, text, "table_2")


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "table2.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_card(Battery, path)


# --- lookup ------------------------------------------------------------------------------------------


def put(root: Path, relative: str, text: str) -> Path:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_an_id_may_not_exist_twice_across_roots(tmp_path):
    text = (ROOT / "attacks/table2.toml").read_text(encoding="utf-8")
    put(tmp_path, "attacks/table2.toml", text)
    with pytest.raises(UsageError) as caught:
        catalog(Battery, (str(tmp_path),))
    message = str(caught.value)
    assert "table2.toml: id: 'table2'" in message
    assert str(tmp_path) in message
    assert "\n" not in message


def test_an_id_may_not_exist_twice_in_one_root(tmp_path):
    text = (ROOT / "models/cifar10/wrn_cure.toml").read_text(encoding="utf-8").replace("wrn_cure", "mine")
    put(tmp_path, "models/a/mine.toml", text)
    put(tmp_path, "models/b/mine.toml", text)
    with pytest.raises(UsageError, match="id: 'mine'"):
        catalog(ModelCard, (str(tmp_path),))


def test_cards_from_an_extra_folder_come_first_and_ours_stay(tmp_path):
    text = (
        (ROOT / "attacks/table2.toml").read_text(encoding="utf-8").replace('id = "table2"', 'id = "mine"', 1)
    )
    path = put(tmp_path, "attacks/mine.toml", text)
    found = find(Battery, "mine", (str(tmp_path),))
    assert found.path == path
    assert "table1" in catalog(Battery, (str(tmp_path),))


def test_the_environment_variable_adds_a_root(tmp_path, monkeypatch):
    text = (
        (ROOT / "attacks/table2.toml").read_text(encoding="utf-8").replace('id = "table2"', 'id = "mine"', 1)
    )
    put(tmp_path, "attacks/mine.toml", text)
    monkeypatch.setenv("CURE_BENCH_CARDS", str(tmp_path))
    assert "mine" in catalog(Battery)


def test_the_working_directory_is_never_consulted(tmp_path, monkeypatch):
    before = {kind: set(catalog(kind)) for kind in FOLDERS}
    catalog.cache_clear()
    put(tmp_path, "pyproject.toml", '[project]\nname = "robustbench-cure"\n')
    put(tmp_path, "models/evil.toml", "this is not a card")
    put(tmp_path, "attacks/table1.toml", "nor is this")
    put(tmp_path, "reports/published/table1.toml", "nor this")
    monkeypatch.chdir(tmp_path)
    assert {kind: set(catalog(kind)) for kind in FOLDERS} == before


def test_a_missing_extra_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--cards"):
        catalog(Battery, (str(tmp_path / "nowhere"),))


def test_unknown_ids_suggest_the_nearest():
    with pytest.raises(UsageError, match="'table1'"):
        find(Battery, "tabel1")
    with pytest.raises(UsageError, match="'resnet18_cure'"):
        find(ModelCard, "resnet18-cure")


def test_reading_every_card_imports_neither_torch_nor_numpy():
    script = (
        "import sys\n"
        "from robustbench_cure.protocol.cards import Battery, ModelCard, PublishedTable\n"
        "from robustbench_cure.protocol.catalog import catalog\n"
        "assert all(catalog(kind) for kind in (Battery, ModelCard, PublishedTable))\n"
        "print(sorted({'torch', 'numpy', 'pandas'} & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_fgsm_has_no_parameter_but_the_threat_model():
    assert set(FGSM.model_fields) == {"id", "name", "limit", "kind"}
