"""Whole tensors in a PEFT file: they take the base's place, they are not deltas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loratool.adapter import Replacement, TensorRef
from loratool.dialects.factors import refuse_shard
from loratool.dialects.peft.config import PeftConfig
from loratool.dialects.peft.keys import Key, Sorted
from loratool.dialects.peft.patterns import endings
from loratool.errors import BadFileError, list_some
from loratool.report.text import plural

MAX_COMPARISONS = 30_000_000  # of entries of modules_to_save with names; two seconds


def read_replacements(
    found: Sorted, config: PeftConfig
) -> tuple[list[Replacement], list[TensorRef], list[str]]:
    """Replacement tensors, copies that a better one hides, and notes.

    Whole tensors come before trainable rows of the same tensor, because the rows are laid on top.

    Raises:
        BadFileError: LT-361 too many entries, LT-364 an empty tensor, LT-367 two tensors for one
            name, LT-369 token numbers that do not fit.
    """
    for ref in (*found.saved.values(), *(key.ref for key in found.plain)):
        if 0 in ref.shape:
            refuse_shard(ref)
    made = {
        name: Replacement(name, ref, "modules_to_save") for name, ref in found.saved.items()
    }  # in file order among themselves
    if len(config.modules_to_save) * len(found.plain) > MAX_COMPARISONS:
        most = MAX_COMPARISONS // len(found.plain)
        raise BadFileError(
            "LT-361", "wrong value in the configuration", file=config.file, key="modules_to_save",
            expected=f"at most {most} entries beside {plural(len(found.plain), 'whole tensor')}",
            got=len(config.modules_to_save),
        )  # fmt: skip
    hidden: list[TensorRef] = []
    unlisted: list[str] = []
    for key in found.plain:
        name = key.module
        if name in found.saved:
            hidden.append(key.ref)  # with bias="all" the trained copy is stored twice
            continue
        if name in made:
            first = made[name].source
            raise BadFileError(
                "LT-367", "two tensors mean the same", file=key.ref.file, key=name,
                got=f"{first.name if isinstance(first, TensorRef) else name} and {key.ref.name}",
            )  # fmt: skip
        origin = _origin(key, config)
        made[name] = Replacement(name, key.ref, origin or "modules_to_save")
        if not origin:
            unlisted.append(name)
    rows = list(_read_tokens(found.modules, config))
    notes = []
    if hidden:
        notes.append(
            f"{plural(len(hidden), 'tensor is', 'tensors are')} also there as modules_to_save, "
            f"which wins: {list_some(ref.name for ref in hidden)} dropped"
        )
    if unlisted and config.file is not None and not config.ties:
        notes.append(
            f"{plural(len(unlisted), 'whole tensor replaces', 'whole tensors replace')} the base's "
            f"although neither modules_to_save nor bias says so: {list_some(unlisted, 3)}"
        )
    return [*made.values(), *rows], hidden, notes


def _origin(key: Key, config: PeftConfig) -> str:
    """Why a whole tensor is in the file, "" if the configuration does not say."""
    module, _, leaf = key.module.rpartition(".")
    is_bias = leaf == "bias" or leaf.endswith("_bias")
    if key.path != key.module:  # it had .base_layer
        return "bias" if is_bias else "base_layer"
    if _is_saved(module, config):
        return "modules_to_save"
    return "bias" if is_bias and config.bias != "none" else ""


def _is_saved(module: str, config: PeftConfig) -> bool:
    return any(f".{entry}." in f".{module}." for entry in config.modules_to_save)


def _read_tokens(
    modules: Mapping[str, Mapping[str, TensorRef]], config: PeftConfig
) -> Iterator[Replacement]:
    trained = {module: roles["tokens"] for module, roles in modules.items() if "tokens" in roles}
    named = {module: rows for module in trained if (rows := _rows_of(module, config)) is not None}
    for module, ref in trained.items():
        rows = named.get(module)
        if rows is None and len(set(named.values())) == 1:  # a head tied to the embedding named
            (rows,) = set(named.values())
        if rows is None or len(ref.shape) != 2 or ref.shape[0] != len(rows):
            field = "token_indices" if config.method != "LORA" else "trainable_token_indices"
            raise BadFileError(
                "LT-369", "trainable tokens without their numbers", file=ref.file, key=ref.name,
                expected=f"{field} with one number per row",
                got=f"shape {list(ref.shape)} and {'no' if rows is None else len(rows)} numbers",
            )  # fmt: skip
        yield Replacement(f"{module}.weight", ref, "trainable_tokens", rows)


def _rows_of(module: str, config: PeftConfig) -> tuple[int, ...] | None:
    indices = config.token_indices
    if indices is None or isinstance(indices, tuple):
        return indices
    return next((indices[e] for e in (module, *endings(module)) if e in indices), None)
