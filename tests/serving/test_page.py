"""The page at `/`, in a real browser against a real service; skipped where there is no Chromium."""

import shutil
import time

import browsers
import pytest
from services import encoded, start

pytestmark = [pytest.mark.slow, browsers.needed]
CLASSES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def service(indexed):
    with start(indexed / "models/encoder.onnx", cwd=indexed) as service:
        yield service


@pytest.fixture
def visit(browser):
    """`visit(url, **options)` opens the page and returns it; `page.log` is what went to its console, errors first."""
    contexts = []

    def visit(url, state="ready", **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.log, page.asked = [], []
        page.on("console", lambda message: page.log.append(message.text))
        page.on("pageerror", lambda error: page.log.append(f"uncaught: {error}"))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(url)
        wait(page, state)
        return page

    yield visit
    for context in contexts:
        context.close()


def wait(page, state="done"):
    page.wait_for_selector(f"main[data-state={state}]", state="attached")


def until(page, expression):
    """Wait until JavaScript is true; Playwright's own way needs eval, which the page forbids."""
    end = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def width_to_scroll(page):
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    import numpy as np

    from barlow.data import synthetic

    path = tmp_path_factory.mktemp("pictures") / "mine.jpg"
    pixels = synthetic.surface(next(iter(synthetic.FAMILIES)), 40, np.random.default_rng(0))
    path.write_bytes(encoded(pixels, "JPEG"))
    return path


def test_an_upload_shows_class_neighbours_place_and_latency(service, visit, picture):
    import httpx

    page = visit(service.url)
    assert page.log == []
    assert all(url.startswith((service.url, "data:", "blob:")) for url in page.asked)
    page.set_input_files("#file", picture)
    wait(page)
    with picture.open("rb") as file:
        wanted = httpx.post(f"{service.url}/v1/classify", files={"files": file}).json()["results"][0]
    with picture.open("rb") as file:
        near = httpx.post(f"{service.url}/v1/search?k=12", files={"files": file}).json()["results"][0]["neighbours"]
    assert page.text_content("#class").strip() == wanted["class"]
    assert f"{100 * wanted['probability']:.1f}" in page.text_content("#probability").replace(",", ".")
    assert page.locator("#probabilities li").count() == len(CLASSES)
    shown = page.locator("#neighbours li").evaluate_all("list => list.map(item => +item.dataset.id)")
    assert shown == [neighbour["id"] for neighbour in near]
    until(page, "[...document.querySelectorAll('#neighbours img')].every(image => image.naturalWidth > 0)")
    assert page.locator("#query").is_visible()
    assert page.locator("#points path").count() >= len(CLASSES)
    assert "infer" in page.text_content("#latency")
    assert page.log == []


def test_samples_by_keyboard_alone(service, visit):
    page = visit(service.url, reduced_motion="reduce")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#samples') !== null")
    page.keyboard.press("Enter")
    wait(page)
    assert page.text_content("#class").strip() in CLASSES
    assert page.get_attribute("#status", "aria-live") == "polite"
    assert page.log == []


def test_a_bad_file_is_told_and_the_page_lives_on(service, visit, picture, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    page = visit(service.url)
    page.set_input_files("#file", tmp_path / "notes.txt")
    wait(page, "error")
    assert "not an image" in page.text_content("#error")
    assert not page.locator("#result").is_visible()
    assert not [line for line in page.log if "uncaught" in line]
    page.set_input_files("#file", picture)
    wait(page)
    assert not page.locator("#error").is_visible()


def test_a_bad_file_among_good_ones(service, visit, picture, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    page = visit(service.url)
    page.set_input_files("#file", [picture, tmp_path / "notes.txt"])
    wait(page)
    assert page.locator("#strip button").count() == 2
    page.click("#strip button >> nth=1")
    assert "not an image" in page.text_content("#class-note")
    assert page.log == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone_in_light_and_dark(service, visit, picture, scheme):
    page = visit(service.url, viewport={"width": 390, "height": 844}, color_scheme=scheme, is_mobile=True)
    assert width_to_scroll(page) <= 0
    page.set_input_files("#file", picture)
    wait(page)
    assert width_to_scroll(page) <= 0
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(part => part < 60)")
    assert dark == (scheme == "dark")


def test_without_an_index_nothing_is_asked_in_vain(indexed, visit, picture, tmp_path):
    shutil.copy(indexed / "models/encoder.onnx", tmp_path / "encoder.onnx")
    with start(tmp_path / "encoder.onnx") as service:
        page = visit(service.url)
        assert page.log == []
        page.set_input_files("#file", picture)
        wait(page)
        assert page.text_content("#class").strip() in CLASSES
        assert page.locator("#neighbours-note").is_visible()
        assert page.log == []


def test_a_token_is_asked_for_and_kept(indexed, visit, picture):
    with start(indexed / "models/encoder.onnx", cwd=indexed, env={"BARLOW_TOKEN": "secret"}) as service:
        page = visit(service.url, state="error")
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#error').textContent.includes('accept')")
        page.fill("#token", "secret")
        page.keyboard.press("Enter")
        wait(page, "ready")
        page.set_input_files("#file", picture)
        wait(page)
        until(page, "[...document.querySelectorAll('#neighbours img')].every(image => image.naturalWidth > 0)")
        page.log.clear()
        page.reload()
        wait(page, "ready")
        assert page.log == []


def test_the_description_needs_no_other_host(service, visit):
    from playwright.sync_api import expect

    page = visit(service.url)
    page.goto(f"{service.url}/docs")
    expect(page.locator(".opblock").first).to_be_visible()
    assert all(url.startswith((service.url, "data:", "blob:")) for url in page.asked)
    assert page.log == []
