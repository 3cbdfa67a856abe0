"""The pictures of the terminal are what the commands print now (`make screens` draws them anew)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.make import screens
from docs.make.__main__ import REMOTE

README = (Path(__file__).parents[2] / "README.md").read_text()


def assert_alike(was: list[str], now: list[str], what: str) -> None:
    """The same words; numbers may differ a little: not all processors round alike."""
    number = re.compile(r"\d[\d,]*\.?\d*")
    a, b = "\n".join(was), "\n".join(now)
    assert number.sub("#", a) == number.sub("#", b), what
    for one, other in zip(number.findall(a), number.findall(b), strict=True):
        values = [float(text.replace(",", "")) for text in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=0.02), f"{what}: {one}, {other}"


def test_every_picture_says_what_is_printed() -> None:
    with screens.stage():
        for name in screens.SCREENS:
            picture = (screens.FOLDER / f"{name}.svg").read_text()
            now = screens.drawn(screens.screen(name), f"loratool {name}")
            assert_alike(screens.words(picture), screens.words(now), f"{name}: make screens")
            assert REMOTE.search(picture) is None, "a picture asks no other host for anything"


def test_every_picture_is_shown_and_described() -> None:
    shown = dict(re.findall(r"!\[([^]]+)\]\(docs/img/(\w+)\.svg\)", README))
    assert sorted(shown.values()) == sorted(screens.SCREENS)
    assert all(len(words) > 20 for words in shown)
