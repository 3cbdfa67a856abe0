"""Every family of `archs/data/families/`: its map goes both ways and no two rows share a name."""

from __future__ import annotations

import re

import pytest

from loratool.archs.families import families, places
from loratool.archs.family_files import FOLDER, templates_of
from loratool.archs.family_rows import Name, Row, flatten

FAMILIES = families()
NUMBERS = ("3", "1", "2")


def names_of(family: str) -> list[tuple[Row, str, Name, str]]:
    """Every name, with numbers in the place of its holes."""
    found = []
    for row in FAMILIES[family].rows:
        holes = row.names["original"][0].template.count("{n}")
        for first in [pair[0] for pair in row.blocks] or [()]:
            numbers = (*first, *NUMBERS)[:holes]
            found += [
                (row, naming, name, row.fill(name, naming, numbers))
                for naming, names in row.names.items()
                for name in names
            ]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_stands_for_one_row_however_it_is_spelled(family: str) -> None:
    seen: dict[str, tuple[Row, int, int]] = {}
    for row, _, name, filled in names_of(family):
        place = (row, name.first, name.stop)
        key = ("tensor " if row.is_tensor else "module ") + flatten(filled)
        assert seen.setdefault(key, place) == place, filled


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_is_found_and_gives_those_of_every_naming_back(family: str) -> None:
    for row, naming, name, filled in names_of(family):
        parameter = "" if row.is_tensor else "weight"
        for spelled in (filled, flatten(filled)):
            found = [p for p in places(row.component, spelled, parameter, family) if p.row == row]
            assert len(found) == 1, spelled
            assert (found[0].first, found[0].stop) == (name.first, name.stop)
            assert filled in found[0].names(naming)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sides_of_a_row_have_the_same_numbers(family: str) -> None:
    for row in FAMILIES[family].rows:
        for like in (True, False) if row.blocks else (None,):
            some = [n for n in row.names if like in (None, n in row.like_diffusers)]
            assert len({n.template.count("{n}") for one in some for n in row.names[one]}) == 1
        for names in row.names.values():
            held = [part for name in names for part in range(name.first, name.stop)]
            assert len(set(held)) == len(held) and set(held) <= set(range(row.parts))
        assert all(
            {p for n in row.names[side] for p in range(n.first, n.stop)} == set(range(row.parts))
            for side in ("original", "diffusers")
        )
        assert row.swap in ("", "always", "2in", "axes") and set(row.split) <= {"in", "*"}


def test_what_a_family_names_is_there() -> None:
    for family in FAMILIES.values():
        assert FAMILIES[family.kin].kin == family.kin
        assert family.part in ("transformer", "unet")
        assert all(not e or FAMILIES[e].component == "te" for e in family.encoders)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_tells_a_family_is_among_its_rows(family: str) -> None:
    tells = FAMILIES[family].tells
    known = {name.template for row in FAMILIES[family].rows for name in row.names["original"]}
    for written in (*tells.get("width", ()), *tells.get("ratio", ()), *tells.get("needs", ())):
        assert set(templates_of(FAMILIES[family], written)) <= known, written
    for prefix in tells.get("depth", ()):
        start = re.sub(r"\{n\}|\d+", "#", prefix)
        filled = {re.sub(r"\d+", "#", name) for *_, name in names_of(family)}
        assert any(f"{name}.".startswith(f"{start}.") for name in filled), prefix
    for size in tells.get("sizes", {}).values():
        assert len(size.get("depth", ())) in (0, len(tells.get("depth", ())))


def test_no_two_families_claim_the_same_word_of_metadata() -> None:
    words = [word for family in FAMILIES.values() for word in family.versions]
    assert len(words) == len(set(words)) and words == [word.lower() for word in words]
    assert len(FAMILIES) == len(list(FOLDER.glob("*.json")))
