"""Examples for clusters: what they type can be typed, and the slices of an array are the whole."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.cli.test_examples import EXAMPLES
from tests.make import random_factors, save_adapter

SHAPES = {"model.layers.0.self_attn.q_proj": (32, 32)}
CLUSTER = '"${cluster[@]}"', "--executor ray --ray-address HOST:6379"


def commands(name: str) -> list[list[str]]:
    """Every loratool command line of a file, with a word for each shell variable."""
    text = (EXAMPLES / name).read_text().replace(*CLUSTER)
    lines = re.findall(r"^ *(loratool .*?)(?: &&)?$", text, re.M)
    return [shlex.split(re.sub(r"\$(\{[^}]*\}|\w+)", "4", line)) for line in lines]


@pytest.mark.parametrize("name", ["ray_merge.sh", "slurm_array.sh", "hf_jobs.md"])
def test_commands_can_be_typed(name: str) -> None:
    found = commands(name)
    assert found
    for _, command, *words in found:
        module = import_module(f"loratool.cli.{command}")
        module.command.make_context(command, words)  # a wrong word raises


def run(script: str, *words: object, top: Path, **env: str) -> None:
    """A script, whose `loratool` is this one."""
    tools = top / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "loratool").write_text(f'#!/bin/sh\nexec {sys.executable} -m loratool "$@"\n')
    (tools / "loratool").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(EXAMPLES / script), *map(str, words)], capture_output=True, text=True,
        env={**os.environ, "PATH": path, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs bash")
def test_an_array_does_all_adapters_once(tmp_path: Path) -> None:
    """Five adapters, three tasks; and one more task than there are adapters."""
    names = [f"a{n}" for n in range(5)]
    for seed, name in enumerate(names):
        save_adapter(tmp_path / "in" / name, random_factors(SHAPES, rank=12, seed=seed))
    for task in range(3):
        run("slurm_array.sh", tmp_path / "in", tmp_path / "out", top=tmp_path,
            SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT="3")  # fmt: skip
    made = sorted(p.parent.name for p in tmp_path.glob("out/*/*/adapter_model.safetensors"))
    assert made == names
    run("slurm_array.sh", tmp_path / "in", tmp_path / "out", top=tmp_path,
        SLURM_ARRAY_TASK_ID="5", SLURM_ARRAY_TASK_COUNT="6")  # fmt: skip
    assert not (tmp_path / "out" / "5").exists()


def test_a_merge_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")
    from tests.make import randn, save_checkpoint

    save_checkpoint(
        tmp_path / "base", {f"{k}.weight": randn(*s, seed=1) for k, s in SHAPES.items()}
    )
    save_adapter(tmp_path / "a", random_factors(SHAPES, rank=4, seed=1))
    run("ray_merge.sh", tmp_path / "a", tmp_path / "base", tmp_path / "out", top=tmp_path)
    assert (tmp_path / "out" / "model.safetensors").exists()
