"""Element-wise methods on every kind of module: embeddings, experts, biases, kernels, slices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.engine.combining import random_keys
from loratool.errors import LoratoolError
from loratool.linalg.dense import combine_whole
from loratool.methods import find_method, parse_params
from loratool.plan import DeltaPart
from tests.make import randn, random_factors, save_adapter, save_checkpoint
from tests.oracle.adapter_algebra import EPS, LLM, Tensors, additive_samples, twin

WEIGHTS = [1.0, -0.5, 0.75]
SAMPLES = [n for n in additive_samples() if n != "lora_layer_replication"]
HARD = [
    "lora_conv", "lora_embed_untied", "lora_embed_lmhead_tied", "lora_lora_bias",
    "lora_gpt2_conv1d", "lora_mha", "lora_mixtral_v4style", "lora_target_params_qwen3moe",
]  # fmt: skip
CASES = [(n, "ties") for n in SAMPLES]
CASES += [(n, m) for n in HARD for m in ("dare", "della", "sce", "magnitude")]


def some_of(folder: Path, number: int) -> Path:
    """Leave out every third module, another third in each adapter; not where keys depend on all."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(str(path))
    stems = sorted({key.partition(".lora_")[0] for key in tensors})
    if len(stems) < 4 or any(".base_layer" in stem for stem in stems):
        return folder
    gone = set(stems[number::3])
    kept = {k: v for k, v in tensors.items() if k.partition(".lora_")[0] not in gone}
    save_file(kept, str(path), {"format": "pt"})
    return folder


def deltas(folder: Path) -> Tensors:
    """ΔW in float64 as factors make it: (E, out, in), embeddings turned back to (out, in)."""
    found = {}
    with lt.open(folder) as adapter:
        for m in adapter:
            D = m.delta()
            is_turned = m.spec.layout == "embedding" or m.spec.transposed
            found[m.name] = D.mT if is_turned and D.dim() > 1 else D
    return found


def combined(method: str, inputs: list[Tensors], params: dict[str, object]) -> Tensors:
    """The method on each matrix of each module, among the adapters that have the module."""
    row, out = find_method(method), {}
    for name in dict.fromkeys(n for one in inputs for n in one):
        have = [i for i, one in enumerate(inputs) if name in one]
        parts = [DeltaPart(None, 1.0, adapter=i) for i in have]  # type: ignore[arg-type]
        stack = torch.stack([inputs[i][name] for i in have])
        shape = stack.shape[1:]
        matrices = stack.reshape(len(have), -1, *(shape[-2:] if len(shape) > 1 else (1, *shape)))
        keys, weights = random_keys(params, name, parts), [WEIGHTS[i] for i in have]
        size = matrices[0, 0].numel()
        made = [
            combine_whole(matrices[:, e], row, params, weights, keys, offset=e * size)
            for e in range(matrices.shape[1])
        ]
        out[name] = torch.stack(made).reshape(shape)
    return out


@pytest.mark.thin(3)
@pytest.mark.parametrize(("name", "method"), CASES, ids=lambda x: x)
def test_with_and_without_a_base(name: str, method: str, tmp_path: Path) -> None:
    """Without a base at full rank: the closed form; with one: the base plus that."""
    folders = [some_of(twin(name, tmp_path / f"t{i}", seed=10 * i), i) for i in range(3)]
    params = parse_params(find_method(method), {"density": 0.5})
    inputs = [deltas(f) for f in folders]
    want = combined(method, inputs, params)
    texts = [f"{f}:{w}" for f, w in zip(folders, WEIGHTS, strict=True)]
    options = {"method": method, "params": {"density": 0.5}}
    lt.merge(texts, output=tmp_path / "one", rank=64, dtype="float32", **options)  # type: ignore[arg-type]
    got = deltas(tmp_path / "one")
    assert want.keys() <= got.keys()
    for module, D in got.items():
        value = want.get(module, torch.zeros_like(D))  # zero biases: PEFT has all or none
        size = max(float(one[module].abs().max()) for one in [*inputs, got] if module in one)
        # float32 elements, their best rank-64 approximation (exact here), and storage of factors
        assert float((D - value).abs().max()) <= 64 * EPS * max(size, 1e-30), module
    tied = {"untie": True} if "tied" in name else {}
    base = LLM / name / "base"
    lt.merge(texts, base=base, output=tmp_path / "m", dtype="float32", **options, **tied)  # type: ignore[arg-type]
    lt.merge([str(tmp_path / "one")], base=base, output=tmp_path / "n", dtype="float32", **tied)  # type: ignore[arg-type]
    ours, theirs = (load_file(str(tmp_path / k / "model.safetensors")) for k in "mn")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        error = float((ours[key].double() - value.double()).abs().max())
        assert error <= 128 * EPS * max(1.0, float(value.abs().max())), key
    assert lt.verify(tmp_path / "m", base=base).verdict == "identical"


def refused(**options: object) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught:
        lt.merge(**options)  # type: ignore[arg-type]
    assert caught.value.code == "LT-418"
    assert caught.value.hint is not None and "leave --method out" in caught.value.hint
    return caught.value


def test_one_tensor_under_two_names_is_one_module(tmp_path: Path) -> None:
    """Adapters trained under another prefix meet in the base, and TIES sees both."""
    shape = (20, 12)
    base = save_checkpoint(tmp_path / "base", {"model.a.q.weight": randn(*shape, seed=1)})
    folders = [
        save_adapter(tmp_path / f"t{i}", random_factors({name: shape}, rank=3, seed=5 * i))
        for i, name in enumerate(("model.a.q", "a.q", "model.a.q"))
    ]
    stack = torch.stack([next(iter(deltas(f).values())) for f in folders])
    params = {"density": 0.5, "lambda": 1.0}
    want = combine_whole(stack, "ties", params, [1.0] * 3, [0] * 3)
    lt.merge([str(f) for f in folders], base=base, output=tmp_path / "m", method="ties",
             params={"density": 0.5})  # fmt: skip
    got = load_file(str(tmp_path / "m" / "model.safetensors"))["model.a.q.weight"].double()
    W = randn(*shape, seed=1).double()
    assert float((got - W - want).abs().max()) <= 4 * EPS * float(got.abs().max())


def test_a_shared_tensor_changed_on_both_sides_is_refused(tmp_path: Path) -> None:
    """--keep-tied adds a change of the embedding and one of the head; their vote is undefined."""
    name = "lora_embed_lmhead_tied"
    texts = []
    for i, word in enumerate(("embed_tokens", "lm_head")):
        folder = twin(name, tmp_path / word, seed=i)
        path = folder / "adapter_model.safetensors"
        kept = {k: v for k, v in load_file(str(path)).items() if word in k}
        save_file(kept, str(path), {"format": "pt"})
        texts.append(str(folder))
    options = {"adapters": texts, "base": LLM / name / "base", "output": tmp_path / "m"}
    error = refused(**options, method="ties", keep_tied=True)
    assert "embed_tokens" in str(error.key) and "--untie" in str(error.hint)
    lt.merge(**options, keep_tied=True)  # type: ignore[arg-type]


def test_part_of_a_fused_weight_beside_the_whole_is_refused(tmp_path: Path) -> None:
    name = "lora_phi3_fused"
    whole = str(twin(name, tmp_path / "whole", seed=1))
    module = "model.layers.0.self_attn.q_proj"
    part = save_adapter(tmp_path / "part", random_factors({module: (16, 16)}, rank=2, seed=3))
    options = {"adapters": [whole, str(part)], "base": LLM / name / "base"}
    error = refused(**options, output=tmp_path / "x", method="magnitude")
    assert error.key == "model.layers.0.self_attn.qkv_proj.weight"
    lt.merge(**options, output=tmp_path / "sum")  # type: ignore[arg-type]


def test_sce_of_a_module_that_one_adapter_has_alone() -> None:
    """Variance against no change: the largest elements stay, not the first ones."""
    values = torch.tensor([[[0.1, -3.0, 0.2, 2.0]]]).double()
    got = combine_whole(values, "sce", {"density": 0.5}, [2.0], [0])
    assert got.tolist() == [[0.0, -6.0, 0.0, 4.0]]


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_halves_of_a_matrix_are_chosen_as_one(method: str, tmp_path: Path) -> None:
    """gate_up of an expert lies in two tensors of this base: what is kept is that of the whole."""
    name = "lora_target_params_mixtral"
    texts = [str(twin(name, tmp_path / f"t{i}", seed=i)) for i in range(2)]
    options = {"method": method, "params": {"density": 0.1}}
    lt.merge(texts, output=tmp_path / "one", rank=64, dtype="float32", **options)  # type: ignore[arg-type]
    base = LLM / name / "base"
    lt.merge(texts, base=base, output=tmp_path / "m", dtype="float32", **options)  # type: ignore[arg-type]
    W, got = (load_file(str(f / "model.safetensors")) for f in (base, tmp_path / "m"))
    module = "model.layers.0.mlp.experts.gate_up_proj"
    want = deltas(tmp_path / "one")[module]
    for e in range(4):
        stem = f"model.layers.0.block_sparse_moe.experts.{e}"
        halves = [got[f"{stem}.{w}.weight"].double() - W[f"{stem}.{w}.weight"].double()
                  for w in ("w1", "w3")]  # fmt: skip
        joined = torch.cat(halves)
        assert float((joined - want[e]).abs().max()) <= 64 * EPS * float(
            W[f"{stem}.w1.weight"].abs().max()
        )
