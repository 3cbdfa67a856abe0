"""The catalogue of errors: every raise site in docs/errors.md, every number used for one thing.

python -m tests.contract.test_errors > docs/errors.md      writes the catalogue anew
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import loratool
from loratool import errors

ROOT = Path(loratool.__file__).parent
CATALOGUE = ROOT.parent / "docs" / "errors.md"
EXIT = {
    name: kind.exit_code
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.LoratoolError)
}


def text_of(node: ast.expr) -> str:
    """The sentence of a raise site; values that are filled in become an ellipsis."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(v) for v in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value) if isinstance(node.value, ast.Call) else "…"
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "plural":
        return f"… {text_of(node.args[-1])}{'' if len(node.args) > 2 else 's'}"
    if isinstance(node, ast.IfExp):
        return f"{text_of(node.body)} / {text_of(node.orelse)}"
    return "…"


def sites() -> Iterator[tuple[str, str, str, str]]:
    """(code, class, sentence, file) of every error that is made with a literal code."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or len(node.args) < 2:
                continue
            code = node.args[0]
            if isinstance(code, ast.Constant) and re.fullmatch(r"LT-\d{3}", str(code.value)):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                yield code.value, name, text_of(node.args[1]), path.relative_to(ROOT).as_posix()


def catalogue() -> str:
    found: dict[str, dict[str, None]] = {}
    exits: dict[str, str] = {}
    for code, kind, text, _file in sites():
        found.setdefault(code, {})[text] = None
        if kind in EXIT:
            exits[code] = str(EXIT[kind])
    lines = [
        "# Errors", "",
        "Every message has the form `error[LT-nnn]: what · file · key · expected · got · hint`.",
        "The same fields come under `error` with `--json`.  The first digit is the exit code",
        "(`LT-0nn` = 1, a bug; `LT-1nn` = 10).", "",
        "Exit codes: 0 ok · 1 bug · 2 usage · 3 bad input file · 4 inputs do not belong together",
        "or are not supported · 5 output refused · 6 disk, memory or permission · 7 Hub or network",
        "· 8 not a number or out of range · 9 unsafe content refused · 10 differences found ·",
        "130, 143 interrupted.", "",
        "Streams: what is printed to a closed stdout or stderr is dropped, and the exit code is",
        "that of the work.  A success whose report finds its disk full is 6; one whose reader left",
        "(`| head`) is 141, and its output is complete.  An error keeps its code, whatever becomes",
        "of its message; what happens to stderr never changes one.", "",
        "| number | what |", "|---|---|",
    ]  # fmt: skip
    for code in sorted(found):
        lines.append(f"| {code} | {'; '.join(t.replace('|', '/') for t in found[code])} |")
    return "\n".join(lines) + "\n"


def test_first_digit_is_the_exit_code() -> None:
    for code, kind, _text, file in sites():
        if kind in EXIT:
            digit = {10: 1, 1: 0}.get(EXIT[kind], EXIT[kind])
            assert code[3] == str(digit), f"{code} is raised as {kind} in {file}"


def test_one_number_one_class() -> None:
    """A number may have several raise sites and sentences, but one class of error."""
    kinds: dict[str, set[str]] = {}
    for code, kind, _text, _file in sites():
        if kind in EXIT:
            kinds.setdefault(code, set()).add(kind)
    assert {code: k for code, k in kinds.items() if len(k) > 1} == {}


def test_the_catalogue_is_current() -> None:
    assert CATALOGUE.read_text() == catalogue(), __doc__


if __name__ == "__main__":
    print(catalogue(), end="")
