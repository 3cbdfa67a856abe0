"""Figures of the ideas: every number in them is computed by loratool, in the scene of the pages."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import loratool as lt
from docs.make import svg
from docs.make.runs import Stage
from loratool.linalg.noise import Grid, simulate_noise

MODULE = "model.layers.0.self_attn.q_proj.weight"


def drawn(stage: Stage) -> dict[str, str]:
    """Name -> figure."""
    found = {}
    for name, draw in FIGURES.items():
        with stage.fresh():
            found[name] = draw()
    return found


def _delta(path: str) -> torch.Tensor:
    """ΔW of one module of an adapter."""
    delta: torch.Tensor = next(m for m in lt.open(path) if m.name == MODULE).delta()
    return delta.double()


# ------------------------------------------------------------------------ what a merge loses


def rounding() -> str:
    """Loss against the size of the change, for three types."""
    weights = [10**e for e in (-3, -2.6, -2.2, -1.8, -1.4, -1, -0.6, -0.2, 0.2)]
    parts, left, top, wide, high = [], 70, 20, 470, 220

    def at(rho: float, loss: float) -> tuple[float, float]:
        return left + wide * (math.log10(rho) + 4) / 3.4, top + high * (1 - loss)

    for share in (0, 0.25, 0.5, 0.75, 1):
        y = at(1, share)[1]
        parts += [
            svg.line(left, y, left + wide, y, width=0.5),
            svg.text(left - 8, y + 4, f"{share:.0%}", anchor="end"),
        ]
    for power in (-4, -3, -2, -1):
        parts.append(svg.text(at(10**power, 0)[0], top + high + 18, f"{10**power:g}"))
    places = {"bfloat16": 0.62, "float16": 0.5, "float32": 0.06}
    for dtype, colour in zip(places, (svg.ORANGE, svg.BLUE, svg.GREEN), strict=True):
        totals = [
            lt.merge([f"style:{w:.6f}"], base="model", output=f"{dtype}-{w}", dtype=dtype).total
            for w in weights
        ]
        points = [at(t.rho, t.loss) for t in totals]
        parts += [svg.path(points, colour), svg.dots(points, colour)]
        x, y = min(points, key=lambda p: abs((top + high - p[1]) / high - places[dtype]))
        parts.append(svg.text(x + 10, y - 8, dtype, anchor="start"))
    parts += [svg.text(left + wide / 2, top + high + 38, "size of the change, ρ = ‖ΔW‖ / ‖W‖"),
              svg.text(left, 12, "lost of the change", anchor="start")]  # fmt: skip
    return svg.picture(560, 285, parts, "What one merge loses of a change of size ρ, by the type "
                       "of the weights: style at nine weights into the demo's model")  # fmt: skip


# ------------------------------------------------------------------- why factors don't add


def factors() -> str:
    """A corner of the true sum, of the sum of factors, and of what is wrong with it."""
    lt.combine(["style", "sql"], output="true")
    lt.combine(["style", "sql"], output="wrong", method="factors-linear")
    true, wrong = _delta("true"), _delta("wrong")
    ratio = float((wrong - true).norm() / true.norm())
    cell, cut = 9, slice(0, 18)
    top = float(true[cut, cut].abs().max())
    parts = []
    for i, (words, values) in enumerate((
        ("ΔW₁ + ΔW₂", true), ("from (B₁+B₂)(A₁+A₂)", wrong), ("difference", wrong - true),
    )):  # fmt: skip
        x = 10 + i * 185
        parts += [svg.heat(x, 30, cell, values[cut, cut].tolist(), top),
                  svg.text(x + 81, 20, words)]  # fmt: skip
    return svg.picture(560, 200, parts, "A corner of one module: the sum of two adapters, what "
                       "adding their factors gives, and the difference, "
                       f"{ratio:.0%} as large as the sum")  # fmt: skip


# --------------------------------------------------------------------- what a noise rank is


def noise() -> str:
    """Singular values of a difference, and how large those of rounding noise alone are."""
    auto = next(m for m in lt.extract("my-sft", base="model", output="auto").modules
                if m.name == MODULE)  # fmt: skip
    largest = _floor("my-sft", "model")
    lt.extract("my-sft", base="model", rank=64, output="full")
    spectrum = lt.inspect("full", spectrum=True).spectrum
    sigma = next(m.sigma for m in spectrum.modules if m.name == MODULE)
    left, top, wide, high = 60, 15, 480, 210
    low = math.log10(min(s for s in sigma if s > 0)) - 0.1

    def at(i: int, value: float) -> tuple[float, float]:
        share = (math.log10(value) - low) / (0.1 - low)
        return left + wide * (i + 0.5) / len(sigma), top + high * (1 - share)

    points = [at(i, s) for i, s in enumerate(sigma) if s > 0]
    rank, floor = auto.noise_rank, at(0, largest)[1]
    parts = [
        svg.dots(points[:rank], svg.ORANGE, 4),
        svg.dots(points[rank:], svg.GREY, 3),
        svg.line(left, floor, left + wide, floor, svg.BLUE, 1.5, "5 4"),
        svg.text(left + wide, floor - 8, "largest value of simulated rounding noise", anchor="end"),
        svg.text(
            at(rank, 1)[0] + 4,
            at(0, sigma[0])[1] + 4,
            f"{rank} directions stand out: --rank auto",
            anchor="start",
        ),
        svg.text(left + wide / 2, top + high + 26, "singular values of my-sft − model, in order"),
    ]
    for power in range(math.ceil(low), 1):
        y = at(0, 10**power)[1]
        parts += [svg.line(left - 4, y, left, y), svg.text(left - 8, y + 4, f"{10.0**power:g}",
                                                           anchor="end")]  # fmt: skip
    return svg.picture(
        560,
        255,
        parts,
        f"The spectrum of one matrix of the demo's fine-tune: {rank} "
        "values are the training, the other ones are what storing it in bfloat16 left",
    )


def _floor(tuned: str, base: str) -> float:
    """Largest singular value of the rounding noise that storing a matrix leaves, simulated."""
    after, before = ({k: v for f in Path(folder).glob("*.safetensors") for k, v in
                      load_file(f).items()}[MODULE] for folder in (tuned, base))  # fmt: skip
    grid = Grid(after.shape, after.dtype, after.device)
    grid.take(after, 0, 0)
    square = float((after.double() - before.double()).square().sum())
    (floor,) = simulate_noise(grid.exponents[None], [grid.significand_bits],
                              delta_squares=[square], seeds=[0])  # fmt: skip
    return floor.top


# ------------------------------------------------------------------------------------- TIES


def ties(count: int = 9, density: float = 0.4) -> str:
    """Three adapters at nine elements: as they are, trimmed, elected, merged."""
    names = ["style", "sql", "c"]
    lt.combine(names, output="merged-by-ties", method="ties", params={"density": density}, rank=64)
    values = torch.stack([_delta(n) for n in names])
    least = [v.abs().flatten().topk(round(density * v.numel())).values[-1] for v in values]
    kept = torch.stack([v * (v.abs() >= low) for v, low in zip(values, least, strict=True)])
    sign = kept.sum(0).sign()
    agree = kept * ((kept * sign) > 0)
    mean = agree.sum(0) / (agree != 0).sum(0).clamp_min(1)
    merged = _delta("merged-by-ties")
    assert (merged - mean).norm() < 1e-3 * mean.norm(), "not what loratool does"
    votes, left = (kept != 0).sum(0).flatten(), kept.sign().sum(0).abs().flatten()
    # of every sort some: nobody stays, one, two that agree, two that do not, three that do not
    sorts = [(0, 0), (1, 1), (1, 1), (2, 2), (2, 0), (2, 0), (3, 1), (3, 1), (3, 3)][:count]
    places = torch.stack([((votes == v) & (left == s)).nonzero()[7 * i, 0]
                          for i, (v, s) in enumerate(sorts)])  # fmt: skip
    stages = [("three adapters", values), ("trim the small", kept),
              ("elect a sign, keep who agrees", agree), ("mean", merged[None])]  # fmt: skip
    top, parts = float(values.flatten(1)[:, places].abs().max()), []
    for row, (words, found) in enumerate(stages):
        y = 50 + row * 82
        parts += [svg.text(8, y + 4, words, anchor="start"), svg.line(190, y, 550, y, width=0.7)]
        for at, place in enumerate(places.tolist()):
            for i, one in enumerate(found.flatten(1)[:, place].tolist()):
                height = abs(one) / top * 34
                colour = (svg.BLUE, svg.ORANGE, svg.GREEN)[i] if len(found) > 1 else svg.GREY
                x = 196 + at * 40 + (i * 9 if len(found) > 1 else 6)
                parts.append(svg.rect(x, y - height if one > 0 else y, 8 if len(found) > 1 else 14,
                                      height, colour))  # fmt: skip
    return svg.picture(560, 345, parts, f"TIES at {count} elements of one module, at density "
                       f"{density}: style blue, sql orange, c green, the result grey")  # fmt: skip


FIGURES: dict[str, Callable[[], str]] = {
    "rounding": rounding, "factors": factors, "noise": noise, "ties": ties,
}  # fmt: skip
"""Name -> what draws it."""
