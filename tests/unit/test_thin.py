"""The mark `thin` of these tests: what of a product is quick."""

from __future__ import annotations

import pytest


@pytest.mark.thin(2)
@pytest.mark.parametrize("one", "abcd")
@pytest.mark.parametrize(("two", "three"), [(0, "x"), pytest.param(1, "y"), (2, "z")])
def test_every_second_diagonal_is_quick(
    one: str, two: int, three: str, request: pytest.FixtureRequest
) -> None:
    """So that every value stays; each of these tests fails where the mark goes by other counts."""
    is_quick = ("abcd".index(one) + two) % 2 == 0
    assert ("slow" not in request.node.keywords) is is_quick and three == "xyz"[two]
