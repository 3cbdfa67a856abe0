"""Programs that run language models, in the order in which reports name them."""

from __future__ import annotations

from loratool.dialects.programs.llama_cpp import LLAMA_CPP
from loratool.dialects.programs.mlx import MLX
from loratool.dialects.programs.peft import PEFT
from loratool.dialects.programs.sglang import SGLANG
from loratool.dialects.programs.vllm import VLLM

PROGRAMS = (PEFT, VLLM, SGLANG, LLAMA_CPP, MLX)
