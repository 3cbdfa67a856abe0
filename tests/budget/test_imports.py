"""Looking at things costs no torch: --help, --version and header-only inspect."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "transformers", "peft", "huggingface_hub", "safetensors.torch")
MOST, MOST_OF_HELP = 500, 200
"""Modules that a command loads; what a second is worth differs, what is loaded does not."""
SCRIPT = """
import sys
from loratool.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("\\nLOADED", len(sys.modules), *[m for m in {heavy!r} if m in sys.modules],
      file=sys.stderr)
"""


@pytest.mark.parametrize(
    "command", [["--help"], ["--version"], ["merge", "--help"], ["inspect", "ADAPTER"],
                ["inspect", "BASE"], ["inspect", "FOLDER", "--json"]],
    ids=" ".join,
)  # fmt: skip
def test_nothing_heavy_is_imported(command: list[str], data: Path) -> None:
    places = {
        "ADAPTER": data / "llm" / "lora_linear",
        "BASE": data / "llm" / "lora_linear" / "base",
        "FOLDER": data / "llm",
    }
    words = [str(places.get(w, w)) for w in command]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(heavy=HEAVY), *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    print(f"{' '.join(command)}: {time.perf_counter() - start:.3f} s, {done.stderr.split()[-1]}")
    assert done.stdout.strip(), done.stderr
    word, count, *heavy = done.stderr.strip().splitlines()[-1].split()
    assert word == "LOADED" and heavy == []
    assert int(count) <= (
        MOST_OF_HELP if command[-1][:2] == "--" and "--json" not in command else MOST
    ), "start-up got heavier"
