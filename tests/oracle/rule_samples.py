"""A failing adapter for every rule of the programs that load PEFT's folders; `plain` passes all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.oracle.in_peft import Tensors, make

DATA = Path(__file__).parents[1] / "data"
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
Change = Callable[[dict[str, Any], Tensors], tuple[dict[str, Any], Tensors]]
"""What is done to a configuration and to the tensors."""


def llama(**changes: int) -> Any:
    """A model small enough for every program, with heads as vLLM and llama.cpp compute them."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        **{**sizes, **changes}, max_position_embeddings=128, tie_word_embeddings=False
    )
    return transformers.LlamaForCausalLM(config).eval()


class Sample(NamedTuple):
    """One adapter that some programs do not load right.

    Attributes:
        rules: program -> the rules that say so.
        source: settings of PEFT for an adapter of `llama`, or a file or folder of ``tests/data``.
        change: of that adapter.
        beside: a file that lies in its folder too.
        read: options of ``check``.
    """

    rules: dict[str, tuple[str, ...]]
    source: dict[str, Any] | str
    change: Change | None = None
    beside: str = ""
    read: dict[str, Any] = MappingProxyType({})  # type: ignore[assignment]


def by(**rules: str) -> dict[str, tuple[str, ...]]:
    """Program -> rules, from words; ``llama`` is llama.cpp."""
    return {k.replace("llama", "llama.cpp"): tuple(v.split()) for k, v in rules.items()}


def told(**entries: Any) -> Change:
    """Other entries of the configuration; ... takes one away."""

    def change(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
        new = config | entries
        return {key: value for key, value in new.items() if value is not ...}, tensors

    return change


def named(name: Callable[[str], str]) -> Change:
    """Other names of tensors."""
    return lambda config, tensors: (config, {name(key): value for key, value in tensors.items()})


def beside(**tensors: torch.Tensor) -> Change:
    """One more tensor of every module with factors, by the end of its name."""

    def change(config: dict[str, Any], found: Tensors) -> tuple[dict[str, Any], Tensors]:
        stems = [key.removesuffix("lora_A.weight") for key in found if key.endswith("A.weight")]
        more = {f"{s}{end}": value.clone() for s in stems for end, value in tensors.items()}
        return config, found | more

    return change


def _grouped(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """QA-LoRA: each column of A stands for 16 of the base."""
    new = {k: v[:, ::16].contiguous() if "lora_A" in k else v for k, v in tensors.items()}
    return config | {"use_qalora": True, "qalora_group_size": 16}, new


PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
INSIDE = named(lambda key: key.replace("base_model.model.", "base_model.model.layers.0."))
SAMPLES: dict[str, Sample] = {
    "a file": Sample(
        by(peft="peft-folder", vllm="peft-folder", sglang="peft-folder", llama="peft-folder"),
        "diffusion/kohya_sd15_locon/adapter.safetensors",
    ),
    "loha": Sample(by(vllm="method", sglang="method", llama="method"), "llm/loha"),
    "no targets": Sample(by(vllm="config", sglang="config"), {}, told(target_modules=...)),
    "compiled": Sample(by(peft="names", vllm="prefixes", llama="names"), {},
                       named(lambda key: "_orig_mod." + key)),
    "named": Sample(by(peft="names", vllm="names", llama="names"), {},
                    named(lambda key: key.replace(".weight", ".first.weight"))),
    "trained head": Sample(
        by(vllm="whole-tensors", sglang="whole-tables", llama="whole-tensors"),
        {"modules_to_save": ["lm_head"]},
    ),
    "trained norms": Sample(by(vllm="whole-tensors", sglang="whole-tensors", llama="norms"),
                            {"modules_to_save": ["input_layernorm"]}),
    "a trained score": Sample(by(vllm="classifier"),
                              {"modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"},
                              named(lambda key: key.replace("lm_head", "score"))),
    "a list": Sample(by(vllm="options"), {}, told(modules_to_save=["lm_head"])),
    "biases": Sample(by(vllm="whole-tensors", sglang="whole-tensors", llama="whole-tensors"),
                     "llm/lora_bias_all"),
    "no biases": Sample(by(vllm="options"), {"bias": "all"}),
    "dora": Sample(by(vllm="dora", sglang="dora", llama="dora"), {"use_dora": True}),
    "lora_bias": Sample(by(vllm="lora-bias", sglang="lora-bias", llama="lora-bias"),
                        "llm/lora_lora_bias"),
    "pissa": Sample(by(vllm="base-changes", sglang="base-changes", llama="base-changes"), {},
                    told(init_lora_weights="pissa")),
    "kasa": Sample(by(vllm="base-changes", sglang="diagonal", llama="diagonal"), "llm/lora_kasa"),
    "replicated": Sample(by(vllm="layers", sglang="layers", llama="layers"),
                         "llm/lora_layer_replication"),
    "blocks": Sample(by(vllm="blocks", sglang="blocks", llama="blocks"), "llm/lora_bdlora"),
    "alora": Sample(by(vllm="alora", sglang="alora"), "llm/lora_alora"),
    "qalora": Sample(by(vllm="qalora", sglang="qalora", llama="qalora"), {}, _grouped),
    "convolution": Sample(by(vllm="conv", sglang="conv", llama="conv"), "llm/lora_conv", INSIDE),
    "a lone convolution": Sample(by(peft="convolutions", sglang="elsewhere"),
                                 "llm/lora_conv_grouped", told(auto_mapping=None, task_type=None)),
    "attention": Sample(by(vllm="attention", sglang="attention", llama="attention"),
                        "llm/lora_mha", INSIDE),
    "state of training": Sample(by(vllm="leftovers", sglang="leftovers", llama="leftovers"), {},
                                beside(lora_velora_embed=torch.ones(3))),
    "high rank": Sample(by(vllm="rank"), {"r": 513, "target_modules": ["down_proj"]}),
    "alphas": Sample(by(vllm="scaling", sglang="overrides", llama="scaling"),
                     {"alpha_pattern": {"v_proj": 3}}),
    "ranks": Sample(by(vllm="scaling", sglang="overrides"), {"rank_pattern": {"q_proj": 2}}),
    "rslora": Sample(by(sglang="scaling", llama="scaling"), {"use_rslora": True}),
    "a pattern": Sample(by(peft="patterns", sglang="targets"),
                        {"target_modules": r".*layers\.\d+\..*[qkv]_proj"}),
    "saved embeddings": Sample(
        by(vllm="saved-embeddings embeddings", sglang="saved-embeddings",
           llama="saved-embeddings head"), "llm/lora_embed_untied",
    ),
    "experts": Sample(by(vllm="experts", sglang="experts", llama="experts"),
                      "llm/lora_target_params_mixtral"),
    "old experts": Sample(by(peft="packing"), "llm/lora_target_params_mixtral_peft018"),
    "numbered experts": Sample(
        by(peft="numbered-experts", vllm="numbered-experts", sglang="numbered-experts",
           llama="numbered-experts"), "llm/lora_mixtral_v4style",
    ),
    "shared experts": Sample(by(peft="shared-experts"), {},
                             named(lambda key: key.replace("mlp.", "mlp.shared_experts."))),
    "layers beside experts": Sample(by(peft="shared-experts"), {}, named(
        lambda key: key.replace("self_attn.q_proj", "self_attn.kv_b_proj"))),
    "a state-space model": Sample(by(peft="mamba"), {}, named(
        lambda key: key.replace("self_attn.q_proj", "mixer.out_proj"))),
    "router": Sample(by(vllm="routers", sglang="others"), {},
                     named(lambda key: key.replace("mlp.down_proj", "mlp.gate"))),
    "conv1d": Sample(by(vllm="conv1d", sglang="elsewhere", llama="conv1d"),
                     "llm/lora_gpt2_conv1d"),
    "classifier": Sample(by(peft="head", vllm="task", sglang="task", llama="task"), {},
                         told(task_type="SEQ_CLS")),
    "saved, but not there": Sample(by(peft="saved"), {}, told(modules_to_save=["norm"])),
    "unnamed target": Sample(by(peft="targets", sglang="unnamed"), {},
                             told(target_modules=["v_proj"])),
    "parameters": Sample(by(peft="parameters"), "llm/lora_target_params_mixtral",
                         told(lora_dropout=0.1)),
    "another rank": Sample(by(peft="ranks"), {}, told(r=8), read={"rank_from": "file"}),
    "q alone": Sample(by(sglang="qkv"), {"target_modules": ["q_proj", "down_proj"]}),
    "v alone": Sample(by(sglang="qkv"), {"target_modules": ["v_proj"]}),
    "up alone": Sample(by(sglang="up-alone"), {"target_modules": ["up_proj"]}),
    "new tokens": Sample(by(sglang="added-tokens"), {}, beside="added_tokens.json"),
    "a value head": Sample(
        by(peft="files-beside", vllm="files-beside", sglang="files-beside", llama="files-beside"),
        {}, beside="value_head.safetensors",
    ),
}  # fmt: skip


def plain(folder: Path, **settings: Any) -> Path:
    """An adapter of `llama` by PEFT, with random values."""
    config = peft.LoraConfig(**{**PLAIN, "task_type": "CAUSAL_LM", **settings})
    return make(llama(), folder, config)


def written(name: str, folder: Path) -> Path:
    """A sample in a folder of its own; a file stays where it is."""
    source, change = SAMPLES[name].source, SAMPLES[name].change
    if isinstance(source, dict):
        plain(folder, **source)
    elif (DATA / source).is_file():
        return DATA / source
    else:
        ignore = shutil.ignore_patterns("base", "merged.safetensors")
        shutil.copytree(DATA / source, folder, ignore=ignore)
    if change is not None:
        config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        new, tensors = change(json.loads(config.read_text()), load_file(str(file)))
        config.write_text(json.dumps(new))
        file.unlink()
        save_file(tensors, str(file))
    if extra := SAMPLES[name].beside:
        save_file({"v_head.summary.weight": torch.ones(1, 64)}, str(folder / extra))
        if extra.endswith(".json"):
            (folder / extra).write_text('{"<new>": 64}')
    return folder


def made_in(root: Path) -> Callable[[str], Path]:
    """A sample by name, made once; "" = the adapter that passes every rule."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            path = root / str(len(made))
            made[name] = written(name, path) if name else plain(path)
        return made[name]

    return get
