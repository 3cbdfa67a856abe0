"""``--rank``, ``--energy``, ``--size`` and their kin as rules that make sense, module by module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loratool.bind.user_names import part_regex
from loratool.errors import MismatchError, UsageError, list_some
from loratool.frozen import Frozen, field
from loratool.options.shaping import Compress, Extract
from loratool.patterns import Pattern, find, typed_pattern

MAX_RANK = 8192

SIZE_CAP = 256
"""Largest rank of an extraction under ``--size`` unless ``--max-rank`` says otherwise: all modules'
factors are held at this rank until the budget is spent."""

KERNELS = "conv"
"""What ``--only`` calls modules with a kernel of more than one place."""

_SHARES = {  # name -> code, the least allowed and whether 0 is, whether 1 is
    "energy": ("LT-232", "--energy is a share", "above 0, at most 1", False, True),
    "sv_sum": ("LT-232", "--sv-sum is a share", "above 0, at most 1", False, True),
    "error": ("LT-233", "--error is a share", "0 or more, below 1", True, False),
}


class Ranks(Frozen):
    """How far modules are cut.

    Attributes:
        rule: fields of a `loratool.linalg.rank.RankRule`.
        auto: the noise rank joins it.
        only: (modules, rank), the last one counts; None = those with kernels.
    """

    rule: Mapping[str, Any] = field(default_factory=dict)
    auto: bool = False
    only: tuple[tuple[Pattern | None, int], ...] = ()

    def of(self, names: Sequence[str], kernels: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """The rule of every module.

        Args:
            names: of their parameters.
            kernels: of each, () for a matrix.

        Raises:
            MismatchError: LT-467, ``--only`` finds none.
        """
        rest = {k: v for k, v in self.rule.items() if k not in ("rank", "max_rank")}
        rules = [dict(self.rule) for _ in names]
        large = frozenset(n for n, k in zip(names, kernels, strict=True) if math.prod(k) > 1)
        for pattern, rank in self.only:
            inside = large if pattern is None else find([pattern], names)[0]
            if not inside:
                raise MismatchError(
                    "LT-467", "--only matches no module", got=list_some(names, 3),
                    key=KERNELS if pattern is None else pattern.text,
                )  # fmt: skip
            rules = [{**rest, "rank": rank} if name in inside else rule
                     for name, rule in zip(names, rules, strict=True)]  # fmt: skip
        return rules


def ranks_of(asked: Compress | Extract, size: int | None) -> Ranks:
    """The criteria that were given.

    Args:
        asked: options; those of an extraction without any criterion mean ``auto``.
        size: bytes of the weights file at most.

    Raises:
        UsageError: a number out of its range, or no criterion for a compression.
    """
    is_extract = isinstance(asked, Extract)
    rank = _checked_rank(asked)
    given = {"rank": rank, **{k: getattr(asked, k, None) for k in _RULED}}
    rule = {k: v for k, v in given.items() if v is not None}
    _check(rule)
    if "sv_base" in rule and asked.base is None:
        raise UsageError("LT-230", "--sv-base needs the base", got="no --base",
                         hint="--base BASE; an adapter alone has --sv-ratio")  # fmt: skip
    only = parse_ranks(asked.only)
    auto = asked.rank == "auto"
    if is_extract:
        auto = auto or (not {*rule} - {"max_rank"} and size is None)
        rule |= {"max_rank": SIZE_CAP} if size is not None and not asked.max_rank else {}
    elif not rule and size is None and not auto and not only:
        raise UsageError(
            "LT-246", "nothing says how far to compress",
            expected="--rank, --energy, --error, --size, --max-rank, --sv-ratio and its kin",
            hint="--energy 0.99",
        )  # fmt: skip
    return Ranks(rule, auto, only)


_RULED = ("energy", "error", "sv_ratio", "sv_sum", "sv_min", "sv_base", "max_rank")


def parse_ranks(items: Sequence[str]) -> tuple[tuple[Pattern | None, int], ...]:
    """``conv=4`` and the like as typed.

    Raises:
        UsageError: LT-295 no rank, LT-220 no regular expression.
    """
    found = []
    for item in items:
        part, _, number = item.rpartition("=")
        if not part or not number.isascii() or not number.isdigit() or len(number) > 4:
            raise UsageError("LT-295", "--only takes modules and a rank", got=item[:200],
                             expected="PART=R or REGEX=R, such as conv=4")  # fmt: skip
        _check({"rank": int(number)})
        pattern = None if part == KERNELS else typed_pattern(part_regex(part), "--only")
        found.append((pattern, int(number)))
    return tuple(found)


def _checked_rank(asked: Compress | Extract) -> int | None:
    """``--rank`` as a number; None where it is ``auto`` or not given."""
    rank = asked.rank
    if isinstance(rank, float):
        raise UsageError(
            "LT-228", "--rank is a whole number", got=rank, hint=f"--energy {rank} or --rank 8"
        )
    if isinstance(rank, str) and rank != "auto":
        raise UsageError("LT-230", "--rank is a whole number or auto", got=rank)
    if rank == "auto" and asked.base is None:
        raise UsageError(
            "LT-230", "--rank auto needs the base", got="no --base",
            hint="--rank auto --base BASE; an adapter alone has --energy 0.99",
        )  # fmt: skip
    return None if isinstance(rank, str) else rank


def _check(rule: Mapping[str, Any]) -> None:
    """Refuse numbers that no rule can have."""
    for code, name in (("LT-229", "rank"), ("LT-231", "max_rank")):
        value = rule.get(name, 1)
        if not 1 <= value <= MAX_RANK:
            raise UsageError(code, f"--{name.replace('_', '-')} out of range",
                             expected=f"1 to {MAX_RANK}", got=value)  # fmt: skip
    for name, (code, what, expected, has_zero, has_one) in _SHARES.items():
        value = rule.get(name, 0.5)
        inside = 0 < value < 1 or (value == 0 and has_zero) or (value == 1 and has_one)
        if not inside:
            raise UsageError(code, what, expected=expected, got=value)
    if not 1 <= (ratio := rule.get("sv_ratio", 1)) < math.inf:
        raise UsageError("LT-245", "--sv-ratio out of range", expected="1 or more", got=ratio)
    for name in ("sv_min", "sv_base"):
        if not 0 <= (least := rule.get(name, 0)) < math.inf:
            raise UsageError("LT-245", f"--{name.replace('_', '-')} out of range",
                             expected="0 or more", got=least)  # fmt: skip
