"""One function per command; the command line does nothing that these do not.

Every function returns the report that ``--json`` prints.
"""

from loratool.api.combine import combine
from loratool.api.compare import compare
from loratool.api.compress import compress
from loratool.api.convert import convert
from loratool.api.demo import demo
from loratool.api.extract import extract
from loratool.api.inspect import inspect, open
from loratool.api.merge import merge
from loratool.api.pull import pull
from loratool.api.push import push
from loratool.api.rescale import rescale
from loratool.api.run import run
from loratool.api.subtract import subtract, swap
from loratool.api.verify import verify

__all__ = [
    "combine",
    "compare",
    "compress",
    "convert",
    "demo",
    "extract",
    "inspect",
    "merge",
    "open",
    "pull",
    "push",
    "rescale",
    "run",
    "subtract",
    "swap",
    "verify",
]
