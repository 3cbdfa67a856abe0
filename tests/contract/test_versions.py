"""docs/versioning.md, where it can be checked: nothing that was promised is gone.

python -m tests.contract.test_versions > tests/contract/promised.json      records it anew
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import click

import loratool as lt
import loratool.report
from loratool.cli.group import COMMANDS, MODULES
from loratool.frozen import names_of
from loratool.report.base import SCHEMA

ROOT = Path(lt.__file__).parents[1]
PROMISED = Path(__file__).with_name("promised.json")
HEADING = re.compile(r"^## (\d+)\.(\d+)\.(\d+) \((unreleased|\d{4}-\d\d-\d\d)\)$", re.M)


def promised() -> dict[str, Any]:
    """Commands with flags, Python's names with keywords, reports with keys."""
    flags = {}
    for name in COMMANDS:
        command = import_module(f"loratool.cli.{MODULES.get(name, name)}").command
        options = [p for p in command.params if isinstance(p, click.Option)]
        flags[name] = _line(f for p in options for f in (*p.opts, *p.secondary_opts))
    functions = {name: getattr(lt, name) for name in lt.__all__ if name != "__version__"}
    return {
        "version": lt.__version__,
        "schema": SCHEMA,
        "commands": flags,
        "python": {n: _line(inspect.signature(f).parameters) for n, f in functions.items()},
        "json": _keys(),
    }


def _line(words: Iterable[str]) -> str:
    return " ".join(sorted(words))


def _keys() -> dict[str, str]:
    found = {}
    for module in iter_modules(loratool.report.__path__):
        for name, kind in vars(import_module(f"loratool.report.{module.name}")).items():
            if names_of(kind) and not name.startswith("_"):
                found[name] = _line(names_of(kind))
    return dict(sorted(found.items()))


def test_nothing_that_was_promised_is_gone() -> None:
    was, now = json.loads(PROMISED.read_text()), promised()
    assert now["schema"] == was["schema"], "record it anew, and say it in CHANGELOG.md"
    gone = [
        (part, name, word)
        for part in ("commands", "python", "json")
        for name, words in was[part].items()
        for word in (words.split() if name in now[part] else ["all of it"])
        if word not in now[part].get(name, "").split()
    ]
    assert gone == [], "docs/versioning.md says how something may go"


def test_the_changelog_is_of_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    found = HEADING.findall(text)
    assert len(found) == text.count("\n## "), "a heading has another form"
    numbers = [tuple(map(int, one[:3])) for one in found]
    assert ".".join(map(str, numbers[0])) == lt.__version__
    assert numbers == sorted(set(numbers), reverse=True)
    assert all(date != "unreleased" for *_, date in found[1:])


def test_the_version_stands_in_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", lt.__version__)
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


if __name__ == "__main__":
    print(json.dumps(promised(), indent=1))
