"""The folder in which every command line of the pages runs: small models under the pages' names.

The language model is that of ``loratool demo``; the image models are samples of ``tests/data``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.delta.toy import toy_files

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "tests" / "data" / "diffusion"
CALLED = {"base": "model", "tuned": "my-sft"}
MADE = ("merged", "baked.safetensors")
"""What a page makes itself before it goes on with it; single lines find it made."""
TEXT = {"lora_te_": "lora_te1_text_model_", "text_encoder.": "text_encoder.text_model."}
RECIPE = """\
steps:
  - rescale: {adapters: [style], factor: 0.5, output: softer}
  - merge: {adapters: [softer, "sql:0.5"], base: model, output: both-merged}
  - verify: {merged: both-merged}
"""


def build(folder: Path) -> None:
    """Fill a new folder; everything in it is the same every time."""
    _language(folder)
    _images(folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "weights.yaml").write_text('"layers\\\\.0\\\\.": 0.5\n')


def _language(folder: Path) -> None:
    """``model``, ``my-sft`` and adapters of it."""
    for name, data in toy_files():
        top, _, rest = name.partition("/")
        path = folder / CALLED.get(top, top) / rest
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name in ("style", "sql"):
        path = folder / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {
            "base_model_name_or_path": str(Path("model"))}, indent=2))  # fmt: skip
    both = [str(folder / "style"), str(folder / "sql")]
    for name, weights in {
        "a": (1, 0), "b": (0, 1), "c": (1, -0.5), "other": (0.7, 0.7), "base-style": (0.5, 0.1),
    }.items():  # fmt: skip
        lt.combine(both, weights=weights, output=folder / name, rank=8)
    many = ["style", "sql", "other", "a", "b", "c", "base-style", "style"]
    lt.combine([str(folder / name) for name in many], output=folder / "r64")
    (folder / "loha").mkdir()
    for path in (ROOT / "tests" / "data" / "llm" / "loha").glob("adapter_*"):
        shutil.copy(path, folder / "loha")
    _with_head(folder)
    lt.extract(folder / "my-sft", base=folder / "model", rank=4, output=folder / "lora-4")
    lt.merge([folder / "style"], base=folder / "model", output=folder / "merged")


def _with_head(folder: Path) -> None:
    """``chat``: an adapter that has trained the last norm, too."""
    shutil.copytree(folder / "style", folder / "chat")
    file = folder / "chat" / "adapter_model.safetensors"
    base = {k: v for f in (folder / "model").glob("*.safetensors") for k, v in load_file(f).items()}
    norm = "model.norm.weight"
    save_file({**load_file(file), f"base_model.model.{norm}": 2 * base[norm]}, file)


def _images(folder: Path) -> None:
    """``sdxl.safetensors``, ``sdxl/``, ``tuned.safetensors``, ``style.safetensors``, ``loras/``."""
    unet = load_file(IMAGES / "base" / "kohya_sgm.safetensors")
    texts = load_file(IMAGES / "base" / "kohya_sd15.safetensors")
    text = {_text(k): v for k, v in texts.items() if k.startswith("text_encoder.")}
    whole = {f"unet.{k}": v for k, v in unet.items()} | text
    save_file(whole, folder / "sdxl.safetensors")
    (folder / "sdxl" / "unet").mkdir(parents=True)
    save_file(unet, folder / "sdxl" / "unet" / "diffusion_pytorch_model.safetensors")
    style = load_file(IMAGES / "kohya_sgm_naming" / "adapter.safetensors")
    more = load_file(IMAGES / "kohya_sd15_locon" / "adapter.safetensors")
    style |= {_text(k): v for k, v in more.items() if k.startswith("lora_te_")}
    said = {"ss_base_model_version": "sdxl_base_v1-0", "ss_output_name": "style",
            "ss_network_module": "networks.lora",
            "ss_tag_frequency": json.dumps({"img": {"mystyle": 40, "1girl": 12}})}  # fmt: skip
    save_file(style, folder / "style.safetensors", said)
    (folder / "loras").mkdir()
    for name, factor in {"ink": 1, "neon": -0.6, "paper": 0.3}.items():
        lt.rescale([folder / "style.safetensors"], factor=factor,
                   output=folder / "loras" / f"{name}.safetensors")  # fmt: skip
    shutil.copy(folder / "loras" / "neon.safetensors", folder / "char.safetensors")
    for name, weight in {"tuned": 3, "baked": 1}.items():
        lt.merge([f"{folder / 'style.safetensors'}:{weight}"], base=folder / "sdxl.safetensors",
                 output=folder / f"{name}.safetensors")  # fmt: skip
    collection = folder / "collection"
    collection.mkdir()
    for name in ("ink", "ink-copy", "paper"):
        original = folder / "loras" / f"{name.removesuffix('-copy')}.safetensors"
        shutil.copy(original, collection / f"{name}.safetensors")
    shutil.copytree(folder / "r64", collection / "chat")
    lt.combine([folder / "style.safetensors", *sorted((folder / "loras").iterdir())],
               output=collection / "wide.safetensors")  # fmt: skip


def _text(key: str) -> str:
    for short, long in TEXT.items():
        if key.startswith(short):
            return long + key.removeprefix(short)
    return key
