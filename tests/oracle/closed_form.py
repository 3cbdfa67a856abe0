"""What merging each sample should give, in float64, written apart from loratool's own code.

Works on in-memory names: the oracle says what the adapted model computes, not how it is stored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."


def read(path: Path) -> Tensors:
    return {k: v.double() if v.is_floating_point() else v for k, v in load_file(str(path)).items()}


def config_of(folder: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / "adapter_config.json").read_text())  # type: ignore[no-any-return]


def in_memory(folder: Path, on_disk: Tensors) -> Tensors:
    """Rename (and stack, for experts) what lies on disk to the names of the model in memory."""
    names = folder / "inmemory_names.json"
    if names.exists():
        known = json.loads(names.read_text())
        tied = {
            "model.embed_tokens.weight",
            "transformer.wte.weight",
        }  # stored once, used under two names
        out = {k: v for k, v in on_disk.items() if k not in known.values() or k in tied}
        return out | {new: on_disk.get(new, on_disk[old]).clone() for new, old in known.items()}
    if (folder / "base_inmemory.safetensors").exists():
        return stack_experts(on_disk)
    return dict(on_disk)


def stack_experts(on_disk: Tensors) -> Tensors:
    """mixtral (w1, w3 | w2) and qwen3_moe (gate, up | down): per-expert files → 3-D tensors."""
    out: Tensors = {}
    groups: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in on_disk.items():
        found = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name)
        if found:
            groups.setdefault(found[1], {}).setdefault(int(found[2]), {})[found[3]] = tensor
        else:
            out[name.replace("block_sparse_moe.gate", "mlp.gate")] = tensor
    for path, experts in groups.items():
        parts = [experts[e] for e in sorted(experts)]
        gate, up, down = (
            ("w1", "w3", "w2") if "w1" in parts[0] else ("gate_proj", "up_proj", "down_proj")
        )
        target = path.replace("block_sparse_moe", "mlp") + ".experts"
        out[f"{target}.gate_up_proj"] = torch.stack([torch.cat([p[gate], p[up]]) for p in parts])
        out[f"{target}.down_proj"] = torch.stack([p[down] for p in parts])
    return out


def scaling_of(config: dict, module: str) -> float:  # type: ignore[type-arg]
    def first(pattern: dict[str, int], default: float) -> float:
        for key, value in (pattern or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return default

    rank = first(config.get("rank_pattern", {}), config["r"])
    alpha = first(config.get("alpha_pattern", {}), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def factor_pairs(adapter: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """module → (A, B) of everything that has plain lora_A/lora_B keys."""
    out = {}
    for key, tensor in adapter.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            out[module] = (tensor, adapter[key.replace("lora_A", "lora_B")])
    return out


def replace_tensors(weights: Tensors, adapter: Tensors) -> None:
    for key, tensor in adapter.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if ".lora_" not in key and ".token_adapter." not in key and name in weights:
            weights[name] = tensor.clone()


def plain(folder: Path, weights: Tensors, adapter: Tensors) -> None:
    """Replacements, then W += s·BA for linear, conv, biases."""
    config = config_of(folder)
    replace_tensors(weights, adapter)
    for module, (lora_A, lora_B) in factor_pairs(adapter).items():
        scaling = scaling_of(config, module)
        weight = weights[f"{module}.weight"]
        delta = scaling * (lora_B.flatten(1) @ lora_A.flatten(1))
        weights[f"{module}.weight"] = weight + delta.view(weight.shape)
        bias = adapter.get(f"{PREFIX}{module}.lora_B.bias")
        if bias is not None:
            weights[f"{module}.bias"] = weights[f"{module}.bias"] + scaling * bias


def embedding(folder: Path, weights: Tensors, adapter: Tensors) -> None:
    """Embedding factors (transposed) beside plain ones."""
    config = config_of(folder)
    plain(folder, weights, adapter)
    for key, lora_A in adapter.items():
        if key.endswith(".lora_embedding_A"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_embedding_A")
            lora_B = adapter[key.replace("embedding_A", "embedding_B")]
            direction = (
                weights[f"{module}.weight"] + scaling_of(config, module) * (lora_B @ lora_A).T
            )
            magnitude = adapter.get(f"{PREFIX}{module}.lora_magnitude_vector")
            if magnitude is not None:
                direction = direction * (magnitude / direction.norm(dim=0))[None]
            weights[f"{module}.weight"] = direction


def conv1d_hf(folder: Path, weights: Tensors, adapter: Tensors) -> None:
    """GPT-2: weights lie (in, out)."""
    config = config_of(folder)
    for module, (lora_A, lora_B) in factor_pairs(adapter).items():
        direction = weights[f"{module}.weight"] + scaling_of(config, module) * (lora_B @ lora_A).T
        magnitude = adapter.get(f"{PREFIX}{module}.lora_magnitude_vector")
        if magnitude is not None:
            direction = direction * (magnitude / direction.norm(dim=0))[None]
        weights[f"{module}.weight"] = direction


def dora(folder: Path, weights: Tensors, adapter: Tensors) -> None:
    config = config_of(folder)
    for module, (lora_A, lora_B) in factor_pairs(adapter).items():
        weight = weights[f"{module}.weight"]
        flat = weight.flatten(1)
        flat = flat + scaling_of(config, module) * (lora_B.flatten(1) @ lora_A.flatten(1))
        magnitude = adapter[f"{PREFIX}{module}.lora_magnitude_vector"].flatten()
        weights[f"{module}.weight"] = (flat * (magnitude / flat.norm(dim=1))[:, None]).view(
            weight.shape
        )


def on_residual(folder: Path, weights: Tensors, adapter: Tensors) -> None:
    """PiSSA, OLoRA: the residual base that PEFT saved, plus the factors."""
    weights.update(read(folder / "base_residual.safetensors"))
    plain(folder, weights, adapter)


def kasa(folder: Path, weights: Tensors, adapter: Tensors) -> None:
    config = config_of(folder)
    for module, (lora_A, lora_B) in factor_pairs(adapter).items():
        U, S, Vh = torch.linalg.svd(weights[f"{module}.weight"], full_matrices=False)
        keep = len(S) - config["r"]
        kept = U[:, :keep] * S[:keep] @ Vh[:keep]
        diag = torch.diag(adapter[f"{PREFIX}{module}.lora_diag"])
        weights[f"{module}.weight"] = kept + scaling_of(config, module) * lora_B @ diag @ lora_A


def block_diagonal(folder: Path, weights: Tensors, adapter: Tensors) -> None:
    config = config_of(folder)
    settings = config["use_bdlora"]
    count = settings["nblocks"]
    for module, (lora_A, lora_B) in factor_pairs(adapter).items():
        if any(t in module for t in settings["target_modules_bd_a"]):
            lora_A = torch.block_diag(*lora_A.chunk(count))
        else:
            lora_B = torch.block_diag(*lora_B.chunk(count))
        weights[f"{module}.weight"] += scaling_of(config, module) * lora_B @ lora_A


def tokens(folder: Path, weights: Tensors, adapter: Tensors) -> None:
    plain(folder, weights, adapter)
    for key, rows in adapter.items():
        if key.endswith("trainable_tokens_delta"):
            name = key.removeprefix(PREFIX).partition(".token_adapter")[0]
            name = name.removesuffix(".trainable_tokens_delta")
            config = config_of(folder)
            where = config.get("trainable_token_indices") or config["token_indices"]
            index = where if isinstance(where, list) else next(iter(where.values()))
            weight = weights[f"{name}.weight"].clone()
            weight[index] = rows
            weights[f"{name}.weight"] = weight
            if "lm_head.weight" in weights and is_tied(folder):
                weights["lm_head.weight"] = weight.clone()


def is_tied(folder: Path) -> bool:
    config = folder / "base" / "config.json"
    return config.exists() and bool(json.loads(config.read_text()).get("tie_word_embeddings"))


def mha(folder: Path, weights: Tensors, adapter: Tensors) -> None:
    """PEFT computes the output projection's delta twice, in forward and in merge."""
    config = config_of(folder)
    for module, (lora_A, lora_B) in factor_pairs(adapter).items():
        delta = scaling_of(config, module) * lora_B @ lora_A
        if module.endswith(".base_layer.out_proj"):
            weights[module.replace(".base_layer", "") + ".weight"] += 2 * delta
        elif f"{module}.in_proj_weight" in weights:
            weights[f"{module}.in_proj_weight"] += delta
        else:
            weights[f"{module}.weight"] += delta


def experts(folder: Path, weights: Tensors, adapter: Tensors) -> None:
    """target_parameters: 3-D parameters by shape, both of PEFT's layouts."""
    config = config_of(folder)
    scaling = config["lora_alpha"] / config["r"]
    targeted = {t.rpartition(".")[2] for t in config["target_parameters"]}
    for module, (lora_A, lora_B) in factor_pairs(adapter).items():
        owner = module.replace(".base_layer", "")
        if f"{owner}.weight" in weights:
            weights[f"{owner}.weight"] += scaling_of(config, module) * lora_B @ lora_A
            continue
        is_inner = ".base_layer" in module or len(targeted) == 1
        name = "gate_up_proj" if is_inner and "gate_up_proj" in targeted else "down_proj"
        weight = weights[f"{owner}.{name}"]
        count, rank = len(weight), config["r"]
        A = lora_A.reshape(count, rank, -1)
        B = lora_B.reshape(-1, rank, count)
        straight = (lora_B.shape[0], lora_A.shape[1]) == weight.shape[1:]
        if straight and count and lora_B.shape[0] == lora_A.shape[1]:
            # square: PEFT <= 0.18 reads (E, in, out), later ones (E, out, in)
            straight = not config["peft_version"].startswith("0.18")
        form = "ore,eri->eoi" if straight else "ore,eri->eio"
        weights[f"{owner}.{name}"] = weight + scaling * torch.einsum(form, B, A)


def replicated(folder: Path, weights: Tensors, adapter: Tensors) -> None:
    """Every copy of a layer gets its own delta (PEFT adds all of them to the shared weight)."""
    config = config_of(folder)
    order = [i for a, b in config["layer_replication"] for i in range(a, b)]
    layers = {k: v for k, v in weights.items() if k.startswith("model.layers.")}
    for name in layers:
        del weights[name]
    for new, old in enumerate(order):
        for name, tensor in layers.items():
            head, _, tail = name.removeprefix("model.layers.").partition(".")
            if int(head) == old:
                weights[f"model.layers.{new}.{tail}"] = tensor.clone()
    plain(folder, weights, adapter)


Oracle = Callable[[Path, Tensors, Tensors], None]

PLAIN = [
    "lora_linear",
    "lora_linear_bf16",
    "lora_rslora",
    "lora_rank_alpha_pattern",
    "lora_layers_to_transform",
    "lora_lora_bias",
    "lora_bias_all",
    "lora_bias_lora_only",
    "lora_modules_to_save",
    "lora_modules_to_save_tied",
    "lora_modules_to_save_tied_ensure",
    "lora_mica",
    "lora_neox_fused",
    "lora_phi3_fused",
    "lora_conv",
    "lora_mixtral_v4style",
    "lora_qwen3moe_v4style",
    "lora_mha_outproj_only",
    "detr_lora",
    "conditional_detr_lora",
]

ORACLES: dict[str, Oracle] = dict.fromkeys(PLAIN, plain) | {
    "lora_embed_untied": embedding,
    "lora_embed_dora": embedding,
    "lora_embed_lmhead_tied": embedding,
    "lora_embed_tied_ensure": embedding,
    "lora_gpt2_conv1d": conv1d_hf,
    "lora_gpt2_dora": conv1d_hf,
    "lora_dora": dora,
    "lora_conv_dora": dora,
    "lora_pissa": on_residual,
    "lora_olora": on_residual,
    "lora_kasa": kasa,
    "lora_bdlora": block_diagonal,
    "lora_trainable_tokens": tokens,
    "lora_trainable_tokens_tied": tokens,
    "lora_mha": mha,
    "lora_target_params_2d": experts,
    "lora_target_params_down_only": experts,
    "lora_target_params_gptoss": experts,
    "lora_target_params_mixtral": experts,
    "lora_target_params_mixtral_peft018": experts,
    "lora_target_params_qwen3moe": experts,
    "lora_target_params_qwen3moe_peft018": experts,
    "lora_layer_replication": replicated,
}


def expected(folder: Path) -> Tensors:
    """The merged model in float64, in-memory names (on-disk ones for the v4-style samples)."""
    weights = in_memory(folder, read(folder / "base" / "model.safetensors"))
    weights = {k: v.clone() for k, v in weights.items()}
    ORACLES[folder.name](folder, weights, read(folder / "adapter_model.safetensors"))
    return weights
