"""The report in a real browser, from disk, with the network off."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from made import CLEAN, DEEPFOOL, FGSM, battery, hostile, record

from robustbench_cure.evaluation.flags import Flag
from robustbench_cure.protocol.cards import Battery, PublishedTable
from robustbench_cure.protocol.catalog import find
from robustbench_cure.report.render import write_reports


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A page with all there is: several models, a paper table, flags, hostile names, a minimal attack."""
    strong = find(Battery, "strong").card
    marks = {spec.id: "xx......--" for spec in strong.attacks}
    flags = [Flag(kind="stochastic", evidence="3 of 64 images"), Flag(kind="lossy_data", evidence="all")]
    records = [
        record(strong, CLEAN, marks, model={"name": f"Model {i}"}, flags=flags[: i % 3]) for i in range(4)
    ]
    protocol = find(Battery, "table1").card
    paper = {spec.id: "xx......--" for spec in protocol.attacks}
    model = {"name": "ResNet-18", "published_row": "resnet18/normal"}
    records.append(record(protocol, CLEAN, paper, model=model, data={"name": "cifar10"}))
    mixed = battery(FGSM, DEEPFOOL)
    records.append(record(mixed, "11", {"fgsm": "x.", "deepfool": "xo"}))
    records.append(hostile())
    table = find(PublishedTable, "table1").card
    return write_reports(records, tmp_path_factory.mktemp("report"), {"table1": table})[-1]


@pytest.fixture(params=["light", "dark"])
def scheme(request) -> str:
    return request.param


@pytest.fixture
def visit(open_page, report):
    """Open the report, which may ask for nothing but itself."""
    return partial(open_page, report, within=report)


def luminance(page, prop: str) -> float:
    """Mean channel of a computed colour of the body, 0 to 255."""
    text = page.evaluate(f"getComputedStyle(document.body).{prop}")
    channels = [float(part) for part in text[text.index("(") + 1 : -1].split(",")[:3]]
    return sum(channels) / 3


def test_page_opens_in_both_schemes(visit, scheme):
    page = visit(color_scheme=scheme)
    paper, ink = luminance(page, "backgroundColor"), luminance(page, "color")
    assert (paper > ink + 150) if scheme == "light" else (ink > paper + 150)
    heads = page.locator("table.attacks").first.locator("thead th").all_inner_texts()
    assert {"Attack", "Accuracy, %", "Success, %", "Only this attack", "Violations"} <= set(heads)
    assert page.locator("figure.plot svg.dot").first.bounding_box()["width"] > 4


def test_flag_badges_lead_to_their_paragraph(visit):
    page = visit()
    page.locator("a.badge", has_text="Output is random").first.click()
    assert page.url.endswith("#flag-stochastic")
    target = page.locator("#flag-stochastic")
    assert "Do next" in target.inner_text()
    box = target.bounding_box()
    assert 0 <= box["y"] < page.viewport_size["height"]


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_page_never_scrolls_sideways(visit, width):
    page = visit(viewport={"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_wide_tables_scroll_in_their_own_box_by_keyboard(visit):
    page = visit(viewport={"width": 390, "height": 844})
    box = page.locator(".scroll:has(table.attacks)").first
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")
    box.focus()
    page.keyboard.press("ArrowRight")
    # Not wait_for_function: the page's own security policy forbids evaluating strings in it.
    for _ in range(100):
        if box.evaluate("e => e.scrollLeft") > 0:
            return
        page.wait_for_timeout(20)
    pytest.fail("the table did not scroll")


def test_first_tab_stop_skips_to_the_results(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#results"


def test_page_prints(visit):
    assert visit().pdf()[:5] == b"%PDF-"
