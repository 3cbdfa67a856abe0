"""Look into an adapter: headers only, no torch.   python examples/01_inspect.py"""

from pathlib import Path

import loratool as lt

adapter = Path(__file__).parent / "minilm-sentiment-lora"

report = lt.inspect(adapter)
found = report.adapter
print(
    f"{found.method}, rank {sorted(found.ranks)}, {found.modules} modules, for {found.base_model}"
)
for family in found.families:
    print(f"  {family.name:8} {family.modules:3} modules in layers {family.layers}")
for program in found.loads:
    print(f"  {program.program}: {program.verdict} {', '.join(program.reasons)}")

# The tensors are one step further; this imports torch.
strongest = max(lt.open(adapter), key=lambda module: module.norm())
print(f"strongest change: {strongest.name}, ‖ΔW‖ = {strongest.norm():.3f}")
