"""What the steps of each op may say in their ``args``: names, types and defaults.

A step carries plain data, so that it can travel; its kernel sees it as one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratool.adapter import CodedRef, DeltaSpec, Source, TensorRef
from loratool.dtypes import result_dtype
from loratool.errors import BugError
from loratool.frozen import Frozen, field
from loratool.wire import fits

SPELLED = {"from": "how"}
"""Keys of ``args`` that cannot be names in Python -> their fields."""


class NoArgs(Frozen):
    """Of ops that need none."""


class SumArgs(Frozen):
    """How changes become a tensor.

    Attributes:
        rounding: ``nearest``, ``exact`` or ``stochastic``.
        seed: of stochastic rounding.
        method: how the changes of one tensor are combined; None = they are added.
        params: of the method.
        scale: factor of the sum.
        anchor: the input that changes refer to as W.
    """

    rounding: str = "nearest"
    seed: int | None = None
    method: str | None = None
    params: Mapping[str, float | int | str] | None = None
    scale: float = 1.0
    anchor: int = 0

    @property
    def is_fine_grained(self) -> bool:
        """Blocks take many small calls: exact and random rounding, methods."""
        return self.rounding != "nearest" or self.method is not None


class RequantizeArgs(SumArgs):
    """How sums are coded.

    Attributes:
        coded: the base's weight, whose format they take.
        view: (rows, cols) of the weight, where the step writes its factors.
    """

    coded: CodedRef | None = None
    view: tuple[int, int] = (0, 0)


class MakePatchArgs(SumArgs):
    """How a tensor is predicted, and what is kept of it.

    Attributes:
        how: ``sum`` (the inputs' exact sum), ``same`` (the bits of the first input) or
            ``nothing`` (zeros); spelled ``from``.
        source: the digest of the first input is wanted too.
        gate: refuse a prediction that a merge would refuse to write.
    """

    how: str = "nothing"
    source: bool = False
    gate: bool = False


class ApplyPatchArgs(SumArgs):
    """How a tensor is predicted and set right.

    Attributes:
        how: as in `MakePatchArgs`.
        patch: where the patch lies; None where the prediction misses nothing.
        wanted: digest of the tensor.
        source: digest of the first input, "" if it is not checked.
    """

    how: str = "nothing"
    patch: TensorRef | None = None
    wanted: str = ""
    source: str = ""


class DifferenceArgs(Frozen):
    """Which pairs are compared.

    Attributes:
        names: of the pairs, where there are several of one view; () = the output's.
    """

    names: tuple[str, ...] = ()


class SubtractAndFactorArgs(DifferenceArgs):
    """How differences are factored.

    Attributes:
        rule: fields of a `loratool.linalg.rank.RankRule`.
        auto: the noise rank joins it.
        exact: by the Gram matrix, never by Lanczos.
        slices: keep the error at every rank.
        transposed: factors of the transpose.
        experts: matrices in a module; 0 = it is one.
        kernel: of a convolution.
        gain: factor of lora_B, taken back by the scaling.
        slots: matrices that are factored together, even if there are fewer; 0 = as many as are.
    """

    rule: Mapping[str, Any] | None = None
    auto: bool = False
    exact: bool = False
    slices: bool = False
    transposed: bool = False
    experts: int = 0
    kernel: tuple[int, ...] = ()
    gain: float = 1.0
    slots: int = 0

    @property
    def is_joined(self) -> bool:
        """The pairs are parts of the experts of one parameter."""
        return bool(self.names and self.experts)


class SpectrumArgs(Frozen):
    """Of a measured spectrum; ``keep_going``: factors that are not finite give NaN."""

    keep_going: bool = False


class FactorArgs(Frozen):
    """How a delta is truncated and stored.

    Attributes:
        rule: fields of a `loratool.linalg.rank.RankRule`, if there is no ``rank``.
        cap: largest rank that the rule may give.
        rank: of the result.
        dtype: of the factors.
        gain: scaling that the stored factors will have.
        bias: the module's bias delta, which takes the new scaling.
        must_rewrite: the old factors may not stay.
        is_free: no other module must have the same rank.
    """

    rule: Mapping[str, Any] | None = None
    cap: int | None = None
    rank: int | None = None
    dtype: str = "F32"
    gain: float = 1.0
    bias: DeltaSpec | None = None
    must_rewrite: bool = False
    is_free: bool = True


class CombineArgs(Frozen):
    """How one module of several adapters is made one.

    Attributes:
        like: name, layout and packing of the result.
        method: a row of `loratool.methods`.
        dtype: storage type of the result.
        params: of the method.
        asked: rank that was asked for; None = the method's own.
        rank: of the result.
        gain: what the reader multiplies the scaling by.
        alpha: of a plain sum; None = its rank.
        scaling: of a bias delta, that of its module.
        stored_alpha: of a bias delta, as its module's is stored.
    """

    like: DeltaSpec
    method: str
    dtype: str
    params: Mapping[str, float | int | str] = field(default_factory=dict)
    asked: int | None = None
    rank: int = 0
    gain: float = 1.0
    alpha: int | None = None
    scaling: float = 1.0
    stored_alpha: float | None = None


class IntruderArgs(Frozen):
    """Of a search for intruders; ``weaken``: what their singular values are multiplied with."""

    weaken: float | None = None


class ScaleArgs(Frozen):
    """How a module's tensors are scaled.

    Attributes:
        factors: key of a tensor -> what its elements are multiplied with.
        dtype: storage type of all of them; None = each keeps its own.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    dtype: str | None = None

    def target(self, source: Source) -> str | None:
        """The type in which a tensor is stored anew; None if it stays as it is."""
        if source.name in self.factors:
            return self.dtype or result_dtype(source.dtype)
        return self.dtype if self.dtype != source.dtype else None


def typed(args: Mapping[str, Any], shape: type, op: str) -> Any:
    """A step's ``args`` as what its kernel takes.

    Raises:
        BugError: LT-003.
    """
    try:
        found = shape(**{SPELLED.get(k, k): _frozen(v) for k, v in args.items()})
    except TypeError as error:
        raise BugError("LT-003", "a step with arguments that its op does not take", key=op,
                       got=error) from error  # fmt: skip
    if args and not fits(found, shape):
        raise BugError("LT-003", "a step with arguments of other types than its op's", key=op,
                       got=found)  # fmt: skip
    return found


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
