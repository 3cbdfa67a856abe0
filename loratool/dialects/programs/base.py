"""What a program makes of an adapter, as a table of rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from loratool.adapter import Adapter, TensorRef
from loratool.dialects.programs.look import Look
from loratool.dialects.rules import why_not_peft
from loratool.frozen import Frozen, field, replace
from loratool.report.base import Loads
from loratool.report.check import (
    BEST_FIRST,
    DROPPED,
    LOADS,
    RAISES,
    UNSURE,
    WRONG,
    Finding,
    ModuleVerdict,
    Simulation,
)

__all__ = ["DROPPED", "RAISES", "UNSURE", "WRONG", "Hit", "Program", "Rule", "Test"]


class Hit(Frozen):
    """Where a rule applies.

    Attributes:
        names: tensors or modules; () = the file.
        words: why, in few words; "" = the rule's.
    """

    names: tuple[str, ...] = ()
    words: str = ""


Test = Callable[[Look], Iterable[Hit]]
"""Where a rule applies; nothing where it does not."""


def only(test: Test, holds: Callable[[str], bool]) -> Test:
    """The same test, of the names alone for which something holds."""

    def find(look: Look) -> Iterable[Hit]:
        hits = (Hit(tuple(n for n in h.names if holds(n)), h.words) for h in test(look))
        return [hit for hit in hits if hit.names]

    return find


class Rule(Frozen):
    """One thing that a program does not do right.

    Attributes:
        name: of the rule.
        verdict: ``raises``, ``dropped``, ``wrong`` or ``unsure``.
        finds: where it applies.
        words: why, in few words, where the test does not say.
        says: why, in a sentence.
        source: a link, or a file of the program.
        is_mended: ``--fix`` and ``--for`` write the same change so that the rule does not apply.
        is_whole: nothing of the file loads; always so where it raises.
        until: the first version without it, "" = today's has it.
        home: the dialect in which the same change loads, where that is not the usual one.
    """

    name: str
    verdict: str
    finds: Test
    words: str = ""
    says: str = ""
    source: str = ""
    is_mended: bool = False
    is_whole: bool = False
    until: str = ""
    home: str = ""

    def at(self, source: str) -> Rule:
        """The same, as that file of a program has it."""
        return replace(self, source=source)

    def where(self, holds: Callable[[str], bool]) -> Rule:
        """The same on the names alone for which something holds."""
        return replace(self, finds=only(self.finds, holds))

    def findings(self, look: Look) -> list[Finding]:
        """What it finds, hits of the same words in one."""
        found: dict[str, list[str]] = {}
        for hit in self.finds(look):
            found.setdefault(hit.words or self.words, []).extend(hit.names)
        return [
            Finding(self.name, self.verdict, words, self.says, self.source,
                    tuple(dict.fromkeys(names)), self.is_whole or self.verdict == RAISES,
                    self.is_mended)
            for words, names in found.items()
        ]  # fmt: skip


class Program(Frozen):
    """One program that loads adapters.

    Attributes:
        name: what ``--for`` takes.
        title: as people write it.
        also: other names that ``--for`` takes.
        version: whose source was read.
        source: its files, or links.
        rules: what it does not do right.
        opens: what it takes at all; where that does not hold no rule is asked.
        advice: said of an adapter that loads.
        native: a dialect of its own, which it loads as it is, but for `own`.
        own: what it does not do right of that dialect.
        ranks: the only ranks that it has room for, ascending; () = any.
        holds_whole_tensors: it loads replaced tensors and biases.
        is_of_images: it runs image and video models.
        is_shown: reports on adapters of its world name it, not only those on its own dialect.
        homes: family of models -> the dialect that it loads best; "" for all others.
    """

    name: str
    title: str
    version: str
    source: tuple[str, ...]
    rules: tuple[Rule, ...]
    opens: tuple[Rule, ...] = ()
    advice: Callable[[Adapter], str] = lambda _: ""
    also: tuple[str, ...] = ()
    native: str = ""
    own: tuple[Rule, ...] = ()
    ranks: tuple[int, ...] = ()
    holds_whole_tensors: bool = False
    is_of_images: bool = False
    is_shown: bool = True
    homes: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_of_peft(self) -> bool:
        """True if it loads the folders of PEFT; `loratool.ops.fitting` makes forms for it."""
        return PEFT_FOLDER in self.opens

    def simulate(self, look: Look) -> Simulation:
        """Load an adapter on paper: a verdict for every module."""
        units = look.stems if self.is_of_images else look.modules
        is_own = bool(self.native) and look.dialect == self.native
        opens, rules = ((), self.own) if is_own else (self.opens, self.rules)
        found = [f for rule in opens for f in rule.findings(look)]
        past: list[Finding] = []
        if not found:
            for rule in rules:
                findings = rule.findings(look)
                if rule.until:
                    past += [replace(f, words=f"{f.words} (before {rule.until})") for f in findings]
                else:
                    found += findings
        found.sort(key=lambda f: -BEST_FIRST.index(f.verdict))
        return Simulation(tuple(_verdicts(units, found)), tuple(found), tuple(past))

    def judge(self, look: Look) -> Loads:
        """The same in few words."""
        found = self.simulate(look)
        reasons = found.reasons
        if found.verdict == "yes" and look.adapter is not None:
            advice = self.advice(look.adapter)
            reasons = (advice,) if advice else ()
        return Loads(self.title, found.verdict, reasons, self.version, self.source)

    def obstacles(self, look: Look) -> tuple[str, ...]:
        """Why it would load the change of an adapter in no form."""
        rules = [r for r in self.rules if not (r.is_mended or r.until or r.verdict == UNSURE)]
        return tuple(dict.fromkeys(f.words for rule in rules for f in rule.findings(look)))

    def home(self, look: Look) -> str:
        """The dialect that it loads an adapter best in, "" for the folders of PEFT."""
        for rule in self.rules:
            if rule.home and any(True for _ in rule.finds(look)):
                return rule.home
        family = look.family.name
        is_kept = not family and look.dialect in self.homes.values()
        return look.dialect if is_kept else self.homes.get(family) or self.homes.get("", "")

    def has_room(self, adapter: Adapter) -> bool:
        """True if no rank of an adapter is too large for it."""
        return all(self.room(spec.product_rank) is not None for spec in adapter.specs)

    def room(self, rank: int) -> int | None:
        """The smallest rank that it has room for and that holds this one; None if there is none."""
        if not self.ranks:
            return rank
        return next((r for r in self.ranks if r >= rank), None)


def _verdicts(
    units: Mapping[str, tuple[str, ...]], found: Iterable[Finding]
) -> Iterable[ModuleVerdict]:
    """The worst that any rule says of each module; the findings come worst first."""
    by_name: dict[str, Finding] = {}
    whole = None
    for finding in found:
        whole = whole or (finding if finding.is_whole else None)
        for name in finding.names:
            by_name.setdefault(name, finding)
    for name, keys in units.items():
        hits = [_of_part(by_name[n], name, keys) for n in (name, *keys) if n in by_name]
        hits += [whole] if whole is not None else []
        if not hits:
            yield ModuleVerdict(name, LOADS, "", keys)
            continue
        worst = max(hits, key=lambda f: (f.is_whole, BEST_FIRST.index(f.verdict)))
        yield ModuleVerdict(name, worst.verdict, worst.rule, keys)


def _of_part(finding: Finding, name: str, keys: tuple[str, ...]) -> Finding:
    """A module of which something is dropped and something loads is wrong, not dropped."""
    if finding.verdict != DROPPED or finding.is_whole or name in finding.names:
        return finding
    kept = {key for key in keys if not key.endswith(".alpha")}.difference(finding.names)
    return replace(finding, verdict=WRONG) if kept else finding


def counted(modules: Iterable[ModuleVerdict]) -> dict[str, int]:
    """How many modules have which verdict, the best first."""
    counts = Counter(m.verdict for m in modules)
    return {verdict: counts[verdict] for verdict in BEST_FIRST if counts[verdict]}


# ----------------------------------------------------- programs that load the folders of PEFT


def _no_folder(look: Look) -> Iterable[Hit]:
    if look.adapter is None:
        return [Hit((), f"{look.dialect or 'unknown'} file")]
    if reason := why_not_peft(look.adapter):
        return [Hit((), reason)]
    return [] if look.adapter.specs or look.adapter.replacements else [Hit((), "no tensors")]


def _beside(look: Look) -> Iterable[Hit]:
    """Files of trained weights that only loratool and the trainer's own code look for."""
    adapter = look.adapter
    assert adapter is not None
    refs = [r.source for r in adapter.replacements if isinstance(r.source, TensorRef)]
    own = (
        {ref.file for s in adapter.specs for ref in s.fields.values() if isinstance(ref, TensorRef)}
        if refs
        else set()
    )
    others = {ref.path.name for ref in refs if ref.file not in own} if own else set()
    names = sorted(others.union(adapter.files_beside))
    return [Hit((name,), f"without {name}") for name in names]


PEFT_FOLDER = Rule(
    "peft-folder", RAISES, _no_folder,
    says="it loads folders with adapter_config.json and adapter_model.safetensors",
)  # fmt: skip
FILES_BESIDE = Rule(
    "files-beside", WRONG, _beside,
    says="trained weights in other files of the folder are not looked for",
)  # fmt: skip
