"""How far files from strangers are trusted, and how the network may be used."""

from __future__ import annotations

from loratool.frozen import Frozen
from loratool.store.header import MAX_HEADER_BYTES


class FileRules(Frozen):
    """What the user allows beyond the defaults.

    Attributes:
        max_header: largest safetensors header accepted, in bytes.
        allow_pickle: pickles are converted in a process of their own (`loratool.store.unpickled`).
    """

    max_header: int = MAX_HEADER_BYTES
    allow_pickle: bool = False


class Reach(Frozen):
    """How the Hub and object stores may be used.

    Attributes:
        offline: make no connection; cached copies serve.
        yes: consent to a large download.
        in_place: fetch headers alone; tensors are read where they are when they are needed.
        whole: fetch all of a source, as nothing can be done with a part.
    """

    offline: bool = False
    yes: bool = False
    in_place: bool = False
    whole: bool = False
