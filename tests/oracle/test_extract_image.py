"""`extract --for` of programs that run image models: the file loads there, and is the change.

The closed form: a fine-tune whose changes have rank 2 and whose norms and biases changed is, merged
back from the file into the base, the fine-tune itself, but for what the report says is left out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratool as lt
from loratool.dialects import open_adapter
from loratool.dialects.programs.images import PROGRAMS

H = 16
FLUX = {
    "img_in": (H, 4), "txt_in": (H, 8), "final_layer.linear": (4, H),
    "final_layer.adaLN_modulation.1": (2 * H, H),
    **{f"double_blocks.0.{side}_{m}": shape for side in ("img", "txt") for m, shape in (
        ("attn.qkv", (3 * H, H)), ("attn.proj", (H, H)), ("mlp.0", (4 * H, H)),
        ("mlp.2", (H, 4 * H)), ("mod.lin", (6 * H, H)))},
    "single_blocks.0.linear1": (7 * H, H), "single_blocks.0.linear2": (H, 5 * H),
    "single_blocks.0.modulation.lin": (3 * H, H),
}  # fmt: skip
FLUX_NORMS = {"double_blocks.0.img_attn.norm.query_norm.scale": (8,),
              "single_blocks.0.norm.key_norm.scale": (8,)}  # fmt: skip
WAN = {
    **{f"blocks.0.{a}_attn.{m}": (H, H) for a in ("self", "cross") for m in "qkvo"},
    "blocks.0.ffn.0": (24, H), "blocks.0.ffn.2": (H, 24), "head.head": (8, H),
    "text_embedding.0": (H, 8), "time_embedding.0": (H, 8), "time_projection.1": (6 * H, H),
}  # fmt: skip
WAN_NORMS = {"blocks.0.modulation": (1, 6, H), "head.modulation": (1, 2, H),
             "blocks.0.self_attn.norm_q.weight": (H,), "blocks.0.norm3.weight": (H,),
             "blocks.0.norm3.bias": (H,)}  # fmt: skip
SPECIMENS = {"flux": (FLUX, FLUX_NORMS), "wan": (WAN, WAN_NORMS)}
NOT_RUN = {("webui", "flux"), ("webui", "wan"), ("nunchaku", "wan")}
NAMES = [p.name for p in PROGRAMS]


def pair(folder: Path, model: str, prefix: str = "") -> tuple[Path, Path]:
    """A base and its fine-tune: matrices by rank 2, biases and all that is small by any numbers."""
    rng = np.random.default_rng(7)
    layers, norms = SPECIMENS[model]
    base, tuned = {}, {}
    for name, (rows, columns) in layers.items():
        weight = rng.normal(size=(rows, columns)).astype(np.float32)
        change = rng.normal(size=(rows, 2)) @ rng.normal(size=(2, columns))
        base[f"{name}.weight"], tuned[f"{name}.weight"] = weight, weight + change
        base[f"{name}.bias"] = rng.normal(size=rows).astype(np.float32)
        tuned[f"{name}.bias"] = base[f"{name}.bias"] + rng.normal(size=rows)
    for name, shape in norms.items():
        base[name] = rng.normal(size=shape).astype(np.float32)
        tuned[name] = base[name] + rng.normal(size=shape)
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, tensors in zip(paths, (base, tuned), strict=True):
        save_file({prefix + k: v.astype(np.float32) for k, v in tensors.items()}, str(path))
    return paths


def is_close(found: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> bool:
    """As far as float32 factors of rank 2, and one rounding of the sum, allow."""
    return bool(np.all(np.abs(found - want) <= 2.0**-20 * np.abs(want).max()))


@pytest.mark.parametrize("model", SPECIMENS)
@pytest.mark.parametrize("program", NAMES)
def test_it_loads_and_is_the_change(program: str, model: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, model)
    out, merged = tmp_path / "out.safetensors", tmp_path / "merged.safetensors"
    words: dict[str, Any] = {"base": base, "output": out, "program": program, "rank": 2}
    if (program, model) in NOT_RUN:
        with pytest.raises(lt.LoratoolError, match="a model that it does not have") as caught:
            lt.extract(tuned, **words, dry_run=True)
        assert caught.value.code == "LT-488" and not out.exists()
        return
    report = lt.extract(tuned, **words)
    found = lt.check(out, program=program)
    assert found.verdict == ("unsure" if (program, model) == ("forge", "wan") else "yes")
    assert set(found.counts) == {"loads"} or found.verdict == "unsure"
    lt.merge([out], base=base, output=merged)
    before, want, got = load_file(str(base)), load_file(str(tuned)), load_file(str(merged))
    lost = {name for name, *_ in report.left_out}
    assert lost.isdisjoint(f"{name}.weight" for name in SPECIMENS[model][0])
    for name, tensor in got.items():
        assert is_close(tensor, before[name] if name in lost else want[name]), name
    assert {name for name, _ in report.kept} | lost == {
        name for name in want if name.removesuffix(".weight") not in SPECIMENS[model][0]
    }


def test_comfyui_holds_all_of_it(tmp_path: Path) -> None:
    """Norms that have no module of their own in its names, and modulations."""
    for model, (_, norms) in SPECIMENS.items():
        base, tuned = pair(tmp_path, model, prefix="model.diffusion_model.")
        out = tmp_path / f"{model}.safetensors"
        report = lt.extract(tuned, base=base, output=out, program="comfyui", rank=2)
        assert not report.left_out
        keys = set(load_file(str(out)))
        bare = [name for name in norms if not name.endswith((".weight", ".bias"))]
        ends = ("w_norm", "diff")  # it takes either for any parameter
        named = [n.removesuffix(".scale") for n in bare]  # its model has norms of FLUX as .weight
        assert named
        assert all(any(f"diffusion_model.{n}.{end}" in keys for end in ends) for n in named)


@pytest.mark.parametrize(("program", "dialect", "other"), [
    ("diffusers", "diffusers", "kohya"), ("forge", "kohya", "lycoris"), ("vllm", "", "kohya"),
])  # fmt: skip
def test_the_dialect_follows_the_program(
    program: str, dialect: str, other: str, tmp_path: Path
) -> None:
    """Another one is refused where the program does not load it."""
    base, tuned = pair(tmp_path, "flux")
    words: dict[str, Any] = {"base": base, "program": program, "rank": 1}
    if dialect:
        lt.extract(tuned, output=tmp_path / "one.safetensors", **words)
        assert open_adapter(tmp_path / "one.safetensors").dialect == dialect
    out = tmp_path / "two.safetensors"
    with pytest.raises(lt.LoratoolError) as caught:
        lt.extract(tuned, output=out, to=other, **words)
    assert caught.value.code == "LT-488" and not out.exists()


def test_a_size_holds_for_what_is_written(tmp_path: Path) -> None:
    """What a single file says of itself counts too; no bytes for one more rank are left over."""
    base, tuned = pair(tmp_path, "flux")
    out, small = tmp_path / "out.safetensors", tmp_path / "small.safetensors"
    lt.extract(tuned, base=base, output=out, program="diffusers", size=14_000)
    assert out.stat().st_size <= 14_000 and lt.check(out, program="diffusers").verdict == "yes"
    for to in (None, "kohya"):
        (row,) = lt.compress([out], size=12_500, output=small, to=to, force=True).adapters
        assert small.stat().st_size == row.bytes_after <= 12_500


def test_every_single_file_is_replaced_with_force_and_no_other(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "flux")
    source = tmp_path / "source.safetensors"
    lt.extract(tuned, base=base, output=source, to="kohya", rank=2)
    out = tmp_path / "out.safetensors"
    commands: dict[str, Callable[[], Any]] = {
        "extract": lambda: lt.extract(tuned, base=base, output=out, to="kohya", force=True),
        "for": lambda: lt.extract(tuned, base=base, output=out, program="comfyui", force=True),
        "convert": lambda: lt.convert([source], to="comfyui", output=out, force=True),
        "compress": lambda: lt.compress([source], rank=1, output=out, force=True),
        "rescale": lambda: lt.rescale([source], 2, output=out, force=True),
        "combine": lambda: lt.merge([source, source], output=out, force=True),
        "merge": lambda: lt.merge([source], base=base, output=out, force=True),
    }
    for command in commands.values():  # each replaces what the one before it made
        command()
    for name, command in commands.items():
        command()
        with out.open("r+b") as file:  # somebody changed it since
            file.seek(-1, 2)
            last = file.read()
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))
        with pytest.raises(lt.LoratoolError) as caught:
            command()
        assert caught.value.code == "LT-505", name
        out.unlink()


HINTS = [("diffusers", "flux"), ("nunchaku", "flux"), ("diffusers", "wan"), ("sd-scripts", "wan")]


@pytest.mark.parametrize(("program", "model"), HINTS)
def test_the_hint_for_what_does_not_load_works(program: str, model: str, tmp_path: Path) -> None:
    """`convert` drops nothing by itself: its error names the very options, which can be typed."""
    base, tuned = pair(tmp_path, model)
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    lt.extract(tuned, base=base, output=source, program="comfyui", rank=2)
    with pytest.raises(lt.LoratoolError) as caught:
        lt.convert([source], program=program, output=out)
    words = shlex.split(str(caught.value.hint).removesuffix(" leaves them out"))
    assert words[:5] == ["loratool", "convert", str(source), "--for", program]
    skip = [text for word, text in pairwise(words) if word == "--skip"]
    lt.convert([source], program=program, skip=skip, output=out)
    assert lt.check(out, program=program).verdict == "yes"
    kept = {s.name for s in open_adapter(out).specs if s.is_matrix}
    expected = tmp_path / "expected.safetensors"
    lt.extract(tuned, base=base, output=expected, program=program, rank=2)
    assert kept == {s.name for s in open_adapter(expected).specs if s.is_matrix}


PLACELESS = {  # program -> (a module that it loads, one that it does not)
    "diffusers": ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", (16, 768),
                  "add_embedding.linear_1", (32, 48)),
    "vllm": ("model.layers.0.self_attn.q_proj", (16, 16), "visual.patch_embed.proj", (16, 3, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("program", PLACELESS)
def test_what_has_no_place_counts_only_where_it_changed(program: str, tmp_path: Path) -> None:
    good, shape, bad, other = PLACELESS[program]
    rng = np.random.default_rng(3)
    base = {f"{good}.weight": rng.normal(size=shape).astype(np.float32),
            f"{bad}.weight": rng.normal(size=other).astype(np.float32)}  # fmt: skip
    change = rng.normal(size=(shape[0], 2)) @ rng.normal(size=(2, shape[1]))
    tuned = {**base, f"{good}.weight": (base[f"{good}.weight"] + change).astype(np.float32)}
    one, two = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    save_file(base, str(one))
    save_file(tuned, str(two))
    out = tmp_path / ("out" if program == "vllm" else "out.safetensors")
    lt.extract(two, base=one, program=program, rank=2, output=out)
    lt.merge([out], base=one, output=(back := tmp_path / "back.safetensors"))
    for name, tensor in load_file(str(back)).items():
        assert np.abs(tensor - tuned[name]).max() <= 2**-20 * max(1, np.abs(change).max()), name
    tuned[f"{bad}.weight"] = base[f"{bad}.weight"].copy()
    tuned[f"{bad}.weight"].reshape(-1)[-1] += 1  # the last byte that is compared
    save_file(tuned, str(two))
    with pytest.raises(lt.LoratoolError) as caught:
        lt.extract(two, base=one, program=program, rank=2, output=(no := out.with_stem("no")))
    assert caught.value.code == "LT-488" and not no.exists()


MODELS = {
    "sd3": ("joint_blocks.0.x_block.attn.qkv", ["clip_l", "clip_g"]),
    "flux": ("double_blocks.0.img_attn.qkv", ["clip_l"]),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers"])
def test_what_no_table_names_stays_in_its_text_encoder(to: str, model: str, tmp_path: Path) -> None:
    """T5's relative positions go beside its attention, not into CLIP-G."""
    module, encoders = MODELS[model]
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    rng, t5 = np.random.default_rng(4), "text_encoders.t5xxl.transformer.encoder.block.0.layer.0."
    names = [f"model.diffusion_model.{module}", f"{t5}SelfAttention.q",
             f"{t5}SelfAttention.relative_attention_bias",
             *(f"text_encoders.{one}.transformer.{layer}" for one in encoders)]  # fmt: skip
    base = {f"{n}.weight": rng.normal(size=(96, 32)).astype(np.float32) for n in names}
    tuned = {n: (w + rng.normal(size=(96, 1)) @ rng.normal(size=(1, 32))).astype(np.float32)
             for n, w in base.items()}  # fmt: skip
    one, two, out = (tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "out"))
    save_file(base, str(one))
    save_file(tuned, str(two))
    lt.extract(two, base=one, to=to, rank=1, output=out)
    made = load_file(str(out))
    (q,) = {k.partition("SelfAttention")[0] for k in made if re.search(r"SelfAttention[._]q\.", k)}
    (bias,) = {k.partition("SelfAttention")[0] for k in made if "relative" in k}
    assert q == bias
    modules = {k.partition(".lora")[0] for k in made if ".lora" in k}
    assert len(modules) == len(names) + (2 if to == "diffusers" else 0)  # q, k and v apart


@pytest.mark.parametrize("form", [{"to": "diffusers"}, {"to": "onetrainer"},
                                  {"program": "comfyui"}])  # fmt: skip
def test_files_of_the_folder_that_one_is_in(
    form: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named without a folder: it ended in LT-001."""
    monkeypatch.chdir(tmp_path)
    rng, name = np.random.default_rng(5), "transformer_blocks.0.attn1.to_q.weight"
    name = f"unet.down_blocks.1.attentions.0.{name}"
    base = rng.normal(size=(16, 8)).astype(np.float32)
    change = rng.normal(size=(16, 1)) @ rng.normal(size=(1, 8))
    tuned = (base + change).astype(np.float32)
    save_file({name: base}, "base.safetensors")
    save_file({name: tuned}, "tuned.safetensors")
    lt.extract("tuned.safetensors", base="base.safetensors", rank=1, output="a.safetensors", **form)  # type: ignore[arg-type]
    lt.merge(["a.safetensors"], base="base.safetensors", output="merged.safetensors")
    assert is_close(load_file("merged.safetensors")[name], tuned)
