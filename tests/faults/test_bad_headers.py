"""Headers that lie: every one is refused with its own code, and with the file and key named."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from loratool.errors import BadFileError, LoratoolError, UnsafeContentError
from loratool.store.header import MAX_HEADER_BYTES, read_header


def craft(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: Any, end: Any, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refuse(path: Path, code: str, *words: str, exit_code: int = 3) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught:
        read_header(path)
    error = caught.value
    assert (error.code, error.exit_code) == (code, exit_code), error
    message = str(error)
    assert str(path) in message
    for word in words:
        assert word in message, message
    message.encode("utf-8")
    assert len(message) < 2000
    return error


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("size", [0, 1, 7])
def test_too_small(file: Path, size: int) -> None:
    file.write_bytes(b"\0" * size)
    refuse(file, "LT-301", f"{size} bytes")


def test_missing_file(file: Path) -> None:
    refuse(file, "LT-300")


def test_header_longer_than_file(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 500) + b"{}")
    refuse(file, "LT-303", "508 bytes", "10 bytes")


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100_000_001, MAX_HEADER_BYTES + 1])
def test_header_too_large(file: Path, length: int) -> None:
    with file.open("wb") as f:
        f.write(struct.pack("<Q", length) + b"{")
        f.truncate(200_000_000)  # sparse: the length fits into the file
    error = refuse(file, "LT-304", str(length))
    assert ("--max-header" in (error.hint or "")) is (length <= 100_000_000)


def test_huge_length_allocates_nothing(file: Path) -> None:
    with file.open("wb") as f:
        f.write(struct.pack("<Q", 90_000_000) + b"{")
        f.truncate(200_000_000)
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from loratool.store.header import read_header\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try: read_header(Path(sys.argv[1]))\n"
        "except Exception as e: print(e.code, (peak() - before) // 1024)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    code_word, grown_mib = out.stdout.split()
    assert code_word == "LT-304"
    assert int(grown_mib) < 20


def test_max_bytes_never_exceeds_the_hard_limit(file: Path) -> None:
    with file.open("wb") as f:
        f.write(struct.pack("<Q", 100_000_001) + b"{")
        f.truncate(200_000_000)
    with pytest.raises(BadFileError) as caught:
        read_header(file, max_bytes=1 << 40)
    assert caught.value.code == "LT-304"


def test_max_bytes_can_be_raised(file: Path) -> None:
    craft(file, b"{}" + b" " * MAX_HEADER_BYTES)
    refuse(file, "LT-304")
    assert read_header(file, max_bytes=MAX_HEADER_BYTES + 2).tensors == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", ["empty header"]),
        (b"[]", ["'{' at byte 8", "'['"]),
        (b"  {}", ["'{' at byte 8"]),
        (b'{"a":}', ["at byte 13"]),
        ("{é".encode(), ["at byte 9"]),
        (b'{"a":1}x', ["at byte 15"]),
        (b'{"a":NaN}', ["NaN"]),
        (b'{"a":' + b"[" * 9000, ["nested too deeply"]),
        (b'{"\xff":1}', ["UTF-8", "byte 10"]),
    ],
)
def test_not_json(file: Path, text: bytes, words: list[str]) -> None:
    refuse(craft(file, text), "LT-305", *words)


@pytest.mark.parametrize("begin_end", [(0, 4), (4, 8)])
def test_duplicate_name(file: Path, begin_end: tuple[int, int]) -> None:
    first, second = json.dumps(entry(0, 4)), json.dumps(entry(*begin_end))
    text = f'{{"w":{first},"w":{second}}}'.encode()
    refuse(craft(file, text, b"\0" * begin_end[1]), "LT-306", "key w")


def test_duplicate_metadata_and_field(file: Path) -> None:
    refuse(craft(file, b'{"__metadata__":{},"__metadata__":{}}'), "LT-306", "__metadata__")
    text = b'{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}'
    refuse(craft(file, text, b"\0"), "LT-306", "key dtype")
    refuse(craft(file, b'{"__metadata__":{"a":"1","a":"2"}}'), "LT-306", "key a")


@pytest.mark.parametrize(
    ("value", "word"),
    [(1, "int"), ([], "list"), ("x", "str")],
)
def test_metadata_is_no_object(file: Path, value: object, word: str) -> None:
    refuse(craft(file, {"__metadata__": value}), "LT-316", "__metadata__", word)


def test_null_metadata_is_none_as_in_safetensors(file: Path) -> None:
    craft(
        file,
        {"__metadata__": None, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}},
        b"\0",
    )
    assert read_header(file).metadata == {}
    with safe_open(str(file), "pt") as theirs:
        assert theirs.metadata() is None and list(theirs.keys()) == ["a"]


@pytest.mark.parametrize(("value", "word"), [(1, "int"), ({}, "dict"), (None, "NoneType")])
def test_metadata_value_is_no_string(file: Path, value: object, word: str) -> None:
    refuse(craft(file, {"__metadata__": {"epoch": value}}), "LT-316", "__metadata__.epoch", word)


def test_lone_surrogates(file: Path) -> None:
    text = b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    refuse(craft(file, text, b"\0"), "LT-308", "surrogate", "\\ud800")
    refuse(craft(file, b'{"__metadata__":{"a":"\\udfff"}}'), "LT-316", "surrogate")


@pytest.mark.parametrize("name", ["", "x" * 1025, "x" * 1_000_000])
def test_unusable_name(file: Path, name: str) -> None:
    refuse(craft(file, {name: entry(0, 1)}, b"\0"), "LT-308", f"{len(name)} characters")


@pytest.mark.parametrize(
    "name", ["../../x", "\x1b]0;x\x07", "[/bold]", "a b", "\u202e", "x" * 1024]
)
def test_strange_names_are_names(file: Path, name: str) -> None:
    assert read_header(craft(file, {name: entry(0, 1)}, b"\0")).tensors[0].name == name


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "F32",
        {},
        {"dtype": "U8", "shape": [1]},
        {"shape": [1], "data_offsets": [0, 1]},
        entry(0, 1, shape="1"),
        entry(0, 1, shape=[-1]),
        entry(0, 1, shape=[1.0]),
        entry(0, 1, shape=[True]),
        entry(0, 1, shape=["1"]),
        entry(0, 1, shape=[[1]]),
        entry(0, 1, shape=[10**30]),
        entry(1, 0, shape=[1]),
        entry(-1, 0, shape=[1]),
        entry(0.0, 1, shape=[1]),
        entry(0, 1.5, shape=[1]),
        entry(False, True, shape=[1]),
        entry(None, 1, shape=[1]),
        {"dtype": "U8", "shape": [1], "data_offsets": [0]},
        {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]},
        {"dtype": "U8", "shape": [1], "data_offsets": {"0": 0}},
    ],
)
def test_malformed_entry(file: Path, value: object) -> None:
    refuse(craft(file, {"w.weight": value}, b"\0"), "LT-307", "key w.weight")


def test_minus_zero_is_no_size(file: Path) -> None:
    text = b'{"w":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'
    refuse(craft(file, text), "LT-307", "key w")


@pytest.mark.parametrize("dtype", ["F31", "", "f32", 7, None, ["F32"]])
def test_unknown_dtype(file: Path, dtype: object) -> None:
    refuse(craft(file, {"w": entry(0, 4, [1], dtype)}, b"\0" * 4), "LT-310", "key w", "BF16")


def test_too_many_dimensions(file: Path) -> None:
    assert read_header(craft(file, {"w": entry(0, 1, [1] * 8)}, b"\0")).tensors[0].shape == (1,) * 8
    refuse(craft(file, {"w": entry(0, 1, [1] * 9)}, b"\0"), "LT-309", "at most 8", "got 9")


def test_range_does_not_fit_shape(file: Path) -> None:
    header = {"w": entry(0, 8, [3], "F32")}
    refuse(craft(file, header, b"\0" * 8), "LT-311", "key w", "12 bytes", "got 8 bytes")


@pytest.mark.parametrize(
    "shape",
    [[1 << 62] * 8, [1 << 40, 1 << 40], [1 << 61, 4], [1 << 40, 1 << 40, 0], [0, 1 << 40, 1 << 40]],
)
def test_shape_overflow(file: Path, shape: list[int]) -> None:
    refuse(craft(file, {"w": entry(0, 0, shape)}), "LT-311", "key w")


def test_packed_types_must_fill_bytes(file: Path) -> None:
    assert read_header(craft(file, {"w": entry(0, 2, [4], "F4")}, b"\0\0")).tensors[0].nbytes == 2
    refuse(craft(file, {"w": entry(0, 2, [3], "F4")}, b"\0\0"), "LT-311", "key w")


def test_truncated_data_names_the_tensor(file: Path) -> None:
    header = {"a": entry(0, 4), "b": entry(4, 8)}
    craft(file, header, b"\0" * 8)
    whole = file.read_bytes()
    for cut, key in [(1, "key b"), (4, "key b"), (5, "key a"), (8, "key a")]:
        file.write_bytes(whole[:-cut])
        refuse(file, "LT-312", key, f"{len(whole)} bytes", f"got {len(whole) - cut} bytes")


def test_trailing_bytes(file: Path) -> None:
    refuse(craft(file, {"a": entry(0, 4)}, b"\0" * 5), "LT-313", "1 extra bytes")
    refuse(craft(file, {}, b"PK\5\6" + b"\0" * 18), "LT-313", "22 extra bytes")


def test_overlap_and_alias_name_both(file: Path) -> None:
    refuse(craft(file, {"a": entry(0, 4), "b": entry(3, 7)}, b"\0" * 7), "LT-314", "a and b")
    refuse(craft(file, {"a": entry(0, 4), "b": entry(0, 4)}, b"\0" * 4), "LT-314", "a and b")
    refuse(craft(file, {"a": entry(0, 4), "b": entry(1, 3)}, b"\0" * 4), "LT-314", "a and b")


def test_hole(file: Path) -> None:
    refuse(
        craft(file, {"a": entry(0, 4), "b": entry(6, 8)}, b"\0" * 8), "LT-315", "key b", "2 byte"
    )
    refuse(craft(file, {"a": entry(1, 4)}, b"\0" * 4), "LT-315", "key a", "hole of 1 ")
    refuse(craft(file, {"a": entry(0, 4), "z": entry(6, 6)}, b"\0" * 8), "LT-315", "key z")


def test_too_many_tensors(file: Path) -> None:
    one = b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(b'"%d%s' % (i, one) for i in range(200_001)) + b"}"
    refuse(craft(file, text), "LT-309", "200001", "at most 200000")


@pytest.mark.parametrize(
    ("filler", "code"), [(b"[],", "LT-309"), (b"{},", "LT-309"), (b"0,", "LT-349")]
)
def test_structure_is_counted_before_it_is_parsed(file: Path, filler: bytes, code: str) -> None:
    refuse(craft(file, b'{"w":[' + filler * 4_000_000 + b"0]}"), code)


def test_metadata_without_end(file: Path) -> None:
    many = b",".join(b'"%x":""' % i for i in range(2_000_000))
    refuse(craft(file, b'{"__metadata__":{' + many + b"}}"), "LT-349", "10000")
    refuse(craft(file, {"__metadata__": dict.fromkeys(map(str, range(10_001)), "")}), "LT-349")
    header = {"__metadata__": dict.fromkeys(map(str, range(10_000)), "")}
    assert len(read_header(craft(file, header)).metadata) == 10_000
    refuse(craft(file, {"__metadata__": {"k" * 1025: ""}}), "LT-346", "(1025 characters)")


def test_commas_and_braces_in_metadata_are_text(file: Path) -> None:
    header = {"__metadata__": {f"tags{i}": '{"a": [1, 2]}, \\" ' * 50_000 for i in range(5)}}
    assert read_header(craft(file, header)).metadata == header["__metadata__"]


def test_a_raised_limit_lifts_the_one_on_metadata(file: Path) -> None:
    craft(file, {"__metadata__": {"a": "x" * 1_000_001}})
    refuse(file, "LT-346", "__metadata__.a", "1000000 characters")
    assert len(read_header(file, max_bytes=MAX_HEADER_BYTES + 1).metadata["a"]) == 1_000_001


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            ["LFS", "git lfs"],
        ),
        (b"# xet version 0\nfilesize = 1\n", ["pointer"]),
        (b"<!DOCTYPE html><html><body>404</body></html>", ["web page", "download it again"]),
        (b"\n  <HTML><head></head></html>", ["web page"]),
        (b"GGUF\3\0\0\0" + b"\0" * 40, ["GGUF"]),
        (b"\x1f\x8b\x08" + b"\0" * 40, ["gzip"]),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 40, ["HDF5"]),
        (b'{"abc": {"weight_map": 1}}', ["JSON"]),
        (b'{"error":"Repository not found"}', ["JSON"]),
    ],
)
def test_other_kinds_of_file_are_named(file: Path, content: bytes, words: list[str]) -> None:
    file.write_bytes(content)
    refuse(file, "LT-302", *words)


def test_plain_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("weights.npy", b"\0" * 100)
    refuse(file, "LT-302", "zip archive")


BOMB = Path(tempfile.gettempdir()) / f"loratool-bomb-{os.getpid()}"


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {BOMB}",)


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_is_unsafe(file: Path, protocol: int) -> None:
    for value in (_Bomb(), {"w": [1, 2]}, [_Bomb()]):
        file.write_bytes(pickle.dumps(value, protocol=protocol) + b"." * 20)
        refuse(file, "LT-900", "pickle", exit_code=9)
    assert not BOMB.exists()


@pytest.mark.parametrize("padding", [0, 200_000])
def test_torch_zip_is_unsafe(file: Path, padding: int) -> None:
    with zipfile.ZipFile(file, "w") as z:
        if padding:
            z.writestr("archive/data/0", b"\0" * padding)
        z.writestr("archive/data.pkl", b"\x80\x02.")
    refuse(file, "LT-900", "pickle", exit_code=9)


def test_truncated_header_is_not_mistaken_for_pickle(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 0x0280) + b'{"a":')  # the length reads like protocol 2
    refuse(file, "LT-303")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fifo_is_refused_without_hanging(file: Path) -> None:
    os.mkfifo(file)
    error = refuse(file, "LT-901", "FIFO", exit_code=9)
    assert isinstance(error, UnsafeContentError)


def test_folder_and_device(file: Path) -> None:
    file.mkdir()
    refuse(file, "LT-901", "a folder", exit_code=9)
    if os.name == "posix":
        refuse(Path("/dev/zero"), "LT-901", "a device", exit_code=9)


def test_broken_link(file: Path) -> None:
    file.symlink_to("gone")
    refuse(file, "LT-300", "broken symbolic link")
