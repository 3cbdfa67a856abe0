"""Dialects as tables: what keys look like, what they mean, what a file of it can hold.

A dialect whose tensors say everything (kohya, LyCORIS) is one `Table` and no code.  Factors that
are called the same everywhere (``hada_w1_a``) come from the rows of `loratool.kinds`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from loratool import kinds
from loratool.adapter import DeltaSpec
from loratool.archs.flat import components_of, known_names, with_text_model
from loratool.dialects.factors import LENGTHS, OPEN_LENGTHS

# What keys of algorithms end in that no kind is made of -> their title.
ALGORITHMS = (
    (r"oft_R|boft", "OFT"),
    (r"dora_scale|magnitude", "DoRA"), (r"diff$|diff_m$", "full difference"),
    (r"bm\.weight", "GLoRA with a bias"),
)  # fmt: skip


class Component(NamedTuple):
    """A part of a pipeline.

    Attributes:
        prefix: what its keys begin with.
        name: what it is called here, a key of ``archs/data/diffusion.json``; "" = any part.
    """

    prefix: str
    name: str


class Field(NamedTuple):
    """What a key ends in.

    Attributes:
        suffix: behind the module and a dot.
        role: of the kind.
        kind: where the tensor is a change of its own, its kind; "" = a factor among others.  One
            of a weight without columns (a norm) is a vector's, whatever stands here.
        parameter: that it changes.
        is_norm: of a module whose weight is such a vector too; the bias of a norm and of any other
            module may be spelled differently.
        start: what loading such a factor does to the base first, `DeltaSpec.base_change`.
    """

    suffix: str
    role: str
    kind: str = ""
    parameter: str = "weight"
    is_norm: bool = False
    start: str = ""


class Key(NamedTuple):
    """A tensor's name, taken apart.

    Attributes:
        module: component and module, in neutral form.
        stem: the same as the file has it.
        suffix: what the name ends in.
    """

    module: str
    stem: str
    suffix: str


@dataclass(frozen=True)
class Table:
    """One dialect.

    Attributes:
        components: how the keys of each part of a pipeline begin; the first is what modules of no
            known part become.
        fields: what keys end in, besides the roles that all dialects spell alike.
        alpha: what the name of the tensor ends in that holds alpha; scaling is alpha/r, and 1
            where there is none.
        factor: what the name of a tensor ends in whose number multiplies the change besides.
        is_flat: dots of module names are written as underscores.
        passed: regular expression of tensors that are no part of any change and are kept.
        stale: keys of the metadata that speak of the very tensors, "" = none.
        ranks: keys of the metadata for rank and alpha of the whole file.
        unreadable: a key of the metadata, an expression on its value, and what cannot be known of
            a file where it matches.
    """

    components: tuple[Component, ...]
    fields: tuple[Field, ...]
    alpha: str = "alpha"
    factor: str = ""
    is_flat: bool = True
    passed: str = ""
    stale: str = ""
    ranks: tuple[str, str] = ("", "")
    unreadable: tuple[str, str, str] = ("", "", "")

    def parse(self, name: str) -> Key | None:
        """A tensor's name taken apart; None if it is of no known form."""
        found = self._pattern.fullmatch(name)
        if found is None:
            return None
        component = self._by_prefix[found["prefix"]]
        module = f"{component}.{found['module']}" if component else found["module"]
        return Key(module, found["prefix"] + found["module"], found["suffix"])

    def is_passed(self, name: str) -> bool:
        """True for a tensor that is kept as it is."""
        return bool(self.passed) and re.match(self.passed, name) is not None

    def why_unreadable(self, metadata: Mapping[str, str]) -> str:
        """Why nobody can tell what a file's tensors mean, "" if that is known."""
        key, pattern, reason = self.unreadable
        return reason if key and re.search(pattern, metadata.get(key, "")) else ""

    def field_of(self, suffix: str) -> Field | None:
        """What a key's end means; None if nothing does."""
        if suffix in self._by_suffix:
            return self._by_suffix[suffix]
        return Field(suffix, suffix) if kinds.is_spelled(suffix) else None

    def stem_of(self, spec: DeltaSpec, *, is_flat: bool) -> str:
        """How the keys of a change begin.

        Args:
            spec: the change.
            is_flat: its module is flat already, with the component before the dot.
        """
        component, module = self._split(spec.module, is_flat)
        prefix = next((c.prefix for c in self.components if c.name == component), None)
        if prefix is None:
            prefix = self.components[0].prefix
        return prefix + (module.replace(".", "_") if self.is_flat else module)

    def keys_of(
        self, spec: DeltaSpec, stem: str, *, is_norm: bool = False
    ) -> Iterator[tuple[str, str]]:
        """(role, name of the tensor) of the fields of a change.

        Args:
            spec: the change.
            stem: of `stem_of`.
            is_norm: the weight of its module is a vector that changes too.
        """
        own = sorted(self._own_fields(spec), key=lambda f: (f.kind == spec.kind,
                                                            f.is_norm == is_norm))  # fmt: skip
        for role in spec.fields:  # of its own fields the last one counts
            spelled = self._suffixes(spec.base_change).get(role, role)
            yield role, f"{stem}.{own[-1].suffix if own else spelled}"

    def _own_fields(self, spec: DeltaSpec) -> list[Field]:
        """What a change that is one tensor may be spelled as."""
        if len(spec.fields) > 1:
            return []
        (source,) = spec.fields.values()
        return [
            f for f in self.fields
            if f.kind and f.parameter == spec.parameter
            and kinds.of_tensor(f.kind, source.shape) is spec.row
        ]  # fmt: skip

    def obstacle(self, spec: DeltaSpec) -> str:
        """Why a change cannot be written, "" if it can."""
        row = spec.row
        own = bool(self._own_fields(spec))
        known = self._suffixes(spec.base_change)
        unknown = [r for r in spec.fields if r not in known and not kinds.is_spelled(r)]
        is_start = any(f.start == spec.base_change for f in self.fields)
        reasons = {
            spec.title: not own and bool({*unknown} & {*row.roles}),
            f"{spec.base_change} changes the base": not is_start,
            "embedding": spec.layout == "embedding",
            "experts in one tensor": spec.layout == "experts",
            "block-diagonal factors": spec.blocks is not None,
            "a weight that is stored (in, out)": spec.transposed,
            f"the parameter {spec.parameter}": not own and spec.parameter != "weight",
            "a scaled bias": own and spec.scaling != 1,
            "a scaling without a rank": not own and not spec.rank and spec.scaling != 1,
            "a diagonal between the factors": not own and bool(unknown),
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _split(self, module: str, is_flat: bool) -> tuple[str, str]:
        if is_flat:
            component, _, flat = module.rpartition(".")
            return component, flat
        names = {c.name for c in self.components}
        for component, prefix in components_of(module):
            if component in names:
                rest = module.removeprefix(prefix)
                return component, with_text_model(rest) if "te" in component else rest
        whole = with_text_model(module)
        is_text = whole.startswith("text_model.") and known_names().look_up(
            "te", whole.replace(".", "_"), "weight"
        )
        return ("te", whole) if is_text else ("", module)

    @cached_property
    def _by_prefix(self) -> dict[str, str]:
        return {c.prefix: c.name for c in self.components}

    @cached_property
    def _by_suffix(self) -> dict[str, Field]:
        return {f.suffix: f for f in self.fields}

    def _suffixes(self, start: str) -> dict[str, str]:
        """Role of a factor among others -> how it is spelled, where loading begins like this."""
        found = {f.role: f.suffix for f in self.fields if not f.kind and f.start == start}
        if OPEN_LENGTHS in found:
            found |= dict.fromkeys(LENGTHS, found[OPEN_LENGTHS])
        return found

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest = sorted((c.prefix for c in self.components), key=len, reverse=True)
        prefixes = "|".join(map(re.escape, longest))
        module = r"[^.]+" if self.is_flat else r".+?"
        suffixes = [self.alpha, *filter(None, [self.factor]), *(f.suffix for f in self.fields)]
        ends = r".+" if self.is_flat else "|".join(map(re.escape, suffixes)) + r"|[^.]+"
        return re.compile(rf"(?P<prefix>{prefixes})(?P<module>{module})\.(?P<suffix>{ends})")
