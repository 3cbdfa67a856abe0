"""Chromium, and what it has to say about a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
NEEDED = ("playwright", "axe_playwright_python")
IS_HERE = PROGRAM is not None and all(find_spec(name) for name in NEEDED)
WIDTHS, SCHEMES = (390, 1440), ("light", "dark")


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        try:
            yield made
        finally:
            made.close()


@contextmanager
def looking(at: Any, file: Path, **settings: Any) -> Iterator[tuple[Any, list[str]]]:
    """A page that is open, and the list of what went wrong: messages, errors, dialogs, requests."""
    trouble: list[str] = []
    page = at.new_page(**settings)
    page.set_default_timeout(20_000)
    page.on("console", lambda said: trouble.append(f"console: {said.text}"))
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("dialog", lambda box: trouble.append(f"dialog: {box.message}"))
    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or trouble.append(r.url))
    page.goto(file.as_uri())
    try:
        yield page, trouble
    finally:
        page.close()


def view(width: int, height: int = 1000) -> dict[str, int]:
    """A window's size."""
    return {"width": width, "height": height}


def violations(page: Any) -> list[str]:
    """What axe-core finds; the page's own policy keeps it out, the debugger does not."""
    import axe_playwright_python

    script = Path(axe_playwright_python.__file__).parent / "axe.min.js"
    page.evaluate(script.read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found["violations"]]


def overflow(page: Any) -> int:
    """Pixels by which the page is wider than its window."""
    return int(page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    ))  # fmt: skip
