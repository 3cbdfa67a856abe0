"""What `loratool.check` returns."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

from loratool.frozen import Frozen
from loratool.report.base import GOOD, Report

LOADS, UNSURE, WRONG, DROPPED, RAISES = "loads", "unsure", "wrong", "dropped", "raises"
BEST_FIRST = (LOADS, UNSURE, WRONG, DROPPED, RAISES)
"""What a program does with a module: right; not known, or up to the base; loads and computes
something else; passes over without an error; stops with an error."""


class Finding(Frozen):
    """A rule of a program that applies.

    Attributes:
        rule: its name.
        verdict: one of `BEST_FIRST`.
        words: why, in few words.
        says: the same in a sentence.
        source: where the program says so.
        names: the tensors or modules that it is about; () = the file.
        is_whole: nothing of the file loads.
        is_mended: ``--fix`` writes the same change so that the rule does not apply.
    """

    rule: str
    verdict: str
    words: str
    says: str = ""
    source: str = ""
    names: tuple[str, ...] = ()
    is_whole: bool = False
    is_mended: bool = False


class ModuleVerdict(Frozen):
    """What a program does with one module.

    Attributes:
        module: as the file or the model calls it.
        verdict: one of `BEST_FIRST`.
        rule: that decides, "" where it loads.
        keys: its tensors.
    """

    module: str
    verdict: str
    rule: str = ""
    keys: tuple[str, ...] = ()


class Simulation(Frozen, dict=True):
    """A program loading an adapter, on paper.

    Attributes:
        modules: all of them, in the order of the file.
        findings: rules that apply, the worst first.
        past: rules of older versions that would have applied.
    """

    modules: tuple[ModuleVerdict, ...]
    findings: tuple[Finding, ...] = ()
    past: tuple[Finding, ...] = ()

    @cached_property
    def verdict(self) -> str:
        """``yes``, ``no`` (nothing loads), ``wrong`` (not all of it, or not right), ``unsure``."""
        if not self.findings:
            return "yes"
        found = {f.verdict for f in self.findings}
        lost = [m.verdict in (DROPPED, RAISES) for m in self.modules]
        if any(f.is_whole for f in self.findings) or (lost and all(lost)):
            return "no"
        if found & {DROPPED, WRONG}:
            return "wrong"
        return "unsure" if UNSURE in found else "yes"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why, in few words each."""
        return tuple(dict.fromkeys(f.words for f in self.deciding))

    @property
    def deciding(self) -> tuple[Finding, ...]:
        """The findings that the verdict is for."""
        kinds = {"no": (RAISES, DROPPED), "wrong": (DROPPED, WRONG), "unsure": (UNSURE,)}
        found = [f for f in self.findings if f.verdict in kinds.get(self.verdict, ())]
        whole = [f for f in found if f.is_whole]
        return tuple(whole or found)


class CheckReport(Report):
    """Result of `loratool.check`.

    Attributes:
        source: as named.
        program: that shall load it.
        version: of the program, whose source the rules were read from.
        rules_from: files or links.
        family: of models whose names it has, "" if that is not known.
        verdict: ``yes``, ``no``, ``wrong``, ``unsure``.
        counts: verdict -> number of modules.
        findings: rules that apply, the worst first.
        past: rules of older versions that would have applied.
        modules: every module with its verdict.
        output: what ``--fix`` wrote, "" if nothing.
        fixed: what was done to it.
        notes: what is good to know.
        warnings: what could not be kept.
        next: a command that mends it, "" if there is none.
    """

    command: ClassVar[str] = "check"
    source: str
    program: str
    version: str
    rules_from: tuple[str, ...]
    family: str
    verdict: str
    counts: dict[str, int]
    findings: tuple[Finding, ...]
    past: tuple[Finding, ...]
    modules: tuple[ModuleVerdict, ...]
    output: str = ""
    fixed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    next: str = ""

    @property
    def ok(self) -> bool:
        """True if it loads, or if what was written does."""
        return bool(self.output) or self.verdict in GOOD
