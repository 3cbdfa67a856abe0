"""The files that `tests.faults.mutations` changes, all of them sound."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from loratool import cli
from loratool.store.header import read_header
from tests import coded
from tests.faults.scenes import FILE, LORA, MERGE, MERGED, RESCALE, write_inputs
from tests.make import random_factors, save_adapter, save_checkpoint

DATA = Path(__file__).parents[1] / "data" / "llm"
LIKE_OURS = ("lora_linear", "lora_dora", "lora_gpt2_conv1d", "lora_modules_to_save",
             "lora_mha", "lora_target_params_mixtral", "lora_trainable_tokens", "lora_kasa",
             "lora_rank_alpha_pattern", "lora_layer_replication")  # fmt: skip
IMAGES = DATA.parent / "diffusion"
FLAT = {"lycoris_locon_tucker": "lycoris", "lycoris_locon_norm": "lycoris",
        "kohya_sd15_locon": "kohya_sd15", "kohya_bundle_emb": "kohya_sd15"}  # fmt: skip
WEIGHTS = "layers.0: 0.5\nlayers.1: 2\n.*q_proj: 1\n"
CARD = """---
license: mit
base_model: org/model
tags:
- lora
- art
language: [en, de]
date: 2024-01-31
model-index:
- name: x
  results: [{task: {type: text}, metrics: [{type: acc, value: 0.5}]}]
---
# A card

Text.
"""
CODED = {
    "nf4": coded.bnb4((8, 64), size=16, seed=1, nested=4),
    "int8": coded.int8(8, 16, seed=1),
    "gptq": coded.gptq(2, 8, bits=4, size=8, seed=1, ordered=True),
    "awq": coded.awq(2, 16, 2, seed=1),
    "nvfp4": coded.nvfp4(4, 2, seed=1),
    "packed": coded.packed(4, 32, bits=4, size=16, seed=1, zeros=True),
    "mlx": coded.mlx(4, 4, bits=4, size=32, seed=1),
}
TOKENIZER: dict[str, Any] = {
    "added_tokens": [{"id": 5, "content": "<new>", "special": True}],
    "model": {"type": "BPE", "vocab": {"a": 0, "<new>": 1}, "merges": [["a", "b"]]},
}


def make_site(root: str, samples: Sequence[str] | None = LIKE_OURS) -> None:
    """Make it in an empty folder.

    Args:
        root: the folder.
        samples: names of adapters of `DATA`; None = all that have a base.
    """
    os.chdir(root)
    here = Path.cwd()
    write_inputs(here)
    (here / "in" / "weights.yaml").write_text(WEIGHTS)
    for name in samples or sorted(p.name for p in DATA.iterdir() if (p / "base").is_dir()):
        copy_sample(DATA / name, here / "samples" / name)
    for name, base in FLAT.items():
        copy_flat(name, base, here / "flat" / name)
    for words in (MERGED, LORA, MERGE, FILE):
        call(words)
    (here / "work").rename("made")
    die_after(3, lambda: call(MERGE))
    die_after(4, lambda: call(RESCALE))
    (here / "work").rename("left")
    shutil.copytree("in/style", "card")
    (here / "card" / "README.md").write_text(CARD)
    (here / "card" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    write_tokenizers(here / "tok")
    write_pickle(here / "pickle")
    write_codes(here / "codes")
    copy_flat_gguf(here / "gguf")
    shutil.copytree(DATA / "mlx_dora", here / "mlx" / "adapter")


def call(words: str) -> None:
    printed = io.StringIO()
    Path("work").mkdir(exist_ok=True)
    with redirect_stdout(printed), redirect_stderr(printed):
        code = cli.run(words.split())
    assert code == 0, printed.getvalue()


def copy_sample(source: Path, target: Path) -> None:
    """An adapter, its base, and an index for it."""
    for folder, origin in ((target / "adapter", source), (target / "base", source / "base")):
        folder.mkdir(parents=True)
        for file in sorted(origin.iterdir()):
            if file.suffix in (".json", ".safetensors") and file.name[0].islower():
                shutil.copyfile(file, folder / file.name)
    for name in ("merged.safetensors", "inmemory_names.json"):
        (target / "adapter" / name).unlink(missing_ok=True)
    weights = next((target / "base").glob("*.safetensors"))
    places = {ref.name: weights.name for ref in read_header(weights).tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (target / "base" / "model.safetensors.index.json").write_text(json.dumps(index))


def copy_flat(name: str, base: str, target: Path) -> None:
    """An adapter in one file, and what it was made for."""
    for folder, origin in (("adapter", IMAGES / name / "adapter.safetensors"),
                           ("base", IMAGES / "base" / f"{base}.safetensors")):  # fmt: skip
        (target / folder).mkdir(parents=True)
        shutil.copyfile(origin, target / folder / "it.safetensors")


def die_after(lines: int, work: Callable[[], None]) -> None:
    """Do something in a process that is gone after so many lines of notes about its progress."""
    from loratool.store import journal, series

    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    left = [lines]
    encode = journal.encode

    def counted(line: Any) -> bytes:
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return encode(line)

    journal.encode = series.encode = counted  # type: ignore[attr-defined]
    try:
        work()
    finally:
        os._exit(0)


def write_tokenizers(folder: Path) -> None:
    shutil.copytree("in/style", folder / "adapter")
    shutil.copytree("in/base", folder / "base")
    for name in ("adapter", "base"):
        own = folder / name
        (own / "tokenizer.json").write_text(json.dumps(TOKENIZER))
        (own / "tokenizer_config.json").write_text(
            json.dumps({"added_tokens_decoder": {"5": {"content": "<x>"}}, "model_max_length": 9})
        )
        (own / "added_tokens.json").write_text('{"<new>": 5}')
        (own / "special_tokens_map.json").write_text('{"pad_token": "<x>"}')
    base = folder / "base"
    (base / "vocab.json").write_text('{"a": 0, "<x>": 1}')
    (base / "vocab.txt").write_text("a\n<new>\n")
    piece = b"\x0a\x05<new>\x15\x00\x00\x80\x3f"
    (base / "tokenizer.model").write_bytes(
        b"".join(b"\x0a%c%b" % (len(piece), piece) for _ in "ab")
    )
    (base / "modules.json").write_text(json.dumps([{"idx": 0, "path": "1_Pooling"}]))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "adapter" / "README.md").write_text(CARD)


def write_codes(folder: Path) -> None:
    """Quantised bases of one weight, and an adapter for each."""
    for name, file in CODED.items():
        save_checkpoint(folder / name / "base", file.tensors, config=file.config)
        assert file.numbers is not None
        module, shape = file.name.removesuffix(".weight"), tuple(file.numbers.shape)
        factors = random_factors({module: shape}, rank=2, seed=1)
        save_adapter(folder / name / "adapter", factors, alpha=2, target_modules=["a"])


def copy_flat_gguf(folder: Path) -> None:
    (folder / "adapter").mkdir(parents=True)
    shutil.copyfile(DATA / "gguf_lora" / "adapter.gguf", folder / "adapter" / "it.gguf")


def write_pickle(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    shutil.copytree("in/style", folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(load_file("in/style/adapter_model.safetensors"), folder / "adapter_model.bin")
