"""Names and shapes of other exporters, against the same change under PEFT's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.errors import LoratoolError
from tests.make import randn, save_adapter, save_checkpoint

E, R, IN, OUT = 3, 2, 6, 8
EXPERTS = "model.layers.0.mlp.experts"
SCALE = 2.0


def adapter(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_adapter(folder, {}, alpha=SCALE * R, r=R, target_modules=["x"])
    named = {f"base_model.model.{k}": v.contiguous() for k, v in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def merged(root: Path, folder: Path) -> dict[str, torch.Tensor]:
    lt.merge([folder], base=root / "base", output=root / "out")
    return load_file(root / "out" / "model.safetensors")


def factors(experts_a: int, experts_b: int, out: int, inner: int, seed: int) -> tuple[
    torch.Tensor, torch.Tensor
]:  # fmt: skip
    return randn(experts_a, R, inner, seed=seed), randn(experts_b, out, R, seed=seed + 1)


@pytest.mark.parametrize("names", [("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("is_fused", [False, True])
def test_stacked_experts(
    tmp_path: Path, names: tuple[str, str, str], shared: bool, is_fused: bool
) -> None:
    """One pair of 3-D factors for all experts; 1 for a side that they share."""
    gate = factors(1 if shared else E, E, OUT, IN, 10)
    up = factors(1 if shared else E, E, OUT, IN, 20)
    down = factors(E, 1 if shared else E, IN, OUT, 30)
    base = {"gate": randn(E, OUT, IN, seed=1), "up": randn(E, OUT, IN, seed=2),
            "down": randn(E, IN, OUT, seed=3)}  # fmt: skip
    if is_fused:
        stored = {f"{EXPERTS}.gate_up_proj": torch.cat((base["gate"], base["up"]), 1),
                  f"{EXPERTS}.down_proj": base["down"]}  # fmt: skip
    else:
        stored = {f"{EXPERTS}.{e}.{part}_proj.weight": t[e].clone() for part, t in base.items()
                  for e in range(E)}  # fmt: skip
    save_checkpoint(tmp_path / "base", stored, config={"model_type": "qwen3_moe"})
    tensors = {}
    for name, (lora_A, lora_B) in zip(names, (gate, up, down), strict=True):
        tensors |= {f"{EXPERTS}.{name}.lora_A.weight": lora_A,
                    f"{EXPERTS}.{name}.lora_B.weight": lora_B}  # fmt: skip
    got = merged(tmp_path, adapter(tmp_path / "ad", tensors))
    want = {
        part: base[part].double() + SCALE * (lora_B.double() @ lora_A.double())
        for part, (lora_A, lora_B) in (("gate", gate), ("up", up), ("down", down))
    }
    if is_fused:
        found = dict(zip(("gate", "up"), got[f"{EXPERTS}.gate_up_proj"].split(OUT, 1), strict=True))
        found["down"] = got[f"{EXPERTS}.down_proj"]
    else:
        found = {p: torch.stack([got[f"{EXPERTS}.{e}.{p}_proj.weight"] for e in range(E)])
                 for p in want}  # fmt: skip
    for part, tensor in want.items():
        assert torch.equal(found[part], tensor.float())


def test_empty_factors_of_a_projection_that_experts_lack(tmp_path: Path) -> None:
    name = "model.layers.0.mixer.experts"
    base = {f"{name}.{e}.up_proj.weight": randn(OUT, IN, seed=e) for e in range(E)}
    save_checkpoint(tmp_path / "base", base, config={"model_type": "nemotron_h"})
    lora_A, lora_B = factors(E, E, OUT, IN, 10)
    folder = adapter(tmp_path / "ad", {
        f"{name}.up_proj.lora_A.weight": lora_A, f"{name}.up_proj.lora_B.weight": lora_B,
        f"{name}.w3.lora_A.weight": torch.zeros(0), f"{name}.w3.lora_B.weight": torch.zeros(0),
    })  # fmt: skip
    got = merged(tmp_path, folder)
    for e in range(E):
        key = f"{name}.{e}.up_proj.weight"
        want = base[key].double() + SCALE * (lora_B[e].double() @ lora_A[e].double())
        assert torch.equal(got[key], want.float())


def test_nothing_but_empty_factors_is_still_a_shard(tmp_path: Path) -> None:
    """As ZeRO-3 leaves them where nobody gathered."""
    empty = {f"{EXPERTS}.w3.lora_{side}.weight": torch.zeros(0) for side in "AB"}
    folder = adapter(tmp_path / "ad", empty)
    with pytest.raises(LoratoolError) as caught:
        lt.inspect(folder)
    assert caught.value.code == "LT-364"


@pytest.mark.parametrize(("a", "b"), [((E, R, IN), (E + 1, OUT, R)), ((E, R + 1, IN), (E, OUT, R))])
def test_stacked_factors_that_do_not_fit(
    tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    folder = adapter(tmp_path / "ad", {
        f"{EXPERTS}.w1.lora_A.weight": randn(*a, seed=1),
        f"{EXPERTS}.w1.lora_B.weight": randn(*b, seed=2),
    })  # fmt: skip
    with pytest.raises(LoratoolError) as caught:
        lt.inspect(folder)
    assert caught.value.code == "LT-363"


def test_split_experts_of_gpt_oss(tmp_path: Path) -> None:
    """``gate_up_projs.N`` is expert N of the tensor (E, in, 2·out), gate and up interleaved."""
    base = {f"{EXPERTS}.gate_up_proj": randn(E, IN, 2 * OUT, seed=1),
            f"{EXPERTS}.down_proj": randn(E, OUT, IN, seed=2)}  # fmt: skip
    save_checkpoint(tmp_path / "base", base, config={"model_type": "gpt_oss"})
    tensors, want = {}, {k: v.double() for k, v in base.items()}
    for e in range(E - 1):  # the last stays as it is
        for leaf, inner, out in (("gate_up_proj", IN, 2 * OUT), ("down_proj", OUT, IN)):
            lora_A, lora_B = randn(R, inner, seed=10 * e + 3), randn(out, R, seed=10 * e + 4)
            tensors |= {f"{EXPERTS}.{leaf}s.{e}.lora_A.weight": lora_A,
                        f"{EXPERTS}.{leaf}s.{e}.lora_B.weight": lora_B}  # fmt: skip
            want[f"{EXPERTS}.{leaf}"][e] += SCALE * (lora_B.double() @ lora_A.double()).T
    got = merged(tmp_path, adapter(tmp_path / "ad", tensors))
    for key, tensor in want.items():
        assert torch.equal(got[key], tensor.float())


@pytest.mark.parametrize("name", ["model.unembed_tokens", "unembed_tokens"])
def test_the_output_head_by_another_name(tmp_path: Path, name: str) -> None:
    base = {
        "lm_head.weight": randn(10, IN, seed=1),
        "model.embed_tokens.weight": randn(10, IN, seed=2),
    }
    save_checkpoint(tmp_path / "base", base, config={"model_type": "llama",
                                                     "tie_word_embeddings": False})  # fmt: skip
    lora_A, lora_B = randn(R, IN, seed=3), randn(10, R, seed=4)
    tensors = {f"{name}.lora_A.weight": lora_A, f"{name}.lora_B.weight": lora_B}
    got = merged(tmp_path, adapter(tmp_path / "ad", tensors))
    want = base["lm_head.weight"].double() + SCALE * (lora_B.double() @ lora_A.double())
    assert torch.equal(got["lm_head.weight"], want.float())
    both = {**tensors, **{k.replace(name, "lm_head"): v.clone() for k, v in tensors.items()}}
    with pytest.raises(LoratoolError) as caught:
        lt.inspect(adapter(tmp_path / "twice", both))
    assert caught.value.code == "LT-367"


def test_other_commands_write_names_of_the_model(tmp_path: Path) -> None:
    """Scaled, it is the same change under names that PEFT knows."""
    base = {f"{EXPERTS}.{e}.gate_proj.weight": randn(OUT, IN, seed=e) for e in range(E)}
    save_checkpoint(tmp_path / "base", base, config={"model_type": "qwen3_moe"})
    lora_A, lora_B = factors(1, E, OUT, IN, 10)
    folder = adapter(tmp_path / "ad", {f"{EXPERTS}.w1.lora_A.weight": lora_A,
                                       f"{EXPERTS}.w1.lora_B.weight": lora_B})  # fmt: skip
    lt.rescale([folder], 0.5, output=tmp_path / "half")
    names = set(load_file(tmp_path / "half" / "adapter_model.safetensors"))
    assert f"base_model.model.{EXPERTS}.0.gate_proj.lora_A.weight" in names
    got = merged(tmp_path, tmp_path / "half")
    for e in range(E):
        key = f"{EXPERTS}.{e}.gate_proj.weight"
        want = base[key].double() + 0.5 * SCALE * (lora_B[e].double() @ lora_A[0].double())
        assert torch.equal(got[key], want.float())
