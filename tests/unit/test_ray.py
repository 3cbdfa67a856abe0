"""Steps as tasks of a Ray cluster of two workers on this machine.

Ray is large, so that the `test` extra does not bring it: ``pip install -e '.[ray]'``, then
``python -m pytest tests/unit/test_ray.py``.  How the driver deals with lost workers is tested
without it in `test_whole_steps`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loratool as lt
from loratool.adapter import TensorRef
from loratool.errors import DiskError, NumericError, UsageError
from loratool.store.far_reader import FarReader
from tests.make import randn, random_factors, save_adapter, save_checkpoint
from tests.unit.on_ray import killed_in_a_step, two_workers
from tests.unit.test_executors import COMMANDS, call, contents, inputs, long_step

__all__ = ["inputs"]


def test_without_ray_it_says_how_to_get_it(tmp_path: Path) -> None:
    """Before the work, and nothing is left."""
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from loratool.cli import run\n"
        "sys.exit(run(['merge', 'a', '--base', 'b', '-o', 'out', '--executor', 'ray']))"
    )
    save_checkpoint(tmp_path / "b", {"model.layers.0.q_proj.weight": randn(8, 8, seed=1)})
    save_adapter(tmp_path / "a", random_factors({"model.layers.0.q_proj": (8, 8)}, rank=2, seed=1))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "LT-277" in done.stderr and "pip install 'loratool[ray]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_address_is_for_ray(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        lt.merge(["a"], base="b", output=tmp_path / "out", ray_address="127.0.0.1:1")
    assert caught.value.code == "LT-279"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_workers(__name__) as ray:
        yield ray


@pytest.mark.parametrize("command", [*COMMANDS, "file"])
def test_ray_writes_the_same(command: str, inputs: Path, tmp_path: Path, cluster: Any) -> None:
    call(command, inputs, tmp_path / "threads")
    call(command, inputs, tmp_path / "ray", "ray")
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")


def test_inputs_may_be_named_relatively(
    inputs: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are somewhere else."""
    call("merge", inputs, tmp_path / "threads")
    monkeypatch.chdir(tmp_path)
    call("merge", Path(os.path.relpath(inputs)), Path("ray"), "ray")
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")


@pytest.mark.parametrize("command", ["merge", "extract"])
def test_killed_in_the_middle_of_a_step(
    command: str, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part of the tensor is written by then."""
    long_step(tmp_path, monkeypatch)
    call(command, tmp_path, tmp_path / "threads")
    killed_in_a_step(
        lambda: call(command, tmp_path, tmp_path / "ray", "ray"), tmp_path, monkeypatch
    )
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")


class Deadly(FarReader):
    """No process survives it."""

    def read_into(self, ref: TensorRef, start: int, buffer: memoryview) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_step_that_kills_every_worker(
    inputs: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool.engine.executors import ray as executor

    with monkeypatch.context() as patch:
        patch.setattr(executor, "FarReader", Deadly)
        with pytest.raises(DiskError) as caught:
            call("merge", inputs, tmp_path / "out", "ray")
    assert caught.value.code == "LT-606" and "4 died" in str(caught.value)
    assert not (tmp_path / "out").exists()
    call("merge", inputs, tmp_path / "out", "ray")
    call("merge", inputs, tmp_path / "clean")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_errors_come_through(tmp_path: Path, cluster: Any) -> None:
    weight = randn(96, 64, seed=1)
    weight[0, 0] = float("nan")
    shapes = {"model.layers.0.q_proj": (96, 64)}
    save_checkpoint(tmp_path / "base", {"model.layers.0.q_proj.weight": weight})
    save_adapter(tmp_path / "a", random_factors(shapes, rank=2, seed=1))
    with pytest.raises(NumericError) as caught:
        lt.merge([tmp_path / "a"], base=tmp_path / "base", output=tmp_path / "out", executor="ray")
    assert caught.value.code == "LT-804" and caught.value.key is not None


def test_another_version_on_a_node_is_refused(
    inputs: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratool.engine.executors import ray as executor

    monkeypatch.setattr(executor, "__version__", "9.9")
    with pytest.raises(UsageError) as caught:
        call("merge", inputs, tmp_path / "out", "ray")
    assert caught.value.code == "LT-278" and "9.9" in str(caught.value)


def test_no_cluster_at_an_address(inputs: Path, tmp_path: Path) -> None:
    """In a process of its own: this one may be connected."""
    pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")
    words = ["merge", "a1", "--base", "base", "-o", str(tmp_path / "out"), "--executor", "ray",
             "--ray-address", "127.0.0.1:1"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "loratool", *words], cwd=inputs,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert "LT-617" in done.stderr and not (tmp_path / "out").exists()
