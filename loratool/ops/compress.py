"""Plan the compression of an adapter: which deltas, in which groups, stored how."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from loratool.adapter import Adapter, AdapterFiles, DeltaSpec, Source, TensorData
from loratool.delta.forms import (
    has_core,
    is_grouped,
    shape_of,
    side_sizes,
    spans_rows,
    storage_types,
    values_of,
    with_factors,
    with_lengths,
    with_values,
)
from loratool.dialects import unmergeable_reason, write_adapter_files
from loratool.dialects.registry import home_of
from loratool.dialects.rules import gains, joined_weights, tied_pairs
from loratool.dtypes import tensor_bytes
from loratool.engine.step_args import FactorArgs
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen, field, replace
from loratool.ops.additive import require_additive, require_kernels
from loratool.ops.assemble import routed_weights
from loratool.ops.weights import names_of
from loratool.plan import Plan, module_step
from loratool.store.adapter_writer import with_record

_WAY_OUT = "the base settles it: --base BASE"


class Group(Frozen):
    """Deltas that must have one rank.

    Attributes:
        specs: their positions in `CompressPlan.specs`.
        floor: smallest rank: 1 where PEFT cannot leave the module out.
    """

    specs: tuple[int, ...]
    floor: int = 0


class CompressPlan(Frozen):
    """What there is to compress in one adapter.

    Attributes:
        adapter: as read.
        specs: its low-rank deltas, in file order.
        groups: those that share a rank, together.
        dtypes: storage type of the new factors of each spec.
        gains: scaling that goes with the new factors of each spec.
        joined: spec -> another one that it shares rank and alpha with.
        biases: module -> its bias delta, stored with the module's scaling.
        anew: names of specs that no file holds as they are: always written anew.
        turned: names of specs that will be DoRA again: rank 1 at least, and a length per row.
        base_config: of the base, where the adapter's dialect asks what it says.
        dtype: that was asked for, of all factors.
        record: provenance of the result.
    """

    adapter: Adapter
    specs: tuple[DeltaSpec, ...]
    groups: tuple[Group, ...]
    dtypes: tuple[str, ...]
    gains: tuple[float, ...]
    joined: Mapping[str, str]
    biases: Mapping[str, DeltaSpec]
    anew: frozenset[str] = frozenset()
    turned: frozenset[str] = frozenset()
    base_config: Mapping[str, Any] | None = None
    dtype: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def files(self, adapter: Adapter) -> AdapterFiles:
        """The files of what was made of it."""
        return with_record(write_adapter_files(
            adapter, base_config=self.base_config, base_tensors=names_of(self.adapter),
        ), self.record)  # fmt: skip

    @property
    def is_grouped(self) -> bool:
        """Some ranks depend on more than one delta, or have a floor."""
        return any(len(g.specs) > 1 or g.floor for g in self.groups)

    def factor_shapes(self, index: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_A and lora_B at a rank; block-diagonal factors are written out."""
        spec = self.specs[index]
        (out, inner), rows = side_sizes(spec), rank * max(1, spec.experts)
        return (rows, *inner), (out, rows, *(1 for _ in inner[1:]))

    def bytes_per_rank(self, index: int, dtypes: Sequence[str]) -> int:
        """What one rank of a delta takes in the file."""
        return sum(tensor_bytes(dtypes[index], s) for s in self.factor_shapes(index, 1))

    def steps(self, op: str, args: Sequence[Mapping[str, Any]]) -> Plan:
        """One step per delta; ``args[i]`` are those of ``specs[i]``."""
        made = [module_step(op, [s], **a) for s, a in zip(self.specs, args, strict=True)]
        return Plan("compress", tuple(made))

    def factor_args(self, index: int) -> FactorArgs:
        """Arguments of a ``factor`` step, but for its rank."""
        spec = self.specs[index]
        gain = self.gains[index]
        return FactorArgs(
            dtype=self.dtypes[index], gain=gain, bias=self.bias_of(spec),
            must_rewrite=not (spec.is_pair or has_core(spec)) or spec.blocks is not None
            or spec.name in self.anew or self._is_uneven(spec)
            or (self.dtype is not None and storage_types(spec) != {self.dtype})
            or home_of(self.adapter.dialect).is_even,
        )  # fmt: skip

    def bias_of(self, spec: DeltaSpec) -> DeltaSpec | None:
        """The change of the bias beside a weight, whose scaling follows the weight's."""
        return self.biases.get(spec.module) if spec.parameter == "weight" else None

    def _is_uneven(self, spec: DeltaSpec) -> bool:
        """One of two that share rank and alpha, and whose scalings are not those that gives."""
        if spec.name not in {*self.joined, *self.joined.values()}:
            return False
        first = self.joined.get(spec.name, spec.name)
        scalings = [
            s.scaling / g
            for s, g in zip(self.specs, self.gains, strict=True)
            if self.joined.get(s.name, s.name) == first
        ]
        return len(set(scalings)) > 1


def plan_compress(
    adapter: Adapter,
    *,
    one_rank: bool = False,
    original: Adapter | None = None,
    turned: frozenset[str] = frozenset(),
    base_config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> CompressPlan:
    """Look at what is in an adapter and refuse what truncation would get wrong.

    Args:
        adapter: opened.
        one_rank: of all modules together.
        original: what it was before the base was taken out of its changes.
        turned: names of specs that will be DoRA again.
        base_config: of the base that was taken out.
        dtype: safetensors name of the factors' type; None = that of the old ones.

    Raises:
        MismatchError: LT-449 DoRA, LT-497 a delta on a changed base, LT-498 anything else that
            is not a fixed product of two factors.
    """
    if any(s.is_open for s in adapter.specs):
        require_additive(adapter, "compressed", hint="give the base, --base BASE")
    _check(adapter)
    require_kernels(adapter, adapter.specs, adapter.dialect)
    stored = {s.name: s for s in (original or adapter).specs}
    specs = tuple(s for s in adapter.specs if s.has_factors)
    biases = {s.module: s for s in adapter.specs if not s.is_matrix}
    names = {s.name for s in specs}
    joined, known = joined_weights(names), gains(names)
    tied = {s.name for pair in tied_pairs(adapter) for s in pair}
    groups = [Group(tuple(range(len(specs))), 1)] if one_rank else None
    return CompressPlan(
        adapter,
        specs,
        tuple(groups or _groups(specs, _never_dropped(specs, biases, turned), joined, tied)),
        tuple(dtype or _storage_dtype(stored[s.name]) for s in specs),
        tuple(known.get(s.name, 1.0) for s in specs),
        joined,
        biases,
        frozenset(s.name for s in specs if s.reach != "all" == stored[s.name].reach),
        turned,
        base_config if home_of(adapter.dialect).asks_config else None,
        dtype,
    )


def _never_dropped(
    specs: Sequence[DeltaSpec], biases: Mapping[str, DeltaSpec], turned: Collection[str]
) -> set[str]:
    """Modules that change something besides their delta."""
    return {*biases, *(s.module for s in specs if s.name in turned)}


def rebuild(plan: CompressPlan, results: Sequence[Any]) -> tuple[Adapter, list[str]]:
    """The adapter with its new factors, and the names of the modules that were dropped.

    Args:
        plan: of the adapter.
        results: a `Factored` per spec.
    """
    made: dict[str, DeltaSpec | None] = {}
    biases: dict[str, DeltaSpec] = {}
    for spec, result, gain in zip(plan.specs, results, plan.gains, strict=True):
        if result.rank == 0:
            made[spec.name] = None
        elif result.factors is None:
            made[spec.name] = spec
        else:
            lora_A, lora_B = result.factors
            made[spec.name] = with_factors(
                spec, lora_B, lora_A, rank=result.rank, alpha=gain * result.rank, scaling=gain
            )
            bias = plan.bias_of(spec)
            if bias is not None:
                biases[bias.name] = with_values(
                    bias, result.bias, alpha=gain * result.rank, scaling=gain
                )
    dropped = [name for name, spec in made.items() if spec is None]
    specs = tuple(
        new
        for old in plan.adapter.specs
        if (new := made.get(old.name, biases.get(old.name, old))) is not None
    )
    if specs == plan.adapter.specs:
        return plan.adapter, []
    return replace(plan.adapter, specs=specs, unclaimed=()), dropped


def at_ranks(plan: CompressPlan, ranks: Sequence[int], dtypes: Sequence[str]) -> Adapter:
    """The adapter at these ranks without its bytes: to see how large its file would be."""
    blank = []
    for index, (spec, rank) in enumerate(zip(plan.specs, ranks, strict=True)):
        if rank == 0 or (rank >= spec.product_rank and not plan.factor_args(index).must_rewrite):
            blank.append(_Blank(min(rank, spec.product_rank), None))
            continue
        shapes = plan.factor_shapes(index, rank)
        lora_A, lora_B = (TensorData(spec.name, dtypes[index], shape, b"") for shape in shapes)
        bias = plan.biases.get(spec.module)
        blank.append(_Blank(rank, (lora_A, lora_B), values_of(bias) if bias else None))
    adapter = rebuild(plan, blank)[0]
    specs = tuple(_with_lengths(s) if s.name in plan.turned else s for s in adapter.specs)
    return replace(adapter, specs=specs) if plan.turned else adapter


def _with_lengths(spec: DeltaSpec) -> DeltaSpec:
    return with_lengths(spec, TensorData(spec.name, "F32", shape_of(spec)[:1], b""))


class _Blank(Frozen):
    """The parts of a `Factored` that `rebuild` looks at."""

    rank: int
    factors: tuple[TensorData, TensorData] | None
    bias: Source | None = None


def _check(adapter: Adapter) -> None:
    def refuse(code: str, what: str, specs: Sequence[DeltaSpec], hint: str = _WAY_OUT) -> None:
        if specs:
            raise MismatchError(
                code, what, file=adapter.path, key=list_some([s.name for s in specs], 3), hint=hint
            )

    dora = [s for s in adapter.specs if s.scales_rows or spans_rows(s)]
    refuse("LT-449", "DoRA rescales the sum of base and delta: no ΔW of its own to truncate", dora)
    moved = [s for s in adapter.specs if s.reach == "all"]
    kinds = list_some({s.title for s in moved})
    refuse("LT-497", f"{kinds} starts from a changed base: its ΔW is not lora_B @ lora_A", moved)
    grouped = [s for s in adapter.specs if is_grouped(s)]
    refuse("LT-498", "factors of a grouped convolution are not multiplied as matrices", grouped,
           "leave these modules out of the adapter")  # fmt: skip
    reason = unmergeable_reason(adapter)
    if reason is not None:
        raise MismatchError(
            "LT-498", "this adapter cannot be compressed", file=adapter.path, got=reason
        )
    if not any(s.has_factors for s in adapter.specs):
        raise MismatchError(
            "LT-498", "the adapter holds no LoRA factors: nothing to compress", file=adapter.path
        )


def _groups(
    specs: Sequence[DeltaSpec],
    never_dropped: Collection[str],
    joined: Mapping[str, str],
    tied: Collection[str],
) -> list[Group]:
    routed = routed_weights([s.name for s in specs])
    found: dict[str, list[int]] = {}
    for index, spec in enumerate(specs):
        key = (
            "routed"
            if spec.name in routed
            else "tied"
            if spec.name in tied
            else joined.get(spec.name, spec.name)
        )
        found.setdefault(key, []).append(index)
    return [
        Group(tuple(g), int(len(g) > 1 or specs[g[0]].module in never_dropped))
        for g in found.values()
    ]


def _storage_dtype(spec: DeltaSpec) -> str:
    """The type of both factors; float32 for two of which neither holds the other's values."""
    dtypes = storage_types(spec)
    if len(dtypes) == 1:
        (only,) = dtypes
        return only if only in ("BF16", "F16", "F32", "F64") else "F32"
    return "F64" if "F64" in dtypes else "F32"
