"""Options of `push` and `pull`."""

from collections.abc import Sequence
from typing import Annotated

from loratool.options.groups import (
    Network,
    Place,
    Series,
)
from loratool.options.words import KW_ONLY, Options, Words


class Push(Options, kw_only=False):
    """A model to the Hub."""

    path: Annotated[Place, Words("adapter or checkpoint, a folder or a file.")]
    repo: Annotated[str, Words("``owner/name``; created if it does not exist.")]
    _: KW_ONLY
    private: Annotated[bool | None, Words(
        "Visibility of a repository that is created. Default: private.", "Output",
        flags="--private/--public",
    )] = None  # fmt: skip
    create_pr: Annotated[bool, Words(
        "Open a pull request instead of committing.", "Output",
    )] = False  # fmt: skip
    revision: Annotated[str | None, Words(
        "Branch, created if need be. Default: main.", "Output", metavar="BRANCH",
    )] = None  # fmt: skip
    message: Annotated[str | None, Words("Title of the commit.", "Output", metavar="TEXT")] = None
    skip: Annotated[Sequence[str], Words(
        "File or folder of PATH to leave out. Repeatable.", "Input", metavar="NAME",
    )] = ()  # fmt: skip
    dry_run: Annotated[bool, Words(
        "Validate and compare; create and send nothing.", "Output",
    )] = False  # fmt: skip
    force: Annotated[bool, Words(
        "Also into a repository that holds something else.", "Output",
    )] = False  # fmt: skip


class Pull(Network, kw_only=False):
    """An adapter of the Hub."""

    repo: Annotated[str, Words("``owner/name[@revision]`` or ``hf://owner/name[@rev][/sub]``.")]
    _: KW_ONLY
    output: Annotated[Place | None, Words(
        "Folder to create. Default: the shared cache.", "Output", flags="-o, --output",
        metavar="DIR",
    )] = None  # fmt: skip
    everything: Annotated[bool, Words(
        "Every file, not only the adapter's.", "Input", flags="--all",
    )] = False  # fmt: skip
    force: Annotated[bool, Words(
        "Replace an earlier output or an unchanged copy of the repository.", "Output",
    )] = False  # fmt: skip
    dry_run: Annotated[bool, Words("List the files; fetch nothing.", "Output")] = False
    series: Series = None


class Doctor(Options):
    """This installation."""

    offline: Annotated[bool, Words(
        "Do not ask the Hub whose token this is.", "General",
    )] = False  # fmt: skip
