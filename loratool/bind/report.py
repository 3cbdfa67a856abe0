"""Errors of binding: every misfit, grouped, with what would help."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from loratool.bind.items import Found, Item, Misfit
from loratool.bind.user_names import COMPONENTS
from loratool.delta.forms import matrix_shape
from loratool.dtypes import DTYPES
from loratool.errors import MismatchError, list_some
from loratool.lazy import regex
from loratool.report.text import plural
from loratool.store.checkpoint import Checkpoint

_WHAT: Mapping[str, tuple[str, str, str]] = {
    "LT-425": (
        "set of rows for new tokens would be lost",
        "sets of rows for new tokens would be lost",
        "--skip new_embeddings.safetensors leaves them out",
    ),
    "LT-432": (
        "shape does not fit the base",
        "shapes do not fit the base",
        "the adapter was made for another base, or for another size of it",
    ),
    "LT-433": (
        "weight fits transposed, and nothing says for sure that it is stored so",
        "weights fit transposed, and nothing says for sure that they are stored so",
        "set fan_in_fan_out in adapter_config.json if the base uses Conv1D; --skip REGEX leaves "
        "modules out",
    ),
    "LT-434": (
        "grouped convolution cannot be merged",
        "grouped convolutions cannot be merged",
        "keep the adapter separate, or leave the modules out with --skip REGEX",
    ),
    "LT-435": (
        "target is quantised and cannot take a delta",
        "targets are quantised and cannot take a delta",
        "--dequantize (16-bit weights) or --requant (its own format), where the format is read; "
        "or merge into the 16-bit model that it was quantised from",
    ),
    "LT-436": (
        "square expert weight has an ambiguous layout",
        "square expert weights have an ambiguous layout",
        "say --moe-layout eoi (stored (E, out, in)) or --moe-layout eio",
    ),
    "LT-437": (
        "expert weight does not fit the base",
        "expert weights do not fit the base",
        "check --moe-layout and the base",
    ),
    "LT-438": (
        "bias delta has no bias in the base",
        "bias deltas have no bias in the base",
        "lora_bias is not mergeable into a base without biases; --skip REGEX leaves modules out",
    ),
    "LT-439": (
        "change cannot be cut as the base is: its rows depend on each other",
        "changes cannot be cut as the base is: their rows depend on each other",
        "with a base whose projections are the adapter's, loratool convert ADAPTER --to peft "
        "--base THAT -o OUT makes LoRA of it, which can be cut",
    ),
    "LT-442": (
        "replaced embedding has another vocabulary size than the base",
        "replaced embeddings have another vocabulary size than the base",
        "--resize-embeddings takes the adapter's vocabulary",
    ),
    "LT-444": (
        "set of trainable tokens does not fit the vocabulary",
        "sets of trainable tokens do not fit the vocabulary",
        "check the base",
    ),
    "LT-445": (
        "replacement tensor has another shape than the base's",
        "replacement tensors have another shape than the base's",
        "the adapter was made for another base, or for another layout of it",
    ),
    "LT-493": (
        "replacement tensor is of a type that cannot be converted",
        "replacement tensors are of a type that cannot be converted",
        "save the adapter with ordinary float types",
    ),
}
_TITLES = {"te": "text encoder", "unet": "UNet", "transformer": "transformer", "vae": "VAE"}
# Names come from strangers: what is proposed must not take minutes or gigabytes to find.
_LONGEST = 200  # characters of a name that is compared letter by letter
_POOL = 500
_VOTERS = 500
_MOST_HEADS = 50
_DEEPEST = 12  # parts of a prefix
_VOCABULARY = regex(r"(^|\.)(\w*embed\w*|wte|shared|lm_head|output)\.weight$")
_PACKED = ("qweight", "weight_packed", "weight_blocks", "weight.absmax")


def shape_error(misfits: Sequence[Misfit], checkpoint: Checkpoint) -> MismatchError:
    """The error for items that have a target but do not fit it; the commonest reason first."""
    reasons = Counter(m.reason for m in misfits)
    reason = max(sorted(reasons), key=lambda r: reasons[r])
    chosen = sorted((m for m in misfits if m.reason == reason), key=lambda m: m.item.name)
    one, many, hint = _WHAT[reason]
    if "LT-442" in reasons and all(_is_resized(m, checkpoint) for m in chosen):
        hint = _WHAT["LT-442"][2]
    first = chosen[0]
    return MismatchError(
        reason,
        plural(len(chosen), one, many),
        file=checkpoint.path,
        key=list_some(m.item.name for m in chosen),
        expected=_first(first.expected, first.target, len(chosen)),
        got=first.got or None,
        hint=hint,
    )


def _is_resized(misfit: Misfit, checkpoint: Checkpoint) -> bool:
    """True for factors of an embedding or a head that fit but for the size of the vocabulary."""
    spec, target = misfit.item.spec, checkpoint.tensors.get(misfit.target)
    if spec is None or target is None or len(target.shape) != 2 or not spec.is_matrix:
        return False
    out, inner = matrix_shape(spec)
    width = out if spec.layout == "embedding" else inner
    return bool(_VOCABULARY.search(misfit.item.name)) and width == target.shape[1]


def unmatched_error(
    misfits: Sequence[Misfit], found: Sequence[Found], total: int, checkpoint: Checkpoint
) -> MismatchError:
    """The error for items whose names the base does not have, beside those that were ``found``."""
    packed = _packed(misfits, checkpoint)
    if packed:
        return packed
    modules = sorted({m.item.module for m in misfits})
    what = f"{len(modules)} of {total} modules have no target in {checkpoint.path.name}"
    groups = group_words(modules, checkpoint)
    if groups:
        what += f" — {groups}"
    hint = _rename_hint(misfits, found, checkpoint) or _skip_hint(modules)
    return MismatchError(
        "LT-430",
        what,
        file=checkpoint.path,
        key=list_some(modules),
        expected=_nearest(misfits, checkpoint),
        hint=hint,
    )


def ambiguous_error(first: str, second: str, checkpoint: Checkpoint) -> MismatchError:
    """Two rules place every module, in different places."""
    return MismatchError(
        "LT-431",
        "names can be matched in two ways",
        file=checkpoint.path,
        expected="one rule",
        got=f"{first}, or {second}",
        hint="say which with --rename 's/^/prefix./'",
    )


def collision_error(names: Iterable[str], target: str, checkpoint: Checkpoint) -> MismatchError:
    """Two modules have the same target."""
    return MismatchError(
        "LT-447",
        "several modules of the adapter map to one tensor of the base",
        file=checkpoint.path,
        key=target,
        got=list_some(names),
        hint="check --rename",
    )


def group_words(modules: Sequence[str], checkpoint: Checkpoint) -> str:
    """What the misfits have in common, such as "all are text encoder (text_encoder.*)"."""
    groups = Counter(_group(module) for module in modules)
    if len(groups) == 1:
        (word,) = groups
        return f"all are {word}{_holds(checkpoint)}"
    parts = [f"{count} {word}" for word, count in sorted(groups.items(), key=lambda g: -g[1])]
    return ", ".join(parts[:6])


def _group(module: str) -> str:
    for word, pattern in COMPONENTS.items():
        match = re.match(rf"{pattern}(?=[._])", module)
        if match is not None:
            return f"{_TITLES[word]} ({match[0]}.*)"
    head = re.split(r"\.\d+(?:\.|$)", module, maxsplit=1)[0]
    return f"{head}.*" if head != module else module


def _holds(checkpoint: Checkpoint) -> str:
    if checkpoint.components:
        return f"; the base holds {', '.join(sorted(checkpoint.components))}"
    heads = Counter(name.split(".", 1)[0] for name in checkpoint.tensors)
    common = [head for head, _ in heads.most_common(3)]
    return f"; the base holds {', '.join(h + '.*' for h in common)}" if common else ""


def _first(expected: str, target: str, count: int) -> str | None:
    if not expected:
        return None
    where = f" at {target}" if target else ""
    return f"{expected}{where}{' (first of them)' if count > 1 else ''}"


def _nearest(misfits: Sequence[Misfit], checkpoint: Checkpoint) -> str | None:
    """The base names most like the first misfits."""
    found: list[str] = []
    short = [n for n in checkpoint.tensors if len(n) <= _LONGEST]
    for misfit in sorted(misfits, key=lambda m: m.item.name)[:3]:
        name = misfit.item.name
        if len(name) > _LONGEST:
            continue
        leaf = tuple(name.rsplit(".", 2)[-2:])
        pool = [n for n in short if tuple(n.rsplit(".", 2)[-2:]) == leaf]
        close = difflib.get_close_matches(name, (pool or short)[:_POOL], n=1)
        found.extend(c for c in close if c not in found)
    return f"names like {', '.join(found)}" if found else None


def _rename_hint(
    misfits: Sequence[Misfit], found: Sequence[Found], checkpoint: Checkpoint
) -> str | None:
    """The change of prefix that would give most misfits a target, and leave the others theirs.

    A sample of them votes: each for the heads of the base names with which it shares the longest
    tail of three parts or more.  The winner is then tried on all.
    """
    taken = {target for one in found for target in one.targets}
    free = dict.fromkeys(name for name in checkpoint.tensors if name not in taken)
    names = [m.item.name for m in misfits]
    sample = names[:: max(1, len(names) // _VOTERS)]
    wanted: dict[str, list[str]] = {tail: [] for name in sample for _, tail in _cuts(name)}
    for name in free:
        for head, tail in _cuts(name):
            heads = wanted.get(tail)
            if heads is not None and len(heads) < _MOST_HEADS:
                heads.append(head)
    votes: Counter[tuple[str, str]] = Counter()
    for name in sample:
        for old, tail in _cuts(name):
            if wanted[tail]:
                votes.update((old, new) for new in dict.fromkeys(wanted[tail]) if new != old)
                break
    if not votes:
        return None
    old, new = max(votes.items(), key=lambda v: (v[1], v[0]))[0]
    count = sum(n.startswith(old) and new + n[len(old) :] in free for n in names)
    if count * 2 < len(names) or any(one.item.name.startswith(old) for one in found):
        return None
    pattern = "^" + re.escape(old).replace("/", r"\/")
    target = new.replace("/", r"\/")
    return f"--rename 's/{pattern}/{target}/' would match {count} of {len(names)}"


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """(head with its dot, tail) of a name, the longest tail first, three parts at least."""
    at = 0
    for _ in range(min(name.count(".") - 1, _DEEPEST)):
        yield name[:at], name[at:]
        at = name.index(".", at) + 1


def _skip_hint(modules: Sequence[str]) -> str:
    for word, pattern in COMPONENTS.items():
        if all(re.match(rf"{pattern}[._]", module) for module in modules):
            return f"--skip {word}, or a base that holds them"
    return "--skip REGEX or --allow-unmatched leaves them out"


def _packed(misfits: Sequence[Misfit], checkpoint: Checkpoint) -> MismatchError | None:
    """Quantised bases hide a weight behind packed tensors of other names."""
    found = [
        m
        for m in misfits
        if any(f"{_stem(m.item)}.{suffix}" in checkpoint.tensors for suffix in _PACKED)
        or f"{m.item.name}_blocks" in checkpoint.tensors
        or (checkpoint.quantization and not _has_plain_matrix(checkpoint))
    ]
    if not found:
        return None
    one, many, hint = _WHAT["LT-435"]
    return MismatchError(
        "LT-435",
        plural(len(found), one, many),
        file=checkpoint.path,
        key=list_some(m.item.name for m in found),
        expected="F64, F32, F16 or BF16",
        got=checkpoint.quantization or "packed weights",
        hint=hint,
    )


def _has_plain_matrix(checkpoint: Checkpoint) -> bool:
    refs = checkpoint.tensors.values()
    return any(len(ref.shape) > 1 and DTYPES[ref.dtype].is_mergeable for ref in refs)


def _stem(item: Item) -> str:
    return item.name.rpartition(".")[0]
