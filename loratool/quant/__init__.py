"""Codecs: weights that a checkpoint holds in codes, read as numbers and written in codes again.

A codec is one row of `CODECS` and one module that the row names.
"""

from loratool.quant.base import Codec, Found
from loratool.quant.find import CODECS, codec_of, find_codes, simulated

__all__ = ["CODECS", "Codec", "Found", "codec_of", "find_codes", "simulated"]
