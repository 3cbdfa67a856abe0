"""kohya: recognised, not read yet."""

from __future__ import annotations

from loratool.dialects.base import Dialect, by_keys

ROW = Dialect(
    "kohya", "kohya", by_keys(r"^lora_(unet|te\d?|prior_unet|prior_te|transformer)_"),
    library="diffusers",
)  # fmt: skip
