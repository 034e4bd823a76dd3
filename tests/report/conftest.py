"""What tests of the page share."""

import pytest

from tests.report.browsing import CHROMIUM


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "FILLM_REQUIRE_BROWSER=1, but no chromium, chromium-browser or google-chrome on PATH"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()
