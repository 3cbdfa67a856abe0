"""rank_pattern and alpha_pattern: PEFT's matching, without its running time."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from loratool.dialects.peft import patterns as patterns_module
from loratool.dialects.peft.patterns import Patterns
from loratool.errors import BadFileError

_PART = st.sampled_from(
    ["model", "layers", "1", "10", "11", "q_proj", "proj", "a_q_proj", "proj\n", ""]
)
NAMES = st.lists(_PART, min_size=1, max_size=5).map(".".join)
_PIECE = st.sampled_from(
    ["q_proj", "proj", "layers.1", r"layers\.1", ".*", ".", r"\d+", "^model", "(q|k)_proj", "1|10",
     "[01]+", "model.", "", "$", "a?", "1", r"proj\n", "^"]
)  # fmt: skip
KEYS = st.lists(st.lists(_PIECE, min_size=1, max_size=4).map("".join), max_size=4, unique=True)


def peft_value(keys: list[str], name: str) -> int | None:
    table = {key: number for number, key in enumerate(keys)}
    return table.get(get_pattern_key(table.keys(), name))


@given(KEYS, NAMES)
def test_matches_what_peft_matches(keys: list[str], name: str) -> None:
    try:
        patterns = Patterns({k: n for n, k in enumerate(keys)}, "rank_pattern", None)
    except BadFileError:
        return
    expected = peft_value(keys, name)
    assert patterns.get(name, -1) == (-1 if expected is None else expected)


@pytest.mark.parametrize(
    ("key", "name", "hit"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("proj", "model.layers.0.q_proj", False),  # whole components only
        ("layers.1", "model.layers.1.q_proj", False),  # the end of the path
        ("layers.1.*q_proj", "model.layers.10.q_proj", True),  # a dot is any character
        ("^layers.1.q", "model.layers.1.q", False),
        ("proj", "proj\n.proj", False),  # a dot is no line break …
        ("proj", "x.proj\n", True),  # … but the end may come before one
        ("a+b", "x.a+b", False),
        ("a+b", "a+b", True),  # PEFT falls back on the literal name
    ],
)
def test_traps_of_the_matching(key: str, name: str, hit: bool) -> None:
    assert (peft_value([key], name) is not None) == hit
    assert (Patterns({key: 1}, "rank_pattern", None).get(name, 0) == 1) == hit


def test_one_pattern_per_module_takes_no_square_of_time() -> None:
    names = [f"model.layers.{n}.mlp.experts.{n}.up_proj" for n in range(4000)]
    started = time.monotonic()
    patterns = Patterns({re.escape(name): n for n, name in enumerate(names)}, "rank_pattern", None)
    assert [patterns.get(name, -1) for name in names] == list(range(4000))
    assert time.monotonic() - started < 8 and patterns.note is None


def test_first_key_in_file_order_wins() -> None:
    assert Patterns({"q": 1, "^l.0.q": 2, "0.q": 3}, "rank_pattern", None).get("l.0.q", 0) == 1
    assert Patterns({r"^l\.0\.q": 2, "q": 1}, "rank_pattern", None).get("l.0.q", 0) == 2
    assert Patterns({"a_q": 1, r"a\_q": 2}, "rank_pattern", None).get("l.a_q", 0) == 1
    assert Patterns({".*q": 1, "l.0.q": 2}, "rank_pattern", None).get("l.0.q", 0) == 1
    assert Patterns({"l.0.q": 2, ".*q": 1}, "rank_pattern", None).get("l.0.q", 0) == 2


@pytest.mark.parametrize(
    "key",
    ["(a+)+b", "(a*)*", "(a|aa)+b", "(.*a){9}b", "((a+)b?)+", "(", "x" * 513,
     "(?:a?){30}b", "[a-z]+" * 9],
)  # fmt: skip
def test_dangerous_or_broken_patterns_are_refused_at_once(key: str) -> None:
    started = time.monotonic()
    with pytest.raises(BadFileError) as caught:
        Patterns({key: 1}, "rank_pattern", Path("c.json")).get("a" * 60, 0)
    assert caught.value.code == "LT-368" and time.monotonic() - started < 1


def test_open_repeats_are_bounded_by_the_length_of_the_name() -> None:
    key = ".*layers.*q_proj"
    assert Patterns({key: 1}, "rank_pattern", None).get("model.layers.1.q_proj", 0) == 1
    with pytest.raises(BadFileError, match="too many open repeats"):
        Patterns({".*a.*b.*c": 1}, "rank_pattern", None).get("a" * 1000, 0)


@pytest.mark.parametrize(
    "key",
    [r"model\.layers\.\d+\.q", "(q_proj|k_proj|v_proj)", ".*[.]1[.].*q.*", "x" * 512,
     "(?=a)a", r"(a)\1", "(q|k)" * 100, "[" + "x" * 510 + "]"],
)  # fmt: skip
def test_useful_patterns_are_not_refused(key: str) -> None:
    Patterns({key: 1}, "rank_pattern", None).get("model.layers.1.q_proj", 0)


def test_patterns_without_effect_are_named() -> None:
    patterns = Patterns({"q": 1, "typo": 2, ".*q": 3}, "alpha_pattern", None)
    patterns.get("x.q", 0)
    assert patterns.note == "alpha_pattern without effect: .*q, typo"


def test_a_pattern_for_each_of_many_modules_takes_no_square_of_time() -> None:
    """Dots that are not escaped, as most programs write them."""
    names = [f"model.layers.{n}.mlp.experts.{n % 7}.up_proj" for n in range(4000)]
    started = time.thread_time()
    patterns = Patterns({name: n for n, name in enumerate(names)}, "rank_pattern", None)
    assert [patterns.get(name, -1) for name in names] == list(range(4000))
    assert time.thread_time() - started < 5


def test_a_table_that_takes_too_long_on_all_names_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patterns_module, "MAX_SECONDS", 0.5)
    table = {f"(a|b)*{n}": n for n in range(900)}
    table |= {f".*x{n}.*y": n for n in range(90)}
    started = time.thread_time()
    with pytest.raises(BadFileError) as caught:
        patterns = Patterns(table, "rank_pattern", Path("c.json"))
        for n in range(10**6):
            patterns.get(f"model.layers.{n}.{'xa' * 100}.q", 0)
    assert caught.value.code == "LT-368" and time.thread_time() - started < 10


def test_expressions_are_counted() -> None:
    with pytest.raises(BadFileError, match="more than 1000 keys with operators"):
        Patterns({f"a+{n}": n for n in range(1001)}, "rank_pattern", None)
