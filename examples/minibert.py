"""A BERT sentence encoder in plain torch: the demo then needs no transformers.

Holds what all-MiniLM-L6-v2 uses and nothing else: WordPiece, six post-norm layers, mean
pooling.  Agrees with `transformers` to 1e-6 on its embeddings (tests/cli/test_examples.py).
"""

from __future__ import annotations

import json
import string
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import embedding, gelu, layer_norm, linear, normalize, softmax


class WordPiece:
    """The uncased BERT tokenizer, read from ``vocab.txt``."""

    def __init__(self, vocab_path: Path) -> None:
        words = vocab_path.read_text(encoding="utf-8").splitlines()
        self.ids = {word: number for number, word in enumerate(words)}

    def encode(self, text: str) -> list[int]:
        """Token ids with [CLS] and [SEP]."""
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
        plain = "".join(f" {c} " if _is_mark(c) else c for c in plain)
        pieces = ["[CLS]", *(p for word in plain.split() for p in self._pieces(word)), "[SEP]"]
        return [self.ids[piece] for piece in pieces]

    def _pieces(self, word: str) -> list[str]:
        found: list[str] = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = word[start:end] if start == 0 else "##" + word[start:end]
                if piece in self.ids:
                    found.append(piece)
                    start = end
                    break
            else:
                return ["[UNK]"]
        return found


def _is_mark(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


class MiniBert:
    """A BERT checkpoint folder as a function from sentences to unit vectors.

    Args:
        folder: holds config.json, vocab.txt and model.safetensors.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text())
        self.words = WordPiece(folder / "vocab.txt")
        self.weights = load_file(folder / "model.safetensors")

    def embed(self, sentences: Sequence[str]) -> torch.Tensor:
        """Unit-length sentence vectors, (len(sentences), hidden)."""
        rows = [self.words.encode(s) for s in sentences]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows])
        hidden = self._layers(self._embeddings(ids), mask)
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return normalize(pooled, dim=-1)

    def _embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        w, e = self.weights, "embeddings."
        positions = w[e + "position_embeddings.weight"][: ids.shape[1]]
        segment = w[e + "token_type_embeddings.weight"][0]
        tokens = embedding(ids, w[e + "word_embeddings.weight"])
        return self._norm(tokens + positions + segment, e + "LayerNorm")

    def _layers(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden_from = (1.0 - mask)[:, None, None, :] * -1e9  # padding gets no attention
        for number in range(self.config["num_hidden_layers"]):
            p = f"encoder.layer.{number}."
            x = self._norm(x + self._attention(x, hidden_from, p + "attention."),
                           p + "attention.output.LayerNorm")  # fmt: skip
            inner = gelu(self._linear(x, p + "intermediate.dense"))
            x = self._norm(x + self._linear(inner, p + "output.dense"), p + "output.LayerNorm")
        return x

    def _attention(self, x: torch.Tensor, hidden_from: torch.Tensor, p: str) -> torch.Tensor:
        heads = self.config["num_attention_heads"]
        q, k, v = (
            self._linear(x, f"{p}self.{n}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + hidden_from
        mixed = (softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(-2)
        return self._linear(mixed, p + "output.dense")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale, shift = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return layer_norm(x, x.shape[-1:], scale, shift, self.config["layer_norm_eps"])
