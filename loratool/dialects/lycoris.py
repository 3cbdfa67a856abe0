"""LyCORIS on its own: recognised, not read yet."""

from __future__ import annotations

from loratool.dialects.base import Dialect, by_keys

ROW = Dialect("lycoris", "LyCORIS", by_keys(r"^lycoris_"))
