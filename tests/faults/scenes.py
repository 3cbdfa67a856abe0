"""Every writing command on tiny inputs, with foreign files beside its outputs.

Paths are relative to a root with ``in/``, that nobody may change, and ``work/``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from tests.faults.world import Q, Tensor, World, adapter_tensors, base_tensors, save

PLAIN = {"LORATOOL_PLAIN_IO": "1"}
T = "--threads 1"
TWO = "in/style:0.5 in/sql"
MERGE = f"merge in/style --base in/base {T} -o work/out"
UNDO = f"{MERGE} --save-undo work/undo.safetensors"
MERGED = f"merge in/style --base in/base {T} -o in/merged --save-undo in/undo.safetensors"
FILE = f"merge in/style --base in/one.safetensors {T} -o work/out.safetensors"
EXTRACT = f"extract in/tuned --base in/base --rank 2 {T}"
RESIDUAL = f"{EXTRACT} -o work/lora --save-residual work/rest.safetensors"
LORA = f"{EXTRACT} -o in/lora --save-residual in/rest.safetensors"
RESCALE = "rescale in/style in/sql 0.3 -o work/all/"
COMPRESS = f"compress in/style in/sql --rank 1 {T} -o work/all/"
DEMO = ("base", "style", "sql", "tuned", "loratool.json", "undo.safetensors", "merged", "restored",
        "lora")  # fmt: skip
OTHER = f"merge in/sql --base in/base {T} -o work/out"


@dataclass(frozen=True)
class Scene:
    """A command that writes.

    Attributes:
        name: of the scene.
        command: what is typed after ``loratool``.
        outputs: places of what it makes; one never appears before those named earlier.
        prepare: commands that make more inputs.
        before: commands that make what lies in ``work/`` before.
        env: more variables.
        mount: a file system of its own, with what ``before`` makes already in it.
        is_steady: the same calls in the same order every time.
        replaces: it may be given again when all is there.
    """

    name: str
    command: str
    outputs: tuple[str, ...] = ("work/out",)
    prepare: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    mount: str | None = None
    is_steady: bool = True
    replaces: bool = False

    @property
    def words(self) -> list[str]:
        return self.command.split()


def also(name: str, scene: Scene, *before: str, **changes: object) -> Scene:
    """A scene with ``--force`` over what other commands have made."""
    more = {"name": name, "command": f"{scene.command} --force", "before": before}
    more |= {"replaces": True} | changes
    return Scene(**{**vars(scene), **more})  # type: ignore[arg-type]


_UNDO = Scene("merge-undo", UNDO, ("work/undo.safetensors", "work/out"))
_FILE = Scene("merge-file", FILE, ("work/out.safetensors",))
_RESIDUAL = Scene("extract-residual", RESIDUAL, ("work/rest.safetensors", "work/lora"))
_ALL = ("work/all/style", "work/all/sql")
_RESCALE = Scene("rescale-many", RESCALE, _ALL)
_COMPRESS = Scene("compress-many", COMPRESS, _ALL)
_RUN = Scene("run", "run in/recipe.yaml", ("work/soft", "work/merged", "work/lora"))
_PULL = Scene("pull", "pull me/style --offline -o work/out")
_FILE_BEFORE = FILE.replace("in/style", "in/sql")

SCENES = [
    Scene("merge", MERGE),
    Scene("merge-part", f"{MERGE} --skip layers.1"),
    also("merge-force", Scene("", MERGE), OTHER),
    also("merge-force-plain", Scene("", MERGE), OTHER, env=PLAIN),
    also("merge-force-other", Scene("", MERGE), "rescale in/style 2 -o work/out"),
    _FILE,
    Scene("merge-file-plain", FILE, ("work/out.safetensors",), env=PLAIN),
    also("merge-file-force", _FILE, _FILE_BEFORE),
    _UNDO,
    also("merge-undo-force", _UNDO, f"{OTHER} --save-undo work/undo.safetensors"),
    Scene("merge-residual", f"merge in/lora --base in/base --residual in/rest.safetensors {T} "
          "-o work/out", prepare=(LORA,)),
    Scene("merge-adapters", f"merge {TWO} {T} -o work/out"),
    also("merge-adapters-force", Scene("", f"merge {TWO} {T} -o work/out"), OTHER),
    Scene("merge-adapters-rank", f"merge {TWO} --rank 1 {T} -o work/out"),
    Scene("subtract", f"subtract in/style --from in/merged {T} -o work/out", prepare=(MERGED,)),
    Scene("subtract-undo", f"subtract in/style --from in/merged --undo in/undo.safetensors {T} "
          "-o work/out", prepare=(MERGED,)),
    Scene("subtract-adapters", f"subtract in/style in/sql {T} -o work/out"),
    Scene("swap", f"swap in/style in/sql --in in/merged {T} -o work/out", prepare=(MERGED,)),
    Scene("split", f"split in/whole --base in/base {T} -o work/all",
          ("work/all/base", "work/all/adapter")),
    Scene("rescale", "rescale in/style 0.3 -o work/out"),
    Scene("rescale-only", "rescale in/style 1 --only layers.0=2 -o work/out"),
    also("rescale-force-plain", Scene("", "rescale in/style 0.3 -o work/out"), OTHER, env=PLAIN),
    _RESCALE,
    also("rescale-many-force", _RESCALE, RESCALE.replace("0.3", "2")),
    Scene("convert", "convert in/sql --to kohya -o work/out.safetensors",
          ("work/out.safetensors",)),
    Scene("convert-many", "convert in/sql in/soft --to kohya -o work/all/",
          ("work/all/sql.safetensors", "work/all/soft.safetensors"),
          prepare=("rescale in/sql 2 -o in/soft",)),
    Scene("compress", f"compress in/style --rank 1 {T} -o work/out"),
    _COMPRESS,
    also("compress-many-force", _COMPRESS, RESCALE),
    Scene("extract", f"{EXTRACT} -o work/out"),
    Scene("extract-size", f"extract in/tuned --base in/base --size 2500 {T} -o work/out"),
    _RESIDUAL,
    also("extract-residual-force", _RESIDUAL,
         RESIDUAL.replace("--rank 2", "--rank 1")),
    _RUN,
    Scene("run-plain", _RUN.command, _RUN.outputs, env=PLAIN),
    Scene("run-undo", "run in/undo.yaml", ("work/undo.safetensors", "work/merged", "work/back")),
    Scene("run-force", "run in/force.yaml", ("work/soft", "work/merged"),
          before=("rescale in/sql 2 -o work/soft", OTHER.replace("out", "merged")),
          replaces=True),
    _PULL,
    also("pull-force", _PULL, "pull me/style@v1 --offline -o work/out"),
    also("pull-force-plain", _PULL, "pull me/style@v1 --offline -o work/out", env=PLAIN),
    also("pull-many-force", Scene("", "pull me/loras --offline -o work/out"),
         "pull me/loras@v1 --offline -o work/out"),
    Scene("templates", "rescale in/chat 0.3 -o work/out"),
    also("templates-force", Scene("", "rescale in/chat 0.3 -o work/out"),
         "compress in/chat --rank 1 -o work/out"),
    also("templates-force-plain", Scene("", "rescale in/chat 0.3 -o work/out"),
         "compress in/chat --rank 1 -o work/out", env=PLAIN),
    Scene("demo", "demo -o work/out", tuple(f"work/out/{name}" for name in DEMO),
          is_steady=False),  # its commands take all cores
    Scene("mount", MERGE, mount="work/out"),
    Scene("mount-plain", MERGE, mount="work/out", env=PLAIN),
    Scene("mount-templates", "rescale in/chat 0.3 -o work/out", mount="work/out"),
    also("mount-force", Scene("", MERGE), OTHER, mount="work/out"),
    also("mount-force-same", Scene("", MERGE), MERGE, mount="work/out"),
    also("mount-templates-force", Scene("", "rescale in/chat 0.3 -o work/out"),
         "compress in/chat --rank 1 -o work/out", mount="work/out"),
    Scene("mount-extract", f"{EXTRACT} -o work/out", mount="work/out"),
    also("mount-extract-force", Scene("", f"{EXTRACT} -o work/out"), f"{EXTRACT} -o work/out",
         mount="work/out"),
    also("mount-pull-force", _PULL, "pull me/style@v1 --offline -o work/out", mount="work/out"),
    Scene("mount-rescale", "rescale in/style 0.3 -o work/out", mount="work/out"),
]  # fmt: skip

RECIPES = {
    "recipe": """\
steps:
  - rescale: {adapters: [style], factor: 0.5, output: ../work/soft}
  - merge: {adapters: [../work/soft], base: base, output: ../work/merged, threads: 1}
  - extract: {tuned: ../work/merged, base: base, rank: 2, output: ../work/lora, threads: 1}
""",
    "undo": """\
steps:
  - merge: {adapters: [style], base: base, output: ../work/merged, threads: 1,
            save-undo: ../work/undo.safetensors}
  - subtract: {adapters: [style], from: ../work/merged, output: ../work/back, threads: 1,
               undo: ../work/undo.safetensors}
""",
    "force": """\
steps:
  - rescale: {adapters: [style], factor: 0.5, output: ../work/soft, force: true}
  - merge: {adapters: [../work/soft], base: base, output: ../work/merged, threads: 1, force: true}
""",
}


def write_inputs(root: Path) -> None:
    """``in/`` with a sharded and a single-file base, two adapters, a fine-tune and a recipe."""
    world = World(root)
    folder = root / "in"
    shutil.copy(world.model, folder / "one.safetensors")
    world.shard()
    shutil.copytree(world.adapter, folder / "sql")
    save(folder / "sql" / "adapter_model.safetensors", halved(), {"format": "pt"})
    shutil.copytree(world.adapter, folder / "whole")
    head = {"base_model.model.lm_head.weight": base_tensors()["lm_head.weight"]}
    save(folder / "whole" / "adapter_model.safetensors", {**adapter_tensors(), **head},
         {"format": "pt"})  # fmt: skip
    shutil.copytree(world.base, folder / "tuned")
    tuned = base_tensors()
    for layer in (0, 1):
        change(tuned, Q.format(layer) + ".weight", layer)
        change(tuned, f"model.layers.{layer}.input_layernorm.weight", layer)
    (folder / "tuned" / "model.safetensors.index.json").unlink()
    for shard in (folder / "tuned").glob("model-*"):
        shard.unlink()
    save(folder / "tuned" / "model.safetensors", tuned, {"format": "pt"})
    shutil.copytree(folder / "style", folder / "chat")
    templates = folder / "chat" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ tools }}")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "thesis.txt").write_text("years of work")


def halved() -> dict[str, Tensor]:
    """Factors of another adapter."""
    return {
        name: (dtype, shape, (np.frombuffer(raw, "<f4") / 2 + np.float32(0.01)).tobytes())
        for name, (dtype, shape, raw) in adapter_tensors().items()
    }


def change(tensors: dict[str, Tensor], name: str, seed: int) -> None:
    dtype, shape, raw = tensors[name]
    noise = np.random.default_rng(50 + seed).standard_normal(len(raw) // 4).astype("<f4")
    tensors[name] = (dtype, shape, (np.frombuffer(raw, "<f4") + noise / 20).tobytes())


def write_foreign(work: Path) -> None:
    """What somebody keeps beside the outputs, under names that look like loratool's."""
    work.mkdir(exist_ok=True)
    (work / "notes.txt").write_text("mine")
    (work / "out.txt").write_text("mine too")
    (work / "out.loratool").mkdir()
    (work / "out.loratool" / "model.safetensors").write_bytes(b"mine as well")
    (work / "all").mkdir()
    (work / "all" / "readme.md").write_text("about my adapters")


def write_cache(home: Path, adapter: Path) -> None:
    """A Hub cache with two commits of two repositories, as the Hub's client lays it out."""
    for name, folders in (("style", ("",)), ("loras", ("ink/", "sql/"))):
        write_repo(home / "hub" / f"models--me--{name}", adapter, folders)


def write_repo(repo: Path, adapter: Path, folders: Sequence[str]) -> None:
    for number, revision in enumerate(("v1", "main")):
        commit = str(number + 1) * 40
        ref = repo / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        snapshot = repo / "snapshots" / commit
        for place, path in product(folders, sorted(adapter.iterdir())):
            link = snapshot / place / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes()
            if path.suffix == ".json":  # another commit has another configuration
                data = json.dumps(json.loads(data) | {"lora_alpha": 5 + number}).encode()
            blob = repo / "blobs" / hashlib.sha256(data).hexdigest()
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(data)
            link.symlink_to(os.path.relpath(blob, link.parent))
