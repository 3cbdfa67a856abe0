"""``--for``: an adapter in the form that a program loads, whichever command made it."""

from __future__ import annotations

from loratool.adapter import Adapter, AdapterFiles
from loratool.api.common import Limits
from loratool.dialects import read_back
from loratool.dialects.programs import Look, Program
from loratool.frozen import Frozen
from loratool.ops.fitting import Fit, check_written, even_form, left_out, needs_evening, plan_fit


class Fitted(Frozen):
    """An adapter as a program loads it.

    Attributes:
        adapter: to be written.
        notes: what was done.
        warnings: what could not be kept.
        relative_error: of the new factors, as stored.
    """

    adapter: Adapter
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    relative_error: float = 0.0


def fit_for(adapter: Adapter, program: Program | None, limits: Limits) -> Fitted:
    """Bring an adapter into a program's form: one rank, one α/r, nothing that it cannot hold.

    Args:
        adapter: as read, or as a command made it.
        program: None = as it is; so is what lies in a dialect of the program's own.
        limits: of memory and threads.

    Raises:
        MismatchError: LT-488, LT-489, LT-461: it cannot be brought there.
        DiskError: LT-605.
    """
    if program is None or adapter.dialect == program.native:
        is_uneven = needs_evening(adapter, adapter.dialect)
        return even_out(adapter, adapter.dialect, limits) if is_uneven else Fitted(adapter)
    fit = plan_fit(adapter, program)
    warnings = left_out(program, fit.left_out)
    if not fit.rank:
        return Fitted(fit.adapter, (), warnings)
    made, lost = _with_factors(fit, limits)
    notes = [f"for {program.title}: rank {fit.rank} and alpha {fit.alpha:g} in every module"]
    if lost:
        notes.append(f"rounding the new factors lost {lost:.1e} of their ΔW")
    return Fitted(made, tuple(notes), warnings, lost)


def even_out(adapter: Adapter, dialect: str, limits: Limits) -> Fitted:
    """One number that states the scaling of all changes, as a dialect has it.

    Raises:
        DiskError: LT-605.
    """
    made, lost = _with_factors(even_form(adapter, dialect=dialect), limits)
    return Fitted(made, relative_error=lost)


def _with_factors(fit: Fit, limits: Limits) -> tuple[Adapter, float]:
    """The adapter of a plan, and what rounding its new factors lost."""
    from loratool.engine.fitting import fit_factors

    needs, kept = fit.memory_needs()
    return fit_factors(
        fit.adapter, ranks=fit.ranks, alpha=fit.alpha, scalings=fit.scalings, changed=fit.changed,
        threads=limits.plan(needs, kept=kept).threads,
    )  # fmt: skip


def check_files(files: AdapterFiles, adapter: Adapter, program: Program | None) -> None:
    """Refuse, before anything is written, what the program would not load right.

    Raises:
        MismatchError: LT-488.
    """
    if program is not None:
        is_own = adapter.dialect == program.native
        look = (Look.of_files(files, adapter.dialect) if is_own
                else Look.of(read_back(files, adapter.path)))  # fmt: skip
        check_written(look, adapter, program)
