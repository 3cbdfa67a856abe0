"""A tiny base and adapter written byte by byte, and what every refusal must look like.

`World` holds ``base/`` and ``style/`` under ``in/``; outputs go below ``out/``.  A row of the
bad-input table spoils something, runs a command inside the test process, and `World.refuses`
checks code, words, untouched inputs and an empty output folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loratool import cli
from tests.cli.conftest import Result

Tensor = tuple[str, tuple[int, ...], bytes]
PREFIX = "base_model.model."
Q = "model.layers.{}.self_attn.q_proj"
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I64": 8, "BOOL": 1, "U16": 2, "C64": 8}


def craft(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def save(path: Path, tensors: Mapping[str, Tensor], metadata: object = None) -> Path:
    """A well-formed file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {
            "dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)],
        }  # fmt: skip
        data += raw
    return craft(path, header, data)


def values(*shape: int, seed: int = 0, fill: float | None = None) -> Tensor:
    """A float32 tensor."""
    made = np.random.default_rng(seed).standard_normal(shape).astype("<f4") * np.float32(0.1)
    if fill is not None:
        made = np.full(shape, fill, "<f4")
    return "F32", shape, made.tobytes()


def zeros(dtype: str, *shape: int) -> Tensor:
    return dtype, shape, bytes(int(np.prod(shape)) * SIZES[dtype])


def base_tensors() -> dict[str, Tensor]:
    made = {"model.embed_tokens.weight": values(16, 8, seed=1)}
    for layer in (0, 1):
        made[Q.format(layer) + ".weight"] = values(12, 8, seed=10 + layer)
        made[f"model.layers.{layer}.input_layernorm.weight"] = values(8, seed=20 + layer)
    made["lm_head.weight"] = values(16, 8, seed=2)
    return made


def factors(module: str, *, rank: int = 2, out: int = 12, inner: int = 8) -> dict[str, Tensor]:
    seed = len(module) + int.from_bytes(hashlib.sha256(module.encode()).digest()[:3], "big")
    return {
        f"{PREFIX}{module}.lora_A.weight": values(rank, inner, seed=seed),
        f"{PREFIX}{module}.lora_B.weight": values(out, rank, seed=seed + 1),
    }


def adapter_tensors() -> dict[str, Tensor]:
    return factors(Q.format(0)) | factors(Q.format(1))


BASE_CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8, "vocab_size": 16, "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
ADAPTER_CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
    "base_model_name_or_path": "base", "peft_version": "0.21.2",
}  # fmt: skip


@dataclass
class World:
    """A folder with good inputs that a test may spoil."""

    root: Path
    base: Path = field(init=False)
    adapter: Path = field(init=False)
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        self.base, self.adapter = self.root / "in" / "base", self.root / "in" / "style"
        self.out = self.root / "out" / "merged"
        for folder in (self.base, self.adapter, self.out.parent):
            folder.mkdir(parents=True)
        self.write_base(base_tensors())
        self.write_adapter(adapter_tensors())

    @property
    def weights(self) -> Path:
        return self.adapter / "adapter_model.safetensors"

    @property
    def model(self) -> Path:
        return self.base / "model.safetensors"

    def write_base(self, tensors: Mapping[str, Tensor], **config: object) -> None:
        save(self.model, tensors, {"format": "pt"})
        (self.base / "config.json").write_text(json.dumps(BASE_CONFIG | config))

    def write_adapter(self, tensors: Mapping[str, Tensor] | None = None, **config: object) -> None:
        if tensors is not None:
            save(self.weights, tensors, {"format": "pt"})
        (self.adapter / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | config))

    def shard(self) -> Path:
        """Cut the base into two shards with an index; returns the index."""
        tensors = base_tensors()
        names = list(tensors)
        weight_map = {}
        for number, part in enumerate((names[:3], names[3:]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save(self.base / file, {n: tensors[n] for n in part}, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        self.model.unlink()
        size = sum(len(raw) for _, _, raw in tensors.values())
        index = self.base / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
        return index

    # ----------------------------------------------------------------------------- running

    def merge_words(self, *options: str) -> list[str]:
        return ["merge", str(self.adapter), "--base", str(self.base), "-o", str(self.out),
                "--threads", "1", *options]  # fmt: skip

    def run(self, *words: object) -> Result:
        """Run a command in this process; inputs must stay as they are."""
        before = fingerprint(self.root / "in")
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.run([str(word) for word in words])
        assert fingerprint(self.root / "in") == before, "an input changed"
        return Result(code, out.getvalue(), err.getvalue())

    def merge(self, *options: str) -> Result:
        return self.run(*self.merge_words(*options))

    def refuses(
        self,
        words: list[str],
        code: str,
        *,
        file: str | None = None,
        key: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        what: str | None = None,
        hint: str | None = None,
    ) -> dict[str, Any]:
        """The command fails with this code and these words, and leaves nothing behind."""
        found = self.run(*words, "--json")
        error = found.json.get("error")
        assert error is not None, f"no error: {found.json}"
        assert error["code"] == code, error
        digit = {"1": 10, "0": 1}.get(code[3], int(code[3]))
        assert found.code == error["exit_code"] == digit, error
        asked = {"file": file, "key": key, "expected": expected, "got": got, "what": what,
                 "hint": hint}  # fmt: skip
        for label, words_ in asked.items():
            if words_ is not None:
                assert words_ in str(error.get(label)), f"{label}: {error}"
        assert found.err == "", "with --json errors are on stdout alone"
        assert self.leftovers() == []
        return error

    def leftovers(self) -> list[str]:
        return sorted(p.name for p in self.out.parent.iterdir())


def fingerprint(folder: Path) -> dict[str, str]:
    """Path -> what is there: sha256 of files, target of links, kind of the rest."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = os.fsencode(path.relative_to(folder)).hex()
        if path.is_symlink():
            found[name] = f"link {str(path.readlink())!r}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


Spoil = Callable[[World], None]
