"""LyCORIS' OFT, BOFT, GLoRA, IA³ and T-LoRA: against numpy and what LyCORIS itself merged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from tests.oracle.kohya_files import SAMPLES, adapter_of
from tests.oracle.turned_files import LYCORIS

BASE = SAMPLES / "base" / "lycoris.safetensors"
Arrays = dict[str, np.ndarray]
# lycoris-lora writes 1×1 factors for a T-LoRA of a larger kernel, which fit nothing.
SKIPPED = {"tlora": ["conv3"]}
MERGED = {"merged": 1.0, "merged_s05": 0.5, "effective": 1.0}


def modules(path: Path) -> dict[str, Arrays]:
    found: dict[str, Arrays] = {}
    for key, tensor in load_file(str(path)).items():
        stem, role = key.removeprefix("lycoris_").split(".", 1)
        found.setdefault(stem, {})[role] = tensor
    return found


def merge(name: str, out: Path, weight: float = 1.0, base: Path = BASE, **more: Any) -> Arrays:
    adapter = f"{adapter_of(f'lycoris_{name}')}:{weight}"
    skip = SKIPPED.get(name, [])
    lt.merge([adapter], base=base, output=out, skip=skip, **more)
    return load_file(str(out))


def wanted(name: str, weight: float) -> Arrays:
    """Changed tensors, float64."""
    base = load_file(str(BASE))
    return {
        f"{stem}.weight": LYCORIS[name](fields, base[f"{stem}.weight"], weight)
        for stem, fields in modules(adapter_of(f"lycoris_{name}")).items()
        if stem not in SKIPPED.get(name, [])
    }


@pytest.mark.parametrize("weight", [1.0, 0.5, -0.3])
@pytest.mark.parametrize("name", LYCORIS)
def test_a_sample_merges_to_the_formula(tmp_path: Path, name: str, weight: float) -> None:
    """In float64 and rounded once: the nearest float32, but for the sum's own roundings."""
    got, base = merge(name, tmp_path / "out.safetensors", weight), load_file(str(BASE))
    changed = wanted(name, weight)
    for key, exact in changed.items():
        assert np.abs(exact - base[key]).max() > 1e-3
        half = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) / 2
        assert (np.abs(got[key] - exact) <= half + 2.0**-40).all(), key
    assert all(got[k].tobytes() == base[k].tobytes() for k in base if k not in changed)


@pytest.mark.parametrize("name", LYCORIS)
def test_a_sample_merges_to_what_lycoris_made(tmp_path: Path, name: str) -> None:
    for file, weight in MERGED.items():
        path = SAMPLES / f"lycoris_{name}" / f"{file}.safetensors"
        if not path.exists():
            continue
        got = merge(name, tmp_path / f"{file}.safetensors", weight)
        for key, tensor in load_file(str(path)).items():
            if key.split(".")[0] not in SKIPPED.get(name, []):
                assert np.abs(got[key] - tensor).max() <= (2e-6 if name == "tlora" else 5e-7), (
                    file,
                    key,
                )


@pytest.mark.parametrize("name", LYCORIS)
def test_a_sample_is_read_whole_and_written_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    path = adapter_of(f"lycoris_{name}")
    adapter = open_adapter(path)
    claimed = {s.name for spec in adapter.specs for s in spec.fields.values()}
    assert claimed | {ref.name for ref in adapter.carried} == set(load_file(str(path)))
    lt.rescale([path], 1, output=tmp_path / "again.safetensors", provenance=False)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", LYCORIS)
def test_a_sample_under_kohyas_names_is_the_same_change(tmp_path: Path, name: str) -> None:
    """Written anew by another table, and read again."""
    path = adapter_of(f"lycoris_{name}")
    lt.convert([path], to="kohya", output=tmp_path / "k.safetensors")
    before, after = load_file(str(path)), load_file(str(tmp_path / "k.safetensors"))
    renamed = {k.replace("lycoris_", "lora_unet_"): v for k, v in before.items()}
    assert set(renamed) == set(after)
    assert all(float(np.abs(renamed[k] - after[k]).max()) == 0 for k in after)
    specs = [open_adapter(p).specs for p in (path, tmp_path / "k.safetensors")]
    for one, other in zip(*specs, strict=True):
        assert one.kind == other.kind and one.settings == other.settings
        assert (one.alpha, one.scaling, one.base_change) == (
            other.alpha, other.scaling, other.base_change)  # fmt: skip


@pytest.mark.parametrize("name", ["oft", "boft_rescaled", "glora", "ia3_on_input", "tlora"])
def test_a_merge_is_verified_and_undone(tmp_path: Path, name: str) -> None:
    out, undo = tmp_path / "out.safetensors", tmp_path / "undo.safetensors"
    merge(name, out, save_undo=undo)
    adapter, skip = adapter_of(f"lycoris_{name}"), SKIPPED.get(name, [])
    assert lt.verify(out, base=BASE, adapters=[adapter], skip=skip).verdict == "identical"
    lt.subtract([adapter], merged=out, undo=undo, output=tmp_path / "back.safetensors", skip=skip)
    back, base = load_file(str(tmp_path / "back.safetensors")), load_file(str(BASE))
    assert all(back[k].tobytes() == base[k].tobytes() for k in base)


@pytest.mark.parametrize("name", [n for n in LYCORIS if n != "tlora"])
def test_what_needs_the_base_is_refused_without_it(tmp_path: Path, name: str) -> None:
    path, out = adapter_of(f"lycoris_{name}"), tmp_path / "out.safetensors"
    factor = -0.5 if name == "glora" else 0.5  # which alpha takes where it is positive
    for command in (
        lambda: lt.compress([path], rank=2, output=out),
        lambda: lt.rescale([path], factor, output=out),
        lambda: lt.merge([path, path], output=out),
        lambda: lt.merge([path, path], base=BASE, output=out, method="ties"),
    ):
        with pytest.raises(lt.LoratoolError) as caught:
            command()
        assert caught.value.code in ("LT-460", "LT-418", "LT-498"), caught.value
        assert not out.exists()


@pytest.mark.parametrize("name", ["oft_rescaled", "boft", "glora", "ia3", "ia3_on_input"])
def test_with_the_base_kernels_become_lora_that_is_cut_scaled_and_added(
    tmp_path: Path, name: str
) -> None:
    path, base = adapter_of(f"lycoris_{name}"), load_file(str(BASE))
    changed = {key: new - base[key] for key, new in wanted(name, 1.0).items()}

    def check(out: Path, want: Arrays) -> None:
        into = out.with_suffix(".merged.safetensors")
        lt.merge([out], base=BASE, output=into)
        for key, got in load_file(str(into)).items():
            if key in want:  # factors in float32, and W' rounded once
                half = np.spacing(np.abs(got)).astype(np.float64) / 2
                error = np.abs(got - (base[key].astype(np.float64) + want[key])) - half
                assert error.max() <= 2**-21 * np.abs(want[key]).max(), key

    out = {word: tmp_path / f"{word}.safetensors" for word in ("half", "sum", "cut")}
    lt.rescale([path], 0.5, base=BASE, output=out["half"])
    check(out["half"], {key: 0.5 * d for key, d in changed.items()})
    lt.merge([path, out["half"]], base=BASE, into="adapter", output=out["sum"])
    check(out["sum"], {key: 1.5 * d for key, d in changed.items()})
    (cut,) = lt.compress([path], rank=2, base=BASE, output=out["cut"]).adapters
    if cut.is_unchanged:
        assert name in ("oft_rescaled", "ia3", "ia3_on_input")  # smaller than two ranks
        return
    U, S, Vh = np.linalg.svd(changed["conv3.weight"].reshape(len(base["conv3.weight"]), -1),
                             full_matrices=False)  # fmt: skip
    best = ((U[:, :2] * S[:2]) @ Vh[:2]).reshape(base["conv3.weight"].shape)
    check(out["cut"], {"conv3.weight": best})
    (spec,) = (s for s in open_adapter(out["cut"]).specs if s.module.endswith("conv3"))
    assert (spec.layout, spec.rank) == ("conv", 2)


def test_glora_is_rescaled_in_alpha(tmp_path: Path) -> None:
    """Its change is linear in alpha, whatever W is."""
    lt.rescale([adapter_of("lycoris_glora")], 0.3, output=tmp_path / "small.safetensors")
    lt.merge([tmp_path / "small.safetensors"], base=BASE, output=tmp_path / "out.safetensors")
    got = load_file(str(tmp_path / "out.safetensors"))
    for key, exact in wanted("glora", 0.3).items():
        assert np.abs(got[key] - exact).max() <= 2.0**-22, key


def test_older_glora_files_have_their_factors_the_other_way_round(tmp_path: Path) -> None:
    tensors = load_file(str(adapter_of("lycoris_glora")))
    turn = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    old = {re.sub(r"\.([ab][12])\.", lambda m: f".{turn[m[1]]}.", k): v for k, v in tensors.items()}
    save_file(old, str(tmp_path / "old.safetensors"))
    lt.merge([tmp_path / "old.safetensors"], base=BASE, output=tmp_path / "out.safetensors")
    assert_same(
        load_file(str(tmp_path / "out.safetensors")), merge("glora", tmp_path / "new.safetensors")
    )


def assert_same(one: Arrays, other: Arrays) -> None:
    assert one.keys() == other.keys()
    assert all(one[k].tobytes() == other[k].tobytes() for k in one)


def test_blocks_of_any_height_give_the_same_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that a block lacks are read again: heights that cut through groups of rows."""
    whole = {n: merge(n, tmp_path / f"{n}.safetensors") for n in ("oft", "boft", "glora")}
    from loratool.engine import grid

    for rows in (1, 3, 7):
        monkeypatch.setattr(grid, "MIN_ROWS", rows)
        monkeypatch.setattr(grid, "_height", lambda cols, elements, rows=rows: rows)
        for name, want in whole.items():
            got = merge(name, tmp_path / f"{name}{rows}.safetensors", threads=3)
            for key in want:
                assert np.abs(got[key] - want[key]).max() <= 2.0**-24, (name, rows, key)


DAMAGE = {
    "oft": ("lin_a.oft_blocks", (12, 4, 3), "LT-363"),
    "boft": ("lin_a.oft_blocks", (4, 8, 6, 5), "LT-363"),
    "oft_rescaled": ("lin_a.rescale", (47, 1), "LT-363"),
    "glora": ("lin_a.b2.weight", (4, 31), "LT-363"), "ia3": ("lin_a.weight", (6, 8), "LT-363"),
    "tlora": ("lin_a.lambda_layer", (1, 3), "LT-366"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_tensors_that_do_not_fit_each_other_are_refused(tmp_path: Path, name: str) -> None:
    key, shape, code = DAMAGE[name]
    tensors = load_file(str(adapter_of(f"lycoris_{name}")))
    tensors[f"lycoris_{key}"] = np.zeros(shape, np.float32)
    save_file(tensors, str(tmp_path / "a.safetensors"))
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(tmp_path / "a.safetensors")
    assert caught.value.code == code and "lin_a" in str(caught.value.key)


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("oft", "oft_blocks", (11, 4, 4)),
        ("boft", "oft_blocks", (4, 8, 8, 8)),
        ("ia3", "weight", (47,)),
    ],
)
def test_ragged_sizes_name_what_the_weight_has(
    tmp_path: Path, name: str, key: str, shape: tuple[int, ...]
) -> None:
    tensors = load_file(str(adapter_of(f"lycoris_{name}")))
    tensors[f"lycoris_lin_a.{key}"] = np.full(shape, 0.01, np.float32)
    save_file(tensors, str(tmp_path / "a.safetensors"))
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([tmp_path / "a.safetensors"], base=BASE, output=tmp_path / "o.safetensors")
    assert caught.value.code == "LT-432" and "(48, 32)" in str(caught.value)


def test_a_flag_is_0_or_1(tmp_path: Path) -> None:
    tensors = load_file(str(adapter_of("lycoris_ia3")))
    tensors["lycoris_lin_a.on_input"] = np.array(2)
    save_file(tensors, str(tmp_path / "a.safetensors"))
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(tmp_path / "a.safetensors")
    assert caught.value.code == "LT-376"


@pytest.mark.parametrize("words", ['"sig_type": "last"', '"use_data_init": "False"'])
def test_tlora_that_started_elsewhere_is_refused_by_name(tmp_path: Path, words: str) -> None:
    tensors = load_file(str(adapter_of("lycoris_tlora")))
    save_file(tensors, str(tmp_path / "a.safetensors"),
              metadata={"ss_network_args": f'{{"algo": "tlora", {words}}}'})  # fmt: skip
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(tmp_path / "a.safetensors")
    assert caught.value.code == "LT-402" and "T-LoRA" in str(caught.value)


def test_fused_rows_go_into_several_tensors_in_whole_groups_only(tmp_path: Path) -> None:
    """An OFT of a fused qkv on a base that has q, k and v apart."""
    rng = np.random.default_rng(3)
    names = [f"transformer_blocks.0.attn.to_{p}.weight" for p in "qkv"]
    base = {name: rng.standard_normal((16, 16)).astype(np.float32) for name in names}
    save_file(base, str(tmp_path / "base.safetensors"))
    for b, fits in ((4, True), (6, False)):
        blocks = rng.standard_normal((48 // b, b, b)).astype(np.float32) * 0.1
        stem = "lora_unet_double_blocks_0_img_attn_qkv"
        save_file({f"{stem}.oft_blocks": blocks, f"{stem}.alpha": np.array(0, np.float32)},
                  str(tmp_path / "a.safetensors"))  # fmt: skip
        out = tmp_path / f"out{b}.safetensors"
        if not fits:
            with pytest.raises(lt.LoratoolError) as caught:
                lt.merge(
                    [tmp_path / "a.safetensors"], base=tmp_path / "base.safetensors", output=out
                )
            assert "LT-439" in str(caught.value) or caught.value.code == "LT-439"
            continue
        lt.merge([tmp_path / "a.safetensors"], base=tmp_path / "base.safetensors", output=out)
        whole = np.concatenate(list(base.values()))
        want = LYCORIS["oft"]({"oft_blocks": blocks, "alpha": np.float32(0)}, whole, 1.0)
        got = np.concatenate([load_file(str(out))[k] for k in base])
        assert np.abs(got - want).max() < 1e-6
