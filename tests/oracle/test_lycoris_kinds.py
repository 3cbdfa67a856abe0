"""LoKr, full differences, DoRA of either axis, DyLoRA: against numpy, LyCORIS, PEFT, fractions."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from tests.oracle.kohya_files import SAMPLES, adapter_of

Arrays = dict[str, np.ndarray]
LOKR = ["lycoris_lokr", "lycoris_lokr_both", "lycoris_lokr_full", "lycoris_lokr_tucker",
        "lycoris_lokr_unbalanced", "kohya_sd15_lokr"]  # fmt: skip
DORA = ["lycoris_dora_in", "lycoris_dora_out", "lycoris_loha_dora"]
ADDITIVE = [*LOKR, "lycoris_full_norm", "lycoris_dylora"]
EVERY = [*ADDITIVE, *DORA]
BASE = SAMPLES / "base" / "lycoris.safetensors"


def base_of(name: str) -> Path:
    return SAMPLES / "base" / "kohya_sd15.safetensors" if name.startswith("kohya") else BASE


# ------------------------------------------------------------------------------ the formulas


def pair(fields: Arrays, left: str, right: str, core: str) -> np.ndarray:
    """(out, in·k…) of two factors, perhaps with a core between them."""
    a, b = fields[left], fields[right]
    if core in fields:
        return np.einsum("ij...,jn,ip->pn...", fields[core], b, a).reshape(a.shape[1], -1)
    return a.reshape(len(a), -1) @ b.reshape(len(b), -1)


def product(fields: Arrays) -> tuple[np.ndarray, float]:
    """(ΔW (out, in·k…) before scaling, scaling) of a module."""
    alpha = float(fields.get("alpha", np.nan))
    if "lora_down.weight" in fields:
        rank = len(fields["lora_down.weight"])
        return pair(fields, "lora_up.weight", "lora_down.weight", "?"), alpha / rank
    if "hada_w1_a" in fields:
        one, other = (pair(fields, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
        return one * other, alpha / len(fields["hada_w1_b"])
    sides, ranks = [], []
    for name in ("lokr_w1", "lokr_w2"):
        whole = fields.get(name)
        if whole is None:
            whole = pair(fields, f"{name}_a", f"{name}_b", "lokr_t2" if name[-1] == "2" else "?")
            ranks.append(len(fields[f"{name}_b"]))
        sides.append(whole.reshape(len(whole), -1))
    return np.kron(*sides), alpha / ranks[0] if ranks else 1.0


def changed(fields: Arrays, weight: np.ndarray) -> np.ndarray:
    """W' of a weight."""
    if "diff" in fields or "w_norm" in fields:
        return weight + fields.get("diff", fields.get("w_norm")).reshape(weight.shape)
    delta, scaling = product(fields)
    V = weight + scaling * delta.reshape(weight.shape)
    lengths = fields.get("dora_scale")
    if lengths is None:
        return V
    axis = 1 if lengths.shape[0] == 1 else 0
    rest = tuple(i for i in range(V.ndim) if i != axis)
    return V * lengths / np.sqrt((V**2).sum(rest, keepdims=True))


def modules(path: Path) -> dict[str, Arrays]:
    found: dict[str, Arrays] = {}
    for key, tensor in load_file(str(path)).items():
        stem, _, suffix = key.partition(".")
        found.setdefault(stem, {})[suffix] = tensor.astype(np.float64)
    return found


def wanted(name: str) -> tuple[Arrays, Arrays]:
    """(what the base holds, what merging the sample makes of it), float64."""
    before = {k: v.astype(np.float64) for k, v in load_file(str(base_of(name))).items()}
    stems = {}
    for key in before:
        module = key.rpartition(".")[0]
        for prefix, dotted in (("lycoris_", ""), ("lora_unet_", "unet."),
                               ("lora_te_", "text_encoder.")):  # fmt: skip
            if module.startswith(dotted):
                stems[prefix + module.removeprefix(dotted).replace(".", "_")] = module
    after = dict(before)
    for stem, fields in modules(adapter_of(name)).items():
        module = stems[stem]
        if fields.keys() - {"alpha", "diff_b", "b_norm"}:
            after[f"{module}.weight"] = changed(fields, before[f"{module}.weight"])
        bias = fields.get("diff_b", fields.get("b_norm"))
        if bias is not None:
            after[f"{module}.bias"] = before[f"{module}.bias"] + bias
    return before, after


def merged(adapter: Path | list[Any], base: Path, folder: Path, **options: Any) -> Arrays:
    out = folder / f"merged{len(list(folder.iterdir()))}.safetensors"
    given = adapter if isinstance(adapter, list) else [adapter]
    lt.merge(given, base=base, output=out, **options)
    return load_file(str(out))


def near(got: Arrays, want: Arrays, limit: float = 1e-6) -> bool:
    return all(np.abs(got[k] - w).max() <= limit * max(1.0, np.abs(w).max())
               for k, w in want.items())  # fmt: skip


# -------------------------------------------------------------------------------- the samples


@pytest.mark.parametrize("name", EVERY)
def test_a_sample_merges_to_the_formula_and_to_what_lycoris_runs(tmp_path: Path, name: str) -> None:
    _, after = wanted(name)
    got = merged(adapter_of(name), base_of(name), tmp_path)
    for key, exact in after.items():
        # float64 inside, where every sum has fewer than 2⁹ terms of size 2³ at most
        half = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) / 2
        assert (np.abs(got[key] - exact) <= half + 2.0**-38).all(), key
    truth = adapter_of(name).with_name("merged.safetensors")
    if truth.exists():  # DyLoRA runs with a random part of its ranks
        theirs = load_file(str(truth))
        assert theirs and all(np.allclose(got[k], t, rtol=2e-6, atol=1e-6)
                              for k, t in theirs.items())  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_a_sample_is_written_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    out = tmp_path / "again.safetensors"
    lt.rescale([adapter_of(name)], 1, output=out, provenance=False)
    assert out.read_bytes() == adapter_of(name).read_bytes()


@pytest.mark.parametrize("name", [*LOKR, "lycoris_dylora"])
def test_it_becomes_a_plain_lora_with_the_same_change(tmp_path: Path, name: str) -> None:
    base = base_of(name)
    lt.convert([adapter_of(name)], to="peft", output=tmp_path / "lora", base=base)
    specs = open_adapter(tmp_path / "lora").specs
    assert {s.title for s in specs} == {"LoRA"}
    for spec in specs:
        left, right = spec.fields["lora_B"].shape, spec.fields["lora_A"].shape
        assert len(left) == len(right) and left[1] == right[0] <= min(left[0], np.prod(right[1:]))
    assert near(merged(tmp_path / "lora", base, tmp_path), wanted(name)[1])


@pytest.mark.parametrize("factor", [0.5, 0.3, -2.0])
@pytest.mark.parametrize("name", ["lycoris_lokr", "lycoris_lokr_both", "lycoris_lokr_full",
                                  "lycoris_full_norm", "lycoris_dylora"])  # fmt: skip
def test_it_is_rescaled(tmp_path: Path, name: str, factor: float) -> None:
    out = tmp_path / "scaled.safetensors"
    lt.rescale([adapter_of(name)], factor, output=out)
    before, after = wanted(name)
    want = {k: before[k] + factor * (after[k] - before[k]) for k in before}
    assert near(merged(out, BASE, tmp_path), want)
    old, new = (load_file(str(p)) for p in (adapter_of(name), out))
    assert set(old) == set(new)  # alpha says nothing of two whole matrices: it stays
    if name == "lycoris_lokr_full":
        assert all(old[k] == new[k] for k in old if k.endswith("alpha"))


@pytest.mark.parametrize("name", ["lycoris_loha_dora", "lycoris_dora_out"])
def test_lengths_of_rows_are_rescaled_with_the_base(tmp_path: Path, name: str) -> None:
    out = tmp_path / "half.safetensors"
    lt.rescale([adapter_of(name)], 0.5, base=BASE, output=out)
    before, after = wanted(name)
    assert near(merged(out, BASE, tmp_path), {k: (before[k] + after[k]) / 2 for k in before})
    shapes = {k: v.shape for k, v in load_file(str(out)).items() if k.endswith("dora_scale")}
    assert shapes["lycoris_conv3.dora_scale"] == (32, 1, 1, 1)
    assert shapes["lycoris_lin_a.dora_scale"] == (48, 1)


@pytest.mark.parametrize("name", DORA)
def test_a_weight_acts_outside_of_the_lengths(tmp_path: Path, name: str) -> None:
    before, after = wanted(name)
    got = merged([f"{adapter_of(name)}:0.25"], BASE, tmp_path)
    assert near(got, {k: before[k] + 0.25 * (after[k] - before[k]) for k in before})


def test_what_has_lengths_of_columns_needs_its_base(tmp_path: Path) -> None:
    adapter = adapter_of("lycoris_dora_in")
    file, folder = tmp_path / "out.safetensors", tmp_path / "out"
    for code, command in (
        ("LT-460", lambda: lt.rescale([adapter], 0.5, output=file)),
        ("LT-449", lambda: lt.compress([adapter], rank=2, output=file)),
    ):
        with pytest.raises(lt.LoratoolError) as caught:
            command()
        assert caught.value.code == code and not list(tmp_path.iterdir())
    before, after = wanted("lycoris_dora_in")
    lt.rescale([adapter], 0.5, base=BASE, output=file)
    assert near(merged(file, BASE, tmp_path), {k: (before[k] + after[k]) / 2 for k in before})
    lt.convert([adapter], to="peft", base=BASE, output=folder)
    assert {s.layout for s in open_adapter(folder).specs} == {"linear", "conv"}
    assert near(merged(folder, BASE, tmp_path), after)


@pytest.mark.parametrize("name", ["lycoris_lokr", "lycoris_full_norm"])
def test_it_adds_up_with_itself_and_is_taken_out_again(tmp_path: Path, name: str) -> None:
    before, after = wanted(name)
    adapter = adapter_of(name)
    lt.merge([f"{adapter}:1.5", f"{adapter}:-0.5"], output=tmp_path / "sum.safetensors")
    assert near(merged(tmp_path / "sum.safetensors", BASE, tmp_path), after)
    merged(adapter, BASE, tmp_path)
    lt.subtract(
        [adapter], merged=tmp_path / "merged1.safetensors", output=tmp_path / "back.safetensors"
    )
    assert near(load_file(str(tmp_path / "back.safetensors")), before)


@pytest.mark.parametrize("name", ["lycoris_lokr_full", "lycoris_full_norm"])
def test_it_is_compressed_to_the_best_approximation(tmp_path: Path, name: str) -> None:
    out = tmp_path / "small.safetensors"
    lt.compress([adapter_of(name)], rank=2, output=out)
    before, after = wanted(name)
    opened = lt.open(out)
    for key in ("conv3.weight", "lin_a.weight"):
        delta = (after[key] - before[key]).reshape(len(after[key]), -1)
        U, S, Vh = np.linalg.svd(delta)
        best = (U[:, :2] * S[:2]) @ Vh[:2]
        assert np.abs(opened[key].delta().numpy() - best).max() <= 1e-5 * S[0], key
    spectrum = lt.open(adapter_of(name))["lin_a.weight"].svd().numpy()
    sigma = np.linalg.svd(after["lin_a.weight"] - before["lin_a.weight"])[1]
    assert np.abs(spectrum - sigma[: len(spectrum)]).max() <= 1e-12 * sigma[0]


# ------------------------------------------------------------------------------ exact rounding


def test_exact_sums_of_kronecker_products(tmp_path: Path) -> None:
    """bfloat16 throughout: every element is the correctly rounded sum, of whole and thin sides."""
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    generator = torch.Generator().manual_seed(3)
    shapes = {"lokr_w1": (2, 3), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2)}
    fields = {k: torch.randn(s, generator=generator).bfloat16() for k, s in shapes.items()}
    weight = torch.randn(6, 6, generator=generator).bfloat16()
    save({f"lycoris_a.{k}": v for k, v in fields.items()} | {"lycoris_a.alpha": torch.tensor(3.0)},
         tmp_path / "a.safetensors")  # fmt: skip
    save({"a.weight": weight}, tmp_path / "base.safetensors")
    lt.merge([tmp_path / "a.safetensors"], base=tmp_path / "base.safetensors", exact=True,
             output=tmp_path / "out.safetensors")  # fmt: skip
    got = load(tmp_path / "out.safetensors")["a.weight"]
    w1, w2a, w2b = ([[Fraction(x) for x in row] for row in fields[k].double().tolist()]
                    for k in shapes)  # fmt: skip
    for i in range(6):
        for j in range(6):
            inner = sum(w2a[i % 3][k] * w2b[k][j % 2] for k in range(2))
            exact = Fraction(float(weight[i, j])) + Fraction(3, 2) * w1[i // 3][j // 2] * inner
            bits = got[i, j].view(torch.int16)
            for other in ((bits + step).view(torch.bfloat16) for step in (-1, 1)):
                assert abs(Fraction(float(got[i, j])) - exact) <= abs(
                    Fraction(float(other)) - exact
                )


@pytest.mark.parametrize("name", ["lycoris_lokr_tucker", "lycoris_dora_in"])
def test_what_is_no_sum_of_products_is_not_rounded_exactly(tmp_path: Path, name: str) -> None:
    with pytest.raises(lt.LoratoolError) as caught:
        merged(adapter_of(name), BASE, tmp_path, exact=True)
    assert caught.value.code == "LT-477"


# ----------------------------------------------------------------------------------- the traps


def written(folder: Path, tensors: Arrays, name: str = "a.safetensors") -> Path:
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, str(folder / name))
    return folder / name


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_two_whole_matrices_have_no_scale_whatever_alpha_says(tmp_path: Path) -> None:
    w1, w2 = random(2, 3), random(4, 2, seed=1)
    for alpha in (1.0, 100000.0):
        path = written(tmp_path, {"lycoris_a.lokr_w1": w1, "lycoris_a.lokr_w2": w2,
                                  "lycoris_a.alpha": np.float32(alpha)[None]})  # fmt: skip
        (module,) = lt.open(path)
        assert module.scaling == 1 and np.allclose(module.delta().numpy(), np.kron(w1, w2))


def test_in_peft_the_configuration_scales_them(tmp_path: Path) -> None:
    w1, w2 = random(2, 3), random(4, 2, seed=1)
    (tmp_path / "a").mkdir()
    save_file({"base_model.model.q.lokr_w1": w1, "base_model.model.q.lokr_w2": w2},
              str(tmp_path / "a" / "adapter_model.safetensors"))  # fmt: skip
    config = {"peft_type": "LOKR", "r": 8, "alpha": 4, "target_modules": ["q"],
              "rank_pattern": {"q": 16}, "decompose_factor": 2}  # fmt: skip
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    (module,) = lt.open(tmp_path / "a")
    assert module.scaling == 4 / 16
    assert np.allclose(module.delta().numpy(), np.kron(w1, w2) / 4)
    # kohya's readers scale them by 1: there it is a plain LoRA
    lt.convert([tmp_path / "a"], to="kohya", output=tmp_path / "k.safetensors")
    (module,) = lt.open(tmp_path / "k.safetensors")
    assert module.spec.title == "LoRA"
    assert np.abs(module.delta().numpy() - np.kron(w1, w2) / 4).max() <= 1e-6


def test_the_sample_of_peft(tmp_path: Path) -> None:
    folder = SAMPLES.parent / "llm" / "lokr"
    base, theirs = folder.parent / "loha" / "base", load_file(str(folder / "merged.safetensors"))
    lt.merge([folder], base=base, output=tmp_path / "out")
    got = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    assert theirs and all(np.allclose(got[k], t, rtol=2e-6, atol=1e-6) for k, t in theirs.items())
    lt.rescale([folder], 1, output=tmp_path / "again", provenance=False)
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    lt.convert([folder], to="peft", base=base, output=tmp_path / "same")
    lt.merge([tmp_path / "same"], base=base, output=tmp_path / "out2")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert near(load_file(tmp_path / "out2" / path.name), load_file(path))


def test_a_scalar_multiplies_the_change(tmp_path: Path) -> None:
    """Old files of LyCORIS have it beside the factors."""
    up, down = random(6, 2), random(2, 5, seed=1)
    path = written(tmp_path, {
        "lycoris_a.lora_up.weight": up, "lycoris_a.lora_down.weight": down,
        "lycoris_a.alpha": np.array(1, np.float32), "lycoris_a.scalar": np.array(-0.25, np.float32),
    })  # fmt: skip
    (module,) = lt.open(path)
    assert np.allclose(module.delta().numpy(), -0.125 * up.astype(np.float64) @ down)
    lt.rescale([path], 1, output=tmp_path / "b.safetensors", provenance=False)
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    lt.rescale([path], 2, output=tmp_path / "c.safetensors")
    (module,) = lt.open(tmp_path / "c.safetensors")
    assert np.allclose(module.delta().numpy(), -0.25 * up.astype(np.float64) @ down)


LENGTHS = {  # shape of dora_scale -> axis, for a (4, 6) weight, and for a square one
    (4, 6): {(4, 1): 0, (4,): 0, (1, 4): 0, (1, 6): 1, (6,): 1},
    (5, 5): {(5, 1): 0, (5,): 0, (1, 5): 1},
    (1, 6): {(1, 1): 0, (1, 6): 1},
}


@pytest.mark.parametrize(("size", "shape", "axis"), [
    (size, shape, axis) for size, forms in LENGTHS.items() for shape, axis in forms.items()
])  # fmt: skip
def test_the_shape_tells_whose_lengths_they_are(
    tmp_path: Path, size: tuple[int, int], shape: tuple[int, ...], axis: int
) -> None:
    up, down, W = random(size[0], 2), random(2, size[1], seed=1), random(*size, seed=2)
    lengths = np.abs(random(int(np.prod(shape)), seed=3)) + 0.5
    path = written(tmp_path, {
        "lycoris_a.lora_up.weight": up, "lycoris_a.lora_down.weight": down,
        "lycoris_a.dora_scale": lengths.reshape(shape),
    })  # fmt: skip
    base = written(tmp_path, {"a.weight": W}, "base.safetensors")
    V = W.astype(np.float64) + up.astype(np.float64) @ down
    norms = np.sqrt((V**2).sum(1 - axis, keepdims=True))
    want = V * (lengths[:, None] if axis == 0 else lengths[None]) / norms
    assert near(merged(path, base, tmp_path), {"a.weight": want})


def test_lengths_travel_between_dialects_in_the_shape_of_each(tmp_path: Path) -> None:
    adapter = adapter_of("lycoris_dora_out")
    lt.convert([adapter], to="peft", base=BASE, output=tmp_path / "peft")
    there = load_file(str(tmp_path / "peft" / "adapter_model.safetensors"))
    found = {k.split(".")[-2]: v.shape for k, v in there.items() if k.endswith("magnitude_vector")}
    assert found == {"conv1": (1, 16, 1, 1), "conv3": (1, 32, 1, 1), "lin_a": (48,), "lin_b": (32,)}
    lt.convert([tmp_path / "peft"], to="lycoris", output=tmp_path / "back.safetensors")
    old, new = (load_file(str(p)) for p in (adapter, tmp_path / "back.safetensors"))
    assert {k: v.tolist() for k, v in old.items()} == {k: v.tolist() for k, v in new.items()}
    for dialect, suffix in (("comfyui", "dora_scale"), ("diffusers", "lora_magnitude_vector")):
        out = tmp_path / f"{dialect}.safetensors"
        lt.convert([tmp_path / "peft"], to=dialect, output=out)
        found = {k.partition("lin_a.")[2]: v.shape for k, v in load_file(str(out)).items()}
        assert found[suffix] == ((48, 1) if suffix == "dora_scale" else (48,))


def test_a_kernel_may_be_flattened_beside_lengths_of_columns(tmp_path: Path) -> None:
    """LoHa and LoKr hold (r, in·k²); the lengths (1, in, 1, 1) still are one per channel."""
    fields = {"lokr_w1": random(2, 2), "lokr_w2_a": random(3, 2, seed=1),
              "lokr_w2_b": random(2, 2 * 9, seed=2)}  # fmt: skip
    W, lengths = random(6, 4, 3, 3, seed=3), np.abs(random(1, 4, 1, 1, seed=4)) + 0.5
    path = written(tmp_path, {f"lycoris_a.{k}": v for k, v in fields.items()}
                   | {"lycoris_a.dora_scale": lengths})  # fmt: skip
    base = written(tmp_path, {"a.weight": W}, "base.safetensors")
    want = changed({k: v.astype(np.float64) for k, v in fields.items()}
                   | {"alpha": np.float64(2), "dora_scale": lengths.astype(np.float64)},
                   W.astype(np.float64))  # fmt: skip
    assert near(merged(path, base, tmp_path), {"a.weight": want})


# ---------------------------------------------------------------------------------- the damage


def spoiled(name: str, change: Any) -> Arrays:
    tensors = load_file(str(adapter_of(name)))
    change(tensors)
    return tensors


def cut(key: str) -> Any:
    def change(tensors: Arrays) -> None:
        tensors[f"lycoris_{key}"] = tensors[f"lycoris_{key}"][..., :-1]

    return change


DAMAGE = {
    "a factor alone": ("lycoris_lokr", lambda t: t.pop("lycoris_lin_a.lokr_w2_b"), "LT-362"),
    "no first matrix": ("lycoris_lokr", lambda t: t.pop("lycoris_lin_a.lokr_w1"), "LT-362"),
    "a matrix and its factors": (
        "lycoris_lokr",
        lambda t: t.update({"lycoris_lin_a.lokr_w2": t["lycoris_lin_a.lokr_w2_a"]}), "LT-362",
    ),
    "other ranks": ("lycoris_lokr", cut("lin_a.lokr_w2_a"), "LT-363"),
    "other ranks of the first": (
        "lycoris_lokr_both",
        lambda t: t.update({"lycoris_lin_a.lokr_w1_a": np.zeros((6, 2), np.float32)}), "LT-363",
    ),
    "a core of another rank": (
        "lycoris_lokr_tucker",
        lambda t: t.update({"lycoris_conv3.lokr_t2": t["lycoris_conv3.lokr_t2"][:1]}), "LT-363",
    ),
    "a vector for a matrix": (
        "lycoris_lokr",
        lambda t: t.update({"lycoris_lin_a.lokr_w1": t["lycoris_lin_a.lokr_w1"][0]}), "LT-363",
    ),
    "lengths alone": (
        "lycoris_dora_in",
        lambda t: [t.pop(f"lycoris_lin_a.lora_{f}.weight") for f in ("up", "down")], "LT-362",
    ),
    "too few lengths": ("lycoris_dora_in", cut("lin_a.dora_scale"), "LT-366"),
    "an empty difference": (
        "lycoris_full_norm",
        lambda t: t.update({"lycoris_lin_a.diff": t["lycoris_lin_a.diff"][:0]}), "LT-366",
    ),
    "a difference of whole numbers": (
        "lycoris_full_norm",
        lambda t: t.update({"lycoris_lin_a.diff": np.zeros((48, 32), np.int32)}), "LT-365",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(tmp_path: Path, what: str) -> None:
    name, change, code = DAMAGE[what]
    path = written(tmp_path, spoiled(name, change))
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(path)
    assert caught.value.code == code
    assert "lin_a" in str(caught.value.key) or "conv3" in str(caught.value.key)


@pytest.mark.parametrize(("name", "key"), [("lycoris_full_norm", "lin_a.diff"),
                                           ("lycoris_lokr_full", "lin_a.lokr_w2")])  # fmt: skip
def test_another_shape_than_the_base_has_is_refused(tmp_path: Path, name: str, key: str) -> None:
    with pytest.raises(lt.LoratoolError) as caught:
        merged(written(tmp_path, spoiled(name, cut(key))), BASE, tmp_path)
    assert caught.value.code == "LT-432" and "lin_a.weight" in str(caught.value)


# --------------------------------------------------- single tensors, whatever they are changes of


def test_bare_parameters_norms_and_whole_tensors_change(tmp_path: Path) -> None:
    """ComfyUI names a parameter that has no module of its own by its path (Wan's modulation)."""
    base = {"blocks.0.modulation": random(1, 6, 8), "blocks.0.norm3.weight": random(8),
            "blocks.0.norm3.bias": random(8, seed=1), "patch.weight": random(8, 4, 1, 2, 2),
            "blocks.0.q.weight": random(8, 8), "norm_q.weight": random(8)}  # fmt: skip
    changes = {"blocks.0.modulation.diff": random(1, 6, 8, seed=3),
               "blocks.0.norm3.diff": random(8, seed=4), "blocks.0.norm3.diff_b": random(8, seed=5),
               "patch.diff": random(8, 4, 1, 2, 2, seed=6),
               "blocks.0.q.set_weight": random(8, 8, seed=7)}  # fmt: skip
    path = written(tmp_path, {f"diffusion_model.{k}": v for k, v in changes.items()})
    whole = written(tmp_path, base, "base.safetensors")
    want = {k: v.astype(np.float64) for k, v in base.items()}
    want["blocks.0.modulation"] += changes["blocks.0.modulation.diff"]
    want["blocks.0.norm3.weight"] += changes["blocks.0.norm3.diff"]
    want["blocks.0.norm3.bias"] += changes["blocks.0.norm3.diff_b"]
    want["patch.weight"] += changes["patch.diff"]
    want["blocks.0.q.weight"] = changes["blocks.0.q.set_weight"]
    assert near(merged(path, whole, tmp_path), want)
    lt.rescale([path], 1, output=tmp_path / "b.safetensors", provenance=False)
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_lengths_of_columns_are_not_cut_into_rows(tmp_path: Path) -> None:
    """A fused projection on a base with three: each norm is over the rows of all."""
    path = written(tmp_path, {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": random(24, 2),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": random(2, 8),
        "lora_unet_double_blocks_0_img_attn_qkv.dora_scale": np.abs(random(1, 8)) + 1,
    })  # fmt: skip
    name = "transformer_blocks.0.attn.to_{}.weight"
    base = written(
        tmp_path, {name.format(part): random(8, 8) for part in "qkv"}, "base.safetensors"
    )
    with pytest.raises(lt.LoratoolError) as caught:
        merged(path, base, tmp_path)
    assert caught.value.code == "LT-439"
