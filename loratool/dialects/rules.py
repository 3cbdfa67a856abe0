"""What commands must know of the programs that an adapter was written for (no torch)."""

from __future__ import annotations

import shlex
from collections.abc import Collection

from loratool.adapter import Adapter, DeltaSpec, TensorRef
from loratool.delta.forms import side_sizes
from loratool.dialects.peft import FOLDER_NAME
from loratool.dialects.registry import home_of, row_of
from loratool.frozen import replace

_JOINED, _OUTPUT = "in_proj_weight", "out_proj"


def why_not_peft(adapter: Adapter) -> str:
    """Why what loads PEFT folders does not load an adapter, "" if it is one."""
    row = row_of(adapter.dialect)
    if row.name == FOLDER_NAME:
        return ""
    return row.lacks if row.written_as == FOLDER_NAME and row.lacks else f"{row.name} file"


def short_title(dialect: str) -> str:
    """How people call a dialect, in few words."""
    row = row_of(dialect)
    return row.short or row.title


def library_of(adapter: Adapter) -> str | None:
    """What loads its files as they are, as the Hub calls it; None if nothing does."""
    return row_of(adapter.dialect).library


def passed_on(adapter: Adapter) -> tuple[TensorRef, ...]:
    """Tensors of its file that are no part of any change and are kept (bundled embeddings)."""
    table = row_of(adapter.dialect).table
    return () if table is None else tuple(r for r in adapter.carried if table.is_passed(r.name))


def with_text_models(adapter: Adapter) -> Adapter:
    """Flat text encoders with the ``text_model`` that transformers 5 leaves out of names."""
    if not adapter.is_flat:
        return adapter

    def living(module: str) -> str:
        component, _, flat = module.rpartition(".")
        bare = component.startswith("te") and flat.startswith(("encoder_layers_", "final_layer_"))
        return f"{component}.text_model_{flat}" if bare else module

    specs = tuple(replace(s, module=living(s.module)) for s in adapter.specs)
    return replace(adapter, specs=specs)


def has_alpha_tensors(adapter: Adapter) -> bool:
    """True if every module has an alpha of its own, which takes any number."""
    table = row_of(adapter.dialect).table
    return table is not None and table.keeps_alphas(adapter.key_order)


def takes_scalings(adapter: Adapter, factors: Collection[float]) -> bool:
    """True if what its file says of scalings can be multiplied with these numbers.

    Every module has an alpha of its own, which takes any number, or one number is for all.
    """
    if row_of(adapter.dialect).is_even:
        return len(set(factors)) == 1
    return has_alpha_tensors(adapter)


def keeps_config(adapter: Adapter) -> bool:
    """True if tensors are exchanged in a file, and fields of its configuration with them."""
    return bool(adapter.config) and not home_of(adapter.dialect).is_even


def is_of_home(adapter: Adapter, dialect: str) -> bool:
    """True if an adapter is written in a dialect where nobody asks for another one.

    Raises:
        UsageError: LT-282, it cannot be written.
    """
    return home_of(adapter.dialect).name == dialect


def conversion(adapter: Adapter, dialect: str) -> str:
    """The command that brings an adapter into a dialect."""
    row = row_of(dialect)
    out = "OUT" if row.is_folder else f"OUT{row.suffixes[0]}"
    asks = row.asks_config or row_of(adapter.dialect).asks_config
    base = ["--base", "BASE"] if asks else []
    return shlex.join(["loratool", "convert", str(adapter.path), "--to", dialect, *base, "-o", out])


def is_folder(dialect: str) -> bool:
    """True if an adapter of a dialect is written as a folder, False if as a single file.

    Raises:
        UsageError: LT-282, it cannot be written.
    """
    return home_of(dialect).is_folder


def tied_pairs(adapter: Adapter) -> tuple[tuple[DeltaSpec, DeltaSpec], ...]:
    """Embedding and head that have one change, turned round (PEFT's ``ensure_weight_tying``).

    On a base that ties nothing PEFT trains two, which other ranks or scalings show, or the bytes:
    `loratool.bind.same_change.settle_tying`.
    """
    if adapter.config.get("ensure_weight_tying") is not True:
        return ()
    plain = [s for s in adapter.specs if s.has_factors and s.is_pair and s.layout == "linear"]
    return tuple(
        (one, other)
        for one in adapter.specs
        if one.layout == "embedding"
        for other in plain
        if _sides(other) == _sides(one)[::-1]
        and (other.rank, other.scaling) == (one.rank, one.scaling)
    )


def _sides(spec: DeltaSpec) -> tuple[int, ...]:
    out, inner = side_sizes(spec)
    return out, inner[0]


def joined_weights(names: Collection[str]) -> dict[str, str]:
    """Output projection -> the weight that holds the projections before it, where both are named.

    PEFT gives both (nn.MultiheadAttention) one rank and one α; see `gains`.
    """
    found = {}
    for name in names:
        module = name.rpartition(".")[0]
        if module == _OUTPUT or module.endswith(f".{_OUTPUT}"):
            joined = module.removesuffix(_OUTPUT) + _JOINED
            if joined in names:
                found[name] = joined
    return found


def gains(names: Collection[str]) -> dict[str, float]:
    """How often a change is added, for those parameters where that is not once.

    PEFT up to 0.21.2 adds that of an attention's output twice, which a spec's scaling holds.
    """
    return dict.fromkeys(joined_weights(names), 2.0)
