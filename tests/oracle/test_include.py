"""``--include`` takes what matches and nothing else, in every command that opens an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from loratool.dialects.programs import judge_loads
from loratool.errors import LoratoolError
from tests.make import randn

ONLY = "layers\\.0\\..*q_proj"


def modules(folder: str) -> set[str]:
    return {module.name for module in lt.open(folder)}


def test_it_is_the_opposite_of_skip(here: Path) -> None:
    lt.merge(["style"], base="base", output="kept", include=[ONLY])
    lt.merge(["style"], base="base", output="left", skip=[ONLY])
    lt.merge(["style"], base="base", output="all")
    base, kept, left, whole = map(tensors, ("base", "kept", "left", "all"))
    changed = {n for n in base if not torch.equal(base[n], kept[n])}
    assert changed == {"model.layers.0.self_attn.q_proj.weight"}
    for name in base:
        assert torch.equal(whole[name], (kept if name in changed else left)[name])


def test_a_component_is_no_part_of_a_word(tmp_path: Path) -> None:
    """``te`` is the text encoder, in attentions too: for every option that takes parts."""
    inside = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    names = ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", inside)
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({f"{name}.lora_{side}.weight": randn(*shape, seed=i)
               for i, name in enumerate(names)
               for side, shape in (("down", (2, 6)), ("up", (6, 2)))}, path)  # fmt: skip
    (rules := tmp_path / "rules.yaml").write_text("te: 3\n")

    def factors() -> dict[bool, float]:
        """Is it of the text encoder -> how much larger it became."""
        sizes = {m.name: m.norm() for m in lt.open(path)}
        return {m.name.startswith("te."): m.norm() / sizes[m.name] for m in lt.open(out)}

    lt.rescale([path], 1, only=["te=3"], output=out)
    assert factors() == {True: pytest.approx(3), False: pytest.approx(1)}
    lt.rescale([path], 2, include=["te"], output=out, force=True)
    assert factors() == {True: pytest.approx(2)}
    lt.combine([path, path], module_weights=rules, output=out, force=True)
    assert factors() == {True: pytest.approx(6), False: pytest.approx(2)}


def test_it_is_said_recorded_and_replayed(here: Path) -> None:
    report = lt.merge(["style"], base="base", output="kept", include=[ONLY])
    assert any("--include leaves out" in note for note in report.notes)
    record = json.loads((here / "kept" / "loratool.json").read_text())
    assert record["options"]["include"] == [ONLY]
    assert lt.verify("kept").verdict == "identical"
    assert lt.verify("kept", base="base", adapters=["style"], include=[ONLY]).ok
    assert not lt.verify("kept", base="base", adapters=["style"]).ok


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return {n: t for p in Path(folder).glob("*.safetensors") for n, t in load_file(p).items()}


MAKERS: dict[str, Callable[..., object]] = {
    "combine": lambda **more: lt.combine(["style"], output="out", rank=2, **more),
    "compress": lambda **more: lt.compress("style", output="out", rank=2, **more),
    "rescale": lambda **more: lt.rescale(["style"], 0.5, output="out", **more),
    "rescale, baked": lambda **more: lt.rescale(["style"], 0.3, output="out", **more),
    "rescale, as it is": lambda **more: lt.rescale(["style"], 1, output="out", **more),
    "subtract": lambda **more: lt.subtract(["style", "style:0.5"], output="out", **more),
}


@pytest.mark.parametrize("name", MAKERS)
def test_an_adapter_holds_what_was_taken_and_is_itself_one(here: Path, name: str) -> None:
    """The configuration names the modules that are there: PEFT would make the others anew."""
    MAKERS[name](include=[ONLY])
    assert modules("out") == {m for m in modules("style") if "layers.0.self_attn.q_proj" in m}
    config = json.loads((here / "out" / "adapter_config.json").read_text())
    targets = config["target_modules"]
    assert "k_proj" not in str(targets) and "mlp" not in str(targets)
    peft = judge_loads(open_adapter(Path("out")))[0]
    assert peft.program == "PEFT" and peft.verdict == "yes"
    record = json.loads((here / "out" / "loratool.json").read_text())
    assert record["options"]["include"] == [ONLY]


def test_the_change_that_was_taken_is_scaled(here: Path) -> None:
    lt.rescale(["style"], 0.5, output="out", include=[ONLY])
    (taken,) = lt.open("out")
    whole = next(m for m in lt.open("style") if m.name == taken.name)
    assert torch.allclose(taken.delta(), whole.delta() / 2, rtol=1e-12)


def test_a_recipe_may_say_it(here: Path) -> None:
    Path("r.yaml").write_text(
        "steps:\n  - rescale: {adapters: [style], factor: 0.5, output: out, include: [q_proj]}\n"
    )
    lt.run("r.yaml")
    assert all("q_proj" in name for name in modules("out"))


@pytest.mark.parametrize(("text", "code"), [("no_such_module", "LT-448"), ("(", "LT-220")])
def test_what_takes_nothing_is_refused(here: Path, text: str, code: str) -> None:
    with pytest.raises(LoratoolError) as caught:
        lt.merge(["style"], base="base", output="out", include=[text])
    assert caught.value.code == code and not Path("out").exists()
