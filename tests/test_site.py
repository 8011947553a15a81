"""The site against counts made by hand: entries, curves, checklist, exports, and files that come and go."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from made import CLEAN, DEEPFOOL, EVIDENCE, FGSM, HOSTILE, PGD, SPSA, battery, evidence, hostile, record
from PIL import Image

from robustbench_cure.cli import boundary as boundary_cli
from robustbench_cure.cli import geometry as geometry_cli
from robustbench_cure.cli import main as cli
from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.evaluation.record import Record, typed
from robustbench_cure.evaluation.storage import find_records
from robustbench_cure.protocol.cards import Battery, ModelCard, PublishedTable
from robustbench_cure.protocol.catalog import catalog, find
from robustbench_cure.report.charts import plot, radius_curves, step_curves
from robustbench_cure.report.table import (
    WIDTH,
    Cell,
    Column,
    Table,
    columns,
    exports,
    to_latex,
    to_markdown,
    to_text,
)
from robustbench_cure.site import entries
from robustbench_cure.site.build import build, write
from robustbench_cure.site.checklist import checklist
from robustbench_cure.site.entries import leaderboards
from robustbench_cure.site.pages import STUDIES
from robustbench_cure.site.runs import Runs, card_of, masking_sections, scan, study_files
from robustbench_cure.site.tables import BEGIN, END, leaderboard_table, pairs_table, renewed
from robustbench_cure.stats import Rate

ROOT = Path(__file__).resolve().parents[1]


def tables() -> list[PublishedTable]:
    return [found.card for _, found in sorted(catalog(PublishedTable).items())]


def other(name: str, marks: str, **more):
    """A record of another model: other weights, FGSM alone."""
    model = {"id": name, "name": name, "weights_sha256": (name * 64)[:64], **more.pop("model", {})}
    protocol = more.pop("protocol", battery(FGSM))
    return record(protocol, "1" * len(marks), {protocol.attacks[0].id: marks}, model=model, **more)


#: What stands for the reference protocols, which `ranking` names.
REFERENCE, AUTOATTACK = battery(FGSM, id="ref", name="Reference"), battery(PGD, id="aa", name="AutoAttack")


@pytest.fixture
def ranking(monkeypatch):
    """The two batteries above are the reference protocols, by their content."""
    known = {REFERENCE.digest: "reference", AUTOATTACK.digest: "autoattack"}
    monkeypatch.setattr(entries, "ranking_protocol", lambda b: known.get(b.digest, known.get(audited_as(b))))


def audited_as(protocol: Battery) -> str:
    return protocol.model_copy(update={"audit": None}).digest


def ranked(name: str, marks: str, times: int = 25, **more):
    """A record of a reference protocol, by a picture that is repeated."""
    return other(name, marks * times, **{"protocol": REFERENCE, **more})


def audited(name: str, marks: str, found: str, asked: int = 4, times: int = 25, **config):
    """A record of the reference protocol with its audit: found, one character a sample, is PGD's there."""
    both = battery(FGSM, PGD, id="ref", name="Reference")
    model = {"id": name, "name": name, "weights_sha256": (name * 64)[:64]}
    run = record(both, "1" * len(marks * times), {"fgsm": marks * times, "pgd20": found * times}, model=model)
    audit = {"name": "AutoAttack", "samples": asked * times, "attacks": [PGD]}
    run.manifest.battery = battery(FGSM, id="ref", name="Reference", audit=audit)
    update = {"audit": asked * times, **config}
    run.manifest.config = run.manifest.config.model_copy(update=update)
    run.samples["audit.draws"] = run.samples["pgd20.attacked"].astype("int64")
    return Record(run.manifest, typed(run.samples, run.manifest.battery))


# --- entries ---------------------------------------------------------------------------------------------


def test_rank_is_an_interval_of_those_that_the_paired_test_does_not_tell_apart(ranking):
    """100 images: a and c differ on 2 of them, b is far above, d far below."""
    runs = [
        other("a", "x" * 50 + "." * 50, protocol=REFERENCE),
        other("b", "x" * 10 + "." * 90, protocol=REFERENCE),
        other("c", "x" * 49 + ".." + "x" + "." * 48, protocol=REFERENCE),
        other("d", "x" * 100, protocol=REFERENCE),
    ]
    (board,) = leaderboards(runs)
    assert [(row.model_id, row.rank, row.rank_low, row.rank_high) for row in board.rows] == [
        ("b", "1", 1, 1),
        ("a", "2–3", 2, 3),
        ("c", "2–3", 2, 3),
        ("d", "4", 4, 4),
    ]
    assert board.rows[0].robust.rate == Rate(90, 100)
    assert [board.tied_with(row) for row in board.rows] == [[], ["c"], ["a"], []]
    pair = next(p for p in board.pairs if {p.first.label, p.second.label} == {"a", "c"})
    assert (pair.counts.lost, pair.counts.gained, pair.separable) == (1, 1, False)
    assert (len(board.pairs), pair.first is board.rows[1]) == (6, True)
    assert "1 attack, ref v1" in board.rows[0].how
    assert board.note == ""
    assert (board.rows[0].unranked, board.rows[0].standard_error) == ("", pytest.approx(0.03))


def test_ties_are_not_transitive_and_a_rank_may_reach_over_others(ranking):
    """Of 200 images a keeps 60, b 54, c 48, nested: 6 lost images do not separate two models, 12 do."""
    runs = [
        other(name, "." * kept + "x" * (200 - kept), protocol=REFERENCE)
        for name, kept in {"a": 60, "b": 54, "c": 48}.items()
    ]
    (board,) = leaderboards(runs)
    # Exact p-values 2^-5, 2^-5 and 2^-11; Holm: 2 * 2^-5, 2 * 2^-5 and 3 * 2^-11.
    assert [p.adjusted for p in board.pairs] == pytest.approx([2 / 32, 3 / 2048, 2 / 32])
    assert [row.rank for row in board.rows] == ["1–2", "1–3", "2–3"]


def test_without_the_correction_these_two_would_be_told_apart(ranking):
    """Six images between them: p = 2^-5 is below 5 %, three pairs make 3 * 2^-5 of it."""
    wanted = {"a": "." * 100, "b": "x" * 6 + "." * 94, "c": "x" * 12 + "." * 88}
    alone, among = (
        leaderboards([other(name, wanted[name], protocol=REFERENCE) for name in names])[0]
        for names in ("ab", "abc")
    )
    assert [row.rank for row in alone.rows] == ["1", "2"]
    assert [row.rank for row in among.rows] == ["1–2", "1–3", "2–3"]


def test_only_the_reference_protocols_are_ranked_and_join(ranking):
    strong, weak = ranked("a", "xx.."), ranked("a", ".x.x", protocol=AUTOATTACK)
    listed = ranked("b", "....", protocol=battery(FGSM, id="own", name="AutoAttack + PGD(1000)"))
    boards = leaderboards([listed, weak, strong])
    assert [(b.ranks, len(b.rows), bool(b.battery)) for b in boards] == [(True, 1, False), (False, 1, True)]
    (joined,), (alone,) = boards[0].rows, boards[1].rows
    assert (joined.robust.rate, joined.rank) == (Rate(25, 100), "1")
    assert (alone.rank, alone.rank_low) == ("", 0)
    words = "AutoAttack + PGD(1000) is not the reference protocol; evaluate with --battery reference"
    assert alone.unranked == words
    assert boards[1].note == f"not ranked: {words}"
    assert boards[1].name == "digits, l∞ 8/255, 100 images: AutoAttack + PGD(1000) (own v1, own battery)"
    assert boards[0].name == "digits, l∞ 8/255, 100 images"
    assert not boards[1].pairs


def test_the_shipped_protocols_rank_by_their_content_at_any_radius():
    """Without stand-ins: as it ships, at another radius; with an attack less, another seed or name."""

    def boards(protocol):
        marks = {spec.id: "x..." * 25 for spec in protocol.attacks}
        return leaderboards([record(protocol, "1111" * 25, marks)])

    whole = find(Battery, "autoattack").card
    for protocol in (whole, whole.at("4/255"), find(Battery, "autoattack_l2").card):
        (board,) = boards(protocol)
        assert (board.ranks, board.rows[0].rank, board.rows[0].audit.words) == (True, "1", "full AutoAttack")
    for change in ({"attacks": whole.attacks[:-1]}, {"seed": 1}, {"name": "AutoAttack +"}):
        (board,) = boards(whole.model_copy(update=change))
        assert (board.ranks, board.rows[0].rank) == (False, "")
        assert f"modified: not the autoattack v{whole.version} that ships" in board.name
    strong = find(Battery, "strong_l2").card
    (board,) = boards(strong)
    assert board.rows[0].unranked.endswith("evaluate with --battery reference_l2")
    (board,) = boards(strong.at("1"))
    assert board.rows[0].unranked.endswith("evaluate with --battery reference_l2 --eps 1")
    assert {find(Battery, name).card.threat.norm for name in ("reference", "reference_l2")} == {"linf", "l2"}


def test_a_listing_of_another_protocol_does_not_lower_the_ranked_number(ranking):
    runs = [ranked("a", "x..."), ranked("a", ".xxx", protocol=battery(FGSM, id="own"))]
    assert [b.rows[0].robust.rate for b in leaderboards(runs)] == [Rate(75, 100), Rate(25, 100)]


def test_batteries_that_share_a_name_or_an_id_are_told_apart():
    shipped = find(Battery, "table2").card
    taken = battery(FGSM, id="table2", name="Mine")
    named = battery(FGSM, id="mine", name=f"  {shipped.name.upper()} ")
    wider = shipped.at("16/255")
    assert [entries.origin(b) for b in (shipped, wider)] == ["shipped", "shipped"]
    assert [entries.origin(b) for b in (taken, named)] == ["table2 v1", "table2 v1"]
    assert entries.origin(wider.model_copy(update={"attacks": taken.attacks})) == "table2_at_16_255 v1"
    assert entries.origin(battery(FGSM)) == "own"
    runs = [other("a", "x.", protocol=taken), other("a", "..", protocol=battery(SPSA, id="table2"))]
    names = [board.name for board in leaderboards(runs)]
    assert len(set(names)) == 2
    assert all("modified: not the table2 v1 that ships" in name for name in names)


def test_records_of_the_same_weights_and_images_are_one_body_of_evidence(ranking):
    (board,) = leaderboards([ranked("a", "x..."), ranked("a", ".x..", protocol=AUTOATTACK)])
    (row,) = board.rows
    assert row.robust.rate == Rate(50, 100)  # neither record alone is below 75
    assert "2 attacks, ref v1 + aa v1" in row.how
    again = [ranked("a", "x..."), ranked("a", "..x.")]
    assert leaderboards(again)[0].rows[0].how.count("1 attack,") == 1


def test_fewer_images_than_a_hundred_are_not_ranked(ranking):
    few, enough = (ranked("a", "." * n, times=1, data={"digest": f"{n:064x}"}) for n in (99, 100))
    boards = leaderboards([few, enough])
    assert [(b.n, b.rows[0].rank) for b in boards] == [(100, "1"), (99, "")]
    assert (boards[0].note, boards[1].note) == ("", "not ranked: ranks need at least 100 images")
    assert boards[1].rows[0].unranked == "ranks need at least 100 images"


def test_other_images_under_the_same_name_are_another_leaderboard(ranking):
    """A hand-picked archive with the file name of another: its 100 % ranks first among nothing but itself."""
    honest = [ranked("a", "x..."), ranked("b", "xx..")]
    picked = ranked("a", "....", data={"digest": "ff" * 32})
    boards = leaderboards([picked, *honest])
    assert sorted([row.model_id for row in board.rows] for board in boards) == [["a"], ["a", "b"]]
    assert len({board.name for board in boards}) == len({board.key for board in boards}) == 2
    assert {board.name[-8:] for board in boards} == {"ffffffff", "da" * 4}


def test_equal_images_are_one_leaderboard_whatever_their_file_is_called(ranking):
    runs = [ranked("a", "x...", data={"name": "npz:mine"}), ranked("b", "xx..")]
    for order in (runs, runs[::-1]):
        (board,) = leaderboards(order)
        assert (board.data, len(board.rows)) == ("digits", 2)


@pytest.mark.parametrize(
    ("found", "asked", "config", "rank", "words"),
    [
        ("-...", 3, {}, "1", ""),
        ("-...", 3, {"audit": 0, "seed": 5}, "1", ""),
        ("-x..", 3, {}, "1", ""),  # all survivors were audited, what it broke is in the number
        ("--..", 2, {}, "1", ""),
        ("--x.", 2, {}, "", "AutoAttack breaks more: evaluate again with --resume --audit all"),
        ("---.", 2, {"audit": 25}, "", "another seed or size than the protocol's"),
        ("--..", 1, {"audit": 50}, "", "another seed or size than the protocol's"),  # tried until one suits
        ("--..", 2, {"seed": 5}, "", "another seed or size than the protocol's"),
        ("----", 2, {}, "", "its audit was not made yet"),
    ],
)
def test_an_audit_must_be_whole_or_that_of_the_protocol_and_break_nothing(
    ranking, found, asked, config, rank, words
):
    run = audited("a", "x...", found, asked, **config)
    (board,) = leaderboards([run])
    (row,) = board.rows
    assert row.rank == rank
    assert words in row.unranked
    assert bool(words) == bool(row.unranked)
    audit = run.audit
    assert (row.audit.draws, row.audit.broken) == (25 * sum(c != "-" for c in found), 25 * found.count("x"))
    assert (row.audit.bound, row.audit.words) == (0 if audit.whole else audit.bound, audit.words)
    table = leaderboard_table(board)
    (data,), (printed,) = table.data, table.rows
    if audit.whole:
        assert printed[6] == "full"
    else:
        # Rounded up to a tenth of a point.
        assert 0 <= float(printed[6].removeprefix("≤ ")) - 100 * audit.bound < 0.1
    assert (data["audit_draws"], data["audit_broken"]) == (audit.draws, audit.broken)
    assert (data["audit_bound"], data["audit"]) == (row.audit.bound, audit.words)
    # A run of AutoAttack itself on the same images leaves nothing open.
    whole = leaderboards([run, ranked("a", "x...", protocol=AUTOATTACK)])[0].rows[0]
    assert (whole.rank, whole.audit.words, whole.audit.bound) == ("1", "full AutoAttack", None)


def test_the_page_says_what_the_audit_says(ranking):
    run = audited("a", "x...", "--..", 2)
    files = build(Runs((run,))).files
    words = "AutoAttack would lower it by at most 4.4 points (95 %, m = 50, k = 0)"
    assert run.audit.words == words  # 75 of 100 stand; 1 - 0.05^(1/50) of them are 4.36
    assert f"worst case of 1 attack, ref v1; {words}" in files["index.html"].decode()
    assert b"AutoAttack audit" in files["models/a/index.html"]


def test_of_two_audits_the_one_that_drew_more_is_quoted(ranking):
    runs = [audited("a", "x...", "--..", 1), audited("a", "x...", "---.", 1)]
    for order in (runs, runs[::-1]):
        assert leaderboards(order)[0].rows[0].audit.draws == 50


def test_seed_and_size_of_the_protocol_must_be_those_of_one_audit(ranking):
    """One record has the seed and another the size: the seed of the bound is free all the same."""
    small, chosen = audited("a", "x...", "---.", 2, audit=25), audited("a", "x...", "--..", 2, seed=7)
    (row,) = leaderboards([small, chosen])[0].rows
    assert "another seed or size" in row.unranked
    own = audited("a", "x...", "-.--", 1)  # the protocol's own: what it says counts, though it drew less
    (row,) = leaderboards([own, chosen])[0].rows
    assert (row.unranked, row.audit.draws) == ("", 25)


def test_what_an_audit_leaves_open_counts_against_its_row(ranking):
    """b is robust on 20 more images than a; AutoAttack may break up to 4.4 of 100 of each of them."""
    open_ = audited("b", "x...", "--..", 2)
    full = [ranked(name, "x..." * 20 + "xx.." * 5, times=1, protocol=AUTOATTACK) for name in "ac"]
    (pair,) = leaderboards([open_, full[0]])[0].pairs
    assert (pair.counts.lost, pair.counts.gained) == (5, 0)
    assert pair.p == 1.0  # all 5 may fall
    closed = audited("b", "x...", "-...", 3)
    (pair,) = leaderboards([closed, full[0]])[0].pairs
    assert pair.p == pytest.approx(2 * 0.5**5)
    weak = ranked("a", "xx.." * 25, times=1, protocol=AUTOATTACK)
    (pair,) = leaderboards([open_, weak])[0].pairs
    assert (pair.counts.lost, pair.p) == (25, pytest.approx(2 * 0.5**20))  # 25 less 5, rounded up


def test_numbers_of_replaced_attacks_are_not_ranked(ranking):
    run = ranked("a", "x...", flags=[Flag(kind="replaced_attacks", evidence="pgd")])
    (row,) = leaderboards([run])[0].rows
    assert (row.rank, "other attacks" in row.unranked) == ("", True)


def test_the_cost_of_a_number_is_that_of_all_its_runs(ranking):
    one, two = ranked("a", "x..."), ranked("a", "x...", protocol=AUTOATTACK)
    # Each: the clean pass of 100 images in half a second, and 3 + 2 passes in 7 seconds.
    cost = leaderboards([one])[0].rows[0].cost
    assert (cost.passes, cost.seconds, cost.share) == (pytest.approx(1.05), 7.5, None)
    one.manifest.environment.gradient_rate = 14.0
    assert leaderboards([one])[0].rows[0].cost.share == pytest.approx(105 / 2 / 14 / 7.5)
    both = leaderboards([one, two])[0].rows[0].cost
    assert (both.passes, both.seconds, both.share) == (pytest.approx(2.1), 15.0, None)
    two.manifest.environment.gradient_rate = 7.0
    share = leaderboards([one, two])[0].rows[0].cost.share
    assert share == pytest.approx((105 / 2 / 14 + 105 / 2 / 7) / 15)


def test_every_form_tells_rank_error_cost_and_pairs(ranking):
    runs = [ranked("a", "x..."), ranked("b", "x..."), ranked("c", "xxxx")]
    runs[0].manifest.environment.gradient_rate = 14.0
    (board,) = leaderboards(runs)
    table = leaderboard_table(board)
    first, _, last = table.data
    assert (first["rank"], first["rank_low"], first["rank_high"]) == ("1–2", 1, 2)
    assert (first["not_separable_from"], last["not_separable_from"]) == ("b", "")
    assert (first["n"], first["robust_standard_error"]) == (100, pytest.approx((0.75 * 0.25 / 100) ** 0.5))
    assert (first["passes_per_image"], first["seconds"]) == (pytest.approx(1.05), 7.5)
    assert first["gradient_rate_share"] == pytest.approx(0.5)
    assert (first["data_digest"], first["protocol"], first["parameters"]) == (
        "da" * 32,
        "AutoAttack level",
        10,
    )
    printed = dict(zip((c.head for c in table.columns), table.rows[0], strict=True))
    assert (printed["Rank"], printed["SE"], printed["n"]) == ("1–2", "4.3", "100")
    assert (printed["Passes an image"], printed["Seconds"]) == ("1.05", "7.50")
    assert printed["Share of the gradient rate"] == "50 %"
    assert table.rows[1][13] == "–"  # not measured
    pairs = pairs_table(board)
    assert [(p["first"], p["second"], p["separable"]) for p in pairs.data] == [
        ("a", "b", False),
        ("a", "c", True),
        ("b", "c", True),
    ]
    assert pairs.data[1]["p"] == pytest.approx(2.0**-74)
    assert pairs.data[1]["p_holm"] == pytest.approx(3 * 2.0**-74)
    files = build(Runs(tuple(runs)), tables_only=True).files
    stored = json.loads(files["leaderboard-pairs.json"])["tables"]
    assert [row["p_holm"] for row in stored[0]["rows"]] == [p["p_holm"] for p in pairs.data]
    assert len(stored) == 1
    page = build(Runs(tuple(runs))).files
    index = page["index.html"].decode()
    assert "1 of 3 pairs of models are not separable" in index
    assert re.findall(r'<td class="rank" data-order="(\d+)">([^<]+)</td>', index) == [
        ("1", "1–2"),
        ("1", "1–2"),
        ("3", "3"),
    ]
    assert "<b>digits, l∞ 8/255, 100 images:</b> rank 1–2 of 3" in page["models/a/index.html"].decode()


def test_published_rows_stand_once_beside_the_ranked_leaderboard_with_most_images(ranking):
    def of(n, digest, **more):
        return ranked("a", "." * n, times=1, data={"name": "cifar10", "digest": digest}, **more)

    runs = [of(100, "01" * 32), of(200, "02" * 32), of(300, "03" * 32, protocol=battery(FGSM))]
    boards = [b for b in leaderboards(runs, (), tables()) if (b.data, b.threat.text) == ("cifar10", "8/255")]
    held = {board.n: sum(not row.records for row in board.rows) for board in boards}
    assert set(held) == {100, 200, 300}
    assert held[200] > 60
    assert held[100] == held[300] == 0
    (own,) = (row for row in boards[0].rows if row.records)
    assert (boards[0].n, own.rank) == (200, "1")
    assert not any(row.rank for row in boards[0].rows if not row.records)
    text = renewed(f"{BEGIN}{END}", boards, "README.md")
    assert text.count("| measured |") == 2  # both ranked leaderboards, without what is printed elsewhere
    assert "| published |" not in text


def test_rows_know_what_the_filters_ask(ranking):
    rows = []
    for k, (extra, parameters) in enumerate(
        [("", 0), ("none", 999_999), ("yes", 10**6), ("80M TI", 10**7), ("none", 5 * 10**7)]
    ):
        run = ranked("abcde"[k], "x...", model={"parameters": parameters})
        rows += leaderboards([run], extra_data=lambda _, extra=extra: extra)[0].rows
    assert [row.data_class for row in rows] == ["not declared", "none", "some", "some", "none"]
    sizes = ["not stated", "under 1 million", "1 to 10 million", "10 to 50 million", "50 million and more"]
    assert [row.size for row in rows] == sizes


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_weights_saved_again_are_the_same_model_in_any_order_of_the_runs(order):
    """A record without a digest of tensors, one of the same file, one of the same tensors in another file."""
    models = [
        {"weights_sha256": "a" * 64, "source": "card"},
        {"weights_sha256": "a" * 64, "tensors_sha256": "f" * 64, "source": "card"},
        {"weights_sha256": "b" * 64, "tensors_sha256": "f" * 64, "name": "given"},
    ]
    marks = ("x...", ".x..", "..x.")
    runs = [record(battery(FGSM), "1111", {"fgsm": marks[k]}, model=model) for k, model in enumerate(models)]
    (board,) = leaderboards([runs[k] for k in order])
    (row,) = board.rows
    assert row.robust.rate == Rate(1, 4)
    assert row.label == "Tiny net"  # the card's, not that of weights that were given


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_record_without_answers_joins_no_two_models_into_one(order):
    answers = ([1.0, 2.0], [1.0, -2.0], [])
    runs = [record(battery(FGSM), "1111", {"fgsm": "x..."}, model={"answers": a}) for a in answers]
    (board,) = leaderboards([runs[k] for k in order])
    assert sorted(len(row.records) for row in board.rows) == [1, 1, 1]  # it may be either
    (row,) = leaderboards([runs[k] for k in order if k != 1])[0].rows
    assert len(row.records) == 2  # it is the only one


def test_every_row_links_to_the_page_of_its_own_records():
    """One file of weights, two functions, and an older record that may be of either."""
    answers = {"old": [], "raw": [1.0, 2.0], "normalised": [9.0, -2.0]}
    runs = [
        record(battery(FGSM), "1111", {"fgsm": "x..."}, model={"id": name, "name": name, "answers": given})
        for name, given in answers.items()
    ]
    index = build(Runs(tuple(runs))).files["index.html"].decode()
    for name in answers:
        assert re.search(rf'href="models/{name}/index.html"[^>]*>\s*{name}', index), name


def test_other_functions_of_the_same_weights_are_other_models(tmp_path):
    """Another normalisation, say: nothing that one of them loses lowers the other."""
    answers = {"right": [1.0, -2.0, 3.0], "again": [1.001, -2.0, 3.001], "wrong": [1.0, 2.0, -3.0]}
    runs = {
        name: record(battery(FGSM), "1111", {"fgsm": marks}, model={"answers": answers[name]})
        for name, marks in {"right": "x...", "again": ".x..", "wrong": "..xx"}.items()
    }
    (board,) = leaderboards([runs["right"], runs["wrong"], runs["again"]])
    assert sorted(row.robust.rate.count for row in board.rows) == [2, 2]
    assert [len(row.records) for row in board.rows if row.is_of([runs["right"]])] == [2]
    (row,) = leaderboards([runs["right"], record(battery(PGD), "1111", {"pgd20": "xx.."})])[0].rows
    assert row.robust.rate == Rate(2, 4)  # what was written before answers were kept is known by its weights
    for name, run in runs.items():
        run.save(tmp_path / "runs" / name)
    study = tmp_path / "runs" / "curvature"
    study.mkdir()
    info = {"weights_sha256": runs["wrong"].manifest.model.weights_sha256, "answers": answers["wrong"]}
    head = {"verb": "curvature", "models": {"net": info}, "files": ["a.svg"], "data": {}}
    (study / "manifest.json").write_text(json.dumps(head))
    (study / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    site = build(scan([tmp_path / "runs"]))
    pages = {
        name: text for name, text in site.files.items() if re.fullmatch(r"models/[^/]+/index.html", name)
    }
    assert len(pages) == site.models == 2
    assert sorted("a.svg" in str(text) for text in pages.values()) == [False, True]


def test_boards_are_of_one_data_set_split_and_threat_model():
    wide = battery(FGSM, threat={"norm": "linf", "eps": "16/255"})
    runs = [
        other("a", "x."),
        other("b", "..", data={"name": "svhn", "digest": "01" * 32}),
        other("c", "..", data={"split": "train"}),
        record(wide, "11", {"fgsm": "x."}),
    ]
    mini = "2 images: Mini (mini v1, own battery)"
    assert [(b.name, len(b.rows)) for b in leaderboards(runs)] == [
        (f"digits, l∞ 8/255, {mini}", 1),
        (f"digits, l∞ 16/255, {mini}", 1),
        (f"digits (train), l∞ 8/255, {mini}", 1),
        (f"svhn, l∞ 8/255, {mini}", 1),
    ]


def test_unreliable_models_sink_and_are_not_ranked(ranking):
    flag = Flag(kind="stochastic", evidence="3 of 64")
    (board,) = leaderboards([ranked("a", "....", flags=[flag]), ranked("b", "xxx.")])
    assert [(row.model_id, row.rank) for row in board.rows] == [("b", "1"), ("a", "")]
    assert "unreliable" in board.rows[1].unranked
    assert not board.pairs


def test_verified_images_of_others_lower_the_best_known_number(ranking):
    run = ranked("a", "xxx.......", 10)
    theirs = evidence(run, list(range(3, 100, 10)) + list(range(4, 100, 10)))
    (board,) = leaderboards([run, ranked("b", "xxxx......", 10)], [theirs])
    assert [(row.model_id, row.kind) for row in board.rows][1:] == [("a", "external"), ("a", "measured")]
    by_kind = {(row.model_id, row.kind): row for row in board.rows}
    lowered, own = by_kind["a", "external"], by_kind["a", "measured"]
    assert (lowered.robust.rate, own.robust.rate) == (Rate(50, 100), Rate(70, 100))
    assert (lowered.rank, own.rank, by_kind["b", "measured"].rank) == ("2", "", "1")
    assert "external row" in own.unranked
    assert (lowered.decided, lowered.date) == ("Somebody", "2026-03-01")
    # The test is of what is left: b alone withstands 10 images, a none that b does not.
    assert [(p.counts.lost, p.counts.gained) for p in board.pairs] == [(10, 0)]


@pytest.mark.parametrize(
    "change",
    [
        {"threat": {"norm": "linf", "eps": "16/255"}},
        {"threat": {"norm": "l2", "eps": "8/255"}},
        {"model": {"weights_sha256": "cd" * 32}},
        {"data": {"name": "svhn"}},
    ],
)
def test_images_of_others_count_for_their_weights_data_and_ball_alone(change):
    run = record(battery(FGSM, PGD, SPSA), CLEAN, EVIDENCE)
    theirs = evidence(run, [6, 7]).submission.model_dump(mode="json")
    fields = {k: {**theirs[k], **v} for k, v in change.items()}
    (board,) = leaderboards([run], [evidence(run, [6, 7], **fields)])
    assert [row.kind for row in board.rows] == ["measured"]


def test_other_pixels_under_the_same_id_do_not_count():
    run = record(battery(FGSM, PGD, SPSA), CLEAN, EVIDENCE)
    theirs = evidence(run, [6, 7])
    theirs.samples["image_sha256"] = "f" * 64
    assert [row.kind for row in leaderboards([run], [theirs])[0].rows] == ["measured"]


def test_printed_rows_are_marked_and_never_ranked():
    found = {board.name: board for board in leaderboards([], (), tables())}
    names = {"cifar10, l∞ 4/255", "cifar10, l∞ 8/255", "cifar10, l∞ 0.031", "svhn, l∞ 12/255"}
    assert set(found) == names
    rows = {row.label: row for row in found["cifar10, l∞ 8/255"].rows}
    # The lowest of the paper's 41.4, 41.1 and 44.5 and of AutoAttack's 38.5, which others measured.
    wrn = rows["WRN-28-10, CURE"]
    assert (wrn.robust.printed, wrn.clean.printed) == pytest.approx((0.385, 0.8311))
    assert (wrn.decided, wrn.kind) == ("AutoAttack", "published")
    assert wrn.tables == ("robustbench", "table2", "text_accuracy")
    assert "AutoAttack 38.5" in wrn.how
    assert rows["WRN-28-10, Adversarial training"].kind == "quoted"
    assert not any(row.rank or not row.unranked for board in found.values() for row in board.rows)


# --- curves ----------------------------------------------------------------------------------------------


def test_steps_curve_is_what_every_shorter_run_would_have_left():
    run = record(battery(PGD), "11110", {"pgd20": "xxx.-"})
    run.samples["pgd20.step"] = pd.array([0, 3, 7, 20, None], "Int32")
    (curve,) = step_curves(run)
    assert [rate.count for _, rate, _ in curve.points] == [3] * 3 + [2] * 4 + [1] * 14
    assert {rate.total for _, rate, _ in curve.points} == {5}
    assert curve.points[-1][1] == run.robust_accuracy("pgd20")
    drawn = plot([curve])
    assert [round(dot.y, 6) for dot in drawn.lines[0][2]] == [40, 60, 80, 80]
    assert "7 steps: 20.0 %" in drawn.lines[0][2][2].text


def test_attacks_that_do_not_note_their_first_success_have_no_curve():
    for change in ({"stop": "never"}, {"restarts": 2}):
        assert step_curves(record(battery({**PGD, **change}), "1", {"pgd20": "x"})) == []
    assert plot([]) is None


def test_radii_curve_counts_the_boundaries_that_were_found():
    run = record(battery(DEEPFOOL), "11110", {"deepfool": "xo.v-"})
    run.samples["deepfool.pred"] = pd.array([1, 1, 0, 1, None], "Int32")
    run.samples["deepfool.linf"] = pd.array([2 / 255, 12 / 255, 1 / 255, 1 / 255, None], "Float32")
    (curve,) = radius_curves(run)
    at = {words: rate.count for _, rate, words in curve.points}
    assert curve.points[-1][0] == pytest.approx(16 / 255)
    assert (at["l∞ 0.0/255"], at["l∞ 8.0/255"], at["l∞ 16.0/255"]) == (4, 3, 2)
    counts = [rate.count for _, rate, _ in curve.points]
    assert counts == sorted(counts, reverse=True)


# --- checklist -------------------------------------------------------------------------------------------


def item(run, keyword: str, card=None) -> tuple[str, list[float]]:
    """Status of the one item whose name has this keyword, and the numbers of its evidence."""
    (one,) = (item for item in checklist(run, card) if keyword in item.name)
    return one.status, [
        float(number) for number in re.findall(r"(?<![(\d])\d+(?:\.\d+)?(?![)\d])", one.evidence)
    ]


def test_checklist_counts_what_the_record_shows():
    noise = {"id": "noise", "kind": "uniform_noise", "name": "noise", "limit": 0, "draws": 10}
    protocol = battery(FGSM, PGD, SPSA, noise)
    good = record(protocol, "1111", {"fgsm": "x...", "pgd20": "xxx.", "spsa": ".x..", "noise": "x..."})
    bad = record(protocol, "1111", {"fgsm": "...x", "pgd20": "xx..", "spsa": "..x.", "noise": "..x."})
    # Broken by the weaker attack, and of these not by the stronger one.
    for keyword in ("Iterated attacks", "Gradient-free", "Random noise"):
        assert item(good, keyword) == ("met", [1, 0])
        assert item(bad, keyword) == ("not met", [1, 1])
    assert item(good, "restarts")[0] == "not met"


def test_late_successes_mean_that_steps_were_too_few():
    run = record(battery(PGD), "1111", {"pgd20": "xx.."})
    assert item(run, "Enough steps") == ("met", [0])
    run.samples["pgd20.step"] = pd.array([2, 11, None, None], "Int32")
    assert item(run, "Enough steps") == ("not met", [25])


def test_nothing_is_taken_to_be_declared():
    run = record(battery(FGSM), "1", {"fgsm": "."})
    assert item(run, "Attacks adapted")[0] == "not declared"
    assert item(run, "Random noise")[0] == "not in the record"
    card = find(ModelCard, "digits_cure").card
    full = card.model_copy(update={"declared": card.declared.model_copy(update={"adaptive_attack": "none"})})
    assert item(run, "Attacks adapted", full)[0] == "declared"
    assert item(run, "Provable bound", full)[0] == "not declared"
    assert next(i for i in checklist(run, full) if "adapted" in i.name).evidence == "none"


def test_a_card_is_about_its_own_weights_alone():
    cards = catalog(ModelCard)
    stored = cards["digits_cure"].card
    model = {"id": "digits_cure", "weights_sha256": stored.weights.sha256}
    assert card_of(record(battery(FGSM), "1", {"fgsm": "."}, model=model), cards) is stored
    model["weights_sha256"] = "00" * 32
    assert card_of(record(battery(FGSM), "1", {"fgsm": "."}, model=model), cards) is None
    recipe = {"id": "wrn_cure", "source": "card"}
    assert card_of(record(battery(FGSM), "1", {"fgsm": "."}, model=recipe), cards).id == "wrn_cure"
    recipe["source"] = "weights given: x.safetensors"
    assert card_of(record(battery(FGSM), "1", {"fgsm": "."}, model=recipe), cards) is None


# --- tables ----------------------------------------------------------------------------------------------


def test_every_form_of_a_table_says_the_same():
    data = ({"name": HOSTILE, "rate": 0.25}, {"name": "b", "rate": float("nan")})
    rows = ((HOSTILE, "25.0"), ("b", "–"))
    table = Table("T", "note.", columns("Name", "%"), rows, data, unreliable=frozenset({1}))
    files = exports("t", [table])
    assert set(files) == {"t.csv", "t.json", "t.md", "t.tex"}
    assert set(exports("t", [table], ("csv", "md"))) == {"t.csv", "t.md"}
    read = list(csv.DictReader(io.StringIO(files["t.csv"])))
    assert [(row["name"], row["rate"]) for row in read] == [(HOSTILE, "0.25"), ("b", "")]
    assert json.loads(files["t.json"])["tables"][0]["rows"] == [data[0], {"name": "b", "rate": None}]
    assert files["t.md"].count("\n| ") == 3
    assert "<script" not in files["t.md"]
    assert [line for line in files["t.md"].splitlines() if "unreliable" in line] == [
        "| b **unreliable** | – |"
    ]
    assert r"\toprule" in files["t.tex"]
    assert files["t.tex"].count("dagger") == 2  # on the row, and explained in the caption
    assert not re.search(r"(?<!\\)[&%#_$](?![^\n]*\\\\)", files["t.tex"].split(r"\midrule")[1].split("&")[0])


def test_latex_prints_intervals_below_and_leaves_out_what_has_no_room():
    heads = (Column("Model", "left"), Column("PGD", note="n = 5"), Column("Flags", "left", in_latex=False))
    table = Table("T", "", heads, (("[a]", Cell("40.0", "[11.8, 76.9]"), "stochastic"),))
    lines = to_latex([table]).splitlines()
    assert r"\begin{tabular}{lr}" in lines
    assert lines[lines.index(r"\midrule") + 1 :][:2] == [
        r"{[a]} & 40.0 \\",
        r" & {\scriptsize [11.8, 76.9]} \\",
    ]
    assert "PGD: n = 5" in lines[2]
    assert "stochastic" not in "".join(lines)
    assert "| PGD (n = 5) |" in to_markdown([table])


def test_plain_text_is_aligned_broken_and_never_wider_than_a_terminal():
    heads = (Column("\nName", "left", most=5), Column("two\nlines"), Column("x", "center", least=5))
    rows = (("abcdefgh", "1", "y"), ("a\x1b[2J", "22", "z"))
    lines = to_text(Table("", "", heads, rows), "  ").split("\n")
    assert lines == ["           two", "  Name   lines    x", "  abcd…      1    y", "  a [2J     22    z"]
    assert not any("\x1b" in line for line in lines)
    wide = Table(
        "", "", columns("Name", *(f"column {i}" for i in range(12))), (("a", *("1" * 8 for _ in range(12))),)
    )
    blocks = to_text(wide).split("\n\n")
    assert len(blocks) > 1
    assert all(block.startswith("Name") for block in blocks)
    assert sum(block.count("11111111") for block in blocks) == 12
    words = Table(
        "", "", (Column("id", "left", "code"), Column("what", "left", "text")), (("a", "word " * 40),)
    )
    texts = to_text(words).split("\n")
    assert sum(line.count("word") for line in texts) == 40
    assert texts[2].startswith("    word")
    for text in (to_text(wide), to_text(words)):
        assert max(map(len, text.split("\n"))) <= WIDTH


def test_a_row_without_a_cell_for_each_column_is_refused():
    with pytest.raises(ValueError, match="one cell for each column"):
        Table("T", "", columns("a", "b"), (("x",),))


# --- the whole site --------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path) -> Path:
    """A folder of two runs, a study of geometry, a diagnosis, and things that are none of these."""
    protocol = find(Battery, "table2").card
    cifar = {"name": "cifar10"}
    cure = {"id": "cure", "name": "CURE net", "published_row": "resnet18/cure"}
    record(protocol, CLEAN, {"pgd20": "xxxx....--"}, data=cifar, model=cure).save(tmp_path / "deep/down/cure")
    evil = hostile()
    evil.manifest.model.weights_sha256 = "ee" * 32
    evil.save(tmp_path / "hostile")
    # A second run of the first model, and with two models side by side a second one of its battery.
    record(battery(FGSM, DEEPFOOL), "11", {"fgsm": "x.", "deepfool": "xo"}, model=cure).save(
        tmp_path / "more"
    )
    record(protocol, CLEAN, {"pgd20": "x.x.....--"}, data=cifar, model=cure).save(tmp_path / "again")
    study = tmp_path / "deep" / "curvature"
    study.mkdir()
    models = {"cure": {"weights_sha256": "ab" * 32}}
    files = ["profile.svg", "samples.csv", "notes.txt", "../secret.svg"]
    data = {"name": "cifar10", "split": "test", "n": 4}
    head = {"verb": "curvature", "models": models, "files": files, "data": data}
    (study / "manifest.json").write_text(json.dumps(head))
    for name in files:
        (study / name).write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    masks = tmp_path / "masking"
    masks.mkdir()
    (masks / "manifest.json").write_text(json.dumps(head | {"verb": "masking", "files": ["masking.json"]}))
    finding = {"letter": "A", "title": "SPSA lower", "status": "raised", "evidence": HOSTILE}
    finding |= {"value": 0.25, "threshold": 0.05, "ids": []}
    found = {"verdict": {"kind": "suspected", "words": "suspected: A (n = 4)"}, "findings": [finding]}
    found |= {"threat": {"norm": "linf", "eps": "8/255"}, "classified_correctly": 3}
    (masks / "masking.json").write_text(json.dumps({"models": {"cure": found}}))
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "log.json").write_text("{}")
    return tmp_path


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.links += [values[key] for key in ("href", "src") if values.get(key)]
        self.ids += [values["id"]] if values.get("id") else []


def test_every_link_leads_to_a_file_of_the_site_and_no_id_is_given_twice(runs):
    site = build(scan([runs]))
    pages = {name: _Links() for name in site.files if name.endswith(".html")}
    for name, page in pages.items():
        page.feed(site.files[name].decode())
        assert len(page.ids) == len(set(page.ids)), name
    assert len(pages) == 1 + 2 + len(tables())
    for name, page in pages.items():
        for link in page.links:
            if link.startswith(("https://", "data:")):
                continue
            path, _, anchor = link.partition("#")
            target = (Path("/site") / name).parent / path if path else Path("/site") / name
            where = target.resolve().relative_to("/site").as_posix()
            assert where in site.files, (name, link)
            if anchor:
                assert anchor in pages[where].ids, (name, link)


def test_every_table_has_its_files(runs):
    names = set(build(scan([runs])).files)
    stems = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    assert {f"{stem}.{suffix}" for stem in stems for suffix in ("csv", "json", "md")} <= names
    printed = {"leaderboard", "tables/table2"}
    printed |= {f"models/cure/{part}" for part in ("attacks", "checklist-1", "masking-1", "steps-1")}
    plain = {"tables/table2-sources", "models/cure/provenance"}
    assert printed | plain <= stems
    assert {f"{stem}.tex" for stem in printed} <= names
    assert not {f"{stem}.tex" for stem in plain} & names


def test_tables_alone_are_those_of_the_whole_site(runs, tmp_path):
    found = scan([runs])
    whole, alone = build(found), build(found, tables_only=True)
    stems = ("leaderboard", "leaderboard-pairs")
    wanted = {f"{stem}.{suffix}" for stem in stems for suffix in ("csv", "json", "md")}
    wanted |= {f"tables/{table.id}.{suffix}" for table in tables() for suffix in ("csv", "md", "tex")}
    assert set(alone.files) == wanted
    assert all(whole.files[name] == data for name, data in alone.files.items())
    assert (alone.models, len(alone.leaderboards)) == (whole.models, len(whole.leaderboards)) == (2, 7)
    out = tmp_path / "out"
    write(whole, out)
    write(alone, out)  # the pages of before are taken away
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert left == wanted | {"site.json"}


def test_pages_escape_what_records_say(runs):
    site = build(scan([runs]))
    for name, data in site.files.items():
        if name.endswith(".html"):
            page = _Links()
            page.feed(data.decode())
            assert page.tags.count("script") == (2 if name == "index.html" else 0)
            assert b"onerror=alert" not in data.replace(b"&lt;img src=x onerror=alert", b"")
            assert b"7*7" not in data or b"{{ 7*7 }}" in data


def test_a_model_page_holds_what_was_stored_for_its_weights(runs):
    site = build(scan([runs]))
    page = site.files["models/cure/index.html"].decode()
    assert "suspected: spsa_below_pgd (n = 3)" in page
    assert 'src="../../studies/curvature-1/profile.svg"' in page
    assert "studies/curvature-1/samples.csv" in site.files
    assert not [name for name in site.files if "secret" in name or "notes.txt" in name]
    other = site.files["models/tiny/index.html"].decode()  # has a PGD and SPSA, and no study of its own
    assert "From the record alone" in other
    assert "suspected: spsa_below_pgd" not in other


def test_records_are_named_and_linked_not_copied(runs):
    places = ("deep/down/cure", "more", "again")
    site = build(scan([runs]))
    assert not [name for name in site.files if name.endswith((".parquet", "manifest.json"))]
    page = site.files["models/cure/index.html"].decode()
    assert all(f"<code>{place}</code>" in page for place in places)
    assert "samples.parquet</a>" not in page
    linked = (
        build(scan([runs]), records_url="https://example.org/runs/").files["models/cure/index.html"].decode()
    )
    for place in places:
        assert f'href="https://example.org/runs/{place}/samples.parquet"' in linked
        assert f'href="https://example.org/runs/{place}/manifest.json"' in linked


def test_studies_are_read_in_both_formats_each_figure_once(runs):
    study = runs / "deep" / "curvature"
    (study / "samples.csv").rename(study / "samples.parquet")
    for name in ("profile.png", "mean.png"):
        Image.new("RGB", (40, 30)).save(study / name)
    head = json.loads((study / "manifest.json").read_text())
    head["files"] = ["mean.png", "profile.png", "profile.svg", "samples.parquet"]
    (study / "manifest.json").write_text(json.dumps(head))
    (folder,) = (s for s in scan([runs]).studies if s.verb == "curvature")
    assert [p.name for p in study_files(folder, (".svg", ".png"))] == ["mean.png", "profile.svg"]
    assert [p.name for p in study_files(folder, (".csv", ".parquet"))] == ["samples.parquet"]
    files = build(scan([runs])).files
    assert {n for n in files if n.startswith("studies/curvature-1/")} == {
        f"studies/curvature-1/{name}" for name in ("mean.png", "profile.svg", "samples.parquet")
    }
    page = files["models/cure/index.html"].decode()
    assert "curvature-1/samples.parquet" in page
    assert 'mean.png" width="20"' in page  # PNGs have two pixels for one of the page


def test_paper_pages_hold_ours_beside_the_printed_number(runs):
    files = build(scan([runs])).files
    rows = list(csv.DictReader(io.StringIO(files["tables/table2.csv"].decode())))
    ours = [r for r in rows if (r["row"], r["column"]) == ("resnet18/cure", "pgd20")]
    assert [r["count"] for r in ours] == ["6", "4"]  # two runs of the same model
    cell = ours[1]
    assert (cell["published"], cell["n"], cell["same"]) == ("36.3", "10", "True")
    assert float(cell["difference"]) == pytest.approx(0.4 - 0.363)
    empty = next(r for r in rows if (r["row"], r["column"]) == ("resnet18/normal", "pgd20"))
    assert (empty["measured"], empty["reasons"]) == ("", "not measured")


def test_rows_of_the_same_name_in_tables_of_other_data_stay_empty(tmp_path):
    model = {"published_row": "resnet18/cure"}  # a row of Table 2 (CIFAR-10) and of Table 3 (SVHN)
    run = record(
        battery(PGD), CLEAN, {"pgd20": "xxxx....--"}, model=model, data={"name": "folder:cifar10-jpeg"}
    )
    files = build(Runs((run,))).files
    assert b"folder:cifar10-jpeg instead of cifar10" in files["tables/table2.html"]
    assert b"0.8" not in files["tables/table3.csv"]
    page = files["models/tiny/index.html"]
    assert b"tables/table2.html" in page
    assert b"tables/table3.html" not in page


def test_a_site_is_the_same_every_time_and_takes_its_old_files_away(runs, tmp_path):
    out = tmp_path / "out"
    first = build(scan([runs]))
    assert build(scan([runs])).files == first.files
    write(first, out)
    assert {name: (out / name).read_bytes() for name in first.files} == first.files
    (out / "mine.txt").write_text("kept")
    write(build(Runs()), out)
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert "mine.txt" in left
    assert not [name for name in left if name.startswith(("models/", "studies/"))]
    assert not (out / "models").exists()
    listed = json.loads((out / "site.json").read_text())["files"]
    assert set(listed) == left - {"mine.txt", "site.json"}


def test_a_site_is_no_run_and_is_not_scanned(runs):
    write(build(scan([runs])), runs / "site")
    assert len(scan([runs]).records) == 4
    assert len(scan([runs, runs / "deep"]).records) == 4


def test_a_folder_with_other_things_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="holds other files"):
        write(build(Runs()), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_list_of_files_that_points_outside_is_not_followed(tmp_path):
    victim, out = tmp_path / "victim.txt", tmp_path / "out"
    victim.write_text("")
    write(build(Runs()), out)
    (out / "site.json").write_text(json.dumps({"files": {"../victim.txt": "", "index.html": ""}}))
    write(build(Runs()), out)
    assert victim.exists()


NO_FINDINGS = '{"models": {"cure": {"threat": {"norm": "linf", "eps": "8/255"}, "findings": ["A"]}}}'


@pytest.mark.parametrize(
    "damage", ["{", '{"models": {}}', '{"models": {"cure": {"findings": 3}}}', NO_FINDINGS]
)
def test_a_damaged_diagnosis_is_named(runs, damage):
    (runs / "masking" / "masking.json").write_text(damage)
    with pytest.raises(UsageError, match=r"masking\.json: cannot be read"):
        masking_sections(
            scan([runs]).studies, other("cure", "..", model={"weights_sha256": "ab" * 32}).manifest.model
        )


def test_reports_pass_over_what_studies_left_in_a_run(runs):
    study = runs / "deep" / "down" / "curvature"
    study.mkdir()
    (study / "manifest.json").write_text('{"verb": "curvature"}')
    assert [r.manifest.model.id for r in find_records((runs / "deep" / "down",))] == ["cure"]
    (study / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        find_records((runs / "deep" / "down",))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"verb": "../../evil"}, "verb: String should match"),
        ({"verb": "curve", "models": []}, "models: Input should be a valid dictionary"),
        ({"verb": "curve", "files": "x"}, "files: Input should be a valid list"),
    ],
)
def test_a_study_that_is_none_is_named(runs, head, words):
    (runs / "masking" / "manifest.json").write_text(json.dumps(head))
    with pytest.raises(UsageError, match=words):
        scan([runs])


def test_every_geometry_command_has_its_words():
    assert set(STUDIES) == {verb.name for verb in (*geometry_cli.VERBS, *boundary_cli.VERBS)}


def test_a_study_about_no_weights_is_on_no_page(runs):
    (runs / "masking" / "manifest.json").write_text(json.dumps({"verb": "evolution"}))
    site = build(scan([runs]))
    assert b"suspected: spsa_below_pgd" not in site.files["models/cure/index.html"]


def test_a_run_named_wrongly_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for runs, words in ((f"{tmp_path}/nothing", "no such run"), (f"{tmp_path}/empty", "no run in there")):
        with pytest.raises(SystemExit) as end:
            cli.main(["site", runs, "--out", f"{tmp_path}/out"])
        err = capsys.readouterr().err
        assert end.value.code == 2
        assert words in err
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_the_command_writes_the_site_and_the_readme(runs, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    with pytest.raises(SystemExit) as end:
        cli.main(["site", str(runs), "--out", f"{tmp_path}/out", "--readme", str(readme)])
    assert end.value.code == 0
    assert f"site: {tmp_path}/out/index.html" in capsys.readouterr().out
    assert (tmp_path / "out" / "index.html").is_file()
    assert "No run of the reference protocol is stored here yet." in readme.read_text()
    assert (
        "cifar10, l∞ 8/255, 10 images: CURE paper, Table 2: CIFAR-10, l∞ 8/255 (table2 v1)"
        in readme.read_text()
    )


# --- README and the stored site ----------------------------------------------------------------------------


def test_the_block_is_renewed_and_nothing_else(ranking):
    text = f"# A\n\n{BEGIN}\nold\n{END}\ntail\n"
    boards = leaderboards([ranked("a|b", "x..."), other("c", "x...")])
    new = renewed(text, boards, "README.md")
    assert new.startswith(f"# A\n\n{BEGIN}\n")
    assert new.endswith(f"{END}\ntail\n")
    assert "old" not in new
    numbers = r"75.0 \[65.7, 82.5\] | 4.3 | – | 100.0 \[96.3, 100.0\] | 100 | FGSM | measured |"
    assert rf"| a\|b | 1 | {numbers}" in new
    assert "### digits, l∞ 8/255, 100 images\n" in new
    assert "- digits, l∞ 8/255, 4 images: Mini (mini v1, own battery)\n" in new  # named, not printed
    assert renewed(new, boards, "README.md") == new
    for bad in ("", f"{END}{BEGIN}", text + text):
        with pytest.raises(UsageError, match="needs one line"):
            renewed(bad, [], "README.md")


NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def same_but_for_rounding(stored: bytes, data: bytes) -> bool:
    """The last digits of an interval are SciPy's; everything else must be equal."""
    texts = stored.decode(), data.decode()
    if NUMBER.sub("#", texts[0]) != NUMBER.sub("#", texts[1]):
        return False
    values = [[float(text) for text in NUMBER.findall(text)] for text in texts]
    return values[0] == pytest.approx(values[1], rel=1e-9)


def test_the_stored_tables_are_those_of_the_stored_runs():
    measured, stored = ROOT / "reports" / "measured", ROOT / "reports" / "leaderboard"
    if not measured.is_dir():
        pytest.skip("no checkout with reports/measured")
    advice = "renew it with the command of CONTRIBUTING.md, `cure-bench site --tables-only`"
    site = build(scan([measured]), tables_only=True)
    names = {p.relative_to(stored).as_posix() for p in stored.rglob("*") if p.is_file()} - {"site.json"}
    assert names == set(site.files), advice
    for name, data in site.files.items():
        before = (stored / name).read_bytes()
        assert before == data or (name.endswith((".csv", ".json")) and same_but_for_rounding(before, data)), (
            f"{name}: {advice}"
        )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert renewed(readme, site.leaderboards, "README.md") == readme, advice
