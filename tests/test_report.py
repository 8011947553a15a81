"""Every printed number against a count made by hand, and pages that hostile names cannot break."""

from __future__ import annotations

import csv
import io
import math
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import pytest
from made import CLEAN, DEEPFOOL, EVIDENCE, FGSM, HOSTILE, PGD, SPSA, battery, hostile, record

from robustbench_cure.errors import UsageError
from robustbench_cure.evaluation.flags import FLAG_KINDS, Flag
from robustbench_cure.evaluation.record import Manifest, Record
from robustbench_cure.protocol.cards import Battery, PublishedTable
from robustbench_cure.protocol.catalog import catalog, find
from robustbench_cure.report.charts import bands
from robustbench_cure.report.paper import NOT_MEASURED, paper_table
from robustbench_cure.report.render import render_report, templates, write_reports
from robustbench_cure.report.results import attack_table, protocol_tables
from robustbench_cure.report.table import WIDTH, latex, markdown, to_csv, to_latex, to_markdown
from robustbench_cure.report.tables import attack_rows, labels, only_this, protocols, summary
from robustbench_cure.report.terminal import terminal_table
from robustbench_cure.report.wording import duration, percent, points, spec_words
from robustbench_cure.stats import Rate


@pytest.fixture
def run() -> Record:
    """Ten samples, eight correct, three attacks; the counts of the tests below are read off these rows."""
    return record(battery(FGSM, PGD, SPSA), CLEAN, EVIDENCE)


def wilson(k: int, n: int) -> tuple[float, float]:
    """The closed form, z for 95 %."""
    z, p = 1.959963984540054, k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


# --- the attacks table ---------------------------------------------------------------------------------


def test_attack_rows_have_the_counts_of_the_samples(run):
    rows = attack_rows(run)
    assert [row.id for row in rows] == ["clean", "fgsm", "pgd20", "spsa", "worst"]
    accuracy = {row.id: (row.accuracy.count, row.accuracy.total) for row in rows}
    assert accuracy == {
        "clean": (8, 10),
        "fgsm": (6, 10),
        "pgd20": (4, 10),
        "spsa": (5, 6),
        "worst": (3, 10),
    }
    success = {row.id: row.success and (row.success.count, row.success.total) for row in rows}
    assert success == {"clean": None, "fgsm": (2, 8), "pgd20": (4, 8), "spsa": (1, 6), "worst": (5, 8)}
    assert {row.id: row.only for row in rows[1:-1]} == {"fgsm": 0, "pgd20": 2, "spsa": 1}
    assert {row.id: row.violations for row in rows[1:-1]} == {"fgsm": 0, "pgd20": 0, "spsa": 1}
    assert [row.queries for row in rows] == [1.0, 5.0, 5.0, 5.0, None]
    assert [row.seconds for row in rows] == [0.5, 7.0, 7.0, 7.0, None]
    # Median of (1, 2), (1, 2, 3, 4) and (5) grey levels.
    assert [255 * row.distance for row in rows[1:-1]] == pytest.approx([1.5, 2.5, 5.0], rel=1e-6)


def test_intervals_are_wilsons(run):
    for row in attack_rows(run):
        assert row.accuracy.interval == pytest.approx(wilson(row.accuracy.count, row.accuracy.total))
    assert run.worst_case_accuracy.interval == pytest.approx((0.107791, 0.603222), abs=1e-6)


def test_a_rate_of_nothing_says_nothing():
    assert math.isnan(Rate(0, 0).value)
    assert Rate(0, 0).interval == (0, 1)


def test_worst_case_is_at_most_every_attack_that_covers_all(run):
    for row in attack_rows(run)[1:-1]:
        if not row.limit:
            assert run.worst_case_accuracy.value <= row.accuracy.value


def test_l2_distances_come_from_the_l2_column():
    protocol = battery(FGSM, threat={"norm": "l2", "eps": "1/2"})
    rows = attack_rows(record(protocol, "1111", {"fgsm": "xxx."}))
    assert rows[1].distance == pytest.approx(0.2, rel=1e-6)
    assert "0.200" in render_report([record(protocol, "1111", {"fgsm": "xxx."})], {})


def test_minimal_norm_attacks_are_a_type_of_their_own():
    run = record(battery(FGSM, DEEPFOOL), "11110", {"fgsm": "x...-", "deepfool": "x.oo-"})
    row = attack_rows(run)[2]
    assert row.kind == "minimal"
    assert (row.converged, row.success, row.accuracy) == (Rate(3, 4), Rate(1, 4), Rate(3, 5))
    assert row.distance == pytest.approx(3 / 255, rel=1e-6)  # of 1, 3 and 4 grey levels
    assert "DeepFool" not in [band.name for band in bands(protocols([run])[0])]
    assert "minimal-norm attacks" in render_report([run], {})
    assert "converged" in terminal_table([run])


def test_nothing_attacked_and_nothing_broken_are_not_numbers():
    rows = attack_rows(record(battery(FGSM), "000", {"fgsm": "---"}))
    assert (rows[1].success, rows[1].queries, rows[1].distance) == (Rate(0, 0), None, None)
    page = render_report([record(battery(FGSM), "000", {"fgsm": "---"})], {})
    assert ">nan" not in page
    assert "nothing was broken" in page


def test_summary_names_the_deciding_attack(run):
    (line,) = summary([run])
    assert (line.clean, line.worst, line.deciding) == (Rate(8, 10), Rate(3, 10), "PGD(20)")
    untouched = record(battery(FGSM), "11", {"fgsm": ".."})
    assert summary([untouched])[0].deciding == ""


def test_an_attack_on_a_subset_does_not_decide():
    weak = record(battery(FGSM, {**SPSA, "limit": 2}), "1111", {"fgsm": "..x.", "spsa": "xx--"})
    assert weak.robust_accuracy("spsa").value == 0.0
    assert summary([weak])[0].deciding == "FGSM"
    assert only_this(weak) == {"fgsm": 1, "spsa": 2}


def test_flags_are_ordered_by_severity_and_mark_the_run(run):
    run.flags = [
        Flag(kind="lossy_data", evidence="all"),
        Flag(kind="stochastic", evidence="3 of 64"),
    ]
    (line,) = summary([run])
    assert [flag.kind for flag in line.flags] == ["stochastic", "lossy_data"]
    assert line.unreliable


def test_every_form_names_the_same_flags():
    """Flags that follow from the table as well as those that the manifest holds."""
    made = record(
        battery(FGSM),
        "11",
        {"fgsm": ".."},
        flags=[Flag(kind="search_in_fp32", evidence="all")],
        data={"notes": "JPEG: lossy", "total": 4},
    )
    kinds = {flag.kind for flag in made.flags}
    assert {"search_in_fp32", "lossy_data", "fewer_samples"} <= kinds
    rows = list(csv.DictReader(io.StringIO(to_csv([attack_table([made])]))))
    assert all(set(row["flags"].split()) == kinds for row in rows)


def test_equal_names_are_told_apart(run):
    assert labels([run]) == ["Tiny net"]
    assert labels([run, run]) == ["Tiny net (tiny) (1)", "Tiny net (tiny) (2)"]
    other = record(battery(FGSM), "11", {"fgsm": ".."}, model={"id": "other"})
    assert labels([run, other]) == ["Tiny net (tiny)", "Tiny net (other)"]


def test_only_runs_of_one_battery_on_one_data_set_stand_side_by_side(run):
    other = record(battery(FGSM, PGD, SPSA), CLEAN, EVIDENCE, data={"digest": "00" * 32})
    assert [len(group.summary) for group in protocols([run, run, other])] == [2, 1]


def test_specifications_name_every_parameter(run):
    threat = run.manifest.battery.threat
    facts = {
        "fgsm": ("8/255", "no random start", "cross-entropy"),
        "pgd20": ("20 steps of 2/255", ", random start", "1 restart", "cross-entropy", "first success"),
        "spsa": ("100 Adam steps of 0.01", "128 ", "difference 0.01", "margin loss", "all steps", "first 6 "),
    }
    for spec in run.attacks:
        assert [fact for fact in facts[spec.id] if fact not in spec_words(spec, threat)] == []
    for found in catalog(Battery).values():
        for spec in found.card.attacks:
            text = spec_words(spec, found.card.threat)
            for name, value in spec.model_dump(exclude={"id", "name", "kind", "limit"}).items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    assert f"{value:,}" in text or f"{value:g}" in text, (name, text)


# --- published beside measured -------------------------------------------------------------------------


def cifar(protocol: Battery, row: str, clean="1" * 8 + "00", marks="xxxx....--", **more) -> Record:
    data = {"name": "cifar10", **more.pop("data", {})}
    return record(
        protocol, clean, {"pgd20": marks}, data=data, model={"id": "m", "published_row": row}, **more
    )


@pytest.fixture
def table2() -> PublishedTable:
    return find(PublishedTable, "table2").card


@pytest.fixture
def protocol2() -> Battery:
    return find(Battery, "table2").card


def test_paper_table_is_laid_out_as_printed(table2, protocol2):
    laid = paper_table(cifar(protocol2, "resnet18/cure"), table2)
    assert laid.columns == (("clean", "clean"), ("pgd20", "PGD(20)"))
    assert [(row.group, row.name) for row in laid.rows] == [(row.group, row.name) for row in table2.rows]
    cure = laid.rows[1]
    clean, attacked = cure.cells
    assert (clean.published.value, attacked.published.value) == (81.2, 36.3)
    assert clean.measurements[0].rate == Rate(8, 10)
    assert attacked.measurements[0].rate == Rate(4, 10)
    assert clean.measurements[0].difference == pytest.approx(0.80 - 0.812)
    assert attacked.measurements[0].difference == pytest.approx(0.40 - 0.363)
    assert attacked.measurements[0].same
    for row in (laid.rows[0], *laid.rows[2:]):
        assert all(not cell.measurements and cell.empty == NOT_MEASURED for cell in row.cells)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": {"name": "svhn"}}, "data set svhn instead of cifar10"),
        ({"data": {"total": 10_000}}, "10 of 10,000 test images"),
        ({"data": {"split": "train"}}, "split train, not the test set"),
        ({"flags": [Flag(kind="stochastic", evidence="x")]}, "run flagged unreliable"),
        ({"data": {"notes": "JPEG files: lossy"}}, "flag: images were compressed"),
        ({"status": "partial"}, "run is partial"),
    ],
)
def test_another_specification_is_told_with_its_reason(table2, protocol2, change, reason):
    found = cifar(protocol2, "resnet18/cure", **change)
    measurement = paper_table(found, table2).rows[1].cells[1].measurements[0]
    assert not measurement.same
    assert measurement.reasons == (reason,)


def test_quoted_numbers_are_marked_and_never_the_same(table2, protocol2):
    found = cifar(protocol2, "resnet18/pgd_at")
    cell = paper_table(found, table2).rows[2].cells[1]
    assert cell.published.kind == "quoted"
    assert "quotes this number" in cell.measurements[0].reasons[0]
    page = render_report([found], {"table2": table2})
    assert page.count('<abbr class="quoted" title="CVPR 2019') == 4


def test_another_battery_stands_beside_only_where_the_own_one_was_not_run(table2, protocol2):
    other = battery(PGD, dataset="cifar10")
    lone = paper_table(cifar(other, "resnet18/cure"), table2).rows[1].cells[1]
    (reason,) = lone.measurements[0].reasons
    assert "battery mini" in reason
    both = [cifar(other, "resnet18/cure"), cifar(protocol2, "resnet18/cure", marks="........--")]
    cell = paper_table(both, table2).rows[1].cells[1]
    assert [m.rate for m in cell.measurements] == [Rate(8, 10)]


def test_another_radius_is_another_quantity(table2, protocol2):
    small = battery({**PGD, "step_size": "1/255"}, threat={"norm": "linf", "eps": "4/255"})
    runs = [cifar(small, "resnet18/cure"), cifar(protocol2, "resnet18/normal")]
    clean, attacked = paper_table(runs, table2).rows[1].cells
    assert not attacked.measurements
    assert clean.measurements[0].rate == Rate(8, 10)


def test_batteries_of_other_tables_and_missing_attacks_leave_the_cell_empty(table2, protocol2):
    elsewhere = battery(PGD, published="table1")
    assert not paper_table(cifar(elsewhere, "resnet18/cure"), table2).rows[1].cells[0].measurements
    none = record(
        battery(FGSM), "1", {"fgsm": "."}, data={"name": "cifar10"}, model={"published_row": "resnet18/cure"}
    )
    assert paper_table(none, table2).rows[1].cells[1].empty == "the battery has no such attack"


def test_published_section_appears_only_with_its_battery(run, table2, protocol2):
    assert 'id="published"' not in render_report([run], {"table2": table2})
    page = render_report([cifar(protocol2, "resnet18/cure")], {"table2": table2})
    assert "not measured" in page
    assert "+3.7" in page


# --- wording ---------------------------------------------------------------------------------------------


def test_numbers_are_worded_precisely():
    assert percent(Rate(212, 512)) == "41.4 %"
    assert percent(Rate(0, 0)) == "n/a"
    assert [points(x) for x in (0.0123, -0.004, 0.0002, -0.0002)] == ["+1.2", "−0.4", "0.0", "0.0"]
    assert [duration(s) for s in (4.21, 200, 3725)] == ["4.2 s", "3 min 20 s", "1 h 02 min"]


# --- files -----------------------------------------------------------------------------------------------


def test_files_are_written_once_and_the_same_every_time(run, tmp_path):
    first = write_reports([run], tmp_path / "a")
    assert [path.name for path in first] == ["results.csv", "results.md", "results.tex", "report.html"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(p.name for p in first)
    second = write_reports([record(battery(FGSM, PGD, SPSA), CLEAN, EVIDENCE)], tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_no_runs_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(UsageError, match="no runs"):
        write_reports([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_csv_has_a_line_for_each_model_and_attack(run):
    lines = list(csv.DictReader(io.StringIO(to_csv([attack_table([run, hostile()])]))))
    assert len(lines) == 10
    spsa = lines[3]
    assert (spsa["attack"], spsa["count"], spsa["n"], spsa["success_count"]) == ("spsa", "5", "6", "1")
    assert float(spsa["rate"]) == 5 / 6
    assert (float(spsa["low"]), float(spsa["high"])) == pytest.approx(wilson(5, 6))
    assert lines[5]["label"] == HOSTILE
    assert {line["unreliable"] for line in lines[5:]} == {"True"}


def test_markdown_cells_survive_hostile_names(run):
    text = to_markdown(protocol_tables([run]))
    assert "| Tiny net | 80.0 [49.0, 94.3] | 60.0" in text
    assert "| SPSA (n = 6) |" in text
    lines = to_markdown(protocol_tables([hostile()])).splitlines()
    head, _, row = [line for line in lines if line.startswith("|")]
    unescaped = [line.replace("\\|", "").count("|") for line in (head, row)]
    assert unescaped == [8, 8]
    assert "<" not in "".join(lines)
    assert markdown("a\nb|c") == "a b\\|c"


def test_latex_is_escaped():
    assert latex("&_%$#{}") == r"\&\_\%\$\#\{\}"
    assert latex("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"
    text = to_latex(protocol_tables([hostile()]))
    assert HOSTILE not in text
    assert r"$^\dagger$" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    for line in body:
        assert line.replace(r"\&", "").count("&") == 5
        assert line.endswith(r"\\")


def test_terminal_table_fits_and_cannot_move_the_cursor(run):
    strong = find(Battery, "strong").card
    evidence = {spec.id: "x..." for spec in strong.attacks}
    several = [
        record(strong, "1111", evidence, model={"id": f"a_rather_long_model_name_{i}", "name": "\x1b[31m"})
        for i in range(3)
    ]
    for records in ([run], several, [hostile()], [*several, run]):
        text = terminal_table(records)
        assert max(len(line) for line in text.splitlines()) <= WIDTH
        assert "\x1b" not in text
    assert "  worst case   30.0 %  [10.8, 60.3]   n = 10" in terminal_table([run])
    assert "UNRELIABLE" in terminal_table([hostile()])


def test_terminal_says_what_flags_mean_once_and_what_to_do():
    flags = [Flag(kind="lossy_data", evidence="jpeg"), Flag(kind="stochastic", evidence="3 of 64")]
    runs = [
        record(battery(FGSM), "11", {"fgsm": "x."}, model={"id": f"m{i}", "name": f"M {i}"}) for i in range(3)
    ]
    for i, run in enumerate(runs):
        run.flags = flags[:i]
    text = terminal_table(runs)
    said = " ".join(text.split())
    about = {kind: FLAG_KINDS[kind] for kind in ("lossy_data", "stochastic")}
    assert "! m0" not in text
    assert f"! m1: {about['lossy_data'].title}\n" in text
    assert f"! m2: UNRELIABLE; {about['stochastic'].title}; {about['lossy_data'].title}\n" in text
    assert text.index("\nstochastic: ") < text.index("\nlossy_data: ")  # the worst first
    for kind, flag in about.items():
        assert said.count(f"{kind}: {flag.title} Means: {flag.means}. Next: {flag.do_next}.") == 1
    assert max(map(len, text.splitlines())) <= WIDTH


# --- the page ----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags in order, with a check that they nest."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(params=["plain", "hostile", "paper", "several"])
def page(request, run, table2, protocol2) -> Page:
    records = {
        "plain": [run],
        "hostile": [hostile(), hostile()],
        "paper": [cifar(protocol2, "resnet18/cure"), cifar(protocol2, "resnet18/pgd_at")],
        "several": [run, hostile(), record(battery(FGSM, DEEPFOOL), "11", {"fgsm": "x.", "deepfool": "xo"})],
    }[request.param]
    return Page(render_report(records, {"table2": table2}))


def test_page_is_well_formed_and_its_links_arrive(page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in page.all("a"):
        assert attrs["href"].startswith("#")
        assert attrs["href"][1:] in ids
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        if "aria-labelledby" in attrs:
            assert attrs["aria-labelledby"] in ids


def test_page_loads_nothing(page):
    assert {"script", "link", "iframe", "img", "object", "use", "base"}.isdisjoint(
        tag for tag, _ in page.tags
    )
    assert not [attrs for _, attrs in page.tags if "src" in attrs or "srcset" in attrs or "style" in attrs]
    css = Path(render_report.__code__.co_filename).parent / "templates" / "report.css"
    text = css.read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text


def test_tables_have_captions_and_scoped_heads(page):
    tables = page.all("table")
    assert tables
    assert len(page.all("caption")) == len(tables)
    assert all(attrs.get("scope") in ("row", "col", "colgroup") for attrs in page.all("th"))


def test_hostile_names_stay_text():
    text = render_report([hostile()], {})
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text
    assert "{{ 7*7 }}" in text


def test_undefined_names_are_errors_and_everything_is_escaped():
    with pytest.raises(jinja2.UndefinedError):
        templates().from_string("{{ nothing }}").render()
    assert templates().from_string("{{ x }}").render(x="<b>") == "&lt;b&gt;"


def test_every_row_of_an_unreliable_run_is_marked(run):
    run.flags = [Flag(kind="batch_dependent", evidence="4 of 64")]
    text = render_report([run], {})
    assert text.count('title="this run is flagged unreliable"') == len(attack_rows(run))
    assert 'href="#flag-batch_dependent"' in text
    assert FLAG_KINDS["batch_dependent"].do_next in text.replace("&#39;", "'")


def test_page_says_what_was_measured_on_what(run):
    text = render_report([run], {})
    for part in (
        "l∞ 8/255",
        "digits, test: all 10 images",
        "ab" * 32,
        "abc123 with uncommitted changes",
        "cure-bench evaluate --model tiny",
        "[10.8, 60.3]",
        "20 steps of 2/255, random start, 1 restart, cross-entropy, stop at first success",
    ):
        assert part in text


def test_no_page_names_a_seed_that_nothing_uses(run):
    assert "subset" not in render_report([run], {})
    older = run.manifest.model_dump(mode="json")
    older["config"]["subset_seed"] = 7  # as manifests of before have it
    assert Manifest.model_validate(older).config.subset_seed == 7
