"""Nothing is lost: every tensor of a file ends in a delta, a replacement or unclaimed."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import event, given, settings
from hypothesis import strategies as st

from loratool.adapter import Adapter, TensorRef
from loratool.dialects import open_adapter, write_adapter_files
from loratool.dialects.peft.keys import living_names
from loratool.errors import LoratoolError
from tests.unit.peft_files import PREFIX, Tensor, pair, write_folder, zeros

_MODULES = ("m.q", "m.attn", "m.experts", "m.e", "m.norm", "head")


def _embedding(module: str) -> dict[str, Tensor]:
    return {
        f"{module}.lora_embedding_A": zeros(4, 32),
        f"{module}.lora_embedding_B": zeros(16, 4),
    }


def _groups(module: str) -> list[dict[str, Tensor]]:
    """Tensors that PEFT, its users and its wrappers leave in files."""
    return [
        pair(module),
        pair(module) | pair(f"{module}.base_layer.out_proj"),
        pair(module, 16) | pair(f"{module}.base_layer", 16),
        pair(module) | {f"{module}.lora_B.bias": zeros(8)},
        pair(module) | {f"{module}.lora_magnitude_vector": zeros(8)},
        pair(module) | {f"{module}.lora_velora_embed": zeros(3)},
        _embedding(module),
        _embedding(module) | {f"{module}.base_layer.weight": zeros(32, 16)},
        {f"{module}.weight": zeros(8), f"{module}.bias": zeros(8)},
        {f"{module}.base_layer.bias": zeros(8)},
        {f"{module}.modules_to_save.default.weight": zeros(8)},
        {f"{module}.modules_to_save.bias": zeros(8), f"{module}.bias": zeros(8)},
        {f"{module}.original_module.weight": zeros(8)},
        {f"{module}.token_adapter.trainable_tokens_delta": zeros(2, 16)},
        {f"{module}.running_mean": zeros(8), f"{module}.anything": zeros(2, 2, 2)},
    ]


@st.composite
def files(draw: st.DrawFn) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module in draw(st.lists(st.sampled_from(_MODULES), unique=True)):
        for group in draw(st.lists(st.sampled_from(_groups(module)), max_size=3)):
            tensors |= group
    return tensors


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "lora_bias": st.just(True),
        "use_dora": st.just(True),
        "bias": st.sampled_from(["all", "lora_only"]),
        "modules_to_save": st.just(["norm", "head"]),
        "target_parameters": st.just(["experts.gate_up_proj", "experts.down_proj"]),
        "trainable_token_indices": st.just([1, 2]),
    },
)


def held(adapter: Adapter) -> Counter[str]:
    sources = [f for spec in adapter.specs for f in spec.fields.values()]
    sources += [r.source for r in adapter.replacements]
    sources += list(adapter.unclaimed)
    return Counter(s.name for s in sources if isinstance(s, TensorRef))


@settings(deadline=None, max_examples=300)
@given(files(), CONFIGS)
def test_every_tensor_ends_somewhere_exactly_once(
    tensors: dict[str, Tensor], fields: dict[str, object]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_folder(Path(folder), tensors, **fields)
        try:
            adapter = open_adapter(path)
        except LoratoolError:
            event("refused")
            return  # refused as a whole: nothing is used, nothing is lost
        event(f"read with {min(len(tensors), 9)} tensors")
        assert held(adapter) == Counter(PREFIX + name for name in tensors)
        assert set(adapter.key_order) == set(held(adapter))
        files_ = write_adapter_files(adapter)
        assert [name for name, _ in files_.tensors] == living_names(adapter.key_order)
        assert [getattr(s, "name", "") for _, s in files_.tensors] == list(adapter.key_order)
        assert len({name for name, _ in files_.tensors}) == len(tensors)
        for ref in adapter.unclaimed:
            key = ref.name.removeprefix(PREFIX)
            assert any(key in note for note in adapter.notes) or len(adapter.unclaimed) > 3
