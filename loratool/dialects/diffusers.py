"""diffusers: ``pytorch_lora_weights.safetensors`` of a pipeline, in every spelling it ever had."""

from __future__ import annotations

from loratool.dialects.base import Dialect
from loratool.dialects.diffusers_header import read, write
from loratool.dialects.dotted import HASHES, TABLE, detector
from loratool.dialects.fields import Header
from loratool.frozen import replace

ROW = Dialect(
    "diffusers", "diffusers", detector("diffusers"),
    replace(TABLE, has_alphas=False, stale=HASHES, header=Header(read, write), lone="lora_A",
            only=("lowrank", "dora", "vector"), naming="diffusers"),
    library="diffusers", weights=("pytorch_lora_weights.safetensors",),
)  # fmt: skip
