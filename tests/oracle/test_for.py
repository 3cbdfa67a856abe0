"""``--for``: one file that servers and PEFT read as the same ΔW."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool import cli
from loratool.dialects import open_adapter
from loratool.dialects.programs import find_program
from loratool.errors import LoratoolError, MismatchError, UsageError
from tests.oracle.in_peft import (
    Tensors,
    changes,
    config_of,
    distance,
    load_strict,
    make,
    save_base,
)
from tests.oracle.test_loads import LLM, SAMPLES, as_vllm_reads, llama, model_of, verdict

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PROGRAMS = ("peft", "vllm", "llama.cpp")
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other targets": {"r": 8, "target_modules": ["v_proj", "down_proj"]},
    "uneven": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3},
               "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"use_rslora": True, "r": 3, "lora_alpha": 5},
    "a target as a pattern": {"target_modules": r".*layers\.1\..*_proj"},
    "one layer": {"layers_to_transform": [1]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"], "r": 6},
}  # fmt: skip
Write = Callable[..., Any]
WRITERS: dict[str, Write] = {
    "merge": lambda a, o, **k: lt.merge([f"{a}:0.7", f"{a}:0.3"], output=o, **k),
    "merge by rank": lambda a, o, **k: lt.merge([f"{a}:0.7", f"{a}:0.3"], rank=8, output=o, **k),
    "merge one": lambda a, o, **k: lt.merge([str(a)], method="cat", output=o, **k),
    "subtract": lambda a, o, **k: lt.subtract([str(a), f"{a}:-0.5"], output=o, **k),
    "rescale": lambda a, o, **k: lt.rescale([str(a)], 1.5, output=o, **k),
    "rescale one": lambda a, o, **k: lt.rescale([str(a)], 1, output=o, **k),
    "rescale parts": lambda a, o, **k: lt.rescale([str(a)], 1, only=["rs.0=0.3"], output=o, **k),
    "compress": lambda a, o, **k: lt.compress(a, rank=2, output=o, **k),
    "compress nothing": lambda a, o, **k: lt.compress(a, rank=64, output=o, **k),
    "compress by energy": lambda a, o, **k: lt.compress(a, energy=0.9, output=o, **k),
}  # fmt: skip
EXACT = ("merge", "merge by rank", "merge one", "rescale one", "compress nothing")


def is_uniform(folder: Path) -> bool:
    """One rank in the file, and a configuration without patterns."""
    config = config_of(folder)
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    ranks = {v.shape[0] for k, v in tensors.items() if "lora_A." in k or "embedding_A" in k}
    plain = not (config.get("rank_pattern") or config.get("alpha_pattern"))
    return plain and not config.get("use_rslora") and ranks == {config["r"]}


@pytest.fixture(scope="module")
def of_form(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Tensors]]:
    """An adapter of a form, in all layers or not, and its ΔW; each is made once."""

    @functools.cache
    def made(form: str, in_all: bool) -> tuple[Path, Tensors]:
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **FORMS[form]}
        settings |= {"target_modules": ["k_proj"], "layers_to_transform": None} if in_all else {}
        a = make(llama(), tmp_path_factory.mktemp("form") / "a", peft.LoraConfig(**settings))
        return a, changes(llama(), a)

    return made


@pytest.mark.thin(3)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("form", FORMS)
def test_one_file_for_all(
    form: str, writer: str, program: str, tmp_path: Path, of_form: Callable[..., Any]
) -> None:
    """The same ΔW in PEFT and in what reads one scaling; nothing is lost that stays without it."""
    in_all = writer == "rescale parts" and form in ("one layer", "a target as a pattern")
    a, of_a = of_form(form, in_all)
    if form == "embeddings" and writer == "subtract":
        return  # PEFT stores the base's embeddings beside such factors, and they have no difference
    out = tmp_path / "out"
    WRITERS[writer](a, out, program=program)
    assert is_uniform(out)
    assert verdict(out, find_program(program).title).verdict in (
        ("yes", "unsure") if form == "embeddings" else ("yes",)
    )
    found = changes(llama(), out)
    if form != "embeddings":
        for module, delta in as_vllm_reads(out).items():
            assert torch.allclose(delta, found[f"{module}.weight"], rtol=0, atol=1e-12)
    if writer in EXACT:
        assert distance(found, of_a) < 1e-6
    else:
        WRITERS[writer](a, tmp_path / "plain")
        limit = 1e-6 if "compress" not in writer else 1.0
        assert distance(found, changes(llama(), tmp_path / "plain")) < limit


def test_compressed_for_a_server_loses_no_more(tmp_path: Path) -> None:
    """One rank for all is the largest that any module needs; no module keeps less."""
    settings = {"rank_pattern": {"q_proj": 6}, "target_modules": ["q_proj", "v_proj"]}
    a = make(llama(), tmp_path / "a", peft.LoraConfig(r=8, **settings))
    plain = lt.compress(a, energy=0.8, output=tmp_path / "plain").adapters[0]
    even = lt.compress(a, energy=0.8, output=tmp_path / "even", program="vllm").adapters[0]
    assert even.relative_error <= plain.relative_error
    assert max(m.rank for m in even.modules) == max(m.rank for m in plain.modules)


@pytest.mark.parametrize("size", [6_000, 9_000, 14_000])
def test_a_size_counts_the_zeros(size: int, tmp_path: Path) -> None:
    settings = {"rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    a = make(llama(), tmp_path / "a", peft.LoraConfig(r=8, **settings))
    lt.compress(a, size=size, output=tmp_path / "out", program="vllm")
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size <= size
    assert is_uniform(tmp_path / "out")


def tuned(folder: Path, *, biases: bool = False) -> tuple[Path, Path]:
    """A base and a fine-tune whose changes have different ranks."""
    torch.manual_seed(3)
    model = llama()
    base = save_base(model, folder / "base")
    with torch.no_grad():
        for number, (name, p) in enumerate(model.named_parameters()):
            if name.endswith("_proj.weight"):
                left = torch.randn(p.shape[0], 1 + number % 4)
                p += left @ torch.randn(1 + number % 4, p.shape[1]) * 0.01
            elif biases and p.dim() == 1:
                p += 0.1
    return base, save_base(model, folder / "tuned")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("rule", [{"rank": 3}, {"error": 1e-4}, {"size": 40_000}])
def test_extracts_for_all(rule: dict[str, Any], program: str, tmp_path: Path) -> None:
    base, tune = tuned(tmp_path)
    out = tmp_path / "out"
    lt.extract(tune, base=base, output=out, program=program, **rule)
    assert is_uniform(out) and verdict(out, find_program(program).title).verdict == "yes"
    found = changes(llama(), out)
    for module, delta in as_vllm_reads(out).items():
        assert torch.allclose(delta, found[f"{module}.weight"], rtol=0, atol=1e-12)
    if "size" in rule:
        assert (out / "adapter_model.safetensors").stat().st_size <= rule["size"]
    else:
        lt.extract(tune, base=base, output=tmp_path / "plain", **rule)
        assert distance(found, changes(llama(), tmp_path / "plain")) < 1e-6


def test_an_extract_for_a_server_leaves_norms_out_and_says_so(tmp_path: Path) -> None:
    base, tune = tuned(tmp_path, biases=True)
    report = lt.extract(tune, base=base, output=tmp_path / "out", rank=4, program="vllm")
    assert not report.kept and any("norm" in name for name, *_ in report.left_out)
    lt.extract(tune, base=base, output=tmp_path / "held", rank=4, program="peft")
    assert "norm" in str(config_of(tmp_path / "held")["modules_to_save"])
    with pytest.raises(UsageError, match="stored whole") as caught:
        lt.extract(tune, base=base, output=tmp_path / "no", keep=["all"], program="vllm")
    assert caught.value.code == "LT-272" and not (tmp_path / "no").exists()


def test_what_a_server_cannot_hold_is_said(tmp_path: Path) -> None:
    """A trained head is left out, aloud; PEFT keeps it."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    a = make(llama(), tmp_path / "a", config)
    for program in ("vllm", "llama.cpp"):
        report = lt.rescale([str(a)], 1, output=tmp_path / program, program=program)
        assert "lm_head.weight" in report.adapters[0].warnings[0]
        assert "lm_head" not in str(
            load_file(str(tmp_path / program / "adapter_model.safetensors"))
        )
    report = lt.rescale([str(a)], 1, output=tmp_path / "peft", program="peft")
    assert not report.adapters[0].warnings
    assert distance(changes(llama(), tmp_path / "peft"), changes(llama(), a)) == 0


@pytest.mark.parametrize("name", ["compiled", "parallel", "bare"])
def test_names_live(name: str, tmp_path: Path) -> None:
    from tests.oracle.test_loads import NAMES

    a = make(llama(), tmp_path / "a", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    want, file = changes(llama(), a), a / "adapter_model.safetensors"
    save_file({NAMES[name](k): v for k, v in load_file(str(file)).items()}, str(file))
    lt.rescale([str(a)], 1, output=tmp_path / "out", program="vllm")
    assert distance(changes(llama(), tmp_path / "out"), want) == 0


# PEFT merges no aLoRA, takes no float64 for what starts from a changed base, and loads half of the
# attention module; experts by number and those of older versions it packs in its own way.
NO_ORACLE = (
    "lora_alora", "lora_mica", "lora_olora", "lora_pissa", "lora_mha_outproj_only",
    "lora_mixtral_v4style", "lora_qwen3moe_v4style", "lora_target_params_mixtral_peft018",
    "lora_target_params_qwen3moe_peft018",
)  # fmt: skip


@pytest.mark.parametrize("name", ["lora_alora", "lora_mica", "lora_olora", "lora_pissa"])
def test_what_no_new_configuration_can_say_stays_or_is_refused(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lt.rescale([str(LLM / name)], 1, output=out, program="peft")
    assert config_of(out) == config_of(LLM / name)
    if name != "lora_mica":  # whose ΔW is that of its factors
        with pytest.raises(LoratoolError):
            lt.rescale(
                [str(LLM / name)], 1, only=["v_proj=2"], output=tmp_path / "no", program="peft"
            )


@pytest.mark.thin(3)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_end_in_a_form_or_a_code(name: str, program: str, tmp_path: Path) -> None:
    """Never a file that the program does not load; where PEFT loads it, the same change."""
    out = tmp_path / "out"
    try:
        report = lt.rescale([str(LLM / name)], 1, output=out, program=program)
    except LoratoolError as error:
        assert error.code.startswith("LT-") and not out.exists()
        return
    assert verdict(out, find_program(program).title).verdict in ("yes", "unsure")
    if report.adapters[0].warnings or name in NO_ORACLE:
        return
    model = model_of(LLM / name)
    assert distance(changes(model, out), changes(model, LLM / name, strict=False)) < 1e-6


def test_halves_are_rounded_once_and_it_is_said(tmp_path: Path) -> None:
    """bfloat16 factors whose scaling is no power of two; powers of two lose nothing."""
    settings = {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 7}}
    a = make(llama(), tmp_path / "a", peft.LoraConfig(r=4, lora_alpha=4, **settings))
    file = a / "adapter_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(str(file)).items()}, str(file))
    for lost, alpha in ((True, 7), (False, 8)):
        config = config_of(a) | {"alpha_pattern": {"v_proj": alpha}}
        (a / "adapter_config.json").write_text(json.dumps(config))
        out = tmp_path / f"{alpha}"
        found = lt.rescale([str(a)], 1, output=out, program="vllm").adapters[0]
        assert found.dtype == "bfloat16" and (found.relative_error > 0) is lost
        assert found.relative_error < 2**-8
        off = distance(changes(llama(), out), changes(llama(), a))
        assert (off > 0) is lost and off < 2**-7


@pytest.mark.parametrize("program", ["vllm", "llama.cpp"])
@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"layer_replication": [[0, 2], [1, 2]]}],
)
def test_what_no_form_mends_is_refused_before_any_work(
    settings: dict[str, Any], program: str, tmp_path: Path
) -> None:
    a = make(llama(), tmp_path / "a", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    config = config_of(a) | settings
    (a / "adapter_config.json").write_text(json.dumps(config))
    if settings.get("use_dora"):
        file = a / "adapter_model.safetensors"
        tensors = load_file(str(file))
        more = {k.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)
                for k in tensors if "lora_A" in k}  # fmt: skip
        save_file(tensors | more, str(file))
    for dry_run in (True, False):
        with pytest.raises(MismatchError) as caught:
            lt.rescale([str(a)], 1, output=tmp_path / "no", program=program, dry_run=dry_run)
        assert caught.value.code == "LT-488" and not (tmp_path / "no").exists()


def test_a_rank_that_vllm_has_no_room_for(tmp_path: Path) -> None:
    """The hint is a command that works."""
    a = make(llama(), tmp_path / "a", peft.LoraConfig(r=300, target_modules=["q_proj"]))
    with pytest.raises(MismatchError) as caught:
        lt.merge([f"{a}:0.7", f"{a}:0.3"], output=tmp_path / "no", program="vllm")
    assert caught.value.code == "LT-489" and not (tmp_path / "no").exists()
    words = str(caught.value.hint).replace("ADAPTER", str(a)).replace("OUT", str(tmp_path / "o"))
    assert cli.run(words.split()[1:]) == 0
    load_strict(llama(), tmp_path / "o")


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    a = make(llama(), tmp_path / "a", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    base, out = save_base(llama(), tmp_path / "base"), tmp_path / "out"
    for call, code in (
        (lambda: lt.merge([str(a)], base=base, output=out, program="vllm"), "LT-286"),
        (lambda: lt.subtract([str(a)], merged=base, output=out, program="vllm"), "LT-298"),
        (lambda: lt.rescale([str(a)], 1, output=out, program="tgi"), "LT-271"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.code == code and not out.exists()


def test_the_same_from_a_recipe_and_in_the_record(tmp_path: Path) -> None:
    a = make(llama(), tmp_path / "a", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    out = tmp_path / "out"
    (tmp_path / "r.yaml").write_text(
        f"steps:\n- compress: {{adapters: ['{a}'], rank: 2, for: vllm, output: '{out}'}}\n"
    )
    assert cli.run(["run", str(tmp_path / "r.yaml")]) == 0
    assert json.loads((out / "loratool.json").read_text())["options"]["for"] == "vllm"
    assert open_adapter(out).specs
