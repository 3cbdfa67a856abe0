"""Every trap of image adapters that we know of, and the test that shows it: none may get lost.

The sections are those of our notes on the dialects; a trap of a loader is a rule of
`loratool.dialects.programs`, which has a failing and a passing file of its own.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.unit.programs_samples import SAMPLES

TESTS = Path(__file__).parents[1]
TABLE = (Path(__file__).with_name("traps.txt")).read_text()
ROWS = [tuple(part.strip() for part in line.split(" | "))
        for line in TABLE.splitlines() if line and line[0] != "#"]  # fmt: skip
SECTIONS = (
    "0", "1", "2.1", "2.2", "2.3", "2.4", "2.5", "2.6", "3.1", "3.2", "3.3", "3.4", "3.5", "3.6",
    "3.7", "4.1", "4.2", "4.3", "4.4", "4.5", "4.6", "4.7", "5", "6.1", "6.2", "6.3", "7", "8",
    "13", "14.1", "14.2", "14.3", "14.4", "15", "16", "17.1", "17.2", "17.3", "17.4", "20",
)  # fmt: skip
RULES = {(one.program, one.rule) for one in SAMPLES}


@cache
def names_in(path: str) -> frozenset[str]:
    """Names of the tests in a file."""
    tree = ast.parse((TESTS / path).read_text())
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_trap_is_shown_by_a_test(section: str) -> None:
    rows = [row for row in ROWS if row[0] == section]
    assert rows
    for _, trap, shown in rows:
        for one in shown.split():
            path, _, name = one.partition("::")
            if name:
                assert name in names_in(f"{path}.py"), (trap, one)
            else:
                assert tuple(one.split(":")) in RULES, (trap, one)


def test_every_row_is_of_a_section_and_every_sample_has_one() -> None:
    assert {row[0] for row in ROWS} == set(SECTIONS)
    samples = [row[1] for row in ROWS if row[0] == "20"]
    assert [int(re.match(r"\d+", text)[0]) for text in samples] == [*range(1, 13)]  # type: ignore[index]
    assert len({row[:2] for row in ROWS}) == len(ROWS)
