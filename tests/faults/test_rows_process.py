"""A few rows as real processes: exit code, one line on stderr, one object on stdout."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.spoil import KEY_A, holding
from tests.faults.world import Spoil, World, adapter_tensors, craft, fingerprint


def empty(world: World) -> None:
    world.weights.write_bytes(b"")


def page(world: World) -> None:
    world.model.write_bytes(b"<!DOCTYPE html><html>404</html>")


def pickled(world: World) -> None:
    world.model.rename(world.base / "pytorch_model.bin")


def duplicate(world: World) -> None:
    craft(world.weights, b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":1}')


def outside(world: World) -> None:
    index = world.shard()
    index.write_text(index.read_text().replace("model-00001", "../model-00001", 1))


def nan(world: World) -> None:
    world.write_adapter(adapter_tensors() | {KEY_A: holding(float("nan"), 1, 3)})


def device(world: World) -> None:
    world.weights.unlink()
    os.mkfifo(world.weights)


CASES: tuple[tuple[str, Spoil, int, str], ...] = (
    ("01-process", empty, 3, "LT-301"),
    ("16-process", duplicate, 3, "LT-306"),
    ("30-process", page, 3, "LT-302"),
    ("31-process", pickled, 9, "LT-903"),
    ("32-process", nan, 8, "LT-801"),
    ("61-process", outside, 9, "LT-902"),
    ("62-process", device, 9, "LT-901"),
)


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
@pytest.mark.parametrize(("row", "spoil", "exit_code", "code"), CASES, ids=[c[0] for c in CASES])
def test_as_a_process(tmp_path: Path, row: str, spoil: Spoil, exit_code: int, code: str) -> None:
    world = World(tmp_path)
    spoil(world)
    before = fingerprint(tmp_path / "in")
    words = [sys.executable, "-m", "loratool", *world.merge_words("-q")]
    plain = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert plain.returncode == exit_code, plain
    # -q: on a slow machine a line of progress may come before the error.
    (line,) = plain.stderr.splitlines()
    assert line.startswith(f"error[{code}]: ") and " · " in line
    as_json = subprocess.run([*words, "--json"], capture_output=True, text=True, timeout=60)
    assert as_json.returncode == exit_code and as_json.stderr == ""
    error = json.loads(as_json.stdout)["error"]
    assert error["code"] == code and error["exit_code"] == exit_code
    assert line.endswith(error["what"]) or error["what"] in line
    assert fingerprint(tmp_path / "in") == before and world.leftovers() == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("row", ["03-memory"])
def test_a_lying_length_allocates_nothing(tmp_path: Path, row: str) -> None:
    """Peak of inspecting a header of 2^63 bytes against that of one of 10 bytes: < 20 MB more."""
    peaks = []
    for length in (2, 1 << 63):
        path = tmp_path / f"{length}.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", length) + b"{}")
            file.truncate(10 if length == 2 else 300_000_000)
        code = ("import sys\nfrom loratool import cli\ncli.run(['inspect', sys.argv[1]])\n"
                "print(open('/proc/self/status').read())")  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split("VmHWM:")[1].split()[0]))
    assert peaks[1] - peaks[0] < 20_000
