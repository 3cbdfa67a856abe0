"""Row 31: pickles are refused by name; --allow-pickle converts them and still runs no code."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loratool.engine.unpickle import is_safe_torch, pick_tensors
from loratool.store.header import read_header
from tests.faults.world import World, adapter_tensors, base_tensors

ROW = pytest.mark.parametrize("row", ["31"])
DTYPES = {"F32": torch.float32}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return World(tmp_path)


def as_torch(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(shape)
        for name, (dtype, shape, data) in tensors.items()
    }


class Bomb:
    """Unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Opener:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@ROW
@pytest.mark.parametrize(
    ("container", "bomb"),
    [
        ("pickle", Bomb),
        ("torch-zip", Bomb),
        ("torch-zip", Opener),
        pytest.param("torch-legacy", Bomb, marks=pytest.mark.slow),
    ],
)
def test_code_in_a_pickle_never_runs(
    world: World, row: str, bomb: Callable[[Path], object], container: str
) -> None:
    marker = world.root / "ran"
    world.weights.unlink()
    path = world.adapter / "adapter_model.bin"
    content = {**as_torch(adapter_tensors()), "x": bomb(marker)}
    if container == "pickle":
        path.write_bytes(pickle.dumps({"x": bomb(marker)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "torch-zip")
    world.refuses(world.merge_words(), "LT-903", file=str(world.adapter))
    world.refuses(["inspect", str(path)], "LT-920", file=str(path))
    world.refuses(world.merge_words("--allow-pickle"), "LT-905", file=str(path),
                  expected="tensors", got="system" if bomb is Bomb else "open")  # fmt: skip
    assert not marker.exists()
    assert list((world.root / "tmp").iterdir()) == []
    with path.open("rb") as file:  # the bomb is live: opened carelessly, it goes off
        try:
            load = pickle.load if container == "pickle" else partial(torch.load, weights_only=False)
            opened = load(file)["x"]  # type: ignore[operator]
            opened.close()  # of the `Opener`
        except Exception:
            pass
    assert marker.exists()


@ROW
@pytest.mark.parametrize(
    ("is_zip", "nested"),
    [(True, True), pytest.param(False, False, marks=pytest.mark.slow)],
)
def test_an_honest_pickle_gives_the_same_bytes(
    world: World, row: str, is_zip: bool, nested: bool
) -> None:
    assert world.merge("--json").code == 0
    want = (world.out / "model.safetensors").read_bytes()
    for path, tensors, name in (
        (world.weights, adapter_tensors(), "adapter_model.bin"),
        (world.model, base_tensors(), "pytorch_model.bin"),
    ):
        path.unlink()
        content: dict[str, Any] = dict(as_torch(tensors))
        if nested:
            content = {"state_dict": content, "epoch": 3}
        torch.save(content, path.with_name(name), _use_new_zipfile_serialization=is_zip)
    out = world.out.with_name("again")
    words = ["merge", world.adapter, "--base", world.base, "-o", out, "--json"]
    assert world.run(*words).code == 9
    found = world.run(*words, "--allow-pickle")
    assert found.code == 0, found.out
    assert (out / "model.safetensors").read_bytes() == want
    assert found.json["base"] == str(world.base)
    assert list((world.root / "tmp").iterdir()) == []
    if nested:
        seen = world.run("inspect", world.adapter, "--allow-pickle", "--json").json
        assert seen["adapter"]["modules"] == 2
        return
    again = world.run("verify", out, "--base", world.base, "--adapter", world.adapter,
                      "--allow-pickle", "--json")  # fmt: skip
    assert again.json["verdict"] == "identical"
    assert list((world.root / "tmp").iterdir()) == []


@ROW
@pytest.mark.slow
def test_a_sharded_base(world: World, row: str) -> None:
    assert world.merge("--json").code == 0
    want = {r.name: r.nbytes for r in read_header(world.out / "model.safetensors").tensors}
    world.model.unlink()
    tensors = as_torch(base_tensors())
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({n: tensors[n] for n in part}, world.base / file)
        weight_map |= dict.fromkeys(part, file)
    index = world.base / "pytorch_model.bin.index.json"
    index.write_text(f'{{"metadata": {{}}, "weight_map": {weight_map}}}'.replace("'", '"'))
    out = world.out.with_name("again")
    words = ["merge", world.adapter, "--base", world.base, "-o", out, "--allow-pickle", "--json"]
    assert world.run(*words).code == 0
    made = {r.name: r.nbytes for f in out.glob("*.safetensors") for r in read_header(f).tensors}
    assert made == want
    index.write_text(index.read_text().replace("pytorch_model-00001", "../../x-00001"))
    found = world.run(*words[:-4], "-o", out.with_name("third"), "--allow-pickle", "--json")
    assert found.json["error"]["code"] == "LT-902"


@ROW
@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({"a": torch.zeros(1).expand(1 << 28)}, "bytes of tensors in a file of"),
        pytest.param({"a": torch.eye(3).to_sparse()}, "sparse", marks=pytest.mark.slow),
    ],
    ids=["bomb", "sparse"],
)
def test_pickles_of_something_else(world: World, row: str, content: object, got: str) -> None:
    world.weights.unlink()
    path = world.adapter / "adapter_model.bin"
    torch.save(content, path)
    world.refuses(world.merge_words("--allow-pickle"), "LT-347", file=str(path), got=got,
                  expected="name -> tensor")  # fmt: skip


@ROW
@pytest.mark.parametrize("raw", [b"PK\3\4nonsense"])
def test_damaged_pickles(world: World, row: str, raw: bytes) -> None:
    world.weights.unlink()
    path = world.adapter / "adapter_model.bin"
    path.write_bytes(raw)
    error = world.run(*world.merge_words("--allow-pickle"), "--json").json["error"]
    assert error["code"] in ("LT-347", "LT-905") and error["file"] == str(path)
    assert world.leftovers() == []


@ROW
def test_the_hint_names_the_option(world: World, row: str) -> None:
    path = world.root / "in" / "x.ckpt"
    path.write_bytes(pickle.dumps({}))
    world.refuses(["inspect", str(path)], "LT-920", hint="--allow-pickle")


@ROW
def test_old_torch_is_refused(row: str) -> None:
    assert not is_safe_torch("2.9.1+cu128") and not is_safe_torch("1.13.0")
    assert is_safe_torch("2.10.0") and is_safe_torch("2.13.0+cpu") and is_safe_torch("3.0.0a0")


LOCKED = """
import io, os, socket, subprocess, sys, torch
from loratool.engine import unpickle
unpickle._warm_up()
unpickle._lock_down(1000)
def tries():
    yield lambda: open(sys.argv[1], "w")
    yield lambda: os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
    yield lambda: os.system("touch " + sys.argv[1])
    yield lambda: subprocess.run(["touch", sys.argv[1]])
    yield lambda: socket.socket()
    yield lambda: __import__("this")
    yield lambda: bytearray(2 << 30)
for number, attempt in enumerate(tries()):
    try:
        attempt()
    except BaseException as error:
        print(number, type(error).__name__, flush=True)
"""


@ROW
def test_the_process_is_locked(tmp_path: Path, row: str) -> None:
    """Even code that runs there can open, write, start and allocate nothing."""
    marker = tmp_path / "ran"
    done = subprocess.run(
        [sys.executable, "-c", LOCKED, str(marker)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list("0123456")
    assert done.stdout.splitlines()[-1] == "6 MemoryError"
    assert not marker.exists()


@ROW
def test_limits_hold_without_the_audit_hook(tmp_path: Path, row: str) -> None:
    """The system's own limits, should the interpreter be overrun."""
    marker = tmp_path / "ran"
    lock = "unpickle._lock_down(1000)"
    code = LOCKED.replace(lock, f"unpickle._forbid = lambda *_: None\n{lock}")
    done = subprocess.run([sys.executable, "-c", code, str(marker)], capture_output=True, text=True)
    failed = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"0", "1", "3", "4", "5", "6"} <= failed, done.stdout
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 0  # ours are untouched


@ROW
def test_no_secret_reaches_the_process(world: World, row: str, monkeypatch: Any) -> None:
    from loratool.store import unpickled

    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 34)
    environment = unpickled._environment()
    assert not any("s" * 34 in value for value in environment.values())


@ROW
def test_tensors_are_found_one_level_down(row: str) -> None:
    one = torch.zeros(1)
    assert list(pick_tensors({"model": {"state_dict": {"a": one}}, "step": 1})) == ["a"]
    for content, why in (
        (one, "not a dictionary"), ({}, "no tensors"), ({"a": one, "b": {"c": one}}, "beside"),
        ({"a": {"b": one}, "c": {"d": one}}, "2 dictionaries"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            pick_tensors(content)
