"""What a merge lacks of TUNED, element by element: found, kept as patches, put in again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from loratool.engine import grid
from loratool.engine.kernel import Env, Kernel
from loratool.engine.merging import AddDeltas, SumResult
from loratool.errors import BadFileError, NumericError
from loratool.linalg.checksum import add_checksums, block_checksum
from loratool.linalg.patch import apply_patch, decode_patch, encode_patch, find_differences
from loratool.plan import Step

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class ResidualResult:
    """One tensor of TUNED against its merge.

    Attributes:
        name: tensor.
        elements: those that differ.
        checksum: of TUNED's bits.
        pages: (first element, elements, patch) in order of position; taken out once written.
    """

    name: str
    elements: int
    checksum: int
    pages: list[tuple[int, int, bytes]] = field(repr=False)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


class _Pages:
    """Patches of the blocks of one tensor."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[int, int, bytes, int, int]] = {}

    def add(self, block: grid.Block, predicted: torch.Tensor, tuned: torch.Tensor) -> None:
        wanted = _bits(tuned)
        at, diff = find_differences(
            _bits(predicted).cpu().numpy().reshape(-1), wanted.cpu().numpy().reshape(-1)
        )
        page = encode_patch([(at, diff)], block.numel) if len(at) else b""
        checksum = block_checksum(wanted, block.start)
        self._found[block.index] = (block.start, block.numel, page, len(at), checksum)

    def result(self, name: str) -> ResidualResult:
        found = [self._found[i] for i in sorted(self._found)]
        return ResidualResult(
            name,
            sum(f[3] for f in found),
            add_checksums(*(f[4] for f in found)),
            [(start, numel, page) for start, numel, page, _, _ in found if page],
        )


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
    """The patch of one tensor, read page by page."""

    def __init__(self, step: Step, env: Env) -> None:
        self._step, self._env = step, env
        self._pages = np.zeros((0, 4), np.int64)  # first element, elements, bytes, offset
        self._sums: dict[int, int] = {}

    def load(self) -> None:
        source = self._step.args.get("pages")
        if source is None:
            return
        pages = self._env.load(source).numpy()
        sizes = pages[:, 2] if pages.ndim == 2 and pages.shape[1] == 3 else np.zeros(0)
        if not len(sizes) or (pages < 0).any() or sizes.sum() != self._step.args["patch"].nbytes:
            self._refuse("its pages do not fit")
        offsets = np.cumsum(sizes) - sizes
        self._pages = np.concatenate([pages, offsets[:, None]], 1)

    def apply(self, block: grid.Block, out: torch.Tensor) -> None:
        """Turn a block of the merge into TUNED's."""
        bits = _bits(out)
        ends = self._pages[:, 0] + self._pages[:, 1]
        mine = (self._pages[:, 0] < block.start + block.numel) & (ends > block.start)
        if mine.any():
            flat = bits.cpu().numpy().reshape(-1)
            for page in self._pages[mine]:
                at, diff = self._read(page, flat.dtype)
                at = at + (int(page[0]) - block.start)
                inside = (at >= 0) & (at < block.numel)
                apply_patch(flat, at[inside], diff[inside])
            bits = torch.from_numpy(flat).view(bits.shape).to(bits.device)
            _bits_into(out, bits)
        self._sums[block.index] = block_checksum(bits, block.start)

    def _read(self, page: Any, dtype: Any) -> Any:
        _start, numel, nbytes, offset = (int(n) for n in page)
        source = self._step.args["patch"]
        data = bytearray(nbytes)
        self._env.reader.read_into(source.file, source.start + offset, memoryview(data))
        try:
            return decode_patch(memoryview(data), numel, dtype)
        except ValueError as error:
            self._refuse(str(error))

    def _refuse(self, why: str) -> None:
        raise BadFileError(
            "LT-399", "the residual file is damaged", key=self._step.output.name, got=why
        )

    def check(self) -> None:
        """Is it TUNED now?

        Raises:
            NumericError: it is not.
        """
        if add_checksums(*self._sums.values()) != self._step.args["checksum"]:
            raise NumericError(
                "LT-804",
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
            _bits_into(out, inputs[0])
            self._patch.apply(block, out)

    def finish(self) -> None:
        """Check."""
        self._patch.check()


def _bits_into(out: torch.Tensor, source: torch.Tensor) -> None:
    kind = _BITS[out.element_size()]
    out.view(kind).copy_(source.view(kind))  # as integers: NaN payloads stay
