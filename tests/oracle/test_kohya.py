"""kohya and LyCORIS: read, merged, written back, against numpy and the files' own programs."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.bind.bindings import bind
from loratool.dialects import open_adapter
from loratool.options.groups import Names
from loratool.store.checkpoint import open_checkpoint
from tests.oracle.kohya_files import SAMPLES, adapter_of, deltas, near, rounded_once

KEYS = Path(__file__).parents[1] / "data" / "keys"
LOCON = ["lycoris_locon", "lycoris_locon_alpha_eq", "lycoris_locon_norm",
         "lycoris_locon_scalar_rs", "lycoris_locon_tucker"]  # fmt: skip
BASES = {"kohya_sd15_locon": "kohya_sd15", "kohya_sgm_naming": "kohya_sgm"} | dict.fromkeys(
    LOCON, "lycoris"
)
EVERY = sorted(p.name for p in SAMPLES.iterdir() if (p / "adapter.safetensors").exists())
PREFIX = {"lora_unet_": "unet.", "lora_te_": "text_encoder.", "lycoris_": ""}


def keys_of(name: str) -> Any:
    with gzip.open(KEYS / f"{name}.json.gz") as file:
        return json.load(file)


def targets(sample: str, names: list[str]) -> dict[tuple[str, str], str]:
    """(stem, parameter) -> tensor of the base, from lists of names that others made."""
    spelled = {n: n for n in names}
    if sample == "kohya_sgm_naming":
        pairs = keys_of("ldm_diffusers")["sdxl_base"]["pairs"]
        for ldm, other in pairs.items():
            spelled[ldm.removeprefix("model.diffusion_model.")] = other.removeprefix("unet_")
    prefixes = PREFIX if sample != "kohya_sgm_naming" else {"lora_unet_": ""}
    found = {}
    for flat_prefix, dotted in prefixes.items():
        for name, real in spelled.items():
            if real in names and name.startswith(dotted):
                module, _, parameter = name.removeprefix(dotted).rpartition(".")
                found[flat_prefix + module.replace(".", "_"), parameter] = real
    return found


def merge(adapter: Path, base: Path, out: Path, **options: Any) -> dict[str, np.ndarray]:
    lt.merge([str(adapter)], base=str(base), output=str(out), **options)
    return load_file(str(out))


@pytest.mark.parametrize("sample", EVERY)
def test_a_sample_is_written_back_byte_for_byte(tmp_path: Path, sample: str) -> None:
    out = tmp_path / "again.safetensors"
    lt.rescale([str(adapter_of(sample))], 1, output=str(out), provenance=False)
    assert out.read_bytes() == adapter_of(sample).read_bytes()


@pytest.mark.parametrize("sample", BASES)
def test_a_sample_merges_to_what_its_program_made(tmp_path: Path, sample: str) -> None:
    base = SAMPLES / "base" / f"{BASES[sample]}.safetensors"
    merged = merge(adapter_of(sample), base, tmp_path / "out.safetensors")
    before = load_file(str(base))
    reference = before | load_file(str(SAMPLES / sample / "merged.safetensors"))
    places, wanted = targets(sample, list(before)), deltas(adapter_of(sample))
    changed = set()
    for (stem, parameter), (delta, size) in wanted.items():
        name = places[stem, parameter]
        assert rounded_once(merged[name], before[name], delta, size), name
        assert near(merged[name], reference[name], before[name], size, rank=4), name
        changed.add(name)
    assert len(changed) == len(wanted)
    assert all(merged[n].tobytes() == before[n].tobytes() for n in before if n not in changed)


FAMILIES = ["flux1_kohya_dense", "flux1_kohya_blockdiag", "flux2_kohya", "qwen_image_musubi",
            "wan_musubi", "z_image_musubi"]  # fmt: skip


@pytest.mark.parametrize("sample", FAMILIES)
def test_a_sample_merges_into_diffusers_names(tmp_path: Path, sample: str) -> None:
    """On a base of zeros the result is ΔW: that of diffusers' own converter."""
    expected = load_file(str(SAMPLES / sample / "expected_diffusers.safetensors"))
    products = {}
    for key in expected:
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            right, left = expected[key], expected[f"{module}.lora_B.weight"]
            products[f"{module}.weight"] = left.astype(np.float64) @ right.astype(np.float64)
    base = tmp_path / "base.safetensors"
    save_file({n: np.zeros(p.shape, np.float32) for n, p in products.items()}, str(base))
    merged = merge(adapter_of(sample), base, tmp_path / "out.safetensors")
    for name, product in products.items():
        assert np.allclose(merged[name], product, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("sample", FAMILIES)
def test_a_sample_merges_into_its_own_names(tmp_path: Path, sample: str) -> None:
    rng, wanted = np.random.default_rng(1), deltas(adapter_of(sample))
    # Any dotted names that are flattened to these will do, below the prefix of a single file.
    names = {stem: "model.diffusion_model." + stem.removeprefix("lora_unet_").replace("_0_", ".0.")
             for stem, _ in wanted}  # fmt: skip
    before = {f"{names[stem]}.weight": rng.standard_normal(delta.shape).astype(np.float32)
              for (stem, _), (delta, _) in wanted.items()}  # fmt: skip
    base = tmp_path / "base.safetensors"
    save_file(before, str(base))
    merged = merge(adapter_of(sample), base, tmp_path / "out.safetensors")
    for (stem, _), (delta, size) in wanted.items():
        name = f"{names[stem]}.weight"
        assert rounded_once(merged[name], before[name], delta, size), name


def lora(stem: str, out: int, inner: int, rank: int, seed: int, **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    down, up = rng.standard_normal((rank, inner)), rng.standard_normal((out, rank))
    made = {"lora_down.weight": down, "lora_up.weight": up} | more
    return {f"{stem}.{k}": np.asarray(v, np.float32 if k != "alpha" else None)
            for k, v in made.items()}  # fmt: skip


def test_flux_on_separate_projections_and_swapped_halves(tmp_path: Path) -> None:
    """linear1 is q, k, v and the MLP; the last modulation's halves changed places."""
    adapter, base = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = lora("lora_unet_single_blocks_3_linear1", 28, 4, 3, 1, alpha=np.int64(6))
    tensors |= lora("lora_unet_final_layer_adaLN_modulation_1", 8, 4, 2, 2)
    save_file(tensors, str(adapter))
    rows = {"attn.to_q": 4, "attn.to_k": 4, "attn.to_v": 4, "proj_mlp": 16}
    single = "single_transformer_blocks.3."
    weights = {f"{single}{n}.weight": np.ones((r, 4), np.float32) for n, r in rows.items()}
    weights["norm_out.linear.weight"] = np.ones((8, 4), np.float32)
    save_file(weights, str(base))
    merged = merge(adapter, base, tmp_path / "o.safetensors")
    found = deltas(adapter)
    whole, _ = found["lora_unet_single_blocks_3_linear1", "weight"]
    got = np.concatenate([merged[f"{single}{n}.weight"] for n in rows])
    assert np.array_equal(got, (1 + whole).astype(np.float32))
    last, _ = found["lora_unet_final_layer_adaLN_modulation_1", "weight"]
    swapped = np.concatenate([last[4:], last[:4]])
    assert np.array_equal(merged["norm_out.linear.weight"], (1 + swapped).astype(np.float32))


def test_the_second_text_encoder_of_a_single_file_has_one_tensor_for_q_k_v(
    tmp_path: Path,
) -> None:
    adapter, base = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors: dict[str, Any] = {}
    for seed, leaf in enumerate(("q_proj", "v_proj")):
        tensors |= lora(f"lora_te2_text_model_encoder_layers_1_self_attn_{leaf}", 4, 4, 2, seed)
    save_file(tensors, str(adapter))
    name = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    save_file({name: np.ones((12, 4), np.float32)}, str(base))
    merged = merge(adapter, base, tmp_path / "o.safetensors")[name]
    q, v = (delta for delta, _ in deltas(adapter).values())
    wanted = 1 + np.concatenate([q, np.zeros((4, 4)), v])
    assert np.array_equal(merged, wanted.astype(np.float32))


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [(None, 1.0), (np.int64(8), 2.0), (np.float16(1 / 3), float(np.float16(1 / 3)) / 4),
     (np.float32([6.0]), 1.5), (np.float64(0.1), 0.025)],
)  # fmt: skip
def test_alpha_of_any_type_and_none(tmp_path: Path, alpha: Any, scale: float) -> None:
    path = tmp_path / "a.safetensors"
    more = {} if alpha is None else {"alpha": alpha}
    save_file(lora("lora_unet_x", 6, 5, 4, 1, **more), str(path))
    adapter = open_adapter(path)
    assert [s.scaling for s in adapter.specs] == [scale]
    assert (alpha is None) == any("no alpha" in n for n in adapter.notes)


@pytest.mark.parametrize("alpha", [np.float32(np.nan), np.float32([1, 2]), np.float64(1e40)])
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, alpha: Any) -> None:
    path = tmp_path / "a.safetensors"
    save_file(lora("lora_unet_x", 6, 5, 4, 1, alpha=alpha), str(path))
    with pytest.raises(lt.LoratoolError, match="alpha is no usable number"):
        open_adapter(path)


def spoiled(kind: str) -> dict[str, Any]:
    tensors = lora("lora_unet_x", 6, 5, 4, 1, alpha=2.0)
    if kind == "alone":
        del tensors["lora_unet_x.lora_up.weight"]
    elif kind == "ranks":
        tensors["lora_unet_x.lora_up.weight"] = np.zeros((6, 3), np.float32)
    elif kind == "dora":
        tensors["lora_unet_x.dora_scale"] = np.zeros((7, 1), np.float32)
    elif kind == "lokr":
        tensors = {"lora_unet_x.lokr_w1": np.zeros((2, 2), np.float32)}
    elif kind == "bias":
        tensors["lora_unet_x.diff_b"] = np.zeros((3, 2), np.float32)
    elif kind == "strange":
        tensors["lora_unet_x.something"] = np.zeros((6, 1), np.float32)
    elif kind == "integers":
        tensors["lora_unet_x.lora_up.weight"] = np.zeros((6, 4), np.int32)
    return tensors


@pytest.mark.parametrize(
    ("kind", "code", "word"),
    [("alone", "LT-362", "incomplete"), ("ranks", "LT-363", "different ranks"),
     ("dora", "LT-366", "5 of columns"), ("lokr", "LT-362", "incomplete"),
     ("strange", "LT-415", "lora_unet_x.something"), ("integers", "LT-365", "float"),
     ("bias", "LT-366", "one dimension")],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, kind: str, code: str, word: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(spoiled(kind), str(path))
    with pytest.raises(lt.LoratoolError, match=word) as caught:
        open_adapter(path)
    assert caught.value.code == code


def test_parts_that_the_base_lacks_are_reported_and_skipped_on_request(tmp_path: Path) -> None:
    sample = adapter_of("kohya_sd15_locon")
    whole = load_file(str(SAMPLES / "base" / "kohya_sd15.safetensors"))
    unet = {n.removeprefix("unet."): v for n, v in whole.items() if n.startswith("unet.")}
    base = tmp_path / "unet.safetensors"
    save_file(unet, str(base))
    with pytest.raises(lt.LoratoolError, match="text encoder") as caught:
        lt.merge([str(sample)], base=str(base), output=str(tmp_path / "no.safetensors"))
    assert caught.value.code == "LT-430"
    report = lt.merge([str(sample)], base=str(base), output=str(tmp_path / "o.safetensors"),
                      skip=["te"])  # fmt: skip
    assert report.ok
    half = lt.merge([f"{sample}:unet=0.5,te=0.25"], output=str(tmp_path / "h.safetensors"),
                    base=str(SAMPLES / "base" / "kohya_sd15.safetensors"))  # fmt: skip
    assert half.ok
    merged = load_file(str(tmp_path / "h.safetensors"))
    places, found = targets("kohya_sd15_locon", list(whole)), deltas(sample)
    for (stem, parameter), (delta, size) in found.items():
        weight = 0.5 if stem.startswith("lora_unet") else 0.25
        name = places[stem, parameter]
        assert rounded_once(merged[name], whole[name], weight * delta, size), name


def test_a_name_that_may_be_two_tensors_is_an_error(tmp_path: Path) -> None:
    adapter, base = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(lora("lora_unet_a_b_c", 4, 4, 2, 1), str(adapter))
    save_file({n: np.ones((4, 4), np.float32) for n in ("a.b_c.weight", "a_b.c.weight")}, str(base))
    with pytest.raises(lt.LoratoolError, match="several tensors") as caught:
        lt.merge([str(adapter)], base=str(base), output=str(tmp_path / "o.safetensors"))
    assert caught.value.code == "LT-495"


def sparse(path: Path, tensors: Mapping[str, list[int]], numbers: Mapping[str, float]) -> None:
    """A file of BF16 tensors of which only the header and some numbers are stored."""
    entries, end, places = {}, 0, {}
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape, dtype=np.int64)) if shape else 2
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        places[name], end = end, end + size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, value in numbers.items():
            file.seek(8 + len(text) + places[name])
            file.write(struct.pack("<f", value)[2:])


@pytest.mark.parametrize("name", ["flux_kohya_te1", "krea2_kohya"])
def test_a_real_file_is_bound_and_planned_without_its_bytes(tmp_path: Path, name: str) -> None:
    keys = keys_of(name)
    sparse(tmp_path / "a.safetensors", keys, {k: 16.0 for k in keys if k.endswith("alpha")})
    shapes: dict[str, list[int]] = {}
    for key, up in keys.items():
        if key.endswith(".lora_up.weight"):
            stem = key.partition(".")[0]
            down = keys[f"{stem}.lora_down.weight"]
            _, part, flat = stem.split("_", 2)
            prefix = {"unet": "transformer.", "te1": "text_encoder."}[part]
            shapes[f"{prefix}{flat.replace('_', '.')}.weight"] = [up[0], down[1]]
    sparse(tmp_path / "b.safetensors", shapes, {})
    adapter = open_adapter(tmp_path / "a.safetensors")
    rank = next(shape for key, shape in keys.items() if key.endswith("lora_down.weight"))[0]
    assert {s.scaling for s in adapter.specs} == {16 / rank} and len(adapter.specs) == len(shapes)
    bindings = bind(adapter, open_checkpoint(tmp_path / "b.safetensors"), Names())
    assert {d.target for d in bindings.deltas} == set(shapes)
    report = lt.merge([str(tmp_path / "a.safetensors")], base=str(tmp_path / "b.safetensors"),
                      output=str(tmp_path / "o.safetensors"), dry_run=True)  # fmt: skip
    assert report.ok and not (tmp_path / "o.safetensors").exists()


def test_a_changed_file_says_no_more_than_what_holds(tmp_path: Path) -> None:
    sample, out = adapter_of("kohya_sd15_locon"), tmp_path / "out.safetensors"
    (row,) = lt.rescale([str(sample)], 0.3, output=str(out)).adapters
    before, after = open_adapter(sample), open_adapter(out)
    assert row.how == "alpha" and row.relative_error == 0
    for one, two in zip(before.specs, after.specs, strict=True):
        assert two.scaling == pytest.approx(0.3 * one.scaling, rel=2**-50)
    tensors = load_file(str(out))
    for key, value in load_file(str(sample)).items():
        assert key.endswith(".alpha") or tensors[key].tobytes() == value.tobytes(), key
    assert "sshs_model_hash" in before.metadata and "sshs_model_hash" not in after.metadata
    assert after.metadata["ss_network_dim"] == "Dynamic"  # ranks 2 and 4
    assert after.metadata["ss_network_args"] == before.metadata["ss_network_args"]
    assert json.loads(after.metadata["loratool"])["operation"] == "rescale"
    old, new = deltas(sample), deltas(out)
    assert set(old) == set(new)
    for key, (delta, size) in old.items():
        assert np.allclose(new[key][0], 0.3 * delta, rtol=0, atol=2.0**-22 * size.max())


@pytest.mark.parametrize(
    ("sample", "words", "how"),
    [("kohya_sd15_locon", {"factor": -0.5}, "factors"),
     ("lycoris_locon_norm", {"factor": 2}, "factors"),
     ("kohya_sd15_locon", {"factor": 1, "only": ["attn1=0.25"]}, "alpha"),
     ("kohya_sd15_locon", {"factor": 1, "only": ["attn1=0"]}, "factors")],
)  # fmt: skip
def test_what_alpha_cannot_take_goes_into_the_factors(
    tmp_path: Path, sample: str, words: dict[str, Any], how: str
) -> None:
    out = tmp_path / "out.safetensors"
    (row,) = lt.rescale([str(adapter_of(sample))], output=str(out), **words).adapters
    assert row.how == how
    new = deltas(out)
    for (stem, parameter), (delta, size) in deltas(adapter_of(sample)).items():
        is_only = "only" in words and "attn1" in stem
        factor = float(words["only"][0].split("=")[1]) if is_only else words["factor"]
        got = new[stem, parameter][0]
        assert np.allclose(got, factor * delta, rtol=0, atol=2.0**-22 * size.max())


def test_names_that_its_programs_pass_over_are_said() -> None:
    for sample, verdict in (("kohya_sd15_locon", "wrong"), ("kohya_sgm_naming", "yes")):
        found = lt.inspect(str(adapter_of(sample))).adapter
        assert found is not None
        first = found.loads[0]
        assert (first.program, first.verdict) == ("ComfyUI", verdict)
        assert bool(first.reasons) == (verdict == "wrong")


def test_bundled_embeddings_are_passed_on(tmp_path: Path) -> None:
    sample, out = adapter_of("kohya_bundle_emb"), tmp_path / "out.safetensors"
    lt.rescale([str(sample)], 0.3, output=str(out))
    before, after = load_file(str(sample)), load_file(str(out))
    bundled = [k for k in before if k.startswith("bundle_emb.")]
    assert len(bundled) == 3
    assert all(after[k].tobytes() == before[k].tobytes() for k in bundled)
    summed, other = tmp_path / "sum.safetensors", tmp_path / "other.safetensors"
    lt.merge([str(adapter_of("kohya_sd15_locon")), str(sample)], output=str(summed))
    both = load_file(str(summed))
    assert all(both[k].tobytes() == before[k].tobytes() for k in bundled)
    save_file(before | {bundled[0]: before[bundled[0]] + 1}, str(other))
    with pytest.raises(lt.LoratoolError, match="different tensors of one name"):
        lt.merge([str(other), str(sample)], output=str(tmp_path / "no.safetensors"))


def test_compressed_and_merged_with_each_other(tmp_path: Path) -> None:
    sample, out = adapter_of("lycoris_locon_tucker"), tmp_path / "out.safetensors"
    lt.compress([str(sample)], rank=3, output=str(out))
    old, new = deltas(sample), deltas(out)
    conv = ("lycoris_conv3", "weight")  # rank 3 already
    assert np.allclose(new[conv][0], old[conv][0], rtol=0, atol=1e-5)
    assert {s.rank for s in open_adapter(out).specs} == {3}
    two = tmp_path / "two.safetensors"
    lt.merge([f"{sample}:0.5", f"{adapter_of('lycoris_locon')}:2"], output=str(two))
    other = deltas(adapter_of("lycoris_locon"))
    for key, (delta, _) in deltas(two).items():
        assert np.allclose(delta, 0.5 * old[key][0] + 2 * other[key][0], rtol=1e-5, atol=1e-5)


def test_the_bias_of_a_layer_is_no_norm(tmp_path: Path) -> None:
    """`diff_b` stays what it is called, beside the norms' `b_norm`."""
    path, out = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    tensors = lora("lora_unet_x", 6, 5, 4, 1, alpha=2.0)
    tensors["lora_unet_x.diff_b"] = np.ones(6, np.float32)
    tensors["lora_unet_n.w_norm"] = tensors["lora_unet_n.b_norm"] = np.ones(6, np.float32)
    save_file(tensors, str(path))
    lt.rescale([str(path)], 2, output=str(out))
    assert set(load_file(str(out))) == set(tensors)
    base = tmp_path / "b.safetensors"
    save_file({f"{m}.{p}": np.zeros((6, 5) if (m, p) == ("x", "weight") else 6, np.float32)
               for m in "xn" for p in ("weight", "bias")}, str(base))  # fmt: skip
    merged = merge(out, base, tmp_path / "m.safetensors")
    for name in ("x.bias", "n.weight", "n.bias"):
        assert np.array_equal(merged[name], np.full(6, 2, np.float32)), name
