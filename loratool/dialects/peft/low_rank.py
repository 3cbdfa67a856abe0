"""The methods of PEFT whose changes are products of thin matrices, whatever the base."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapter import DeltaSpec
from loratool.dialects.peft.based import miss_bat
from loratool.dialects.peft.method import SEEDED, Method, Module, pruned, spelled
from loratool.kinds_peft import SEED, SHORT, TOP

_INITS = ("true", "false", "mini")


def adalora(module: Module) -> Sequence[DeltaSpec]:
    """α / (init_r + 1e-5), also of a rank that was pruned; a rank of nothing is no change."""
    if pruned(module):
        return ()
    alpha, first = module.own.number("lora_alpha", 8), module.own.count("init_r", 12)
    scaling = (alpha if alpha > 0 else first) / (first + 1e-5)
    return (module.spec("adalora", module.axis("lora_A", 0), alpha=alpha, scaling=scaling),)


def delora(module: Module) -> Sequence[DeltaSpec]:
    """The strength is a tensor."""
    return (module.spec("delora", module.axis("delora_A", 0)),)


def gralora(module: Module) -> Sequence[DeltaSpec]:
    """α / (r + hybrid_r)."""
    kind = "gralora_hybrid" if "gralora_A_general" in module.fields else "gralora"
    rank, alpha = module.axis("gralora_A", 2), module.own.number("alpha", 64)
    both = rank + (module.axis("gralora_A_general", 0) if kind == "gralora_hybrid" else 0)
    return (module.spec(kind, rank, alpha=alpha, scaling=alpha / both),)


def miss(module: Module) -> Sequence[DeltaSpec]:
    """The block of a module, or of some of its rows (``mini``)."""
    init = str(module.own.config.get("init_weights", True)).lower()
    if init == "bat":
        return miss_bat(module)
    if init not in _INITS:
        module.own.refuse("init_weights", "true, false, mini or bat", init)
    settings = {SHORT: 1} if init == "mini" else {}
    return (module.spec("miss", module.axis("miss_block", 0), settings=settings),)


def vera(module: Module) -> Sequence[DeltaSpec]:
    """With the shared matrices, or with the seed that they are drawn from."""
    if {"shared_A", "shared_B"} <= module.fields.keys():
        return (module.spec("vera", module.axis("shared_B", 1)),)
    seed = module.shared_seed("vera_A and vera_B")
    length = module.axis("lambda_d", 0)
    rank = module.own.count("r", 256)
    if length not in (rank, 2 * rank) or len(module.fields["lambda_d"].shape) != 1:
        module.refuse("LT-363", "the tensors of a module do not fit each other", f"r = {rank}")
    return (module.spec("vera_seeded", rank, settings={SEED: seed}),)


def vblora(module: Module) -> Sequence[DeltaSpec]:
    """Logits of all vectors, or numbers and weights of those that are mixed."""
    top = module.own.count("topk", 2)
    is_short = "indices_A" in module.fields
    parts = ("indices", "weights") if is_short else ("logits",)
    rank, last = module.axis(f"{parts[0]}_A", 0), module.axis("bank", 0)
    size = module.axis("bank", 1)
    for name in parts:
        wide = {"indices": top, "weights": top - 1, "logits": last}[name]
        one, two = (module.axis(f"{name}_{side}", 2) for side in "AB")
        if (one, two, module.axis(f"{name}_B", 1)) != (wide, wide, rank) or not size:
            module.refuse("LT-363", "the tensors of a module do not fit each other",
                          f"{wide} numbers for each vector of a factor")  # fmt: skip
    if top > last:
        module.own.refuse("topk", f"at most {last}, the vectors of the bank", top)
    kind = "bank_top" if is_short else "bank"
    return (module.spec(kind, rank, settings={} if is_short else {TOP: top}),)


_VB = {f"vblora_logits_{side}": f"logits_{side}" for side in "AB"}
_VB |= {f"vblora_logits_{s}_topk_{part}": f"{part}_{s}" for s in "AB"
        for part in ("indices", "weights")}  # fmt: skip

ROWS: tuple[Method, ...] = (
    Method("ADALORA", adalora, spelled("lora_A", "lora_B", "lora_E"),
           own=("rank_pattern", "init_r", "lora_alpha"), alpha="lora_alpha",
           silent=("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
                   "total_step")),
    Method("DELORA", delora, spelled("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
           silent=("delora_lambda", "lambda_pattern")),
    Method("GRALORA", gralora,
           spelled("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
           own=("alpha",), alpha="alpha", silent=("gralora_dropout", "gralora_k", "hybrid_r")),
    Method("MISS", miss, spelled("miss_block"), own=("init_weights",),
           silent=("mini_r", "miss_dropout")),
    Method("VERA", vera, {"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"},
           {"vera_A": "shared_A", "vera_B": "shared_B"}, own=SEEDED,
           silent=("vera_dropout", "d_initial")),
    Method("PVERA", vera, {"pvera_lambda_b": "lambda_b", "pvera_lambda_d": "lambda_d"},
           {"pvera_A": "shared_A", "pvera_B": "shared_B"}, own=SEEDED,
           silent=("pvera_dropout", "d_initial", "sample_at_inference", "generator_seed")),
    Method("VBLORA", vblora, _VB, {"vblora_vector_bank": "bank"}, own=("topk",),
           silent=("num_vectors", "vector_length", "save_only_topk_weights", "vblora_dropout",
                   "init_vector_bank_bound", "init_logits_std")),
)  # fmt: skip
