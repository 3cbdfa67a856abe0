"""Coefficients of adapters: one number, one per component, one per module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from loratool.adapter import Adapter
from loratool.bind.user_names import COMPONENTS, component_pattern, part_regex
from loratool.errors import MismatchError, UsageError, list_some
from loratool.frozen import Frozen, field, replace
from loratool.patterns import Pattern, Refuse, compile_pattern, find
from loratool.report.text import plural
from loratool.store.source import AdapterArgument, is_weight, parse_weight

Rule = tuple[Pattern, tuple[float, ...]]
"""Modules, and the factor that each adapter has in them."""


class Weight(Frozen):
    """The coefficient of an adapter's changes; 1 is as trained.

    Attributes:
        value: of every change that ``by_name`` does not hold.
        components: component -> factor, as typed, for reports and provenance.
        blocks: factors per block, likewise.
        by_name: parameter name -> coefficient.  0 leaves the change out: it takes part in nothing,
            while a change of ``value`` 0 still votes where a method lets changes vote.
    """

    value: float = 1.0
    components: Mapping[str, float] = field(default_factory=dict)
    blocks: str = ""
    by_name: Mapping[str, float] = field(default_factory=dict)

    def of(self, name: str) -> float:
        """Of the change of one parameter."""
        return self.by_name.get(name, self.value)

    def times(self, factor: float) -> Weight:
        """Multiplied as a whole."""
        by_name = {name: value * factor for name, value in self.by_name.items()}
        return replace(self, value=self.value * factor, by_name=by_name)

    def kept(self, adapter: Adapter) -> Adapter:
        """The adapter without what is left out, with a note about its components."""
        out = {name for name, value in self.by_name.items() if value == 0}
        return replace(
            adapter,
            specs=tuple(s for s in adapter.specs if s.name not in out),
            replacements=tuple(r for r in adapter.replacements if r.name not in out),
            beside=tuple(b for b in adapter.beside if self.value or not b.rows),
            notes=(
                *adapter.notes,
                *_component_note(adapter, self.components),
                *self._block_note(adapter),
            ),
        )

    def _block_note(self, adapter: Adapter) -> list[str]:
        out = sum(value == 0 for value in self.by_name.values())
        if not self.blocks or not out:
            return []
        return [f"blocks {self.blocks} of {adapter.label}: {out} of {len(names_of(adapter))} "
                "tensors are left out"]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """For reports and provenance."""
        parts = {"components": dict(self.components), "blocks": self.blocks}
        return {"weight": self.value, **{k: v for k, v in parts.items() if v}}

    def __str__(self) -> str:
        parts = ",".join(f"{k}={v:g}" for k, v in self.components.items())
        whole = f"{self.value:g}"
        if parts:
            whole = parts if self.value == 1 else f"{whole}·({parts})"
        return f"{whole}:{self.blocks}" if self.blocks else whole


def weigh(adapter: Adapter, typed: AdapterArgument, rules: Sequence[Rule], position: int) -> Weight:
    """The coefficient of every change of an adapter.

    Factors multiply: that of the whole, that of the component, that of the block, that of the first
    rule that matches.

    Args:
        adapter: opened.
        typed: its weight, whole, per component and per block.
        rules: of ``--module-weights``.
        position: of the adapter in them.

    Raises:
        UsageError: LT-239, no blocks that are known.
        MismatchError: LT-478, a component that the adapter does not have; LT-479, a change that
            lies in two of those named; LT-466, blocks that do not fit the adapter's.
    """
    names = names_of(adapter)
    by_block: Mapping[str, float] = {}
    if typed.blocks:
        from loratool.ops.blocks import block_factors

        by_block = block_factors(names, typed.blocks)
    places = _places(adapter, names, typed.components)
    found = find([pattern for pattern, _ in rules], names)
    by_rule: dict[str, float] = {}
    for (_, weights), inside in reversed(list(zip(rules, found, strict=True))):
        by_rule |= dict.fromkeys(inside, weights[position])
    factors = {}
    for name in names:
        factor = by_rule.get(name, 1.0) * by_block.get(name, 1.0)
        if name in places:
            factor *= typed.components[places[name]]
        if factor != 1 and (typed.weight or not factor):  # a whole weight of 0 leaves nothing out
            factors[name] = factor * typed.weight
    return Weight(typed.weight, typed.components, typed.blocks, factors)


def names_of(adapter: Adapter) -> list[str]:
    """Names of the parameters that an adapter changes or replaces."""
    return [*(s.name for s in adapter.specs), *(r.name for r in adapter.replacements)]


def _places(
    adapter: Adapter, names: Sequence[str], components: Mapping[str, float]
) -> dict[str, str]:
    """Name -> the component that it lies in."""
    found: dict[str, str] = {}
    for word in components:
        pattern = component_pattern(word)
        inside = [name for name in names if pattern.search(name)]
        if not inside:
            raise MismatchError(
                "LT-478", "the adapter has no such component", file=adapter.path, got=word,
                expected=list_some(components_of(names)) or "one weight, such as style:0.7",
            )  # fmt: skip
        twice = [name for name in inside if name in found]
        if twice:
            raise MismatchError(
                "LT-479", "two components with weights hold the same modules", file=adapter.path,
                key=list_some(twice, 3), got=f"{found[twice[0]]} and {word}",
            )  # fmt: skip
        found |= dict.fromkeys(inside, word)
    return found


def components_of(names: Iterable[str]) -> list[str]:
    """Components of a model as the paths of its parameters tell them.

    Example:
        >>> components_of(["model.vision_tower.q.weight", "model.language_model.q.weight"])
        ['vision_tower', 'language_model']
    """
    paths = [name.split(".") for name in names]
    while len({path[0] for path in paths}) == 1 and all(len(path) > 2 for path in paths):
        words = [w for w in COMPONENTS if component_pattern(w).search(".".join(paths[0]))]
        if words:
            return words[:1]
        paths = [path[1:] for path in paths]
    heads = dict.fromkeys(path[0] for path in paths if len(path) > 2)
    return [head for head in heads if not head.isdecimal()] if len(heads) > 1 else []


def _component_note(adapter: Adapter, components: Mapping[str, float]) -> list[str]:
    if not components:
        return []
    names = names_of(adapter)
    places = _places(adapter, names, components)
    parts = [
        f"{word} {factor:g} ({sum(place == word for place in places.values())} of {len(names)})"
        for word, factor in components.items()
    ]
    rest = ", everything else 1" if len(places) < len(names) else ""
    return [f"weights of {adapter.label}'s tensors: {', '.join(parts)}{rest}"]


# ------------------------------------------------------------------------- rules in a file


def read_module_weights(path: Path, count: int) -> tuple[Rule, ...]:
    """Rules of a ``--module-weights`` file: YAML, regular expression -> weight or list of them.

    A component word (``te``) stands for it.  A list has one weight per adapter.  The first
    expression that is found in a module's name counts and multiplies the adapter's weight; all
    other modules keep that.

    Raises:
        UsageError: LT-285, not such a file.
        BadFileError: LT-300, no such file.
    """
    import yaml

    from loratool.store.yamlfile import line_of, read_yaml

    def refuse(what: str, line: int | None = None, got: object = None) -> NoReturn:
        raise UsageError(
            "LT-285", f"bad --module-weights file: {what}", file=path,
            key=None if line is None else f"line {line}", got=got,
            expected="a YAML mapping from regular expressions to weights",
        )  # fmt: skip

    node = read_yaml(path, refuse)
    if not isinstance(node, yaml.MappingNode):
        refuse("no mapping", got="nothing" if node is None else node.tag)
    rules: dict[str, Rule] = {}
    for key, value in node.value:
        line, text = line_of(key.start_mark), key.value
        if not isinstance(text, str):
            refuse("no expression", line)
        if text in rules:
            refuse("one expression twice", line, text[:80])
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if isinstance(value, yaml.SequenceNode) and len(items) != count:
            refuse(
                f"{plural(len(items), 'weight')} for {plural(count, 'adapter')}", line, text[:80]
            )
        if not items or not all(is_weight(item.value) for item in items):
            refuse("no plain decimal number", line, str([i.value for i in items])[:80])
        weights = tuple(parse_weight(item.value) for item in items)
        pattern = compile_pattern(part_regex(text), partial(refuse, line=line, got=text[:80]))
        rules[text] = (pattern, weights if len(weights) > 1 else weights * count)
    return tuple(rules.values())


def unused_rules(adapters: Sequence[Adapter], rules: Sequence[Rule]) -> list[str]:
    """A note about expressions that no module matches: probably a slip."""
    names = [name for a in adapters for name in names_of(a)]
    found = find([pattern for pattern, _ in rules], names)
    unused = [rule[0].text for rule, inside in zip(rules, found, strict=True) if not inside]
    return [f"no module matches {list_some(unused)} of --module-weights"] if unused else []


def rules_json(rules: Sequence[Rule]) -> list[Any]:
    """Rules for provenance."""
    return [[pattern.text, *weights] for pattern, weights in rules]


def rules_from(found: Sequence[Sequence[str | float]], refuse: Refuse) -> tuple[Rule, ...]:
    """Rules as `rules_json` wrote them; ``refuse`` is called with what is damaged."""
    rules: list[Rule] = []
    for text, *weights in found:
        numbers = tuple(w for w in weights if not isinstance(w, str))
        if not isinstance(text, str) or not weights or len(numbers) < len(weights):
            refuse("no expression with its weights")
        rules.append((compile_pattern(text, refuse), numbers))
    return tuple(rules)
