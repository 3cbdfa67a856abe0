"""What tests in real time need: inputs, an undisturbed output, and the check after a kill."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.faults import process
from tests.make import save_adapter

SHARDS, SHARD_BYTES = 3, 64 << 10


def fingerprint(path: Path) -> dict[str, str] | None:
    """Relative name -> sha256 of a file or folder; None if there is nothing."""
    if path.is_file():
        return {"": hashlib.sha256(path.read_bytes()).hexdigest()}
    if not path.is_dir():
        return None
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


def write_model(folder: Path, *, seed: int = 0) -> Path:
    """Three shards of 64 KB: two float32 matrices each, written without any library."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "test"}')
    weight_map = {}
    for number in range(SHARDS):
        entries, half = {}, SHARD_BYTES // 2
        for side in range(2):
            entries[f"layers.{2 * number + side}.proj.weight"] = {
                "dtype": "F32", "shape": [64, 128],
                "data_offsets": [side * half, (side + 1) * half],
            }  # fmt: skip
        head = json.dumps(entries).encode()
        name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        data = b"".join(
            struct.pack("<f", ((seed + number + i * 7919) % 1000) / 500 - 1)
            for i in range(SHARD_BYTES // 4)
        )
        (folder / name).write_bytes(struct.pack("<Q", len(head)) + head + data)
        weight_map |= dict.fromkeys(entries, name)
    index = {"metadata": {"total_size": SHARDS * SHARD_BYTES}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@dataclass
class Scene:
    """A command, its inputs, and what it writes when nobody disturbs it.

    Attributes:
        command: what to run, without the output.
        inputs: folder that must never change.
        work: an empty folder for outputs.
        name: of the output.
        rerun: options of the run that goes on.
        before: an earlier output to put in place before each run (with ``--force``).
    """

    command: Sequence[object]
    inputs: Path
    work: Path
    name: str
    options: Sequence[str] = ()
    before: Path | None = None
    expected: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs_before = fingerprint(self.inputs)
        self.reset()
        done = process.run(self.words)
        assert done.returncode == 0, done.stderr
        self.expected = fingerprint(self.output) or {}
        assert self.expected
        self.reset()

    @property
    def output(self) -> Path:
        return self.work / self.name

    @property
    def words(self) -> list[object]:
        out = ["-o", self.output] if "merge" in self.command else [self.output]
        return [*self.command, *out, *self.options]

    def reset(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        if self.before is not None:
            shutil.copytree(self.before, self.output)

    def check_visible(self) -> None:
        """Under the final name: nothing, the old output, or the complete new one."""
        allowed = [None, self.expected]
        if self.before is not None:
            allowed[0] = fingerprint(self.before)
        found = fingerprint(self.output)
        # between the two renames of a replacement (no RENAME_EXCHANGE) the name may be free
        assert found in allowed, f"wrong under the final name: {found}"
        assert fingerprint(self.inputs) == self.inputs_before, "an input changed"

    def check_rerun(self) -> bool:
        """The same command, undisturbed, ends with the same bytes; True if it had to work."""
        is_done = fingerprint(self.output) == self.expected
        done = process.run(self.words)
        allowed = {5} if is_done and self.before is None else {0}
        assert done.returncode in allowed, (done.returncode, done.stderr)
        assert fingerprint(self.output) == self.expected, "the rerun wrote other bytes"
        left = sorted(p.name for p in self.work.iterdir())
        assert left == [self.name], f"left behind: {left}"
        self.check_visible()
        return not is_done


def make_scene(kind: str, root: Path, *options: str) -> Scene:
    """A copy of a small model into a new folder, over an earlier output, or into one file."""
    base = write_model(root / "in" / "base")
    if kind == "file":
        single = root / "in" / "one.safetensors"
        shutil.copy(base / "model-00001-of-00003.safetensors", single)
        command = [*process.COPY, single, *options]
        return Scene(command, root / "in", root / "work", "out.safetensors")
    command = [*process.COPY, base, *options]
    if kind == "folder":
        return Scene(command, root / "in", root / "work", "out")
    earlier = root / "earlier"
    done = process.run([*process.COPY, write_model(root / "other", seed=5), earlier])
    assert done.returncode == 0, done.stderr
    return Scene(command, root / "in", root / "work", "out", ("--force",), earlier)


def make_merge(root: Path) -> Scene:
    """A real merge, several workers."""
    base = write_model(root / "in" / "base")
    module, size = "layers.2.proj", (64, 128)
    factors = {module: (torch.ones(2, size[1]), torch.full((size[0], 2), 0.01))}
    adapter = save_adapter(root / "in" / "adapter", factors)
    command = [*process.MERGE, adapter, "--base", base, "--threads", 4]
    return Scene(command, root / "in", root / "work", "out")
