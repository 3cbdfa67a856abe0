"""Random inputs for the contract suites, by Hypothesis: one entry for each kind and codec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st

from loratool.adapter import DeltaSpec, TensorData
from loratool.frozen import Frozen, replace
from tests import coded
from tests.coded import CodedFile
from tests.make import generator, randn

Tensors = dict[str, torch.Tensor]
Draw = st.DrawFn

SIDES = st.integers(1, 9)
RANKS = st.integers(1, 4)
SEEDS = st.integers(0, 2**20)
KERNELS = st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple)


def spans(size: int) -> st.SearchStrategy[tuple[int, ...]]:
    """(start, stop) of some of ``size`` rows."""
    ends = st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)
    return ends.map(lambda pair: tuple(sorted(pair)))


# ---------------------------------------------------------------------------------- kinds


class Change(Frozen):
    """A spec and its tensors.

    Attributes:
        spec: as a dialect reads it.
        fields: role -> tensor, float32.
        shape: (rows, columns) of the weight, kernels flattened; (1, n) of a vector.
    """

    spec: DeltaSpec
    fields: Tensors
    shape: tuple[int, int]


@st.composite
def inner_shapes(draw: Draw) -> tuple[int, ...]:
    """(in,) of a matrix, (in, k…) of a convolution."""
    return (draw(SIDES), *draw(st.one_of(st.just(()), KERNELS)))


def change(kind: str, shapes: Mapping[str, tuple[int, ...]], seed: int, rank: int,
           size: tuple[int, ...], **more: Any) -> Change:  # fmt: skip
    """A spec with random numbers of these shapes; the weight is of ``size``."""
    fields = {role: randn(*shape, seed=seed + i) for i, (role, shape) in enumerate(shapes.items())}
    sources = {
        role: TensorData(role, "F32", tuple(t.shape), t.numpy().tobytes())
        for role, t in fields.items()
    }
    layout = "vector" if len(size) < 2 else "conv" if len(size) > 2 else "linear"
    parameter = "bias" if layout == "vector" else "weight"
    alpha, scaling = (2.0 * rank, 2.0) if rank else (None, 1.5)
    spec = DeltaSpec(kind, "a.b", parameter, sources, layout, rank, alpha, scaling, **more)
    rows, *inner = size if len(size) > 1 else (1, *size)
    return Change(spec, fields, (rows, int(torch.Size(inner).numel())))


@st.composite
def low_rank(draw: Draw) -> Change:
    """LoRA: linear, convolution, with a core or a diagonal, block-diagonal."""
    out, inner, r = draw(SIDES), draw(inner_shapes()), draw(RANKS)
    ones = (1,) * (len(inner) - 1)
    shapes = {"lora_A": (r, *inner), "lora_B": (out, r, *ones)}
    more: dict[str, Any] = {}
    form = draw(st.sampled_from(["plain", "diag", "blocks"] if not ones else ["plain", "core"]))
    if form == "diag":
        shapes["diag"] = (r,)
    elif form == "core":
        shapes |= {"lora_A": (r, inner[0], *ones), "lora_mid": (r, r, *inner[1:])}
    elif form == "blocks":
        count = draw(st.integers(1, 3))
        r, inner = r * count, (inner[0] * count,)
        shapes = {"lora_A": (r, inner[0] // count), "lora_B": (out, r)}
        more["blocks"] = (count, "A")
    return change("lowrank", shapes, draw(SEEDS), r, (out, *inner), **more)


@st.composite
def hadamard(draw: Draw) -> Change:
    """LoHa, of convolutions with cores or flattened."""
    out, inner, r = draw(SIDES), draw(inner_shapes()), draw(RANKS)
    shapes: dict[str, tuple[int, ...]] = {}
    has_core = len(inner) > 1 and draw(st.booleans())
    for n in (1, 2):
        if has_core:
            shapes |= {f"hada_w{n}_a": (r, out), f"hada_w{n}_b": (r, inner[0]),
                       f"hada_t{n}": (r, r, *inner[1:])}  # fmt: skip
        else:
            shapes |= {f"hada_w{n}_a": (out, r), f"hada_w{n}_b": (r, *inner)}
    return change("hadamard", shapes, draw(SEEDS), r, (out, *inner))


@st.composite
def kronecker(draw: Draw) -> Change:
    """LoKr: each matrix whole or in factors, the second with a core or a kernel or flattened."""
    (ol, ok, im), inner, r = draw(st.tuples(*[st.integers(1, 4)] * 3)), draw(inner_shapes()), 0
    shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (ol, im), "lokr_w2": (ok, *inner)}
    forms = ["whole", "factors"] if len(inner) == 1 else ["whole", "factors", "core"]
    first, second = draw(st.booleans()), draw(st.sampled_from(forms))
    if first or second != "whole":
        r = draw(RANKS)
    if first:
        del shapes["lokr_w1"]
        shapes |= {"lokr_w1_a": (ol, r), "lokr_w1_b": (r, im)}
    if second != "whole":
        del shapes["lokr_w2"]
        shapes |= {"lokr_w2_a": (ok, r), "lokr_w2_b": (r, *inner)}
    if second == "core":
        shapes |= {"lokr_w2_a": (r, ok), "lokr_w2_b": (r, inner[0]), "lokr_t2": (r, r, *inner[1:])}
    return change("kronecker", shapes, draw(SEEDS), r, (ol * ok, im * inner[0], *inner[1:]))


@st.composite
def with_lengths(draw: Draw, inside: st.SearchStrategy[Change], of_rows: bool) -> Change:
    """DoRA over a kind: learned lengths of rows or of columns."""
    inner = draw(inside.filter(lambda c: not c.spec.blocks and "diag" not in c.fields))
    out, (width, *kernel) = inner.spec.row.sizes(inner.spec)
    role = "magnitude" if of_rows else "magnitude_in"
    shape = (out, 1, *(1 for _ in kernel)) if of_rows else (1, width, *(1 for _ in kernel))
    lengths = randn(*shape, seed=draw(SEEDS))
    source = TensorData(role, "F32", shape, lengths.numpy().tobytes())
    name = "dora" if of_rows else "dora-in"
    kind = name if inner.spec.kind == "lowrank" else f"{name}-{inner.spec.kind}"
    spec = replace(inner.spec, kind=kind, fields={**inner.spec.fields, role: source})
    return Change(spec, {**inner.fields, role: lengths}, inner.shape)


@st.composite
def dense(draw: Draw) -> Change:
    """A change stored whole."""
    size = (draw(SIDES), *draw(inner_shapes()))
    return change("full", {"full_delta": size}, draw(SEEDS), 0, size)


@st.composite
def vector(draw: Draw) -> Change:
    """A change of a bias."""
    n = draw(SIDES)
    return change("vector", {"delta": (n,)}, draw(SEEDS), 0, (n,))


@st.composite
def paired(draw: Draw) -> Change:
    """LoRA whose rows lie in pairs, head by head."""
    half, heads, inner, r = (draw(RANKS) for _ in range(4))
    out = 2 * half * heads
    shapes = {"lora_A": (r, inner), "paired_B": (out, r)}
    return change("paired", shapes, draw(SEEDS), r, (out, inner),
                  settings={"head": 2 * half, "inner": inner})  # fmt: skip


@st.composite
def adalora(draw: Draw) -> Change:
    """Numbers between two factors."""
    out, inner, r = draw(SIDES), draw(SIDES), draw(RANKS)
    shapes = {"lora_A": (r, inner), "lora_B": (out, r), "lora_E": (r, 1)}
    return change("adalora", shapes, draw(SEEDS), r, (out, inner))


@st.composite
def delora(draw: Draw) -> Change:
    """Factors of length 1 at a learned strength."""
    out, inner, r = draw(SIDES), draw(SIDES), draw(RANKS)
    shapes = {"delora_A": (r, inner), "delora_B": (out, r), "delora_lambda": (1,),
              "delora_w_norm": (inner,)}  # fmt: skip
    return change("delora", shapes, draw(SEEDS), r, (out, inner))


@st.composite
def gralora(draw: Draw, *, hybrid: bool) -> Change:
    """A grid of small products, perhaps with a LoRA beside it."""
    count, part = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    out, inner, r = count * draw(RANKS), count * draw(RANKS), count * part
    shapes: dict[str, tuple[int, ...]] = {
        "gralora_A": (count, inner // count, r), "gralora_B": (count, r, out // count),
    }  # fmt: skip
    if hybrid:
        more = draw(RANKS)
        shapes |= {"gralora_A_general": (more, inner), "gralora_B_general": (out, more)}
    kind = "gralora_hybrid" if hybrid else "gralora"
    return change(kind, shapes, draw(SEEDS), r, (out, inner))


@st.composite
def miss(draw: Draw) -> Change:
    """Columns that change alike; some rows of them alone."""
    r, inner, stored = draw(RANKS), draw(SIDES), draw(RANKS)
    times = draw(st.integers(1, 3))
    out, short = stored * times, times > 1
    settings = {"inner": inner, "outer": out} | ({"short": 1} if short else {})
    return change("miss", {"miss_block": (r, stored)}, draw(SEEDS), r, (out, inner),
                  settings=settings)  # fmt: skip


@st.composite
def vera(draw: Draw, *, seeded: bool) -> Change:
    """Shared matrices larger than the weight, stored or drawn; PVeRA has twice the middle."""
    out, inner, r = draw(SIDES), draw(SIDES), draw(RANKS)
    wide, tall = inner + draw(st.integers(0, 3)), out + draw(st.integers(0, 3))
    d = r * draw(st.integers(1, 2))
    shapes: dict[str, tuple[int, ...]] = {"lambda_b": (out,), "lambda_d": (d,)}
    settings = {"inner": inner}
    if seeded:
        settings |= {"widest": wide, "tallest": tall, "seed": draw(SEEDS)}
    else:
        shapes |= {"shared_A": (d, wide), "shared_B": (tall, r)}
    kind = "vera_seeded" if seeded else "vera"
    return change(kind, shapes, draw(SEEDS), r, (out, inner), settings=settings)


@st.composite
def bank(draw: Draw) -> Change:
    """Factors mixed from a bank, by logits."""
    v, n, r = draw(RANKS), draw(st.integers(2, 6)), draw(RANKS)
    tall, wide = draw(RANKS), draw(RANKS)
    shapes = {"bank": (n, v), "logits_A": (r, wide, n), "logits_B": (tall, r, n)}
    return change("bank", shapes, draw(SEEDS), r, (tall * v, wide * v),
                  settings={"top": draw(st.integers(1, n))})  # fmt: skip


@st.composite
def bank_top(draw: Draw) -> Change:
    """Factors mixed from a bank, by numbers of vectors."""
    v, n, r = draw(RANKS), draw(st.integers(2, 6)), draw(RANKS)
    tall, wide, top = draw(RANKS), draw(RANKS), draw(st.integers(2, 3))
    shapes = {"bank": (n, v), "indices_A": (r, wide, top), "weights_A": (r, wide, top - 1),
              "indices_B": (tall, r, top), "weights_B": (tall, r, top - 1)}  # fmt: skip
    made = change("bank_top", shapes, draw(SEEDS), r, (tall * v, wide * v))
    for side in "AB":
        made.fields[f"indices_{side}"] = made.fields[f"indices_{side}"].abs().mul(7).long() % n
    return made


def bound(kind: str, shapes: Mapping[str, tuple[int, ...]], drawn: int, size: tuple[int, ...],
          *, rank: int = 0, **settings: float) -> Change:  # fmt: skip
    """A change whose tensors do not tell all of the weight's size, on a weight of ``size``."""
    own = {"out": size[0], "in": int(torch.Size(size[1:]).numel())}
    return change(kind, shapes, drawn, rank, size, settings={**settings, **own})


@st.composite
def gate(draw: Draw, kind: str, role: str) -> Change:
    """IA³: a number for every row or every column."""
    size, axis = (draw(SIDES), draw(SIDES)), draw(st.integers(0, 1))
    shapes = {role: (size[axis],)} | ({"on_input": (1,)} if kind == "ia3_gate" else {})
    return bound(kind, shapes, draw(SEEDS), size, axis=axis)


@st.composite
def rotation(draw: Draw) -> Change:
    """LyCORIS' OFT and BOFT, with and without a bound and gains."""
    b, stages = 2 * draw(st.integers(1, 2)), draw(st.integers(0, 2))
    count, inner = 2 ** max(0, stages - 1) * draw(st.integers(1, 2)), draw(inner_shapes())
    shapes: dict[str, tuple[int, ...]] = {
        "oft_blocks": (*([stages] if stages else []), count, b, b)
    }
    if draw(st.booleans()):
        shapes["oft_rescale"] = (count * b, *(1 for _ in inner))
    made = bound("rotation", shapes, draw(SEEDS), (count * b, *inner))
    return replace(made, spec=replace(made.spec, alpha=draw(st.sampled_from([None, 0.0, 0.1]))))


@st.composite
def glora(draw: Draw) -> Change:
    """GLoRA, of convolutions too."""
    out, (inner, *kernel), r = draw(SIDES), draw(inner_shapes()), draw(RANKS)
    ones = (1,) * len(kernel)
    shapes = {"glora_a1": (inner, r, *ones), "glora_a2": (r, inner, *ones),
              "glora_b1": (out, r, *ones), "glora_b2": (r, inner, *kernel)}  # fmt: skip
    return change("glora", shapes, draw(SEEDS), r, (out, inner, *kernel))


@st.composite
def on_columns(draw: Draw, kind: str) -> Change:
    """What PEFT turns: OFT with and without shared blocks and a sum for the inverse, BOFT, HRA."""
    out, b, count, r = (
        draw(st.integers(2, 9)),
        *(draw(st.integers(2, 3)) for _ in "bn"),
        draw(RANKS),
    )
    size = (out, b * count)
    if kind == "boft":
        stages = 1 if b % 2 or count % 2 else draw(st.integers(1, 2))
        shapes = {"boft_R": (stages, count, b, b), "boft_s": (out, 1)}
        return change("boft", shapes, draw(SEEDS), 0, size)
    if kind == "hra":
        orthogonal = draw(st.integers(0, 1))
        return bound("hra", {"hra_u": (size[1], r)}, draw(SEEDS), size, rank=r,
                     orthogonal=orthogonal)  # fmt: skip
    shared, terms = draw(st.booleans()), draw(st.integers(0, 6))
    shapes = {"oft_R": (1 if shared else count, b * (b - 1) // 2)}
    limit = draw(st.sampled_from([{}, {"bound": 0.1}]))
    return bound("oft", shapes, draw(SEEDS), size, terms=terms, **limit)


@st.composite
def hira(draw: Draw) -> Change:
    """W times a low-rank matrix."""
    out, inner, r = draw(SIDES), draw(SIDES), draw(RANKS)
    return change("hira", {"hira_A": (r, inner), "hira_B": (out, r)}, draw(SEEDS), r, (out, inner))


@st.composite
def tiles(draw: Draw) -> Change:
    """MiSS, bat."""
    r, rows, cols = draw(RANKS), draw(RANKS), draw(RANKS)
    return bound("tiles", {"miss_bat": (rows, r, r)}, draw(SEEDS), (rows * r, cols * r), rank=r)


@st.composite
def road(draw: Draw, is_bias: bool) -> Change:
    """RoAd in its three variants."""
    half, groups, copies = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(
        st.sampled_from([1, 2, 4]))  # fmt: skip
    out = 2 * half * groups
    settings = {"group": 2 * half, "copies": copies}
    roles = ("road_bias", "road_bias_alpha") if is_bias else ("road_theta", "road_alpha")
    shapes = dict.fromkeys(roles, (out // 2 * copies,))
    if is_bias:
        return change("road_bias", shapes, draw(SEEDS), 0, (out,), settings=settings)
    return bound("road", shapes, draw(SEEDS), (out, draw(SIDES)), **settings)


@st.composite
def circulant(draw: Draw) -> Change:
    """C3A."""
    rows, cols, b = (draw(RANKS) for _ in range(3))
    return change(
        "circulant", {"c3a_kernel": (rows, cols, b)}, draw(SEEDS), 0, (rows * b, cols * b)
    )


@st.composite
def fourier(draw: Draw) -> Change:
    """FourierFT."""
    size = (draw(SIDES), draw(SIDES))
    count = draw(st.integers(1, min(12, size[0] * size[1])))
    return bound("fourier", {"fourierft_spectrum": (count,)}, draw(SEEDS), size, seed=draw(SEEDS))


@st.composite
def bases(draw: Draw) -> Change:
    """RandLoRA, on a matrix that may be smaller than the shared ones."""
    size, r, count = (draw(SIDES), draw(SIDES)), draw(RANKS), draw(RANKS)
    wide, tall, more = (draw(st.integers(0, 2)) for _ in range(3))
    shapes = {"randlora_lambda": (r, count), "randlora_gamma": (count, min(size)),
              "randlora_A": (r, 1, min(size) + wide),
              "randlora_B": (max(size) + tall, count + more, r)}  # fmt: skip
    return bound("bases", shapes, draw(SEEDS), size)


@st.composite
def bases_seeded(draw: Draw) -> Change:
    """RandLoRA whose shared matrices are drawn, in the size of the largest of its modules.

    Few numbers might be all alike, whose standard deviation is 0: PEFT has NaN of them too.
    """
    size, r = (draw(SIDES), draw(SIDES)), draw(RANKS)
    count = -(-min(size) // r)
    shapes = {"randlora_lambda": (r, count), "randlora_gamma": (count, min(size))}
    return bound(
        "bases_seeded", shapes, draw(SEEDS), size, seed=draw(SEEDS), sparse=draw(st.integers(0, 1)),
        tallest=size[0] + draw(st.integers(40, 49)), widest=size[1] + draw(st.integers(40, 49)),
    )  # fmt: skip


@st.composite
def sparse(draw: Draw) -> Change:
    """SHiRA: some places of a matrix, perhaps one of them twice."""
    size, n = (draw(SIDES), draw(SIDES)), draw(st.integers(1, 6))
    made = bound("sparse", {"shira_weight": (n,), "shira_indices": (2, n)}, draw(SEEDS), size)
    at = [[draw(st.integers(0, side - 1)) for _ in range(n)] for side in size]
    return replace(made, fields={**made.fields, "shira_indices": torch.tensor(at).int()})


SPECS: dict[str, st.SearchStrategy[Change]] = {
    "ia3_gate": gate("ia3_gate", "ia3_gate"), "rotation": rotation(), "glora": glora(),
    "ia3": gate("ia3", "ia3_l"), "hira": hira(), "tiles": tiles(), "road": road(False),
    "road_bias": road(True), "circulant": circulant(), "fourier": fourier(), "bases": bases(),
    "bases_seeded": bases_seeded(),
    "sparse": sparse(), **{kind: on_columns(kind) for kind in ("oft", "boft", "hra")},
    "ia3_bias": SIDES.flatmap(
        lambda n: SEEDS.map(lambda seed: change("ia3_bias", {"ia3_bias": (n, 1)}, seed, 0, (n,)))
    ),
    "lowrank": low_rank(), "hadamard": hadamard(), "kronecker": kronecker(), "vector": vector(),
    "full": dense(), "dora": with_lengths(low_rank(), True),
    "dora-hadamard": with_lengths(hadamard(), True),
    "dora-kronecker": with_lengths(kronecker(), True), "dora-in": with_lengths(low_rank(), False),
    "dora-in-hadamard": with_lengths(hadamard(), False),
    "dora-in-kronecker": with_lengths(kronecker(), False),
    "adalora": adalora(), "paired": paired(), "delora": delora(), "gralora": gralora(hybrid=False),
    "gralora_hybrid": gralora(hybrid=True), "miss": miss(), "vera": vera(seeded=False),
    "vera_seeded": vera(seeded=True), "bank": bank(), "bank_top": bank_top(),
}  # fmt: skip
"""Kind -> random changes of it."""

# --------------------------------------------------------------------------------- codecs


@st.composite
def fp8(draw: Draw) -> CodedFile:
    """Factors per block (the last ones ragged), per row, per tensor or none; also stacks."""
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    stack = draw(st.lists(st.integers(1, 3), max_size=1))
    rows, cols = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    seed = draw(SEEDS)
    dtype = draw(st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]))
    raw = torch.randint(0, 256, (*stack, rows, cols), generator=generator(seed)).to(torch.uint8)
    codes = raw.view(dtype)
    codes = torch.where(codes.float().isfinite(), codes.float(), 1.0).to(dtype)
    grid = {"blocks": (*stack, -(-rows // height), -(-cols // width)), "tensor": ()}
    if not stack:
        grid |= {"rows": (rows, 1), "none": (0,)}
    how = draw(st.sampled_from(sorted(grid)))
    tensors = {"a.weight": codes, "norm.weight": torch.ones(3)}
    scale = torch.exp2(randn(1, *grid[how], seed=seed + 1))[0]
    scale_type = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e8m0fnu]))
    if how != "none":
        tensors["a.weight_scale_inv"] = scale.to(scale_type)
    stated = {"quant_method": "fp8", "weight_block_size": [height, width]}
    return CodedFile(tensors, {"model_type": "test", "quantization_config": stated})


_FEW = st.integers(1, 3)

CODED: dict[str, st.SearchStrategy[CodedFile]] = {
    "fp8": fp8(),
    "int8": st.one_of(
        st.builds(coded.int8, SIDES, SIDES, seed=SEEDS),
        st.builds(coded.int8_channels, SIDES, SIDES, seed=SEEDS),
    ),
    "bnb4": st.builds(
        coded.bnb4, st.lists(SIDES, min_size=1, max_size=2), size=st.sampled_from([4, 16, 64]),
        seed=SEEDS, kind=st.sampled_from(["nf4", "fp4"]), nested=st.integers(0, 4),
    ),
    "mxfp4": st.builds(
        coded.mxfp4, st.lists(_FEW, min_size=1, max_size=1), SIDES, _FEW, seed=SEEDS
    ),
    "gptq": st.builds(
        coded.gptq, _FEW, st.integers(1, 5).map(lambda n: 8 * n),
        bits=st.sampled_from([2, 3, 4, 8]), size=st.sampled_from([7, 16, 32, 96]), seed=SEEDS,
        ordered=st.booleans(), version=st.integers(1, 2),
    ),
    "awq": st.builds(coded.awq, _FEW, st.sampled_from([5, 16]), _FEW, seed=SEEDS),
    "packed": st.builds(
        coded.packed, SIDES, SIDES.map(lambda n: 8 * n), bits=st.integers(2, 8),
        size=st.sampled_from([8, 16]), seed=SEEDS, zeros=st.booleans(), ordered=st.booleans(),
    ),
    "nvfp4": st.builds(coded.nvfp4, SIDES, _FEW, seed=SEEDS, modelopt=st.booleans()),
    "gguf": st.builds(
        coded.gguf, SIDES, _FEW, kind=st.sampled_from(coded.GGUF_KINDS),
        seed=SEEDS, heads=st.integers(0, 2),
    ),
    "mlx": st.builds(
        coded.mlx, SIDES, _FEW, bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
        size=st.sampled_from([8, 16, 32]), seed=SEEDS,
        dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    ),
}  # fmt: skip
"""Codec -> random checkpoints that it reads."""
