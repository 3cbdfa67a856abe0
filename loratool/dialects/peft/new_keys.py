"""Tensor names of a new PEFT adapter: where PEFT's wrappers put each tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from loratool.adapter import Adapter, DeltaSpec, Replacement, Source
from loratool.dialects.peft import own_config
from loratool.dialects.peft.config import OWN_BIASES
from loratool.dialects.peft.experts import registration_order
from loratool.dialects.peft.keys import PREFIX
from loratool.dialects.peft.patterns import endings
from loratool.errors import MismatchError, list_some
from loratool.frozen import replace

_WRAP = ".base_layer"


def obstacle(spec: DeltaSpec) -> str:
    """What of a change no new configuration can hold, "" if there is nothing."""
    reasons = {
        spec.title: spec.kind not in ("lowrank", "dora", "vector"),
        f"{spec.base_change} changes the base": bool(spec.base_change),
        "block-diagonal factors": spec.blocks is not None,
        "a diagonal between the factors": "diag" in spec.fields,
        "a core between the factors": "lora_mid" in spec.fields,
        "experts packed expert-major": spec.b_order != "rank-major",
        "a change of a norm": spec.kind == "vector" and spec.parameter != "bias",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


class NewLayout:
    """How the deltas and replacements of an adapter lie in a PEFT model.

    Attributes:
        path: of the adapter, for messages.
        modules: every module path of the base and the adapter, as far as known.
        targets: plain target modules and MultiheadAttention modules -> the spec that gives rank
            and scaling.
        parameters: owner -> specs of its bare parameters, in order of registration.
        outputs: out_proj of a MultiheadAttention -> spec.
        biases: module -> spec of its bias delta.
        saved: modules saved whole, in file order.
        entries: module saved whole -> how ``modules_to_save`` names it.
        plain: replacement tensors that load under their own name.
        tokens: module -> replacement of some rows.

    Args:
        adapter: the deltas and replacements.
        base_tensors: in-memory names of the base's tensors, if known.
        heads: ends of modules that PEFT saves whole for the task.

    Raises:
        MismatchError: LT-411, LT-412.
    """

    def __init__(
        self, adapter: Adapter, base_tensors: Iterable[str] = (), heads: tuple[str, ...] = ()
    ) -> None:
        self._heads = heads
        self.path = adapter.path
        self._old = own_config(adapter)
        self._base = frozenset(base_tensors)
        names = {*self._base, *(s.name for s in adapter.specs)}
        self.modules = _ancestors({*names, *(r.name for r in adapter.replacements)})
        self.targets: dict[str, DeltaSpec] = {}
        self.parameters: dict[str, list[DeltaSpec]] = {}
        self.outputs: dict[str, DeltaSpec] = {}
        self.biases: dict[str, DeltaSpec] = {}
        self.saved: dict[str, list[Replacement]] = {}
        self.entries: dict[str, str] = {}
        self.plain: list[Replacement] = []
        self.tokens: dict[str, Replacement] = {}
        self._check_names(adapter)
        mhas = {s.module for s in adapter.specs if s.parameter == "in_proj_weight"}
        for spec in adapter.specs:
            self._check_kind(spec)
            self._put(spec, mhas)
        self._check_mhas(mhas)
        self._check_biases()
        self._check_dora(adapter.specs)
        self._put_replacements(adapter.replacements)
        for module in [m for m in self.saved if not self._can_be_saved(m)]:
            self.plain.extend(self.saved.pop(module))

    @property
    def is_targeted(self) -> bool:
        """True if any module or parameter has factors."""
        return bool(self.targets or self.parameters)

    @property
    def bias(self) -> str:
        """``bias`` of the configuration: whose biases are stored outside of saved modules."""
        owners = {r.name.rpartition(".")[0] for r in self.plain if r.name.endswith("bias")}
        if not owners:
            return "none"
        is_old = str(self._old.get("bias")).endswith(OWN_BIASES)
        return "lora_only" if is_old and all(map(self.wraps, owners)) else "all"

    @property
    def modules_to_save(self) -> list[str]:
        """Names of the saved modules; those that the adapter came with stay as they were."""
        used = {self.entries.get(module, module) for module in self.saved}
        # An entry that no module ends like stays too: PEFT puts both of its heads on every list.
        old = [
            e for e in _texts(self._old.get("modules_to_save"))
            if e in used or not any(m.endswith(e) for m in self.modules)
        ]  # fmt: skip
        return [*dict.fromkeys(old), *sorted(used - set(old))]

    def wraps(self, module: str) -> int:
        """How many PEFT layers lie around a module."""
        if module in self.parameters:
            return len(self.parameters[module])
        return int(module in self.targets or module in self.outputs)

    def key(self, module: str, *, inside: bool = False) -> str:
        """Path of a module in the PEFT model; ``inside`` goes through its own layers too."""
        parts, out = module.split("."), PREFIX.rstrip(".")
        for number, part in enumerate(parts, 1):
            out += f".{part}"
            if number < len(parts) or inside:
                out += _WRAP * self.wraps(".".join(parts[:number]))
        return out

    def _put(self, spec: DeltaSpec, mhas: set[str]) -> None:
        mha, _, leaf = spec.module.rpartition(".")
        if spec.kind == "vector":
            self.biases[spec.module] = spec
        elif spec.parameter == "in_proj_weight":
            self.targets[spec.module] = spec
        elif spec.is_bare or spec.parameter != "weight" or spec.layout == "experts":
            self.parameters.setdefault(spec.module, []).append(spec)
            self.parameters[spec.module].sort(key=self._registration)
        elif leaf == "out_proj" and mha in mhas:
            self.outputs[spec.module] = spec
        else:
            self.targets[spec.module] = spec
        both = self.parameters.keys() & self.targets.keys()
        if both:
            self._refuse("LT-411", "a module and a parameter of it are both adapted", both)
        if "" in self.parameters or "" in self.targets:
            self._refuse("LT-411", "a parameter of the model itself has no module", [spec.name])

    def _put_replacements(self, replacements: Sequence[Replacement]) -> None:
        whole = {r.name for r in replacements if r.rows is None}
        for replacement in replacements:
            module, _, _ = replacement.name.rpartition(".")
            if replacement.rows is not None:
                if self.wraps(module) or f"{module}.weight" in whole:
                    self._refuse("LT-411", "rows and the whole of a tensor change", [module])
                self.tokens[module] = replacement
            elif self._is_wrapped(module):
                self.plain.append(replacement)
            elif outer := self._saved_around(module):
                self.saved.setdefault(outer, []).append(replacement)
            elif f"{module}.weight" in whole:
                self.saved.setdefault(module, []).append(replacement)
            else:
                self.plain.append(replacement)
        for module in [m for m in self.saved if _outer_of(m, self.saved)]:
            self.saved[_outer_of(module, self.saved)].extend(self.saved.pop(module))

    def _saved_around(self, module: str) -> str:
        """The outermost module around a tensor that PEFT saves whole, "" if there is none.

        That is one that the adapter came with, or a head that its task adds: PEFT takes every
        module whose path ends like the entry, dot or not.
        """
        entries = _texts(self._old.get("modules_to_save"))
        parts = module.split(".")
        for number in range(1, len(parts) + 1):
            path = ".".join(parts[:number])
            for entry in (e for e in entries if path.endswith(e)):
                self.entries[path] = entry
                return path
            if path.endswith(self._heads):
                return path
        return ""

    def _registration(self, spec: DeltaSpec) -> tuple[int, int]:
        order = [t.rpartition(".")[2] for t in _texts(self._old.get("target_parameters"))]
        place = order.index(spec.parameter) if spec.parameter in order else len(order)
        return registration_order(spec.parameter), place

    def _is_wrapped(self, module: str) -> bool:
        """True if the module or one around it is a PEFT layer."""
        parts = module.split(".")
        return any(self.wraps(".".join(parts[:n])) for n in range(1, len(parts) + 1))

    def _check_names(self, adapter: Adapter) -> None:
        names = [s.name for s in adapter.specs] + [
            f"{r.name} (rows)" if r.rows is not None else f"{r.name} (whole)"
            for r in adapter.replacements
        ]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            self._refuse("LT-411", "one tensor is changed twice", twice)

    def _check_kind(self, spec: DeltaSpec) -> None:
        if reason := obstacle(spec):
            self._refuse("LT-411", f"a new configuration cannot hold {reason}", [spec.name])

    def _check_mhas(self, mhas: set[str]) -> None:
        """PEFT adapts both projections of a MultiheadAttention with one rank and one scaling."""
        for mha in sorted(mhas):
            joined, output = self.targets[mha], self.outputs.get(f"{mha}.out_proj")
            if output is None:
                self._refuse("LT-412", "PEFT adapts out_proj together with in_proj", [mha])
            if output.rank != joined.rank or output.scaling != 2 * joined.scaling:
                self._refuse(
                    "LT-412",
                    "PEFT gives out_proj the rank and twice the scaling of in_proj",
                    [mha],
                    f"rank {joined.rank}, scaling {2 * joined.scaling:g}",
                    f"rank {output.rank}, scaling {output.scaling:g}",
                )

    def _check_biases(self) -> None:
        """``lora_bias`` is one switch for all modules."""
        if not self.biases:
            return
        plain = {m for m, s in self.targets.items() if s.layout in ("linear", "conv")}
        others = [*self.parameters, *self.outputs, *(self.targets.keys() - plain)]
        odd = sorted({*others, *(plain ^ self.biases.keys())})
        if odd:
            self._refuse("LT-412", "lora_bias needs a bias delta on every module, or none", odd)
        uneven = [m for m, s in self.biases.items() if s.scaling != self.targets[m].scaling]
        if uneven or any(s.kind == "dora" for s in self.targets.values()):
            self._refuse("LT-412", "a bias delta has its module's scaling, without DoRA",
                         uneven or self.biases)  # fmt: skip

    def _check_dora(self, specs: Sequence[DeltaSpec]) -> None:
        """``use_dora`` is one switch for all modules."""
        weights = [s for s in specs if s.kind != "vector"]
        dora = [s.name for s in weights if s.kind == "dora"]
        if dora and (len(dora) < len(weights) or self.parameters or self.outputs):
            odd = [s.name for s in weights if s.kind != "dora"] or dora
            self._refuse("LT-412", "PEFT has DoRA on all modules, or on none", odd)

    def _can_be_saved(self, saved: str) -> bool:
        """Would the entry of a module take exactly the tensors that are there?

        PEFT wraps every module whose path ends like the entry, dot or not, and asks for all of
        its tensors.  A module that it cannot list loads as plain tensors all the same.
        """
        have = {r.name for r in self.saved[saved]}
        if any(n.startswith(f"{saved}.") and n not in have for n in self._base):
            return False
        if saved not in self.entries and any(
            m.endswith(saved) and m != saved for m in self.modules
        ):
            return False
        adapted = {*self.targets, *self.parameters, *self.outputs, *self.tokens}
        return not any(f".{saved}." in f".{module}." for module in adapted)

    @property
    def excluded(self) -> list[str]:
        """Modules of the base that PEFT would adapt because a target is the end of their path."""
        mine = {*self.targets, *self.outputs, *self.parameters}
        return sorted(
            module
            for module in self.modules - mine
            if any(ending in self.targets for ending in endings(module))
        )

    def _refuse(
        self,
        code: str,
        what: str,
        keys: Iterable[str],
        expected: str | None = None,
        got: str | None = None,
    ) -> NoReturn:
        raise MismatchError(
            code, f"PEFT cannot hold this adapter: {what}", file=self.path, key=list_some(keys),
            expected=expected, got=got,
        )  # fmt: skip


def new_tensors(layout: NewLayout) -> list[tuple[str, Source]]:
    """(key, tensor) of every delta and replacement of an adapter."""
    out: list[tuple[str, Source]] = []
    for module, spec in (*layout.targets.items(), *layout.outputs.items()):
        out.extend(_factors(layout.key(module), spec))
    for owner, specs in layout.parameters.items():
        for depth, spec in enumerate(reversed(specs)):
            out.extend(_factors(layout.key(owner) + _WRAP * depth, spec))
    for module, spec in layout.biases.items():
        out.append((f"{layout.key(module)}.lora_B.bias", spec.fields["delta"]))
    for module, rows in layout.tokens.items():
        key = f"{layout.key(module)}.token_adapter.trainable_tokens_delta"
        out.append((key, rows.source))
    for replacement in (*layout.plain, *(r for rs in layout.saved.values() for r in rs)):
        module, _, leaf = replacement.name.rpartition(".")
        path = layout.key(module, inside=True) if module else PREFIX.rstrip(".")
        out.append((f"{path}.{leaf}", replacement.source))
    return out


def _factors(key: str, spec: DeltaSpec) -> list[tuple[str, Source]]:
    names = ("lora_A.weight", "lora_B.weight")
    if spec.layout == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
    right, left = spec.fields["lora_A"], spec.fields["lora_B"]
    ones = (1,) * (len(right.shape) - 2)  # DyLoRA has none behind lora_B
    found = [(f"{key}.{names[0]}", right),
             (f"{key}.{names[1]}", _of_shape(left, (*left.shape[:2], *ones)))]  # fmt: skip
    lengths = spec.fields.get("magnitude")
    if lengths is not None:  # other programs have a column
        shape = (1, lengths.numel, *ones) if ones else (lengths.numel,)
        found.append((f"{key}.lora_magnitude_vector", _of_shape(lengths, shape)))
    return found


def _of_shape(source: Source, shape: tuple[int, ...]) -> Source:
    """The tensor itself where it has that shape: callers know it by its identity."""
    return source if source.shape == shape else replace(source, shape=shape)


def _ancestors(names: Iterable[str]) -> frozenset[str]:
    """Paths of all modules that the tensors lie in."""
    found: set[str] = set()
    for name in names:
        module = name.rpartition(".")[0]
        while module and module not in found:
            found.add(module)
            module = module.rpartition(".")[0]
    return frozenset(found)


def _texts(value: object) -> list[str]:
    """The texts of a list from a configuration."""
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _outer_of(module: str, saved: Mapping[str, object]) -> str:
    """The outermost saved module around a module, "" if there is none."""
    parts = module.split(".")
    for number in range(1, len(parts)):
        outer = ".".join(parts[:number])
        if outer in saved:
            return outer
    return ""
