"""What docs/architecture.md names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PATH = re.compile(r"`([\w./*-]+/|[\w./*-]+\.(?:py|json))`")


def test_every_path_exists() -> None:
    """A bare name lies in the folder of the path before it, or beside the package's modules."""
    named, folder = PATH.findall(PAGE.read_text()), ROOT
    assert len(named) > 100
    for name in named:
        found = [p for top in (ROOT, ROOT / "loratool", folder) for p in top.glob(name)]
        assert found, f"{name} is not there"
        if "/" in name:
            folder = found[0] if found[0].is_dir() else found[0].parent


def test_it_is_two_pages() -> None:
    assert len(PAGE.read_text().splitlines()) <= 170
