"""Options of `run`."""

from collections.abc import Callable
from typing import Annotated, Any

from loratool.options.groups import Network, Place, Watch
from loratool.options.words import KW_ONLY, Words


class Recipe(Watch, Network, kw_only=False):
    """Steps of a file."""

    recipe: Annotated[Place, Words("YAML file, ``steps:`` with a list of commands.")]
    _: KW_ONLY
    dry_run: Annotated[bool, Words(
        "Check the whole file and plan its steps; write nothing.", "Output",
    )] = False  # fmt: skip
    on_step: Annotated[Callable[[Any, Any], None] | None, Words(
        "called with (step, None) before and with (step, report) after each one.",
    )] = None  # fmt: skip
