"""OneTrainer's dotted names: ``transformer.<module>.lora_down.weight`` with alpha.

Fused projections are trained apart: ``double_blocks.0.img_attn.qkv.2`` is v.  Its flat names are
kohya's.
"""

from __future__ import annotations

from loratool.dialects.base import Dialect
from loratool.dialects.dotted import FIELDS_DOWN, RENAMES, TABLE, detector
from loratool.frozen import replace

_FLAT_START = (
    (r"^lora_transformer_(?=[^.]+\.\d)", "transformer."),
    (r"^lora_te1?_(?=[^.]+\.)", "text_encoder."),
    (r"^lora_te([23])_(?=[^.]+\.)", r"text_encoder_\1."),
)
ROW = Dialect(
    "onetrainer", "OneTrainer", detector("onetrainer"),
    replace(TABLE, fields=FIELDS_DOWN, renames=(*RENAMES, *_FLAT_START),
            naming="original"),
)  # fmt: skip
