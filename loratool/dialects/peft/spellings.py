"""Names and shapes that exporters use for modules which PEFT itself would call otherwise.

Tinker (and what serves its adapters) writes the output head as ``unembed_tokens`` and all experts
of a projection as one pair of 3-D factors, 1 for a side that all of them share; Unsloth splits
the experts of gpt-oss into lists, ``gate_up_projs.N``.  Here they get the names that they have
in the model, so that nothing behind needs to know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratool.adapter import TensorRef
from loratool.dialects.peft.keys import Sorted
from loratool.errors import BadFileError
from loratool.frozen import replace
from loratool.lazy import regex
from loratool.report.text import plural

_HEAD = regex(r"(?:.+\.)?unembed_tokens")
_SPLIT = regex(r"(?P<experts>(?:.+\.)?experts)\.(?P<leaf>gate_up_proj|down_proj)s\.(?P<n>\d+)")
_STACKED = regex(r"(?P<experts>(?:.+\.)?experts)\.(?P<leaf>[A-Za-z]\w*)")
_LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_KEEPS_LETTERS = "block_sparse_moe.experts"  # Mixtral's own names
MAX_EXPERTS = 4096
Roles = Mapping[str, TensorRef]


def unify_spellings(found: Sorted) -> Sorted:
    """The tensors of a file under the names of the model's own modules.

    Raises:
        BadFileError: LT-363, stacked factors do not fit each other; LT-367, two names for one.
    """
    modules: dict[str, dict[str, TensorRef]] = {}
    notes = list(found.notes)
    idle = []
    for module, roles in found.modules.items():
        if _HEAD.fullmatch(module):
            _add(modules, "lm_head", roles)
            notes.append(f"{module} is the output head, lm_head")
        elif match := _SPLIT.fullmatch(module):
            _add(modules, f"{match['experts']}.{match['n']}.{match['leaf']}", roles)
        elif (match := _STACKED.fullmatch(module)) and _is_empty(roles):
            idle += list(roles.values())
        elif match and _is_stacked(roles):
            for name, one in _unstack(match, roles).items():
                _add(modules, name, one)
        else:
            _add(modules, module, roles)
    if idle and modules:
        notes.append(plural(
            len(idle), "empty factor stands for a projection that the experts lack",
            "empty factors stand for projections that the experts lack",
        ))  # fmt: skip
        return replace(found, modules=modules, notes=notes, training=[*found.training, *idle])
    return replace(found, modules=modules if modules else found.modules, notes=notes)


def _add(modules: dict[str, dict[str, TensorRef]], name: str, roles: Roles) -> None:
    if name in modules:
        first, second = (next(iter(r.values())) for r in (modules[name], roles))
        raise BadFileError(
            "LT-367", "two tensors mean the same", file=second.file, key=name,
            got=f"{first.name} and {second.name}",
        )  # fmt: skip
    modules[name] = dict(roles)


def _is_empty(roles: Roles) -> bool:
    return all(ref.shape == (0,) for ref in roles.values())


def _is_stacked(roles: Roles) -> bool:
    """True for 3-D factors of experts; those of a convolution belong to no list of experts."""
    return roles.keys() == {"lora_A", "lora_B"} and all(len(r.shape) == 3 for r in roles.values())


def _unstack(match: re.Match[str], roles: Roles) -> dict[str, dict[str, TensorRef]]:
    """Factors (E, r, in) and (E, out, r), with 1 for E where it is shared, expert by expert."""
    lora_A, lora_B = roles["lora_A"], roles["lora_B"]
    counts = {lora_A.shape[0], lora_B.shape[0]} - {1} or {1}
    if len(counts) > 1 or lora_A.shape[1] != lora_B.shape[2] or max(counts) > MAX_EXPERTS:
        raise BadFileError(
            "LT-363", "factors of experts do not fit each other", file=lora_A.file,
            key=lora_A.name, expected="lora_A (E, r, in) and lora_B (E, out, r), or 1 for E",
            got=f"{list(lora_A.shape)} and {list(lora_B.shape)}",
        )  # fmt: skip
    leaf = match["leaf"]
    if not match["experts"].endswith(_KEEPS_LETTERS):
        leaf = _LEAVES.get(leaf, leaf)
    return {
        f"{match['experts']}.{n}.{leaf}": {role: _slice(ref, n) for role, ref in roles.items()}
        for n in range(max(counts))
    }


def _slice(ref: TensorRef, number: int) -> TensorRef:
    if ref.shape[0] == 1:
        number = 0
    nbytes = ref.nbytes // max(1, ref.shape[0])
    return replace(ref, shape=ref.shape[1:], start=ref.start + number * nbytes, nbytes=nbytes)
