"""`pull` against the test Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.client import TOKEN, call, run, tree
from tests.hub_server import Fault, TestHub

FILES = {
    "adapter_config.json": b'{"base_model_name_or_path": "org/base"}',
    "adapter_model.safetensors": os.urandom(300_000),
    "optimizer.pt": b"x",
    "sub/adapter_config.json": b"{}",
    "sub/adapter_model.safetensors": os.urandom(2000),
}


@pytest.fixture
def served() -> Iterator[TestHub]:
    with TestHub() as hub:
        yield hub


def test_adapter_files_byte_for_byte(served: TestHub, tmp_path: Path) -> None:
    served.state.add_repo("me/x", FILES, private=True)
    code, text = run(served, tmp_path, "pull", "me/x", "-o", "out")
    assert code == 0 and "org/base (not fetched)" in text
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert tree(tmp_path / "out") == {n: FILES[n] for n in names}
    assert served.state.tokens_on_cdn == 0
    code, text = run(served, tmp_path, "pull", "me/x", "-o", "out")
    assert code == 5 and "LT-501" in text


def test_sub_folder_and_everything(served: TestHub, tmp_path: Path) -> None:
    served.state.add_repo("me/x", FILES)
    assert call(served, tmp_path, "pull", "hf://me/x/sub", "-o", "sub")[0] == 0
    assert tree(tmp_path / "sub") == {n[4:]: FILES[n] for n in FILES if n.startswith("sub/")}
    assert call(served, tmp_path, "pull", "me/x", "--all", "-o", "all")[0] == 0
    assert tree(tmp_path / "all") == {".gitattributes": b"", **FILES}


def test_same_size_wrong_bytes(served: TestHub, tmp_path: Path) -> None:
    served.state.add_repo("me/x", FILES)
    served.state.faults = [Fault("GET /cdn/", "corrupt", times=1)]
    assert call(served, tmp_path, "pull", "me/x", "-o", "once")[0] == 0
    assert tree(tmp_path / "once")["adapter_model.safetensors"] == FILES[
        "adapter_model.safetensors"
    ]  # fmt: skip
    home = tmp_path / "fresh"
    home.mkdir()
    served.state.faults = [Fault("GET /cdn/", "corrupt", times=2)]
    code, text = call(served, home, "pull", "me/x", "-o", "twice")
    assert code == 7 and "LT-710" in text and not (home / "twice").exists()


def test_cut_connection(served: TestHub, tmp_path: Path) -> None:
    served.state.add_repo("me/x", FILES)
    served.state.faults = [Fault("GET /cdn/", "cut")]
    assert call(served, tmp_path, "pull", "me/x", "-o", "out")[0] == 0
    assert tree(tmp_path / "out")["adapter_model.safetensors"] == FILES["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("repo", "token", "code", "says"),
    [
        ("me/gone", TOKEN, 7, "LT-702"),
        ("you/private", TOKEN, 7, "LT-702"),
        ("you/gated", TOKEN, 7, "LT-701"),
        ("you/open@v9", TOKEN, 7, "LT-703"),
        ("you/open", "hf_nobodynobodynobodynobody", 7, "LT-707"),
        ("hf_abcdefghijklmnopqrstuvw/x", TOKEN, 2, "LT-264"),
        ("you/base", TOKEN, 7, "LT-704"),
    ],
)
def test_refusals(
    served: TestHub, tmp_path: Path, repo: str, token: str, code: int, says: str
) -> None:
    served.state.add_repo("you/private", FILES, private=True)
    served.state.add_repo("you/gated", FILES, gated=True)
    served.state.add_repo("you/open", FILES)
    served.state.add_repo("you/base", {"model.gguf": b"x"})
    found, text = call(served, tmp_path, "pull", repo, "-o", "out", token=token)
    assert (found, says in text) == (code, True), text
    assert not (tmp_path / "out").exists()


def test_json_report(served: TestHub, tmp_path: Path) -> None:
    repo = served.state.add_repo("me/x", FILES)
    code, text = call(served, tmp_path, "pull", "me/x", "--dry-run", "--json")
    found = json.loads(text)
    assert code == 0 and found["commit"] == repo.branches["main"] and found["output"] is None
    assert served.state.requests["resolve"] == 0


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("how", ["option", "environment"])
def test_offline_makes_no_connection(served: TestHub, tmp_path: Path, data: Path, how: str) -> None:
    source = data / "llm" / "lora_bias_all"
    names = ("adapter_config.json", "adapter_model.safetensors")
    served.state.add_repo("me/x", {n: (source / n).read_bytes() for n in names})
    assert call(served, tmp_path, "pull", "me/x")[0] == 0
    asked = sum(served.state.requests.values())
    trace = tmp_path / "trace"
    words = ["inspect", "hf://me/x", *(["--offline"] if how == "option" else [])]
    env = {"HF_ENDPOINT": served.endpoint, "HF_HOME": str(tmp_path / "hf"),
           "PYTHONPATH": str(Path(__file__).parents[2])}  # fmt: skip
    env |= {"HF_HUB_OFFLINE": "1"} if how == "environment" else {}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    command = ["strace", "-f", "-e", "trace=connect,sendto", "-o", str(trace), sys.executable]
    found = subprocess.run(
        [*command, "-m", "loratool", *words], env=clean | env, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "AF_INET" not in trace.read_text()
    assert sum(served.state.requests.values()) == asked


def test_offline_pull_verifies_the_cache(served: TestHub, tmp_path: Path) -> None:
    served.state.add_repo("me/x", FILES)
    assert call(served, tmp_path, "pull", "me/x")[0] == 0
    asked = sum(served.state.requests.values())
    assert call(served, tmp_path, "pull", "me/x", "--offline", "-o", "out")[0] == 0
    name = "adapter_model.safetensors"
    assert tree(tmp_path / "out")[name] == FILES[name]
    code, text = call(served, tmp_path, "pull", "me/y", "--offline", "-o", "y")
    assert code == 7 and "LT-706" in text
    assert sum(served.state.requests.values()) == asked
    blob = next((tmp_path / "hf").rglob(f"snapshots/*/{name}")).resolve()
    blob.write_bytes(b"x" * len(FILES[name]))
    code, text = call(served, tmp_path, "pull", "me/x", "--offline", "-o", "bad")
    assert code == 7 and "LT-710" in text and not (tmp_path / "bad").exists()


@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "sql/adapter_model.safetensors"])
def test_a_cached_copy_without_weights(served: TestHub, tmp_path: Path, lost: str) -> None:
    """As after a download of the configuration alone, or with what is missing a broken link."""
    style = {n: d for n, d in FILES.items() if n.startswith("adapter")}
    prefix = lost.removesuffix("adapter_model.safetensors")
    files = {f"{prefix}{n}": d for n, d in style.items()}
    if prefix:
        files |= {f"art/{n}": d + b" " for n, d in style.items()}
    served.state.add_repo("me/x", files)
    assert call(served, tmp_path, "pull", "me/x")[0] == 0
    asked = sum(served.state.requests.values())
    pointer = next((tmp_path / "hf").rglob(f"snapshots/*/{lost}"))
    for path in (pointer.resolve(), pointer):
        path.unlink()
        for words in (
            ("pull", "me/x", "-o", "out"), ("pull", "me/x", "--all", "-o", "out"),
            ("inspect", f"hf://me/x/{prefix}".rstrip("/")),
        ):  # fmt: skip
            code, text = call(served, tmp_path, *words, "--offline")
            assert code == 7 and "LT-706" in text and "the weights" in text, text
            assert not (tmp_path / "out").exists()
    if prefix:
        assert call(served, tmp_path, "pull", "hf://me/x/art", "--offline", "-o", "out")[0] == 0
    assert sum(served.state.requests.values()) == asked


def test_very_many_files_need_consent(served: TestHub, tmp_path: Path) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    served.state.add_repo("me/x", {f"{i:03}/{n}": b"{}" for i in range(501) for n in names})
    code, text = call(served, tmp_path, "pull", "me/x", "-o", "out")
    assert code == 2 and "LT-265" in text and "1,002 files" in text
    assert not served.state.asked


def test_missing_file_lists_candidates(served: TestHub, tmp_path: Path) -> None:
    many = {f"{n}/adapter_config.json": b"{}" for n in ("sql", "style")}
    served.state.add_repo("me/loras", many)
    for repo in ("me/loras", "hf://me/loras/code"):
        code, text = call(served, tmp_path, "pull", repo, "-o", "out")
        assert code == 7 and "LT-704" in text and "sql/, style/" in text


@pytest.mark.parametrize("status", [429, 503])
def test_busy_hub(served: TestHub, tmp_path: Path, status: int) -> None:
    served.state.add_repo("me/x", FILES)
    wait = {"Retry-After": "1"} if status == 429 else {}
    served.state.faults = [Fault("GET /api/models/", "status", status, 1, wait)]
    assert call(served, tmp_path, "pull", "me/x", "-o", "once")[0] == 0
    served.state.faults = [Fault("GET /api/models/", "status", status, 99, {"Retry-After": "99"})]
    code, text = call(served, tmp_path, "pull", "me/x", "-o", "never")
    assert code == 7 and "LT-709" in text and f"{status}" in text
    assert not (tmp_path / "never").exists()


def test_a_cached_copy_serves_only_if_the_hub_is_out_of_reach(
    served: TestHub, tmp_path: Path, data: Path
) -> None:
    source = data / "llm" / "lora_bias_all"
    names = ("adapter_config.json", "adapter_model.safetensors")
    served.state.add_repo("me/x", {n: (source / n).read_bytes() for n in names})
    assert call(served, tmp_path, "pull", "me/x")[0] == 0
    served.state.faults = [Fault(".", "status", 503, 99)]
    code, text = call(served, tmp_path, "inspect", "hf://me/x")
    assert code == 0 and "a cached copy" in text
    served.state.faults = []
    code, text = call(served, tmp_path, "inspect", "hf://me/x", token="hf_nobodynobodynobodynobody")
    assert code == 7 and "LT-707" in text
    del served.state.repos["me/x"]
    code, text = call(served, tmp_path, "inspect", "hf://me/x")
    assert code == 7 and "LT-702" in text
