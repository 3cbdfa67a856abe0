"""Patches that turn merged weights back into the base, and their application.

Both sides predict the base from the merged tensor in the same way; the patch holds what the
prediction misses.  The prediction is exact (correctly rounded), so that it is the same on any
machine and device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from loratool.adapter import TensorRef
from loratool.engine import grid
from loratool.engine.buffers import to_bytes
from loratool.engine.kernel import INTEGERS, Env, Kernel
from loratool.engine.merging import AddDeltas
from loratool.errors import BadFileError, MismatchError
from loratool.linalg import patch
from loratool.plan import Step


@dataclass(frozen=True)
class PatchResult:
    """What turns one merged tensor back into the base's.

    Attributes:
        name: tensor.
        count: elements that the prediction misses.
        payload: the packed patch.
        base: digest of the base tensor.
        merged: digest of the merged tensor, "" if the prediction does without it.
    """

    name: str
    count: int
    payload: bytes
    base: str
    merged: str


@dataclass(frozen=True)
class RestoreResult:
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
    """What the base should be, from the merged tensor.

    ``args["from"]`` is ``sum`` (take the deltas out, exactly), ``same`` (the merged bits) or
    ``nothing`` (zeros).
    """

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self.how = step.args["from"]
        self.sum = AddDeltas(step, env) if self.how == "sum" else None

    def prepare(self) -> None:
        """Load the factors."""
        if self.sum is not None:
            self.sum.prepare()

    def predict(self, block: grid.Block, merged: torch.Tensor | None, out: torch.Tensor) -> None:
        """Fill ``out`` with the prediction."""
        if merged is None:
            out.zero_()
        elif self.sum is None:
            out.copy_(merged)
        else:
            self.sum.run(block, [merged], out)


class MakePatch(_Predict):
    """Compare the base (the last input) with its prediction."""

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._pages: dict[int, tuple[int, bytes]] = {}
        self._base, self._merged = BlockDigest(), BlockDigest()

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Keep what the prediction misses."""
        base = inputs[-1]
        merged = None if self.how == "nothing" else inputs[0]
        shape = (base.shape[0], base.shape[1])
        guess = self.env.scratch.take("guess", shape, base.dtype, self.env.device)
        self.predict(block, merged, guess)
        at, diff = patch.find_differences(_bits(guess), _bits(base))
        page = patch.encode_patch(at, diff, block.numel) if len(at) else b""
        self._pages[block.index] = (len(at), page)
        self._base.add(block.index, base)
        if merged is not None:
            self._merged.add(block.index, merged)

    def finish(self) -> PatchResult:
        """Pack the patch."""
        pages = [self._pages[i] for i in sorted(self._pages)]
        return PatchResult(
            self.step.output.name,
            sum(count for count, _ in pages),
            patch.pack_pages([page for _, page in pages]),
            self._base.value(),
            "" if self.how == "nothing" else self._merged.value(),
        )


class Restore(_Predict):
    """Predict the base and set right what the patch says."""

    def __init__(self, step: Step, env: Env) -> None:
        super().__init__(step, env)
        self._base, self._merged = BlockDigest(), BlockDigest()
        self._pages: list[memoryview] = []
        self._counts: dict[int, int] = {}

    def prepare(self) -> None:
        """Load the factors and the patch."""
        super().prepare()
        source: TensorRef = self.step.args["patch"]
        try:
            self._pages = patch.unpack_pages(to_bytes(self.env.load(source)))
            if len(self._pages) != len(grid.blocks(self.step.view, self.env.elements)):
                raise ValueError("patch has another number of pages")
        except ValueError as error:
            self._refuse(error)

    def _refuse(self, error: ValueError) -> NoReturn:
        source: TensorRef = self.step.args["patch"]
        raise BadFileError(
            "LT-328", "damaged undo file", file=source.file, key=source.name, got=error
        ) from error

    def run(self, block: grid.Block, inputs: list[torch.Tensor], out: torch.Tensor | None) -> None:
        """Predict, patch, take both digests."""
        merged = inputs[0] if inputs else None
        if out is None:
            return
        self.predict(block, merged, out)
        if page := self._pages[block.index]:
            self._set_right(block, page, out)
        self._base.add(block.index, out)
        if merged is not None:
            self._merged.add(block.index, merged)

    def finish(self) -> RestoreResult:
        """Check what was found and what was made.

        Raises:
            MismatchError: the merged tensor is not the one that the patch was made for.
        """
        args, name = self.step.args, self.step.output.name
        if args["merged"] and self._merged.value() != args["merged"]:
            raise MismatchError(
                "LT-450", "this tensor is not the one that the undo file was made for", key=name,
                hint="the merged weights changed since, or are another model",
            )  # fmt: skip
        if self._base.value() != args["base"]:
            raise MismatchError(
                "LT-451", "taking the adapters out does not give the base back", key=name,
                hint="the undo file is for other adapters, or damaged",
            )  # fmt: skip
        return RestoreResult(name, sum(self._counts.values()))

    def _set_right(self, block: grid.Block, page: memoryview, out: torch.Tensor) -> None:
        bits = _bits(out)
        try:
            at, diff = patch.decode_patch(page, block.numel, bits.dtype)
        except ValueError as error:
            self._refuse(error)
        patch.apply_patch(bits, at, diff)
        self._counts[block.index] = len(at)
        if out.device.type != "cpu":
            out.copy_(torch.from_numpy(bits).view(out.dtype).view(out.shape))


def _bits(block: torch.Tensor) -> Any:
    """The block's elements as flat signed integers on the CPU (shared memory if it is there)."""
    integers = INTEGERS.get(block.element_size(), torch.int8)
    return block.view(integers).flatten().cpu().numpy()
