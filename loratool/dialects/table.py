"""Dialects as tables: what keys look like, what they mean, what a file of it can hold.

A dialect whose tensors say everything (kohya, LyCORIS) is one `Table` and no code.  Factors that
are called the same everywhere (``hada_w1_a``) come from the rows of `loratool.kinds`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property, lru_cache

from loratool import kinds
from loratool.adapter import DeltaSpec
from loratool.archs.flat import components_of, known_names, with_text_model
from loratool.delta.forms import is_grouped
from loratool.dialects.candidate import asks_for_numbers, without_numbers
from loratool.dialects.factors import LENGTHS, OPEN_LENGTHS
from loratool.dialects.fields import Component, Field, Header, Key
from loratool.frozen import Frozen, replace

# What keys of algorithms end in that no kind is made of -> their title.
ALGORITHMS = (
    (r"oft_R|boft", "OFT"),
    (r"dora_scale|magnitude", "DoRA"), (r"diff$|diff_m$", "full difference"),
    (r"bm\.weight", "GLoRA with a bias"),
)  # fmt: skip
# Of these, what ends as a factor does: behind dots it would pass for a module of that name.
_TWO_WORDS = (r"oft_R\.[\w.]+", r"bm\.weight")


class Table(Frozen, dict=True):
    """One dialect.

    Attributes:
        components: how the keys of each part of a pipeline begin; the first is what modules of no
            known part become, unless they may go without.
        fields: what keys end in, besides the roles that all dialects spell alike.  Of several with
            one role a changed file keeps that which it has; a new one gets the first.
        alpha: what the name of the tensor ends in that holds alpha; scaling is alpha/r, and 1
            where there is none.
        factor: what the name of a tensor ends in whose number multiplies the change besides.
        has_alphas: new files get alpha tensors; without them scaling goes into the factors.
        header: reads and writes what metadata state about scaling; alpha tensors win.
        is_flat: dots of module names are written as underscores.
        renames: (regular expression, what stands there today): older and odd spellings of names,
            applied one after another.
        adapter_name: regular expression of a name of an adapter in keys: group 1.
        grows: what the name of a tensor ends in that says which shape the base's weight gets before
            a change is added, in columns of zeros.
        growing: modules whose weights do so in every file.
        lone: role of a factor that, where no module has its partner, is the whole change.
        only: kinds that new files may hold, () = all that have a spelling.
        of: families that new files may be of, () = all.
        naming: what modules are called in new files: a naming of `loratool.archs.families`, or
            ``written`` = the one that a family is usually written in.
        bare: a parameter that is neither a weight nor a bias is named as a module is.
        passed: regular expression of tensors that are no part of any change and are kept.
        stale: keys of the metadata that speak of the very tensors, "" = none.
        ranks: keys of the metadata for rank and alpha of the whole file.
        model: key of the metadata for what it was trained on, by which programs sort files.
        by_heads: regular expression of modules whose left rows lie head by head, q k v q k v …, in
            files whose keys say PEFT's default name of an adapter, and how many rows a head has.
        unreadable: a key of the metadata, an expression on its value, and what cannot be known of
            a file where it matches.
    """

    components: tuple[Component, ...]
    fields: tuple[Field, ...]
    alpha: str = "alpha"
    factor: str = ""
    has_alphas: bool = True
    header: Header | None = None
    is_flat: bool = True
    renames: tuple[tuple[str, str], ...] = ()
    adapter_name: str = ""
    grows: str = ""
    growing: tuple[str, ...] = ()
    lone: str = ""
    only: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    naming: str = "written"
    bare: bool = False
    passed: str = ""
    stale: str = ""
    ranks: tuple[str, str] = ("", "")
    model: str = ""
    by_heads: tuple[str, int] = ("", 0)
    unreadable: tuple[str, str, str] = ("", "", "")

    def parse(self, name: str) -> Key | None:
        """A tensor's name taken apart; None if it is of no known form."""
        for pattern, today in self._renames_of(without_numbers(name)) if self.renames else ():
            name = pattern.sub(today, name)
        found = self._pattern.fullmatch(name)
        if found is None:
            return None
        component = self._by_prefix[found["prefix"]]
        module = f"{component}.{found['module']}" if component else found["module"]
        return Key(module, found["prefix"] + found["module"], found["suffix"])

    def adapter_of(self, name: str) -> str:
        """The name of an adapter that a tensor's name holds, "" if it holds none."""
        found = re.search(self.adapter_name, name) if self.adapter_name else None
        return "" if found is None else found[1]

    def keeps_alphas(self, names: Iterable[str]) -> bool:
        """True if a file of it has alpha tensors, whether new or with these names."""
        return bool(self.alpha) and (
            self.has_alphas or any(name.endswith(f".{self.alpha}") for name in names)
        )

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

    def stem_of(self, module: str, *, is_flat: bool) -> str:
        """How the keys of a module begin.

        Args:
            module: in neutral form.
            is_flat: it is flat already, with the component before the dot.
        """
        component, rest = self._split(module, is_flat)
        prefix = next((c.prefix for c in self.components if component in (c.name, *c.also)), None)
        if prefix is None:
            prefix = self.components[0].prefix
        return prefix + (rest.replace(".", "_") if self.is_flat else rest)

    def addressed(self, spec: DeltaSpec) -> DeltaSpec:
        """The change of a parameter under the module and parameter that its keys name."""
        if not self.bare or spec.parameter in ("weight", "bias"):
            return spec
        return replace(spec, module=spec.name, parameter="weight")

    def keys_of(
        self,
        spec: DeltaSpec,
        stem: str,
        own: Collection[str] = (),
        *,
        is_norm: bool = False,
        gain: float | None = None,
    ) -> list[tuple[str, str]]:
        """(role, name of the tensor) of the fields of a change; none if it cannot be spelled.

        Args:
            spec: the change.
            stem: of `stem_of`.
            own: what keys of the file end in now.
            is_norm: the weight of its module is a vector that changes too.
            gain: scaling of the factors of its module, None = it has none.
        """  # fmt: skip
        single = self._own_fields(spec)
        if single and gain is not None:
            single = [f for f in single if spec.scaling == (gain if f.is_scaled else 1)]
            if not single:
                return []
        # Programs whose files have no alpha know a bias as that of a factor.
        as_factor = gain is not None and not (self.has_alphas and self.alpha)
        single.sort(key=lambda f: (f.suffix in own, f.kind == spec.kind, f.is_norm == is_norm,
                                   f.is_scaled == as_factor))  # fmt: skip
        ways = self._suffixes(spec.base_change)
        return [
            (role, f"{stem}.{single[-1].suffix if single else _spelled(ways, role, own)}")
            for role in spec.fields  # of its own fields the last one counts
        ]

    def suffixes_in(self, names: Iterable[str]) -> frozenset[str]:
        """What these keys end in."""
        return frozenset(key.suffix for name in names if (key := self.parse(name)) is not None)

    def is_open(self, name: str) -> bool:
        """True for a tensor that holds lengths of rows or columns, as its shape tells."""
        return any(f.role == OPEN_LENGTHS and name.endswith(f".{f.suffix}") for f in self.fields)

    def key_of_set(self, name: str, *, is_flat: bool) -> str | None:
        """The name of a tensor that takes the place of a parameter; None = it has no spelling."""
        for one in self.fields:
            if one.is_set and name.endswith(f".{one.parameter}"):
                module = name.removesuffix(f".{one.parameter}")
                return f"{self.stem_of(module, is_flat=is_flat)}.{one.suffix}"
        return None

    def _own_fields(self, spec: DeltaSpec) -> list[Field]:
        """What a change that is one tensor may be spelled as."""
        if len(spec.fields) > 1:
            return []
        (source,) = spec.fields.values()
        return [
            f for f in self.fields
            if f.kind and f.parameter == spec.parameter
            and (f.is_scaled or spec.scaling == 1)
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
            "a scaled bias": not own and not spec.is_matrix and spec.scaling != 1,
            spec.title: bool(self.only and row.name not in self.only)
            or (not own and bool({*unknown} & {*row.roles})),
            f"{spec.base_change} changes the base": not is_start,
            "embedding": spec.layout == "embedding",
            "experts in one tensor": spec.layout == "experts",
            "block-diagonal factors": spec.blocks is not None,
            "a convolution in groups": is_grouped(spec),
            "a weight that is stored (in, out)": spec.transposed,
            f"the parameter {spec.parameter}": not own and spec.parameter != "weight",
            "a scaling without a rank": not own and not spec.rank and spec.scaling != 1,
            "a diagonal between the factors": not own and bool(unknown),
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _split(self, module: str, is_flat: bool) -> tuple[str, str]:
        if not self.is_flat:
            known = {name for c in self.components for name in (c.name, *c.also) if name}
            first = next((n for n in known if module.startswith(f"{n}.")), "")
            return first, module.removeprefix(f"{first}.")
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

    def _suffixes(self, start: str) -> dict[str, tuple[str, ...]]:
        """Role of a factor among others -> how it is spelled, where loading begins like this."""
        found: dict[str, tuple[str, ...]] = {}
        for one in self.fields:
            if not one.kind and not one.is_set and one.start == start:
                for role in LENGTHS if one.role == OPEN_LENGTHS else (one.role,):
                    found[role] = (*found.get(role, ()), one.suffix)
        return found

    @cached_property
    def _renames_of(self) -> Callable[[str], list[tuple[re.Pattern[str], str]]]:
        """Those that may change one of the names that are alike but for their digits."""
        every = [(re.compile(pattern), today) for pattern, today in self.renames]

        @lru_cache(maxsize=1 << 10)
        def those_of(name: str) -> list[tuple[re.Pattern[str], str]]:
            found: list[tuple[re.Pattern[str], str]] = []
            for place, (pattern, today) in enumerate(every):
                if asks_for_numbers(pattern.pattern):
                    return [*found, *every[place:]]
                renamed = pattern.sub(today, name)
                if renamed != name:
                    found.append((pattern, today))
                name = renamed
            return found

        return those_of

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest = sorted((c.prefix for c in self.components), key=len, reverse=True)
        prefixes = "|".join(map(re.escape, longest))
        module = r"[^.]+" if self.is_flat else r".+?"
        suffixes = [self.alpha, *filter(None, [self.factor]), *(f.suffix for f in self.fields)]
        ends = (
            r".+" if self.is_flat else "|".join((*map(re.escape, suffixes), *_TWO_WORDS, "[^.]+"))
        )
        return re.compile(rf"(?P<prefix>{prefixes})(?P<module>{module})\.(?P<suffix>{ends})")


def _spelled(ways: Mapping[str, tuple[str, ...]], role: str, own: Collection[str]) -> str:
    """What the key of a factor among others ends in: as in the file, else as in new ones."""
    found = ways.get(role, (role,))
    return next((suffix for suffix in found if suffix in own), found[0])
