"""ComfyUI's generic names: ``diffusion_model.<module as in the original code>``, dotted.

Any program that keeps the names of the checkpoint writes these: ai-toolkit, musubi's ``--target
other``, diffusion-pipe, LightX2V, DiffSynth.  New files have the names of ComfyUI's own model where
that calls a module otherwise than the original's.
"""

from __future__ import annotations

from loratool.dialects.base import Dialect, by_keys
from loratool.dialects.diffusers_header import read_alpha, without
from loratool.dialects.dotted import FIELDS_DOWN, TABLE, detector
from loratool.dialects.fields import Component, Header
from loratool.frozen import replace

_CLIP_L, _CLIP_G = "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."
_T5 = "text_encoders.t5xxl.transformer."
TABLE_OF_IT = replace(
    TABLE,
    components=(
        Component("diffusion_model.", "diffusion_model", ("unet", "transformer", "prior_unet")),
        # ai-toolkit has both experts of Wan 2.2 in one file: high noise, low noise.
        Component("diffusion_model.transformer_1.", "transformer_1"),
        Component("diffusion_model.transformer_2.", "transformer_2"),
        Component("model.diffusion_model.", "diffusion_model"),
        Component("transformer.diffusion_model.", "diffusion_model"),
        Component(_CLIP_L, _CLIP_L[:-1], ("te", "te1", "text_encoder")),
        Component(_CLIP_G, _CLIP_G[:-1], ("te2", "text_encoder_2")),
        Component(_T5, _T5[:-1], ("te3", "text_encoder_3")),
        Component("text_encoders.", "text_encoders"),
        Component("", ""),
    ),
    fields=FIELDS_DOWN,
    header=Header(read_alpha, without),
    grows="reshape_weight",
    lone="lora_A",
    naming="comfyui",
    bare=True,
)  # fmt: skip

ROW = Dialect(
    "comfyui", "ComfyUI (original names)", detector("comfyui"), TABLE_OF_IT,
    holds_whole=True, )  # fmt: skip
LONGCAT = Dialect(
    "longcat-video", "LongCat-Video", by_keys(r"^lora___lorahyphen___"),
    read="loratool.dialects.comfyui.longcat:read", written_as=ROW.name,
)  # fmt: skip
