"""What a merge lacks of TUNED, element by element: found, kept as patches, put in again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from loratool.engine import grid
from loratool.engine.kernel import INTEGERS, Env, Kernel
from loratool.engine.merging import AddDeltas, SumResult
from loratool.engine.undoing import BlockDigest
from loratool.errors import BadFileError, NumericError
from loratool.linalg.patch import apply_patch, decode_patch, encode_patch, find_differences
from loratool.plan import Step


@dataclass(frozen=True)
class ResidualResult:
    """One tensor of TUNED against its merge.

    Attributes:
        name: tensor.
        elements: those that differ.
        digest: of TUNED's bits.
        pages: (first element, elements, patch) of the blocks that differ, in order.
    """

    name: str
    elements: int
    digest: str
    pages: tuple[tuple[int, int, bytes], ...]


class _Pages:
    """Patches of the blocks of one tensor."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[int, int, bytes, int]] = {}
        self._digest = BlockDigest()

    def add(self, block: grid.Block, predicted: torch.Tensor, tuned: torch.Tensor) -> None:
        at, diff = find_differences(_bits(predicted).numpy(), _bits(tuned).numpy())
        self._digest.add(block.index, tuned)
        if len(at):
            page = encode_patch(at, diff, block.numel)
            self._found[block.index] = (block.start, block.numel, page, len(at))

    def result(self, name: str) -> ResidualResult:
        found = [self._found[i] for i in sorted(self._found)]
        pages = tuple((start, numel, page) for start, numel, page, _ in found)
        return ResidualResult(name, sum(f[3] for f in found), self._digest.value(), pages)


def _bits(block: torch.Tensor) -> torch.Tensor:
    """The block's elements as flat signed integers on the CPU (shared memory if it is there)."""
    return block.view(INTEGERS.get(block.element_size(), torch.int8)).flatten().cpu()


class ResidualOfSum(AddDeltas):
    """Merge again, correctly rounded, and compare with TUNED (the last input)."""

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._pages = _Pages()

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Note where the merge and TUNED differ."""
        tuned = inputs[-1]
        shape = (tuned.shape[0], tuned.shape[1])
        merged = self.env.scratch.take("merged", shape, self.target, self.env.device)
        super().run(block, inputs[:-1], merged)
        self._pages.add(block, merged, tuned)

    def finish(self) -> ResidualResult:  # type: ignore[override]
        """All blocks' patches."""
        super().finish()
        return self._pages.result(self.step.output.name)


class ResidualOfCopy(Kernel):
    """A tensor that the merge copies, against TUNED."""

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._pages = _Pages()

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Note where the two differ; a tensor stored whole is only summed up."""
        self._pages.add(block, inputs[0], inputs[-1])

    def finish(self) -> ResidualResult:
        """All blocks' patches."""
        return self._pages.result(self.step.output.name)


class _Patch:
    """The patch of one tensor, read block by block."""

    def __init__(self, step: Step, env: Env) -> None:
        self._step, self._env = step, env
        self._pages: dict[int, tuple[int, int, int]] = {}  # first element: elements, offset, bytes
        self._digest = BlockDigest()

    def load(self) -> None:
        """Read where the pages are."""
        source = self._step.args.get("pages")
        if source is None:
            return
        offset = 0
        for first, numel, nbytes in self._env.load(source).view(-1, 3).tolist():
            self._pages[first] = (numel, offset, nbytes)
            offset += max(0, nbytes)
        if offset != self._step.args["patch"].nbytes:
            self._refuse("its pages do not fit")

    def apply(self, block: grid.Block, out: torch.Tensor) -> None:
        """Turn a block of the merge into TUNED's."""
        page = self._pages.get(block.start)
        if page is not None:
            bits = _bits(out)
            flat = bits.numpy()
            at, diff = self._read(block, *page, flat.dtype)
            apply_patch(flat, at, diff)
            if out.device.type != "cpu":
                out.copy_(bits.view(out.dtype).view(out.shape))
        self._digest.add(block.index, out)

    def _read(self, block: grid.Block, numel: int, offset: int, nbytes: int, dtype: Any) -> Any:
        if numel != block.numel or nbytes < 0:
            self._refuse("its pages do not fit")
        source = self._step.args["patch"]
        data = bytearray(nbytes)
        self._env.reader.read_into(source.file, source.start + offset, memoryview(data))
        try:
            return decode_patch(memoryview(data), numel, dtype)
        except ValueError as error:
            self._refuse(str(error))

    def _refuse(self, why: str) -> NoReturn:
        raise BadFileError(
            "LT-399", "the residual file is damaged", key=self._step.output.name, got=why
        )

    def check(self) -> None:
        """Is it TUNED now?

        Raises:
            NumericError: it is not.
        """
        if self._digest.value() != self._step.args["digest"]:
            raise NumericError(
                "LT-805",
                "the merge with its residual is not the fine-tune it was made from",
                key=self._step.output.name,
                hint="base, adapter and residual must be those of the extraction",
            )


class PatchedSum(AddDeltas):
    """A correctly rounded merge, patched into TUNED's bits and checked."""

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._patch = _Patch(step, env)

    def prepare(self) -> None:
        """Load factors and the patch's pages."""
        super().prepare()
        self._patch.load()

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Merge, then patch."""
        super().run(block, inputs, out)
        if out is not None:
            self._patch.apply(block, out)

    def finish(self) -> SumResult:
        """Check, then the sums of the merge."""
        self._patch.check()
        return super().finish()


class PatchedCopy(Kernel):
    """A copied tensor, patched into TUNED's bits and checked."""

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._patch = _Patch(step, env)

    def prepare(self) -> None:
        """Load the patch's pages."""
        self._patch.load()

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Copy, then patch."""
        if out is not None:
            _copy_bits(out, inputs[0])
            self._patch.apply(block, out)

    def finish(self) -> None:
        """Check."""
        self._patch.check()


def _copy_bits(out: torch.Tensor, source: torch.Tensor) -> None:
    kind = INTEGERS.get(out.element_size(), torch.int8)
    out.view(kind).copy_(source.view(kind))  # as integers: NaN payloads stay
