"""Many calls of torch as one, during which other threads have the interpreter."""

from __future__ import annotations

import inspect
import math  # noqa: F401  (torch looks names of functions up here)
from collections.abc import Callable, Sequence
from functools import cached_property, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class OneCall(Generic[P, R]):
    """A function of tensors that torch itself goes through, statement by statement.

    With many threads each call of torch is a wait for the interpreter's lock; this is one, however
    many are in it.  The numbers are the same: nothing is fused or reordered.  Where torch has no
    such thing any more, or the source is not at hand, the function runs as it is.

    Args:
        function: in what TorchScript knows of Python; its annotations say ``Tensor`` and
            ``list[int]``, and it names nothing but ``torch``, ``math`` and what it uses.
        uses: others of this kind that it calls.
    """

    def __init__(self, function: Callable[P, R], uses: Sequence[OneCall[..., Any]] = ()) -> None:
        self.function = function
        self.uses = uses
        update_wrapper(self, function)

    @cached_property
    def _compiled(self) -> Callable[P, R] | None:
        try:
            every: list[OneCall[..., Any]] = [*self.uses, self]
            sources = [inspect.getsource(one.function) for one in every]
            unit = torch.jit.CompilationUnit("\n".join(s[s.index("def ") :] for s in sources))
            made: Callable[P, R] = getattr(unit, self.function.__name__)
        except (AttributeError, OSError, RuntimeError):
            return None
        return made

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """What the function does."""
        if self._compiled is None:
            return self.function(*args, **kwargs)
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined] # of this thread
            return self._compiled(*args, **kwargs)
