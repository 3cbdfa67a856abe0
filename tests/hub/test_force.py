"""`pull --force` replaces what a pull wrote and nobody changed, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from loratool.store.staging import Making
from loratool.store.writer import StagedOutput
from tests.hub.client import call, tree
from tests.hub_server import TestHub
from tests.hub_server.state import Tree

OLD: Tree = {
    "adapter_config.json": b'{"base_model_name_or_path": "org/base"}',
    "adapter_model.safetensors": b"old weights",
    "README.md": b"old",
    "single.safetensors": b"old single",
    "sub/adapter_config.json": b"{}",
    "sub/adapter_model.safetensors": b"old sub",
}
NEW: Tree = {n: bytes(d).replace(b"old", b"new") for n, d in OLD.items() if n != "README.md"}
SOURCES = {"me/x": "", "hf://me/x/sub": "sub/", "hf://me/x/single.safetensors": "single"}


@pytest.fixture
def served() -> Iterator[TestHub]:
    with TestHub() as hub:
        hub.state.add_repo("me/x", OLD)
        yield hub


def move_on(hub: TestHub) -> None:
    repo = hub.state.repos["me/x"]
    repo.branches["main"] = repo.commit(NEW, "newer", repo.branches["main"])


def expected(files: Tree, source: str) -> Tree:
    part = SOURCES[source]
    if part == "single":
        return {"single.safetensors": files["single.safetensors"]}
    names = ("adapter_config.json", "adapter_model.safetensors", "README.md")
    return {n: files[part + n] for n in names if part + n in files}


@pytest.mark.parametrize("source", SOURCES)
def test_an_unchanged_copy_is_replaced(served: TestHub, tmp_path: Path, source: str) -> None:
    words = ("pull", source, "-o", "out")
    assert call(served, tmp_path, *words)[0] == 0
    assert tree(tmp_path / "out") == expected(OLD, source)
    move_on(served)
    code, text = call(served, tmp_path, *words)
    assert code == 5 and "LT-501" in text and "--force" in text
    code, text = call(served, tmp_path, *words, "--force")
    assert code == 0, text
    assert tree(tmp_path / "out") == expected(NEW, source)
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "out"}


@pytest.mark.parametrize("source", SOURCES)
def test_an_up_to_date_copy_stays(served: TestHub, tmp_path: Path, source: str) -> None:
    words = ("pull", source, "-o", "out", "--force")  # nothing to replace yet
    assert call(served, tmp_path, *words)[0] == 0
    before = (tmp_path / "out").stat().st_ino
    shutil.rmtree(tmp_path / "hf")
    served.state.requests.clear()
    code, text = call(served, tmp_path, *words)
    assert code == 0 and "up to date" in text, text
    assert (tmp_path / "out").stat().st_ino == before
    assert dict(served.state.requests) == {"info": 1}
    report = json.loads(call(served, tmp_path, *words, "--json")[1])
    assert report["is_current"] and report["output"] == "out"


@pytest.mark.parametrize("change", ["other bytes", "more", "a link", "no cache", "not a copy"])
@pytest.mark.parametrize("offline", [False, True])
def test_anything_else_is_left_alone(
    served: TestHub, tmp_path: Path, change: str, offline: bool
) -> None:
    words = ("pull", "me/x", "-o", "out", "--force", *(["--offline"] if offline else []))
    assert call(served, tmp_path, "pull", "me/x", "-o", "out")[0] == 0
    move_on(served)
    out = tmp_path / "out"
    if change == "other bytes":
        (out / "README.md").write_text("mine")
    elif change == "more":
        (out / "deep").mkdir()
        (out / "deep" / "notes.txt").write_text("mine")
    elif change == "a link":
        (out / "README.md").rename(tmp_path / "mine")
        (out / "README.md").symlink_to(tmp_path / "mine")
    elif change == "no cache":
        if offline:
            pytest.skip("there is nothing to pull from")
        shutil.rmtree(tmp_path / "hf")
    else:
        shutil.rmtree(out)
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    before = tree(out)
    code, text = call(served, tmp_path, *words)
    assert code == 5 and "LT-521" in text and "remove it yourself" in text, text
    assert tree(out) == before


def test_the_output_of_another_command_is_replaced(served: TestHub, tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "out", Making(is_folder=True, plan_id="other")) as other:
        other.write_file("adapter_config.json", b"{}")
        other.commit({})
    assert call(served, tmp_path, "pull", "me/x", "-o", "out", "--force")[0] == 0
    assert tree(tmp_path / "out") == expected(OLD, "me/x")


def test_a_file_in_the_way(served: TestHub, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    code, text = call(served, tmp_path, "pull", "me/x", "-o", "out", "--force")
    assert code == 5 and "LT-521" in text and (tmp_path / "out").read_text() == "mine"
