"""Trained things beside the adapter: used, named, or refused; never lost in silence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.errors import LoratoolError
from tests.make import randn, save_adapter, save_checkpoint

PROJECTOR = "model.mm_projector.0.weight"
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    tensors = {
        f"{QUERY}.weight": randn(8, 8, seed=1),
        "model.embed_tokens.weight": randn(10, 8, seed=2),
        PROJECTOR: randn(8, 8, seed=3),
    }
    save_checkpoint(tmp_path / "base", tensors, config={"model_type": "llama"})
    factors = {QUERY: (randn(2, 8, seed=4), randn(8, 2, seed=5))}
    save_adapter(tmp_path / "adapter", factors, alpha=2, target_modules=["q_proj"])
    return tmp_path


def merge(world: Path, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    report = lt.merge([world / "adapter"], base=world / "base", output=world / "out", **options)
    return load_file(world / "out" / "model.safetensors"), report


def refused(world: Path, **options: Any) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught:
        merge(world, **options)
    assert not (world / "out").exists()
    return caught.value


def beside(world: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    save = save_file if name.endswith(".safetensors") else torch.save
    save(dict(tensors), str(world / "adapter" / name))  # type: ignore[operator]
    return next(iter(tensors.values()))


@pytest.mark.parametrize("stem", ["non_lora_trainables", "non_lora_state_dict", "mm_projector"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_whole_tensors_of_trainers_replace(world: Path, stem: str, prefix: str) -> None:
    want = beside(world, f"{stem}.safetensors", {prefix + PROJECTOR: randn(8, 8, seed=9)})
    seen = lt.inspect(world / "adapter")
    assert PROJECTOR in " ".join(seen.notes) and seen.adapter is not None
    peft = seen.adapter.loads[0]
    assert (peft.verdict, peft.reasons) == ("wrong", (f"without {stem}.safetensors",))
    got, report = merge(world)
    assert torch.equal(got[PROJECTOR], want)
    assert any(f"{stem}.safetensors" in note for note in report.notes)


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "non_lora_state_dict.bin",
                                  "mm_projector.pt"])  # fmt: skip
def test_the_same_as_a_pickle_needs_consent(world: Path, name: str) -> None:
    want = beside(world, name, {f"base_model.model.{PROJECTOR}": randn(8, 8, seed=9)})
    assert any(name in warning for warning in lt.inspect(world / "adapter").warnings)
    error = refused(world)
    assert (error.code, error.exit_code) == ("LT-425", 4)
    assert error.key == name and "--allow-pickle" in str(error.hint)
    got, _ = merge(world, allow_pickle=True)
    assert torch.equal(got[PROJECTOR], want)


@pytest.mark.parametrize("more", [{}, {"allow_pickle": True}])
def test_left_out_on_request(world: Path, more: Any) -> None:
    beside(world, "non_lora_trainables.bin", {PROJECTOR: randn(8, 8, seed=9)})
    got, report = merge(world, skip=["non_lora_trainables.bin"], **more)
    assert torch.equal(got[PROJECTOR], load_file(world / "base/model.safetensors")[PROJECTOR])
    assert any(name.startswith("non_lora_trainables.") for name in report.skipped)


def test_other_pickles_are_not_opened_for_it(world: Path) -> None:
    """What lies beside safetensors of the same adapter is no reason to open a pickle."""
    (world / "adapter" / "adapter_model.bin").write_bytes(b"no pickle")
    (world / "adapter" / "weird.pt").write_bytes(b"no pickle")
    (world / "adapter" / "optimizer.pt").write_bytes(b"no pickle")
    _, report = merge(world, allow_pickle=True)
    notes = " ".join(lt.inspect(world / "adapter").notes)
    assert "adapter_model.bin is not read: adapter_model.safetensors is there" in notes
    assert "weird.pt is not read" in notes and "optimizer" not in notes
    assert report.changed == 1


def test_the_adapters_own_tensor_counts(world: Path) -> None:
    folder = world / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    own = randn(8, 8, seed=10)
    save_file({**tensors, f"base_model.model.{PROJECTOR}": own},
              folder / "adapter_model.safetensors")  # fmt: skip
    beside(world, "non_lora_trainables.safetensors", {PROJECTOR: randn(8, 8, seed=9)})
    got, report = merge(world)
    assert torch.equal(got[PROJECTOR], own)
    assert any("repeats 1 tensor of" in note for note in report.notes)


def test_two_files_for_one_tensor_are_refused(world: Path) -> None:
    for stem in ("non_lora_trainables", "mm_projector"):
        beside(world, f"{stem}.safetensors", {PROJECTOR: randn(8, 8, seed=9)})
    assert refused(world).code == "LT-367"


def test_a_value_head_goes_along(world: Path) -> None:
    beside(world, "value_head.safetensors", {"v_head.summary.weight": randn(1, 8, seed=9)})
    for _ in range(2):
        merge(world, force=True)
        copy = (world / "out" / "value_head.safetensors").read_bytes()
        assert copy == (world / "adapter" / "value_head.safetensors").read_bytes()
    report = lt.merge([world / "adapter"], base=world / "base", output=world / "plain",
                      skip=["value_head.safetensors"])  # fmt: skip
    assert not (world / "plain" / "value_head.safetensors").exists()
    assert "value_head.safetensors" in report.skipped


def test_rows_under_unknown_names_must_be_left_out(world: Path) -> None:
    beside(world, "new_embeddings.safetensors", {"embed_tokens.weight": randn(2, 8, seed=9)})
    assert any("new_embeddings" in w for w in lt.inspect(world / "adapter").warnings)
    error = refused(world)
    assert error.code == "LT-425"
    assert error.hint == "--skip new_embeddings.safetensors leaves it out"
    assert merge(world, skip=["new_embeddings.safetensors"])[1].changed == 1


def test_what_is_not_known_is_named(world: Path) -> None:
    beside(world, "other.safetensors", {"x": randn(2, seed=9)})
    beside(world, "style.safetensors", {"a.lora_A.weight": randn(2, 2, seed=9)})
    _, report = merge(world)
    for where in (report.notes, lt.inspect(world / "adapter").notes):
        text = " ".join(where)
        assert "other.safetensors is not read" in text
        assert "style.safetensors is not read: it is an adapter of its own" in text


def test_a_damaged_file_of_trained_weights_is_an_error(world: Path) -> None:
    (world / "adapter" / "non_lora_trainables.safetensors").write_bytes(b"\0" * 20)
    assert refused(world).exit_code == 3


def test_other_commands_say_what_they_leave(world: Path) -> None:
    beside(world, "non_lora_trainables.bin", {PROJECTOR: randn(8, 8, seed=9)})
    report = lt.compress([world / "adapter"], rank=1, output=world / "small")
    assert any("non_lora_trainables.bin" in w for w in report.warnings)
    rows = lt.rescale([world / "adapter"], 0.5, output=world / "half").adapters
    assert any("non_lora_trainables.bin" in w for w in rows[0].warnings)
    both = lt.merge([world / "adapter", world / "half"], output=world / "both")
    assert any("non_lora_trainables.bin" in w for w in both.warnings)


# --- the configuration ------------------------------------------------------------------------


def configure(world: Path, **fields: Any) -> None:
    path = world / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("value", [{"kind": "cubic"}, 2.5, "yes", [1], True])
def test_an_unknown_field_is_named(world: Path, value: object) -> None:
    configure(world, some_new_scaling=value)
    assert any("some_new_scaling" in w for w in lt.inspect(world / "adapter").warnings)
    assert any("some_new_scaling" in w for w in merge(world)[1].warnings)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_says_nothing_is_not(world: Path, value: object) -> None:
    configure(world, some_new_scaling=value)
    assert not any("some_new" in w for w in merge(world)[1].warnings)


def test_every_field_of_peft_is_known(world: Path) -> None:
    from peft import LoraConfig, TrainableTokensConfig

    from loratool.dialects.peft.config import _READ, _SILENT

    fields = {*LoraConfig().to_dict(), *TrainableTokensConfig().to_dict()}
    assert fields <= _READ | _SILENT
    assert not _READ & _SILENT


def test_experts_grouped_by_the_configuration(tmp_path: Path) -> None:
    """``grouped_by_expert`` is the same change with lora_B's columns in another order."""
    experts, rank = 3, 2
    name = "model.layers.0.mlp.experts"
    base = {f"{name}.down_proj": randn(experts, 8, 6, seed=1)}
    save_checkpoint(tmp_path / "base", base, config={"model_type": "qwen3_moe"})
    lora_A, lora_B = randn(experts * rank, 6, seed=2), randn(8, rank * experts, seed=3)
    grouped = lora_B.reshape(8, rank, experts).permute(0, 2, 1).reshape(8, -1).contiguous()
    made = {}
    for label, factor, more in (
        ("plain", lora_B, {}),
        ("rank_major", lora_B, {"lora_B_layout": "rank_major"}),
        ("grouped_by_expert", grouped, {"lora_B_layout": "grouped_by_expert"}),
    ):
        folder = save_adapter(
            tmp_path / label,
            {name: (lora_A, factor)},
            alpha=2,
            r=rank,
            target_modules=[],
            target_parameters=["experts.down_proj"],
            **more,
        )
        lt.merge([folder], base=tmp_path / "base", output=tmp_path / f"{label}-out")
        made[label] = load_file(tmp_path / f"{label}-out" / "model.safetensors")
    want = base[f"{name}.down_proj"].double() + torch.einsum(
        "oer,eri->eoi", lora_B.double().reshape(8, rank, experts).transpose(1, 2),
        lora_A.double().reshape(experts, rank, 6),
    ) * (2 / rank)  # fmt: skip
    for got in made.values():
        assert torch.equal(got[f"{name}.down_proj"], want.float())
    asked = lt.merge([tmp_path / "plain"], base=tmp_path / "base", output=tmp_path / "asked",
                     experts_b_order="expert-major")  # fmt: skip
    assert asked.changed == 1
    other = load_file(tmp_path / "asked" / "model.safetensors")
    assert not torch.equal(other[f"{name}.down_proj"], want.float())


def test_an_unknown_layout_is_refused(world: Path) -> None:
    configure(world, lora_B_layout="spiral")
    assert refused(world).code == "LT-361"


# --- no effect --------------------------------------------------------------------------------


def test_an_adapter_that_changes_nothing_says_so(world: Path) -> None:
    factors = {QUERY: (randn(2, 8, seed=4), torch.zeros(8, 2))}
    save_adapter(world / "fresh", factors, alpha=2, target_modules=["q_proj"])
    assert any("it changes nothing" in w for w in lt.inspect(world / "fresh").warnings)
    report = lt.merge([world / "fresh"], base=world / "base", output=world / "out")
    assert any("it changes nothing" in w for w in report.warnings)
    assert not any("changes nothing" in w for w in lt.inspect(world / "adapter").warnings)


def test_weights_of_zero_say_so(world: Path) -> None:
    report = lt.merge([f"{world / 'adapter'}:0"], base=world / "base", output=world / "out")
    assert any("nothing changes" in w for w in report.warnings)


def test_no_program_loads_an_adapter_without_tensors(world: Path) -> None:
    save_file({}, world / "adapter" / "adapter_model.safetensors")
    seen = lt.inspect(world / "adapter").adapter
    assert seen is not None
    assert {(p.verdict, p.reasons) for p in seen.loads} == {("no", ("no tensors",))}
