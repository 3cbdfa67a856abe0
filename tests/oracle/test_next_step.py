"""`check` names the command that mends an adapter, whenever there is one; typed, it works."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool import cli
from loratool.dialects.programs import programs
from tests.oracle.rule_samples import DATA, SAMPLES, llama, made_in
from tests.oracle.test_gguf import VALUES, factors, gguf
from tests.oracle.test_torchtune_litgpt import torchtune

PROGRAMS = [p.name for p in programs() if not p.is_of_images]
LLM = DATA / "llm"
BASE = LLM / "lora_linear" / "base"
METHODS = (
    "adalora", "boft", "c3a", "delora", "fourierft", "hira", "hra", "ia3", "ln_tuning", "loha",
    "lokr", "miss", "miss_bat", "oft", "randlora", "shira", "vblora", "vera", "vera_noproj",
    "trainable_tokens", "lora_trainable_tokens",
)  # fmt: skip
OTHER_BASES = ("router", "shared experts", "layers beside experts", "a state-space model")
WITH_FILES = ("a value head", "adapterhub")
FILES = ("mlx", "mlx dora", "gguf", "gguf with norms", "peft-file", "adapterhub", "torchtune")
Case = tuple[Path, Path, dict[str, Any]]


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("next")
    llama().save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def sample(top: Path) -> Any:
    """(adapter, base, options of ``check``) by name, each made once."""
    get, made = made_in(top / "rules"), dict[str, Case]()
    (top / "rules").mkdir()

    def case(name: str) -> Case:
        if name in SAMPLES:
            source = SAMPLES[name].source
            base = DATA / source / "base" if isinstance(source, str) else top / "base"
            return get(name), base, SAMPLES[name].read
        if name in METHODS:
            own = LLM / name / "base"
            return bare(name, top), own if own.exists() else LLM / "loha" / "base", {}
        return file_of(name, top)

    return lambda name: made[name] if name in made else made.setdefault(name, case(name))


def bare(name: str, top: Path) -> Path:
    folder = top / name
    folder.mkdir()
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(LLM / name / part, folder)
    return folder


def file_of(name: str, top: Path) -> Case:
    """An adapter in another dialect than PEFT's."""
    if name == "mlx":
        return LLM / "mlx_lora", BASE, {}
    if name == "mlx dora":
        lt.convert([LLM / "lora_dora"], to="mlx", output=top / name)
        return top / name, BASE, {}
    if name == "adapterhub":
        return DATA / "adapterhub", DATA / "adapterhub" / "base", {}
    if name.startswith("gguf"):
        path = top / f"{name}.gguf"
        if name == "gguf":
            lt.convert([LLM / "lora_linear"], to="gguf", base=BASE, output=path)
        else:  # as mergekit writes them
            norm = {"blk.0.attn_norm.weight": np.ones(16, "f4")}
            gguf(path, VALUES | {"general.architecture": "llama"}, factors() | norm)
        return path, BASE, {}
    path = top / f"{name}.safetensors"
    if name == "torchtune":
        save_file(torchtune(), str(path))
    else:
        shutil.copy(LLM / "lora_linear" / "adapter_model.safetensors", path)
    return path, BASE, {"alpha": 8.0}


def weights(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {key: array for file in files for key, array in load_file(str(file)).items()}


@pytest.mark.thin(6)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", [*SAMPLES, *METHODS, *FILES])
def test_what_is_named_works_and_nothing_else_would(
    name: str, program: str, sample: Any, tmp_path: Path
) -> None:
    """Typed with the base for BASE: it loads, and merges to the same, but for what is left out."""
    source, base, read = sample(name)
    report = lt.check(source, program=program, **read)
    out = tmp_path / "out"
    if report.verdict == "yes":
        assert not report.next
        return
    if not report.next:
        for more in ({}, {"base": base}) if report.verdict != "unsure" and base.exists() else ():
            with pytest.raises(lt.LoratoolError):
                lt.check(source, program=program, fix=True, output=out, **more, **read)
        return
    words = [word.replace("OUT", str(out)).replace("BASE", str(base))
             for word in shlex.split(report.next)]  # fmt: skip
    assert words[0] == "loratool" and cli.run(words[1:]) == 0
    made = Path(words[-1])
    again = lt.check(made, program=program)
    assert again.ok and again.counts.get("raises", 0) == again.counts.get("dropped", 0) == 0
    if "compress" in words or not base.exists() or name in (*OTHER_BASES, *WITH_FILES):
        return  # what is cut; not of this base; a merge wants to be told of that file
    fix = {"program": program, "fix": True, "dry_run": True, "base": base, **read}
    if lt.check(source, output=tmp_path / made.name.replace("out", "2"), **fix).warnings:
        return  # something has no place there, which is said
    for path, folder, more in ((source, "a", read), (made, "b", {})):
        lt.merge([path], base=base, output=tmp_path / folder, **more)
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert one.keys() == other.keys()
    for key, array in one.items():  # W' - W of full rank is as long as W, in float32 factors
        limit = 2.0**-18 * max(1.0, float(np.abs(array).max()))
        assert np.abs(array - other[key]).max() <= limit, key
