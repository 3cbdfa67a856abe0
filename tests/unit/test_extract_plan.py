"""Steps of one shape put together, as a GPU takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratool.ops.extract import FactorOptions, group_steps, plan_extract
from loratool.ops.rank_options import Ranks
from loratool.store.checkpoint import open_checkpoint
from tests.oracle.test_extract_ranks import bf16_pair


@pytest.mark.parametrize("options", [{"rule": {"rank": 8}}, {"auto": True}])
def test_batched_factors_are_as_good(tmp_path: Path, options: dict[str, object]) -> None:
    """Run on the CPU what only a GPU gets: every pair keeps its own error and rank."""
    from loratool.engine.run import RunOptions, execute
    from loratool.store.reader import FileReader

    base, tuned = bf16_pair(tmp_path)
    how = FactorOptions(Ranks(**options))  # type: ignore[arg-type]
    plan = plan_extract(open_checkpoint(tuned), open_checkpoint(base), how=how).plan
    grouped, positions = group_steps(plan, 1 << 30)
    assert sorted(i for g in positions for i in g) == list(range(len(plan.steps)))
    assert max(len(g) for g in positions) == 2  # two layers of each shape, and a norm
    with FileReader() as reader:
        single = [r for (r,) in execute(plan, reader, None, RunOptions())]
        batched = execute(grouped, reader, None, RunOptions(threads=3))
    for at, results in zip(positions, batched, strict=True):
        for index, result in zip(at, results, strict=True):
            want = single[index]
            assert (result.name, result.rank) == (want.name, want.rank)
            assert result.delta_square == want.delta_square
            if want.factors:
                assert result.residual_squares == pytest.approx(want.residual_squares, rel=1e-4)
                assert [f.shape for f in result.factors] == [f.shape for f in want.factors]


def test_a_batch_has_a_limit(tmp_path: Path) -> None:
    base, tuned = bf16_pair(tmp_path)
    plan = plan_extract(open_checkpoint(tuned), open_checkpoint(base), how=FactorOptions()).plan
    _, positions = group_steps(plan, 4 * 256 * 192 * 2)
    assert max(len(g) for g in positions) == 2
    _, positions = group_steps(plan, 4 * 256 * 192)
    assert max(len(g) for g in positions) == 1
