"""One item on one base tensor: does it fit, and in which orientation?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratool.adapter import DeltaSpec
from loratool.archs.layers import pair_height, stores_transposed
from loratool.archs.ties import Tie, follows_vocabulary, is_head, other_name
from loratool.bind.columns import wider_shape
from loratool.bind.items import BoundDelta, BoundReplacement, Found, Item, Misfit
from loratool.bind.names import View
from loratool.bind.new_parts import is_part
from loratool.delta.forms import (
    is_grouped,
    lengths_of,
    shape_of,
    side_sizes,
    spans_rows,
    width_of,
)
from loratool.dtypes import DTYPES, numel
from loratool.frozen import Struct, field, replace
from loratool.kind import HEAD
from loratool.options.groups import Names
from loratool.store.checkpoint import Checkpoint

Placement = Found | Misfit


class Context(Struct):
    """What placing needs to know besides the item.

    Attributes:
        checkpoint: the base.
        options: the user's.
        view: names of the base under the rule being tried.
        ties: what is tied in the base.
        peft_version: of the adapter, "" if unknown.
        shown: what other weights show of ``fan_in_fan_out``: it holds, it does not, or both.
        resized: target -> shape after a replacement that changes the vocabulary, or with the
            columns that a change brings.
        heights: table -> its rows without those of new tokens, where there are some.
    """

    checkpoint: Checkpoint
    options: Names
    view: View
    ties: tuple[Tie, ...]
    peft_version: str = ""
    shown: frozenset[bool] = frozenset()
    resized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    heights: dict[str, int] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration of the base."""
        return self.checkpoint.config

    def shape(self, target: str) -> tuple[int, ...]:
        """Shape of a target, after replacements."""
        return self.resized.get(target, self.checkpoint.tensors[target].shape)

    def lookup(self, name: str) -> tuple[str | None, str]:
        """(name in the files, alias): a tied tensor that is not stored gives the stored one."""
        target = self.view.get(name)
        if target is not None:
            return target, ""
        twin = other_name(self.checkpoint, name)
        if twin is not None:
            return twin, ""
        absent = self.view.absent.get(name) or self._absent_head(name)
        for tie in self.ties:
            if absent in tie.missing:
                return tie.stored[0], absent
        return None, ""

    def _absent_head(self, name: str) -> str:
        """The one tied head that is not stored, where an adapter spells its path otherwise."""
        if not is_head(name) or not name.endswith(".weight"):
            return ""
        heads = [n for tie in self.ties for n in tie.missing if is_head(n)]
        found = [n for n in heads if n.endswith(".weight")]
        return found[0] if len(found) == 1 else ""


def place_on(item: Item, spec: DeltaSpec, target: str, alias: str, ctx: Context) -> Placement:
    """A low-rank delta that covers a whole tensor."""
    problem = unmergeable(item, target, ctx)
    if problem is not None:
        return problem
    shape = ctx.shape(target)
    if spec.is_open:
        settled = _settled(spec, target, ctx)
        if settled is None:
            return misfit(item, "LT-432", _words(shape), known_size(spec), target)
        spec = settled
    out, inner = side_sizes(spec)
    if is_grouped(spec):
        got = f"{width_of(spec)} columns of lora_B"
        return misfit(item, "LT-434", f"rank {spec.rank}", got, target)
    magnitude = lengths_of(spec)
    if magnitude is not None and magnitude.numel != out:
        return misfit(item, "LT-432", f"{out} magnitudes", str(magnitude.numel), target)
    if (wider := wider_shape(spec, target, ctx.checkpoint)) is not None:
        shape = ctx.resized[target] = wider
    if spec.layout == "embedding":
        if shape != (*inner, out):
            return misfit(item, "LT-432", _words(shape), _words((*inner, out)), target)
        return _found(item, BoundDelta(spec, target, transposed=True), alias)
    if len(shape) > 2:
        return _place_conv(item, spec, target, ctx)
    turned = orientation(item, spec, target, ctx)
    if isinstance(turned, Misfit):
        return turned
    flat = spec if spec.layout == "linear" else replace(spec, layout="linear")
    return _found(item, BoundDelta(flat, target, transposed=turned), alias)


def _settled(spec: DeltaSpec, target: str, ctx: Context) -> DeltaSpec | None:
    """A change whose tensors do not say the size of the weight, on this one; None if it cannot."""
    out, *inner = ctx.shape(target)
    if not inner:
        return None
    known = stores_transposed(ctx.config, target.rpartition(".")[0])
    turned = spec.transposed and ctx.shown != {False} if known is None else known
    if turned and len(inner) == 1:
        out, inner = inner[0], [out]
    if spec.row.is_by_head:
        head = pair_height(ctx.config, target)
        spec = replace(spec, settings={**spec.settings, HEAD: head})
    return spec.row.settle(spec, out, numel(tuple(inner)))


def known_size(spec: DeltaSpec) -> str:
    """The size of an open change's weight as far as its tensors tell, in words."""
    out, inner = side_sizes(spec)
    return "(" + ", ".join("…" if size == 1 else str(size) for size in (out, *inner)) + ")"


def cut_groups(
    item: Item, spec: DeltaSpec, sources: Iterable[tuple[int, int]], target: str
) -> Misfit | None:
    """A misfit if a slice of rows would cut through rows that depend on each other."""
    step = 0 if spans_rows(spec) else spec.row.together(spec) if spec.reach == "rows" else 1
    odd = [s for s in sources if (s[0] % step or s[1] % step if step else True)]
    if not odd:
        return None
    what = f"whole groups of {step} rows" if step else "all rows"
    return misfit(item, "LT-439", what, f"rows {odd[0][0]} to {odd[0][1]}", target)


def orientation(item: Item, spec: DeltaSpec, target: str, ctx: Context) -> bool | Misfit:
    """Is the target stored (in, out)?  Never guessed from the shape alone."""
    out, inner = side_sizes(spec)
    asked = (out, *_squeeze(inner))
    shape = ctx.shape(target)
    direct, turned = asked == shape, asked[::-1] == shape and len(asked) == 2
    if spec.is_bare and direct:
        return False
    known = stores_transposed(ctx.config, target.rpartition(".")[0])
    if direct and turned:
        if known is not None or not spec.transposed:
            return bool(known)
        if len(ctx.shown) > 1:
            got = "some of the other weights are stored (out, in), some (in, out)"
            return misfit(item, "LT-433", _words(shape), got, target)
        return ctx.shown != {False}
    if direct and not known:
        return False
    if turned and (known or (known is None and spec.transposed)):
        return True
    return misfit(item, "LT-433" if turned else "LT-432", _words(shape), _words(asked), target)


def flag_holds(spec: DeltaSpec, name: str, shape: tuple[int, ...]) -> bool | None:
    """Is a weight stored (in, out), as ``fan_in_fan_out`` says?  None where it does not show that.

    A square weight does not, nor an output head: that is no Conv1D in any model.
    """
    if not spec.transposed or spec.layout != "linear" or is_head(name):
        return None
    out, inner = side_sizes(spec)
    found = {(out, *inner): False, (*inner, out): True}
    return found.get(shape) if (out,) != inner else None


def place_vector(item: Item, spec: DeltaSpec, target: str, ctx: Context) -> Placement:
    """A bias delta on a bias."""
    problem = unmergeable(item, target, ctx)
    if problem is not None:
        return problem
    (size,) = shape_of(spec)
    if ctx.shape(target) != (size,):
        return misfit(item, "LT-432", _words(ctx.shape(target)), _words((size,)), target)
    return _found(item, BoundDelta(spec, target), "")


def place_replacement(item: Item, name: str, ctx: Context) -> Placement:
    """A whole tensor, or rows of one."""
    replacement = item.replacement
    assert replacement is not None
    target, alias = ctx.lookup(name)
    if target is None:
        return _place_part(item, name, ctx)
    ref, source = ctx.checkpoint.tensors[target], replacement.source
    if ref.dtype != source.dtype:
        problem = unmergeable(item, target, ctx)
        if problem is not None:
            return problem
        if not DTYPES[source.dtype].is_mergeable:
            return misfit(item, "LT-493", "F64, F32, F16 or BF16", source.dtype, target)
    found = Found(item, replacement=BoundReplacement(replacement, target, item.old), alias=alias)
    if replacement.rows is not None:
        return found  # rows are checked when the final vocabulary size is known
    if source.shape == ref.shape:
        return found
    if source.shape[1:] != ref.shape[1:] or not follows_vocabulary(name):
        return misfit(item, "LT-445", _words(ref.shape), _words(source.shape), target)
    if not ctx.options.resize_embeddings:
        return misfit(item, "LT-442", _words(ref.shape), _words(source.shape), target)
    if not alias:
        ctx.resized[target] = source.shape
    return found


def _place_part(item: Item, name: str, ctx: Context) -> Placement:
    """What the base lacks may be a part of its own."""
    new = item.replacement
    is_closed = bool(ctx.checkpoint.components) or ctx.options.allow_unmatched
    if new is None or is_closed or not is_part(new):
        return Misfit(item, "name")
    is_new = ctx.view.known.are_unlike(name, new.source.shape)
    return Found(item, created=name) if is_new else Misfit(item, "name")


def check_rows(item: Item, target: str, ctx: Context) -> Misfit | None:
    """Trainable tokens must name rows that exist, as wide as the embedding."""
    replacement = item.replacement
    if replacement is None or replacement.rows is None:
        return None
    shape, source = ctx.shape(target), replacement.source.shape
    wanted = (len(replacement.rows), *shape[1:])
    if source != wanted:
        return misfit(item, "LT-444", _words(wanted), _words(source), target)
    if any(not 0 <= row < shape[0] for row in replacement.rows):
        worst = max(replacement.rows)
        return misfit(item, "LT-444", f"rows below {shape[0]}", f"row {worst}", target)
    return None


def unmergeable(item: Item, target: str, ctx: Context) -> Misfit | None:
    """A misfit if nothing can be added to the target's number format."""
    dtype = ctx.checkpoint.tensors[target].dtype
    if DTYPES[dtype].is_mergeable:
        return None
    method = ctx.checkpoint.quantization or "unknown"
    return misfit(item, "LT-435", "F64, F32, F16 or BF16", f"{dtype} ({method})", target)


def misfit(item: Item, reason: str, expected: str, got: str, target: str) -> Misfit:
    """A misfit with its numbers."""
    return Misfit(item, reason, expected, got, target)


def _place_conv(item: Item, spec: DeltaSpec, target: str, ctx: Context) -> Placement:
    shape = ctx.shape(target)
    out, inner = side_sizes(spec)
    # A 1×1 convolution and a linear layer are the same matrix; trainers swap them freely.
    filled = inner if len(inner) > 1 else (*inner, *(1 for _ in shape[2:]))
    if (out, *filled) == shape:
        conv = spec if spec.layout == "conv" else replace(spec, layout="conv")
        return _found(item, BoundDelta(conv, target), "")
    if (
        out == shape[0]
        and (len(inner) == 1 or not spec.is_pair)
        and _is_same_kernel(inner, shape[1:])
    ):
        flat = replace(spec, layout="conv")  # kernels may be stored flattened
        return _found(item, BoundDelta(flat, target), "")
    same_kernel = out == shape[0] and filled[1:] == shape[2:]
    if same_kernel and 0 < shape[1] < filled[0] and filled[0] % shape[1] == 0:
        return misfit(item, "LT-434", _words(shape), _words((out, *filled)), target)
    return misfit(item, "LT-432", _words(shape), _words((out, *filled)), target)


def _is_same_kernel(inner: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """The same (in, kernel…), flattened or with other sizes of 1."""
    if len(inner) == 1:
        return inner[0] == numel(stored)
    return [n for n in inner if n != 1] == [n for n in stored if n != 1]


def _found(item: Item, delta: BoundDelta, alias: str) -> Found:
    return Found(item, (delta,), alias=alias)


def _squeeze(inner: tuple[int, ...]) -> tuple[int, ...]:
    return inner[:1] if all(size == 1 for size in inner[1:]) else inner


def _words(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"
