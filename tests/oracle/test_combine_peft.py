"""Merged adapters in real PEFT: they reload without a missing or unexpected key, and the
factor-wise methods are PEFT's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from tests.make import random_factors, save_adapter
from tests.oracle.in_peft import make
from tests.oracle.method_oracles import injected, key_of, splitmix64
from tests.oracle.test_combine import dense, distance
from tests.oracle.test_compress import LOADABLE
from tests.oracle.test_extract import load_in_peft
from tests.oracle.test_extract_ranks import peft_deltas

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LLM = Path(__file__).parents[1] / "data" / "llm"
SHAPES = {"one": (24, 20), "two": (16, 24)}
PEFT_NAMES = {
    "factors-linear": "linear", "factors-ties": "ties",
    "factors-magnitude-prune": "magnitude_prune", "factors-dare-linear": "dare_linear",
    "factors-dare-ties": "dare_ties",
}  # fmt: skip


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(20, 24)
        self.two = torch.nn.Linear(24, 16)


@pytest.mark.thin(2)
@pytest.mark.parametrize("method", ["cat", "svd", "ties", "core"])
@pytest.mark.parametrize("name", LOADABLE)
def test_reloads(name: str, method: str, tmp_path: Path) -> None:
    """Two copies at 0.5: every layout that a sample has, biases and replacements too."""
    base = LLM / name / "base"
    source = str(LLM / name)
    lt.merge([source, source], output=tmp_path / "out", method=method, mean=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
    except ValueError:
        pytest.skip("no causal language model")
    loaded = load_in_peft(model.eval(), tmp_path / "out")
    want = dense(tmp_path / "out")
    for key, delta in peft_deltas(loaded).items():
        if key in want and want[key].shape == delta.shape:
            size = float(want[key].norm())
            assert float((delta.double() - want[key]).norm()) <= 1e-5 * size + 1e-12


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
@pytest.mark.parametrize("method", sorted(PEFT_NAMES))
def test_factor_methods_equal_peft(
    method: str, weights: tuple[float, float], tmp_path: Path
) -> None:
    """lora_A and lora_B themselves, to float32 rounding of sums of two products.

    Where PEFT draws a mask it gets ours: of both adapters for lora_A, then for lora_B.
    """
    folders = [
        save_adapter(tmp_path / f"in{i}", random_factors(SHAPES, rank=6, seed=90 * i), alpha=9 + i)
        for i in range(2)
    ]
    extra: dict[str, Any] = {} if method == "factors-linear" else {"density": 0.4}
    model = peft.PeftModel.from_pretrained(Net(), str(folders[0]), adapter_name="a")
    model.load_adapter(str(folders[1]), adapter_name="b")
    masks = [
        splitmix64(key_of(0, i, f"{module}.weight") + side, size) < extra["density"]
        for module, (out, inner) in SHAPES.items() if "dare" in method
        for side, size in ((1, 6 * inner), (0, 6 * out)) for i in range(2)
    ]  # fmt: skip
    with injected(masks):
        model.add_weighted_adapter(
            ["a", "b"], list(weights), "mix", combination_type=PEFT_NAMES[method], **extra
        )
    lt.merge(
        [str(f) for f in folders], output=tmp_path / "out", method=method, params=extra,
        weights=weights,
    )  # fmt: skip
    ours = load_file(str(tmp_path / "out" / "adapter_model.safetensors"))
    for module in SHAPES:
        layer = getattr(model.base_model.model, module)
        for side in ("lora_A", "lora_B"):
            want = getattr(layer, side)["mix"].weight
            got = ours[f"base_model.model.{module}.{side}.weight"]
            assert torch.allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_exact_methods_equal_peft(kind: str, tmp_path: Path) -> None:
    """Where PEFT is right: no rsLoRA, no lora_bias."""
    folders = [
        save_adapter(tmp_path / f"in{i}", random_factors(SHAPES, rank=4, seed=90 * i))
        for i in range(2)
    ]
    model = peft.PeftModel.from_pretrained(Net(), str(folders[0]), adapter_name="a")
    model.load_adapter(str(folders[1]), adapter_name="b")
    extra: dict[str, Any] = {"density": 0.3} if kind == "ties_svd" else {}
    rank = {} if kind == "cat" else {"svd_rank": 16}
    model.add_weighted_adapter(
        ["a", "b"], [0.7, 0.4], "mix", combination_type=kind, **extra, **rank
    )
    name = {"ties_svd": "ties-peft"}.get(kind, kind)
    lt.merge(
        [f"{folders[0]}:0.7", f"{folders[1]}:0.4"], output=tmp_path / "out", method=name,
        params=extra, rank=None if kind == "cat" else 16,
    )  # fmt: skip
    want = {
        f"{m}.weight": getattr(model.base_model.model, m).get_delta_weight("mix").double()
        for m in SHAPES
    }
    assert distance(dense(tmp_path / "out"), want) <= 1e-5


class Layers(torch.nn.Module):
    """Every layer whose factors PEFT stores in a form of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(20, 8)
        self.conv = torch.nn.Conv2d(4, 6, 3)
        self.mha = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.first = torch.nn.Linear(8, 12)
        self.second = torch.nn.Linear(8, 12)


LAYOUTS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["emb"]},
    "convolution": {"target_modules": ["conv"]},
    "attention": {"target_modules": ["mha"]},
    "rank-stabilised": {"target_modules": ["first"], "use_rslora": True},
    "blocks": {"target_modules": ["first", "second"], "use_bdlora": {
        "target_modules_bd_a": ["first"], "target_modules_bd_b": ["second"], "nblocks": 2}},
}  # fmt: skip


def blocks_of(stored: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """The stored blocks of a factor that was written with the zeros around them."""
    if stored.shape == made.shape:
        return made
    rows, cols = (m // s for m, s in zip(made.shape, stored.shape, strict=True))
    count = max(rows, cols)
    parts = [row.chunk(count, 1)[i] for i, row in enumerate(made.chunk(count, 0))]
    assert torch.equal(torch.block_diag(*parts), made)  # type: ignore[no-untyped-call]
    return torch.cat(parts)


@pytest.mark.parametrize("method", [m for m in sorted(PEFT_NAMES) if "dare" not in m])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_factor_methods_take_tensors_as_they_are_stored(
    layout: str, method: str, tmp_path: Path
) -> None:
    """Shares of elements are of what PEFT has in its tensors, not of zeros around blocks."""
    settings = dict(LAYOUTS[layout])
    if "use_bdlora" in settings:
        settings["use_bdlora"] = peft.tuners.lora.config.BdLoraConfig(**settings["use_bdlora"])
    torch.manual_seed(0)
    net = Layers()
    config = peft.LoraConfig(r=4, lora_alpha=6, **settings)
    a, b = (make(net, tmp_path / str(seed), config, seed) for seed in (1, 2))
    extra: dict[str, Any] = {} if method == "factors-linear" else {"density": 0.4}
    model = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(a), adapter_name="a")
    model.load_adapter(str(b), adapter_name="b")
    model.add_weighted_adapter(
        ["a", "b"], [0.7, -0.4], "mix", combination_type=PEFT_NAMES[method], **extra
    )
    model.save_pretrained(str(tmp_path / "peft"), selected_adapters=["mix"])
    lt.merge(
        [str(a), str(b)], weights=[0.7, -0.4], method=method, params=extra, output=tmp_path / "out"
    )
    want = load_file(str(tmp_path / "peft" / "mix" / "adapter_model.safetensors"))
    ours = load_file(str(tmp_path / "out" / "adapter_model.safetensors"))
    for key, value in want.items():
        assert torch.allclose(blocks_of(value, ours[key]), value, rtol=1e-6, atol=1e-7), key


@pytest.mark.parametrize("method", ["factors-linear", "factors-ties", "factors-magnitude-prune"])
def test_factor_methods_on_packed_experts(method: str, tmp_path: Path) -> None:
    """PEFT refuses these; its functions on the stored tensors are what there is to follow."""
    names = [str(LLM / "lora_target_params_qwen3moe")] * 2
    extra: dict[str, Any] = {} if method == "factors-linear" else {"density": 0.4}
    lt.merge(names, weights=[0.7, 0.4], method=method, params=extra, output=tmp_path / "out")
    one = load_file(str(LLM / "lora_target_params_qwen3moe" / "adapter_model.safetensors"))
    ours = load_file(str(tmp_path / "out" / "adapter_model.safetensors"))
    with lt.open(names[0]) as adapter:
        scaling = {m.spec.scaling for m in adapter}.pop()
    kind = {"factors-linear": "task_arithmetic"}.get(method, PEFT_NAMES[method])
    function = getattr(peft.utils.merge_utils, kind)
    roots = torch.tensor([(0.7 * scaling) ** 0.5, (0.4 * scaling) ** 0.5])
    assert any("experts" in key for key in one)
    for key, value in one.items():
        want = function([value, value], roots, *extra.values())
        assert torch.allclose(ours[key], want, rtol=1e-5, atol=1e-7), key
