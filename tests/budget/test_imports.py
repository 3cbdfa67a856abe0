"""What starting costs: commands that look at headers, or copy bytes, load nothing heavy.

What a second is worth differs, what is loaded does not; times are `benchmarks/startup.py`'s.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.coded import save_gguf

HEAVY = ("torch", "numpy", "transformers", "peft", "safetensors", "matplotlib", "huggingface_hub",
         "httpx", "requests", "yaml", "rich", "dataclasses")  # fmt: skip
FOR_OTHERS = ("loratool.engine.", "loratool.plan", "loratool.linalg", "loratool.store.hub",
              "loratool.store.remote_http", "loratool.store.writer")  # fmt: skip
"""Of ours: what only commands need that compute, write, or reach for the Hub."""
CORES = "loratool.engine.machine"
"""How many there are is asked where the files of a folder are shared among them."""
MOST, MOST_OF_ONE, MOST_OF_HELP = 326, 282, 161
"""Modules that a command loads, those of Python itself included: of one adapter fewer."""
SCRIPT = """
import sys
from loratool.cli import main
try:
    main(sys.argv[1:])
except SystemExit as done:
    assert not done.code, done.code
print("", *sys.modules, sep="\\n", file=sys.stderr)
"""
HELP = (
    ["--help"],
    ["--version"],
    ["merge", "--help"],
    ["convert", "--help"],
    ["completion", "bash"],
)
LOOKS = (["inspect", "ADAPTER"], ["inspect", "ADAPTER", "--json"], ["inspect", "BASE"],
         ["inspect", "FOLDER", "--json"], ["inspect", "ADAPTER", "--tensors"],
         ["inspect", "GGUF"],
         ["check", "ADAPTER", "--for", "vllm"],
         ["check", "IMAGE", "--for", "diffusers", "--json"])  # fmt: skip
PAGES = (["inspect", "FOLDER", "--html", "PAGE"], ["inspect", "ADAPTER", "--html", "PAGE"])
COPIES = (["convert", "ADAPTER", "--to", "kohya", "--base", "BASE", "-o", "OUT"],
          ["convert", "ADAPTER", "--to", "gguf", "--base", "BASE", "-o", "GGUF_OUT"],
          ["convert", "ADAPTER", "--to", "peft", "-o", "FOLDER_OUT"])  # fmt: skip


def loaded(command: list[str], data: Path, out: Path) -> list[str]:
    """Names of the modules that a command has loaded when it is done."""
    places = {
        "ADAPTER": data / "llm" / "lora_linear",
        "BASE": data / "llm" / "lora_linear" / "base",
        "FOLDER": data / "llm",
        "GGUF": save_gguf(out / "base.gguf", {"general.architecture": "llama"},
                          {"output.weight": (8, [1, 32], bytes(34))}),
        "IMAGE": data / "diffusion" / "qwen_image_musubi" / "adapter.safetensors",
        "OUT": out / "out.safetensors",
        "GGUF_OUT": out / "out.gguf",
        "PAGE": out / "page.html",
        "FOLDER_OUT": out / "out",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(places.get(word, word)) for word in command)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip(), done.stderr
    return done.stderr.split("\n")


@pytest.mark.parametrize("command", [*HELP, *LOOKS, *PAGES, *COPIES], ids=" ".join)
def test_nothing_heavy_is_imported(command: list[str], data: Path, tmp_path: Path) -> None:
    modules = loaded(command, data, tmp_path)
    assert not {name.partition(".")[0] for name in modules}.intersection(HEAVY)
    if command not in COPIES:
        assert [n for n in modules if n.startswith(FOR_OTHERS) and n != CORES] == []
    if command not in (*COPIES, *PAGES):
        of_one = MOST_OF_ONE if command[:2] == ["inspect", "ADAPTER"] else MOST
        assert len(modules) <= (MOST_OF_HELP if command in HELP else of_one), "start-up got heavier"
