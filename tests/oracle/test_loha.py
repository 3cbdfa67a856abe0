"""LoHa, as PEFT and LyCORIS spell it: against numpy, the samples' programs, PEFT and fractions."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from tests.make import random_factors, save_adapter

DATA = Path(__file__).parents[1] / "data"
PEFT = ["loha", "loha_conv", "loha_conv_eff"]
LYCORIS = {"lycoris_loha": "lycoris", "lycoris_loha_alpha_eq": "lycoris",
           "lycoris_loha_tucker": "lycoris", "kohya_sd15_loha": "kohya_sd15"}  # fmt: skip
Arrays = dict[str, np.ndarray]


def side(fields: Arrays, number: int) -> np.ndarray:
    """(out, in, k…) of one of the two matrices, float64."""
    a, b = (fields[f"hada_w{number}_{s}"].astype(np.float64) for s in "ab")
    core = fields.get(f"hada_t{number}")
    if core is None:
        return a @ b
    return np.einsum("ij...,jr,ip->pr...", core.astype(np.float64), b, a)


def deltas(path: Path, scaling: float | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Stem of the keys -> (ΔW, sum of the sizes of its terms)."""
    modules: dict[str, Arrays] = {}
    for name, tensor in load_file(str(path)).items():
        stem, _, role = name.rpartition(".")
        modules.setdefault(stem, {})[role] = tensor
    found = {}
    for stem, fields in modules.items():
        # w1_b and, with a core, its transpose too: (r, in)
        scale = scaling or float(fields["alpha"]) / fields["hada_w1_b"].shape[0]
        sizes = {k: np.abs(v) for k, v in fields.items()}
        found[stem] = (scale * side(fields, 1) * side(fields, 2),
                       abs(scale) * side(sizes, 1) * side(sizes, 2))  # fmt: skip
    return found


def sample(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """(adapter, base, merged by its program)."""
    if name in LYCORIS:
        here = DATA / "diffusion" / name
        base = DATA / "diffusion" / "base" / f"{LYCORIS[name]}.safetensors"
        return here / "adapter.safetensors", base, here / "merged.safetensors"
    here, adapter = DATA / "llm" / name, folder / "adapter"
    adapter.mkdir()
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(here / part, adapter)
    return adapter, here / "base", here / "merged.safetensors"


def out_of(base: Path, folder: Path, name: str = "out") -> Path:
    return folder / (f"{name}.safetensors" if base.is_file() else name)


def stored(path: Path) -> Arrays:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {k: v for f in files for k, v in load_file(str(f)).items()}


def wanted(name: str, adapter: Path, before: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tensor of the base -> (ΔW, sizes), in its shape."""
    if name in LYCORIS:
        found, flat = deltas(adapter), {}
        for key in before:
            module = key.removesuffix(".weight")
            for prefix, dotted in (("lycoris_", ""), ("lora_unet_", "unet."),
                                   ("lora_te_", "text_encoder.")):  # fmt: skip
                if module.startswith(dotted):
                    flat[prefix + module.removeprefix(dotted).replace(".", "_")] = key
        named = {flat[stem]: pair for stem, pair in found.items()}
    else:
        found = deltas(adapter / "adapter_model.safetensors", scaling=2.0)
        named = {f"{s.removeprefix('base_model.model.')}.weight": p for s, p in found.items()}
    return {n: (d.reshape(before[n].shape), s.reshape(before[n].shape))
            for n, (d, s) in named.items()}  # fmt: skip


@pytest.mark.parametrize("name", [*PEFT, *LYCORIS])
def test_a_sample_merges_to_the_formula_and_to_what_its_program_made(
    tmp_path: Path, name: str
) -> None:
    adapter, base, reference = sample(name, tmp_path)
    out = out_of(base, tmp_path)
    lt.merge([adapter], base=base, output=out)
    before, got, theirs = stored(base), stored(out), load_file(str(reference))
    changes = wanted(name, adapter, before)
    for key, (delta, sizes) in changes.items():
        exact = before[key].astype(np.float64) + delta
        # float32: sums of r terms in each matrix, their product, scale, sum, and one rounding
        slack = 2.0**-24 * (24 * sizes + 2 * np.abs(exact))
        assert (np.abs(got[key] - exact) <= slack).all(), key
        assert np.allclose(got[key], theirs[key], rtol=2e-6, atol=1e-6), key
    assert all(got[n].tobytes() == t.tobytes() for n, t in before.items() if n not in changes)


@pytest.mark.parametrize("name", [*PEFT, *LYCORIS])
def test_a_sample_is_written_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    adapter, _, _ = sample(name, tmp_path)
    out = tmp_path / ("again.safetensors" if adapter.is_file() else "again")
    lt.rescale([adapter], 1, output=out, provenance=False)
    old, new = (p if p.is_file() else p / "adapter_model.safetensors" for p in (adapter, out))
    assert new.read_bytes() == old.read_bytes()


@pytest.mark.parametrize("name", [*PEFT, *LYCORIS])
def test_a_sample_becomes_a_lora_with_the_same_change(tmp_path: Path, name: str) -> None:
    adapter, base, _ = sample(name, tmp_path)
    made: Any = lt.convert([adapter], to="peft", output=tmp_path / "lora", base=base)
    assert len(made.adapters[0].computed) == made.adapters[0].modules
    before = stored(base)
    changes = wanted(name, adapter, before)
    for one in lt.open(tmp_path / "lora"):
        key = one.name if one.name in changes else next(
            n for n in changes if n.endswith(f".{one.name}") or one.name.endswith(f".{n}")
        )  # fmt: skip
        delta = changes[key][0]
        gap = np.abs(one.delta().numpy() - delta.reshape(delta.shape[0], -1)).max()
        assert gap <= 1e-6 * np.abs(delta).max(), key
        rows, cols = delta.shape[0], delta[0].size
        assert one.rank == min(open_adapter(adapter).specs[0].rank ** 2, rows, cols)


def test_the_converted_adapter_loads_in_peft(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    adapter, base, reference = sample("loha", tmp_path)
    lt.convert([adapter], to="peft", output=tmp_path / "lora", base=base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    merged = model.merge_and_unload().state_dict()
    for key, tensor in load_file(str(reference)).items():
        assert np.allclose(merged[key].numpy(), tensor, rtol=1e-5, atol=1e-6), key


def half(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).bfloat16()


def test_exact_sums_of_products_of_four(tmp_path: Path) -> None:
    """bfloat16 factors and a bfloat16 base: every element is the correctly rounded sum."""
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    rng = np.random.default_rng(7)
    shapes = {"hada_w1_a": (6, 3), "hada_w1_b": (3, 5), "hada_w2_a": (6, 3), "hada_w2_b": (3, 5)}
    fields = {k: half(rng.standard_normal(s)) for k, s in shapes.items()}
    weight = half(rng.standard_normal((6, 5)))
    (tmp_path / "adapter").mkdir()
    save({f"base_model.model.a.{k}": v for k, v in fields.items()},
         tmp_path / "adapter" / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LOHA", "r": 3, "alpha": 1, "target_modules": ["a"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save({"a.weight": weight}, tmp_path / "base.safetensors")
    lt.merge([tmp_path / "adapter"], base=tmp_path / "base.safetensors",
             output=tmp_path / "out.safetensors", exact=True)  # fmt: skip
    got = load(tmp_path / "out.safetensors")["a.weight"].double()
    parts = {k: [[Fraction(x) for x in row] for row in v.double().tolist()]
             for k, v in fields.items()}  # fmt: skip
    scale = Fraction(1 / 3)  # as the float64 that scaling is
    for i in range(6):
        for j in range(5):
            one, other = (
                sum(parts[f"hada_w{n}_a"][i][k] * parts[f"hada_w{n}_b"][k][j] for k in range(3))
                for n in (1, 2)
            )
            exact = Fraction(float(weight[i, j])) + scale * one * other
            neighbours = [float(got[i, j]), *(_next(float(got[i, j]), s) for s in (1, -1))]
            assert all(
                abs(Fraction(neighbours[0]) - exact) <= abs(Fraction(n) - exact)
                for n in neighbours[1:]
            ), (i, j)


def _next(value: float, step: int) -> float:
    bits = torch.tensor(value).bfloat16().view(torch.int16)
    return float((bits + step).view(torch.bfloat16))


def test_a_core_is_no_sum_of_products(tmp_path: Path) -> None:
    adapter, base, _ = sample("lycoris_loha_tucker", tmp_path)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([adapter], base=base, output=tmp_path / "o.safetensors", exact=True)
    assert caught.value.code == "LT-477"


def test_it_adds_up_with_a_lora_and_is_compressed(tmp_path: Path) -> None:
    adapter, base, _ = sample("loha", tmp_path)
    changes = wanted("loha", adapter, stored(base))
    key = "model.layers.0.self_attn.q_proj.weight"
    factors = random_factors({key.removesuffix(".weight"): (16, 16)}, rank=2, seed=3)
    save_adapter(tmp_path / "lora", factors, alpha=2, target_modules=["q_proj"])
    lt.merge([adapter, tmp_path / "lora"], output=tmp_path / "both")
    lora_A, lora_B = factors[key.removesuffix(".weight")]
    want = changes[key][0] + (lora_B.double() @ lora_A.double()).numpy()
    both = lt.open(tmp_path / "both")[key]
    assert both.rank == 18 and np.abs(both.delta().numpy() - want).max() < 1e-6
    lt.compress([adapter], rank=3, output=tmp_path / "small")
    U, S, Vh = np.linalg.svd(changes[key][0])
    small = lt.open(tmp_path / "small")[key].delta().numpy()
    assert np.abs(small - (U[:, :3] * S[:3]) @ Vh[:3]).max() < 1e-6


@pytest.mark.parametrize("factor", [0.5, 0.3, -2.0])
@pytest.mark.parametrize("name", ["loha", "lycoris_loha", "lycoris_loha_tucker"])
def test_it_is_rescaled(tmp_path: Path, name: str, factor: float) -> None:
    """In alpha where that stays a whole number, else in one of the factors."""
    adapter, base, _ = sample(name, tmp_path)
    out = tmp_path / ("scaled.safetensors" if adapter.is_file() else "scaled")
    lt.rescale([adapter], factor, output=out)
    lt.merge([out], base=base, output=out_of(base, tmp_path))
    before, got = stored(base), stored(out_of(base, tmp_path))
    for key, (delta, _) in wanted(name, adapter, before).items():
        exact = before[key].astype(np.float64) + factor * delta
        assert np.abs(got[key] - exact).max() <= 1e-6 * np.abs(exact).max(), key


def test_kernels_that_nobody_knows_are_not_made_up(tmp_path: Path) -> None:
    """A convolution's factors are flattened in the file: PEFT would not load them like that."""
    adapter, base, _ = sample("loha_conv", tmp_path)
    for command in (
        lambda out: lt.compress([adapter], rank=2, output=out),
        lambda out: lt.merge([adapter, adapter], output=out),
        lambda out: lt.convert([adapter], to="peft", output=out),
    ):
        with pytest.raises(lt.LoratoolError) as caught:
            command(tmp_path / "out")
        assert caught.value.code == "LT-461" and "--base" in str(caught.value.hint)
        assert not (tmp_path / "out").exists()
    lt.convert([adapter], to="peft", base=base, output=tmp_path / "out")


@pytest.mark.parametrize("gone", ["hada_w1_b", "hada_w2_a"])
def test_incomplete_factors_are_refused(tmp_path: Path, gone: str) -> None:
    tensors = load_file(str(DATA / "diffusion" / "lycoris_loha" / "adapter.safetensors"))
    save_file({k: v for k, v in tensors.items() if k != f"lycoris_lin_a.{gone}"},
              str(tmp_path / "a.safetensors"))  # fmt: skip
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(tmp_path / "a.safetensors")
    assert caught.value.code == "LT-362" and "hada_w1_a" in str(caught.value.expected)


def test_factors_of_different_modules_sizes_are_refused(tmp_path: Path) -> None:
    tensors = load_file(str(DATA / "diffusion" / "lycoris_loha" / "adapter.safetensors"))
    tensors["lycoris_lin_a.hada_w2_b"] = tensors["lycoris_lin_a.hada_w2_b"][:, :-1].copy()
    save_file(tensors, str(tmp_path / "a.safetensors"))
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(tmp_path / "a.safetensors")
    assert caught.value.code == "LT-363"


def test_kernels_of_the_base_are_those_of_the_lora(tmp_path: Path) -> None:
    """A Conv1d's core has an axis more than its weight."""
    here = DATA / "llm" / "loha_conv_eff"
    lt.convert([here], to="peft", base=here / "base", output=tmp_path / "lora")
    lt.merge([tmp_path / "lora"], base=here / "base", output=tmp_path / "out")
    got = load_file(str(tmp_path / "out" / "model.safetensors"))
    theirs = load_file(str(here / "merged.safetensors"))
    assert all(np.abs(got[key] - theirs[key]).max() <= 1e-6 for key in got)
