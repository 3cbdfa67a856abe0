"""The example task: sentences that feel alike should have vectors that point alike."""

from __future__ import annotations

import random
from pathlib import Path

import torch

HERE = Path(__file__).parent


def read_sentences(split: str) -> tuple[list[str], torch.Tensor]:
    """Sentences of ``train`` or ``test`` and their labels (1 good, 0 bad)."""
    lines = (HERE / "data" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    labels, sentences = zip(*(line.split("\t") for line in lines), strict=True)
    return list(sentences), torch.tensor([int(label) for label in labels])


def batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """``steps`` batches of row numbers, each pass over the data in a new order."""
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * size:
        order += rng.sample(range(count), count)
    return [order[i * size : (i + 1) * size] for i in range(steps)]


def pair_loss(vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean square of cosine minus target: +1 for two sentences of one label, -1 otherwise."""
    target = (labels[:, None] == labels[None]).to(vectors.dtype) * 2 - 1
    return ((vectors @ vectors.T - target) ** 2).mean()


def centroid_accuracy(train: torch.Tensor, test: torch.Tensor) -> float:
    """Share of test vectors that lie nearest to the mean training vector of their label."""
    _, train_labels = read_sentences("train")
    _, test_labels = read_sentences("test")
    means = torch.stack([train[train_labels == label].mean(0) for label in (0, 1)])
    means = torch.nn.functional.normalize(means, dim=-1)
    return float(((test @ means.T).argmax(1) == test_labels).float().mean())
