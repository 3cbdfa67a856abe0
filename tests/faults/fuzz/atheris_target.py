"""Coverage-guided fuzzing of the header and configuration readers; optional, not part of CI.

pip install atheris==3.0.0     (wheels for Linux, Python 3.11 to 3.13)
mkdir -p corpus && python -m tests.faults.fuzz.atheris_target corpus -max_total_time=600
python -m tests.faults.fuzz.atheris_target --json corpus-json -max_total_time=600

A crash file that it leaves is reproduced with the same command and the file's name.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports():
    from loratool.dialects import open_adapter
    from loratool.dialects.peft.config import parse_config
    from loratool.options.groups import Read
    from loratool.store.header import read_header
    from loratool.store.jsonfile import load_json
from loratool.errors import LoratoolError

FOLDER = Path(tempfile.mkdtemp(prefix="loratool-fuzz-"))


def header(data: bytes) -> None:
    """The bytes are a safetensors file."""
    path = FOLDER / "x.safetensors"
    path.write_bytes(data)
    try:
        read_header(path)
        open_adapter(path, Read(alpha=1.0))
    except LoratoolError:
        pass


def config(data: bytes) -> None:
    """The bytes are an adapter_config.json."""
    path = FOLDER / "adapter_config.json"
    path.write_bytes(data)
    try:
        parse_config(load_json(path), path)
    except LoratoolError:
        pass


if __name__ == "__main__":
    is_json = "--json" in sys.argv
    words = [word for word in sys.argv if word != "--json"]
    atheris.Setup(words, config if is_json else header)
    atheris.Fuzz()
