"""docs/programs.md has every rule.

``python -m tests.contract.test_programs_page > docs/programs.md`` makes it.
"""

from __future__ import annotations

from pathlib import Path

from loratool.dialects.programs import Program, Rule, programs

PAGE = Path(__file__).parents[2] / "docs" / "programs.md"


def page() -> str:
    lines = [
        "# Programs and their rules", "",
        "`loratool check ADAPTER --for PROGRAM` simulates a program's loader by these rules,",
        "module by module, from headers alone. A module *loads*, is *dropped* without an error, is",
        "*wrong* (it loads, and something else is computed) or *raises* (nothing of the file",
        "loads); what cannot be known without the base is *unsure*. Exit code 10 if it does not",
        "load right. `--fix -o OUT` writes the same change in a form that loads, where the rule",
        "is *mended*. Rules of older versions are told, and count for nothing. A program is one",
        "file in `loratool/dialects/programs/`.",
    ]  # fmt: skip
    for program in programs():
        lines += _program(program)
    return "\n".join(lines) + "\n"


def _program(program: Program) -> list[str]:
    head = f"## {program.title} (`--for {program.name}`), version {program.version}"
    columns = "| rule | verdict | what it says | mended | source |"
    lines = ["", head, "", columns, "|---|---|---|---|---|"]
    for rule in (*program.opens, *program.rules, *program.own):
        lines.append(_rule(rule, rule.source or program.source[0]))
    return lines


def _rule(rule: Rule, source: str) -> str:
    says = rule.says.replace("|", "/") + (f" (before {rule.until})" if rule.until else "")
    whole = ", all of the file" if rule.is_whole else ""
    mended = "yes" if rule.is_mended else ""
    return f"| {rule.name} | {rule.verdict}{whole} | {says} | {mended} | [source]({source}) |"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), __doc__


if __name__ == "__main__":
    print(page(), end="")
