"""``target_parameters``: factors of bare parameters, whose names the keys do not tell.

The tensors sit on the module that owns the parameters.  PEFT wraps that module once per
parameter, in the order in which the module registers them; the first wrapper is the innermost,
so the key of the first parameter has the most ``.base_layer``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from loratool.adapter import TensorRef
from loratool.dialects.peft.config import PeftConfig
from loratool.dialects.peft.patterns import endings, is_named
from loratool.errors import BadFileError, MismatchError, list_some
from loratool.frozen import Frozen

_MOST = 256  # parameters of one module
_WRAP = ".base_layer"
# Order of registration in every expert class of transformers 5.23 (and DBRX: w1, v1, w2).
_REGISTERED = (
    "gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "w1", "v1",
    "down_proj", "down_proj_bias", "w2",
    "input_gate_weight", "recurrent_gate_weight",  # RecurrentGemma
    "time_mix_key", "time_mix_value", "time_mix_receptance",  # RWKV
)  # fmt: skip
_THREE_D = frozenset(_REGISTERED) - {"gate_up_proj_bias", "down_proj_bias"}


class Parameter(Frozen):
    """A bare parameter that a pair of factors belongs to.

    Attributes:
        module: path of the owner.
        name: likeliest parameter name.
        alternatives: other names that the configuration allows here.
    """

    module: str
    name: str
    alternatives: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """What PEFT matches patterns against."""
        return f"{self.module}.{self.name}"

    @property
    def is_expert(self) -> bool:
        """True for names that only 3-D parameters of expert modules have."""
        return self.name in _THREE_D and self.module.rpartition(".")[2].endswith("experts")


def find_parameters(
    modules: Mapping[str, Mapping[str, TensorRef]],
    config: PeftConfig,
    is_mha: Callable[[str], bool],
) -> tuple[dict[str, Parameter], list[str]]:
    """Which parameter each module path means; plain modules are left out.

    Args:
        modules: module path (with ``.base_layer`` infixes) -> roles.
        config: of the adapter.
        is_mha: is this module an nn.MultiheadAttention, which nests differently?

    Returns:
        Module path as in the file -> parameter, and notes.

    Raises:
        MismatchError: LT-409, more factors on one module than the configuration has parameters.
        BadFileError: LT-361, the configuration names more parameters than a module has.
    """
    owners: dict[str, list[str]] = {}
    for path, roles in modules.items():
        is_mha_output = path.endswith(f"{_WRAP}.out_proj")
        if "lora_A" in roles and not is_mha(path) and not is_mha_output:
            owners.setdefault(_owner(path), []).append(path)
    found: dict[str, Parameter] = {}
    unsure: list[str] = []
    for owner, paths in owners.items():
        nested = any(path != owner for path in paths)
        names = _candidates(owner, config, len(paths))
        if not nested and (not names or _is_plain(owner, modules[owner]["lora_A"], config)):
            continue
        if len(paths) > len(names):
            ref = next(iter(modules[paths[0]].values()))
            raise MismatchError(
                "LT-409", f"factors of {len(paths)} parameters on one module", file=ref.file,
                key=owner, expected=f"{len(paths)} parameters of it in target_parameters",
                got=list_some(names) or "none" if config.file else "no configuration",
            )  # fmt: skip
        # Innermost (most wrapped) is the parameter that is registered first.
        for path, name in zip(sorted(paths, key=len, reverse=True), names, strict=False):
            others = tuple(n for n in names if n != name)
            found[path] = Parameter(owner, name, others)
        if len(names) > 1 and (len(paths) < len(names) or not set(names) <= set(_REGISTERED)):
            unsure.append(owner)
    notes = []
    if unsure:
        notes.append(
            f"which parameter the factors of {list_some(unsure, 3)} change is not in the file: "
            "by order and shape"
        )
    return found, notes


def registration_order(name: str) -> int:
    """Sort key that puts a module's parameters in the order in which it registers them."""
    return _REGISTERED.index(name) if name in _REGISTERED else len(_REGISTERED)


def _owner(path: str) -> str:
    while path.endswith(_WRAP):
        path = path.removesuffix(_WRAP)
    return path


def _candidates(owner: str, config: PeftConfig, count: int) -> list[str]:
    """Names of the owner's parameters that the configuration targets, in order of registration.

    A name alone may be that of another module's parameter: it counts where those that name the
    owner are not as many as its factors.
    """
    if not config.parameters:
        return []
    by_parent = _by_parent(config.parameters)
    found = _of(owner, by_parent)
    if len({name for _, name in found}) < count:
        found += by_parent.get("", ())
    names = list(dict.fromkeys(name for _, name in sorted(found)))
    if len(names) > _MOST:
        raise BadFileError(
            "LT-361", "wrong value in the configuration", file=config.file,
            key="target_parameters", expected=f"at most {_MOST} parameters of one module",
            got=f"{len(names)} of {owner}",
        )  # fmt: skip
    if set(names) <= set(_REGISTERED):
        names.sort(key=_REGISTERED.index)
    return names


def _of(owner: str, by_parent: Mapping[str, Sequence[tuple[int, str]]]) -> list[tuple[int, str]]:
    """Parameters whose entries name the owner."""
    return [pair for e in (owner, *endings(owner)) for pair in by_parent.get(e, ())]


@lru_cache(maxsize=1)
def _by_parent(parameters: tuple[str, ...]) -> Mapping[str, list[tuple[int, str]]]:
    """Path of a module's end -> (place in the list, name) of its parameters."""
    found: dict[str, list[tuple[int, str]]] = {}
    for number, target in enumerate(parameters):
        parent, _, name = target.rpartition(".")
        found.setdefault(parent, []).append((number, name))
    return found


def _is_plain(owner: str, lora_A: TensorRef, config: PeftConfig) -> bool:
    """True if ``target_modules`` covers the owner, so that its factors belong to its weight.

    A head that is tied to an embedding need not be named.
    """
    if config.has_target_pattern:  # it may be anything: flattened experts differ, and what is named
        if _of(owner, _by_parent(config.parameters)):
            return False  # PEFT refuses to take a module and its parameter
        return lora_A.shape[:1] == (int(config.ranks.get(owner, config.rank or 0)),)
    is_tied = False
    if config.ties:
        from loratool.archs.ties import is_head

        is_tied = is_head(f"{owner}.weight")
    return is_tied or is_named(owner, config.targets or ())
