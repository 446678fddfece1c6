"""A real browser: Debian's Chromium, driven by Playwright. Pictures of what it shows lie in the folder that
NIGHTLY_PICTURES names, or beside the test's other files."""

import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.conftest import require

WIDTH, HEIGHT = 1280, 800
COLOURS = 128  # enough for a page, and a fifth of the bytes
PATIENCE_MS = 20_000
REST_MS, MOST_LOOKS = 300, 20


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        require("Chromium is not installed (Debian: chromium)")
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE_MS)
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def open_page(browser: Browser) -> Iterator[Page]:
    """A window of its own, without cookies."""
    opened = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    opened.set_default_timeout(PATIENCE_MS)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with open_page(browser) as opened:
        yield opened


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Page, str], None]:
    """Keep what a page shows, once it has come to rest, as a small PNG of that name."""
    place = os.environ.get("NIGHTLY_PICTURES")
    folder = Path(place) if place else tmp_path_factory.mktemp("pictures")

    def take(page: Page, name: str) -> None:
        seen = page.screenshot()
        for _ in range(MOST_LOOKS):  # of what never rests the last one does
            page.wait_for_timeout(REST_MS)
            before, seen = seen, page.screenshot()
            if seen == before:
                break
        shown = Image.open(io.BytesIO(seen))
        shown.convert("RGB").quantize(COLOURS).save(folder / f"{name}.png", optimize=True)

    return take
