"""``--for``: what has to change in an adapter so that a program loads it (data only)."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from loratool.adapter import Adapter, DeltaSpec
from loratool.delta.forms import has_diagonal, left_of, matrix_shape, shape_of
from loratool.dialects import unmergeable_reason
from loratool.dialects.programs import Look, Program
from loratool.dialects.registry import home_of
from loratool.dialects.rules import gains, passed_on
from loratool.dialects.stated import WHOLE, from_base, is_even
from loratool.dtypes import tensor_bytes
from loratool.engine.module_memory import rescaled_bytes
from loratool.errors import MismatchError, list_some
from loratool.frozen import Frozen, field, replace
from loratool.ops.additive import require_factors
from loratool.report.base import GOOD

_ALPHA = "alpha"  # of `loratool.dialects.base.Dialect.even`


class Fit(Frozen):
    """One rank and one α/r for all modules, and nothing that the program passes by.

    Attributes:
        adapter: without what is left out.
        program: that shall load it.
        rank: of every module; 0 if the adapter stays as it is, or if every module keeps its own.
        alpha: of every module; 0 if the adapter stays as it is.
        scalings: spec name -> its scaling; α/r, and for an attention's out_proj twice that.
        left_out: names of what the program cannot hold.
    """

    adapter: Adapter
    program: Program | None
    rank: int = 0
    alpha: float = 0.0
    scalings: Mapping[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def changed(self) -> frozenset[str]:
        """Names of the specs whose tensors change."""
        return frozenset(s.name for s in self.adapter.specs if self.scalings and not self._keeps(s))

    @property
    def ranks(self) -> dict[str, int]:
        """Spec name -> the rank that it gets."""
        return {s.name: self._rank(s) for s in self.adapter.specs}

    def _rank(self, spec: DeltaSpec) -> int:
        return self.rank or spec.product_rank

    def memory_needs(self) -> tuple[list[int], int]:
        """Bytes that each module takes at work, and those of all results."""
        new = [s for s in self.adapter.specs if s.name in self.changed]
        return [rescaled_bytes(s) for s in new], sum(self._bytes(s) for s in new)

    def _keeps(self, spec: DeltaSpec) -> bool:
        if not spec.is_matrix:
            return spec.scaling == self.scalings[spec.name]
        is_plain = spec.is_pair and spec.blocks is None and not has_diagonal(spec)
        same = (self._rank(spec), self.scalings[spec.name])
        return is_plain and (spec.rank, spec.scaling) == same

    def _bytes(self, spec: DeltaSpec) -> int:
        if not spec.is_matrix:
            return 4 * shape_of(spec)[0]
        shape = (self._rank(spec) * max(1, spec.experts), sum(matrix_shape(spec)))
        return tensor_bytes(left_of(spec).dtype, shape)


def without_whole(adapter: Adapter, program: Program) -> tuple[Adapter, list[str]]:
    """The adapter less replaced tensors and biases where a program has no place for them.

    Returns:
        (adapter, names of what is left out).
    """
    if program.holds_whole_tensors:
        return adapter, []
    specs = tuple(s for s in adapter.specs if s.is_matrix)
    gone = [*(r.name for r in adapter.replacements),
            *(s.name for s in adapter.specs if not s.is_matrix)]  # fmt: skip
    config = {**adapter.config, WHOLE: None}
    return replace(adapter, specs=specs, replacements=(), config=config), gone


def left_out(program: Program, gone: Sequence[str]) -> tuple[str, ...]:
    """What is said of it."""
    words = f"{program.title} cannot hold, left out: {list_some(gone, 3)}"
    return (words,) if gone else ()


def plan_fit(adapter: Adapter, program: Program) -> Fit:
    """Plan the form in which a program loads an adapter.

    Args:
        adapter: opened, or made.
        program: one of `loratool.dialects.programs.programs`.

    Raises:
        MismatchError: LT-488 it cannot load such an adapter, LT-489 nothing would be left, or
            the rank is too large for it; LT-461.
    """
    check_fit(adapter, program)
    if _is_uniform(adapter) and program.judge(Look.of(adapter)).verdict == "yes":
        return Fit(adapter, program)
    if reason := unmergeable_reason(adapter):
        _refuse(program, adapter, [reason])
    adapter, gone = without_whole(adapter, program)
    if not (adapter.specs or adapter.replacements):
        raise MismatchError(
            "LT-489", f"nothing is left that {program.title} loads", file=adapter.path,
            key=list_some(gone, 3),
        )  # fmt: skip
    # Without its order of keys an adapter gets a configuration of its own.
    adapter = replace(adapter, key_order=(), unclaimed=())
    weights = [s for s in adapter.specs if s.is_matrix]
    if not weights:
        return Fit(adapter, program, left_out=tuple(gone))
    check_rank(max(s.product_rank for s in weights), program, adapter)
    fit = even_form(adapter, program, tuple(gone))
    if fit.changed:
        require_factors(adapter, f"brought into {program.title}'s form")
    return fit


def needs_evening(adapter: Adapter, dialect: str) -> bool:
    """True if a dialect has one scaling for all changes, or one alpha, and the adapter several."""
    weights = [s for s in adapter.specs if s.is_matrix]
    even = home_of(dialect).even
    if even == _ALPHA:
        alphas = {_rounded(s.scaling * s.rank) for s in weights}
        return alphas == {0.0} or (len(alphas) > 1 and {s.scaling for s in weights} != {1.0})
    return bool(even) and len({s.scaling for s in weights}) > 1


def even_form(
    adapter: Adapter, program: Program | None = None, left_out: tuple[str, ...] = (), *,
    dialect: str = "",
) -> Fit:  # fmt: skip
    """One rank and one scaling for all changes, of which there are some; or one alpha alone.

    Args:
        adapter: whose changes they are.
        program: that shall load it.
        left_out: names of what it cannot hold.
        dialect: that it is for, where no program is.
    """
    weights = [s for s in adapter.specs if s.is_matrix]
    if dialect and home_of(dialect).even == _ALPHA:
        return _one_alpha(adapter, weights)
    rank = max(s.product_rank for s in weights)
    scaling, known = _scaling(weights, rank), gains({s.name for s in weights})
    scalings = {s.name: scaling * known.get(s.name, 1.0) for s in adapter.specs}
    return Fit(adapter, program, rank, scaling * rank, scalings, left_out)


def _one_alpha(adapter: Adapter, weights: Sequence[DeltaSpec]) -> Fit:
    """Every change keeps its rank; the commonest alpha, so that most factors stay."""
    counts = Counter(_rounded(s.scaling * s.product_rank) for s in weights)
    alpha = next((abs(a) for a, _ in counts.most_common() if a), 1.0)
    scalings = {
        s.name: s.scaling if _rounded(s.scaling * s.product_rank) == alpha
        else alpha / (s.product_rank or 1) for s in adapter.specs
    }  # fmt: skip
    return Fit(adapter, None, 0, alpha, scalings)


def _rounded(alpha: float) -> float:
    """A number as float32 tells it apart from others."""
    return float(f"{alpha:.6g}")


def check_fit(adapter: Adapter, program: Program) -> None:
    """Refuse, before any work, what no other form of the same change would mend.

    Raises:
        MismatchError: LT-488.
    """
    if adapter.dialect != program.native:
        _refuse(program, adapter, program.obstacles(Look.of(adapter)))


def check_written(look: Look, adapter: Adapter, program: Program) -> None:
    """Refuse to write what the program would not load right.

    Args:
        look: the files as they will be.
        adapter: that they are of.
        program: that shall load them.

    Raises:
        MismatchError: LT-488.
    """
    found = program.judge(look)
    _refuse(program, adapter, () if found.verdict in GOOD else found.reasons)


def check_rank(rank: int, program: Program, adapter: Adapter) -> None:
    """Refuse a rank that the program has no room for.

    Raises:
        MismatchError: LT-489.
    """
    if program.room(rank) is None:
        most = program.ranks[-1]
        raise MismatchError(
            "LT-489", f"the rank is too large for {program.title}", file=adapter.path,
            expected=f"at most {most}", got=rank,
            hint=f"loratool compress ADAPTER --rank {most} --for {program.name} -o OUT",
        )  # fmt: skip


def freeing(program: Program, adapter: Adapter) -> str | None:
    """What makes LoRA of changes that depend on the base; None if none does."""
    if all(s.is_fixed or not s.is_matrix for s in from_base(adapter).specs):
        return None
    words = ["loratool", "convert", str(adapter.path), "--for", program.name]
    return f"{shlex.join(words)} --base BASE -o OUT makes LoRA of what depends on the base"


def leaving_out(program: Program, adapter: Adapter, names: Collection[str]) -> str | None:
    """What writes a file without tensors that are no part of a change; None if others stop it."""
    if not names or not {ref.name for ref in passed_on(adapter)}.issuperset(names):
        return None
    words = ["loratool", "check", str(adapter.path), "--for", program.name, "--fix"]
    return f"{shlex.join(words)} -o OUT leaves them out"


def _refuse(program: Program, adapter: Adapter, reasons: Sequence[str]) -> None:
    if reasons:
        raise MismatchError(
            "LT-488", f"{program.title} cannot load such an adapter", file=adapter.path,
            got=list_some(reasons), hint=freeing(program, adapter) or _less_files(program, adapter),
        )  # fmt: skip


def _less_files(program: Program, adapter: Adapter) -> str | None:
    """What leaves out files that a program does not look for; None if others stop it."""
    files = adapter.files_beside
    if not files or program.obstacles(Look.of(adapter.without_files(files))):
        return None
    skip = [word for name in files for word in ("--skip", name)]
    words = ["loratool", "convert", str(adapter.path), "--for", program.name, *skip]
    return f"{shlex.join(words)} -o OUT leaves it out"


def _is_uniform(adapter: Adapter) -> bool:
    is_plain = is_even(adapter) and not adapter.unclaimed
    weights = [s for s in adapter.specs if s.is_matrix]
    return is_plain and len({s.rank for s in weights}) == 1 and len(_scalings(weights)) == 1


def _scaling(specs: Sequence[DeltaSpec], rank: int) -> float:
    """The commonest α/r, so that most factors stay; 1 where α would be no whole number."""
    best = abs(_scalings(specs).most_common(1)[0][0])
    whole = round(best * rank)
    return best if whole and abs(best * rank - whole) <= 1e-9 * whole else 1.0


def _scalings(specs: Sequence[DeltaSpec]) -> Counter[float]:
    """How often there is which α/r."""
    known = gains({s.name for s in specs})
    return Counter(s.scaling / known.get(s.name, 1.0) for s in specs)
