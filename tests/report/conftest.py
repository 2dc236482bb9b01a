"""Fixtures of the tests that open the page in a browser.

They need Chromium. Without it they are skipped, or fail if the environment variable CI is set.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from flows import Flow
from playwright.sync_api import Browser, sync_playwright
from reading import Reader

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        problem = f"no browser: none of {', '.join(_BROWSERS)} is installed"
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def moved(made: Flow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the tiny scenes, in another folder than it was made in."""
    folder = tmp_path_factory.mktemp("moved") / "a page, moved #1"
    return Path(shutil.copytree(made / "reports/tiny", folder))


@pytest.fixture
def reader(browser: Browser, moved: Path) -> Iterator[Reader]:
    """A reader of the page of the tiny scenes."""
    one = Reader(browser, moved, viewport={"width": 1280, "height": 900})
    yield one
    one.close()
