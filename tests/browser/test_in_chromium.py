"""Pages in a real browser: Debian's chromium, playwright and axe-playwright-python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from tests.browser.chromium import IS_HERE, SCHEMES, WIDTHS, browser, looking, overflow, view
from tests.browser.chromium import violations as found_by_axe
from tests.browser.scene import make_collection

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not IS_HERE, reason="no Chromium here")]
NAMES = ("gallery", "inspect", "compare", "many", "merge", "combine", "extract", "compress")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind."""
    folder = tmp_path_factory.mktemp("pages")
    toy = folder / "toy"
    lt.demo(toy)
    make_collection(folder / "loras", 40)
    style, sql, base = (str(toy / name) for name in ("style", "sql", "base"))
    found = {name: folder / f"{name}.html" for name in NAMES}
    lt.inspect(folder / "loras", html=found["gallery"])
    lt.inspect(style, spectrum=True, base=base, risk=True, html=found["inspect"])
    lt.compare([style, sql], html=found["compare"])
    lt.compare([style, sql, style], html=found["many"])
    lt.merge([style, sql], base=base, output=folder / "m", html=found["merge"])
    lt.merge([style, sql], output=folder / "c", html=found["combine"])
    lt.extract(toy / "tuned", base=base, output=folder / "x", html=found["extract"])
    lt.compress(style, rank=2, output=folder / "s", html=found["compress"])
    return found


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_in_order(
    chrome: Any, pages: dict[str, Path], name: str, scheme: str, width: int
) -> None:
    with looking(chrome, pages[name], viewport=view(width), color_scheme=scheme) as (page, trouble):
        assert page.title().endswith(("loratool inspect", "loratool compare", "loratool merge",
                                      "loratool extract", "loratool compress"))  # fmt: skip
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert found_by_axe(page) == []
        assert overflow(page) <= 0
        assert trouble == []


def test_the_gallery_is_searched_by_keyboard(chrome: Any, pages: dict[str, Path]) -> None:
    with looking(chrome, pages["gallery"], viewport=view(1440)) as (page, trouble):
        page.keyboard.press("Tab")
        page.keyboard.type("<script>")
        assert page.locator(".count").inner_text() == "1 of 41 files"
        assert page.locator(".card:visible h3").inner_text() == "<script>alert(1)<!--.safetensors"
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.press("Delete")
        page.keyboard.press("Tab")
        page.keyboard.type("FLUX")
        shown = page.locator(".card:visible").count()
        assert 0 < shown < 41
        assert page.locator(".card:visible .badges").filter(has_text="FLUX").count() == shown
        assert trouble == []


def test_tables_are_sorted_and_maps_read_by_keyboard(chrome: Any, pages: dict[str, Path]) -> None:
    with looking(chrome, pages["inspect"], viewport=view(1440)) as (page, trouble):
        table = page.locator("table.data", has=page.locator("caption", has_text="By module")).first
        table.get_by_role("button", name="‖ΔW‖").press("Enter")
        read = [float(t) for t in table.locator("tbody tr td:nth-child(3)").all_inner_texts()]
        assert read == sorted(read, reverse=True) and len(read) > 5
        assert table.locator("th[aria-sort=descending]").count() == 1
        table.get_by_role("button", name="‖ΔW‖").press("Enter")
        assert table.locator("th[aria-sort=ascending]").count() == 1
        figure = page.locator("figure.map").first
        figure.locator(".scroll").press("ArrowRight")
        figure.locator(".scroll").press("ArrowRight")
        assert figure.locator("td.at").count() == 1
        assert figure.locator("td.at").text_content().strip() in figure.locator(
            ".read").inner_text()  # fmt: skip
        assert trouble == []


def test_it_is_read_without_scripts(chrome: Any, pages: dict[str, Path]) -> None:
    settings = {"viewport": view(390), "java_script_enabled": False}
    with looking(chrome, pages["gallery"], **settings) as (page, _):
        assert page.locator(".card").count() == 41
        assert not page.locator(".controls").is_visible()
        assert page.get_by_text("<script>alert(1)<!--.safetensors").first.is_visible()
