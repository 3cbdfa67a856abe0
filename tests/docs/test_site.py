"""The documentation: everything that is live is on a page, and everything on a page is live.

`make docs` runs every command line of every page, draws the figures and builds the site; here a few
pages are run, and all of them are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path, PurePosixPath

import click
import pytest

import loratool as lt
from docs.make import commands, pages, runs, tables
from docs.make.__main__ import REMOTE
from loratool.archs.family_files import families
from loratool.cli.group import COMMANDS
from loratool.dialects.programs import programs
from loratool.dialects.registry import DIALECTS
from loratool.kinds import KINDS
from loratool.methods import METHODS
from loratool.quant.find import CODECS

ROOT = Path(__file__).parents[2]
QUICK = ("index.md", "start.md", "common.md", "python.md")
# Pages of other programs' words beside ours: the first column is theirs.
COMING = "coming_from/"


@cache
def site() -> dict[str, str]:
    """Every page, nothing run."""
    return pages.every(run=False)


def options_of(name: str) -> set[str]:
    params = commands.command_of(name).params
    return {o for p in params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)}


def test_every_command_and_option_has_its_place() -> None:
    for name in COMMANDS:
        page = site()[f"commands/{name}.md"]
        shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", page.split("## Options")[1]))
        assert options_of(name) <= shown, name
        assert f"[{name}]({name}.md)" in site()["commands/index.md"]


@pytest.mark.parametrize("page, names", [
    ("dialects", [d.name for d in DIALECTS]), ("kinds", [k.name for k in KINDS]),
    ("methods", [m.name for m in METHODS]), ("codecs", list(CODECS)),
    ("programs", [p.name for p in programs()]), ("families", list(families())),
    ("exit-codes", [str(code) for code in tables.EXIT_CODES]),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_every_row_of_a_registry_is_in_its_table(page: str, names: list[str]) -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", site()[f"tables/{page}.md"], re.M)
    assert sorted(rows) == sorted(names)


def test_every_error_is_on_a_page_and_every_number_is_an_error() -> None:
    raised = set(tables.codes())  # tests/contract/test_errors.py: those that are raised
    assert len(raised) > 300
    for name, text in site().items():
        assert set(re.findall(r"LT-\d{3}", text)) <= raised, name
    assert 'id="lt-501"' in site()["errors.md"] and "errors.md#lt-" in site()["hub.md"]


def test_every_public_name_is_on_the_page_of_python() -> None:
    named = re.findall(r"^::: (\S+)$", pages.written()["python.md"], re.M)
    assert {f"loratool.{n}" for n in lt.__all__} - {"loratool.__version__"} <= set(named)
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


def test_every_exit_code_of_the_program_has_words() -> None:
    assert {int(code[3]) for code in tables.codes()} | {10} <= tables.EXIT_CODES.keys()


def lines() -> Iterator[tuple[str, runs.Line]]:
    more = {name: (ROOT / name).read_text() for name in (
        "README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/README.md")}  # fmt: skip
    for name, text in {**pages.written(), **more}.items():
        for line in runs.lines_of(text):
            yield name, line


def test_every_command_line_has_a_command_and_options_that_exist() -> None:
    found = list(lines())
    for _name, line in found:
        runs.check(line)
    assert len(found) > 150


def own_words(name: str, text: str) -> str:
    """A page without fences and without what it says of other programs."""
    text = runs.FENCE.sub("", text)
    return re.sub(r"^\| [^|]*(?:\\\|[^|]*)* \|", "|", text, flags=re.M) if COMING in name else text


def test_every_option_named_in_words_exists() -> None:
    known = {o for name in COMMANDS for o in options_of(name)} | {"--help", "--version", "--pages"}
    foreign = {"--no-deps", "--strict", "--sdxl", "--v2", "--min_diff", "--max-lora-rank",
               "--concat"}  # fmt: skip
    for name, text in pages.written().items():
        named = set(re.findall(r"`(--[a-z][\w-]*)", own_words(name, text)))
        assert named <= known | foreign, name


def slugs(text: str) -> set[str]:
    """Anchors of a page: as Markdown's toc makes them of headings, and those written out."""
    heads = re.findall(r"^#+ (.*)$", runs.FENCE.sub("", text), re.M)
    made = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in heads}
    return made | set(re.findall(r'id="([^"]+)"', text))


def test_every_internal_link_resolves() -> None:
    count = 0
    for name, text in site().items():
        for target in re.findall(r"\]\(([^)\s]+)\)", runs.FENCE.sub("", text)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            found = _normal(PurePosixPath(name).parent / path) if path else name
            assert found in site(), f"{name}: {target}"
            assert not anchor or anchor in slugs(site()[found]), f"{name}: {target}"
            count += 1
    assert count > 100


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def test_every_page_is_in_the_navigation() -> None:
    config = pages.configuration(sorted(site()))
    for name in site():
        assert name in config, name


def test_nothing_is_fetched_from_elsewhere() -> None:
    assert [name for name, text in site().items() if REMOTE.search(text)] == []
    assert "font: false" in (ROOT / "mkdocs.yml").read_text()


@pytest.fixture(scope="module")
def stage() -> Iterator[runs.Stage]:
    with runs.Stage() as one:
        yield one


ALL = [name for name, text in pages.written().items() if any(True for _ in runs.lines_of(text))]


@pytest.mark.parametrize("name", [
    n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ALL
])  # fmt: skip
def test_the_commands_of_a_page_run(name: str, stage: runs.Stage) -> None:
    page = runs.played(pages.written()[name], stage)
    assert page.count("$ loratool") >= pages.written()[name].count("$ loratool")


@pytest.mark.parametrize("name", [
    n if n == "merge" else pytest.param(n, marks=pytest.mark.slow) for n in COMMANDS
])  # fmt: skip
def test_the_examples_of_a_command_run(name: str, stage: runs.Stage) -> None:
    assert "$ loratool" in commands.page(name, stage)


@pytest.mark.slow
def test_the_figures_are_drawn(stage: runs.Stage) -> None:
    from docs.make import figures

    drawn = figures.drawn(stage)
    assert all("<svg" in figure and "aria-label" in figure for figure in drawn.values())
    wanted = {m[1] for text in pages.written().values() for m in pages.FIGURE.finditer(text)}
    assert wanted == drawn.keys()


def test_pages_change_nothing_at_home(stage: runs.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even those that show how to: their home is the stage's."""
    monkeypatch.setenv("HOME", "/nonexistent")
    with stage.fresh():
        said = runs.output_of(runs.parse("loratool completion bash --install"))
        assert (Path.home() / ".bashrc").is_file() and "~/.bashrc" in said
        runs.output_of(runs.parse("loratool completion bash --uninstall"))


def test_a_line_that_fails_is_red(stage: runs.Stage) -> None:
    for text in ("loratool merge style --bse model -o out", "loratool mrege style"):
        with pytest.raises(AssertionError):
            runs.check(runs.parse(text))
    with pytest.raises(AssertionError, match="exit code 3, not 0"):
        runs.played("```console\n$ loratool inspect nothing\n```\n", stage)
