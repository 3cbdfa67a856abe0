"""What is written from an adapter, PEFT loads with every tensor and the same ΔW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loratool as lt
from tests.oracle.in_peft import Tensors, changes, config_of, distance, load_strict, make, save_base

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 70,
}  # fmt: skip


class Bare(nn.Module):
    """A module of one's own: square weights that nothing but the module itself knows to use."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(8, 8)))


class Own(nn.Module):
    """Modules of one's own, and plain ones."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.lin = Bare(*names)
        self.plain = nn.Linear(8, 8)
        self.lora_head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora_head(self.plain(x @ self.lin.weight))  # type: ignore[no-any-return]


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_key_value_heads=1))


def qwen_moe() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **TINY, num_key_value_heads=1, head_dim=8, moe_intermediate_size=8, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "init_lora_weights": False, **settings})


def parameters(*names: str, **settings: Any) -> Any:
    return lora(target_parameters=list(names), target_modules=[], **settings)


PARAMETERS: dict[str, tuple[Callable[[], Any], Any]] = {
    "router": (qwen_moe, parameters("mlp.gate.weight")),
    "router and experts": (
        qwen_moe, parameters("gate.weight", "experts.gate_up_proj", "experts.down_proj"),
    ),
    "linear": (llama, parameters("q_proj.weight")),
    "embedding": (llama, parameters("embed_tokens.weight")),
    "own": (lambda: Own("weight"), parameters("lin.weight")),
    "two of one module": (lambda: Own("weight", "other"), parameters("lin.weight", "lin.other")),
    "two the other way round": (
        lambda: Own("zweite", "erste", "weight"), parameters("lin.zweite", "lin.erste"),
    ),
    "beside modules": (
        lambda: Own("weight"),
        lora(
            target_parameters=["lin.weight"], target_modules=["plain"], alpha_pattern={"plain": 3}
        ),
    ),
}  # fmt: skip


def write_all(first: Path, second: Path, folder: Path) -> dict[str, tuple[Path, Any]]:
    """Name of an operation -> what it wrote, and what of (ΔA, ΔB) that is; None = truncated."""
    jobs: Mapping[str, tuple[Callable[[Path], Any], tuple[float, float] | None]] = {
        "cat": (lambda o: lt.merge([str(first), str(second)], weights=[0.7, -0.3], output=o),
                (0.7, -0.3)),
        "svd": (lambda o: lt.merge([str(first), str(second)], method="svd", rank=8, output=o),
                (1.0, 1.0)),
        "subtract": (lambda o: lt.subtract([str(first), f"{second}:0.5"], output=o), (1.0, -0.5)),
        "rescale": (lambda o: lt.rescale([str(first)], 0.3, output=o), (0.3, 0.0)),
        "only": (lambda o: lt.rescale([str(first)], 1, only=["nothing|.=0.3"], output=o), (0.3, 0)),
        "compress": (lambda o: lt.compress(first, rank=2, output=o), None),
    }  # fmt: skip
    made = {}
    for name, (work, share) in jobs.items():
        work(folder / name)
        made[name] = folder / name, share
    return made


def check(model: Any, first: Path, second: Path, folder: Path) -> dict[str, Path]:
    """Every operation on two adapters of one configuration, inside PEFT."""
    a, b = changes(model, first), changes(model, second)
    made = write_all(first, second, folder)
    for name, (path, share) in made.items():
        found = changes(model, path)
        if share is not None:
            assert distance(found, {k: share[0] * a[k] + share[1] * b[k] for k in a}) < 1e-6, name
        else:
            assert_truncated(found, a, 2)
    return {name: path for name, (path, _) in made.items()}


def assert_truncated(found: Tensors, whole: Tensors, rank: int) -> None:
    """Each matrix is the best one of its rank (of each expert's, for experts)."""
    for name, delta in whole.items():
        if delta.dim() < 2 or not delta.norm():
            continue
        stack = delta if delta.dim() == 3 else delta[None]
        tail = sum(float(torch.linalg.svdvals(m)[rank:].square().sum()) for m in stack)
        off = float((found[name] - delta).norm())
        assert off <= tail**0.5 + 1e-6 * float(delta.norm()), name


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_stay_parameters(name: str, tmp_path: Path) -> None:
    build, config = PARAMETERS[name]
    model = build().eval()
    first, second = (make(model, tmp_path / n, config, seed) for seed, n in enumerate("ab", 1))
    made = check(model, first, second, tmp_path)
    for path in made.values():
        assert set(config_of(path)["target_modules"] or []) <= {"plain"}
        assert config_of(path)["target_parameters"]


def test_parameters_are_merged_as_stored(tmp_path: Path) -> None:
    """A square weight that a module uses turned round: its parameter is not."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    adapter = make(model, tmp_path / "a", parameters("attn.c_proj.weight"))
    base = save_base(model, tmp_path / "base")
    lt.merge([str(adapter)], base=base, output=tmp_path / "out")
    ours = type(model).from_pretrained(tmp_path / "out").double().state_dict()
    want = changes(model, adapter)
    state = model.double().state_dict()
    assert distance({k: ours[k] - state[k] for k in want}, want) < 1e-5


# ------------------------------------------------------------------- whole modules and biases


def classifier(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, pad_token_id=1, **more)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Electra", "Bert"])
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_head_stays_one_module(kind: str, task: str | None, tmp_path: Path) -> None:
    more = {"embedding_size": 16} if kind == "Electra" else {}
    model = classifier(kind, **more)
    named = {} if task else {"modules_to_save": ["classifier"]}
    headed = lora(target_modules=["query", "value"], task_type=task, **named)
    plain = lora(target_modules=["query", "value"])
    first = make(model, tmp_path / "a", headed)
    other = make(model, tmp_path / "b", plain, seed=2)
    whole = {k: v for k, v in changes(model, first).items() if k.startswith("classifier.")}
    assert all(v.norm() for v in whole.values())
    written = {
        "compress": lambda o: lt.compress(first, rank=2, output=o),
        "only": lambda o: lt.rescale([str(first)], 1, only=["query=0"], output=o),
        "merge": lambda o: lt.merge([str(first), str(other)], output=o),
        "merge, the head second": lambda o: lt.merge([str(other), str(first)], output=o),
        "subtract": lambda o: lt.subtract([str(first), str(other)], output=o),
    }
    for name, work in written.items():
        work(tmp_path / name)  # type: ignore[no-untyped-call]
        found = changes(model, tmp_path / name)
        assert distance({k: found[k] for k in whole}, whole) < 1e-6, name
        assert "classifier" in config_of(tmp_path / name)["modules_to_save"], name


def test_a_head_that_is_the_bases_again_is_not_asked_for(tmp_path: Path) -> None:
    model = classifier("Roberta")
    first = make(model, tmp_path / "a", lora(target_modules=["query"], task_type="SEQ_CLS"))
    second = tmp_path / "b"
    lt.rescale([str(first)], 0.5, output=second)  # the same head
    lt.subtract([str(first), str(second)], output=tmp_path / "out")
    found, whole = changes(model, tmp_path / "out"), changes(model, first)
    want = {k: 0 * v if k.startswith("classifier") else 0.5 * v for k, v in whole.items()}
    assert distance(found, want) < 1e-6


@pytest.mark.parametrize("keep", ["classifier", "all"])
def test_extracted_heads_load(keep: str, tmp_path: Path) -> None:
    model = classifier("Roberta")
    base = save_base(model, tmp_path / "base")
    state = {k: v.double().clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    tuned = save_base(model, tmp_path / "tuned")
    lt.extract(tuned, base=base, output=tmp_path / "e", rank=16, keep=[keep])
    found = changes(type(model).from_pretrained(base), tmp_path / "e")
    want = {k: v.double() - state[k] for k, v in model.state_dict().items()}
    heads = {k: v for k, v in want.items() if k.startswith("classifier") or keep == "all"}
    assert distance({k: found[k] for k in heads}, heads) < 1e-5


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_whose_biases_are_stored_stays(bias: str, tmp_path: Path) -> None:
    model = Own("weight")
    config = lora(target_modules=["plain"], bias=bias)
    first, second = make(model, tmp_path / "a", config), make(model, tmp_path / "b", config, seed=2)
    lt.compress(first, rank=2, output=tmp_path / "c")
    lt.rescale([str(first)], 1, only=["plain=0.3"], output=tmp_path / "r")
    lt.merge([str(first), str(second)], mean=True, output=tmp_path / "m")
    for name in "crm":
        load_strict(model, tmp_path / name)
        assert config_of(tmp_path / name)["bias"] == bias, name


# --------------------------------------------------------------------- nothing but whole tensors


@pytest.mark.parametrize("what", ["embed_tokens.weight", "norm.weight", "q_proj.bias", "gate"])
def test_extracts_without_a_matrix(what: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **TINY, num_key_value_heads=1, attention_bias=True, tie_word_embeddings=False
    )
    model = transformers.LlamaForCausalLM(config).eval()
    base = save_base(model, tmp_path / "base")
    state = {k: v.double().clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(what) or (what == "gate" and "gate_proj" in name):
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    tuned = save_base(model, tmp_path / "tuned")
    keep = ["gate_proj"] if what == "gate" else ["all"]
    lt.extract(tuned, base=base, output=tmp_path / "e", rank=4, keep=keep)
    found = changes(type(model).from_pretrained(base), tmp_path / "e")
    want = {k: v.double() - state[k] for k, v in model.state_dict().items()}
    assert distance(found, want) < 1e-6
