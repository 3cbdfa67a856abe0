"""Memory of merging adapters with each other: no out×in matrix in core space, and plans that hold.

Every measurement is of a fresh process: VmHWM at its end, minus VmHWM after a merge of tiny
adapters in the same process, which is the interpreter with everything loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loratool.engine.buffers import TORCH_DTYPES
from loratool.engine.step_memory import is_iterative
from loratool.linalg.lanczos import is_worthwhile
from loratool.methods import METHODS
from tests.budget import held
from tests.make import randn, random_factors, save_adapter, save_checkpoint

CORE = [m.name for m in METHODS if m.space in ("core", "joint")]
DENSE_BYTES = 8192 * 8192 * 4
"""One out×in matrix of float32: 268 MB."""


def make(folder: Path, shapes: dict[str, tuple[int, int]], *, rank: int, count: int) -> None:
    for number in range(count):
        save_adapter(folder / f"in{number}", random_factors(shapes, rank=rank, seed=50 * number))
    for number in range(2):
        save_adapter(folder / f"tiny{number}", random_factors({"m": (9, 8)}, rank=2, seed=number))


def measure(folder: Path, *jobs: dict[str, Any], is_live: bool = False) -> tuple[int, int]:
    """(bytes beyond the interpreter, planned bytes beyond the interpreter)."""
    warm, calls = [], []
    for method in dict.fromkeys(job["method"] for job in jobs):
        tiny = [str(folder / f"tiny{i}") for i in range(2)]
        options = {"method": method, "weights": [0.5, 0.5], "force": True}
        warm.append(("merge", [tiny], {"output": folder / f"warm-{method}", **options}))
        if "base" in jobs[0]:
            base = {"output": folder / f"warm-base-{method}", "base": folder / "tiny-base"}
            warm.append(("merge", [tiny], {**base, **options}))
    for number, job in enumerate(jobs):
        count = job.pop("count")
        sources = [str(folder / f"in{i}") for i in range(count)]
        more = {"output": folder / f"out{number}", "weights": [1 / count] * count, "force": True}
        calls.append(("merge", [sources], {**more, **job}))
    found = held.measure(warm, calls, is_live=is_live)
    return found.taken, found.planned


def test_the_plan_knows_which_truncation_runs() -> None:
    for short in (16, 32, 57, 96, 1024, 4096):
        for rank in (1, 4, 7, 16, 64, 200, 248, 300):
            assert is_iterative(short, rank) == is_worthwhile((short, 5000), rank)


def core_bound(size: int, rank: int, count: int) -> int:
    """What methods in core space may take, from the sizes of the factors alone.

    F = 8·R·(out + in) bytes hold all factors in float64, R = T·r.  No more than six such sets are
    alive at once: loaded; scaled lora_B (half of one); the left basis, the right stack, its Q and
    its basis (two in all); then result, singular vectors and balanced factors; then balanced
    factors, stored ones, differences, and the bytes to be written.  T cores of R×R, their masks
    and the singular vectors of their sum; blocks of KnOTS; the buffers of one more thread.
    At r = 64, T = 8: 6·67 + 42 + 28 MB = 473 MB, a fifth of the 2.4 GB that a method on ΔW has
    in eight float32 matrices and their result, and R×R for out×in wherever something is squared.
    """
    total = rank * count
    factors = 8 * total * 2 * size
    cores = 8 * total**2 * (count + 12)
    return 6 * factors + cores + 28_000_000


@pytest.mark.parametrize("method", CORE)
@pytest.mark.slow
def test_core_space_needs_no_dense_matrix(method: str, tmp_path: Path) -> None:
    """8192×8192, r = 64, T = 8."""
    make(tmp_path, {"m": (8192, 8192)}, rank=64, count=8)
    taken, planned = measure(tmp_path, {"method": method, "count": 8}, is_live=True)
    assert taken <= core_bound(8192, 64, 8) <= 9 * DENSE_BYTES / 5
    assert taken <= planned


def test_all_of_core_space_at_a_lower_rank(tmp_path: Path) -> None:
    """8192×8192, r = 16, T = 8, one method after the other in one process."""
    make(tmp_path, {"m": (8192, 8192)}, rank=16, count=8)
    jobs = ({"method": m, "count": 8} for m in CORE)
    taken, planned = measure(tmp_path, *jobs, is_live=True)
    assert taken <= core_bound(8192, 16, 8) <= DENSE_BYTES / 1.9
    assert taken <= planned


def plans() -> list[Any]:
    quick = [("ties", {}), ("dare", {}), ("svd", {}), ("core", {})]
    slow = [("ties", {"rank": 300}), ("cat", {}), ("della", {}), ("sce", {}), ("knots-ties", {}),
            ("factors-ties", {})]  # fmt: skip
    found = [pytest.param(name, more, 2, id=name) for name, more in quick]
    for name, more in (*quick, *slow):
        for threads in (1, 2) if (name, more) in slow else (1,):
            label = "-".join([name, *map(str, more.values()), str(threads)])
            found.append(pytest.param(name, more, threads, id=label, marks=pytest.mark.slow))
    return found


@pytest.mark.parametrize(("method", "options", "threads"), plans())
def test_plans_hold(method: str, options: dict[str, Any], threads: int, tmp_path: Path) -> None:
    """What is planned beyond the interpreter is not less than what is taken beyond it."""
    shapes = {f"m{i}": (1024, 1536) for i in range(3)}
    make(tmp_path, shapes, rank=16, count=4)
    taken, planned = measure(
        tmp_path, {"method": method, "count": 4, "threads": threads, **options}
    )
    assert taken <= planned


def base_plans() -> list[Any]:
    found = [pytest.param("ties", "BF16", 2, id="ties")]
    for method in ("ties", "ties-peft", "dare", "della", "sce"):
        for dtype in ("BF16", "F32"):
            found.append(pytest.param(method, dtype, 1, marks=pytest.mark.slow,
                                      id=f"{method}-{dtype}"))  # fmt: skip
    return found


@pytest.mark.parametrize(("method", "dtype", "threads"), base_plans())
def test_plans_into_a_base_hold(method: str, dtype: str, threads: int, tmp_path: Path) -> None:
    shapes = {f"m{i}": (2048, 2048) for i in range(2)}
    make(tmp_path, shapes, rank=16, count=4)
    kind = TORCH_DTYPES[dtype]
    save_checkpoint(tmp_path / "tiny-base", {"m.weight": randn(9, 8, seed=1).to(kind)})
    save_checkpoint(
        tmp_path / "base", {f"{m}.weight": randn(*s, seed=2).to(kind) for m, s in shapes.items()}
    )
    taken, planned = measure(
        tmp_path,
        {"method": method, "count": 4, "threads": threads, "base": str(tmp_path / "base")},
    )
    assert taken <= planned
