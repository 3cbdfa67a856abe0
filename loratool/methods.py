"""Ways to combine adapters: rows only.  The functions live in `loratool.linalg`.

A method is one pure function and one row here; the choices of ``--method``, the ``--param``
names, their ranges and the tests of the laws follow from the row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loratool.errors import UsageError
from loratool.frozen import Frozen, field

_LARGEST = 1e30  # of any number


class Param(Frozen):
    """A typed parameter of a method.

    Attributes:
        name: as ``--param`` takes it.
        default: decides the type: a float, a whole number, or a word.
        help: one clause.
        low: smallest value.
        high: largest value.
        is_open: ``low`` itself is not allowed.
        choices: the words allowed.
    """

    name: str
    default: float | int | str
    help: str
    low: float = -math.inf
    high: float = math.inf
    is_open: bool = False
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        if self.choices:
            return ", ".join(self.choices)
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        bounds = []
        if self.low > -math.inf:
            bounds.append(f"above {self.low:g}" if self.is_open else f"{self.low:g} or more")
        if self.high < math.inf:
            bounds.append(f"at most {self.high:g}")
        return " ".join([kind, ", ".join(bounds)]).strip()

    def parse(self, value: Any) -> float | int | str:
        """A value from text or from a caller.

        Raises:
            UsageError: LT-257.
        """
        made: float | int | str | None
        if self.choices:
            made = value if value in self.choices else None
        else:
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            below = number <= self.low if self.is_open else number < self.low
            wrong = isinstance(value, bool) or below or not number <= self.high
            if wrong or not abs(number) <= _LARGEST:
                made = None
            elif isinstance(self.default, int):
                made = int(number) if number.is_integer() else None
            else:
                made = number
        if made is None:
            raise UsageError(
                "LT-257", f"bad value of --param {self.name}", expected=self.allowed, got=value
            )
        return made


class Method(Frozen):
    """One way to combine adapters.

    Attributes:
        name: what ``--method`` takes.
        space: ``cat`` (factors side by side), ``dense`` (elements of ΔW), ``core`` (R×R
            coordinates of all ΔW in a common basis), ``joint`` (right factors over a common
            left basis) or ``factor`` (lora_A and lora_B apart, as PEFT does).
        function: ``module:function``.
        paper: reference.
        title: one clause for help and docs.
        params: typed parameters.
        laws: ``identity`` (one adapter at weight 1 comes back, with the parameters of
            ``identity_at``), ``scale`` (all weights times c gives c times the result), ``sign``
            (c = -1), ``order`` (the order of the adapters does not matter).
        identity_at: parameters under which ``identity`` holds.
        rounds_down: a share of n elements is the whole part of it, as in PEFT; else the nearest.
        gives_weights: cat methods: the function gives coefficients, by sizes and angles of the ΔW.
        is_between: these are shares of 1, so that weights are 0 or more.
        is_whole: factor methods: both factors are multiplied by the weight, not by its root.
        select: dense methods: which elements stay: ``all``, ``largest``, ``random``, ``ranked``,
            ``middle``, ``variance``.
    """

    name: str
    space: str
    function: str
    paper: str
    title: str
    params: tuple[Param, ...] = ()
    laws: tuple[str, ...] = ("identity", "scale", "sign", "order")
    identity_at: Mapping[str, Any] = field(default_factory=dict)
    select: str = "all"
    rounds_down: bool = False
    is_whole: bool = False
    gives_weights: bool = False
    is_between: bool = False

    @property
    def cuts_nothing(self) -> bool:
        """The result is a sum of all factors, side by side."""
        return self.space == "cat" and self.name != "svd"


def _share(name: str, default: float, text: str, *, is_open: bool = True) -> Param:
    return Param(name, default, text, 0.0, 1.0, is_open)


_KEPT = "share of elements kept"
_SEED = Param("seed", 0, "of the random choice", 0, 2**31 - 1)
_LAMBDA = Param("lambda", 1.0, "factor of the result")
_MAJORITY = Param("majority", "total", "of signs: by the size of the sum, or by their number",
                  choices=("total", "frequency"))  # fmt: skip
_DELLA = (
    _share("density", 0.6, _KEPT),
    Param("epsilon", 0.15, "half the spread of the probabilities within a row", 0.0, 0.5), _SEED,
)  # fmt: skip
_CRUMBS = (_share("density", 0.9, _KEPT),
           Param("gamma", 0.01, "share of the largest left out", 0.0, 1.0))  # fmt: skip
_WHOLE = {"density": 1.0}
_ALL = ("identity", "scale", "sign", "order")
_ELECT = "loratool.linalg.elect:"
_ANGLES = "loratool.linalg.directions:"
_CORE = "loratool.linalg.core:"
_PEFT = "PEFT 0.21.2 add_weighted_adapter"

DENSE_INNER = ("sum", "ties", "ties-peft", "ties-mergekit", "dare", "dare-ties", "magnitude")

METHODS: tuple[Method, ...] = (
    Method("cat", "cat", "loratool.linalg.concat:concat_factors", "arXiv:2410.13025",
           "exact sum, factors side by side: ranks add"),
    Method("svd", "cat", "loratool.linalg.product:product_svd", "Eckart & Young 1936",
           "exact sum, then its best approximation of --rank"),
    Method("slerp", "cat", _ANGLES + "slerp", "Shoemake 1985",
           "two adapters on the arc between them, module by module",
           laws=("identity", "order"), gives_weights=True, is_between=True),
    Method("karcher", "cat", _ANGLES + "karcher", "mergekit karcher",
           "mean direction on the sphere at the mean size: slerp of any number",
           laws=("identity", "order"), gives_weights=True, is_between=True),
    Method("model-stock", "cat", _ANGLES + "model_stock", "arXiv:2403.19522",
           "their mean, the shorter the less they agree", gives_weights=True),
    Method("ties", "dense", _ELECT + "elect", "arXiv:2306.01708",
           "trim, elect signs, mean of those that agree",
           (_share("density", 0.2, _KEPT), _LAMBDA), _ALL, _WHOLE, "largest"),
    Method("ties-peft", "dense", _ELECT + "elect_peft", "PEFT 0.21.2 ties_svd",
           "TIES as PEFT has it: signs elected before the weights, sign of 0 is +",
           (_share("density", 0.2, _KEPT), _MAJORITY), _ALL, _WHOLE, "largest", rounds_down=True),
    Method("ties-mergekit", "dense", _ELECT + "elect_mergekit", "mergekit ties",
           "TIES as mergekit has it: divided by the weights that agree",
           (_share("density", 0.2, _KEPT), _LAMBDA), ("identity", "order"), _WHOLE, "largest"),
    Method("dare", "dense", _ELECT + "add", "arXiv:2311.03099",
           "drop elements at random, rescale, add",
           (_share("density", 0.5, _KEPT), _SEED), ("identity", "scale", "sign"), _WHOLE,
           "random"),
    Method("dare-ties", "dense", _ELECT + "elect", "arXiv:2311.03099",
           "drop at random and rescale, then elect signs",
           (_share("density", 0.5, _KEPT), _SEED, _LAMBDA), ("identity", "scale", "sign"), _WHOLE,
           "random"),
    Method("magnitude", "dense", _ELECT + "add", "PEFT 0.21.2 magnitude_prune_svd",
           "keep the largest elements of each, add",
           (_share("density", 0.5, _KEPT),), _ALL, _WHOLE, "largest"),
    Method("della", "dense", _ELECT + "elect", "arXiv:2406.11617",
           "drop at random, small elements of a row first; rescale, elect signs",
           (*_DELLA, _LAMBDA), ("identity", "scale", "sign"), {"density": 1.0, "epsilon": 0.0},
           "ranked"),
    Method("della-linear", "dense", _ELECT + "add", "arXiv:2406.11617",
           "drop at random, small elements of a row first; rescale, add",
           _DELLA, ("identity", "scale", "sign"), {"density": 1.0, "epsilon": 0.0}, "ranked"),
    Method("breadcrumbs", "dense", _ELECT + "add", "arXiv:2312.06795",
           "leave out the largest and the smallest elements, add",
           _CRUMBS, _ALL, {"density": 1.0, "gamma": 0.0}, "middle"),
    Method("breadcrumbs-ties", "dense", _ELECT + "elect", "arXiv:2312.06795",
           "leave out the largest and the smallest elements, then elect signs",
           (*_CRUMBS, _LAMBDA), _ALL, {"density": 1.0, "gamma": 0.0}, "middle"),
    Method("sce", "dense", _ELECT + "elect_sce", "arXiv:2408.07990",
           "elements that differ most between the adapters, weighted by size, minority erased",
           (_share("density", 1.0, "share of elements of largest variance kept"),),
           ("identity", "scale", "order"), _WHOLE, "variance"),
    Method("core", "core", _CORE + "inner", "arXiv:2509.17786",
           "another method on R×R coordinates in a common basis (not the same as on ΔW)",
           (Param("inner", "ties", "what is done there", choices=DENSE_INNER),
            _share("density", 0.2, _KEPT), _SEED, _LAMBDA), _ALL, _WHOLE),
    Method("knots-ties", "joint", _CORE + "knots", "arXiv:2410.19735",
           "TIES on the right factors over a common left basis",
           (_share("density", 0.2, _KEPT), _LAMBDA), _ALL, _WHOLE),
    Method("tsv", "core", _CORE + "tsv", "arXiv:2412.00081",
           "leading components of each, made orthogonal to each other",
           (Param("alpha", 1.0, "factor of the result"),)),
    Method("iso-c", "core", _CORE + "iso_c", "arXiv:2502.04959",
           "the sum with all singular values made equal",
           (Param("scaling", 1.0, "factor of the result"),), ("scale", "sign", "order")),
    Method("iso-cts", "core", _CORE + "iso_cts", "arXiv:2502.04959",
           "common and task-specific directions with equal singular values",
           (_share("common", 0.8, "share of directions that are common"),
            Param("scaling", 1.0, "factor of the result")), ("scale", "sign", "order")),
    Method("factors-linear", "factor", _ELECT + "add", f"{_PEFT}(linear)",
           "lora_A and lora_B summed apart: NOT the sum of the adapters"),
    Method("factors-sum", "factor", _ELECT + "add", "sd-scripts merge_lora.py, musubi-tuner EMA",
           "lora_A and lora_B summed apart with whole weights: averages of one run's checkpoints",
           laws=("identity", "sign", "order"), is_whole=True),
    Method("factors-ties", "factor", _ELECT + "elect_peft", f"{_PEFT}(ties)",
           "PEFT's TIES on lora_A and lora_B apart",
           (_share("density", 0.2, _KEPT), _MAJORITY), _ALL, _WHOLE, "largest"),
    Method("factors-dare-linear", "factor", _ELECT + "add", f"{_PEFT}(dare_linear)",
           "PEFT's DARE on lora_A and lora_B apart",
           (_share("density", 0.5, _KEPT), _SEED), ("identity", "scale", "sign"), _WHOLE, "random"),
    Method("factors-dare-ties", "factor", _ELECT + "elect_peft", f"{_PEFT}(dare_ties)",
           "PEFT's DARE and TIES on lora_A and lora_B apart",
           (_share("density", 0.5, _KEPT), _SEED, _MAJORITY), ("identity", "scale", "sign"), _WHOLE,
           "random"),
    Method("factors-magnitude-prune", "factor", _ELECT + "add", f"{_PEFT}(magnitude_prune)",
           "PEFT's magnitude pruning on lora_A and lora_B apart",
           (_share("density", 0.5, _KEPT),), _ALL, _WHOLE, "largest"),
)  # fmt: skip

BY_NAME: dict[str, Method] = {m.name: m for m in METHODS}


def find_method(name: str) -> Method:
    """The row of a method.

    Raises:
        UsageError: LT-255, there is none of this name.
    """
    if name not in BY_NAME:
        raise UsageError("LT-255", "unknown --method", expected=", ".join(BY_NAME), got=name)
    return BY_NAME[name]


def parse_params(method: Method, asked: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Every parameter of a method, defaults filled in.

    Args:
        method: whose.
        asked: name -> value, or ``name=value`` words.

    Raises:
        UsageError: LT-256 no such parameter, LT-257 a bad value, LT-258 no ``name=value``.
    """
    given = asked if isinstance(asked, Mapping) else split_params(asked or ())
    known = {p.name: p for p in method.params}
    for name in given:
        if name not in known:
            raise UsageError(
                "LT-256", f"{method.name} has no parameter of this name", got=name,
                expected=", ".join(known) or "none",
            )  # fmt: skip
    values: dict[str, Any] = {
        n: p.parse(given[n]) if n in given else p.default for n, p in known.items()
    }
    if "epsilon" in values:
        low, high = (values["density"] - values["epsilon"], values["density"] + values["epsilon"])
        if low <= 0 or high > 1:
            raise UsageError("LT-257", "bad value of --param epsilon",
                             expected="density - epsilon above 0, density + epsilon at most 1",
                             got=f"{low:g} to {high:g}")  # fmt: skip
    return values


def split_params(texts: Sequence[str]) -> dict[str, str]:
    """``name=value`` words as a mapping.

    Raises:
        UsageError: LT-258, not of this form, or one name twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark or not name or name in found:
            raise UsageError(
                "LT-258", "bad --param", got=text,
                expected="name=value, each name once, such as density=0.2",
            )  # fmt: skip
        found[name] = value
    return found
