"""Rows 1-19 and 22-30 of the bad-input table: files that are damaged, or something else.

Each is met three ways: as the adapter of a merge, as its base, and by inspect.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.world import World, base_tensors, craft, save, values

A = "model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Row:
    """A file that must be refused, and the words of the refusal."""

    id: str
    make: Callable[[Path], object]
    code: str
    key: str | None = None
    expected: str | None = None
    got: str | None = None
    what: str | None = None
    hint: str | None = None


def entry(begin: Any, end: Any, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {
        "dtype": dtype, "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }  # fmt: skip


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def head(header: object, data: bytes = b"") -> Callable[[Path], object]:
    return lambda path: craft(path, header, data)


def cut(count: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        save(path, {"first": values(40, 30), A: values(50, 30)})
        path.write_bytes(path.read_bytes()[:-count])

    return make


def sparse(length: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", length) + b"{")
            file.truncate(200_000_000)

    return make


def zipped(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, b"\x80\x02." + b"\0" * 100)
    return out.getvalue()


DUPLICATE = b'{"w":%b,"w":%b}'
ONE, TWO = (json.dumps(entry(*e)).encode() for e in ((0, 4), (4, 8)))
MANY = b"{" + b",".join(
    b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(300_000)
) + b"}"  # fmt: skip

ROWS = (
    Row("01-empty", raw(b""), "LT-301", expected="10 bytes", got="0 bytes"),
    Row("01-seven-bytes", raw(b"\0" * 7), "LT-301", expected="10 bytes", got="7 bytes"),
    Row("02-longer-than-file", raw(struct.pack("<Q", 500) + b"{}"), "LT-303",
        expected="508 bytes", got="10 bytes", what="truncated"),
    Row("03-2^63", sparse(1 << 63), "LT-304", expected="at most 33554432", got=str(1 << 63)),
    Row("03-over-100-MB", sparse(100_000_001), "LT-304", expected="at most", got="100000001"),
    Row("03-over-the-default", sparse(40_000_000), "LT-304", got="40000000", hint="--max-header"),
    Row("04-length-0", head(b""), "LT-305", expected="'{' at byte 8", got="empty"),
    Row("04-not-an-object", head(b"[]"), "LT-305", expected="'{' at byte 8", got="'['"),
    Row("04-not-json", head(b'{"a":}'), "LT-305", got="at byte 13"),
    Row("05-not-utf8", head(b'{"\xff":1}'), "LT-305", got="byte 10", what="UTF-8"),
    Row("06-lone-surrogate", head(b'{"\\ud800":%b}' % ONE, bytes(4)), "LT-308", key="\\ud800",
        expected="Unicode", got="surrogate"),
    *(Row(f"07-truncated-by-{n}", cut(n), "LT-312", key=A, expected="bytes", got="bytes")
      for n in (1, 2, 4095, 4096)),
    *(Row(f"07-truncated-by-{n}", cut(n), "LT-312", key="first", expected="bytes", got="bytes")
      for n in (8192, 10_000)),
    Row("08-trailing-byte", head({"a": entry(0, 4)}, bytes(5)), "LT-313", what="1 extra bytes",
        expected="bytes", got="bytes"),
    Row("08-zip-tail", head({"a": entry(0, 4)}, bytes(4) + b"PK\5\6" + bytes(18)), "LT-313",
        what="22 extra bytes"),
    Row("09-overlap", head({"a": entry(0, 4), "b": entry(3, 7)}, bytes(7)), "LT-314", key="b",
        what="a and b", expected="begin at 4", got="begin at 3"),
    Row("10-hole", head({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)), "LT-315", key="b",
        what="2 bytes", expected="begin at 4", got="begin at 6"),
    Row("11-alias", head({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "LT-314", key="b",
        what="a and b"),
    Row("12-begin-after-end", head({"w": entry(4, 0, [4])}, bytes(4)), "LT-307", key="w",
        expected="begin ≤ end", got="[4, 0]"),
    Row("12-negative-offset", head({"w": entry(-1, 0, [1])}, bytes(1)), "LT-307", key="w",
        expected="whole numbers", got="-1"),
    Row("12-float-offset", head({"w": entry(0, 1.5, [1])}, bytes(1)), "LT-307", key="w",
        expected="whole numbers", got="1.5"),
    Row("13-range-not-shape", head({"w": entry(0, 8, [3], "F32")}, bytes(8)), "LT-311", key="w",
        expected="12 bytes", got="8 bytes"),
    Row("14-shape-overflow", head({"w": entry(0, 0, [1 << 62] * 8)}), "LT-311", key="w",
        expected="2^63", got=str(1 << 62)),
    Row("15-negative-size", head({"w": entry(0, 1, [-1])}, bytes(1)), "LT-307", key="w",
        expected="whole numbers", got="-1"),
    Row("15-float-size", head({"w": entry(0, 1, [1.0])}, bytes(1)), "LT-307", key="w",
        expected="whole numbers", got="1.0"),
    Row("16-duplicate-same-range", head(DUPLICATE % (ONE, ONE), bytes(4)), "LT-306", key="w",
        what="duplicate"),
    Row("17-duplicate-other-range", head(DUPLICATE % (ONE, TWO), bytes(8)), "LT-306", key="w",
        what="duplicate"),
    Row("18-duplicate-metadata", head(b'{"__metadata__":{},"__metadata__":{}}'), "LT-306",
        key="__metadata__"),
    Row("18-metadata-number", head({"__metadata__": {"epoch": 3}}), "LT-316", key="epoch",
        expected="string", got="int"),
    Row("18-metadata-too-long", head({"__metadata__": {"a": "x" * 1_000_001}}), "LT-346", key="a",
        expected="1000000", got="1000001"),
    Row("19-unknown-dtype", head({"w": entry(0, 4, [1], "F31")}, bytes(4)), "LT-310", key="w",
        expected="BF16", got="F31"),
    Row("27-empty-name", head({"": entry(0, 1)}, bytes(1)), "LT-308", expected="1 to 1024",
        got="0 characters"),
    Row("27-long-name", head({"x" * 1_000_000: entry(0, 1)}, bytes(1)), "LT-308",
        key="(1000000 characters)", expected="1 to 1024", got="1000000 characters"),
    Row("28-300k-tensors", head(MANY), "LT-309", expected="200000", got="300000"),
    Row("29-deep-json", head(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"), "LT-305",
        what="deep"),
    Row("30-web-page", raw(b"<!DOCTYPE html><html>not found</html>"), "LT-302", expected="safetens",
        got="web page", hint="download"),
    Row("30-lfs-pointer", raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9"),
        "LT-302", expected="safetensors", got="LFS pointer", hint="git lfs pull"),
    Row("30-message", raw(b"Entry not found"), "LT-302", expected="safetensors", got="a text",
        hint="what the server said"),
    Row("30-zip", raw(zipped("weights.npy")), "LT-302", expected="safetensors", got="zip archive"),
    Row("30-gguf", raw(b"GGUF\3\0\0\0" + bytes(60)), "LT-302", expected="safetensors", got="GGUF"),
    Row("30-pickle", raw(pickle.dumps({"w": [1, 2]})), "LT-900", expected="safetensors",
        got="pickle"),
    Row("30-torch-zip", raw(zipped("archive/data.pkl")), "LT-900", expected="safetensors",
        got="pickle"),
)  # fmt: skip
IDS = [row.id for row in ROWS]


def check(world: World, words: list[str], row: Row, file: str) -> None:
    world.refuses(words, row.code, file=file, key=row.key, expected=row.expected, got=row.got,
                  what=row.what, hint=row.hint)  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_as_adapter(world: World, row: Row) -> None:
    row.make(world.weights)
    check(world, world.merge_words(), row, str(world.weights))


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_as_base(world: World, row: Row) -> None:
    row.make(world.model)
    check(world, world.merge_words(), row, str(world.model))


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_by_inspect(world: World, row: Row) -> None:
    path = world.root / "in" / "loose.safetensors"
    row.make(path)
    check(world, ["inspect", str(path)], row, str(path))


@pytest.mark.parametrize("row", ["24-no-tensors"])
def test_file_without_tensors(world: World, row: str) -> None:
    save(world.weights, {}, {"format": "pt"})
    found = world.run("inspect", world.adapter, "--json")
    assert found.code == 0 and "the file holds no tensors" in found.json["notes"]
    world.refuses(world.merge_words(), "LT-473", file=str(world.adapter), got="no tensors")


@pytest.mark.parametrize("row", ["24-no-tensors-base"])
def test_base_without_tensors(world: World, row: str) -> None:
    world.write_base({})
    assert world.run("inspect", world.base, "--json").code == 0
    world.refuses(world.merge_words(), "LT-430", file=str(world.base), key="q_proj")


@pytest.mark.parametrize("row", ["27-name-like-a-path"])
def test_names_are_never_paths(world: World, row: str) -> None:
    target = world.root / "x"
    name = "../../x"
    world.write_base(base_tensors() | {name: values(4)})
    found = world.merge("--json")
    assert found.code == 0 and not target.exists()
    assert name.encode() in (world.out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("row", ["29-deep-config"])
@pytest.mark.parametrize("depth", [65, 100_000])
def test_deep_configuration(world: World, row: str, depth: int) -> None:
    deep = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    config = world.adapter / "adapter_config.json"
    config.write_bytes(deep)
    world.refuses(world.merge_words(), "LT-344", file=str(config), expected="64 levels", got="byte")
    world.write_adapter()
    (world.base / "config.json").write_bytes(deep)
    world.refuses(world.merge_words(), "LT-344", file=str(world.base / "config.json"),
                  expected="64 levels", got="byte")  # fmt: skip


@pytest.mark.parametrize("row", ["03-max-header"])
def test_max_header_raises_and_lowers_the_cap(world: World, row: str) -> None:
    text = world.weights.read_bytes()
    length = int.from_bytes(text[:8], "little")
    save(world.weights, {}, {})
    world.weights.write_bytes(
        struct.pack("<Q", 33 << 20) + text[8 : 8 + length].ljust(33 << 20) + text[8 + length :]
    )
    world.refuses(world.merge_words(), "LT-304", file=str(world.weights), hint="--max-header")
    for words in (world.merge_words("--dry-run"), ["inspect", str(world.adapter)]):
        assert world.run(*words, "--max-header", "40MB").code == 0
        world.refuses([*words, "--max-header", "1kB"], "LT-304", expected="at most 1000 bytes")
        world.refuses([*words, "--max-header", "101MB"], "LT-290", expected="100", got="101")
