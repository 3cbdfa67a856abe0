"""R2: mutated files never bring a traceback, a hang or much memory.

The quick share is 500 cases; `make fuzz` runs 20,000 headers and 2,000 configurations.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from loratool import cli
from loratool.errors import LoratoolError
from loratool.store.header import Header, build_header, read_header
from loratool.store.jsonfile import load_json
from tests.faults.fuzz import mutate
from tests.faults.fuzz.run import DATA, Folder
from tests.faults.world import World, adapter_tensors, craft, factors, save

LIMIT_BYTES = 300_000_000


def run(*words: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.fuzz.run", *map(str, words)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def check(found: dict[str, Any], cases: int) -> None:
    print({k: found[k] for k in ("cases", "slowest_s", "peak_bytes", "seconds")})
    assert found["failures"] == []
    assert found["cases"] >= cases
    assert found["peak_bytes"] < LIMIT_BYTES and found["slowest_s"] < 5
    assert found["heavy"] == [], "reading headers and planning need no torch"
    assert len(found["answers"]) > 12, "the mutations reach only few checks"
    assert found["answers"]["accepted"] > 0


def test_five_hundred() -> None:
    check(run("--headers", 400, "--configs", 80), 500)


@pytest.mark.slow
def test_all_of_them() -> None:
    check(run("--headers", 20_000, "--configs", 2_000), 22_000)


def test_the_runner_finds_what_is_wrong(tmp_path: Path) -> None:
    """A planted bug, a planted hang: both are reported, with the file that showed them."""
    program = (
        "import sys, time\n"
        "from tests.faults.fuzz import run\n"
        "def bad(path, **_):\n"
        "    if path.stat().st_size % 2: raise KeyError('planted')\n"
        "    time.sleep(9)\n"
        "run.summarize, run.HANG_S = bad, 0.05\n"
        "sys.argv = ['run', '--headers', '12', '--configs', '0', '--keep', sys.argv[1]]\n"
        "sys.exit(run.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 1
    reasons = [f["why"] for f in json.loads(done.stdout)["failures"]]
    assert len(reasons) == 12
    assert any("planted" in why for why in reasons) and any("more than" in why for why in reasons)
    assert len(list(tmp_path.iterdir())) == 12


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
from tests.faults.fuzz.run import peak_bytes
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


# ------------------------------------------------------------------------------- up to the output


OPTIONS = ((), ("--allow-unmatched",), ("--rank-from", "file"), ("--dtype", "bfloat16"),
           ("--allow-nonfinite",), ("--untie",), ("--keep-tied",), ("--resize-embeddings",),
           ("--moe-layout", "eoi"), ("--allow-unmatched", "--rank-from", "config"))  # fmt: skip
LIKE_OURS = ("lora_linear", "lora_dora", "lora_mha", "lora_target_params_mixtral", "lora_kasa")


@pytest.mark.parametrize(
    ("count", "samples"),
    [
        pytest.param(150, LIKE_OURS, id="quick"),
        pytest.param(5000, tuple(sorted(p.name for p in DATA.iterdir() if (p / "base").is_dir())),
                     id="all", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_whole_merges_of_mutated_inputs(
    tmp_path: Path, count: int, samples: tuple[str, ...]
) -> None:
    """Anything may be refused; nothing may be a bug, and nothing refused leaves an output."""
    folders = [Folder(tmp_path, name) for name in samples]
    codes: Counter[int] = Counter()
    for number in range(count):
        rng = random.Random(f"merge {number}")
        folder = rng.choice(folders)
        path = rng.choice(sorted(folder.files))
        change = mutate.mutate_json if path.suffix == ".json" else mutate.mutate_tensors
        out = folder.root / "out" / "merged"
        out.parent.mkdir(exist_ok=True)
        words = ["merge", str(folder.adapter), "--base", str(folder.base), "-o", str(out),
                 "--json", "--threads", "1", *rng.choice(OPTIONS)]  # fmt: skip
        printed = io.StringIO()
        with folder.exchanged(path, change(folder.files[path], rng)), redirect_stdout(printed):
            code = cli.run(words)
        codes[code] += 1
        assert code in (0, 3, 4, 8, 9), (number, printed.getvalue())
        left = [p.name for p in out.parent.iterdir()]
        assert left == (["merged"] if code == 0 else []), (number, left)
        shutil.rmtree(out.parent)
    print(codes)
    assert min(codes[0], codes[3], codes[4]) > count // 50


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
