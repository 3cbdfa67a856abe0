"""What a program makes of an adapter, as a table of rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loratool.adapter import Adapter, TensorRef
from loratool.dialects.rules import why_not_peft
from loratool.report.base import Loads

Test = Callable[[Adapter], str]
"""Why a rule applies, in few words; "" where it does not."""

_WORST_FIRST = ("no", "wrong", "unsure")


@dataclass(frozen=True)
class Rule:
    """One thing that a program does not do.

    Attributes:
        verdict: ``no`` (it stops), ``wrong`` (it goes on and computes something else), ``unsure``.
        reason: says whether and why.
        is_mended: ``--for`` writes the same change in a form in which the rule does not apply.
    """

    verdict: str
    reason: Test
    is_mended: bool = False


def _files_beside(adapter: Adapter) -> list[str]:
    """Files of trained weights that only loratool and the trainer's own code look for."""
    own = {
        ref.file for s in adapter.specs for ref in s.fields.values() if isinstance(ref, TensorRef)
    }
    refs = [r.source for r in adapter.replacements if isinstance(r.source, TensorRef)]
    others = {ref.path.name for ref in refs if ref.file not in own} if own else set()
    carried = {name for name in adapter.extras if name.endswith(".safetensors")}
    return sorted(others | carried | {b.name for b in adapter.beside})


@dataclass(frozen=True)
class Program:
    """One program that loads adapters.

    Attributes:
        name: what ``--for`` takes.
        title: as people write it.
        version: whose source was read.
        source: the files.
        rules: what it does not do.
        advice: said of an adapter that loads.
        native: a dialect of its own, besides PEFT's.
        ranks: the only ranks that it has room for, ascending; () = any.
        holds_whole_tensors: it loads replaced tensors and biases.
    """

    name: str
    title: str
    version: str
    source: tuple[str, ...]
    rules: tuple[Rule, ...]
    advice: Test = lambda _: ""
    native: str = ""
    ranks: tuple[int, ...] = ()
    holds_whole_tensors: bool = False

    def judge(self, adapter: Adapter) -> Loads:
        """The worst verdict that a rule gives, with all of its reasons."""
        verdict, reasons = self._verdict(adapter)
        return Loads(self.title, verdict, reasons, self.version, self.source)

    def obstacles(self, adapter: Adapter) -> tuple[str, ...]:
        """Why it would load the change of an adapter in no form."""
        rules = [r for r in self.rules if not r.is_mended and r.verdict in ("no", "wrong")]
        return tuple(why for rule in rules if (why := rule.reason(adapter)))

    def room(self, rank: int) -> int | None:
        """The smallest rank that it has room for and that holds this one; None if there is none."""
        if not self.ranks:
            return rank
        return next((r for r in self.ranks if r >= rank), None)

    def _verdict(self, adapter: Adapter) -> tuple[str, tuple[str, ...]]:
        if adapter.dialect == self.native:
            return "yes", ()
        if reason := why_not_peft(adapter):
            return "no", (reason,)
        if not adapter.specs and not adapter.replacements:
            return "no", ("no tensors",)
        found = [(rule.verdict, why) for rule in self.rules if (why := rule.reason(adapter))]
        found += [("wrong", f"without {name}") for name in _files_beside(adapter)]
        for verdict in _WORST_FIRST:
            reasons = tuple(dict.fromkeys(why for v, why in found if v == verdict))
            if reasons:
                return verdict, reasons
        advice = self.advice(adapter)
        return "yes", (advice,) if advice else ()
