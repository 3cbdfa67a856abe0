"""Patches that turn a prediction of a tensor into the tensor, bit for bit: made, and put in.

Both sides predict in the same way; the patch holds what the prediction misses.  The prediction is
exact (correctly rounded), so that it is the same on any machine and device.  Undo files predict a
base from what was merged, residual files a fine-tune from the merge of its adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from loratool.adapter import TensorRef
from loratool.engine import grid
from loratool.engine.buffers import to_bytes
from loratool.engine.comparing import CompareResult
from loratool.engine.kernel import Env, Kernel
from loratool.engine.merging import AddDeltas, SumResult
from loratool.engine.step_args import ApplyPatchArgs, MakePatchArgs
from loratool.errors import BadFileError, MismatchError, NumericError
from loratool.frozen import Frozen
from loratool.linalg import patch
from loratool.linalg.rounding import INTEGERS
from loratool.plan import Step


class PatchResult(Frozen):
    """What turns the prediction of one tensor into the tensor.

    Attributes:
        name: tensor.
        count: elements that the prediction misses.
        pieces: the packed patch: its index, then one page per block; none if it misses none.
        wanted: digest of the tensor.
        source: digest of what it was predicted from, "" if that was not asked for.
    """

    name: str
    count: int
    pieces: tuple[bytes, ...]
    wanted: str
    source: str


class RestoreResult(Frozen):
    """A restored tensor: how many elements the patch set right."""

    name: str
    count: int


class BlockDigest:
    """sha256 over the sha256 of each block, in order: blocks may come in any order."""

    def __init__(self) -> None:
        self._blocks: dict[int, bytes] = {}

    def add(self, index: int, block: torch.Tensor) -> None:
        """Take a block's bytes in."""
        self._blocks[index] = hashlib.sha256(to_bytes(block)).digest()

    def value(self) -> str:
        """The digest of all blocks so far."""
        return hashlib.sha256(b"".join(self._blocks[i] for i in sorted(self._blocks))).hexdigest()


class _Predict(Kernel):
    """What a tensor should be, and the digests of both sides."""

    args: MakePatchArgs | ApplyPatchArgs

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._how = self.args.how
        self.sum = AddDeltas(step, env) if self._how == "sum" else None
        self._wanted, self._source = BlockDigest(), BlockDigest()

    def prepare(self) -> None:
        """Load the factors."""
        if self.sum is not None:
            self.sum.prepare()

    def predict(
        self, block: grid.Block, sources: Sequence[torch.Tensor], out: torch.Tensor
    ) -> None:
        """Fill ``out`` with the prediction."""
        if self._how == "nothing":
            out.zero_()
        elif self.sum is not None:
            self.sum.run(block, list(sources), out)
        else:  # as integers: NaN payloads stay
            kind = _integers(out)
            out.view(kind).copy_(sources[0].view(kind))
        if self.args.source:
            self._source.add(block.index, sources[0])


class MakePatch(_Predict):
    """Compare a tensor (the last input) with its prediction from the others."""

    args: MakePatchArgs

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._pages: dict[int, tuple[int, bytes]] = {}

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Keep what the prediction misses."""
        *sources, wanted = inputs
        shape = (wanted.shape[0], wanted.shape[1])
        guess = self.env.scratch.take("guess", shape, wanted.dtype, self.env.device)
        self.predict(block, sources, guess)
        at, diff = patch.find_differences(_bits(guess), _bits(wanted))
        page = patch.encode_patch(at, diff, block.numel) if len(at) else b""
        self._pages[block.index] = (len(at), page)
        self._wanted.add(block.index, wanted)

    def finish(self) -> PatchResult:
        """Pack the patch, in the order of the blocks."""
        if self.sum is not None and self.args.gate:
            self.sum.finish()
        found = [self._pages[i] for i in sorted(self._pages)]
        count, pages = sum(n for n, _ in found), [page for _, page in found]
        return PatchResult(
            self.step.output.name,
            count,
            (patch.pack_index(pages), *pages) if count else (),
            self._wanted.value(),
            self._source.value() if self.args.source else "",
        )


class _ApplyPatch(_Predict):
    """Predict a tensor, set right what the patch says, take the digests."""

    args: ApplyPatchArgs

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._offsets: Sequence[int] = ()
        self.counts: dict[int, int] = {}

    def prepare(self) -> None:
        """Load the factors and the index of the patch."""
        super().prepare()
        source = self.args.patch
        if source is None:
            return
        blocks = grid.count_blocks(self.step.view, self.env.elements)
        try:
            size = patch.index_bytes(blocks)
            if size > source.nbytes:
                raise ValueError("patch has another number of pages")
            self._offsets = patch.unpack_index(self._read(source, 0, size), source.nbytes)
        except ValueError as error:
            raise self._damaged(source, error) from error

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Predict, patch, take the digest."""
        if out is None:
            return
        self.predict(block, inputs, out)
        if self._offsets:
            self._set_right(block, out)
        self._wanted.add(block.index, out)

    def _set_right(self, block: grid.Block, out: torch.Tensor) -> None:
        source = self.args.patch
        assert source is not None
        start, end = self._offsets[block.index : block.index + 2]
        if start == end:
            return
        bits = _bits(out)
        try:
            page = self._read(source, start, end - start)
            at, diff = patch.decode_patch(page, block.numel, bits.dtype)
        except ValueError as error:
            raise self._damaged(source, error) from error
        patch.apply_patch(bits, at, diff)
        self.counts[block.index] = len(at)
        if out.device.type != "cpu":
            out.copy_(torch.from_numpy(bits).view(out.dtype).view(out.shape))

    def _read(self, source: TensorRef, start: int, size: int) -> memoryview:
        data = memoryview(bytearray(size))
        self.env.reader.read_into(source, start, data)
        return data

    def _damaged(self, source: TensorRef, error: ValueError) -> BadFileError:
        return BadFileError(
            "LT-399", "a patch is damaged", file=source.file, key=source.name, got=error
        )

    @property
    def is_wanted(self) -> bool:
        """The tensor is what the patch was made for."""
        return self._wanted.value() == self.args.wanted


class Restore(_ApplyPatch):
    """A base tensor out of a merged one."""

    def finish(self) -> RestoreResult:
        """Check what was found and what was made.

        Raises:
            MismatchError: the merged tensor is not the one that the patch was made for.
        """
        args, name = self.args, self.step.output.name
        if args.source and self._source.value() != args.source:
            raise MismatchError(
                "LT-450", "this tensor is not the one that the undo file was made for", key=name,
                hint="the merged weights changed since, or are another model",
            )  # fmt: skip
        if not self.is_wanted:
            raise MismatchError(
                "LT-451", "taking the adapters out does not give the base back", key=name,
                hint="the undo file is for other adapters, or damaged",
            )  # fmt: skip
        return RestoreResult(name, sum(self.counts.values()))


class Complete(_ApplyPatch):
    """A fine-tune's tensor out of the merge of its adapter."""

    def finish(self) -> SumResult | None:
        """Check, then the sums of the merge.

        Raises:
            NumericError: it is not what the residual was made from.
        """
        if not self.is_wanted:
            raise NumericError(
                "LT-805",
                "the merge with its residual is not the fine-tune it was made from",
                key=self.step.output.name,
                hint="base, adapter and residual must be those of the extraction",
            )
        return None if self.sum is None else self.sum.finish()


class CompareCompleted(_ApplyPatch):
    """Compare a tensor (the last input) with the fine-tune's, made as `Complete` makes it."""

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._differing: dict[int, int] = {}

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Count elements whose bits differ."""
        *sources, found = inputs
        shape = (found.shape[0], found.shape[1])
        made = self.env.scratch.take("made", shape, found.dtype, self.env.device)
        super().run(block, sources, made)
        kind = _integers(made)
        self._differing[block.index] = int((made.view(kind) != found.view(kind)).sum())

    def finish(self) -> CompareResult:
        """Add the blocks up; there is no rounding that one of them may lie within."""
        count = sum(self._differing.values())
        change = 0.0 if self.sum is None else self.sum.finish().delta_square
        size = self.step.view[0] * self.step.view[1]
        return CompareResult(self.step.output.name, size, count, count, 0.0, change, 0.0)


def _integers(block: torch.Tensor) -> torch.dtype:
    return INTEGERS.get(block.element_size(), torch.int8)


def _bits(block: torch.Tensor) -> Any:
    """The block's elements as flat signed integers on the CPU (shared memory if it is there)."""
    return block.view(_integers(block)).flatten().cpu().numpy()
