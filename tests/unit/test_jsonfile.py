"""Strict reading and reproducible writing of JSON files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.errors import BadFileError, LoratoolError
from loratool.store.jsonfile import dump_json, load_json

QUICK = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


def refuse(file: Path, content: bytes, code: str, *words: str, **options: int) -> None:
    file.write_bytes(content)
    with pytest.raises(BadFileError) as caught:
        load_json(file, **options)
    assert caught.value.code == code, caught.value
    for word in (str(file), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "code", "word"),
    [
        (b"", "LT-342", "line 1 column 1"),
        (b"{", "LT-342", "line 1"),
        (b'{"a": 1,}', "LT-342", "line 1"),
        (b"{'a': 1}", "LT-342", "column 2"),
        (b'{"a": 1} x', "LT-342", "Extra data"),
        (b'{"a": NaN}', "LT-342", "NaN"),
        (b'{"a": -Infinity}', "LT-342", "-Infinity"),
        (b'{"a": 1e400}', "LT-342", "1e400"),
        (b'{"a": -1e999}', "LT-342", "too large"),
        (b'{"a": ' + b"1" * 5000 + b"}", "LT-342", ""),
        (b'{"a": "\x01"}', "LT-342", "control character"),
        (b"\xef\xbb\xbf{}", "LT-342", "BOM"),
        (b'{"a": "\xff"}', "LT-341", "byte 7"),
        ('{"a": 1}'.encode("utf-16"), "LT-341", "UTF-8"),
        (b'{"a": "\\ud800"}', "LT-341", "half a pair"),
        (b'{"\\udc00": 1}', "LT-341", "half a pair"),
        (b'{"r": 8, "r": 16}', "LT-343", "key r"),
        (b'{"x": [{"r": 8, "r": 8}]}', "LT-343", "key r"),
        (b'{"\\ud800": 1, "\\ud800": 2}', "LT-343", "\\ud800"),
        (b"[1]", "LT-345", "list"),
        (b"null", "LT-345", "NoneType"),
        (b'"x"', "LT-345", "str"),
        (b"<!DOCTYPE html>", "LT-342", "line 1"),
    ],
)
def test_refused(file: Path, content: bytes, code: str, word: str) -> None:
    refuse(file, content, code, word)


def test_depth(file: Path) -> None:
    deep = b'{"a":' * 63 + b"[1]" + b"}" * 63
    file.write_bytes(deep)
    assert load_json(file)
    refuse(file, b'{"a":' + deep + b"}", "LT-344", "64 levels")
    refuse(file, b"[" * 100_000, "LT-344")
    refuse(file, b'{"a":' + b"[" * 100_000, "LT-344")


def test_brackets_in_strings_are_not_depth(file: Path) -> None:
    value = {"template": "{% if [[[ %}" * 100 + '\\"{{{', "b": ['\\\\"[']}
    file.write_text(json.dumps(value))
    assert load_json(file) == value


def test_wide_is_not_deep(file: Path) -> None:
    value = {"merges": [["a", "b"]] * 1000}
    file.write_text(json.dumps(value))
    assert load_json(file) == value


def test_size(file: Path) -> None:
    file.write_bytes(b"{}" + b" " * 98)
    assert load_json(file, max_bytes=100) == {}
    refuse(file, b"{}" + b" " * 99, "LT-340", "100 bytes", max_bytes=100)


def test_missing_and_special(file: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match="no such file"):
        load_json(file)
    if hasattr(os, "mkfifo"):
        os.mkfifo(file)
        with pytest.raises(LoratoolError) as caught:
            load_json(file)
        assert (caught.value.code, caught.value.exit_code) == ("LT-901", 9)


@QUICK
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), values))
def test_round_trip(tmp_path: Path, value: dict[str, object]) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(dump_json(value))
    loaded = load_json(path)
    assert loaded == value
    assert list(loaded) == list(value)
    assert dump_json(loaded) == path.read_bytes()


@QUICK
@given(st.binary(max_size=60), st.booleans())
def test_any_bytes(tmp_path: Path, content: bytes, wrap: bool) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a":' + content + b"}" if wrap else content)
    try:
        assert isinstance(load_json(path), dict)
    except BadFileError as error:
        assert error.code.startswith("LT-34")


def test_dump_is_what_people_expect() -> None:
    assert dump_json({"b": [1], "a": {"é": None}}) == (
        b'{\n  "b": [\n    1\n  ],\n  "a": {\n    "\\u00e9": null\n  }\n}\n'
    )
    with pytest.raises(ValueError, match="JSON compliant"):
        dump_json({"a": float("nan")})
