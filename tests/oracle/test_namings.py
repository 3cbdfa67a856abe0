"""One change under any of its names, merged into a base that has any other: the same weights.

The tables below are written by hand, so that the families' maps are checked by something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from tests.oracle.kohya_files import rounded_once

Arrays = dict[str, np.ndarray]


class Row(NamedTuple):
    """A weight of the original, and what diffusers makes of it."""

    original: str
    diffusers: tuple[str, ...]
    heights: tuple[int, ...]
    width: int
    is_swapped: bool = False


def qkv(block: str, *names: str, of: str, heights: tuple[int, ...] = (16, 16, 16)) -> Row:
    return Row(of, tuple(f"{block}.{name}" for name in names), heights, heights[0])


SINGLE = "single_transformer_blocks.0"
CASES: Mapping[str, tuple[Row, ...]] = {
    "flux1": (
        qkv("transformer_blocks.0.attn", "to_q", "to_k", "to_v", of="double_blocks.0.img_attn.qkv"),
        qkv("transformer_blocks.0.attn", "add_q_proj", "add_k_proj", "add_v_proj",
            of="double_blocks.0.txt_attn.qkv"),
        qkv(SINGLE, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp",
            of="single_blocks.0.linear1", heights=(16, 16, 16, 64)),
        Row("single_blocks.0.linear2", (f"{SINGLE}.proj_out",), (16,), 80),
        Row("single_blocks.0.modulation.lin", (f"{SINGLE}.norm.linear",), (48,), 16),
        Row("img_in", ("x_embedder",), (16,), 4),
        Row("final_layer.linear", ("proj_out",), (4,), 16),
        Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), (32,), 16, True),
    ),
    "sd3": (
        qkv("transformer_blocks.1.attn", "to_q", "to_k", "to_v",
            of="joint_blocks.1.x_block.attn.qkv"),
        Row("joint_blocks.0.context_block.adaLN_modulation.1",
            ("transformer_blocks.0.norm1_context.linear",), (96,), 16),
        Row("joint_blocks.1.context_block.adaLN_modulation.1",
            ("transformer_blocks.1.norm1_context.linear",), (32,), 16, True),
    ),
    "hunyuan_video": (
        qkv("transformer_blocks.0.attn", "to_q", "to_k", "to_v", of="double_blocks.0.img_attn_qkv"),
        Row("double_blocks.0.img_mlp.fc1", ("transformer_blocks.0.ff.net.0.proj",), (64,), 16),
        Row("single_blocks.0.modulation.linear", (f"{SINGLE}.norm.linear",), (48,), 16),
        Row("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1",
            ("context_embedder.token_refiner.refiner_blocks.0.norm_out.linear",), (32,), 16),
    ),
    "lumina2": (
        qkv("layers.0.attn", "to_q", "to_k", "to_v", of="layers.0.attention.qkv",
            heights=(24, 8, 8)),
        Row("layers.0.feed_forward.w3", ("layers.0.feed_forward.linear_3",), (32,), 24),
    ),
    "z_image": (
        qkv("noise_refiner.1.attention", "to_q", "to_k", "to_v",
            of="noise_refiner.1.attention.qkv"),
        Row("layers.0.attention.out", ("layers.0.attention.to_out.0",), (16,), 16),
        Row("final_layer.linear", ("all_final_layer.2-1.linear",), (4,), 16),
    ),
    "wan": (
        Row("blocks.0.self_attn.q", ("blocks.0.attn1.to_q",), (16,), 16),
        Row("blocks.0.cross_attn.o", ("blocks.0.attn2.to_out.0",), (16,), 16),
        Row("blocks.0.ffn.2", ("blocks.0.ffn.net.2",), (16,), 32),
        Row("head.head", ("proj_out",), (8,), 16),
    ),
    "minimax_h3": (
        Row("blocks.0.mlp.fc1", ("transformer_blocks.0.ff.net.0.proj",), (64,), 16, True),
        qkv("transformer_blocks.0.attn", "to_q", "to_k", "to_v", of="blocks.0.attn.qkv_proj"),
    ),
}  # fmt: skip


def translated(row: Row, whole: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name in diffusers, its rows) of a weight or a bias of the original."""
    if row.is_swapped:
        whole = np.concatenate(np.split(whole, 2)[::-1])
    ends = np.cumsum(row.heights)
    yield from zip(row.diffusers, np.split(whole, ends[:-1]), strict=True)


def in_naming(naming: str, arrays: Arrays, rows: tuple[Row, ...]) -> Arrays:
    """Arrays by the original's modules under the names of a naming."""
    if naming == "original":
        return arrays
    by_name = {row.original: row for row in rows}
    return {name: part for module, whole in arrays.items()
            for name, part in translated(by_name[module], whole)}  # fmt: skip


def write_base(folder: Path, naming: str, prefix: str, weights: Arrays, biases: Arrays) -> Path:
    """A single file, or with ``transformer/`` a pipeline of diffusers."""
    tensors = {f"{prefix.replace('/', '')}{n}.weight": a for n, a in weights.items()}
    tensors |= {f"{prefix.replace('/', '')}{n}.bias": a for n, a in biases.items()}
    if not prefix.endswith("/"):
        save_file(tensors, folder / "base.safetensors")
        return folder / "base.safetensors"
    part = folder / "pipeline" / "transformer"
    part.mkdir(parents=True)
    index = {"_class_name": "P", "transformer": ["diffusers", "T"]}
    (folder / "pipeline" / "model_index.json").write_text(json.dumps(index))
    (part / "config.json").write_text('{"_class_name": "T"}')
    inner = {n.removeprefix("transformer."): a for n, a in tensors.items()}
    save_file(inner, part / "diffusion_pytorch_model.safetensors")
    return folder / "pipeline"


def write_flat(
    path: Path, factors: Mapping[str, tuple[np.ndarray, np.ndarray]], shifts: Arrays
) -> Path:
    tensors = {f"lora_unet_{n.replace('.', '_')}.diff_b": shift for n, shift in shifts.items()}
    for module, (down, up) in factors.items():
        stem = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                    f"{stem}.alpha": np.array(2, np.float32)}  # fmt: skip
    save_file(tensors, path)
    return path


def write_dotted(
    folder: Path, prefix: str, factors: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> Path:
    """PEFT's folder, whose keys are the modules' names as they are."""
    folder.mkdir()
    tensors = {}
    for module, (down, up) in factors.items():
        stem = f"base_model.model.{prefix}{module}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": [*factors]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors_in(
    naming: str, factors: Mapping[str, tuple[np.ndarray, np.ndarray]], rows: tuple[Row, ...]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The change under the names of a naming: rows of up move, down stays."""
    ups = in_naming(naming, {module: up for module, (_, up) in factors.items()}, rows)
    downs = {name: down for row in rows for name in (row.original, *row.diffusers)
             for down in (factors[row.original][0],)}  # fmt: skip
    return {name: (downs[name], up) for name, up in ups.items()}


ALSO = ("hunyuan_video", "sd3")  # the original's names behind the prefix of diffusers
BASES = [("original", ""), ("original", "model.diffusion_model."), ("diffusers", ""),
         ("diffusers", "transformer./")]  # fmt: skip


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize("family", CASES)
def test_a_change_binds_to_a_base_in_any_naming(tmp_path: Path, family: str, naming: str) -> None:
    rng, rows = np.random.default_rng(7), CASES[family]
    size = {row.original: (sum(row.heights), row.width) for row in rows}
    weights = {n: rng.normal(size=s).astype(np.float32) for n, s in size.items()}
    biases = {n: rng.normal(size=s[0]).astype(np.float32) for n, s in size.items()}
    factors = {
        n: (rng.normal(size=(4, s[1])).astype(np.float32),
            rng.normal(size=(s[0], 4)).astype(np.float32)) for n, s in size.items()
    }  # fmt: skip
    delta = {n: 0.5 * up.astype(np.float64) @ down.astype(np.float64)
             for n, (down, up) in factors.items()}  # fmt: skip
    terms = {n: 0.5 * abs(up).astype(np.float64) @ abs(down) for n, (down, up) in factors.items()}
    shifts = {n: rng.normal(size=s[0]).astype(np.float32) for n, s in size.items()}
    named = factors_in(naming, factors, rows)
    prefix = "transformer." if naming == "diffusers" or family in ALSO else "diffusion_model."
    adapters = [write_flat(tmp_path / "flat.safetensors", named, in_naming(naming, shifts, rows)),
                write_dotted(tmp_path / "dotted", prefix, named)]  # fmt: skip
    for i, (base_naming, before) in enumerate(BASES):
        (tmp_path / str(i)).mkdir()
        base_weights = in_naming(base_naming, weights, rows)
        base = write_base(tmp_path / str(i), base_naming, before, base_weights,
                          in_naming(base_naming, biases, rows))  # fmt: skip
        wanted = in_naming(base_naming, delta, rows)
        bounds = in_naming(base_naming, terms, rows)
        old_biases, moved = (in_naming(base_naming, a, rows) for a in (biases, shifts))
        for j, adapter in enumerate(adapters):
            if j and (i + (naming == "diffusers")) % 2:
                continue  # names with dots: half of the bases, to save time
            out = tmp_path / f"out{i}{j}{base.suffix}"
            lt.merge([str(adapter)], base=str(base), output=str(out))
            file = out if out.is_file() else next(out.glob("transformer/*.safetensors"))
            merged = load_file(str(file))
            home = before if not before.endswith("/") else ""
            for name, weight in base_weights.items():
                got = merged[f"{home}{name}.weight"]
                assert rounded_once(got, weight, wanted[name], bounds[name]), (base, name)
                bias = old_biases[name] + (moved[name] if adapter.is_file() else 0)
                assert (merged[f"{home}{name}.bias"] == bias).all(), (base, name)


# (name, the original's module, its rows) of trainers that have names of their own.
FURTHER = [
    ("double_blocks.0.img_attn.qkv.1", "double_blocks.0.img_attn.qkv", (16, 32)),
    ("double_blocks.0.processor.qkv_lora2", "double_blocks.0.txt_attn.qkv", (0, 48)),
    ("blocks.0.attn.a_to_qkv", "double_blocks.0.img_attn.qkv", (0, 48)),
    ("single_blocks.0.linear1.3", "single_blocks.0.linear1", (48, 112)),
    ("single_blocks.0.processor.qkv_lora", "single_blocks.0.linear1", (0, 48)),
    ("single_blocks.0.to_qkv_mlp", "single_blocks.0.linear1", (0, 112)),
    ("single_blocks.0.norm.linear", "single_blocks.0.modulation.lin", (0, 48)),
]


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize(("name", "original", "span"), FURTHER)
def test_names_of_other_trainers(
    tmp_path: Path, name: str, original: str, span: tuple[int, int], naming: str
) -> None:
    rng, rows = np.random.default_rng(2), CASES["flux1"]
    weights = {
        r.original: rng.normal(size=(sum(r.heights), r.width)).astype(np.float32) for r in rows
    }
    base = write_base(tmp_path, naming, "", in_naming(naming, weights, rows), {})
    down = rng.normal(size=(4, 16)).astype(np.float32)
    up = rng.normal(size=(span[1] - span[0], 4)).astype(np.float32)
    adapter = write_dotted(tmp_path / "dotted", "transformer.", {name: (down, up)})
    lt.merge([str(adapter)], base=str(base), output=str(tmp_path / "out.safetensors"))
    merged = load_file(str(tmp_path / "out.safetensors"))
    delta = {n: np.zeros(w.shape) for n, w in weights.items()}
    delta[original][slice(*span)] = 0.5 * up.astype(np.float64) @ down.astype(np.float64)
    terms = {n: np.full(w.shape, 100.0) for n, w in weights.items()}
    wanted, bounds = (in_naming(naming, a, rows) for a in (delta, terms))
    for module, weight in in_naming(naming, weights, rows).items():
        got = merged[f"{module}.weight"]
        assert rounded_once(got, weight, wanted[module], bounds[module]), module


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_a_change_under_two_names_counts_once(tmp_path: Path, naming: str) -> None:
    """Files for Z-Image hold the fused change and the separate ones, for one program each."""
    rng, rows = np.random.default_rng(5), CASES["z_image"][:2]
    weights = {r.original: rng.normal(size=(sum(r.heights), 16)).astype(np.float32) for r in rows}
    base = write_base(tmp_path, naming, "", in_naming(naming, weights, rows), {})
    factors = {n: rng.normal(size=(len(w) + 16, 6)).astype(np.float32) for n, w in weights.items()}
    pairs = {n: (both[:16].T.copy(), both[16:].copy()) for n, both in factors.items()}
    separate = factors_in("diffusers", pairs, rows)
    files = {"both": pairs | separate, "one": pairs}
    merged = {}
    for name, some in files.items():
        adapter = write_flat(tmp_path / f"{name}.safetensors", some, {})
        lt.merge([str(adapter)], base=str(base), output=str(tmp_path / f"{name}-out.safetensors"))
        merged[name] = load_file(str(tmp_path / f"{name}-out.safetensors"))
    assert all((merged["both"][n] == merged["one"][n]).all() for n in merged["one"])
    assert all((merged["one"][f"{n}.weight"] != w).any()
               for n, w in in_naming(naming, weights, rows).items())  # fmt: skip
    name = rows[0].diffusers[1]
    separate[name] = (separate[name][0], separate[name][1] * np.float32(1.01))
    other = write_flat(tmp_path / "other.safetensors", pairs | separate, {})
    with pytest.raises(lt.LoratoolError, match="twice") as caught:
        lt.merge([str(other)], base=str(base), output=str(tmp_path / "out.safetensors"))
    assert caught.value.code == "LT-447" and "difference" in str(caught.value)


def test_nothing_bound_is_an_error_and_a_part_is_a_table(tmp_path: Path) -> None:
    """Also where the user lets modules be left out."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(16, 16)).astype(np.float32)
    base, out = str(tmp_path / "base.safetensors"), str(tmp_path / "out.safetensors")
    save_file({f"blocks.0.self_attn.{n}.weight": weight for n in "qk"}, base)
    pair = (weight[:4].copy(), weight[:, :4].copy())
    wrong = write_flat(tmp_path / "wrong.safetensors", {"double_blocks.0.img_attn.proj": pair}, {})
    names = ("blocks.0.attn1.to_q", "blocks.0.attn2.add_k_proj")
    some = write_flat(tmp_path / "some.safetensors", dict.fromkeys(names, pair), {})
    for adapter, is_allowed in ((wrong, False), (wrong, True), (some, False)):
        with pytest.raises(lt.LoratoolError) as caught:
            lt.merge([str(adapter)], base=base, output=out, allow_unmatched=is_allowed)
        assert caught.value.code == "LT-430"
    lt.merge([str(some)], base=base, allow_unmatched=True, output=out)
    merged = load_file(out)
    assert (merged["blocks.0.self_attn.q.weight"] != weight).any()
    assert (merged["blocks.0.self_attn.k.weight"] == weight).all()


XLABS = {"double_blocks.0.processor.qkv_lora1": (48, 16), "single_blocks.0.processor.qkv_lora":
         (48, 16), "single_blocks.0.processor.proj_lora": (16, 80)}  # fmt: skip
KOHYA = {"double_blocks_0_img_attn_qkv": (48, 16), "single_blocks_0_linear1": (112, 16),
         "single_blocks_0_linear2": (16, 80), "single_blocks_1_linear1": (112, 16)}  # fmt: skip


@pytest.mark.parametrize("first", ["kohya", "xlabs"])
def test_trainers_that_fuse_and_split_otherwise_are_summed(first: str, tmp_path: Path) -> None:
    """XLabs has q, k and v of a single block alone: of linear1 they are the first rows of seven."""
    rng = np.random.default_rng(5)
    want: dict[str, np.ndarray] = {}
    files: dict[str, Arrays] = {"xlabs": {}, "kohya": {}}
    for name, (rows, width) in XLABS.items():
        up, down = rng.normal(size=(rows, 2)), rng.normal(size=(2, width))
        files["xlabs"] |= {f"{name}.up.weight": up, f"{name}.down.weight": down}
        key = {"qkv_lora1": "double_blocks_0_img_attn_qkv", "proj_lora": "single_blocks_0_linear2",
               "qkv_lora": "single_blocks_0_linear1"}[name.rpartition(".")[2]]  # fmt: skip
        full = np.zeros(KOHYA[key])
        full[:rows] = up.astype("f4").astype("f8") @ down.astype("f4").astype("f8")
        want[key] = 0.5 * full
    for name, (rows, width) in KOHYA.items():
        up, down = rng.normal(size=(rows, 3)), rng.normal(size=(3, width))
        stem = f"lora_unet_{name}"
        files["kohya"] |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down,
                           f"{stem}.alpha": np.array(2.0)}  # fmt: skip
        product = up.astype("f4").astype("f8") @ down.astype("f4").astype("f8")
        want[name] = want.get(name, 0) + product * 2 / 3
    for name, tensors in files.items():
        save_file({k: v.astype(np.float32) for k, v in tensors.items()},
                  str(tmp_path / f"{name}.safetensors"))  # fmt: skip
    texts = [str(tmp_path / "kohya.safetensors"), f"{tmp_path / 'xlabs.safetensors'}:0.5"]
    out = tmp_path / "out.safetensors"
    lt.merge(texts if first == "kohya" else texts[::-1], output=out)
    found = {m.name.removeprefix("unet.").removesuffix(".weight"): m.delta().double().numpy()
             for m in lt.open(out)}  # fmt: skip
    assert found.keys() == want.keys()
    for name, change in want.items():
        assert np.abs(found[name] - change).max() <= 2.0**-21 * np.abs(change).max(), name
    with pytest.raises(lt.LoratoolError, match="has not all of its parts") as caught:
        lt.convert([texts[0]], to="xlabs", output=tmp_path / "x.safetensors")
    assert caught.value.code == "LT-494"
