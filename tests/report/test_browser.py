"""The page in a real browser: it draws, loads nothing, fits a phone and can be used by all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (uv sync --group dev)"
)
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"
)
SIZES = {"desk": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield found
        found.close()


def opened(browser: Any, path: Path, size: str) -> tuple[Any, list[str], list[str]]:
    """A page with what its console said and what it asked for; plots are drawn."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    if path.name == "index.html":
        page.wait_for_selector("html[data-drawn]", timeout=20_000, state="attached")
    return page, said, asked


def violations(page: Any) -> list[str]:
    """What axe-core holds to be serious or critical, with the first element each."""
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{v['id']} ({v['impact']}): {v['nodes'][0]['html'][:200]}"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["binary", "segmentation", "withheld"])
def test_a_report_draws_fits_and_asks_for_nothing(reports, browser, name, size):
    path = reports[name] / "report" / "index.html"
    page, said, asked = opened(browser, path, size)
    try:
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        places = page.locator("[data-plot]").count()
        marks = page.evaluate(
            "[...document.querySelectorAll('[data-plot]')].map(place => "
            "place.querySelectorAll('svg [role=graphics-symbol], svg .mark-symbol path').length)"
        )
        assert len(marks) == places == len(list((path.parent / "plots").glob("*.svg")))
        assert all(marks), marks
        width = SIZES[size][0]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for details in page.locator("details").all():
            details.evaluate("element => { element.open = true; }")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert violations(page) == []
    finally:
        page.close()


def test_the_notice_fits_and_is_accessible(reports, browser):
    path = reports["binary"] / "report" / "notice.html"
    page, said, asked = opened(browser, path, "phone")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert violations(page) == []
    page.close()


def test_without_scripts_the_images_stay(reports, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((reports["binary"] / "report" / "index.html").as_uri())
    images = page.locator("img.still")
    assert images.count() > 5
    assert all(image.is_visible() for image in images.all())
    context.close()


def test_paper_gets_the_images_and_the_folded_tables(reports, browser):
    page, _, _ = opened(browser, reports["binary"] / "report" / "index.html", "desk")
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert all(image.is_visible() for image in page.locator("img.still").all())
    assert not any(place.is_visible() for place in page.locator("[data-plot]").all())
    assert page.get_by_text("Reliability of lesion, with the temperature applied").is_visible()
    assert not page.locator("nav").is_visible()
    page.close()


def test_keys_reach_the_report_past_the_contents(reports, browser):
    page, _, _ = opened(browser, reports["binary"] / "report" / "index.html", "desk")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.close()


def test_faults_are_noticed(reports, browser, tmp_path):
    """A page with planted faults fails each of the checks above."""
    html = (reports["binary"] / "report" / "index.html").read_text()
    html = html.replace("</h1>", '</h1><img src="https://example.org/x.png"><p style="width:900px;'
                        'color:#ccc;background:#fff">pale and wide</p>', 1)  # fmt: skip
    before, _, after = html.rpartition("</script>")
    html = f"{before};</script>{after}"  # no longer the script that the policy allows
    path = tmp_path / "faulty.html"
    path.write_text(html)
    page, said, _ = opened(browser, path, "phone")
    assert any("Content Security Policy" in text for text in said)
    assert page.locator("[data-plot] svg").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") > 390
    found = " ".join(violations(page))
    assert "image-alt" in found
    assert "color-contrast" in found
    page.close()
