"""What becomes of each tensor of a fine-tune: its role, and how PEFT can hold its change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loratool.adapter import TensorRef
from loratool.archs.classes import fuses_experts, holder_of
from loratool.archs.experts import parse_expert
from loratool.archs.families import places, split_component
from loratool.archs.heads import is_other_head
from loratool.archs.layers import is_conv1d
from loratool.archs.names import to_memory
from loratool.archs.places import is_text
from loratool.archs.stated import model_type
from loratool.archs.ties import is_head
from loratool.dtypes import DTYPES
from loratool.frozen import Frozen, replace
from loratool.lazy import regex
from loratool.store.checkpoint import Checkpoint

_EMBEDDING = regex(r"(^|[._])(embed\w*|embeddings?|wte|wpe|shared|embed_(in|out|tokens))\.weight$")
_HEAD = regex(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
_BUFFER = regex(r"\.(running_mean|running_var|num_batches_tracked|position_ids)$")
_SMALL = 1 << 16  # elements of a weight that is kept as norms are, where no factors hold it
_PARTS = {("gate", "up"): "gate_up_proj", ("up",): "up_proj", ("down",): "down_proj"}


class Pair(Frozen):
    """One tensor of both checkpoints.

    Attributes:
        name: on-disk name in the base.
        base: None if the base has no such tensor.
        tuned: the fine-tuned one.
        role: ``linear``, ``conv``, ``embedding``, ``head``, ``experts``, ``in_proj``,
            ``small``, ``whole`` (a weight that PEFT holds no factors of), ``buffer`` or ``bare``.
        holder: where its factors go, as `loratool.archs.holder_of` says.
        is_factored: it becomes a pair of factors.
        parts: the experts' own tensors that the parameter is made of, in its order.
    """

    name: str
    base: TensorRef | None
    tuned: TensorRef
    role: str
    holder: str = ""
    is_factored: bool = False
    parts: tuple[Pair, ...] = ()

    @property
    def module(self) -> str:
        """On-disk module path."""
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """Parameter name."""
        return self.name.rpartition(".")[2]

    @property
    def is_small(self) -> bool:
        """A norm, a bias, or a parameter without a module that is no larger than such ones are."""
        return self.role == "small" or (self.role == "bare" and self.tuned.numel <= _SMALL)

    @property
    def is_bias(self) -> bool:
        """One number per output of a module."""
        return self.role == "small" and self.name.endswith("bias")

    @property
    def is_task_head(self) -> bool:
        """The fine-tune has a head that the base lacks, and it is no language model's."""
        return self.base is None and is_other_head(self.name) and not is_head(self.name)


class Roles:
    """Role and holder of the tensors of one base.

    Args:
        base: the checkpoint.
        names: ``v5`` or ``v4``, as the adapter will call them.
    """

    def __init__(self, base: Checkpoint, names: str) -> None:
        self._base = base
        self._names = names
        self._has_experts = names == "v5" and any(map(parse_expert, base.tensors))

    def of(self, name: str, ref: TensorRef, other: TensorRef | None) -> tuple[str, str]:
        """(role, holder) of a tensor and its partner; the holder is "" where it gets no factors."""
        types = [one.dtype for one in (ref, other) if one is not None]
        if _BUFFER.search(name) or not all(DTYPES[t].is_mergeable for t in types):
            return "buffer", ""
        dims = len(ref.shape)
        memory = to_memory(model_type(self._base.config), name, self._names)
        if dims > 1 and 0 in ref.shape:
            return "bare", ""
        if dims <= 1:
            return "small", ""
        if name.endswith("in_proj_weight") and dims == 2:
            return "in_proj", "linear"
        if dims == 2 and _is_projection(name):
            return "linear", "parameter"
        if not memory.endswith(".weight"):
            is_stack = dims == 3 and ".experts." in memory and "bias" not in memory
            return ("experts", "experts") if is_stack else ("bare", "")
        holder = self._holder(memory, ref)
        if holder == "whole":
            return ("small" if ref.numel <= _SMALL else "whole"), ""
        if _HEAD.search(name):
            return "head", holder
        is_table = _EMBEDDING.search(name) is not None and not _is_image_layer(memory)
        if dims == 2:
            return ("embedding" if is_table else "linear"), holder
        return holder, holder

    def _holder(self, memory: str, ref: TensorRef) -> str:
        config = self._base.config
        found = holder_of(config, memory, ref.shape, has_experts=self._has_experts)
        if found in ("embedding", "parameter") and _is_image_layer(memory):
            return "linear"
        if self._names == "v4" and found == "parameter":  # routers and experts are plain there
            return "linear"
        return found


def _is_projection(name: str) -> bool:
    """True for the projection of OpenCLIP in a checkpoint of Stable Diffusion, of no module."""
    return name.endswith(".text_projection") and is_text(split_component(name)[0])


def _is_image_layer(name: str) -> bool:
    """True for a linear layer of an image model that is called as tables are: ``x_embedder``."""
    module = name.removesuffix(".weight")
    return module.endswith("embedder") and any(places("unet", module))


def join_experts(pairs: Sequence[Pair], base: Checkpoint, names: str) -> list[Pair]:
    """Experts with tensors of their own as the parameters that transformers 5 makes of them.

    Under their own names PEFT would have to fuse their factors, which it does for some models, of
    equal ranks only, and at the expense of other modules of the same names.
    """
    if names != "v5" or not fuses_experts(base.config):
        return list(pairs)
    groups: dict[str, dict[tuple[int, str], Pair]] = {}
    for pair in pairs:
        found = parse_expert(pair.name)
        if found and found.expert is not None:
            groups.setdefault(found.container, {})[found.expert, found.parts[0]] = pair
    joined: list[Pair] = []
    for container, members in groups.items():
        joined += _join(container, members)
    taken = {part.name for pair in joined for part in pair.parts if part.is_factored}
    single = {part.name for members in groups.values() for part in members.values()} - taken
    rest = [replace(p, is_factored=False) if p.name in single else p for p in pairs]
    return [*(p for p in rest if p.name not in taken), *joined]


def _join(container: str, members: Mapping[tuple[int, str], Pair]) -> Iterable[Pair]:
    have = {part for _, part in members}
    for parts, name in _PARTS.items():
        if not have.issuperset(parts) or ("gate" in have and parts == ("up",)):
            continue
        # LongCat's experts that pass their input on have no output projection.
        count = 1 + max(expert for expert, part in members if part in parts)
        rows = [members.get((e, part)) for e in range(count) for part in parts]
        whole = [row for row in rows if row is not None]
        is_whole = len(whole) == len(rows) and len({r.tuned.shape for r in whole}) == 1
        is_whole &= all(row.role != "buffer" for row in whole)
        if is_whole and any(row.is_factored for row in whole):
            yield _stack(f"{container}.{name}", [_unless_left_out(row) for row in whole], count)


def _unless_left_out(pair: Pair) -> Pair:
    """An expert that is left out does not change."""
    return pair if pair.is_factored or pair.base is None else replace(pair, tuned=pair.base)


def _stack(name: str, parts: Sequence[Pair], experts: int) -> Pair:
    """One pair for all of them; its references say shape and file, and are never read."""
    rows, cols = parts[0].tuned.shape
    shape = (experts, rows * len(parts) // experts, cols)

    def together(refs: Sequence[TensorRef | None]) -> TensorRef:
        first = refs[0]
        assert first is not None
        total = sum(ref.nbytes for ref in refs if ref)
        return replace(first, name=name, shape=shape, nbytes=total)

    return Pair(
        name, together([p.base for p in parts]), together([p.tuned for p in parts]), "experts",
        "experts", is_factored=True, parts=tuple(parts),
    )  # fmt: skip


def settle_holders(pairs: Sequence[Pair], config: Mapping[str, Any]) -> list[Pair]:
    """Holders that PEFT takes together.

    It refuses parameters beside modules that are stored the other way round (Conv1D), so that
    those become parameters too.
    """
    kind = model_type(config)
    if not any(p.is_factored and p.holder in ("parameter", "experts") for p in pairs):
        return list(pairs)
    return [
        replace(p, holder="parameter") if p.holder == "linear" and is_conv1d(kind, p.module) else p
        for p in pairs
    ]
