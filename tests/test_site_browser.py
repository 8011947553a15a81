"""The site in a real browser, from disk, with the network off: sorting, switches, links, pictures, print."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from made import DEEPFOOL, FGSM, battery, evidence, hostile, record
from PIL import Image

from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.protocol.cards import Battery
from robustbench_cure.protocol.catalog import find
from robustbench_cure.site import entries
from robustbench_cure.site.build import build, write
from robustbench_cure.site.runs import Runs, StudyFolder, StudyManifest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

#: The lowest contrast between a text and what is behind it, and which text that is.
CONTRAST = """() => {
    const linear = (v) => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
    const colour = (e, name) => getComputedStyle(e)[name].match(/[\\d.]+/g).map(Number);
    const skipped = "svg, option, .sr, .skip, details:not([open]) > :not(summary)";
    let worst = [99, ""];
    for (const e of document.querySelectorAll("body *")) {
        if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
        if (!e.checkVisibility() || e.closest(skipped)) continue;
        let back = e;
        while ((colour(back, "backgroundColor")[3] ?? 1) === 0) back = back.parentElement;
        const a = light(colour(e, "color")), b = light(colour(back, "backgroundColor"));
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (ratio < worst[0]) worst = [ratio, `${e.tagName} ${e.className}: ${e.textContent.slice(0, 40)}`];
    }
    return worst; }"""
PAGES = ["index.html", "models/a/index.html", "tables/table2.html"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Three models on CIFAR-10, one of them flagged and one lowered by others, a hostile one, and a curve.

    The battery of the first three stands for the reference protocol; that of the others does not.
    """
    protocol = find(Battery, "table2").card
    marks = {"a": "xxx.......", "b": "x.........", "c": "xxxxx....."}
    size = {"a": 10, "b": 2_000_000, "c": 70_000_000}
    runs = [
        record(
            protocol,
            "1111111111" * 10,
            {"pgd20": broken * 10},
            model={
                "id": name,
                "name": f"Net {name}",
                "weights_sha256": name * 64,
                "architecture": f"net_{name}",
                "parameters": size[name],
            },
            data={"name": "cifar10", "digest": "c1" * 32},
            flags=[Flag(kind="stochastic", evidence="3 of 64")] if name == "c" else [],
        )
        for name, broken in marks.items()
    ]
    runs[0].manifest.environment.gradient_rate = 100.0
    runs[0].manifest.model.published_row = "resnet18/cure"
    runs.append(record(battery(FGSM, DEEPFOOL), "111", {"fgsm": "x..", "deepfool": "xo."}, model={"id": "d"}))
    evil = hostile()
    evil.manifest.model.weights_sha256 = "ee" * 32
    runs[0].save(tmp_path_factory.mktemp("runs"))
    drawing = tmp_path_factory.mktemp("study")
    square = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30"><rect width="9" height="9"/></svg>'
    )
    (drawing / "profile.svg").write_text(square)
    Image.new("RGB", (40, 30)).save(drawing / "mean.png")
    models = {"a": {"weights_sha256": "a" * 64}}
    head = StudyManifest(verb="curvature", models=models, files=["mean.png", "profile.svg"])
    study = StudyFolder(drawing, head)
    out = tmp_path_factory.mktemp("site")
    others = evidence(runs[0], [*range(4, 100, 10), *range(5, 100, 10)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            entries, "ranking_protocol", lambda b: "reference" if b.digest == protocol.digest else ""
        )
        write(build(Runs((*runs, evil), (study,), (others,))), out)
    return out


@pytest.fixture
def visit(open_page, site):
    """Open a page of the site, which may ask for nothing outside it."""

    def start(name="index.html", **options):
        return open_page(site / name, within=site, **options)

    return start


def board(page):
    return page.locator("section[data-leaderboard=cifar10-test-linf-8-255-100-c1c1c1c1]")


def names(page) -> list[str]:
    """Models of the CIFAR-10 board as shown, measured and external ones."""
    rows = board(page).locator("tbody tr:is([data-kind=measured], [data-kind=external])")
    return [rows.nth(i).locator("th a").first.inner_text() for i in range(rows.count())]


def head(page, name: str):
    return board(page).locator("thead th", has_text=name)


def press(column, direction: str) -> None:
    """Click a head, and wait until it says how the column is sorted now."""
    column.click()
    playwright.expect(column).to_have_attribute("aria-sort", direction)


def test_heads_sort_up_and_down_and_say_so(visit):
    page = visit()
    assert names(page) == ["Net b", "Net a", "Net a", "Net c"]  # by rank, flagged ones last
    model = head(page, "Model")
    press(model, "ascending")
    assert names(page) == ["Net a", "Net a", "Net b", "Net c"]
    robust = head(page, "Robust")
    press(robust, "ascending")
    assert model.get_attribute("aria-sort") is None
    assert names(page) == ["Net a", "Net c", "Net a", "Net b"]  # 50 (external), 50 (flagged), 70, 90
    press(robust, "descending")
    assert names(page)[0] == "Net b"


def test_heads_sort_by_keyboard(visit):
    page = visit()
    button = head(page, "Model").locator("[role=button]")
    button.focus()
    page.keyboard.press("Enter")
    playwright.expect(head(page, "Model")).to_have_attribute("aria-sort", "ascending")
    assert names(page) == ["Net a", "Net a", "Net b", "Net c"]


def test_numbers_sort_as_numbers(visit):
    page = visit()
    clean = head(page, "Clean")
    press(clean, "ascending")
    texts = board(page).locator("tbody tr td:nth-child(5)").all_inner_texts()
    values = [float(t.split()[0]) for t in texts]
    assert values == sorted(values)
    assert values[-1] == 100.0  # as text it would stand before 45.0
    press(clean, "descending")
    texts = board(page).locator("tbody tr td:nth-child(5)").all_inner_texts()
    values = [float(t.split()[0]) for t in texts]
    assert values == sorted(values, reverse=True)
    assert values[0] == 100.0


def test_search_and_switches_filter_and_tell_how_many(visit):
    page = visit()
    status = page.locator("#shown")
    all_rows = page.locator("table.leaderboard tbody tr").count()
    published = board(page).locator("tr[data-kind=published]").count()
    assert published > 60
    assert status.inner_text() == f"{all_rows} of {all_rows} rows shown"
    page.fill("#find", '"Net b"')
    assert names(page) == ["Net b"]
    assert status.inner_text() == f"1 of {all_rows} rows shown"
    assert page.locator("td", has_text="No row matches.").count() > 0
    page.fill("#find", "")
    page.uncheck("input[value=published]")
    assert board(page).locator("tr[data-kind=published]").count() == 0
    page.uncheck("input[value=external]")
    assert names(page) == ["Net b", "Net a", "Net c"]
    page.check("input[value=published]")
    assert board(page).locator("tr[data-kind=published]").count() == published
    page.select_option("#which", label="cifar10, l∞ 8/255, 100 images")
    assert page.locator("section.leaderboard-box:visible").count() == 1


def test_filters_of_data_size_and_architecture(visit):
    page = visit()
    assert names(page) == ["Net b", "Net a", "Net a", "Net c"]
    page.select_option("select[data-filter=size]", label="1 to 10 million")
    assert names(page) == ["Net b"]
    assert board(page).locator("tr[data-kind=published]").count() == 0  # their sizes are not stated
    page.select_option("select[data-filter=size]", label="50 million and more")
    assert names(page) == ["Net c"]
    page.select_option("select[data-filter=architecture]", label="net_b")
    assert names(page) == []
    page.select_option("select[data-filter=size]", label="all")
    assert names(page) == ["Net b"]
    page.select_option("select[data-filter=architecture]", label="all")
    every = board(page).locator("tr[data-kind=published]").count()
    parts = []
    for label in ("none", "some", "not declared"):
        page.select_option("select[data-filter=extra]", label=label)
        parts.append(board(page).locator("tr[data-kind=published]").count())
    assert sum(parts) == every
    assert min(parts[:2]) > 0
    assert names(page) == ["Net b", "Net a", "Net a", "Net c"]  # nobody declared theirs


def test_ranks_errors_and_costs_are_shown(visit):
    page = visit()
    rows = board(page).locator("tbody tr:is([data-kind=measured], [data-kind=external])")
    cells = [rows.nth(i).locator("td").all_inner_texts() for i in range(rows.count())]
    assert [row[0].split()[0] for row in cells] == ["1", "2", "–", "–"]
    assert [row[2] for row in cells] == ["3.0", "5.0", "4.6", "5.0"]
    assert cells[1][8].split() == ["1.05", "7.50", "s,", "7", "%", "of", "the", "gradient", "rate"]
    assert cells[0][8].split() == ["1.05", "7.50", "s"]
    note = page.locator("section[data-leaderboard^=digits] .quiet").first.inner_text()
    assert note.startswith("Not ranked:")
    assert note.endswith("is not the reference protocol; evaluate with --battery reference.")


def test_without_scripts_every_row_is_there(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("#controls").is_hidden()
    assert names(page) == ["Net b", "Net a", "Net a", "Net c"]


def test_links_lead_on_and_back(visit):
    page = visit()
    board(page).locator("a", has_text="Net a").first.click()
    assert page.url.endswith("models/a/index.html")
    assert page.locator("h1").inner_text() == "Net a"
    page.locator("#published a").click()
    assert page.url.endswith("tables/table2.html")
    page.locator("a", has_text="Net a").click()
    page.locator(".eyebrow a").click()
    assert page.url.endswith("/index.html")


def test_badges_lead_to_their_paragraph(visit):
    page = visit()
    page.locator("a.badge", has_text="Output is random").first.click()
    assert page.url.endswith("#flag-stochastic")
    assert "Do next" in page.locator("#flag-stochastic").inner_text()


def test_a_curve_shows_the_number_under_the_pointer(visit):
    page = visit("models/a/index.html")
    points = page.locator("figure.curve .pt")
    text = points.nth(1).locator(".value")
    assert text.evaluate("e => getComputedStyle(e).visibility") == "hidden"
    points.nth(1).locator(".reach").hover()
    assert text.evaluate("e => getComputedStyle(e).visibility") == "visible"
    shown = text.text_content()
    assert [fact for fact in ("PGD(20)", "2 steps", "70.0 %", "60.4", "78.1") if fact not in shown] == []


def test_figures_of_a_study_are_shown(visit):
    pictures = visit("models/a/index.html").locator("#geometry img")
    sizes = pictures.evaluate_all(
        "all => all.map(e => [e.complete, e.naturalWidth, e.naturalHeight, e.width])"
    )
    png, svg = sizes
    assert png[:3] == svg[:3] == [True, 40, 30]
    assert png[3] < svg[3]  # a PNG has two pixels for one of the page


def test_rows_answer_the_pointer(visit):
    page = visit()
    cell = board(page).locator("tbody td").nth(3)
    before = cell.evaluate("e => getComputedStyle(e).backgroundColor")
    cell.hover()
    assert cell.evaluate("e => getComputedStyle(e).backgroundColor") != before


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_pages_never_scroll_sideways(visit, name, width):
    page = visit(name, viewport={"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(visit, name, scheme):
    """WCAG 2.1: contrast of at least 4.5 for text, from computed colours."""
    page = visit(name, color_scheme=scheme)
    worst = page.evaluate(CONTRAST)
    assert worst[0] >= 4.5, worst


@pytest.mark.parametrize("name", PAGES)
def test_tables_tell_rows_from_columns(visit, name):
    page = visit(name)
    for table in page.locator("table").all():
        assert table.locator("caption").count() == 1
        assert table.locator("thead th[scope=col], tbody th[scope=row]").count() > 0
    headings = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((e) => +e.tagName[1])")
    assert headings[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(headings))


@pytest.mark.parametrize("name", PAGES)
def test_pages_print(visit, name):
    page = visit(name)
    assert page.pdf()[:5] == b"%PDF-"
    page.emulate_media(media="print")
    assert page.locator("#controls").count() == 0 or page.locator("#controls").is_hidden()


def test_first_tab_stop_skips_to_the_results(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#results"
