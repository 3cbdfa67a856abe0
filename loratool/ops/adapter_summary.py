"""The facts of an opened adapter, for `inspect` (no torch)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from loratool.adapter import Adapter, DeltaSpec, Replacement, Source
from loratool.archs.families import family_of
from loratool.delta.forms import matrix_shape
from loratool.dialects.programs import judge_loads
from loratool.dialects.rules import short_title
from loratool.dialects.stated import divides_by_root, method_of
from loratool.dialects.told import embeddings_of, tell, trainer_by_names
from loratool.dtypes import DTYPES
from loratool.report.families import place_of
from loratool.report.inspect import AdapterSummary, ReplacedTensor, TargetFamily


def summarize_adapter(adapter: Adapter, label: str = "", card: str = "") -> AdapterSummary:
    """The facts of an opened adapter.

    Args:
        adapter: the adapter.
        label: its short name, "" = that of its path.
        card: text of the model card beside it, "" if there is none.
    """
    # Specs may share a tensor (slices of one fused pair): count it once.
    factors = list({(id(f), f.name): f for s in adapter.specs for f in s.fields.values()}.values())
    replaced = [_replaced(r) for r in adapter.replacements]
    everything = [*factors, *(r.source for r in adapter.replacements)]
    return AdapterSummary(
        label=label or adapter.label,
        dialect=adapter.dialect,
        dialect_title=short_title(adapter.dialect),
        method=_method(adapter),
        base_model=adapter.base_model,
        modules=len(adapter.specs),
        families=_families(adapter.specs),
        ranks=dict(sorted(Counter(s.rank for s in adapter.specs if s.rank).items())),
        alphas=_counted(
            "-" if s.alpha is None else f"{s.alpha:g}" for s in adapter.specs if s.rank
        ),
        scalings=_counted(f"{s.scaling:.6g}" for s in adapter.specs if s.rank),
        factor_parameters=sum(s.numel for s in factors),
        factor_bytes=sum(s.nbytes for s in factors),
        replaced_parameters=sum(r.source.numel for r in adapter.replacements),
        replaced_bytes=sum(r.nbytes for r in replaced),
        dtypes=dtype_bytes(everything),
        replaced=tuple(sorted(replaced, key=lambda r: -r.nbytes)),
        unclaimed=tuple(ref.name for ref in adapter.unclaimed),
        extras=tuple(dict.fromkeys(name.partition("/")[0] for name in adapter.extras)),
        loads=judge_loads(adapter),
        metadata=dict(adapter.metadata),
        told=tell(adapter.metadata, card),
        spelled_by=trainer_by_names(adapter.key_order),
        kinds=_counted(s.title for s in adapter.specs),
        embeddings=embeddings_of(adapter.key_order),
        family=family_of(
            {s.module: matrix_shape(s) for s in adapter.specs if s.is_matrix}, adapter.metadata
        ).title,
    )


def _method(adapter: Adapter) -> str:
    method = method_of(adapter)
    if any(spec.scales_rows for spec in adapter.specs):
        method = "DoRA"
    extra = [spec.title for spec in adapter.specs if spec.reach == "all"][:1]
    extra += ["rsLoRA scaling"] if divides_by_root(adapter) else []
    return f"{method} ({', '.join(extra)})" if extra else method


def _families(specs: Sequence[DeltaSpec]) -> tuple[TargetFamily, ...]:
    groups: dict[str, list[DeltaSpec]] = {}
    for spec in specs:
        groups.setdefault(_leaf(spec), []).append(spec)
    return tuple(
        TargetFamily(
            name=name,
            modules=len(members),
            layers=_layer_ranges(members),
            ranks=dict(sorted(Counter(s.rank for s in members).items())),
            parameters=sum(f.numel for s in members for f in s.fields.values()),
        )
        for name, members in groups.items()
    )


def _leaf(spec: DeltaSpec) -> str:
    family = place_of(spec.module).family
    return family if spec.parameter == "weight" else f"{family}.{spec.parameter}".lstrip(".")


def _layer_ranges(specs: Iterable[DeltaSpec]) -> str:
    numbers = {int(m[1]) for s in specs if (m := re.search(r"\.(\d+)(?=\.|$)", s.module))}
    return format_ranges(numbers)


def format_ranges(numbers: Iterable[int]) -> str:
    """``0-3,5,7-9`` for a set of numbers.

    Example:
        >>> format_ranges({0, 1, 2, 3, 5})
        '0-3,5'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _replaced(replacement: Replacement) -> ReplacedTensor:
    source = replacement.source
    rows = None if replacement.rows is None else len(replacement.rows)
    return ReplacedTensor(
        replacement.name,
        source.shape,
        dtype_word(source.dtype),
        source.nbytes,
        replacement.origin,
        rows,
    )


def dtype_word(dtype: str) -> str:
    """The name that torch uses, where it has one."""
    return DTYPES[dtype].word or dtype


def dtype_bytes(sources: Iterable[Source]) -> Mapping[str, int]:
    """Element type -> bytes, the largest first."""
    counts: Counter[str] = Counter()
    for source in sources:
        counts[dtype_word(source.dtype)] += source.nbytes
    return dict(counts.most_common())


def _counted(values: Iterable[str]) -> Mapping[str, int]:
    return dict(Counter(values).most_common())
