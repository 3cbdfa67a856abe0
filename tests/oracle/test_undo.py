"""subtract, swap and undo files: what comes back, bit for bit, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.api import undo as api_undo
from loratool.engine.buffers import to_bytes
from loratool.engine.grid import CUDA_ELEMENTS
from loratool.linalg import patch
from loratool.ops import undo as undo_ops
from loratool.store.writer import StagedOutput
from tests import coded
from tests.make import randn, random_factors, save_adapter, save_checkpoint
from tests.oracle.test_lora_family import CHOICES, LLM, VARIANTS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHAPES = {"a.q": (512, 384), "a.up": (1001, 384), "b.wide": (7, 70_001)}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for shard in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        out |= load_file(str(shard))
    return out


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(to_bytes(one[k]) == to_bytes(other[k]) for k in one)


def setup(tmp_path: Path, dtype: torch.dtype, rho: float, seed: int = 7) -> tuple[Path, Path]:
    """A base of two shards and an adapter with ‖ΔW‖ = rho·‖W‖ in every module."""
    tensors = {f"{n}.weight": randn(*s, seed=i, scale=0.02).to(dtype)
               for i, (n, s) in enumerate(SHAPES.items())}  # fmt: skip
    tensors["a.up.weight"][3] = -0.0
    tensors["norm.weight"] = randn(384, seed=50).to(dtype)
    base = save_checkpoint(tmp_path / "base", tensors, shards=2)
    factors = random_factors(SHAPES, rank=8, seed=seed)
    for name, (A, B) in factors.items():
        B *= rho * float(tensors[f"{name}.weight"].float().norm() / (B @ A).norm())
    return base, save_adapter(tmp_path / "style", factors, alpha=8)


@pytest.mark.parametrize("rho", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_undo_gives_every_bit_back(dtype: str, rho: float, tmp_path: Path) -> None:
    base, style = setup(tmp_path, DTYPES[dtype], rho)
    undo, merged, back = tmp_path / "undo.safetensors", tmp_path / "merged", tmp_path / "back"
    report = lt.merge([f"{style}:0.7"], base=base, output=merged, save_undo=undo)
    assert report.undo_bytes == undo.stat().st_size
    result = lt.subtract([f"{style}:0.7"], merged=merged, output=back, undo=undo)
    assert same(tensors_of(back), tensors_of(base))
    assert result.restored == len(SHAPES) and result.corrected > 0
    model = sum(p.stat().st_size for p in base.glob("*.safetensors"))
    if rho <= 0.03:
        assert undo.stat().st_size <= 0.04 * model
    # the patch is needed: arithmetic alone leaves a share of the elements off
    lt.subtract([f"{style}:0.7"], merged=merged, output=tmp_path / "plain", exact=True)
    assert not same(tensors_of(tmp_path / "plain"), tensors_of(base))


def test_what_arithmetic_leaves_is_the_predicted_share(tmp_path: Path) -> None:
    """bfloat16, ρ = 0.03: 3.1 % of Gaussian weights differ (their exponent grew), by one step."""
    W = randn(1500, 1024, seed=1, scale=0.02).bfloat16()
    base = save_checkpoint(tmp_path / "base", {"a.weight": W})
    factors = random_factors({"a": (1500, 1024)}, rank=16, seed=3)
    A, B = factors["a"]
    B *= 0.03 * float(W.float().norm() / (B @ A).norm())
    style = save_adapter(tmp_path / "style", factors, alpha=16)
    lt.merge([str(style)], base=base, output=tmp_path / "m")
    lt.subtract([str(style)], merged=tmp_path / "m", output=tmp_path / "s")
    back = tensors_of(tmp_path / "s")["a.weight"]
    assert 0.02 < float((back != W).double().mean()) < 0.04


@pytest.mark.parametrize("name", VARIANTS)
def test_every_sample_can_be_undone(name: str, tmp_path: Path) -> None:
    """DoRA, PiSSA, replaced tensors, untied heads and experts too: the patch is then larger."""
    folder, choice = LLM / name, CHOICES.get(name, {})
    undo = tmp_path / "undo.safetensors"
    if name == "lora_layer_replication":
        with pytest.raises(lt.LoratoolError) as caught:
            lt.merge([str(folder)], base=folder / "base", output=tmp_path / "m", save_undo=undo)
        assert caught.value.exit_code == 4 and not undo.exists()
        return
    lt.merge([str(folder)], base=folder / "base", output=tmp_path / "m", save_undo=undo, **choice)  # type: ignore[arg-type]
    lt.subtract([str(folder)], merged=tmp_path / "m", output=tmp_path / "back", undo=undo, **choice)
    assert same(tensors_of(tmp_path / "back"), tensors_of(folder / "base"))
    before, after = (json.loads((d / "config.json").read_text()) if (d / "config.json").exists()
                     else None for d in (folder / "base", tmp_path / "back"))  # fmt: skip
    assert before == after


def test_undo_is_valid_on_any_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made with the blocks of a GPU, applied with those of the CPU."""
    W = {"a.weight": randn(1200, 1000, seed=1, scale=0.02).bfloat16()}  # three blocks of the CPU's
    base = save_checkpoint(tmp_path / "base", W)
    style = save_adapter(tmp_path / "style", random_factors({"a": (1200, 1000)}, rank=4, seed=2))
    undo = tmp_path / "undo.safetensors"
    with monkeypatch.context() as change:
        change.setattr("loratool.engine.grid.CPU_ELEMENTS", CUDA_ELEMENTS)
        lt.merge([str(style)], base=base, output=tmp_path / "m", save_undo=undo, exact=True)
    lt.subtract([str(style)], merged=tmp_path / "m", output=tmp_path / "b", undo=undo, threads=3)
    assert same(tensors_of(tmp_path / "b"), tensors_of(base))


def test_undo_file_is_the_same_for_any_threads(tmp_path: Path) -> None:
    base, style = setup(tmp_path, torch.float16, 0.1)
    seen = set()
    for threads in (1, 3):
        undo = tmp_path / f"u{threads}.safetensors"
        lt.merge([str(style)], base=base, output=tmp_path / f"m{threads}", save_undo=undo,
                 threads=threads)  # fmt: skip
        seen.add(undo.read_bytes())
    assert len(seen) == 1
    assert str(tmp_path).encode() not in seen.pop()


def test_single_file_models(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    save_file({"a.weight": randn(64, 48, seed=1).bfloat16()}, str(base))
    style = save_adapter(tmp_path / "s", random_factors({"a": (64, 48)}, rank=4, seed=1))
    undo = tmp_path / "u.safetensors"
    lt.merge([str(style)], base=base, output=tmp_path / "m.safetensors", save_undo=undo)
    lt.subtract([str(style)], merged=tmp_path / "m.safetensors", output=tmp_path / "b.safetensors",
                undo=undo)  # fmt: skip
    assert same(tensors_of(tmp_path / "b.safetensors"), tensors_of(base))


def refused(code: int, tmp_path: Path, call: object, **options: object) -> lt.LoratoolError:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(lt.LoratoolError) as caught:
        call(**options)  # type: ignore[operator]
    assert caught.value.exit_code == code, caught.value
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    return caught.value


def test_undo_refuses_what_it_was_not_made_for(tmp_path: Path) -> None:
    base, style = setup(tmp_path, torch.bfloat16, 0.03)
    other = save_adapter(tmp_path / "other", random_factors(SHAPES, rank=8, seed=99), alpha=8)
    undo, merged = tmp_path / "undo.safetensors", tmp_path / "merged"
    lt.merge([str(style)], base=base, output=merged, save_undo=undo)
    where = {"merged": merged, "output": tmp_path / "back", "undo": undo}
    refused(4, tmp_path, lt.subtract, adapters=[str(other)], **where)
    refused(4, tmp_path, lt.subtract, adapters=[f"{style}:0.5"], **where)
    # another model of the same form
    lt.merge([str(other)], base=base, output=tmp_path / "m2")
    error = refused(4, tmp_path, lt.subtract, adapters=[str(style)],
                    **{**where, "merged": tmp_path / "m2"})  # fmt: skip
    assert error.key is not None
    # one bit of a merged tensor
    shard = min(merged.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(lt.LoratoolError) as caught:
        lt.subtract(adapters=[str(style)], **where)
    assert caught.value.code == "LT-450" and not (tmp_path / "back").exists()


@pytest.mark.parametrize("change", ["bit", "shape", "added", "lost"])
def test_what_the_merge_left_alone_is_checked_too(change: str, tmp_path: Path) -> None:
    base, style = setup(tmp_path, torch.bfloat16, 0.03)
    undo, merged = tmp_path / "undo.safetensors", tmp_path / "merged"
    lt.merge([str(style)], base=base, output=merged, save_undo=undo)
    where = {"adapters": [str(style)], "merged": merged, "undo": undo}
    assert lt.subtract(**where, output=tmp_path / "good").kept == 1  # type: ignore[arg-type]
    tensors = tensors_of(merged)
    norm = tensors.pop("norm.weight")
    if change == "bit":
        norm.view(torch.int16)[7] ^= 1
    if change == "added":
        tensors["more.weight"] = norm.clone()
    if change != "lost":
        tensors["norm.weight"] = norm.reshape(2, -1) if change == "shape" else norm
    other = save_checkpoint(tmp_path / "other", tensors)
    error = refused(4, tmp_path, lt.subtract, **{**where, "merged": other},
                    output=tmp_path / "back")  # fmt: skip
    assert error.key == ("more.weight" if change == "added" else "norm.weight")


def test_an_undo_file_that_does_not_say_what_was_left_alone(tmp_path: Path) -> None:
    """Of an early version: it is read, and no more is said than was checked."""
    base, style = setup(tmp_path, torch.bfloat16, 0.03)
    undo, merged = tmp_path / "undo.safetensors", tmp_path / "merged"
    with pytest.MonkeyPatch.context() as change:
        made = undo_ops.undo_table
        change.setattr(api_undo, "undo_table", lambda *args: {
            k: v for k, v in made(*args).items() if k != "kept"})  # fmt: skip
        lt.merge([str(style)], base=base, output=merged, save_undo=undo)
    report = lt.subtract([str(style)], merged=merged, output=tmp_path / "back", undo=undo)
    assert same(tensors_of(tmp_path / "back"), tensors_of(base))
    assert (report.restored, report.kept) == (len(SHAPES), 0)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_a_method_with_an_adapter_at_weight_0(method: str, tmp_path: Path) -> None:
    base, style = setup(tmp_path, torch.bfloat16, 0.03)
    undo, adapters = tmp_path / "undo.safetensors", [f"{style}:0"]
    lt.merge(adapters, base=base, output=tmp_path / "m", method=method, save_undo=undo)
    lt.subtract(adapters, merged=tmp_path / "m", output=tmp_path / "back", undo=undo)
    assert same(tensors_of(tmp_path / "back"), tensors_of(base))


@pytest.mark.parametrize("codes", [{"simulate_quant": "nf4"}, {"simulate_quant": "fp8"}])
def test_no_undo_file_of_other_numbers_everywhere(codes: dict[str, Any], tmp_path: Path) -> None:
    """The undo file gave the simulated base back, and called it the base."""
    base, style = setup(tmp_path, torch.bfloat16, 0.03)
    error = refused(2, tmp_path, lt.merge, adapters=[str(style)], base=base, **codes,
                    output=tmp_path / "m", save_undo=tmp_path / "u.safetensors")  # fmt: skip
    assert error.code == "LT-250" and "--simulate-quant" in str(error)


@pytest.mark.parametrize("codes", ["dequantize", "requant"])
def test_no_undo_file_of_a_quantised_base(codes: str, tmp_path: Path) -> None:
    """An undo file was written that `subtract` called damaged, or had no use for."""
    made = coded.int8(8, 16, seed=1)
    base = save_checkpoint(tmp_path / "base", made.tensors, config=made.config)
    style = save_adapter(tmp_path / "style", random_factors({"a": (8, 16)}, rank=2, seed=1))
    where = {"adapters": [str(style)], "base": base, "output": tmp_path / "m", codes: True}
    error = refused(2, tmp_path, lt.merge, **where, save_undo=tmp_path / "u.safetensors")
    assert error.code == "LT-250" and f"--{codes}" in str(error)
    lt.merge(**where)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [0.5, 0.9, 0.999])
def test_a_damaged_undo_file_never_gives_wrong_weights(place: float, tmp_path: Path) -> None:
    base, style = setup(tmp_path, torch.bfloat16, 0.03)
    undo, merged = tmp_path / "undo.safetensors", tmp_path / "merged"
    lt.merge([str(style)], base=base, output=merged, save_undo=undo)
    data = bytearray(undo.read_bytes())
    data[int(place * len(data))] ^= 16
    undo.write_bytes(bytes(data))
    with pytest.raises(lt.LoratoolError) as caught:
        lt.subtract([str(style)], merged=merged, output=tmp_path / "back", undo=undo)
    assert caught.value.exit_code in (3, 4)
    assert not (tmp_path / "back").exists()


def test_a_run_that_died_between_undo_file_and_model_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, style = setup(tmp_path, torch.bfloat16, 0.03)
    undo, merged = tmp_path / "undo.safetensors", tmp_path / "merged"
    commit = StagedOutput.commit

    def die(self: StagedOutput, record: object = None) -> None:
        if self.path == merged:
            raise KeyboardInterrupt
        commit(self, record)  # type: ignore[arg-type]

    where = {"base": base, "output": merged, "save_undo": undo}
    with monkeypatch.context() as change:
        change.setattr(StagedOutput, "commit", die)
        with pytest.raises(KeyboardInterrupt):
            lt.merge([str(style)], **where)  # type: ignore[arg-type]
    assert undo.exists() and not merged.exists()
    first = undo.read_bytes()
    other = [f"{style}:0.5"]
    refused(5, tmp_path, lt.merge, adapters=other, **where)  # the file is another merge's
    lt.merge([str(style)], **where)  # type: ignore[arg-type]
    assert undo.read_bytes() == first
    lt.subtract([str(style)], merged=merged, output=tmp_path / "back", undo=undo)
    assert same(tensors_of(tmp_path / "back"), tensors_of(base))


def test_a_patch_that_forgets_an_element_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, style = setup(tmp_path, torch.bfloat16, 0.03)
    undo, encode = tmp_path / "undo.safetensors", patch.encode_patch
    with monkeypatch.context() as change:
        change.setattr(patch, "encode_patch", lambda at, diff, n: encode(
            at[1:], diff[1:], n))  # fmt: skip
        lt.merge([str(style)], base=base, output=tmp_path / "m", save_undo=undo)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.subtract([str(style)], merged=tmp_path / "m", output=tmp_path / "back", undo=undo)
    assert caught.value.code == "LT-451" and not (tmp_path / "back").exists()


def test_what_cannot_be_subtracted_names_the_way_out(tmp_path: Path) -> None:
    for name in ("lora_dora", "lora_pissa", "lora_modules_to_save"):
        out = tmp_path / name
        out.mkdir()
        lt.merge([str(LLM / name)], base=LLM / name / "base", output=out / "m")
        error = refused(4, out, lt.subtract, adapters=[str(LLM / name)], merged=out / "m",
                        output=out / "s")  # fmt: skip
        assert "--undo" in str(error.hint) and error.key


def test_subtract_says_when_the_adapter_was_not_merged(tmp_path: Path) -> None:
    base, style = setup(tmp_path, torch.float32, 0.03)
    lt.merge([f"{style}:0.5"], base=base, output=tmp_path / "m")
    other = save_adapter(tmp_path / "other", random_factors(SHAPES, rank=8, seed=99), alpha=8)
    found = lt.subtract([str(other)], merged=tmp_path / "m", output=tmp_path / "x")
    assert any("other is not among what was merged" in w for w in found.warnings)
    found = lt.subtract([str(style)], merged=tmp_path / "m", output=tmp_path / "y")
    assert any("merged at weight 0.5, not 1" in w for w in found.warnings)
    found = lt.subtract([f"{style}:0.5"], merged=tmp_path / "m", output=tmp_path / "z")
    assert not found.warnings and any("has every bit" in n for n in found.notes)
    found = lt.subtract([f"{style}:0.5"], merged=base, output=tmp_path / "w")
    assert any("do not say" in n for n in found.notes)


def test_swap_is_one_sum_and_one_rounding(tmp_path: Path) -> None:
    base, old = setup(tmp_path, torch.bfloat16, 0.05)
    new = save_adapter(tmp_path / "new", random_factors(SHAPES, rank=4, seed=5, scale=0.02))
    lt.merge([str(old)], base=base, output=tmp_path / "m")
    found = lt.swap(
        str(old), f"{new}:0.5", merged=tmp_path / "m", output=tmp_path / "s", exact=True
    )
    lt.merge([f"{old}:-1", f"{new}:0.5"], base=tmp_path / "m", output=tmp_path / "two", exact=True)
    assert same(tensors_of(tmp_path / "s"), tensors_of(tmp_path / "two"))
    assert found.command == "swap" and [a["weight"] for a in found.adapters] == [-1.0, 0.5]
    record = json.loads((tmp_path / "s" / "loratool.json").read_text())
    assert record["operation"] == "swap"


def test_swap_of_replaced_heads(tmp_path: Path) -> None:
    """Both replace the head: the new one's is written as it is; else the old one's would stay."""
    tensors = {"head.weight": randn(9, 5, seed=1), "a.weight": randn(8, 6, seed=2)}
    base = save_checkpoint(tmp_path / "base", tensors)
    heads = [randn(9, 5, seed=s, scale=10.0**s) for s in (3, -6)]
    factors = random_factors({"a": (8, 6)}, rank=2, seed=5)
    old, new = (
        save_adapter(tmp_path / n, factors, extra={"head.weight": h}, modules_to_save=["head"])
        for n, h in zip(("old", "new"), heads, strict=True)
    )
    plain = save_adapter(tmp_path / "plain", factors)
    lt.merge([str(old)], base=base, output=tmp_path / "m")
    lt.swap(str(old), str(new), merged=tmp_path / "m", output=tmp_path / "s")
    assert torch.equal(tensors_of(tmp_path / "s")["head.weight"], heads[1])
    refused(4, tmp_path, lt.swap, old=str(old), new=str(plain), merged=tmp_path / "m",
            output=tmp_path / "t")  # fmt: skip


def test_save_undo_is_refused_where_it_makes_no_sense(tmp_path: Path) -> None:
    base, style = setup(tmp_path, torch.bfloat16, 0.03)
    where = {"adapters": [str(style)], "base": base, "output": tmp_path / "m"}
    refused(2, tmp_path, lt.merge, **where, save_undo=tmp_path / "u.safetensors", dtype="float16")
    refused(2, tmp_path, lt.merge, **where, save_undo=tmp_path / "undo")
    (tmp_path / "mine.safetensors").write_bytes(b"precious")
    for force in (False, True):
        refused(5, tmp_path, lt.merge, **where, save_undo=tmp_path / "mine.safetensors",
                force=force)  # fmt: skip
    assert (tmp_path / "mine.safetensors").read_bytes() == b"precious"
    refused(5, tmp_path, lt.merge, **where, save_undo=tmp_path / "m" / "undo.safetensors")
