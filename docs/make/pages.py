"""All pages of the site: those written by hand, with their commands run, and those made here."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from docs.make import commands, figures, runs, tables
from loratool.cli.group import COMMANDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FIGURE = re.compile(r"^<!-- figure: ([\w-]+) -->$", re.M)


def written() -> dict[str, str]:
    """Path below ``docs`` -> text of every page that somebody wrote."""
    return {p.relative_to(DOCS).as_posix(): p.read_text() for p in sorted(DOCS.rglob("*.md"))}


def every(*, run: bool = True) -> dict[str, str]:
    """Path -> text of every page of the site.

    Args:
        run: run the commands of the pages, draw the figures.
    """
    made = {name: "\n".join(lines()) + "\n" for name, lines in tables.PAGES.items()}
    made["commands/index.md"] = commands.index()
    if not run:
        made |= {f"commands/{name}.md": commands.page(name, None) for name in COMMANDS}
        return {name: finished(name, text) for name, text in (written() | made).items()}
    with runs.Stage() as stage:
        made |= {f"commands/{name}.md": commands.page(name, stage) for name in COMMANDS}
        made |= {name: runs.played(text, stage) for name, text in written().items()}
        drawn = figures.drawn(stage) if any(map(FIGURE.search, made.values())) else {}
    return {name: finished(name, FIGURE.sub(lambda m: drawn[m[1]], text))
            for name, text in made.items()}  # fmt: skip


def finished(name: str, text: str) -> str:
    """A page with links from the numbers of errors to their rows."""
    if name == "errors.md":
        return tables.anchored(text)
    up = "../" * name.count("/")
    parts = re.split(
        r"(^```.*?^```$|`[^`\n]+`|\[[^]]*\]\([^)]*\)|^#[^\n]*$)", text, flags=re.M | re.S
    )
    return "".join(tables.link_errors(p, up) if i % 2 == 0 else p for i, p in enumerate(parts))


def configuration(names: list[str]) -> str:
    """``mkdocs.yml`` with the pages of commands, and every page that its nav forgot at the end."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [{name: f"commands/{name}.md"} for name in COMMANDS]
    for section in config["nav"]:
        if section.get("Commands") == "commands":
            section["Commands"] = ["commands/index.md", *listed]
    known = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(config["nav"])))
    config["nav"][-1]["Project"] += [name for name in names if name not in known]
    return yaml.safe_dump({**config, "docs_dir": "docs", "site_dir": "site"}, sort_keys=False)
