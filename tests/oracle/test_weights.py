"""Weights per component and per module: float64 closed forms, and what verify repeats of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratool as lt
from loratool.engine.combining import random_keys
from loratool.errors import LoratoolError
from loratool.linalg.dense import combine_whole
from loratool.methods import find_method, parse_params
from loratool.ops.weights import components_of
from loratool.plan import DeltaPart
from tests.make import randn, random_factors, save_adapter, save_checkpoint

SHAPES = {
    "unet.down.q": (24, 20),
    "unet.up.conv": (16, 8),
    "text_encoder.layers.0.q": (16, 20),
    "text_encoder_2.layers.0.q": (10, 20),
    "vision_tower.layers.0.q": (12, 8),
}
TYPED = {"unet": 0.8, "te": -0.4}
EPS = 2.0**-24  # float32: one rounding of a stored factor or of a sum
Tensors = dict[str, torch.Tensor]


def factor(name: str, unet: float = 0.8, te: float = -0.4) -> float:
    return unet if name.startswith("unet.") else te if name.startswith("text_") else 1.0


def dense(folder: Path | str) -> Tensors:
    with lt.open(folder) as adapter:
        return {m.name: m.delta() for m in adapter}


def weights_of(folder: Path) -> Tensors:
    return {k: v for p in folder.glob("*.safetensors") for k, v in load_file(str(p)).items()}


def near(got: Tensors, want: Tensors, roundings: float = 4) -> None:
    """Each element within a few float32 roundings of the largest one."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = float((got[name].double() - value).abs().max())
        assert error <= roundings * EPS * float(value.abs().max()), (name, error)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, and style and sql with all of its modules."""
    tensors = {f"{n}.weight": randn(*s, seed=i) for i, (n, s) in enumerate(SHAPES.items())}
    save_checkpoint(tmp_path / "base", tensors, shards=2)
    for k, name in enumerate(("style", "sql")):
        save_adapter(tmp_path / name, random_factors(SHAPES, rank=4, seed=90 * k, scale=0.3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(code: str, **options: Any) -> LoratoolError:
    with pytest.raises(LoratoolError) as caught:
        lt.merge(**options)
    assert caught.value.code == code
    return caught.value


# --------------------------------------------------------------------------- per component


@pytest.mark.parametrize("exact", [False, True])
def test_components_into_a_base(exact: bool, place: Path) -> None:
    """W + Σ over modules of their component's weight · ΔW; verify repeats it from the record."""
    texts = ["style:unet=0.8,te=-0.4", "sql:0.5"]
    report = lt.merge(texts, base="base", output="m", exact=exact)
    style, sql, base = dense("style"), dense("sql"), weights_of(place / "base")
    want = {n: W.double() + factor(n) * style[n] + 0.5 * sql[n] for n, W in base.items()}
    near(weights_of(place / "m"), want)
    assert report.adapters[0] == {"label": "style", "weight": 1.0, "components": TYPED}
    said = "weights of style's tensors: unet 0.8 (2 of 5), te -0.4 (2 of 5), everything else 1"
    assert said in report.notes
    assert lt.verify("m").verdict == "identical"
    assert lt.verify("m", base="base", adapters=texts).verdict == "identical"
    assert lt.verify("m", base="base", adapters=["style:unet=0.8", "sql:0.5"]).verdict == "differs"


def test_one_component_is_the_weight_itself(place: Path) -> None:
    """An adapter of one component: the same bytes as with that weight on the whole."""
    only = {n: s for n, s in SHAPES.items() if n.startswith("unet")}
    save_adapter(place / "half", random_factors(only, rank=3, seed=5))
    lt.merge(["half:unet=0.3"], base="base", output="a", provenance=False)
    lt.merge(["half:0.3"], base="base", output="b", provenance=False)
    for path in (place / "a").glob("*.safetensors"):
        assert path.read_bytes() == (place / "b" / path.name).read_bytes()


def test_components_without_a_base(place: Path) -> None:
    style, sql = dense("style"), dense("sql")
    lt.merge(["style:unet=0.8,te=-0.4", "sql"], output="cat")
    near(dense("cat"), {n: factor(n) * style[n] + sql[n] for n in style})
    lt.merge(["style:unet=0.8,te=-0.4"], output="one", method="cat")
    near(dense("one"), {n: factor(n) * style[n] for n in style})
    lt.subtract(["style", "sql:te=0.5,vision_tower=2"], output="less")
    part = {n: factor(n, 1, 0.5) * (2 if "vision" in n else 1) for n in style}
    near(dense("less"), {n: style[n] - part[n] * sql[n] for n in style})
    lt.merge(["style:unet=0.8,te=-0.4", "sql"], output="mean", mean=True)
    near(dense("mean"), {n: (factor(n) * style[n] + sql[n]) / 2 for n in style})
    record = json.loads((place / "mean" / "loratool.json").read_text())["inputs"]
    assert record["style"]["components"] == TYPED and record["style"]["weight"] == 0.5


def test_weight_zero_leaves_a_component_out(place: Path) -> None:
    """te=0 takes part in nothing: no rank, no vote, and it needs no place in the base."""
    lt.merge(["style:te=0", "sql"], output="cat")
    with lt.open("cat") as adapter:
        ranks = {m.name: m.rank for m in adapter}
    assert {ranks[f"{n}.weight"] for n in SHAPES if n.startswith("text_")} == {4}
    assert {ranks[f"{n}.weight"] for n in SHAPES if not n.startswith("text_")} == {8}
    small = {f"{n}.weight": randn(*s, seed=1) for n, s in SHAPES.items() if "text" not in n}
    save_checkpoint(place / "small", small)
    lt.merge(["style:te=0"], base="small", output="m")
    style = dense("style")
    near(weights_of(place / "m"), {n: W.double() + style[n] for n, W in small.items()})
    gone = "style:te=0,unet=0,vision_tower=0"
    refused("LT-270", adapters=[gone], output="x", method="cat")
    lt.merge([gone, "sql"], output="y")
    near(dense("y"), dense("sql"))
    refused("LT-430", adapters=["style:te=0.5"], base="small", output="x")


def test_unknown_and_doubled_components(place: Path) -> None:
    error = refused("LT-478", adapters=["style:vae=0.5"], base="base", output="x")
    assert error.expected == "text_encoder, text_encoder_2, unet, vision_tower"
    assert error.exit_code == 4
    error = refused("LT-479", adapters=["style:te=1,text_encoder=2"], base="base", output="x")
    assert error.key == "text_encoder.layers.0.q.weight"
    refused("LT-224", adapters=["style:te=0.5"], weights=[1.0], base="base", output="x")
    with pytest.raises(LoratoolError, match="first adapter as it is"):
        lt.subtract(["style:te=0.5", "sql"], output="x")
    assert not (place / "x").exists()


def test_components_of_a_multimodal_model() -> None:
    llava = ["model.vision_tower.layers.0.q.weight", "model.language_model.layers.0.q.weight"]
    assert components_of(llava) == ["vision_tower", "language_model"]
    assert components_of(["unet.down.0.q.weight"]) == ["unet"]
    assert components_of([f"model.layers.{i}.q.weight" for i in range(3)]) == []
    assert components_of([]) == []


def test_out_again_and_swapped(place: Path) -> None:
    """Subtract and swap take the same weights; the undo file knows them; the record warns."""
    base, style, sql = weights_of(place / "base"), dense("style"), dense("sql")
    lt.merge(["style:unet=0.8,te=-0.4"], base="base", output="m", save_undo="u.safetensors")
    back = lt.subtract(["style:unet=0.8,te=-0.4"], merged="m", undo="u.safetensors", output="back")
    assert back.warnings == ()
    got = weights_of(place / "back")
    assert all(torch.equal(got[n], W) for n, W in base.items())
    for wrong in ("style", "style:unet=0.8", "style:unet=-0.4,te=0.8"):
        with pytest.raises(LoratoolError) as caught:
            lt.subtract([wrong], merged="m", undo="u.safetensors", output="x")
        assert caught.value.code == "LT-452"
    near(weights_of(place / "m"), {n: base[n].double() + factor(n) * style[n] for n in base})
    plain = lt.subtract(["style:unet=0.8,te=-0.4"], merged="m", output="plain")
    assert plain.warnings == () and lt.verify("plain").verdict == "identical"
    near(weights_of(place / "plain"), {n: W.double() for n, W in base.items()}, 8)
    report = lt.subtract(["style:unet=0.8"], merged="m", output="y")
    assert report.warnings == ("style was merged with other weights per component or module",)
    lt.swap("style:unet=0.8,te=-0.4", "sql:te=2", merged="m", output="s", exact=True)
    want = {n: base[n].double() + factor(n, 1, 2) * sql[n] for n in base}
    near(weights_of(place / "s"), want, 8)
    assert lt.verify("s").verdict == "identical"


# ------------------------------------------------------------------------------ per module

RULES = "'\\.q$': 9\n'down\\.q\\.': [0.5, -2]\nlayers: [0.25, 1]\n"


def ruled(name: str) -> tuple[float, float]:
    return (0.5, -2.0) if "down.q." in name else (0.25, 1.0) if "layers" in name else (1.0, 1.0)


@pytest.fixture
def rules(place: Path) -> str:
    (place / "rules.yaml").write_text(RULES)
    return "rules.yaml"


def test_module_weights_into_a_base(place: Path, rules: str) -> None:
    """They multiply the weights of adapters and of components, and verify repeats them."""
    base, style, sql = weights_of(place / "base"), dense("style"), dense("sql")
    texts = ["style:unet=0.8,te=-0.4", "sql:0.5"]
    report = lt.merge(texts, base="base", output="m", module_weights=rules)
    want = {
        n: W.double() + ruled(n)[0] * factor(n) * style[n] + ruled(n)[1] * 0.5 * sql[n]
        for n, W in base.items()
    }
    near(weights_of(place / "m"), want)
    assert "no module matches \\.q$ of --module-weights" in report.notes
    assert lt.verify("m").verdict == "identical"
    assert lt.verify("m", base="base", adapters=texts).verdict == "identical"
    assert lt.verify("m", base="base", adapters=[*texts, "sql:0"]).verdict == "differs"
    record = json.loads((place / "m" / "loratool.json").read_text())
    for damaged in (7, [7], [["(", 1.0, 1.0]], [["a", "b"]]):
        record["options"]["module_weights"] = damaged
        (place / "m" / "loratool.json").write_text(json.dumps(record))
        with pytest.raises(LoratoolError) as caught:
            lt.verify("m")
        assert caught.value.code == "LT-458"
    (place / "m" / "loratool.json").write_text("{}")
    assert lt.verify("m", base="base", adapters=texts).verdict == "differs"
    again = lt.verify("m", base="base", adapters=texts, module_weights=rules)
    assert again.verdict == "identical"


@pytest.mark.parametrize("method", ["ties", "ties-peft", "ties-mergekit", "magnitude", "dare"])
def test_module_weights_of_element_wise_methods(method: str, place: Path, rules: str) -> None:
    """A module's weights are those of the adapters in it, with and without a base."""
    base, inputs = weights_of(place / "base"), [dense("style"), dense("sql")]
    row = find_method(method)
    params = parse_params(row, {"density": 0.5})
    want = {}
    for name in base:
        parts = [DeltaPart(None, 1.0, adapter=i) for i in range(2)]  # type: ignore[arg-type]
        values = torch.stack([i[name] for i in inputs])
        scale = [w * f for w, f in zip((0.8, 0.5), ruled(name), strict=True)]
        want[name] = combine_whole(values, row, params, scale, random_keys(params, name, parts))
    options: Any = {"method": method, "params": {"density": 0.5}, "module_weights": rules}
    lt.merge(["style:0.8", "sql:0.5"], base="base", output="m", **options)
    near(weights_of(place / "m"), {n: base[n].double() + want[n] for n in base}, 16)
    assert lt.verify("m").verdict == "identical"
    lt.merge(["style:0.8", "sql:0.5"], output="a", rank=24, **options)
    near(dense("a"), want, 64)


def test_module_weights_of_slerp_move_along_the_arc(place: Path, rules: str) -> None:
    """t of a module = w_B / (w_A + w_B) of that module."""
    (place / "rules.yaml").write_text("'down\\.q\\.': [1, 3]\nlayers: [0, 1]\n")
    style, sql = dense("style"), dense("sql")
    lt.merge(["style", "sql"], output="s", method="slerp", module_weights=rules)
    want = {}
    for name, a in style.items():
        b, t = sql[name], 0.75 if "down.q." in name else 1.0 if "layers" in name else 0.5
        omega = torch.acos((a * b).sum() / (a.norm() * b.norm()))
        want[name] = (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)
    near(dense("s"), want, 16)


def test_module_weights_of_what_is_no_sum(place: Path) -> None:
    """W + w·(W' − W) for DoRA and for replaced tensors, as with a weight on the whole."""
    (place / "w.yaml").write_text("'.': 0.5\n")
    name = "unet.down.q"
    factors = random_factors({name: SHAPES[name]}, rank=2, seed=3)
    extra = {
        f"{name}.lora_magnitude_vector": randn(24, seed=8).abs() + 3,
        "unet.up.conv.weight": randn(16, 8, seed=9),
    }
    save_adapter(place / "dora", factors, extra=extra, use_dora=True,
                 modules_to_save=["unet.up.conv"])  # fmt: skip
    lt.merge(["dora"], base="base", output="a", module_weights="w.yaml", exact=False)
    lt.merge(["dora:0.5"], base="base", output="b")
    one, other = weights_of(place / "a"), weights_of(place / "b")
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert lt.verify("a").verdict == "identical"


def test_module_weights_out_again(place: Path, rules: str) -> None:
    base = weights_of(place / "base")
    options: Any = {"module_weights": rules}
    lt.merge(["style:0.8", "sql"], base="base", output="m", save_undo="u.safetensors", **options)
    taken: Any = {"merged": "m", "output": "back", "undo": "u.safetensors"}
    lt.subtract(["style:0.8", "sql"], **taken, **options)
    got = weights_of(place / "back")
    assert all(torch.equal(got[n], W) for n, W in base.items())
    with pytest.raises(LoratoolError) as caught:
        lt.subtract(["style:0.8", "sql"], **taken | {"output": "x"})
    assert caught.value.code == "LT-452"
    plain = lt.subtract(["style:0.8", "sql"], merged="m", output="p", **options)
    assert plain.warnings == () and lt.verify("p").verdict == "identical"
    near(weights_of(place / "p"), {n: W.double() for n, W in base.items()}, 16)
    (place / "half.yaml").write_text("'.': [1, 0.5]\n")
    style, sql = dense("style"), dense("sql")
    lt.merge(["style"], base="base", output="one")
    lt.swap("style", "sql", merged="one", output="s", module_weights="half.yaml")
    near(weights_of(place / "s"), {n: base[n].double() + 0.5 * sql[n] for n in base}, 16)
    lt.subtract(["style", "sql"], output="less", module_weights="half.yaml")
    near(dense("less"), {n: style[n] - 0.5 * sql[n] for n in style})
