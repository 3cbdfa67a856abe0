"""YAML of users and strangers: one safe reader with limits.

Recipes, weights per module and the front matter of model cards go through it.  Nothing is built
but nodes, which know their lines, and plain values; no tag runs code, no alias multiplies data.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from loratool.store.address import refuse_elsewhere
from loratool.store.contained import read_small, typed

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_NODES = 50_000
MAX_SCALAR = 100_000  # characters
MAX_DIGITS = 40  # of a number

Refuse = Callable[[str, int | None], NoReturn]
"""Called with what is wrong and the line, counted from 1; it must raise."""

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Counts while it composes: the scanner behind it reads no further than it must."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._nodes += 1
        self._depth += 1
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases are not used here"
        elif self._depth > MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} levels deep"
        elif self._nodes > MAX_NODES:
            problem = f"more than {MAX_NODES} values"
        elif isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR:
            problem = f"a text of more than {MAX_SCALAR} characters"
        elif isinstance(event, yaml.ScalarEvent) and not _is_unicode(event.value):
            problem = "half a surrogate pair"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def read_yaml(path: Path, refuse: Refuse) -> yaml.Node | None:
    """The one document of a file that a user named, None if it is empty; see `compose`.

    Raises:
        BadFileError: there is no such file.
        UnsafeContentError: it is no regular file.
    """
    refuse_elsewhere(path)

    def too_large() -> NoReturn:
        refuse(f"more than {MAX_BYTES} bytes", None)

    raw = read_small(typed(path), MAX_BYTES, too_large)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(f"no UTF-8 text at byte {error.start}", None)
    return compose(text, refuse)


def compose(text: str, refuse: Refuse) -> yaml.Node | None:
    """The one document of a text as nodes, None if it is empty.

    Args:
        text: YAML.
        refuse: called if it is none, or beyond the limits of this module.
    """
    if len(text) > MAX_BYTES:
        refuse(f"more than {MAX_BYTES} characters", None)
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as chr() of an escape
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        refuse(problem, line_of(mark) if mark else None)


def line_of(mark: yaml.Mark) -> int:
    """The line of a place, counted from 1."""
    return mark.line + 1


def plain(node: yaml.Node, refuse: Refuse) -> Any:
    """The value of a node: texts, numbers, true, false, null, dates, lists and dictionaries.

    A tag must be what the value looks like: ``!!int ''`` is refused.
    """
    line = line_of(node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, refuse, line)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [plain(item, refuse) for item in node.value]
    if not isinstance(node, yaml.MappingNode) or node.tag != f"{_TAG}map":
        refuse(f"unknown tag {node.tag}", line)
    found: dict[Any, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            refuse("a key is a word", line_of(key.start_mark))
        name = plain(key, refuse)
        if name in found:
            refuse(f"{key.value[:80]} is there twice", line_of(key.start_mark))
        found[name] = plain(value, refuse)
    return found


def _scalar(node: yaml.ScalarNode, refuse: Refuse, line: int) -> Any:
    if node.tag == f"{_TAG}str":
        return node.value
    loader = yaml.SafeLoader("")
    try:
        looks = loader.resolve(yaml.ScalarNode, node.value, (True, False))  # type: ignore[no-untyped-call]
        is_number = looks in (f"{_TAG}int", f"{_TAG}float")
        if looks == node.tag and not (is_number and len(node.value) > MAX_DIGITS):
            return loader.construct_object(node)
    except (yaml.YAMLError, ValueError, OverflowError):  # a month 13, a merge key
        pass
    finally:
        loader.dispose()
    return refuse(f"{node.value[:80]!r} is no {node.tag.removeprefix(_TAG)}", line)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
