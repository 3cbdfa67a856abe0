"""What `inspect` says, without torch: from the neutral form and from crafted files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from loratool.adapter import Adapter, DeltaSpec, Replacement, TensorRef
from loratool.dialects import open_adapter
from loratool.dialects.programs import judge_loads
from loratool.errors import BadFileError, LoratoolError, MismatchError
from loratool.frozen import replace
from loratool.ops.adapter_summary import format_ranges, summarize_adapter
from loratool.ops.summary import summarize
from tests.make import randn, random_factors, save_adapter, save_checkpoint


def ref(name: str, *shape: int, dtype: str = "F32") -> TensorRef:
    size = {"F32": 4, "BF16": 2}[dtype] * math.prod(shape)
    return TensorRef(Path("adapter_model.safetensors"), name, dtype, shape, 0, size)


def spec(module: str, rank: int = 8, alpha: float = 16, **changes: object) -> DeltaSpec:
    fields = {"lora_A": ref(f"{module}.A", rank, 32), "lora_B": ref(f"{module}.B", 64, rank)}
    one = DeltaSpec("lowrank", module, "weight", fields, "linear", rank, alpha, alpha / rank)
    return replace(one, **changes)  # type: ignore[arg-type]


def adapter(*specs: DeltaSpec, **changes: object) -> Adapter:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM",
              "target_modules": ["q_proj", "v_proj"]}  # fmt: skip
    one = Adapter(Path("style"), "peft", specs, config=config)
    return replace(one, **changes)  # type: ignore[arg-type]


def with_config(one: Adapter, **settings: object) -> Adapter:
    return replace(one, config={**one.config, **settings})


LAYERS = tuple(
    spec(f"model.layers.{i}.self_attn.{n}") for i in range(4) for n in ("q_proj", "v_proj")
)


def verdicts(one: Adapter) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {found.program: (found.verdict, found.reasons) for found in judge_loads(one)}


def test_ranges() -> None:
    assert format_ranges({0, 1, 2, 3, 5, 7, 8}) == "0-3,5,7-8"
    assert format_ranges([]) == "" and format_ranges([4]) == "4"


def test_counts() -> None:
    found = summarize_adapter(adapter(*LAYERS))
    assert found.modules == 8 and found.ranks == {8: 8}
    assert found.alphas == {"16": 8} and found.scalings == {"2": 8}
    assert found.factor_parameters == 8 * (8 * 32 + 64 * 8)
    assert found.factor_bytes == 4 * found.factor_parameters and found.nbytes == found.factor_bytes
    assert [(f.name, f.modules, f.layers) for f in found.families] == [
        ("q_proj", 4, "0-3"), ("v_proj", 4, "0-3"),
    ]  # fmt: skip
    assert found.dtypes == {"float32": found.nbytes}


def test_a_tensor_in_two_specs_counts_once() -> None:
    one = spec("experts", parameter="gate_up_proj")
    found = summarize_adapter(adapter(one, replace(one, parameter="down_proj")))
    assert found.factor_parameters == 8 * 32 + 64 * 8
    assert [f.name for f in found.families] == ["experts.gate_up_proj", "experts.down_proj"]


def test_replaced_tensors_are_sorted_by_cost() -> None:
    head = Replacement("lm_head.weight", ref("h", 1000, 64, dtype="BF16"), "modules_to_save")
    norm = Replacement("norm.weight", ref("n", 64), "modules_to_save")
    rows = Replacement("embed.weight", ref("t", 3, 64), "trainable_tokens", rows=(5, 9, 11))
    found = summarize_adapter(adapter(*LAYERS, replacements=(norm, head, rows)))
    assert [(t.name, t.nbytes, t.rows) for t in found.replaced] == [
        ("lm_head.weight", 128_000, None), ("embed.weight", 768, 3), ("norm.weight", 256, None),
    ]  # fmt: skip
    assert found.replaced_parameters == 64_000 + 64 + 192
    assert list(found.dtypes) == ["bfloat16", "float32"]


# -------------------------------------------------------------------------- which programs


def test_a_plain_adapter_loads_everywhere() -> None:
    assert set(verdicts(adapter(*LAYERS)).values()) == {("yes", ())}


def test_high_rank_needs_an_option_of_vllm() -> None:
    specs = tuple(spec(s.module, 64, 128) for s in LAYERS)
    one = with_config(adapter(*specs), r=64, lora_alpha=128)
    assert verdicts(one)["vLLM"] == ("yes", ("--max-lora-rank 64",))


def test_rslora() -> None:
    specs = tuple(replace(s, scaling=16 / math.sqrt(8)) for s in LAYERS)
    found = verdicts(with_config(adapter(*specs), use_rslora=True))
    assert found["vLLM"][0] == "yes"
    assert found["llama.cpp"] == ("wrong", ("ignores rsLoRA",))


def test_alpha_pattern() -> None:
    specs = (*LAYERS[1:], spec("model.layers.0.self_attn.q_proj", alpha=32))
    found = verdicts(with_config(adapter(*specs), alpha_pattern={"0.self_attn.q_proj": 32}))
    assert found["llama.cpp"] == ("wrong", ("ignores alpha_pattern",))
    assert found["vLLM"] == ("unsure", ("ignores alpha_pattern before 0.32",))


def test_rank_pattern_is_right_in_llama_cpp_and_in_new_releases_of_vllm() -> None:
    specs = (*LAYERS[1:], spec("model.layers.0.self_attn.q_proj", rank=4))
    found = verdicts(with_config(adapter(*specs), rank_pattern={"0.self_attn.q_proj": 4}))
    assert found["vLLM"] == ("unsure", ("ignores rank_pattern before 0.32",))
    assert found["llama.cpp"] == ("yes", ())


@pytest.mark.parametrize("origin", ["modules_to_save", "bias", "trainable_tokens"])
def test_replacements_are_refused(origin: str) -> None:
    one = adapter(*LAYERS, replacements=(Replacement("x.weight", ref("x", 4), origin),))
    found = verdicts(one)
    assert found["PEFT"][0] == "yes"
    assert found["vLLM"] == found["llama.cpp"] == ("no", (origin,))


def test_copies_of_embeddings_are_passed_by() -> None:
    copy = Replacement("model.embed_tokens.weight", ref("x", 4, 4), "base_layer")
    found = verdicts(adapter(*LAYERS, replacements=(copy,)))
    assert found["PEFT"][0] == "yes"
    assert found["vLLM"] == found["llama.cpp"] == ("unsure", ("saved embeddings",))


def test_dora_and_mutated_bases() -> None:
    dora = adapter(replace(LAYERS[0], kind="dora"))
    assert verdicts(dora)["vLLM"] == ("no", ("DoRA",))
    assert summarize_adapter(dora).method == "DoRA"
    pissa = adapter(replace(LAYERS[0], base_change="pissa"))
    assert verdicts(pissa)["llama.cpp"] == ("wrong", ("pissa changes the base",))
    assert verdicts(pissa)["vLLM"] == ("no", ("pissa changes the base",))
    assert summarize_adapter(pissa).method == "LoRA (pissa)"


def test_unusual_shapes_and_tasks() -> None:
    assert verdicts(adapter(replace(LAYERS[0], layout="conv")))["vLLM"][0] == "no"
    assert verdicts(adapter(replace(LAYERS[0], layout="experts")))["vLLM"][0] == "unsure"
    task = with_config(adapter(*LAYERS), task_type="FEATURE_EXTRACTION")
    assert verdicts(task)["llama.cpp"] == ("unsure", ("task FEATURE_EXTRACTION",))


def test_other_dialects() -> None:
    sample = Path(__file__).parents[1] / "data" / "llm" / "gguf_lora"
    found = verdicts(open_adapter(sample))
    assert found["llama.cpp"] == ("yes", ()) and found["PEFT"] == ("no", ("gguf file",))
    found = verdicts(adapter(*LAYERS, dialect="peft-file"))
    assert set(found.values()) == {("no", ("no adapter_config.json",))}


# ---------------------------------------------------------------------------------- files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One adapter, one checkpoint, one damaged file, one file that is nothing."""
    factors = random_factors({"layers.0.q_proj": (6, 4), "layers.1.q_proj": (6, 4)}, rank=2, seed=1)
    save_adapter(tmp_path / "good", factors, alpha=4, base_model_name_or_path="me/base")
    save_checkpoint(tmp_path / "base", {"layers.0.q_proj.weight": randn(6, 4, seed=2)}, shards=1)
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_adapter_folder(folder: Path) -> None:
    found = summarize(folder / "good", tensors=True)
    assert found.what == "adapter" and found.adapter is not None
    assert found.adapter.base_model == "me/base" and found.adapter.scalings == {"2": 2}
    assert len(found.tensors) == 4 and sum(t.nbytes for t in found.tensors) == found.adapter.nbytes
    assert found.next is not None and found.next.startswith("loratool merge ")
    json.dumps(found.to_json(), allow_nan=False)


def test_every_tensor_of_a_file_is_listed() -> None:
    """Alphas, shapes and what is passed on too, in the file's order."""
    files = sorted((Path(__file__).parents[1] / "data").glob("*/*/adapter*.safetensors"))
    assert len(files) > 60
    for path in files:
        with safe_open(path, "np") as file:
            names = set(file.keys())
        found = [row.name for row in summarize(path, tensors=True).tensors]
        assert set(found) == names and len(found) == len(names), path


def test_a_hostile_base_name_is_not_offered_as_a_command(tmp_path: Path) -> None:
    factors = random_factors({"q_proj": (6, 4)}, rank=2, seed=1)
    path = save_adapter(tmp_path / "a", factors, base_model_name_or_path="x; rm -rf ~")
    found = summarize(path)
    assert found.next is not None and "rm" not in found.next and "--base BASE" in found.next


def test_checkpoint(folder: Path) -> None:
    found = summarize(folder / "base", tensors=True)
    assert found.what == "checkpoint" and found.checkpoint is not None
    assert (found.checkpoint.tensors, found.checkpoint.parameters) == (1, 24)
    assert summarize(folder / "base" / "model.safetensors").what == "checkpoint"


def test_adapter_config_in_a_checkpoint_is_told(folder: Path) -> None:
    (folder / "base" / "adapter_config.json").write_text("{}")
    found = summarize(folder / "base")
    assert found.what == "checkpoint" and "adapter_config.json" in found.warnings[0]


def test_a_recognised_dialect_that_is_not_read_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file({"lora_controlnet": randn(1, seed=1),
               "input_blocks.0.0.weight": randn(6, 2, seed=2)}, str(path))  # fmt: skip
    with pytest.raises(MismatchError, match="Control-LoRA"):
        summarize(path)


def test_file_without_configuration_needs_alpha(folder: Path) -> None:
    file = (folder / "good" / "adapter_model.safetensors").rename(folder / "x.safetensors")
    with pytest.raises(LoratoolError, match="alpha"):
        summarize(file)
    found = summarize(file, alpha=4)
    assert found.adapter is not None and found.adapter.scalings == {"2": 2}


def test_folder_gives_rows_and_errors(folder: Path) -> None:
    found = summarize(folder)
    assert found.what == "folder"
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {"good", "base", "bad.safetensors"}
    assert rows["good"].adapter is not None and rows["base"].checkpoint is not None
    assert rows["bad.safetensors"].error is not None
    assert rows["bad.safetensors"].error["exit_code"] == 3


def test_folder_with_nothing(folder: Path) -> None:
    with pytest.raises(BadFileError):
        summarize(folder / "empty")
