"""Programs that run image and video models, in the order in which reports name them."""

from __future__ import annotations

from loratool.dialects.programs.comfyui import COMFYUI
from loratool.dialects.programs.diffusers import DIFFUSERS
from loratool.dialects.programs.forge import FORGE
from loratool.dialects.programs.nunchaku import NUNCHAKU
from loratool.dialects.programs.sd_scripts import SD_SCRIPTS
from loratool.dialects.programs.webui import WEBUI

PROGRAMS = (COMFYUI, DIFFUSERS, FORGE, WEBUI, NUNCHAKU, SD_SCRIPTS)
