"""Which report `merge` and `subtract` return, as type checkers are told by what is given.

They see one signature for each way to call them, made of the same options; at work there is one
function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal, ParamSpec, Protocol, TypeVar, overload

    from loratool.options.groups import Place
    from loratool.options.merging import Merge, Subtract
    from loratool.report.combine import CombineReport, DifferenceReport
    from loratool.report.merge import MergeReport, SubtractReport

    A = ParamSpec("A")
    B = ParamSpec("B")
    C = ParamSpec("C")
    R = TypeVar("R", covariant=True)
    S = TypeVar("S", covariant=True)

    class _IntoBase(Merge):
        base: Place
        into: Literal["base"] | None = None

    class _Together(Merge):
        base: None = None

    class _BesideBase(Merge):
        base: Place
        into: Literal["adapter"]

    class _OutOfWeights(Subtract):
        merged: Place

    class _OutOfAdapter(Subtract):
        merged: None = None

    class _Two(Protocol[A, B, C, R, S]):
        """A function that returns ``R`` of what ``A`` takes, ``S`` of what ``B`` and ``C`` take."""

        __name__: str

        @overload
        def __call__(self, *args: A.args, **kwargs: A.kwargs) -> R: ...
        @overload
        def __call__(self, *args: B.args, **kwargs: B.kwargs) -> S: ...
        @overload
        def __call__(self, *args: C.args, **kwargs: C.kwargs) -> S: ...

    def _of(
        first: Callable[A, Any], second: Callable[B, Any], third: Callable[C, Any],
        one: type[R], other: type[S],
    ) -> Callable[[Callable[..., R | S]], _Two[A, B, C, R, S]]: ...  # fmt: skip

    by_base = _of(_IntoBase, _Together, _BesideBase, MergeReport, CombineReport)
    by_weights = _of(_OutOfWeights, _OutOfAdapter, _OutOfAdapter, SubtractReport, DifferenceReport)
else:

    def by_base(function):
        """`merge`, as it is."""
        return function

    by_weights = by_base
