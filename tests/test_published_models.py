"""RobustBench's numbers as published rows: what is taken over, what is kept apart, what is refused."""

from __future__ import annotations

import json

import pytest

from robustbench_cure.cli import main as cli
from robustbench_cure.protocol.cards import PublishedTable
from robustbench_cure.protocol.catalog import catalog
from robustbench_cure.site.entries import leaderboards
from robustbench_cure.site.tables import leaderboard_table

ENTRY = {
    "link": "https://arxiv.org/abs/1",
    "name": "A title",
    "authors": "A, B",
    "additional_data": True,
    "number_forward_passes": 1,
    "dataset": "cifar10",
    "venue": "GitHub,<br>Oct 2019",
    "architecture": "WideResNet-28-10",
    "eps": "8/255",
    "clean_acc": "89.69",
    "reported": "62.5",
    "autoattack_acc": "59.53",
}


@pytest.fixture
def place(tmp_path):
    """Write entries into a model_info folder, run the verb, and return its code and the tables."""

    def run(where="cifar10/Linf", **entries):
        for name, entry in entries.items():
            path = tmp_path / "model_info" / where / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(entry if isinstance(entry, str) else json.dumps(entry))
        out = tmp_path / "cards"
        with pytest.raises(SystemExit) as left:
            cli.main(["import", "--robustbench", str(tmp_path / "model_info"), "--out", str(out)])
        code = left.value.code
        catalog.cache_clear()  # the folder grows between two calls
        found = catalog(PublishedTable, (str(out),)) if out.exists() else {}
        return code, {name: one.card for name, one in found.items() if str(one.path).startswith(str(out))}

    return run


def test_an_entry_becomes_a_row_and_its_numbers_cells(place):
    code, tables = place(Carmon2019Unlabeled=ENTRY)
    assert (code, set(tables)) == (0, {"robustbench_cifar10_linf_8_255"})
    (table,) = tables.values()
    (row,) = table.rows
    assert (row.name, row.group) == ("Carmon2019Unlabeled (GitHub, Oct 2019)", "WideResNet-28-10")
    assert (row.extra_data, row.note) == ("yes", "")
    cells = {cell.column: (cell.value, cell.kind) for cell in table.cells}
    assert cells == {
        "clean": (89.69, "measured"),
        "autoattack": (59.53, "measured"),
        "reported": (62.5, "quoted"),
    }
    assert table.cells[1].locator == "RobustBench, model_info, Carmon2019Unlabeled, autoattack_acc"
    (board,) = leaderboards([], (), [table])
    assert board.name == "cifar10, l∞ 8/255"
    assert (board.rows[0].robust.printed, board.rows[0].clean.printed) == pytest.approx((0.5953, 0.8969))
    assert (board.rows[0].decided, board.rows[0].rank, board.rows[0].n) == ("AutoAttack", "", 10_000)


def test_the_lowest_number_known_counts_and_a_warning_is_kept(place):
    flagged = {**ENTRY, "external": "7.15", "unreliable": True, "additional_data": False}
    del flagged["autoattack_acc"]
    _, tables = place(Xiao2020Enhancing={**flagged, "AA": "18.50"})
    (board,) = leaderboards([], (), list(tables.values()))
    assert board.rows[0].robust.printed == pytest.approx(0.0715)
    words = "AutoAttack 18.50; external 7.15; reported 62.50; RobustBench flags it as unreliable"
    assert board.rows[0].how == words
    assert board.rows[0].named == pytest.approx({"AutoAttack": 0.185, "External": 0.0715, "Reported": 0.625})
    (data,) = leaderboard_table(board).data
    assert (data["published_autoattack"], data["published_external"]) == pytest.approx((0.185, 0.0715))
    assert (board.rows[0].decided, board.rows[0].extra_data) == ("External", "none")


def test_another_radius_or_norm_is_another_table(place):
    place(a=ENTRY)
    place(b={**ENTRY, "eps": "0.031"})
    _, tables = place("cifar10/L2", c={**ENTRY, "eps": "0.5"})
    assert set(tables) == {
        "robustbench_cifar10_linf_8_255",
        "robustbench_cifar10_linf_0_031",
        "robustbench_cifar10_l2_1_2",
    }
    found = {board.name for board in leaderboards([], (), list(tables.values()))}
    assert found == {"cifar10, l∞ 8/255", "cifar10, l∞ 0.031", "cifar10, l2 1/2"}


def test_folders_without_a_radius_are_left_out(place, capsys):
    code, _ = place("cifar10/corruptions", a=ENTRY)
    assert code == 2
    assert "no entry of RobustBench in there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('{"dataset": "cifar10",}', "not JSON"),
        ({**ENTRY, "clean_acc": "high"}, "clean_acc"),
        ({**ENTRY, "clean_acc": "120"}, "clean_acc"),
        ({**ENTRY, "eps": "eight"}, "eps"),
        ({**ENTRY, "dataset": "mnist"}, "dataset"),
        ("[]", "bad.json"),
    ],
)
def test_a_bad_entry_is_named_and_nothing_is_written(place, tmp_path, capsys, entry, words):
    code, tables = place(bad=entry, good=ENTRY)
    assert (code, tables) == (2, {})
    error = capsys.readouterr().err
    assert words in error
    assert "bad.json" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "cards").exists()


def test_markup_and_hostile_text_stay_text(place):
    _, tables = place(**{'x"]': {**ENTRY, "venue": '<script>x</script>"', "architecture": 'a" \\ \n b'}})
    (table,) = tables.values()
    assert table.rows[0].name == 'x"] (x ")'
    assert table.rows[0].group == 'a" \\ b'


def test_what_ships_has_the_authors_entry_and_keeps_0031_apart():
    shipped = {name: one.card for name, one in catalog(PublishedTable).items()}
    main, other = shipped["robustbench_selection_8_255"], shipped["robustbench_selection_0_031"]
    assert (len(main.rows), len(other.rows)) == (61, 5)
    assert main.cell("robustbench/carmon2019unlabeled", "autoattack").value == 59.53
    assert other.cell("robustbench/zhang2019theoretically", "autoattack").value == 53.08
    authors = shipped["robustbench"]
    row = authors.rows[0].id
    assert [authors.cell(row, c).value for c in ("clean", "pgd20", "autoattack")] == [83.11, 41.4, 38.5]
