"""The kinds of change that depend on W: rows only (see `kinds` for places in it).

Rotations, gates and what goes through W: none can be added to another without the base.  The size
of W is in few of their files: they are open until they are bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from loratool.frozen import replace
from loratool.kind import Kind
from loratool.kind_shapes import Sizes

if TYPE_CHECKING:
    from loratool.adapter import DeltaSpec

AXIS = "axis"
"""Setting: 1 where the numbers of a gate are for columns, 0 for rows."""
TERMS, BOUND, ORTHOGONAL = "terms", "bound", "orthogonal"
GROUP, COPIES, SEED = "group", "copies", "seed"
"""Settings: terms of a sum in the place of an inverse, length of its blocks at most; vectors are
made orthogonal first; rows in a group, numbers for each pair of them; of places that are drawn."""
_OUT, _IN = "out", "in"


def _settled(spec: DeltaSpec, out: int, inner: int, fits: bool) -> DeltaSpec | None:
    """The change on a weight of this size, kernels flattened into ``inner``."""
    if not fits:
        return None
    return replace(spec, settings={**spec.settings, _OUT: out, _IN: inner})


def _is_open(spec: DeltaSpec) -> bool:
    return _IN not in spec.settings


def _size(spec: DeltaSpec, out: int, inner: int) -> Sizes:
    """As it was settled, before that what the file tells."""
    return int(spec.settings.get(_OUT, out)), (int(spec.settings.get(_IN, inner)),)


def shape_in(spec: DeltaSpec, role: str) -> tuple[int, ...]:
    """Shape of a tensor of a change."""
    return spec.fields[role].shape


def open_kind(
    name: str, build: str, role: str, title: str, known: Callable[[DeltaSpec], tuple[int, int]],
    holds: Callable[[DeltaSpec, int, int], bool],
    fits: Callable[[DeltaSpec], bool] = lambda spec: True, *, more: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> Kind:  # fmt: skip
    """A kind whose tensors do not tell the whole size of W.

    Args:
        name: of the kind.
        build: ``module:function`` in `loratool.delta`.
        role: of its first tensor.
        title: words for reports.
        known: (out, in·k…) as far as the tensors tell, 1 where they do not.
        holds: whether it fits a weight of (out, in·k…).
        fits: whether its tensors fit each other.
        more: further roles.
        optional: roles that may be there.
    """

    def fits_itself(spec: DeltaSpec) -> bool:
        if _is_open(spec):
            return fits(spec)
        return fits(spec) and holds(spec, int(spec.settings[_OUT]), int(spec.settings[_IN]))

    return Kind(
        name, f"loratool.delta.{build}", (role, *more), optional, False, title,
        lambda spec: _size(spec, *known(spec)), role, fits=fits_itself, is_sum=lambda spec: False,
        rank_axis=None, is_open=_is_open,
        settle=lambda spec, out, inner: _settled(spec, out, inner, holds(spec, out, inner)),
    )  # fmt: skip


# ------------------------------------------------------------------------------------ gates


def _is_line(spec: DeltaSpec, role: str) -> bool:
    """One axis of a tensor is longer than 1 at most."""
    shape = shape_in(spec, role)
    return 1 <= len(shape) <= 5 and max(shape) == math.prod(shape)


def _gate(name: str, role: str, *more: str) -> Kind:
    def known(spec: DeltaSpec) -> tuple[int, int]:
        count = spec.fields[role].numel
        return (1, count) if spec.settings.get(AXIS) else (count, 1)

    def holds(spec: DeltaSpec, out: int, inner: int) -> bool:
        count = spec.fields[role].numel
        return inner % count == 0 if spec.settings.get(AXIS) else out == count

    def fits(spec: DeltaSpec) -> bool:
        return _is_line(spec, role) and all(spec.fields[one].numel == 1 for one in more)

    return open_kind(name, "gate:build", role, "IA³", known, holds, fits, more=more)


def _of_hira(spec: DeltaSpec) -> Sizes:
    return shape_in(spec, "hira_B")[0], shape_in(spec, "hira_A")[1:]


def _fits_hira(spec: DeltaSpec) -> bool:
    left, right = shape_in(spec, "hira_B"), shape_in(spec, "hira_A")
    return len(left) == len(right) and left[1] == right[0] and math.prod(left[2:]) == 1


# -------------------------------------------------------------------------------- rotations


def _blocks_of(spec: DeltaSpec) -> tuple[int, ...]:
    """(stages, blocks, b, b) of LyCORIS' OFT and BOFT."""
    shape = shape_in(spec, "oft_blocks")
    return shape if len(shape) == 4 else (1, *shape)


def _height(spec: DeltaSpec) -> int:
    _, count, b, _ = _blocks_of(spec)
    return count * b


def _fits_blocks(spec: DeltaSpec) -> bool:
    shape = shape_in(spec, "oft_blocks")
    if len(shape) not in (3, 4) or shape[-1] != shape[-2]:
        return False
    stages, count, b, _ = _blocks_of(spec)
    # the last stage takes pairs together that lie 2^(stages-1)·b/2 rows apart
    is_even = len(shape) == 3 or (b % 2 == 0 and count * b % (2 ** (stages - 1) * b) == 0)
    gains = spec.fields.get("oft_rescale")
    return is_even and (gains is None or gains.numel == _height(spec))


def _together(spec: DeltaSpec) -> int:
    """Rows of W that OFT turns together; all of them where there are several stages."""
    stages, _, b, _ = _blocks_of(spec)
    return b if stages == 1 else 0


def _side(spec: DeltaSpec) -> int:
    """B of the b(b-1)/2 numbers of a skew block, 0 if it is no such number."""
    shape = shape_in(spec, "oft_R")
    b = (1 + math.isqrt(1 + 8 * shape[1])) // 2 if len(shape) == 2 else 0
    return b if b and b * (b - 1) // 2 == shape[1] else 0


def _holds_columns(spec: DeltaSpec, out: int, inner: int) -> bool:
    count, b = shape_in(spec, "oft_R")[0], _side(spec)
    return inner % b == 0 and count in (1, inner // b)


def _of_boft(spec: DeltaSpec) -> Sizes:
    _, count, b, _ = shape_in(spec, "boft_R")
    return spec.fields["boft_s"].numel, (count * b,)


def _fits_boft(spec: DeltaSpec) -> bool:
    shape = shape_in(spec, "boft_R")
    if len(shape) != 4 or shape[2] != shape[3] or not _is_line(spec, "boft_s"):
        return False
    stages, count, b, _ = shape
    return stages == 1 or (b % 2 == 0 and count % 2 ** min(stages - 1, 62) == 0)


def _pairs_height(spec: DeltaSpec) -> int:
    """Rows of W: two for each pair, whose numbers are there once, twice or four times."""
    return 2 * spec.fields[spec.row.roles[0]].numel // int(spec.settings[COPIES])


def _fits_pairs(spec: DeltaSpec) -> bool:
    theta, alpha = (shape_in(spec, role) for role in spec.row.roles)
    group, copies = int(spec.settings[GROUP]), int(spec.settings[COPIES])
    is_whole = len(theta) == 1 and theta == alpha and not 2 * theta[0] % copies
    return is_whole and not _pairs_height(spec) % group


# -------------------------------------------------------------------- through W, and tiles


def _of_glora(spec: DeltaSpec) -> Sizes:
    inner = shape_in(spec, "glora_b2")[1:]
    return shape_in(spec, "glora_b1")[0], inner


def _fits_glora(spec: DeltaSpec) -> bool:
    a1, a2, b1, b2 = (shape_in(spec, f"glora_{n}") for n in ("a1", "a2", "b1", "b2"))
    if min(map(len, (a1, a2, b1, b2))) < 2 or any(n != 1 for s in (a1, a2, b1) for n in s[2:]):
        return False
    return a1[1] == a2[0] == b1[1] == b2[0] and a1[0] == a2[1] == b2[1]


def _fits_tiles(spec: DeltaSpec) -> bool:
    shape = shape_in(spec, "miss_bat")
    return len(shape) == 3 and shape[1] == shape[2]


def _tiles_height(spec: DeltaSpec) -> int:
    shape = shape_in(spec, "miss_bat")
    return shape[0] * shape[1]


_ROTATION = open_kind(
    "rotation", "rotation:build", "oft_blocks", "OFT", lambda s: (_height(s), 1),
    lambda s, out, inner: out == _height(s), _fits_blocks, optional=("oft_rescale",),
)  # fmt: skip
_ROAD = open_kind(
    "road", "rotation:build_pairs", "road_theta", "RoAd", lambda s: (_pairs_height(s), 1),
    lambda s, out, inner: out == _pairs_height(s), _fits_pairs, more=("road_alpha",),
)  # fmt: skip
_IA3 = _gate("ia3", "ia3_l")

ROWS: tuple[Kind, ...] = (
    replace(_gate("ia3_gate", "ia3_gate", "on_input"), flags={"on_input": AXIS}),
    replace(_ROTATION, reach="rows", together=_together, is_proportional=False, alpha_scales=False),
    Kind(
        "glora", "loratool.delta.through:build_glora",
        ("glora_a1", "glora_a2", "glora_b1", "glora_b2"), (), False, "GLoRA", _of_glora,
        "glora_b1", fits=_fits_glora, reach="rows", is_sum=lambda spec: False,
        rank_axis=("glora_a2", 0), scales_whole=True,
        exchanged=(("glora_a1", "glora_a2"), ("glora_b1", "glora_b2")),
    ),
    _IA3,
    replace(
        _IA3, name="ia3_bias", roles=("ia3_bias",), scaled="ia3_bias", is_matrix=False,
        sizes=lambda s: (s.fields["ia3_bias"].numel, ()), fits=lambda s: _is_line(s, "ia3_bias"),
        is_open=lambda s: False, is_companion=True,
    ),
    Kind(
        "hira", "loratool.delta.gate:build", ("hira_A", "hira_B"), (), False, "HiRA", _of_hira,
        "hira_B", fits=_fits_hira, is_sum=lambda spec: False, rank_axis=("hira_A", 0),
    ),
    replace(
        open_kind("oft", "rotation:build_columns", "oft_R", "OFT",
              lambda s: (1, _side(s) * shape_in(s, "oft_R")[0]), _holds_columns,
              lambda s: _side(s) > 0), reach="rows",
    ),
    Kind(
        "boft", "loratool.delta.rotation:build_columns", ("boft_R", "boft_s"), (), False, "BOFT",
        _of_boft, "boft_R", fits=_fits_boft, reach="rows", is_sum=lambda spec: False,
        rank_axis=None,
    ),
    replace(
        open_kind("hra", "through:build_reflections", "hra_u", "HRA",
              lambda s: (1, shape_in(s, "hra_u")[0]),
              lambda s, out, inner: inner == shape_in(s, "hra_u")[0],
              lambda s: shape_in(s, "hra_u")[1:] == (s.rank,)),
        reach="rows", rank_axis=("hra_u", 1),
    ),
    replace(
        open_kind("tiles", "tiles:build", "miss_bat", "MiSS (bat)",
              lambda s: (_tiles_height(s), 1),
              lambda s, out, inner: out == _tiles_height(s)
              and not inner % shape_in(s, "miss_bat")[1],
              _fits_tiles), reach="rows", rank_axis=("miss_bat", 1),
        together=lambda s: shape_in(s, "miss_bat")[1],
    ),
    replace(_ROAD, reach="rows", together=lambda s: int(s.settings[GROUP])),
    replace(
        _ROAD, name="road_bias", roles=("road_bias", "road_bias_alpha"), scaled="road_bias",
        reach="rows", is_matrix=False, sizes=lambda s: (_pairs_height(s), ()), fits=_fits_pairs,
        is_open=lambda s: False, is_companion=True,
    ),
)  # fmt: skip
