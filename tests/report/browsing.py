"""A real browser for pages of the report: opened, waited for, and asked what its tables hold.

Tests are skipped where there is no Chromium, unless FILLM_REQUIRE_BROWSER=1, with which that is a failure.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REQUIRED = os.environ.get("FILLM_REQUIRE_BROWSER") == "1"
NEEDS_BROWSER = pytest.mark.skipif(
    CHROMIUM is None and not REQUIRED, reason="no chromium, chromium-browser or google-chrome on PATH"
)


@contextmanager
def opened(browser, address, script: str = "", width: int = 1280, expected: int = 0, **how) -> Iterator:
    """A page that is ready, in a context of its own; at the end, nothing may have gone wrong but what is `expected`."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **how)
    page, wrong = context.new_page(), []
    page.set_default_timeout(30_000)
    page.on("console", lambda message: wrong.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda request: wrong.append(f"request: {request.url[:200]}") if not own(request.url) else None)
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url[:200]}"))
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    if script:
        page.add_init_script(script)

    def own(url: str) -> bool:
        return url == address or url.startswith(("data:", "blob:"))

    page.goto(address)
    if how.get("java_script_enabled", True):
        page.wait_for_selector("html[data-ready]", state="attached")
    yield page
    context.close()
    assert len(wrong) == expected, wrong


def until(page, expression):
    """Waits for an expression to become true; playwright's own way is an eval, which the page's policy forbids."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


def column(page, table, name):
    """Exact values of the rows that are shown."""
    script = """(holder, name) => {
      const at = [...holder.querySelectorAll('th')].findIndex((head) => head.dataset.name === name);
      return [...holder.querySelectorAll('tbody tr')].filter((row) => !row.hidden)
        .map((row) => row.cells[at].dataset.v ?? row.cells[at].textContent);
    }"""
    return page.locator(table).evaluate(script, name)
