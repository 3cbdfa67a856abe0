"""Every row of the bad-input table that is ours has a test with its number."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
# 63 and 67-83 are about outputs and crashes, 65-66 about quantised bases, 85-98 about the Hub.
ROWS = {*range(1, 65), 84, 99, 100} - {63}


def numbers() -> Iterator[int]:
    """Row numbers at the front of the identifiers of the parametrised tests."""
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                text = node.values[0].value
            if isinstance(text, str) and (found := re.match(r"(\d{2,3})(-|$)", text)):
                yield int(found[1])
                for more in re.findall(r"(?<=-)\d{2}(?=-)", text):  # "25-26-R8" is for two rows
                    yield int(more)


def test_every_row_has_a_test() -> None:
    assert sorted(ROWS - set(numbers())) == []
