"""Every PEFT LoRA sample binds, and its deltas laid on the bound targets give PEFT's own result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratool import dialects
from loratool.archs.experts import parse_expert
from loratool.bind.bindings import Bindings, BoundDelta, bind
from loratool.errors import MismatchError
from loratool.options.groups import Names
from loratool.plan import Span
from loratool.store.checkpoint import Checkpoint, open_checkpoint

LLM = Path(__file__).parents[1] / "data" / "llm"
SAMPLES = sorted(
    p.name
    for p in LLM.glob("*lora*")
    if (p / "base").is_dir()
    and (p / "adapter_model.safetensors").exists()
    and p.name != "randlora"  # no LoRA
)
REFUSED = {"lora_conv_grouped": "LT-434", "lora_modules_to_save_tied": "LT-440"}
# What is not W + ΔW, or where PEFT's merged result has a known fault (samples' README).
NOT_COMPARED = {
    "lora_alora": "no merged result",
    "lora_kasa": "changes the base first",
    "lora_olora": "changes the base first",
    "lora_pissa": "changes the base first",
    "lora_embed_lmhead_tied": "PEFT adds both deltas to the shared tensor",
    "lora_embed_tied_ensure": "PEFT adds both deltas to the shared tensor",
    "lora_layer_replication": "PEFT accumulates on shared storage",
}
# One bfloat16 rounding of the delta: PEFT rounds it to the adapter's type.
RELATIVE = {"lora_linear_bf16": 2.0**-8}

needs_dialects = pytest.mark.skipif(
    not hasattr(dialects, "open_adapter"), reason="dialects are not there yet"
)


def bound(name: str, **options: bool) -> tuple[Bindings, Checkpoint]:
    checkpoint = open_checkpoint(LLM / name / "base")
    adapter = dialects.open_adapter(LLM / name)
    return bind(adapter, checkpoint, Names(**options)), checkpoint  # type: ignore[arg-type]


@needs_dialects
@pytest.mark.parametrize("name", SAMPLES)
def test_sample_binds_or_is_refused(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(MismatchError) as caught:
            bound(name)
        assert caught.value.code == REFUSED[name]
        return
    found, _ = bound(name)
    assert found.checkpoint is not None and not found.skipped
    for one in (*found.deltas, *found.replacements):
        assert one.target in found.checkpoint.tensors or one.target in found.new_tensors
    names_path = LLM / name / "inmemory_names.json"
    if names_path.exists() and not found.new_tensors:
        on_disk = json.loads(names_path.read_text())
        for delta in found.deltas:
            if delta.spec.name in on_disk:
                assert delta.target == on_disk[delta.spec.name]


@needs_dialects
@pytest.mark.parametrize("name", [n for n in SAMPLES if n not in NOT_COMPARED])
def test_sample_merges_to_what_peft_merges(name: str) -> None:
    if name == "lora_conv_grouped":
        pytest.skip("not mergeable")
    found, checkpoint = bound(name, untie=name == "lora_modules_to_save_tied")
    if any(d.spec.kind == "dora" for d in found.deltas):
        pytest.skip("depends on the base: tested where DoRA is computed")
    weights = load_file(LLM / name / "base" / "model.safetensors")
    weights |= {new: weights[old].clone() for new, old in found.new_tensors.items()}
    merged = {n: w.double() for n, w in weights.items()}
    for replaced in found.replacements:
        source = load_file(replaced.replacement.source.file)[replaced.replacement.source.name]
        rows = replaced.replacement.rows
        merged[replaced.target][list(rows) if rows else slice(None)] = source.double()
    for delta in found.deltas:
        lay(delta, merged[delta.target])
    expected = load_file(LLM / name / "merged.safetensors")
    memory = in_memory(name, checkpoint)
    compared = 0
    for target in {d.target for d in found.deltas} | {r.target for r in found.replacements}:
        theirs = pick(expected, target, memory).double()
        scale = max(1.0, merged[target].abs().max().item())
        tolerance = RELATIVE.get(name, 2.0**-20) * scale
        assert (merged[target] - theirs).abs().max().item() <= tolerance, target
        compared += 1
    assert compared


def in_memory(name: str, checkpoint: Checkpoint) -> dict[str, str]:
    path = LLM / name / "inmemory_names.json"
    names = {} if not path.exists() else json.loads(path.read_text())
    return {disk: memory for memory, disk in names.items() if disk != "model.embed_tokens.weight"}


def pick(tensors: dict[str, torch.Tensor], target: str, memory: dict[str, str]) -> torch.Tensor:
    """The tensor that PEFT's model has for an on-disk name."""
    for name in (target, memory.get(target, "")):
        if name in tensors:
            return tensors[name]
    expert = parse_expert(target.replace("block_sparse_moe", "mlp"))
    assert expert is not None and expert.expert is not None, target
    part = expert.parts[0]
    if part == "down":
        return tensors[f"{expert.container}.down_proj"][expert.expert]
    both = tensors[f"{expert.container}.gate_up_proj"][expert.expert]
    half = both.shape[0] // 2
    return both[:half] if part == "gate" else both[half:]


def lay(delta: BoundDelta, weight: torch.Tensor) -> None:
    """Add a bound delta to its target, in place: an independent reading of `Region`."""
    change = dense(delta)
    region = delta.region
    if region.source_rows:
        change = change[slice(*region.source_rows)]
    if region.source_cols:
        change = change[:, slice(*region.source_cols)]
    conv = delta.spec.layout == "conv"
    if weight.ndim < 2:
        view = weight.view(1, -1)
    else:
        view = weight.view(weight.shape[0], -1) if conv else weight.view(-1, weight.shape[-1])
    rows, cols = indices(region.rows, view.shape[0]), indices(region.cols, view.shape[1])
    view[rows[:, None], cols] += change


def indices(spans: tuple[Span, ...], size: int) -> torch.Tensor:
    pieces = [torch.arange(s.start, s.stop, s.step) for s in spans] or [torch.arange(size)]
    return torch.cat(pieces)


def dense(delta: BoundDelta) -> torch.Tensor:
    spec = delta.spec
    fields = {r: load_file(t.file)[t.name].double() for r, t in spec.fields.items()}  # type: ignore[union-attr]
    if spec.kind == "vector":
        return spec.scaling * fields["delta"][None]
    lora_A, lora_B = fields["lora_A"].flatten(1), fields["lora_B"].flatten(1)
    if delta.expert is not None:
        lora_A = lora_A.view(spec.experts, spec.rank, -1)[delta.expert]
        lora_B = lora_B.view(-1, spec.rank, spec.experts)[..., delta.expert]
    if spec.blocks is not None:
        count, side = spec.blocks
        if side == "A":
            lora_A = torch.block_diag(*lora_A.chunk(count))
        else:
            lora_B = torch.block_diag(*lora_B.chunk(count))
    change = spec.scaling * lora_B @ lora_A
    return change.T if delta.transposed else change
