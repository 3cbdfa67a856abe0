"""LyCORIS on its own, without kohya's scripts: ``lycoris_<module>``, the part is not named."""

from __future__ import annotations

from loratool.dialects import kohya
from loratool.dialects.base import Dialect, by_keys
from loratool.dialects.fields import Component
from loratool.frozen import replace

ROW = Dialect(
    "lycoris", "LyCORIS", by_keys(r"^lycoris_"),
    replace(kohya.TABLE, components=(Component("lycoris_", ""),)),
)  # fmt: skip
