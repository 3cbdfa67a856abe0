"""The ops that a step may have: rows only.  No torch; kernels are found by name.

An op is one kernel, one class of arguments (`loratool.engine.step_args`), its formulas
(`loratool.engine.step_memory`) and one row here.  A step whose op has no row is a bug.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loratool.adapter import Source
from loratool.engine import module_memory as modules
from loratool.engine import step_args as takes
from loratool.engine import step_memory as memory
from loratool.errors import BugError
from loratool.frozen import Frozen
from loratool.plan import Plan, Step


class Op(Frozen):
    """What is known of an op.

    Attributes:
        name: what `Step.op` holds.
        kernel: ``module:class``; "" = the input's bytes are the output's.
        args: class of its arguments.
        piece: bytes that a worker takes: (step, arguments, bytes per piece, elements per block).
        step: bytes held from the first block to the last, beyond that: (step, arguments).
        result: bytes of its result, which stays in memory.
        fate: what becomes of the first input: ``changed``, ``cast`` or ``copied``.
        reads_bytes: blocks are of bytes, whatever the type of the inputs.
        has_pairs: inputs come in pairs, one after the other.
        has_one_input: only the first input is read in pieces; the kernel reads the others.
        is_module: it is one block, and its kernel loads what it needs.
        is_sampled: a dry run looks at a few of its blocks.
        is_arithmetic: its time goes into factorisations: ``auto`` takes a GPU, which then also
            holds its matrices; small steps may be put together there.
        writes_codes: the tensor made is in codes, or their factors.
        is_proven: the tensor made is held to a digest of the file that it is to equal.
    """

    name: str
    kernel: str
    args: type = takes.NoArgs
    piece: Callable[[Step, Any, int, int], int] = memory.measured_piece
    step: Callable[[Step, Any], int] = memory.summed_step
    result: Callable[[Step, Any], int] = memory.nothing_kept
    fate: str = "changed"
    reads_bytes: bool = False
    has_pairs: bool = False
    has_one_input: bool = False
    is_module: bool = False
    is_sampled: bool = False
    is_arithmetic: bool = False
    is_proven: bool = False
    writes_codes: bool = False

    @property
    def moves_bytes(self) -> bool:
        """It has no kernel: bytes go from the input to the output."""
        return not self.kernel

    def dtype(self, source: Source) -> str:
        """The type that an input's blocks are of."""
        return "U8" if self.reads_bytes else source.dtype


_MERGING = "loratool.engine.adding:AddInPieces"
_PATCHING = "loratool.engine.patching:"
_MODULES = "loratool.engine.module_kernels:"
_SUM: dict[str, Any] = {"args": takes.SumArgs, "piece": memory.summed_piece}
_APPLY: dict[str, Any] = {"args": takes.ApplyPatchArgs, "piece": memory.summed_piece}

OPS: tuple[Op, ...] = (
    Op("copy", "", piece=memory.copied_piece, fate="copied", reads_bytes=True),
    Op("cast", _MERGING, **_SUM, fate="cast"),
    Op("add_deltas", _MERGING, **_SUM, is_sampled=True),
    Op("requantize", "loratool.engine.requant:Requantize", takes.RequantizeArgs,
       memory.summed_piece, memory.requantized_step, is_sampled=True, writes_codes=True),
    Op("requantize_scales", "loratool.engine.requant:RequantizeScales", takes.RequantizeArgs,
       memory.summed_piece, memory.requantized_step, has_one_input=True, writes_codes=True),
    Op("requantize_rows", "loratool.engine.requant_rows:RequantizeRows", takes.RequantizeArgs,
       memory.summed_piece, memory.requantized_rows, is_sampled=True, has_one_input=True,
       writes_codes=True),
    Op("requantize_row_factors", "loratool.engine.requant_rows:RequantizeRowFactors",
       takes.RequantizeArgs, memory.summed_piece, memory.requantized_rows, has_one_input=True,
       writes_codes=True),
    Op("compare", "loratool.engine.comparing:Compare", **_SUM),
    Op("compare_bytes", "loratool.engine.comparing:CompareBytes", piece=memory.copied_piece,
       reads_bytes=True),
    Op("make_patch", _PATCHING + "MakePatch", takes.MakePatchArgs, memory.summed_piece,
       memory.made_patch_step),
    Op("restore", _PATCHING + "Restore", **_APPLY),
    Op("complete", _PATCHING + "Complete", **_APPLY, is_proven=True),
    Op("compare_completed", _PATCHING + "CompareCompleted", **_APPLY),
    Op("difference", "loratool.engine.difference:Difference", takes.DifferenceArgs,
       has_pairs=True),
    Op("subtract_and_factor", "loratool.engine.factoring:SubtractAndFactor",
       takes.SubtractAndFactorArgs, step=memory.extracted_step, result=memory.extracted_kept,
       has_pairs=True, is_arithmetic=True),
    Op("spectrum", "loratool.engine.compressing:MeasureSpectrum", takes.SpectrumArgs,
       step=memory.spectrum_step, is_module=True),
    Op("factor", "loratool.engine.compressing:Factor", takes.FactorArgs,
       step=memory.factored_step, result=memory.factors_kept, is_module=True),
    Op("look_at_base", "loratool.engine.looking:LookAtBase", takes.SumArgs, memory.looked_piece,
       memory.looked_step),
    Op("combine", _MODULES + "Combine", takes.CombineArgs, step=modules.combined_step,
       result=modules.combined_kept, is_module=True),
    Op("compare_modules", _MODULES + "CompareModules", step=modules.compared_step, is_module=True),
    Op("gram", _MODULES + "Gram", step=modules.compared_step, is_module=True),
    Op("module_statistics", _MODULES + "ModuleStatistics", step=modules.measured_step,
       is_module=True),
    Op("find_intruders", _MODULES + "FindIntruders", takes.IntruderArgs,
       step=modules.intruder_step, result=modules.intruder_kept, is_module=True),
    Op("scale_module", _MODULES + "ScaleModule", takes.ScaleArgs, step=modules.scaled_step,
       result=modules.scaled_kept, is_module=True),
)  # fmt: skip

_BY_NAME = {op.name: op for op in OPS}


def op_of(step: Step) -> Op:
    """The row of a step's op.

    Raises:
        BugError: LT-002, it has none.
    """
    found = _BY_NAME.get(step.op)
    if found is None:
        raise BugError("LT-002", "a step with an op that does not exist", key=step.output.name,
                       got=step.op)  # fmt: skip
    return found


def args_of(step: Step) -> Any:
    """A step's arguments, typed.

    Raises:
        BugError: LT-002, LT-003.
    """
    return takes.typed(step.args, op_of(step).args, step.op)


def crowded_bytes(plan: Plan) -> int:
    """Input of the steps whose kernels make many small calls for each block."""
    return sum(
        sum(source.nbytes for source in step.inputs)
        for step in plan.steps
        if step.args and isinstance(args := args_of(step), takes.SumArgs) and args.is_fine_grained
    )


def piece_bytes(step: Step, chunk: int, elements: int) -> int:
    """Buffers of a worker for the pieces of a step, and what its kernel takes for a block."""
    return op_of(step).piece(step, args_of(step), chunk, elements)


def step_bytes(step: Step) -> int:
    """Memory that a step holds from its first block to its last, beyond the workers' buffers."""
    return op_of(step).step(step, args_of(step))


def result_bytes(step: Step) -> int:
    """What stays in memory of a step that is done, until it is written."""
    return op_of(step).result(step, args_of(step))
