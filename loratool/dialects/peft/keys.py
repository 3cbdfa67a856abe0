"""Key grammar of PEFT's tensor files: from a tensor's name to module path and role."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache, lru_cache

from loratool import kinds
from loratool.adapter import TensorRef
from loratool.errors import BadFileError, MismatchError, list_some
from loratool.frozen import Frozen, Struct, field, replace
from loratool.lazy import regex

PREFIX = "base_model.model."
# Left in names by torch.compile, FSDP and activation checkpointing.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_MODULE = r"(?:(?P<module>.+)\.)?"
_NAME = r"(?:\.(?P<name>(?!weight$|bias$)[^.]+))?"
_ROLES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (role, regex(_MODULE + pattern, re.DOTALL))
    for role, pattern in (
        ("lora_A", rf"lora_A{_NAME}\.weight"),
        ("lora_B", rf"lora_B{_NAME}\.weight"),
        ("bias", rf"lora_B{_NAME}\.bias"),
        ("embedding_A", rf"lora_embedding_A{_NAME}(?:\.weight)?"),
        ("embedding_B", rf"lora_embedding_B{_NAME}(?:\.weight)?"),
        ("magnitude", rf"lora_magnitude_vector{_NAME}(?:\.weight)?"),
        ("diag", rf"lora_diag{_NAME}"),
        ("tokens", rf"trainable_tokens_delta{_NAME}"),
    )
)
# Roles that all dialects spell alike (`loratool.kinds`), such as hada_w1_a.
_SPELLED = regex(_MODULE + rf"(?P<role>[a-z]+(?:_[a-z0-9]+)+){_NAME}(?:\.weight)?", re.DOTALL)
_SHARED = regex(rf"(?:base_model\.)?(?P<leaf>[A-Za-z]\w*){_NAME}")
# State that only training needs; the leading dot keeps module names out.
_TRAINING = frozenset(
    ("lora_velora_embed", "lora_monteclora_sampler", "trainable_tokens_original", "ranknum")
)
_ORIGINAL = regex(r"(?:^|\.)original_module\.")
_SAVED = regex(_MODULE + r"modules_to_save\.(?P<rest>.+)", re.DOTALL)
_UNKNOWN_LORA = regex(r"(?:^|\.)lora_[A-Za-z_]+(?:\.[^.]+)?(?:\.weight|\.bias)?$")
_INFIX = regex(r"(?:^|(?<=\.))(?:base_layer|token_adapter)\.")

# Around a module: not the wrappers of its own parameters, nor that of an attention around out_proj.
_AROUND = regex(r"\.base_layer(?=\.(?!(?:base_layer\.)*base_layer$|out_proj$))")


class Key(Frozen):
    """One tensor, named.

    Attributes:
        ref: the tensor.
        path: its name without prefix and wrappers.
        role: a role of `Sorted.modules`, or ``saved``, ``plain``, ``training``, ``original``.
        module: module path; for ``saved`` and ``plain`` the in-memory tensor name.
        adapter: name of the adapter that was left in the key, "" if none was.
    """

    ref: TensorRef
    path: str
    role: str
    module: str
    adapter: str = ""


class Sorted(Struct):
    """The tensors of a file by what they are.

    Attributes:
        modules: module path -> role -> tensor, in file order.
        saved: in-memory name -> tensor, from ``modules_to_save`` wrappers.
        plain: whole tensors that are no part of a delta.
        training: state that merging does not need.
        originals: untrained copies that ``modules_to_save`` keeps.
        notes: one sentence each.
    """

    modules: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    saved: dict[str, TensorRef] = field(default_factory=dict)
    plain: list[Key] = field(default_factory=list)
    training: list[TensorRef] = field(default_factory=list)
    originals: list[TensorRef] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def take_shared(
    refs: Iterable[TensorRef], names: Mapping[str, str] | None
) -> tuple[dict[str, TensorRef], list[TensorRef]]:
    """Tensors that a file holds once for all modules, by role, and the rest.

    Args:
        refs: of a file.
        names: what such a tensor is called behind ``base_model.`` -> its role.
    """
    shared: dict[str, TensorRef] = {}
    rest = []
    for ref in refs:
        match = _SHARED.fullmatch(ref.name) if names else None
        role = (names or {}).get(match["leaf"]) if match else None
        if role is None:
            rest.append(ref)
        else:
            _once(shared, role, Key(ref, ref.name, role, ref.name))
    return shared, rest


def sort_tensors(refs: Iterable[TensorRef], own: Mapping[str, str] | None = None) -> Sorted:
    """Give every tensor of a file a module path and a role.

    Args:
        refs: of the file.
        own: what keys of a method besides LoRA end in -> role.

    Raises:
        BadFileError: LT-367, two tensors with one meaning; LT-308, a name of nothing.
        MismatchError: LT-410 several adapters in one file, LT-415 unknown ``lora_`` tensors.
    """
    listed = list(refs)
    paths, notes = strip_names([ref.name for ref in listed])
    found = Sorted(notes=notes)
    nameless = [ref for ref, path in zip(listed, paths, strict=True) if not path.strip(".")]
    if nameless:
        raise BadFileError("LT-308", "unusable tensor name", file=nameless[0].file,
                           key=nameless[0].name, expected="a module behind the prefix")  # fmt: skip
    keys = [parse_key(ref, path, own) for ref, path in zip(listed, paths, strict=True)]
    adapters = {key.adapter for key in keys if key.adapter}
    if len(adapters) > 1:
        raise MismatchError(
            "LT-410", "the file holds several adapters", file=listed[0].file,
            got=list_some(adapters), hint="save them one by one",
        )  # fmt: skip
    if adapters:
        found.notes.append(f"adapter name {list_some(adapters)!r} was left in the tensor names")
    adapted = {key.module for key in keys if key.role in ("lora_A", "embedding_A")}
    keys = [_own_module(key, adapted) for key in keys]
    unknown = [key.ref.name for key in keys if key.role == "unknown"]
    if unknown:
        raise MismatchError(
            "LT-415", "LoRA tensors of an unknown kind", file=listed[0].file,
            key=list_some(unknown), hint="which program and version wrote them?",
        )  # fmt: skip
    for key in keys:
        _put(found, key)
    return found


def strip_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names without PEFT's prefix and without wrapper infixes, and notes about oddities."""
    notes: list[str] = []
    out = without_wrappers(names)
    if out != list(names):
        notes.append("names of torch.compile or FSDP wrappers were removed from tensor names")
    out, was_parallel = strip_parallel(out)
    stripped: list[str] = []
    bare = outside = 0
    for name in out:
        before, mark, after = name.partition(PREFIX)
        if mark and not before:
            stripped.append(after)
        elif mark and before.endswith("."):
            stripped.append(before + after)
            outside += 1
        else:
            stripped.append(name)
            bare += 1
    stripped, was_parallel_inside = strip_parallel(stripped)
    if was_parallel or was_parallel_inside:
        notes.append("the prefix of a DataParallel wrapper was removed from tensor names")
    if bare:
        notes.append(
            f"{bare} of {len(names)} tensor names lack the prefix {PREFIX!r}: "
            "PEFT itself would load none of them"
        )
    if outside:
        notes.append(f"{outside} tensor names have {PREFIX!r} in their middle: it was removed")
    return stripped, notes


def living_names(names: Sequence[str]) -> list[str]:
    """The names under which PEFT itself would have saved these tensors.

    Wrappers, adapter names and missing prefixes make PEFT pass a tensor by in silence.  Copies that
    PEFT itself writes (a saved module's bias, with ``bias="all"``) keep their names.

    Example:
        >>> living_names(["model.q_proj.lora_A.first.weight"])
        ['base_model.model.model.q_proj.lora_A.weight']
    """
    found = [
        name if _is_shared(name) else PREFIX + _without_adapter(path)
        for name, path in zip(names, strip_names(names)[0], strict=True)
    ]
    count = Counter(found)
    return [new if count[new] == 1 else old for new, old in zip(found, names, strict=True)]


def _is_shared(name: str) -> bool:
    """True for a tensor of the model as a whole, which PEFT saves without a module."""
    head, _, leaf = name.partition(".")
    return head == PREFIX.partition(".")[0] and bool(leaf) and "." not in leaf


def _without_adapter(path: str) -> str:
    role, module, name = _role_of(path)
    if role:
        tail = path[len(module) :]
        path = module + (tail.replace(f".{name}", "", 1) if name else tail)
        return path.removesuffix(".weight") if role.startswith("embedding") else path
    if (match := _SAVED.fullmatch(path)) and not _ORIGINAL.search(path):
        leaf = match["rest"].rpartition(".")[2]
        return f"{match['module']}.{leaf}" if match["module"] else leaf
    return path


def _role_of(path: str) -> tuple[str, str, str]:
    """(role, module, name of an adapter) of a tensor of LoRA; no role for any other one."""
    head, *parts = path.rsplit(".", 3)
    if len(parts) < 3 or not head or not parts[0]:
        return _role_of_end(path)
    role, module, name = _role_of_end(path[len(head) + 1 :])
    return role, f"{head}.{module}" if module else head, name


@lru_cache(maxsize=1 << 10)  # what follows the last dots of a module is the same for many
def _role_of_end(path: str) -> tuple[str, str, str]:
    for role, pattern in _ROLES:
        if match := pattern.fullmatch(path):
            return role, match["module"] or "", match["name"] or ""
    return "", "", ""


def parse_key(ref: TensorRef, path: str, own: Mapping[str, str] | None = None) -> Key:
    """The role of one tensor, from its stripped name; ``own`` as in `sort_tensors`."""
    if own and (match := _own_pattern(tuple(own)).fullmatch(path)):
        return Key(ref, path, own[match["role"]], match["module"] or "", match["name"] or "")
    if "original_module." in path and _ORIGINAL.search(path):
        return Key(ref, path, "original", path)
    if not _TRAINING.isdisjoint(path.split(".")):
        return Key(ref, path, "training", path)
    role, module, name = _role_of(path)
    if role:
        module = _AROUND.sub("", module) if ".base_layer." in module else module
        return Key(ref, path, role, module.removesuffix(".token_adapter"), name)
    if (match := _SPELLED.fullmatch(path)) and kinds.is_spelled(match["role"]):
        return Key(ref, path, match["role"], match["module"] or "", match["name"] or "")
    if match := _SAVED.fullmatch(path):
        # Saving drops the adapter's name only where it is the last part but one.
        first, _, rest = match["rest"].partition(".")
        leaf, adapter = (rest, first) if rest else (first, "")
        module = f"{match['module']}.{leaf}" if match["module"] else leaf
        return Key(ref, path, "saved", _INFIX.sub("", module), adapter)
    if _UNKNOWN_LORA.search(path):
        return Key(ref, path, "unknown", path)
    return Key(ref, path, "plain", _INFIX.sub("", path))


@cache
def _own_pattern(endings: tuple[str, ...]) -> re.Pattern[str]:
    words = "|".join(map(re.escape, endings))
    return re.compile(_MODULE + rf"(?P<role>{words}){_NAME}(?:\.weight)?", re.DOTALL)


def _own_module(key: Key, adapted: Collection[str]) -> Key:
    """A model may call a module of its own ``lora_…``: what lies beside no factors is none."""
    owner, _, rest = key.path.rpartition("lora_")
    is_module = rest.endswith((".weight", ".bias")) and owner.rstrip(".") not in adapted
    if key.role != "unknown" or not is_module:
        return key
    return replace(key, role="plain", module=_INFIX.sub("", key.path))


def without_wrappers(names: Iterable[str]) -> list[str]:
    """Names without what torch.compile, FSDP and activation checkpointing put into them."""
    return [
        ".".join(p for p in n.split(".") if p not in _WRAPPERS)
        if ("._" in n or n[:1] == "_")
        else n
        for n in names
    ]


def strip_parallel(names: list[str]) -> tuple[list[str], bool]:
    """Without a leading ``module.``, if every name has it."""
    if names and all(name.startswith("module.") for name in names):
        return [name.removeprefix("module.") for name in names], True
    return names, False


def _put(found: Sorted, key: Key) -> None:
    if key.role == "plain":
        found.plain.append(key)
    elif key.role == "training":
        found.training.append(key.ref)
    elif key.role == "original":
        found.originals.append(key.ref)
    elif key.role == "saved":
        _once(found.saved, key.module, key)
    else:
        _once(found.modules.setdefault(key.module, {}), key.role, key)


def _once(where: dict[str, TensorRef], name: str, key: Key) -> None:
    if name in where:
        _refuse_twice(where, name, key)
    where[name] = key.ref


def _refuse_twice(where: Mapping[str, TensorRef], name: str, key: Key) -> None:
    raise BadFileError(
        "LT-367", "two tensors mean the same", file=key.ref.file, key=key.module,
        got=f"{where[name].name} and {key.ref.name}",
    )  # fmt: skip
