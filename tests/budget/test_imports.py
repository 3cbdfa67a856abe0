"""Looking at things costs no torch: --help, --version and header-only inspect."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "transformers", "peft", "huggingface_hub", "safetensors.torch")
SCRIPT = """
import sys
from loratool.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("\\nLOADED", *[m for m in {heavy!r} if m in sys.modules], file=sys.stderr)
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
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(heavy=HEAVY), *words],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        best = min(best, time.perf_counter() - start)
    assert done.stdout.strip(), done.stderr
    assert done.stderr.strip().splitlines()[-1].strip() == "LOADED"
    print(f"{' '.join(command)}: {best:.3f} s")
