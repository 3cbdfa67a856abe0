"""The options of every command, by its name."""

from loratool.options.hub import Doctor, Pull, Push
from loratool.options.looking import Check, Compare, Inspect
from loratool.options.merging import Merge, Split, Subtract, Swap, Verify
from loratool.options.recipes import Recipe
from loratool.options.shaping import Compress, Convert, Extract, Rescale
from loratool.options.words import Options

COMMANDS: dict[str, type[Options]] = {
    "inspect": Inspect,
    "merge": Merge,
    "extract": Extract,
    "subtract": Subtract,
    "compress": Compress,
    "swap": Swap,
    "rescale": Rescale,
    "convert": Convert,
    "split": Split,
    "compare": Compare,
    "run": Recipe,
    "verify": Verify,
    "check": Check,
    "pull": Pull,
    "push": Push,
    "doctor": Doctor,
}
"""Command -> its options; `combine` and `open` are words of Python alone."""
