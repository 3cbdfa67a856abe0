"""The Xet path, through a content store in a folder; skipped if the client loses that scheme."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loratool.store import hub_download
from tests.hub.client import call, finish, start, tree
from tests.hub_server import TestHub
from tests.hub_server.state import sha256
from tests.make import random_factors, save_adapter

hf_xet = pytest.importorskip("hf_xet")
WEIGHTS = "adapter_model.safetensors"


XET = {"HF_HUB_DISABLE_XET": "0"}
READ = """
import sys, hf_xet
with hf_xet.XetSession().new_file_download_group(endpoint=sys.argv[1]) as group:
    group.start_download_file(hf_xet.XetFileInfo(sys.argv[2]), sys.argv[3])
"""
PROBE = """
import sys, hf_xet
with hf_xet.XetSession().new_upload_commit(endpoint=sys.argv[1]) as commit:
    commit.start_upload_file(sys.argv[2], sha256=hf_xet.SKIP_SHA256)
"""


def in_a_process(code: str, *words: str) -> None:
    """A session holds its store as long as its process lives."""
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


def stored(place: str, name: str, path: Path) -> bytes:
    in_a_process(READ, place, name, str(path))
    return path.read_bytes()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[TestHub]:
    place, probe = f"local://{tmp_path}/store", tmp_path / "probe"
    probe.write_bytes(b"x" * 1000)
    try:
        in_a_process(PROBE, place, str(probe))
        name = hf_xet.hash_files([str(probe)])[0].hash
        assert stored(place, name, tmp_path / "probe.back") == b"x" * 1000
    except (subprocess.CalledProcessError, AttributeError) as error:
        pytest.skip(f"no content store in a folder: {type(error).__name__}")
    with TestHub() as hub:
        hub.state.xet_place = place
        yield hub


@pytest.fixture
def style(tmp_path: Path) -> Path:
    shapes = {f"model.layers.{i}.q_proj": (256, 256) for i in range(4)}
    factors = random_factors(shapes, rank=32, seed=2)
    return save_adapter(tmp_path / "style", factors, base_model_name_or_path="org/base")


def loratool(hub: TestHub, home: Path, *words: str) -> str:
    code, text = finish(start(hub.endpoint, home, *words, **XET))
    assert code == 0, text
    assert hub.state.xet_token not in text
    return text


def test_push_and_pull(
    served: TestHub, tmp_path: Path, style: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tree(style)
    name = hf_xet.hash_files([str(style / WEIGHTS)])[0].hash
    # The Hub takes the client's word for the content until the store is free to be read.
    served.state.xet_hashes[sha256(files[WEIGHTS])] = name
    served.state.from_xet = {name: files[WEIGHTS]}.__getitem__
    loratool(served, tmp_path, "push", "style", "me/style")
    assert not [path for path, _ in served.state.uploads if path.startswith("/lfs/")]
    assert stored(str(served.state.xet_place), name, tmp_path / "stored") == files[WEIGHTS]
    repo = served.state.repos["me/style"]
    assert repo.commits[repo.branches["main"]][WEIGHTS] == files[WEIGHTS]
    # Down they go by ranges, which can go on where a connection broke ...
    loratool(served, tmp_path, "pull", "me/style", "-o", "back")
    assert served.state.requests["cdn"] == 1
    back = tree(tmp_path / "back")
    assert {n: back[n] for n in files} == files
    # ... and very large files, such as this one from now on, through Xet.
    monkeypatch.setattr(hub_download, "_XET_BYTES", len(files[WEIGHTS]))
    (tmp_path / "hf").rename(tmp_path / "old")
    words = ("pull", "me/style", "-o", "again")
    code, text = call(served, tmp_path, *words, HF_HUB_DISABLE_XET=False)
    assert code == 0 and served.state.requests["cdn"] == 1, text
    assert tree(tmp_path / "again") == back


def test_a_hub_without_xet(served: TestHub, tmp_path: Path, style: Path) -> None:
    served.state.xet_place = None
    words = ("push", "style", "me/style", "-v")
    code, text = finish(start(served.endpoint, tmp_path, *words, **XET))
    assert code == 7 and "LT-705" in text and "HF_HUB_DISABLE_XET=1" in text
    assert finish(start(served.endpoint, tmp_path, *words))[0] == 0


def test_a_store_that_fails(served: TestHub, tmp_path: Path, style: Path) -> None:
    """A session of another process holds this one."""
    code = f"{PROBE}\nprint('held', flush=True)\nsys.stdin.read()"
    words = (str(served.state.xet_place), str(tmp_path / "probe"))
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        push = start(served.endpoint, tmp_path, "push", "style", "me/style", "-v", **XET)
        status, text = finish(push)
        holder.communicate(b"")
    assert status == 7 and "LT-722" in text and served.state.xet_token not in text
    assert len(served.state.repos["me/style"].commits) == 1
