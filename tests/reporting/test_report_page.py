"""The report of a whole pipeline, in a real browser; skipped where there is no Chromium."""

import browsers
import pytest
from test_report import SECTIONS, Page, accuracies

from barlow.core import files

pytestmark = [pytest.mark.slow, browsers.needed]
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@pytest.fixture
def visit(browser, reproduced):
    """`visit(**options)` opens the report and returns the page; `page.log` is what went wrong."""
    contexts = []

    def visit(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.log = []
        page.on("console", lambda message: page.log.append(message.text))
        page.on("pageerror", lambda error: page.log.append(f"uncaught: {error}"))
        page.on("requestfailed", lambda request: page.log.append(f"failed: {request.url[:80]}"))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or page.log.append(request.url))
        page.goto((reproduced / files.REPORT).as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()


def test_it_is_small_loads_at_once_and_every_section_has_content(visit, reproduced):
    assert (reproduced / files.REPORT).stat().st_size < 5_000_000
    page = visit()
    milliseconds = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < milliseconds < 2000
    sections = page.locator("main > section")
    assert sections.evaluate_all("all => all.map(one => one.id)") == SECTIONS
    for section in sections.all():
        assert len(section.inner_text().split()) > 15
        assert section.bounding_box()["height"] > 100
        assert "Nothing to show" not in section.inner_text()
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.log == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(visit, scheme):
    page = visit(color_scheme=scheme, **PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # innerWidth would grow with it
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(part => part < 60)")
    assert dark == (scheme == "dark")
    assert page.log == []


TILE = """point => {
    const {content, backgroundImage, backgroundPosition, width, height} = getComputedStyle(point, "::before");
    const name = getComputedStyle(point, "::after").content;
    return {shown: content !== "none", backgroundImage, backgroundPosition, width, height, name};
}"""


def test_a_point_of_the_map_shows_its_image(visit):
    page = visit()
    points = page.locator(".map input")
    assert points.count() == 120
    point = points.nth(57)
    assert not point.evaluate(TILE)["shown"]
    point.hover(force=True)
    over = page.evaluate("[...document.querySelectorAll('.map input')].findIndex(one => one.matches(':hover'))")
    point = points.nth(over)  # of points at one place, the upper
    tile = point.evaluate(TILE)
    assert tile["shown"]
    assert tile["backgroundImage"].startswith('url("data:image/jpeg')
    column, row = (int(point.evaluate(f"one => one.style.getPropertyValue('{name}')")) for name in ("--i", "--j"))
    assert tile["backgroundPosition"] == f"{-96 * column}px {-96 * row}px"
    assert (tile["width"], tile["height"]) == ("96px", "96px")
    assert tile["name"] == f'"{point.get_attribute("aria-label")}"'
    assert page.log == []


def test_the_map_can_be_walked_by_keyboard_and_tapped(visit):
    page = visit()
    page.locator(".map input").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement === document.querySelectorAll('.map input')[1]")
    assert page.locator(".map input").nth(1).evaluate(TILE)["shown"]
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.closest('.map')")
    phone = visit(**PHONE)
    phone.locator(".map input").nth(30).tap(force=True)
    shown = phone.locator(".map input").evaluate_all(f"all => all.filter(one => ({TILE})(one).shown).length")
    assert shown == 1
    assert phone.log == []


def test_its_figures_are_those_of_the_same_run(reproduced):
    page = Page((reproduced / files.REPORT).read_text(encoding="utf-8"))
    metrics = accuracies(reproduced)
    assert {key for _, key, _ in page.figures} == {*metrics}
    for _, key, shown in page.figures:
        assert shown == round(metrics[key], 1), key
