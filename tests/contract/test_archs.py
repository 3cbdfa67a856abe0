"""Every name table is a bijection, keeps what it should, and says what transformers says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loratool.archs.base import load_data
from loratool.archs.fused import fused_leaves, part_leaves, part_of
from loratool.archs.names import _chain, all_tables, known_model_types, tables_for

TABLES = sorted(load_data("renames")["tables"])
# Chosen for their variety; `-m slow` goes through every one that can be built.
QUICK = ("gpt_neox", "granitemoe", "lw_detr", "mixtral", "phimoe", "qwen2_vl", "segformer", "vit")
SLOW = tuple(t for t in known_model_types() if t not in QUICK)


@pytest.mark.parametrize("name", TABLES)
def test_examples_go_both_ways(name: str) -> None:
    table = _chain((name,))
    examples = load_data("renames")["tables"][name]["examples"]
    assert examples
    for disk, memory in examples:
        assert table.to_memory(disk) == memory
        assert table.to_disk(memory) == disk


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_injective_and_settled(name: str) -> None:
    table = _chain((name,))
    examples = load_data("renames")["tables"][name]["examples"]
    memory = [table.to_memory(disk) for disk, _ in examples]
    assert len(set(memory)) == len({disk for disk, _ in examples})
    assert [table.to_memory(m) for m in memory] == memory


@pytest.mark.parametrize("name", TABLES)
def test_every_rule_has_an_example(name: str) -> None:
    row = load_data("renames")["tables"][name]
    table = _chain((name,))
    for rule in table.rules:
        used = False
        for disk, _ in row["examples"]:
            before = disk
            for step in table.rules:
                after = step.to_memory(before)
                used |= step is rule and after != before
                before = after
        assert used, rule


def test_model_types_name_tables() -> None:
    for model_type in known_model_types():
        assert tables_for(model_type)
    used = {n for chains in load_data("renames")["model_types"].values() for c in chains for n in c}
    assert used == set(TABLES)
    assert len(all_tables()) >= len({t.rules for t in all_tables()})


@pytest.mark.parametrize(("model_type", "name"), [
    ("step3p7", "vision_model.transformer.resblocks.0.attn.in_proj_weight"),
    ("mistral_large4", "vision_encoder.transformer.layers.0.attention.wq.weight"),
    ("mistral_large4", "vision_encoder.transformer.layers.0.attention.wk.weight"),
])  # fmt: skip
def test_rows_that_transformers_turns_get_no_living_name(model_type: str, name: str) -> None:
    """It permutes them as it loads: a change of them would be added to other rows."""
    memory = tables_for(model_type)[-1].to_memory(name)
    assert "q_proj" not in memory and "k_proj" not in memory and "self_attn" not in memory


def test_fused_parts_are_known() -> None:
    for fused in fused_leaves():
        for part in fused.parts:
            assert part_leaves(part)
            assert part_of(part_leaves(part)[0]) == part


def test_data_files_are_sorted_json() -> None:
    for name in ("renames", "facts", "fused", "experts"):
        assert json.loads(json.dumps(load_data(name))) == load_data(name)
    types = list(load_data("renames")["model_types"])
    assert types == sorted(types)


@pytest.mark.parametrize("model_type", QUICK)
def test_agrees_with_transformers(model_type: str) -> None:
    _compare_with_transformers(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SLOW)
def test_agrees_with_transformers_everywhere(model_type: str) -> None:
    _compare_with_transformers(model_type)


def _compare_with_transformers(model_type: str) -> None:
    """All names of a model, built without weights: disk -> memory is what transformers does."""
    pytest.importorskip("transformers")
    model = _build(model_type)
    names = _renamed_by_transformers(model)
    assert names
    table = tables_for(model_type)[-1]
    for disk, memory in names.items():
        assert table.to_memory(disk) == memory
        assert table.to_memory(memory) == memory
        assert table.to_disk(memory) == disk


def _build(model_type: str) -> Any:
    import torch
    from transformers.models.auto import configuration_auto, modeling_auto

    kinds = (
        "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "OBJECT_DETECTION",
        "IMAGE_CLASSIFICATION", "MASKED_LM", "MULTIMODAL_LM",
    )  # fmt: skip
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING") for kind in kinds]
    try:
        config = configuration_auto.CONFIG_MAPPING[model_type]()
        _shrink(config)
        found = [m for m in (*mappings, modeling_auto.MODEL_MAPPING) if type(config) in m]
        if not found:
            pytest.skip(f"no class for {model_type}")
        chosen = found[0][type(config)]
        with torch.device("meta"):
            return (chosen[0] if isinstance(chosen, tuple) else chosen)(config)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        pytest.skip(f"{model_type} cannot be built here: {error}")


def _shrink(config: Any) -> None:
    counts = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
    for key in counts:
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, min(2, getattr(config, key)))
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:2]
    for value in list(vars(config).values()):
        if hasattr(value, "model_type"):
            _shrink(value)


def _renamed_by_transformers(model: Any) -> dict[str, str]:
    """On-disk name -> in-memory name for tensors that are renamed, not fused or split."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
        revert_weight_conversion,
    )

    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    disk = revert_weight_conversion(model, dict(model.state_dict()))
    rules = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    memory = set(model.state_dict())
    names = {}
    for key in disk:
        name, fused_from = rename_source_key(key, renamings, converters)
        if fused_from is None:
            if name not in memory:
                pytest.skip("transformers cannot write this model back from scratch")
            names[key] = name
    return names
