"""``loratool doctor``: what it says is so, and what it says to type works."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

import loratool as lt
from loratool.engine.executors import choose_executor, decide_executor
from loratool.engine.machine import available_memory
from loratool.ops.installed import EXTRAS, pip_install
from loratool.report.doctor import Package
from loratool.store.bandwidth import takes_direct

from .conftest import Run

ROOT = Path(lt.__file__).parents[1]
SECRET = "hf_" + "a" * 30


def test_a_screen(run: Run) -> None:
    found = run("doctor", "--offline")
    assert found.code == 0, found.out
    assert torch.__version__ in found.out and "--device cpu: no GPU" in found.out
    assert len(found.out.splitlines()) <= 30  # one screen


def test_what_it_says_is_so(run: Run) -> None:
    report = run("doctor", "--offline", "--json").json
    assert report["ok"] and report["command"] == "doctor" and report["version"] == lt.__version__
    assert report["torch"]["version"] == torch.__version__ and report["torch"]["error"] is None
    assert report["cores"] == len(os.sched_getaffinity(0))
    assert abs(report["memory_bytes"] - (available_memory() or 0)) < 4e9
    assert [d["place"] for d in report["disks"]] == ["here", "temporary", "hub cache"]
    assert all(d["free_bytes"] > 0 and d["is_writable"] for d in report["disks"])


def test_the_token_is_not_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    found = run("doctor", "--offline")
    assert "token from HF_TOKEN" in found.out and SECRET not in found.out + found.err
    found = run("doctor", "--offline", "--json")
    assert found.json["hub"]["token_from"] == "HF_TOKEN" and SECRET not in found.out


def test_the_extras_are_those_of_the_package() -> None:
    """Those for users; what each takes is read from the installed package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"]) - {"test", "docs"}
    page = (ROOT / "docs" / "installing.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page, re.M))
    assert {name: gives.replace("`", "") for name, gives in rows.items()} == EXTRAS


def test_what_a_package_needs(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    lines = ["click>=8.1", "numpy>=999", "nothing-of-this-name>=1", "isal; os_name == 'no such'",
             "matplotlib>=3.8; extra == 'plot'", "ray>=999999; extra == 'ray'",
             "numpy; extra == 'gguf'"]  # fmt: skip
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    found = run("doctor", "--offline", "--json")
    assert found.code == 10 and not found.json["ok"]
    fits = {p["name"]: p["fits"] for p in found.json["requires"]}
    assert fits == {"click": True, "numpy": False, "nothing-of-this-name": False}
    there = {e["name"]: e["is_there"] for e in found.json["extras"]}
    assert there["plot"] and not there["ray"]
    (broken,) = [f for f in found.json["findings"] if f["is_broken"]]
    assert broken["do"].endswith("pip install 'numpy>=999' 'nothing-of-this-name>=1'")
    text = run("doctor", "--offline").out
    assert "pip install 'ray>=999999'" in text and "every command can run" not in text


def test_pip_is_that_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = [Package("torch", ">=2.6", None, False)]
    monkeypatch.setenv("PATH", "")
    assert pip_install(packages) == f"{sys.executable} -m pip install 'torch>=2.6'"


def test_torch_that_cannot_be_imported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "loratool.engine.device", None)
    found = run("doctor", "--offline")
    assert found.code == 10 and "torch" in found.out and "--force-reinstall" in found.out
    assert "every command can run" not in found.out


def test_auto_is_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    at = "loratool.engine.executors."
    for cores, forks, crowded, name, why in (
        (3, True, 1 << 40, "threads", "3 usable"), (4, False, 1 << 40, "threads", "cannot be"),
        (4, True, (1 << 30) - 1, "threads", "1 GiB"), (4, True, 1 << 30, "processes", "1 GiB"),
    ):  # fmt: skip
        monkeypatch.setattr(f"{at}usable_cores", lambda n=cores: n)
        monkeypatch.setattr(f"{at}can_fork", lambda is_so=forks: is_so)
        found, words = decide_executor(crowded)
        assert (found, why in words) == (name, True)
        assert choose_executor("auto", crowded=crowded) == name
        assert choose_executor("ray", crowded=crowded) == "ray"


def test_direct_writes_leave_nothing(tmp_path: Path) -> None:
    assert takes_direct(tmp_path) in (True, False, None)
    assert list(tmp_path.iterdir()) == []
    assert takes_direct(tmp_path / "not there") is None


def test_a_working_folder_that_is_gone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    found = run("doctor", "--offline")
    assert found.code == 0 and "cd to another folder" in found.out, found
