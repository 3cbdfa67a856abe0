"""What pages are made of in tests and pictures: a collection of 300 files, sparse but for headers.

Tables of tensors are those of real trainers (kohya's SDXL and SD 1.5, Flux in diffusers' names,
musubi's Wan, PEFT); names, words and thumbnails are made up, always the same ones.
"""

from __future__ import annotations

import base64
import json
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

Shapes = Iterator[tuple[str, int, int]]
LOOKS = ("ink wash", "paper cut", "film grain", "pixel art", "gouache", "line art", "clay",
         "stained glass", "woodblock", "watercolour", "low poly", "charcoal")  # fmt: skip
THINGS = ("harbour", "fox", "lighthouse", "orchard", "robot", "teahouse", "mountain", "kitten",
          "night market", "greenhouse", "old tram", "heron", "observatory", "canal")  # fmt: skip
PEOPLE = ("mirelle", "t_okafor", "lumen", "paperboat", "kiyo", "vantablue", "")
HOSTILE = {
    "modelspec.title": "<script>document.title='owned'</script>",
    "modelspec.author": "\u202eevil\u202c \u200b<img src=x onerror=alert(1)>",
    "modelspec.trigger_phrase": '"><svg onload=alert(2)>' + "a" * 900_000,
    "modelspec.thumbnail": "data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9YWxlcnQoMyk+",
    "ss_training_comment": "javascript:alert(4) </style></script><!--",
}


def unet_xl() -> Shapes:
    for place, blocks, dim in (
        *((f"input_blocks_{i}_1", 2, 640) for i in (4, 5)),
        *((f"input_blocks_{i}_1", 10, 1280) for i in (7, 8)), ("middle_block_1", 10, 1280),
        *((f"output_blocks_{i}_1", 10, 1280) for i in (0, 1, 2)),
        *((f"output_blocks_{i}_1", 2, 640) for i in (3, 4, 5)),
    ):  # fmt: skip
        yield from attention(f"lora_unet_{place}", blocks, dim, 2048)


def unet_1() -> Shapes:
    for where, stages, each in (("down", (0, 1, 2), 2), ("up", (3, 2, 1), 3)):
        for stage, dim in zip(stages, (320, 640, 1280), strict=True):
            for i in range(each):
                yield from attention(
                    f"lora_unet_{where}_blocks_{stage}_attentions_{i}", 1, dim, 768)  # fmt: skip
    yield from attention("lora_unet_mid_block_attentions_0", 1, 1280, 768)


def attention(place: str, blocks: int, dim: int, context: int) -> Shapes:
    for name in ("proj_in", "proj_out"):
        yield f"{place}_{name}", dim, dim
    for block in range(blocks):
        at = f"{place}_transformer_blocks_{block}"
        for attn, width in (("attn1", dim), ("attn2", context)):
            yield f"{at}_{attn}_to_q", dim, dim
            for name in ("to_k", "to_v"):
                yield f"{at}_{attn}_{name}", dim, width
            yield f"{at}_{attn}_to_out_0", dim, dim
        yield f"{at}_ff_net_0_proj", 8 * dim, dim
        yield f"{at}_ff_net_2", dim, 4 * dim


def flux() -> Shapes:
    for i in range(19):
        at = f"transformer.transformer_blocks.{i}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"):
            yield f"{at}.attn.{name}", 3072, 3072
        for name in ("ff", "ff_context"):
            yield f"{at}.{name}.net.0.proj", 12288, 3072
            yield f"{at}.{name}.net.2", 3072, 12288
    for i in range(38):
        at = f"transformer.single_transformer_blocks.{i}"
        for name in ("attn.to_q", "attn.to_k", "attn.to_v"):
            yield f"{at}.{name}", 3072, 3072
        yield f"{at}.proj_mlp", 12288, 3072
        yield f"{at}.proj_out", 3072, 15360


def wan() -> Shapes:
    for i in range(40):
        for name in ("self_attn", "cross_attn"):
            for part in "qkvo":
                yield f"lora_unet_blocks_{i}_{name}_{part}", 5120, 5120
        yield f"lora_unet_blocks_{i}_ffn_0", 13824, 5120
        yield f"lora_unet_blocks_{i}_ffn_2", 5120, 13824


WORLDS = {
    "sdxl": (unet_xl, "sdxl_base_v1-0", 0.42), "sd1": (unet_1, "sd_v1", 0.2),
    "flux": (flux, "flux1", 0.28), "wan": (wan, "wan2.1", 0.1),
}  # fmt: skip


def write_lora(path: Path, world: str, rank: int, metadata: dict[str, str]) -> None:
    """A file of float16 factors with a true header; the factors are a hole."""
    shapes = list(WORLDS[world][0]())
    dotted = "." in shapes[0][0]
    small, large = [], []
    for name, out, inner in shapes:
        if not dotted:
            small.append((f"{name}.alpha", ()))
        down, up = ("lora_A", "lora_B") if dotted else ("lora_down", "lora_up")
        large += [(f"{name}.{down}.weight", (rank, inner)), (f"{name}.{up}.weight", (out, rank))]
    table: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for name, shape in (*small, *large):
        size = 2 * int(np.prod(shape, dtype=np.int64))
        table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.write(np.float16(rank / 2).tobytes() * len(small))
        file.truncate(8 + len(head) + at)


def make_collection(folder: Path, files: int = 300) -> None:
    """The collection: images, some without words or pictures, twins, and two that are hostile."""
    folder.mkdir(parents=True)
    rng = random.Random(18)
    worlds = random.Random(7).choices(list(WORLDS), [w[2] for w in WORLDS.values()], k=files)
    for number, world in enumerate(worlds):
        look, thing = rng.choice(LOOKS), rng.choice(THINGS)
        name = f"{look} {thing}".replace(" ", "_") + f"_{number:03d}.safetensors"
        rank = rng.choice((4, 8, 16, 16, 32, 32, 64, 128))
        write_lora(folder / name, world, rank, metadata_of(rng, world, look, thing, number))
    write_lora(folder / "<script>alert(1)<!--.safetensors", "sd1", 8, HOSTILE)
    (folder / "broken.safetensors").write_bytes(b"<html>not found</html>" * 9)


def metadata_of(
    rng: random.Random, world: str, look: str, thing: str, number: int
) -> dict[str, str]:
    if number % 11 == 10:
        return {}
    word = f"{look.replace(' ', '')} {thing}"
    tags = {"train": {word: 40 + number % 60, "no humans": 24, "scenery": 17 + number % 9}}
    said = {
        "ss_base_model_version": WORLDS[world][1], "ss_network_module": "networks.lora",
        "ss_num_train_images": str(20 + number % 80), "ss_num_epochs": "10",
        "ss_output_name": f"{look}_{thing}".replace(" ", "_"), "ss_tag_frequency": json.dumps(tags),
        "modelspec.title": f"{look} {thing}".title(), "modelspec.author": rng.choice(PEOPLE),
        "modelspec.trigger_phrase": f"{word}, {look} style",
    }  # fmt: skip
    if number % 7:
        picture = base64.b64encode(landscape(number)).decode()
        said["modelspec.thumbnail"] = f"data:image/png;base64,{picture}"
    return {key: value for key, value in said.items() if value}


def landscape(seed: int, width: int = 192, height: int = 144) -> bytes:
    """A small PNG of hills, sky and sun in one family of colours."""
    rng = np.random.default_rng(seed)
    hue, turn = rng.random(), rng.uniform(-0.25, 0.25)
    x = np.arange(width)[None, :] / width
    y = np.arange(height)[:, None] / height
    image = np.minimum(4, y * rng.uniform(5, 9)).astype(np.uint8) + 0 * x.astype(np.uint8)
    sun = np.hypot((x - rng.uniform(0.2, 0.8)) * width / height, y - rng.uniform(0.2, 0.45))
    image[sun < rng.uniform(0.09, 0.16)] = 5
    for layer in range(5):
        wave = sum(np.sin(2 * np.pi * (f * x + rng.random())) / f for f in (1, 2.3, 4.7))
        ridge = 0.42 + 0.12 * layer + 0.05 * wave * rng.uniform(0.5, 1.2)
        image[np.broadcast_to(y, image.shape) > ridge] = 6 + layer
    colours = [_colour(hue + turn * i / 5, 0.35 + 0.05 * i, 0.95 - 0.05 * i) for i in range(5)]
    colours.append(_colour(hue + 0.08, 0.2, 1.0))
    colours += [_colour(hue + 0.45 + turn * i / 4, 0.35 + 0.06 * i, 0.75 - 0.14 * i)
                for i in range(5)]  # fmt: skip
    return png(image, bytes(c for colour in colours for c in colour))


def _colour(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    import colorsys

    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def png(image: np.ndarray, palette: bytes) -> bytes:
    """An indexed PNG; ``image`` (height, width) of uint8."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image], axis=1).tobytes()
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"PLTE", palette)
            + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))  # fmt: skip
