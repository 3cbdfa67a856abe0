"""Adapters made here, loaded by the real PEFT: no key missing, none unexpected, the same ΔW."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.save_and_load import load_peft_weights
from torch import nn

from loratool.adapter import Adapter, DeltaSpec, Replacement
from loratool.dialects import open_adapter, task_type_of, write_adapter_files
from loratool.errors import MismatchError
from loratool.frozen import asdict
from loratool.store.adapter_writer import write_adapter
from tests.unit.peft_files import data

EPS = 2.0**-23
Tensor = torch.Tensor


class Rig:
    """Makes specs, remembers their tensors, and checks them inside PEFT."""

    def __init__(self, tmp_path: Path, seed: int = 0) -> None:
        self.folder = tmp_path / "out"
        self.random = torch.Generator().manual_seed(seed)
        self.specs: list[DeltaSpec] = []
        self.replacements: list[Replacement] = []
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.values: dict[str, Tensor] = {}

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def delta(
        self,
        name: str,
        a: Sequence[int],
        b: Sequence[int],
        *,
        rank: int,
        scaling: float = 1.0,
        layout: str = "linear",
        experts: int = 0,
        **more: Tensor,
    ) -> None:
        fields = {"lora_A": self.randn(*a), "lora_B": self.randn(*b)} | more
        module, _, parameter = name.rpartition(".")
        kind = "dora" if "magnitude" in more else "lowrank"
        self.tensors[name] = fields
        self.specs.append(
            DeltaSpec(
                kind, module, parameter, {r: data(t, name) for r, t in fields.items()}, layout,
                rank, None, scaling, experts=experts,
            )
        )  # fmt: skip

    def linear(self, module: str, out: int, inner: int, rank: int = 4, **more: Any) -> None:
        self.delta(f"{module}.weight", (rank, inner), (out, rank), rank=rank, **more)

    def bias_delta(self, module: str, out: int, scaling: float) -> None:
        tensor = self.randn(out)
        self.tensors[f"{module}.bias"] = {"delta": tensor}
        self.specs.append(
            DeltaSpec("vector", module, "bias", {"delta": data(tensor)}, "vector", 0, None, scaling)
        )

    def replace(self, name: str, *shape: int, origin: str = "", rows: Any = None) -> None:
        tensor = self.randn(*shape)
        self.values[name] = tensor
        self.replacements.append(Replacement(name, data(tensor, name), origin, rows))

    def adapter(self, **more: Any) -> Adapter:
        specs, replacements = tuple(self.specs), tuple(self.replacements)
        return Adapter(Path("made"), "peft", specs, replacements, "me/base", **more)

    def load(
        self, model: nn.Module, base_config: Mapping[str, Any] | None = None, **more: Any
    ) -> peft.PeftModel:
        """Write, load with PEFT, check its keys; our own reader must agree too."""
        adapter = self.adapter(**more)
        names = list(model.state_dict())
        files = write_adapter_files(adapter, "peft", base_config=base_config, base_tensors=names)
        write_adapter(files, self.folder, record={}, read=open_adapter)
        self.check_own_reading(adapter)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            loaded = peft.PeftModel.from_pretrained(model, str(self.folder))
        result = peft.set_peft_model_state_dict(loaded, load_peft_weights(str(self.folder)))
        assert not result.unexpected_keys
        ours = ("lora_", "modules_to_save", "trainable_tokens")
        assert not [k for k in result.missing_keys if any(word in k for word in ours)]
        return loaded

    def check_own_reading(self, adapter: Adapter) -> None:
        again = open_adapter(self.folder)
        keys = ("kind", "rank", "layout", "experts")
        scalings = {s.name: s.scaling for s in again.specs}
        assert scalings == pytest.approx({s.name: s.scaling for s in adapter.specs}, rel=2.0**-52)
        ours = {s.name: [getattr(s, k) for k in keys] for s in adapter.specs}
        theirs = {s.name: [getattr(s, k) for k in keys] for s in again.specs}
        assert theirs == ours
        assert {(r.name, r.rows) for r in again.replacements} == {
            (r.name, r.rows) for r in adapter.replacements
        }
        assert again.layer_order == adapter.layer_order and not again.unclaimed

    def check_deltas(self, model: peft.PeftModel) -> None:
        """PEFT's get_delta_weight against scaling · lora_B @ lora_A in float64."""
        inner = model.get_base_model()
        for spec in self.specs:
            if spec.kind == "vector":
                layer = inner.get_submodule(spec.module)
                assert torch.equal(
                    layer.lora_B["default"].bias, self.tensors[spec.name]["delta"]
                )  # fmt: skip
                assert layer.scaling["default"] == spec.scaling
                continue
            got = _layer_of(inner, spec).get_delta_weight("default").double()
            want = self.expected(spec, got.shape)
            gain = 2.0 if spec.module.endswith("self_attn.out_proj") else 1.0
            bound = (spec.rank + 3) * EPS * (1 + want.abs().max())
            assert torch.allclose(gain * got, want, rtol=0, atol=float(bound)), spec.name

    def expected(self, spec: DeltaSpec, shape: torch.Size) -> Tensor:
        fields = {r: t.double() for r, t in self.tensors[spec.name].items()}
        lora_A, lora_B = fields["lora_A"], fields["lora_B"]
        if spec.layout == "experts":
            count = spec.experts
            parts = [
                lora_B.view(-1, spec.rank, count)[:, :, e] @ lora_A.view(count, spec.rank, -1)[e]
                for e in range(count)
            ]
            return spec.scaling * torch.stack(parts)
        full = spec.scaling * (lora_B.flatten(1) @ lora_A.flatten(1))
        return (full.T if full.shape != shape and full.T.shape == shape else full).reshape(shape)

    def check_values(self, model: peft.PeftModel) -> None:
        """Replaced tensors are in the merged model's state, bit for bit."""
        state = model.get_base_model().state_dict()
        for name, value in self.values.items():
            module, _, leaf = name.rpartition(".")
            for path in (
                f"{module}.modules_to_save.default.{leaf}",
                f"{module}.base_layer.{leaf}",
                f"{module}.token_adapter.trainable_tokens_delta.default",
                name,
            ):
                if path in state:
                    assert torch.equal(state[path], value), name
                    break
            else:
                raise AssertionError(f"{name} is nowhere in PEFT's model")


def _layer_of(model: nn.Module, spec: DeltaSpec) -> Any:
    parent, _, leaf = spec.module.rpartition(".")
    if leaf == "out_proj" and hasattr(model.get_submodule(parent), "base_layer"):
        return model.get_submodule(parent).base_layer.out_proj  # type: ignore[union-attr]
    layer = model.get_submodule(spec.module)
    while getattr(layer, "parameter_name", spec.parameter) != spec.parameter:
        layer = layer.base_layer  # type: ignore[assignment]
    return layer


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.lin = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)


class Stack(nn.Module):
    """Linear layers whose paths end in one another, and friends."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.block = Block(16)
        self.conv = nn.Conv2d(3, 8, 3)
        self.conv1 = nn.Conv1d(3, 8, 5)
        self.emb = nn.Embedding(32, 16)
        self.head = nn.Linear(16, 4)
        self.token = nn.Parameter(torch.zeros(1, 16))


def llama(layers: int = 2, **more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def config_of(rig: Rig) -> dict[str, Any]:
    found = json.loads((rig.folder / "adapter_config.json").read_text())
    assert isinstance(found, dict)
    return found


def test_uniform_adapters_need_no_patterns(rig: Rig) -> None:
    rig.linear("lin", 16, 16)
    rig.linear("block.lin", 16, 16)
    rig.check_deltas(rig.load(Stack()))
    config = config_of(rig)
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["peft_version"] == "0.21.2" and config["inference_mode"] is True
    assert config["target_modules"] == ["block.lin", "lin"]
    assert config["base_model_name_or_path"] == "me/base"


@pytest.mark.parametrize("first", [2, 6])
def test_paths_that_end_in_one_another_keep_their_own_rank(rig: Rig, first: int) -> None:
    rig.linear("lin", 16, 16, rank=first, scaling=0.7)
    rig.linear("block.lin", 16, 16, rank=8 - first, scaling=-1.3)
    rig.linear("head", 4, 16, rank=8 - first, scaling=-1.3)
    rig.check_deltas(rig.load(Stack()))


def test_a_dot_in_a_path_is_a_dot(rig: Rig) -> None:
    model = Stack()
    model.block_lin = nn.Linear(16, 16)
    rig.linear("block.lin", 16, 16, rank=2, scaling=3.0)
    rig.linear("block_lin", 16, 16, rank=4)
    rig.linear("head", 4, 16, rank=4)
    rig.check_deltas(rig.load(model))


def test_modules_that_end_like_a_target_are_excluded(rig: Rig) -> None:
    rig.linear("lin", 16, 16)
    rig.check_deltas(rig.load(Stack()))
    assert config_of(rig)["exclude_modules"] == r"block\.lin"


@pytest.mark.parametrize("scaling", [1.0, 0.1, 1 / 3, 2.5, -0.7, 16 / 3, 1e-3])
@pytest.mark.parametrize("rank", [1, 3, 7, 8])
def test_scaling_survives_alpha_over_r(rig: Rig, rank: int, scaling: float) -> None:
    rig.linear("lin", 16, 16, rank=rank, scaling=scaling)
    files = write_adapter_files(rig.adapter(), "peft")
    config = files.json_files["adapter_config.json"]
    # Not every scaling is some α/r in floating point: half a step of α is left
    assert config["lora_alpha"] / config["r"] == pytest.approx(scaling, rel=2.0**-52, abs=0)


def test_the_stated_alpha_is_kept(rig: Rig) -> None:
    rig.linear("lin", 16, 16, scaling=3.0)
    rig.specs = [DeltaSpec(**(asdict(rig.specs[0]) | {"alpha": 12}))]
    config = write_adapter_files(rig.adapter()).json_files["adapter_config.json"]
    assert config["lora_alpha"] == 12 and isinstance(config["lora_alpha"], int)


def test_convolutions_and_embeddings(rig: Rig) -> None:
    rig.delta("conv.weight", (4, 3, 3, 3), (8, 4, 1, 1), rank=4, layout="conv")
    rig.delta("conv1.weight", (2, 3, 5), (8, 2, 1), rank=2, layout="conv", scaling=3.0)
    rig.delta("emb.weight", (4, 32), (16, 4), rank=4, layout="embedding")
    rig.check_deltas(rig.load(Stack()))


def test_dora_on_every_layer(rig: Rig) -> None:
    rig.linear("lin", 16, 16, magnitude=rig.randn(16).abs())
    rig.delta("conv.weight", (4, 3, 3, 3), (8, 4, 1, 1), rank=4, layout="conv",
              magnitude=rig.randn(1, 8, 1, 1).abs())  # fmt: skip
    rig.delta("emb.weight", (4, 32), (16, 4), rank=4, layout="embedding",
              magnitude=rig.randn(16).abs())  # fmt: skip
    model = rig.load(Stack())
    for spec in rig.specs:
        layer: Any = model.get_base_model().get_submodule(spec.module)
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert torch.equal(magnitude, rig.tensors[spec.name]["magnitude"])


def test_bias_deltas(rig: Rig) -> None:
    rig.linear("lin", 16, 16, scaling=0.5)
    rig.bias_delta("lin", 16, 0.5)
    rig.linear("head", 4, 16, rank=2, scaling=2.0)
    rig.bias_delta("head", 4, 2.0)
    rig.check_deltas(rig.load(Stack()))


def test_whole_biases_of_adapted_and_other_layers(rig: Rig) -> None:
    rig.linear("lin", 16, 16)
    for name, size in (("lin", 16), ("block.lin", 16), ("block.norm", 16), ("head", 4)):
        rig.replace(f"{name}.bias", size, origin="bias")
    model = rig.load(Stack())
    rig.check_values(model)
    assert config_of(rig)["bias"] == "all"


def test_whole_modules_and_bare_parameters(rig: Rig) -> None:
    rig.linear("lin", 16, 16)
    rig.replace("block.norm.weight", 16)
    rig.replace("block.norm.bias", 16, origin="bias")
    rig.replace("emb.weight", 32, 16)
    rig.replace("token", 1, 16)
    model = rig.load(Stack())
    rig.check_values(model)
    assert config_of(rig)["modules_to_save"] == ["block.norm", "emb"]
    assert config_of(rig)["bias"] == "none"


def test_modules_that_peft_would_confuse_load_as_plain_tensors(rig: Rig) -> None:
    """modules_to_save compares ends of names without a dot, and wants whole modules."""
    model = Stack()
    model.norm = nn.LayerNorm(16)  # also the end of block.norm
    rig.linear("block.lin", 16, 16)
    rig.replace("norm.weight", 16)
    rig.replace("norm.bias", 16)
    rig.replace("head.weight", 4, 16)  # head.bias stays the base's
    loaded = rig.load(model)
    rig.check_values(loaded)
    rig.check_deltas(loaded)
    assert config_of(rig)["modules_to_save"] is None


def test_without_the_base_known_modules_are_kept_apart_all_the_same(rig: Rig) -> None:
    rig.linear("block.prenorm", 16, 16)
    rig.replace("norm.weight", 16)
    files = write_adapter_files(rig.adapter())
    assert files.json_files["adapter_config.json"]["modules_to_save"] is None
    assert "base_model.model.norm.weight" in dict(files.tensors)


def test_a_target_inside_a_replaced_module_stays_a_target(rig: Rig) -> None:
    """PEFT adapts nothing inside of modules_to_save."""
    rig.linear("head.inner", 4, 16)
    rig.replace("head.weight", 4, 16)
    config = write_adapter_files(rig.adapter()).json_files["adapter_config.json"]
    assert config["modules_to_save"] is None and config["target_modules"] == ["head.inner"]


def test_saved_embedding_under_its_own_delta(rig: Rig) -> None:
    rig.delta("emb.weight", (4, 32), (16, 4), rank=4, layout="embedding")
    rig.replace("emb.weight", 32, 16, origin="base_layer")
    model = rig.load(Stack())
    rig.check_values(model)
    rig.check_deltas(model)


def test_gpt2_conv1d(rig: Rig) -> None:
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    for layer in range(2):
        rig.linear(f"transformer.h.{layer}.attn.c_attn", 48, 16, rank=2 + layer)
        rig.linear(f"transformer.h.{layer}.mlp.c_proj", 16, 64)
    rig.replace("transformer.ln_f.weight", 16)
    rig.replace("transformer.ln_f.bias", 16)
    rig.replace("transformer.h.0.attn.c_attn.bias", 48, origin="bias")
    rig.specs = [
        DeltaSpec(**(asdict(s) | {"transposed": True})) if s.kind == "lowrank" else s
        for s in rig.specs
    ]
    model = rig.load(transformers.GPT2LMHeadModel(config), {"architectures": ["GPT2LMHeadModel"]})
    rig.check_deltas(model)
    rig.check_values(model)
    assert config_of(rig)["fan_in_fan_out"] is True and config_of(rig)["task_type"] == "CAUSAL_LM"


def test_multihead_attention_doubles_the_output_projection(rig: Rig) -> None:
    rig.delta("layers.0.self_attn.in_proj_weight", (4, 16), (48, 4), rank=4, scaling=0.5)
    rig.linear("layers.0.self_attn.out_proj", 16, 16, scaling=1.0)
    rig.linear("layers.0.linear1", 24, 16, rank=3, scaling=2.0)
    rig.replace("layers.0.self_attn.out_proj.bias", 16, origin="bias")
    rig.replace("layers.0.self_attn.in_proj_bias", 48, origin="bias")
    rig.replace("layers.0.norm1.weight", 16)
    rig.replace("layers.0.norm1.bias", 16)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = rig.load(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    rig.check_deltas(model)
    state = model.get_base_model().state_dict()
    attention = "layers.0.self_attn.base_layer"
    out_bias, in_bias = f"{attention}.out_proj.base_layer.bias", f"{attention}.in_proj_bias"
    assert torch.equal(state[out_bias], rig.values["layers.0.self_attn.out_proj.bias"])
    assert torch.equal(state[in_bias], rig.values["layers.0.self_attn.in_proj_bias"])


def test_llama_with_many_layers_and_ranks(rig: Rig) -> None:
    for layer in range(12):
        rank = 1 + layer % 5
        rig.linear(f"model.layers.{layer}.self_attn.q_proj", 16, 16, rank=rank, scaling=1 + layer)
        rig.linear(f"model.layers.{layer}.mlp.down_proj", 16, 24, rank=4)
    rig.linear("lm_head", 32, 16, rank=2)
    rig.replace("model.norm.weight", 16)
    rig.replace("model.embed_tokens.weight", 32, 16)
    rig.replace("model.layers.1.input_layernorm.weight", 16)
    model = rig.load(llama(12), {"architectures": ["LlamaForCausalLM"]})
    assert isinstance(model, peft.PeftModelForCausalLM)
    rig.check_deltas(model)
    rig.check_values(model)


def test_trained_rows(rig: Rig) -> None:
    rig.linear("model.layers.0.self_attn.q_proj", 16, 16)
    rig.replace("model.embed_tokens.weight", 2, 16, origin="trainable_tokens", rows=(9, 4))
    model = rig.load(llama())
    rig.check_values(model)
    layer: Any = model.get_base_model().get_submodule("model.embed_tokens")
    assert layer.token_adapter.token_indices["default"] == [9, 4]


def test_replicated_layers(rig: Rig) -> None:
    for layer in range(5):
        rig.linear(f"model.layers.{layer}.self_attn.q_proj", 16, 16, rank=1 + layer)
    model = rig.load(llama(3), layer_order=(0, 1, 1, 2, 0))
    rig.check_deltas(model)
    assert config_of(rig)["layer_replication"] == [[0, 2], [1, 3], [0, 1]]


@pytest.mark.parametrize("both", [True, False])
def test_experts_as_parameters(rig: Rig, both: bool) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, head_dim=4,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.experts"
        # down first: the order of the specs must not decide the nesting
        rig.delta(f"{module}.down_proj", (12, 8), (16, 12), rank=3, layout="experts", experts=4)
        if both:
            rig.delta(f"{module}.gate_up_proj", (8, 16), (16, 8), rank=2, layout="experts",
                      experts=4, scaling=0.5)  # fmt: skip
        rig.linear(f"model.layers.{layer}.self_attn.q_proj", 16, 16, rank=3)
    model = rig.load(transformers.Qwen3MoeForCausalLM(config))
    rig.check_deltas(model)
    assert len(config_of(rig)["target_parameters"]) == (4 if both else 2)


def test_experts_alone(rig: Rig) -> None:
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    rig.delta("model.layers.0.mlp.experts.down_proj", (8, 24), (16, 8), rank=2, layout="experts",
              experts=4)  # fmt: skip
    rig.check_deltas(rig.load(transformers.MixtralForCausalLM(config)))


@pytest.mark.parametrize("saved", [True, False])
def test_classifiers_have_a_task_only_with_their_head(rig: Rig, saved: bool) -> None:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, num_labels=3,
    )  # fmt: skip
    rig.linear("bert.encoder.layer.0.attention.self.query", 16, 16)
    if saved:
        rig.replace("classifier.weight", 3, 16)
        rig.replace("classifier.bias", 3)
    architecture = {"architectures": ["BertForSequenceClassification"]}
    model = rig.load(transformers.BertForSequenceClassification(config), architecture)
    rig.check_deltas(model)
    rig.check_values(model)
    assert config_of(rig)["task_type"] == ("SEQ_CLS" if saved else None)


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "CAUSAL_LM"),
        ({"architectures": ["GPT2LMHeadModel"]}, "CAUSAL_LM"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
         "SEQ_2_SEQ_LM"),
        ({"architectures": ["LlavaForConditionalGeneration"]}, None),
        ({"architectures": ["BertForTokenClassification"]}, "TOKEN_CLS"),
        ({"architectures": ["BertForQuestionAnswering"]}, "QUESTION_ANS"),
        ({"architectures": ["DetrForObjectDetection"]}, None),
        ({"architectures": "text"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_task_types(config: dict[str, Any], task: str | None) -> None:
    assert task_type_of(config) == task


# ---------------------------------------------------------------- what PEFT cannot hold


def _refused(rig: Rig, **more: Any) -> MismatchError:
    with pytest.raises(MismatchError) as caught:
        write_adapter_files(rig.adapter(**more), "peft")
    assert caught.value.exit_code == 4
    return caught.value


@pytest.mark.parametrize(
    "change",
    [{"base_change": "pissa"}, {"blocks": (2, "A")}, {"b_order": "expert-major"}, {"kind": "full"}],
)
def test_variants_without_an_own_configuration(rig: Rig, change: dict[str, Any]) -> None:
    rig.linear("lin", 16, 16)
    rig.specs = [DeltaSpec(**(asdict(s) | change)) for s in rig.specs]
    error = _refused(rig)
    assert error.code == "LT-411" and "lin.weight" in str(error.key)


def test_dora_on_some_modules_only(rig: Rig) -> None:
    rig.linear("lin", 16, 16, magnitude=rig.randn(16))
    rig.linear("head", 4, 16)
    assert "head.weight" in str(_refused(rig).key)


def test_bias_deltas_on_some_modules_only(rig: Rig) -> None:
    rig.linear("lin", 16, 16)
    rig.linear("head", 4, 16)
    rig.bias_delta("lin", 16, 1.0)
    assert str(_refused(rig).key) == "head"


def test_bias_delta_with_another_scaling(rig: Rig) -> None:
    rig.linear("lin", 16, 16)
    rig.bias_delta("lin", 16, 2.0)
    assert _refused(rig).code == "LT-412"


@pytest.mark.parametrize(("rank", "scaling"), [(4, 1.0), (3, 2.0), (None, 0)])
def test_mha_output_must_follow_in_proj(rig: Rig, rank: int | None, scaling: float) -> None:
    rig.delta("a.in_proj_weight", (4, 16), (48, 4), rank=4)
    if rank:
        rig.linear("a.out_proj", 16, 16, rank=rank, scaling=scaling)
    assert _refused(rig).code == "LT-412"


def test_one_tensor_changed_twice(rig: Rig) -> None:
    rig.linear("lin", 16, 16)
    rig.specs *= 2
    assert _refused(rig).code == "LT-411"
