"""Tables of undo and residual files from strangers: any size, any type."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loratool.errors import LoratoolError
from loratool.ops.residual import read_residual
from loratool.ops.undo import read_undo
from loratool.store.header_text import MAX_TENSORS
from loratool.store.patch_file import TABLE
from tests.faults.world import save

READERS: dict[str, Callable[[Path], object]] = {"undo": read_undo, "residual": read_residual}
ROW = {"from": "same", "dtype": "F32", "shape": [4], "view": [1, 4], "base": "", "merged": "",
       "digest": ""}  # fmt: skip
SOUND: dict[str, Any] = {
    "version": 1, "block_elements": 1 << 19, "adapters": [{"files": {"a": ""}, "weight": 1}],
    "config": {"dtype": "float32"}, "created": ["b"], "adapter": {"a": ""},
    "bind": {"untie": True}, "tensors": {"a": ROW},
}  # fmt: skip
LIMIT_BYTES = 300_000_000
PROGRAM = """
import sys, time
from pathlib import Path
from loratool.errors import LoratoolError
from tests.faults.process import peak_bytes
from tests.faults.test_patch_tables import READERS
start = time.process_time()
try:
    READERS[sys.argv[1]](Path(sys.argv[2]))
    code = "accepted"
except LoratoolError as error:
    code = error.code
print(code, peak_bytes(), time.process_time() - start)
"""


def write(path: Path, operation: str, packed: bytes) -> Path:
    tensors = {TABLE: ("U8", (len(packed),), packed)}
    return save(path, tensors, {"loratool": json.dumps({"operation": operation})})


def compressed(parts: Iterator[bytes]) -> bytes:
    tool = zlib.compressobj(9)
    return b"".join(map(tool.compress, parts)) + tool.flush()


def measure(operation: str, path: Path) -> tuple[str, int, float]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, operation, str(path)], capture_output=True, text=True,
        check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    code, peak, seconds = done.stdout.split()
    return code, int(peak), float(seconds)


def bomb(one: bytes, last: bytes, count: int, start: bytes, end: bytes) -> Iterator[bytes]:
    yield start
    for _ in range(count):
        yield one
    yield last + end


ONE = b'{"version":1,"tensors":{"%b":1}}'
HEAD = json.dumps(SOUND | {"tensors": 0})[:-2].encode() + b"{"  # … "tensors": {
BOMBS = {
    "objects": lambda: bomb(b"{}," * 349_525, b"0", 245, HEAD + b'"a":[', b"]}}"),
    "spaces": lambda: bomb(b" " * (1 << 20), b"", 1000, HEAD, b"}}"),
    "numbers": lambda: bomb(b"1," * 500_000, b"1", 70, HEAD + b'"a":{"shape":[', b"]}}}"),
    "names": lambda: iter((ONE % (b"x" * (76 << 20)),)),
    "depth": lambda: bomb(b"[" * 1000, b"", 1000, HEAD + b'"a":', b""),
    "emoji": lambda: iter((ONE % ("🙂".encode() * (18 << 20)),)),
}  # fmt: skip


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("operation", READERS)
def test_tables_that_want_memory(tmp_path: Path, operation: str, name: str) -> None:
    path = write(tmp_path / "x.safetensors", operation, compressed(BOMBS[name]()))
    code, peak, seconds = measure(operation, path)
    print(f"{name}: {path.stat().st_size} bytes, {code} {peak / 1e6:.0f} MB {seconds:.2f} s")
    assert code.startswith("LT-3")
    assert peak < LIMIT_BYTES and seconds < 5


@pytest.mark.slow
@pytest.mark.parametrize("operation", READERS)
def test_the_largest_table_that_is_accepted(tmp_path: Path, operation: str) -> None:
    row = json.dumps(ROW | {"base": "0" * 64, "merged": "0" * 64, "digest": "0" * 64})
    used = json.loads(row)
    used.pop("digest" if operation == "undo" else "base")
    text = json.dumps(used).encode()
    parts = (b'"layers.%060d":%b,' % (i, text) for i in range(MAX_TENSORS - 1))
    packed = compressed(iter((HEAD, *parts, b'"a":' + json.dumps(ROW).encode() + b"}}")))
    code, peak, seconds = measure(operation, write(tmp_path / "x.safetensors", operation, packed))
    print(f"{MAX_TENSORS} tensors: {code} {peak / 1e6:.0f} MB {seconds:.2f} s")
    assert code == "accepted" and peak < LIMIT_BYTES


def reads(path: Path, operation: str, table: Any) -> str:
    write(path, operation, zlib.compress(json.dumps(table).encode()))
    try:
        READERS[operation](path)
    except LoratoolError as error:
        assert error.exit_code == 3 and str(path) in str(error)
        return error.code
    return "accepted"


ODD: tuple[Any, ...] = (None, True, -1, 5, 10**30, 0.5, "", "x", [], [5], {}, {"a": 5}, [[]])


@pytest.mark.parametrize("operation", READERS)
def test_any_type_anywhere(tmp_path: Path, operation: str) -> None:
    path = tmp_path / "x.safetensors"
    assert reads(path, operation, SOUND) == "accepted"
    needed = {
        "undo": ("block_elements", "adapters", "config", "created", "tensors"),
        "residual": ("adapter", "bind", "config", "tensors"),
    }[operation]
    for key in needed:
        assert reads(path, operation, {k: v for k, v in SOUND.items() if k != key}) == "LT-328"
        found = [reads(path, operation, SOUND | {key: value}) for value in ODD]
        assert found.count("LT-328") >= 9 and set(found) <= {"LT-328", "accepted"}, (key, found)
    for key in ROW:
        for value in ODD:
            tensors = {"a": ROW | {key: value}}
            assert reads(path, operation, SOUND | {"tensors": tensors}) in ("LT-328", "accepted")
    for table in ODD:
        assert reads(path, operation, table) in ("LT-328", "LT-397")
