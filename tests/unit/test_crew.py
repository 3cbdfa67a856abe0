"""Threads that help one of them, and the passes of a method that they share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import loratool as lt
from loratool.engine.workers import Crew
from tests.make import randn, random_factors, save_adapter, save_checkpoint


def beside(count: int, work: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_helpers_share_the_work_of_every_round() -> None:
    crew, meeting, seen = Crew(), threading.Barrier(3), set()

    def work(item: int) -> None:
        meeting.wait(30)  # all three must be at it
        seen.add((item, threading.get_ident()))

    helpers = beside(2, crew.help)
    with crew:
        crew.share(work, range(3))
        crew.share(work, range(3, 6))
    for helper in helpers:
        helper.join(30)
        assert not helper.is_alive()
    assert sorted(item for item, _ in seen) == list(range(6))
    assert len({thread for _, thread in seen}) == 3


def test_what_a_helper_raises_is_everybodys() -> None:
    crew, caught, begun = Crew(), [], threading.Event()
    leader = threading.get_ident()

    def work(item: int) -> None:
        if threading.get_ident() == leader:
            begun.wait(30)  # leaves the other item to the helper
            return
        begun.set()
        raise ValueError("broken")

    def help_and_tell() -> None:
        try:
            crew.help()
        except ValueError as error:
            caught.append(str(error))

    helpers = beside(2, help_and_tell)
    with pytest.raises(ValueError, match="broken"), crew:
        crew.share(work, range(9))
    for helper in helpers:
        helper.join(30)
    assert caught == ["broken", "broken"]


@pytest.mark.parametrize("method", ["ties", "sce", "breadcrumbs"])
def test_passes_do_not_depend_on_threads(method: str, tmp_path: Path) -> None:
    """Five pieces of a tensor, equal sizes among its elements, so that ties are counted too."""
    shapes = {"model.up_proj": (2500, 1024)}
    base = save_checkpoint(tmp_path / "base", {"model.up_proj.weight": randn(2500, 1024, seed=0)})
    adapters = []
    for seed in (1, 2, 3):
        factors = random_factors(shapes, rank=1, seed=seed)
        coarse = {
            k: tuple((8 * v / v.abs().max()).round() / 8 for v in pair)
            for k, pair in factors.items()
        }
        adapters.append(str(save_adapter(tmp_path / f"a{seed}", coarse)))
    made = []
    for threads in (1, 4):
        out = tmp_path / f"out{threads}"
        lt.merge(adapters, base=base, output=out, method=method, threads=threads,
                 chunk_bytes=2 << 20)  # fmt: skip
        made.append((out / "model.safetensors").read_bytes())
    assert made[0] == made[1]
