"""What one module of a batch gets does not depend on the others; run on the CPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from loratool.engine import grid
from loratool.engine.difference import Difference, DifferenceResult
from loratool.engine.kernel import Env
from loratool.engine.run import RunOptions, execute
from loratool.errors import NumericError
from loratool.frozen import replace
from loratool.linalg import fit
from loratool.linalg.lanczos import block_lanczos
from loratool.linalg.rank import RankRule
from loratool.ops.extract import FactorOptions, group_steps, plan_extract
from loratool.ops.rank_options import Ranks
from loratool.plan import Step, TensorSpec
from loratool.store.checkpoint import open_checkpoint
from loratool.store.reader import FileReader
from tests.make import randn, save_checkpoint
from tests.unit.test_lanczos import floor, square

CPU = torch.device("cpu")


def test_every_matrix_stops_by_itself() -> None:
    """A flat spectrum takes more steps; what has a gap keeps what it had after fewer."""
    low = (randn(160, 3, seed=1) @ randn(3, 140, seed=2) + 0.3 * randn(160, 140, seed=5)).float()
    stack = torch.stack([low, randn(160, 140, seed=3)])
    squares = [square(m) for m in stack]

    def values(count: int, each: int | None = None) -> tuple[torch.Tensor, int]:
        found = block_lanczos(
            stack[:count], 4, seeds=[1, 2][:count], squares=squares[:count], each=each,
            tolerance=3e-3,
        )  # fmt: skip
        return found.singular_values[0], found.steps

    (alone, few), (apart, more), (joint, _) = values(1), values(2, each=1), values(2)
    assert few < more
    assert float((alone - apart).abs().max()) <= floor(low)
    assert float((alone - joint).abs().max()) > 10 * floor(low)  # one more step shows


def test_a_module_that_needs_more_does_not_change_the_others() -> None:
    """Stages are the batch's, ranks are each module's own."""
    few = (randn(400, 5, seed=1) @ randn(5, 300, seed=4)).float()
    many = (randn(400, 30, seed=2) @ randn(30, 300, seed=3)).float()
    rule = RankRule(energy=0.9999)
    both = torch.stack([few, many])[:, None]
    squares = [square(few), square(many)]
    found = fit.fit(both, fit.Fitting(rule, [1, 2], squares))
    ((_, first),) = fit.fit(both[:1], fit.Fitting(rule, [1], squares[:1]))
    ((_, second),) = fit.fit(both[1:], fit.Fitting(rule, [2], squares[1:]))
    assert [choice for _, choice in found] == [first, second]
    assert first.rank < 16 < second.rank
    (only,) = fit.fit(both, fit.Fitting(rule, [1, 2], squares, wanted=[1]))
    assert only[1] == second


def pair_of(folder: Path, layers: int) -> tuple[Path, Path]:
    base, tuned = {}, {}
    for i in range(layers):
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        base[name] = randn(256, 192, seed=i, scale=0.02).bfloat16()
        change = randn(256, 4 + i, seed=50 + i) @ randn(4 + i, 192, seed=90 + i)
        tuned[name] = (base[name].float() + 1e-3 * change).bfloat16()
    return save_checkpoint(folder / "base", base), save_checkpoint(folder / "tuned", tuned)


@pytest.mark.parametrize("options", [{"rule": {"rank": 8}}, {"auto": True}], ids=["rank", "auto"])
def test_bytes_are_the_same_in_any_company(tmp_path: Path, options: dict[str, object]) -> None:
    """Batches of eight slots with one, two and five modules in them."""
    base, tuned = (open_checkpoint(p) for p in pair_of(tmp_path, 5))
    how = FactorOptions(Ranks(**options))  # type: ignore[arg-type]
    seen: dict[str, set[bytes]] = {}
    for layers in ("[4]", "[34]", "."):
        plan = plan_extract(tuned, base, how=how, include=[f"layers.{layers}"]).plan
        steps = tuple(s for s in plan.steps if s.op == "subtract_and_factor")
        grouped, _ = group_steps(replace(plan, steps=steps), 1 << 30)
        assert [s.args["slots"] for s in grouped.steps] == [8]
        with FileReader() as reader:
            (results,) = execute(grouped, reader, None, RunOptions(threads=2))
        for result in results:
            assert isinstance(result, DifferenceResult) and result.factors
            seen.setdefault(result.name, set()).add(b"".join(bytes(f.data) for f in result.factors))
    assert len(seen) == 5
    assert all(len(made) == 1 for made in seen.values())


CASES = {
    "differ": (torch.bfloat16, torch.bfloat16, [1.0, 2.0, -0.0, 4.0], [1.0, 2.5, 0.0, 4.0]),
    "equal": (torch.bfloat16, torch.bfloat16, [1.0, math.nan], [1.0, math.nan]),
    "same infinity": (torch.float32, torch.float32, [math.inf, 3.0], [math.inf, 2.0]),
    "other infinity": (torch.float32, torch.float32, [math.inf, 3.0], [-math.inf, 2.0]),
    "nan": (torch.float16, torch.float16, [math.nan, 3.0], [math.nan, 2.0]),
    "narrower": (torch.bfloat16, torch.float32, [1.0, 2.0], [1.0009765625, 2.0]),
    "infinite, narrower": (torch.bfloat16, torch.float32, [math.inf, 2.0], [math.inf, 2.5]),
    "whole numbers": (torch.int64, torch.int64, [5, 2**40], [5, 2**40 + 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_gpu_measures_what_a_cpu_does(name: str) -> None:
    tuned_type, base_type, tuned, base = CASES[name]
    inputs = [torch.tensor([tuned], dtype=tuned_type), torch.tensor([base], dtype=base_type)]
    wide = torch.float64 if tuned_type == torch.int64 else torch.float32
    block = grid.Block(0, 0, 1, 0, len(tuned), 0)
    step = Step("difference", TensorSpec("w", "F32", (1, len(tuned))), (), (1, len(tuned)))
    found = []
    for way in (Difference._on_cpu, Difference._on_gpu):
        kernel = Difference(step, Env(FileReader(), CPU))
        kernel._sums[0][0] = way(kernel, block, *inputs, wide)
        try:
            found.append(kernel.sizes())
        except NumericError as error:
            found.append(error.code)
    assert found[0] == found[1]
    assert (found[0] == "LT-803") == (name in ("other infinity", "nan"))


def test_nan_is_refused_by_the_tensor_not_by_the_block() -> None:
    """The same NaN on both sides is no difference; beside one it is not a number to subtract."""
    for way in (Difference._on_cpu, Difference._on_gpu):
        kernel = Difference(
            Step("difference", TensorSpec("w", "F32", (2, 2)), (), (2, 2)),
            Env(FileReader(), CPU),
        )
        same, base = torch.tensor([[math.nan, 1.0]]), torch.tensor([[3.0, 1.0]])
        rows = [grid.Block(i, i, i + 1, 0, 2, 2 * i) for i in range(2)]
        kernel._sums[0][0] = way(kernel, rows[0], same, same.clone(), torch.float32)
        kernel._sums[0][1] = way(kernel, rows[1], base, base.clone(), torch.float32)
        (found,) = kernel.sizes()
        assert (found.is_equal, found.delta_square, found.weight_square) == (True, 0.0, 11.0)
        kernel._sums[0][1] = way(kernel, rows[1], base + 1, base, torch.float32)
        with pytest.raises(NumericError, match="NaN"):
            kernel.sizes()
