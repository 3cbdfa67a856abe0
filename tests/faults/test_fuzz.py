"""Headers and JSON that no mutation of a sound file reaches: from nothing, and the worst legal."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from loratool.errors import LoratoolError
from loratool.store.header import Header, build_header, read_header
from loratool.store.jsonfile import load_json
from tests.faults.fuzz import mutate
from tests.faults.world import World, adapter_tensors, craft, factors, save

LIMIT_BYTES = 300_000_000


# ----------------------------------------------------------------------- structured, by Hypothesis

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(mutate.NUMBERS) | st.sampled_from(mutate.STRINGS),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
SIZE = st.integers(-1, 5) | st.sampled_from(mutate.NUMBERS)
ENTRY = st.fixed_dictionaries(
    {}, optional={
        "dtype": st.sampled_from((*mutate.DTYPES, "F31")) | JSON,
        "shape": st.lists(SIZE, max_size=9) | JSON,
        "data_offsets": st.tuples(SIZE, SIZE).map(list) | JSON,
        "extra": JSON,
    },
)  # fmt: skip
HEADER = st.dictionaries(
    st.text(max_size=8) | st.sampled_from((*mutate.STRINGS, "__metadata__")),
    ENTRY | JSON,
    max_size=4,
)
QUICK = settings(
    max_examples=150, deadline=5000, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def look(path: Path) -> Header | None:
    try:
        return read_header(path)
    except LoratoolError as error:
        assert error.exit_code in (3, 9) and str(path) in str(error)
        str(error).encode()
        return None


def theirs(path: Path) -> dict[str, tuple[str, list[int]]]:
    """What the safetensors library reads; it must accept all that we accept."""
    with safe_open(str(path), "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {n: (s.get_dtype(), list(s.get_shape())) for n, s in slices.items()}


@QUICK
@given(header=HEADER, data=st.integers(0, 40))
def test_any_header(tmp_path: Path, header: dict[str, Any], data: int) -> None:
    text = json.dumps(header).encode()
    path = craft(tmp_path / "x.safetensors", text, bytes(data))
    found = look(path)
    if found is not None:
        assert theirs(path) == {r.name: (r.dtype, list(r.shape)) for r in found.tensors}


@QUICK
@given(value=JSON)
def test_any_json(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    try:
        assert load_json(path) == value
    except LoratoolError as error:
        assert error.exit_code == 3


@QUICK
@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(list(mutate.DTYPES)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=5,
    ),
    metadata=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3),
)  # fmt: skip
def test_what_we_write_is_read_back(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    specs = [(n, d, tuple(s)) for n, (d, s) in tensors.items() if d != "F4"]
    total = 0
    for _, dtype, shape in specs:
        count = mutate.DTYPES[dtype] // 8
        for side in shape:
            count *= side
        total += count
    head, _ = build_header(specs, metadata)
    path = tmp_path / "x.safetensors"
    path.write_bytes(head + bytes(total))
    found = read_header(path)
    assert found.metadata == metadata
    assert sorted((r.name, r.dtype, r.shape) for r in found.tensors) == sorted(specs)
    assert theirs(path) == {n: (d, list(s)) for n, d, s in specs}


def test_we_accept_nothing_that_safetensors_refuses(tmp_path: Path) -> None:
    """500 mutations; what passes here passes there, with the same names, types and shapes."""
    source = save(tmp_path / "good", adapter_tensors(), {"format": "pt"}).read_bytes()
    path = tmp_path / "x.safetensors"
    accepted = stricter = 0
    for number in range(500):
        path.write_bytes(mutate.mutate_safetensors(source, source, random.Random(number)))
        found = look(path)
        if found is not None:
            accepted += 1
            assert theirs(path) == {r.name: (r.dtype, list(r.shape)) for r in found.tensors}
            continue
        try:
            theirs(path)
            stricter += 1
        except (SafetensorError, OSError, ValueError):
            pass
    print(f"{accepted} accepted by both, {stricter} by safetensors alone")
    assert accepted > 50


# -------------------------------------------------------------------------- the worst that is legal

WORST = {
    "metadata": b'{"__metadata__":{%b}}' % b",".join(b'"%x":""' % i for i in range(2_000_000)),
    "numbers": b'{"w":[%b]}' % b",".join([b"1e9"] * 2_500_000),
    "empty-lists": b'{"w":[%b]}' % b",".join([b"[]"] * 399_000),
    "escapes": b'{"w":"%b"}' % (b"\\u00e9" * 5_000_000),
    "name": b'{"%b":1}' % ("é".encode() * 16_000_000),
    "depth": b'{"w":%b}' % (b"[" * 390_000 + b"]" * 390_000),
}  # fmt: skip
PROGRAM = """
import sys, time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from loratool import cli
from loratool.errors import LoratoolError
from loratool.ops.summary import summarize
from tests.faults.process import peak_bytes
start = time.process_time()
try:
    summarize(Path(sys.argv[1]))
    code = "accepted"
except LoratoolError as error:
    code = error.code
print(code, peak_bytes(), time.process_time() - start)
"""


def measure(path: Path) -> tuple[str, int, float]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    code, peak, seconds = done.stdout.split()
    return code, int(peak), float(seconds)


@pytest.mark.parametrize("name", WORST)
def test_headers_that_want_memory(tmp_path: Path, name: str) -> None:
    code, peak, seconds = measure(craft(tmp_path / "x.safetensors", WORST[name]))
    print(f"{name}: {code} {peak / 1e6:.0f} MB {seconds:.2f} s")
    assert code.startswith("LT-3")
    assert peak < LIMIT_BYTES and seconds < 5


@pytest.mark.slow
def test_the_most_tensors_that_are_accepted(tmp_path: Path) -> None:
    entry = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{%b}" % b",".join(b'"layers.%060d":%b' % (i, entry) for i in range(200_000))
    code, peak, seconds = measure(craft(tmp_path / "x.safetensors", text))
    print(f"200,000 tensors: {peak / 1e6:.0f} MB {seconds:.2f} s")
    assert code == "accepted" and peak < LIMIT_BYTES


# ----------------------------------------------------------------------------- dear proposals


def hostile_names(world: World, kind: str) -> None:
    """Names that make proposals for a fix dear: many parts, or many letters."""
    one = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    stem = {"parts": "a." * 505, "letters": "q" * 1000}[kind]
    craft(world.model, {f"{stem}{i:06d}.weight": one for i in range(10_000)})
    world.write_adapter(factors("a." * 200 + "q"))


@pytest.mark.parametrize("kind", ["parts", "letters"])
def test_hints_take_no_minutes(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path)
    hostile_names(world, kind)
    started = time.process_time()
    world.refuses(world.merge_words(), "LT-430", what="1 of 1 modules")
    assert time.process_time() - started < 5
