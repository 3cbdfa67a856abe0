"""The methods of PEFT that are products of thin matrices: against numpy, and against PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from tests.oracle import in_peft

DATA = Path(__file__).parents[1] / "data" / "llm"
SAMPLES = ("vera", "vera_noproj", "adalora", "adalora_pruned", "vblora", "vblora_topk", "miss",
           "delora")  # fmt: skip
Arrays = dict[str, np.ndarray]


class Two(torch.nn.Module):
    """Linear layers of two shapes; PEFT takes any module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.wide = torch.nn.Linear(20, 8)
        self.tall = torch.nn.Linear(12, 16, bias=False)


TARGETS: dict[str, Any] = {"target_modules": ["wide", "tall"]}
CONFIGS: dict[str, Any] = {
    "vera": peft.VeraConfig(r=3, **TARGETS),
    "vera_seed": peft.VeraConfig(r=3, save_projection=False, projection_prng_key=7, **TARGETS),
    "pvera": peft.PveraConfig(r=3, **TARGETS),
    "pvera_seed": peft.PveraConfig(r=3, save_projection=False, projection_prng_key=9, **TARGETS),
    "adalora": peft.AdaLoraConfig(init_r=3, lora_alpha=5, total_step=10, **TARGETS),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=4, topk=3, **TARGETS),
    "vblora_top": peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=4, topk=3,
                                    save_only_topk_weights=True, **TARGETS),
    "miss": peft.MissConfig(r=4, **TARGETS),
    "miss_ragged": peft.MissConfig(r=3, **TARGETS),  # 3 divides neither 20 nor 8
    "miss_mini": peft.MissConfig(r=4, mini_r=4, init_weights="mini", **TARGETS),
    "delora": peft.DeloraConfig(r=3, delora_lambda=6, **TARGETS),
    "gralora": peft.GraloraConfig(r=4, gralora_k=2, alpha=6, **TARGETS),
    "gralora_hybrid": peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=3, alpha=6, **TARGETS),
}  # fmt: skip
NEED_BASE = ("vera", "miss")  # whose tensors do not say how wide a weight is
NO_FACTOR = ("vblora", "gralora_hybrid")  # of which no tensor can take a factor


# ------------------------------------------------------------------------------ closed forms


def vera(f: Arrays, config: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    d, b = (next(v for k, v in f.items() if k.endswith(f"lambda_{x}")) for x in "db")
    if not any(k.endswith("vera_A") for k in f):
        pytest.skip("the random matrices are PEFT's own")
    A, B = (next(v for k, v in f.items() if k.endswith(f"vera_{x}")) for x in "AB")
    r = B.shape[1]
    return (b[:, None] * B[: shape[0]]) @ (d[:r, None] * A[:r, : shape[1]])


def adalora(f: Arrays, config: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    return (f["lora_B"] * f["lora_E"][:, 0]) @ f["lora_A"] * (
        config["lora_alpha"] / (config["init_r"] + 1e-5))  # fmt: skip


def delora(f: Arrays, config: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    A, B = f["delora_A"], f["delora_B"]
    sizes = [np.maximum(np.sqrt((x**2).sum(axis)), 1e-4) for x, axis in ((A, 1), (B, 0))]
    middle = f["delora_lambda"] / (len(A) * sizes[0] * sizes[1])
    return np.einsum("ok,k,ki,i->oi", B, middle, A, f["delora_w_norm"])


def miss(f: Arrays, config: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    block = f["miss_block"]
    return np.stack([np.resize(block[c % len(block)], shape[0]) for c in range(shape[1])], 1)


def vblora(f: Arrays, config: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    bank = f["vblora_vector_bank"]

    def mixed(side: str) -> np.ndarray:
        logits = f.get(f"vblora_logits_{side}")
        if logits is None:
            at = f[f"vblora_logits_{side}_topk_indices"].astype(int)
            known = f[f"vblora_logits_{side}_topk_weights"]
            weights = np.concatenate([known, 1 - known.sum(-1, keepdims=True)], -1)
        else:
            at = np.argsort(-logits, axis=-1)[..., : config["topk"]]
            weights = np.exp(np.take_along_axis(logits, at, -1))
            weights /= weights.sum(-1, keepdims=True)
        return (weights[..., None] * bank[at]).sum(-2)

    right, left = mixed("A"), mixed("B")
    return np.einsum("trv,riw->tviw", left, right).reshape(shape)


def gralora(f: Arrays, config: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    A, B = f["gralora_A"], f["gralora_B"]
    K, part = len(A), A.shape[2] // len(A)
    rows = [
        np.concatenate([
            (A[n][:, m * part : (m + 1) * part] @ B[m][n * part : (n + 1) * part]).T
            for n in range(K)], 1)
        for m in range(K)
    ]  # fmt: skip
    change = np.concatenate(rows)
    if "gralora_A_general" in f:
        change = change + f["gralora_B_general"] @ f["gralora_A_general"]
    return change * config["alpha"] / (config["r"] + config["hybrid_r"])


FORMS: dict[str, Callable[[Arrays, dict[str, Any], tuple[int, int]], np.ndarray]] = {
    "VERA": vera, "PVERA": vera, "ADALORA": adalora, "DELORA": delora, "MISS": miss,
    "VBLORA": vblora, "GRALORA": gralora,
}  # fmt: skip


def closed_form(adapter: Path, before: Arrays) -> Arrays:
    """Tensor of the base -> ΔW in float64, for every module that the file has tensors of."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    modules: dict[str, Arrays] = {}
    shared: Arrays = {}
    for key, tensor in load_file(str(adapter / "adapter_model.safetensors")).items():
        name = key.removesuffix(".weight")
        path = name.removeprefix("base_model.model.")
        where = shared if path == name else modules.setdefault(path.rpartition(".")[0], {})
        where[name.rpartition(".")[2]] = tensor.astype(np.float64)
    form = FORMS[config["peft_type"]]
    return {
        f"{module}.weight": form({**shared, **fields}, config, before[f"{module}.weight"].shape)
        for module, fields in modules.items()
    }  # fmt: skip


# -------------------------------------------------------------------------------- the inputs


def sample(name: str, folder: Path) -> tuple[Path, Path, Arrays]:
    """(adapter, base, what PEFT merged)."""
    here, adapter = DATA / name, folder / "adapter"
    adapter.mkdir()
    for part in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(here / part, adapter)
    return adapter, DATA / "loha" / "base", load_file(str(here / "merged.safetensors"))


def made(name: str, folder: Path) -> tuple[Path, Path, Arrays]:
    """The same of a small model, by PEFT here and now; logits far enough apart to be sorted."""
    model, config = Two(), CONFIGS[name]
    wrapped = peft.get_peft_model(model, config)
    in_peft.randomise(wrapped, 3, scale=0.5)
    wrapped.save_pretrained(str(folder / "adapter"))
    base = in_peft.save_base(Two(), folder / "base")
    merged = {k: v.numpy() for k, v in in_peft.merged(wrapped).items()}
    return folder / "adapter", base, merged


def inputs(name: str, folder: Path) -> tuple[Path, Path, Arrays]:
    return made(name[4:], folder) if name.startswith("new ") else sample(name, folder)


def stored(folder: Path) -> Arrays:
    return {k: v for f in sorted(folder.glob("model*.safetensors"))
            for k, v in load_file(str(f)).items()}  # fmt: skip


NAMES = [*SAMPLES, *(f"new {name}" for name in CONFIGS)]


# ---------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("name", NAMES)
def test_it_merges_to_what_peft_made(tmp_path: Path, name: str) -> None:
    adapter, base, theirs = inputs(name, tmp_path)
    lt.merge([adapter], base=base, output=tmp_path / "out")
    before, got = stored(base), stored(tmp_path / "out")
    for key, tensor in got.items():
        # their sums are in float32, ours are rounded once from float64 factors
        assert np.allclose(tensor, theirs[key], rtol=1e-5, atol=2e-6), key
    changed = [k for k in got if not np.array_equal(got[k], before[k])]
    assert changed == [k for k in got if not np.array_equal(theirs[k], before[k])] != []


@pytest.mark.parametrize("name", NAMES)
def test_it_merges_to_the_formula(tmp_path: Path, name: str) -> None:
    adapter, base, _ = inputs(name, tmp_path)
    lt.merge([adapter], base=base, output=tmp_path / "out")
    before, got = stored(base), stored(tmp_path / "out")
    for key, delta in closed_form(adapter, before).items():
        exact = before[key].astype(np.float64) + delta
        assert np.abs(got[key] - exact).max() <= 2.0**-22 * np.abs(exact).max(), key


@pytest.mark.parametrize("name", NAMES)
def test_it_is_written_back_byte_for_byte(tmp_path: Path, name: str) -> None:
    adapter, _, _ = inputs(name, tmp_path)
    lt.rescale([adapter], 1, output=tmp_path / "again", provenance=False)
    for part in ("adapter_model.safetensors", "adapter_config.json"):
        old, new = ((folder / part).read_bytes() for folder in (adapter, tmp_path / "again"))
        assert new == old if part.endswith("safetensors") else json.loads(new) == json.loads(old)


@pytest.mark.parametrize("name", NAMES)
def test_it_becomes_a_lora_with_the_same_change(tmp_path: Path, name: str) -> None:
    adapter, base, theirs = inputs(name, tmp_path)
    report = lt.convert([adapter], to="peft", base=base, output=tmp_path / "lora")
    assert report.adapters[0].relative_error <= 1e-6
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    before = stored(base)
    for module in lt.open(tmp_path / "lora"):
        key = f"{module.name.removesuffix('.weight')}.weight"
        delta = theirs[key].astype(np.float64) - before[key]
        assert np.abs(module.delta().numpy() - delta).max() <= 1e-6 * (1 + np.abs(delta).max())
    if name.startswith("new"):
        loaded = in_peft.load_strict(Two(), tmp_path / "lora")
        for key, tensor in in_peft.merged(loaded).items():
            assert np.allclose(tensor.numpy(), theirs[key], rtol=1e-5, atol=2e-6), key


@pytest.mark.parametrize("factor", [0.3, -2.0])
@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith(NO_FACTOR)])
def test_it_is_rescaled_in_its_own_form(tmp_path: Path, name: str, factor: float) -> None:
    adapter, base, theirs = made(name, tmp_path)
    lt.rescale([adapter], factor, output=tmp_path / "scaled")
    lt.merge([tmp_path / "scaled"], base=base, output=tmp_path / "out")
    before, got = stored(base), stored(tmp_path / "out")
    for key, tensor in got.items():
        delta = theirs[key].astype(np.float64) - before[key]
        assert np.abs(tensor - (before[key] + factor * delta)).max() <= 1e-5, key
    old, new = (json.loads((f / "adapter_config.json").read_text())["peft_type"]
                for f in (adapter, tmp_path / "scaled"))  # fmt: skip
    assert old == new


@pytest.mark.parametrize("name", ["vblora", "gralora_hybrid"])
def test_where_no_tensor_takes_a_factor_it_is_refused_or_becomes_a_lora(
    tmp_path: Path, name: str
) -> None:
    adapter, base, theirs = made(name, tmp_path)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.rescale([adapter], 0.5, output=tmp_path / "scaled")
    assert caught.value.code == "LT-461" and "convert" in str(caught.value.hint)
    lt.rescale([adapter], 0.5, base=base, output=tmp_path / "scaled")
    before = stored(base)
    for module in lt.open(tmp_path / "scaled"):
        key = f"{module.name.removesuffix('.weight')}.weight"
        delta = 0.5 * (theirs[key].astype(np.float64) - before[key])
        assert np.abs(module.delta().numpy() - delta).max() <= 1e-6


@pytest.mark.parametrize("name", ["vera", "vera_seed", "miss"])
def test_what_has_no_size_of_its_own_asks_for_the_base(tmp_path: Path, name: str) -> None:
    adapter, base, _ = made(name, tmp_path)
    for command in (
        lambda out: lt.convert([adapter], to="peft", output=out),
        lambda out: lt.compress([adapter], rank=1, output=out),
        lambda out: lt.merge([adapter, adapter], output=out),
        lambda out: lt.compare([adapter, adapter]),
    ):
        with pytest.raises(lt.LoratoolError) as caught:
            command(tmp_path / "out")
        assert caught.value.code == "LT-460" and "--base" in str(caught.value.hint)
    lt.compress([adapter], rank=1, base=base, output=tmp_path / "small")  # or left as it is
    assert len(lt.inspect(tmp_path / "small", base=base).look.modules) == 2
    assert lt.inspect(adapter, spectrum=True).spectrum.modules == ()
    assert len(lt.inspect(adapter, spectrum=True, base=base).spectrum.modules) == 2


@pytest.mark.parametrize("name", ["adalora_pruned", "vblora_topk", "delora", "new gralora_hybrid"])
def test_what_has_its_size_is_compared_added_compressed_and_taken_out(
    tmp_path: Path, name: str
) -> None:
    adapter, base, theirs = inputs(name, tmp_path)
    assert lt.compare([adapter, adapter]).matrix[0][1] == pytest.approx(1, abs=1e-6)
    lt.merge([adapter, adapter], output=tmp_path / "twice")
    before = stored(base)
    for module in lt.open(tmp_path / "twice"):
        key = f"{module.name.removesuffix('.weight')}.weight"
        delta = 2 * (theirs[key].astype(np.float64) - before[key])
        assert np.abs(module.delta().numpy() - delta).max() <= 2e-6 * (1 + np.abs(delta).max())
    lt.compress([adapter], energy=0.5, output=tmp_path / "small")
    lt.merge([adapter], base=base, output=tmp_path / "merged")
    assert lt.verify(tmp_path / "merged", base=base, adapters=[adapter]).ok
    lt.subtract([adapter], merged=tmp_path / "merged", output=tmp_path / "back")
    for key, tensor in stored(tmp_path / "back").items():
        assert np.abs(tensor - before[key]).max() <= 1e-6


@pytest.mark.parametrize("kind", ["Miss", "OFT", "HRA", "Vera", "C3A"])
def test_biases_of_its_own_modules(tmp_path: Path, kind: str) -> None:
    """Each method has its own word for them."""
    sizes = {"oft_block_size": 4, "r": 0} if kind == "OFT" else {"r": 2} if kind != "C3A" else {
        "block_size": 4}  # fmt: skip
    config = getattr(peft, f"{kind}Config")(bias=f"{kind.lower()}_only", **sizes, **TARGETS)
    adapter = in_peft.make(Two(), tmp_path / "a", config)
    base = in_peft.save_base(Two(), tmp_path / "base")
    lt.merge([adapter], base=base, output=tmp_path / "out")
    lt.convert([adapter], to="peft", base=base, output=tmp_path / "lora")
    before, got, want = stored(base), stored(tmp_path / "out"), in_peft.changes(Two(), adapter)
    again = in_peft.changes(Two(), tmp_path / "lora")
    assert want["wide.bias"].norm() > 0.1
    for key, delta in want.items():
        size = 1 + np.abs(delta.numpy()).max()
        assert np.abs(got[key] - before[key] - delta.numpy()).max() <= 1e-5 * size, key
        assert (again[key] - delta).abs().max() <= 1e-5 * size, key


@pytest.mark.parametrize("name", [
    *(n for n in CONFIGS if "vera" in n or "miss" in n),
    peft.FourierFTConfig(n_frequency=9, scaling=20.0, **TARGETS),
    peft.RandLoraConfig(r=3, randlora_alpha=6, save_projection=False, **TARGETS),
    peft.IA3Config(feedforward_modules=["tall"], init_ia3_weights=False, **TARGETS),
    peft.RoadConfig(group_size=4, **TARGETS),
], ids=lambda one: getattr(one, "peft_type", one))  # fmt: skip
def test_two_that_take_their_size_from_the_base_are_two(tmp_path: Path, name: Any) -> None:
    """Each with its own tensors and its own seed."""
    config, folders = CONFIGS[name] if isinstance(name, str) else name, []
    for number in range(2):
        for key in ("projection_prng_key", "random_loc_seed"):
            if hasattr(config, key):
                config = type(config)(**{**vars(config), key: 11 + number})
        folders.append(in_peft.make(Two(), tmp_path / str(number), config, number))
    one, two = (in_peft.changes(Two(), folder) for folder in folders)
    base = in_peft.save_base(Two(), tmp_path / "base")
    lt.merge(folders, weights=[0.7, -2], base=base, into="adapter", output=tmp_path / "sum")
    found = in_peft.changes(Two(), tmp_path / "sum", strict=False)
    for key, delta in found.items():
        want = 0.7 * one[key] - 2 * two[key]
        assert (delta - want).norm() <= 1e-5 * (1 + one[key].norm() + two[key].norm()), key
    assert lt.compare(folders, base=base).matrix[0][1] < 0.999


# ------------------------------------------------------------------------------ what is odd


def test_a_module_pruned_to_nothing_is_said(tmp_path: Path) -> None:
    adapter = open_adapter(sample("adalora_pruned", tmp_path)[0])
    assert sorted(s.rank for s in adapter.specs) == [1, 3, 3]
    assert len(adapter.unclaimed) == 3 and any("change nothing" in n for n in adapter.notes)
    assert {s.scaling for s in adapter.specs} == {8 / (6 + 1e-5)}  # not their own rank


def test_random_matrices_need_every_module(tmp_path: Path) -> None:
    """Their size is that of the widest and the tallest weight of all."""
    adapter, base, _ = made("vera_seed", tmp_path)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.merge([adapter], base=base, output=tmp_path / "out", skip=["^wide$"])
    assert caught.value.code == "LT-460" and "save_projection" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "key", "value", "code"),
    [("vera_seed", "projection_prng_key", "x", "LT-361"), ("vera_seed", "r", 5, "LT-363"),
     ("miss", "init_weights", "bat", "LT-363"), ("miss", "init_weights", "odd", "LT-361"),
     ("vblora", "topk", 12, "LT-361"), ("vblora_top", "topk", 2, "LT-363"),
     ("vera_seed", "save_projection", True, "LT-362")],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, name: str, key: str, value: object, code: str
) -> None:
    adapter, _, _ = made(name, tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(adapter)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("name", "role"),
    [("miss", "miss_block"), ("adalora", "lora_E"), ("delora", "delora_w_norm"),
     ("gralora", "gralora_B"), ("vblora", "vblora_logits_B"), ("pvera", "pvera_lambda_b"),
     ("vera", "vera_B")],
)  # fmt: skip
def test_incomplete_and_unfit_tensors_are_refused(tmp_path: Path, name: str, role: str) -> None:
    adapter, _, _ = made(name, tmp_path)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(str(path))
    key = next(k for k in tensors if k.endswith(role))
    for damaged in (None, np.zeros((2, 7, 5), np.float32))[role == "miss_block" :]:
        rest = {k: v for k, v in tensors.items() if k != key}
        save_file(rest if damaged is None else {**rest, key: damaged}, str(path))
        with pytest.raises(lt.LoratoolError) as caught:
            open_adapter(adapter)
        assert caught.value.code in ("LT-362", "LT-363")


def test_a_file_without_its_configuration_says_so(tmp_path: Path) -> None:
    adapter, _, _ = made("vera", tmp_path)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(lt.LoratoolError) as caught:
        open_adapter(adapter)
    assert caught.value.code in ("LT-361", "LT-400") and "adapter_config" in str(caught.value)
