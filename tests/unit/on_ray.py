"""A Ray cluster of two workers on this machine, and a reader that dies in the middle of a step."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loratool.adapter import TensorRef
from loratool.store.far_reader import FarReader


@contextmanager
def two_workers(*modules: str) -> Iterator[Any]:
    """A cluster; its workers find no test modules, and get these with what is sent to them."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in (__name__, *modules):
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


class Fatal(FarReader):
    """Kills its process in the second piece of a step, once: a file says whether it still may."""

    reads = 0

    def read_into(self, ref: TensorRef, start: int, buffer: memoryview) -> None:
        flag = ref.path.parent.parent / "flag"
        if start and flag.exists() and flag.read_text() != str(os.getpid()):
            Fatal.reads += 1
            if Fatal.reads == 2:
                flag.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        super().read_into(ref, start, buffer)


def killed_in_a_step(run: Callable[[], object], top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on Ray with inputs in a folder, one of whose workers dies when it wrote part of it."""
    from loratool.engine.executors import ray as executor

    monkeypatch.setattr(executor, "FarReader", Fatal)
    flag = top / "flag"
    flag.write_text(str(os.getpid()))
    run()
    assert not flag.exists()
