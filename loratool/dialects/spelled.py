"""Programs for language models that name modules as they like: what their readers share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from loratool.adapter import TensorRef
from loratool.dialects.candidate import Candidate
from loratool.dialects.factors import refuse_alpha
from loratool.dialects.peft.config import Fields
from loratool.errors import BadFileError, MismatchError
from loratool.frozen import Frozen
from loratool.options.groups import Read
from loratool.store.contained import open_inside
from loratool.store.jsonfile import load_json


class Spelling(Frozen):
    """How a program names the tensors of its changes.

    Attributes:
        key: of a whole name; its groups are ``module`` and, but for one role, ``leaf``.
        roles: leaf -> role.
        expected: what modules there are, for messages.
        hint: what to do with a file of others.
        layer: of a module in a layer; its groups are ``number`` and ``leaf``.
        modules: leaf of a layer -> where it lies in a layer of transformers.
        outside: other modules -> what transformers calls them.
    """

    key: re.Pattern[str]
    roles: Mapping[Any, str]
    expected: str
    hint: str | None = None
    layer: re.Pattern[str] | None = None
    modules: Mapping[str, str] = {}
    outside: Mapping[str, str] = {}

    def by_module(self, refs: Iterable[TensorRef]) -> dict[str, dict[str, TensorRef]]:
        """Module, as the program calls it -> role -> tensor.

        Raises:
            MismatchError: LT-415, a tensor of another kind.
        """
        modules: dict[str, dict[str, TensorRef]] = {}
        for ref in refs:
            match = self.key.fullmatch(ref.name)
            if match is None:
                self.refuse(ref)
            role = self.roles[match.groupdict().get("leaf")]
            modules.setdefault(match["module"], {})[role] = ref
        return modules

    def place(self, module: str, fields: Mapping[str, TensorRef]) -> tuple[str, str]:
        """(what transformers calls a module, its leaf in a layer or "").

        Raises:
            MismatchError: LT-415, there is no such module.
        """
        match = self.layer.fullmatch(module) if self.layer else None
        inner = self.modules.get(match["leaf"]) if match else self.outside.get(module)
        if not inner:
            self.refuse(next(iter(fields.values())))
        return (f"model.layers.{match['number']}.{inner}", match["leaf"]) if match else (inner, "")

    def refuse(self, ref: TensorRef) -> NoReturn:
        """LT-415 for a tensor that is no part of a change."""
        raise MismatchError(
            "LT-415", "tensors of an unknown kind", file=ref.path, key=ref.name,
            expected=self.expected, hint=self.hint,
        )  # fmt: skip


def beside(candidate: Candidate, name: str) -> Mapping[str, Any]:
    """A JSON or YAML file beside the tensors, empty if there is none.

    Raises:
        BadFileError: LT-361 and those of JSON, it is damaged.
    """
    assert candidate.weights is not None
    path = candidate.weights.with_name(name)
    if not path.is_file():
        return {}
    return load_json(path) if path.suffix == ".json" else _load_yaml(path)


def _load_yaml(path: Path) -> Mapping[str, Any]:
    from loratool.store.yamlfile import MAX_BYTES, compose, plain

    def refuse(problem: str, line: int | None) -> NoReturn:
        raise BadFileError("LT-361", "wrong value in the configuration", file=path,
                           expected="YAML of names with values", got=problem)  # fmt: skip

    with open_inside(path) as file:
        text = file.read(MAX_BYTES + 1).decode("utf-8", "replace")
    node = compose(text, refuse)
    found = None if node is None else plain(node, refuse)
    if not isinstance(found, dict):
        refuse("no names with values", None)
    return found


def alpha_of(
    candidate: Candidate, options: Read, name: str, *, title: str, key: str = "lora_alpha",
    value: str = "VALUE",
) -> float:  # fmt: skip
    """The alpha that was asked for, or that a file beside the tensors states.

    Args:
        candidate: the file.
        options: with ``alpha``.
        name: of the file beside it.
        title: of the program, for messages.
        key: of alpha in that file.
        value: what ``--alpha`` takes, for messages.

    Raises:
        BadFileError: LT-361, no number.
        UsageError: LT-280, nothing says it.
    """
    if options.alpha is not None:
        return options.alpha
    assert candidate.weights is not None
    fields = Fields(beside(candidate, name), candidate.weights.with_name(name))
    if fields.config.get(key) is None:
        refuse_alpha(candidate.path, title, name, value)
    return fields.number(key, 0.0)
