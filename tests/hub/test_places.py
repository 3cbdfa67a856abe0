"""Caches that cannot be written, and a network that must not be used."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hub.client import call, finish, start, tree
from tests.hub_server import TestHub
from tests.hub_server.state import Tree

WEIGHTS = "adapter_model.safetensors"
FILES: Tree = {"adapter_config.json": b"{}", WEIGHTS: random.Random(9).randbytes(300_000)}
PULL = ("pull", "me/x", "-o", "out")


@pytest.fixture
def served() -> Iterator[TestHub]:
    with TestHub() as hub:
        hub.state.add_repo("me/x", FILES)
        yield hub


@contextmanager
def mounted(folder: Path, *words: str) -> Iterator[None]:
    """Something mounted on a folder: for the superuser permissions mean nothing."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", *words, str(folder)], check=False, capture_output=True)
    if done.returncode != 0:
        pytest.skip("no mounting in this container")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield


def test_a_cache_that_is_read_only(served: TestHub, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with read_only(tmp_path / "hf"):
        code, text = call(served, tmp_path, *PULL, "-v")
    assert code == 6 and "LT-607" in text and "Read-only" in text and "HF_HOME" in text
    assert str(tmp_path / "hf" / "hub") in text and "Traceback" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert served.state.requests["resolve"] == 0


def test_a_complete_cache_may_be_read_only(served: TestHub, tmp_path: Path) -> None:
    assert call(served, tmp_path, "pull", "me/x")[0] == 0
    fetched = served.state.requests["resolve"]
    with read_only(tmp_path / "hf"):
        assert call(served, tmp_path, "pull", "me/x@main", "-o", "out")[0] == 0
        code, text = call(served, tmp_path, "pull", "me/x", "--offline", "-o", "again")
    assert code == 0, text
    assert tree(tmp_path / "out") == tree(tmp_path / "again") == FILES
    assert served.state.requests["resolve"] == fetched
    blob = next((tmp_path / "hf").rglob(f"snapshots/*/{WEIGHTS}")).resolve()
    blob.write_bytes(b"x")  # damaged, and cannot be replaced
    with read_only(tmp_path / "hf"):
        code, text = call(served, tmp_path, "pull", "me/x", "-o", "bad")
    assert code == 6 and "LT-607" in text and not (tmp_path / "bad").exists()


def test_a_cache_that_is_a_file(served: TestHub, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("x")
    code, text = call(served, tmp_path, *PULL)
    assert code == 6 and "LT-607" in text and not (tmp_path / "out").exists()


def test_a_system_without_links(
    served: TestHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert call(served, tmp_path, *PULL)[0] == 0
    assert tree(tmp_path / "out") == FILES
    (copy,) = (tmp_path / "hf").rglob(f"snapshots/*/{WEIGHTS}")
    assert not copy.is_symlink() and copy.read_bytes() == FILES[WEIGHTS]
    copy.write_bytes(b"x" * len(FILES[WEIGHTS]))  # damaged: made anew from the blob
    assert call(served, tmp_path, "pull", "me/x", "-o", "again")[0] == 0
    assert tree(tmp_path / "again") == FILES and served.state.requests["cdn"] == 1


def test_a_disk_that_is_too_small(served: TestHub, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with mounted(tmp_path / "hf", "-t", "tmpfs", "-o", "size=128k", "tmpfs"):
        code, text = call(served, tmp_path, *PULL)
    assert code == 6 and "LT-620" in text and not (tmp_path / "out").exists()
    assert served.state.requests["cdn"] == 0


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_push_while_offline(served: TestHub, tmp_path: Path, data: Path) -> None:
    source = data / "llm" / "lora_bias_all"
    shutil.copytree(source, tmp_path / "style")
    strace = ("strace", "-f", "-e", "trace=connect,sendto", "-o", str(tmp_path / "trace"))
    words = ("push", "style", "me/style", "-v")
    process = start(served.endpoint, tmp_path, *words, before=strace, HF_HUB_OFFLINE="1")
    code, text = finish(process)
    assert code == 7 and "LT-711" in text and "HF_HUB_OFFLINE" in text
    assert "AF_INET" not in (tmp_path / "trace").read_text()
    assert not served.state.requests
