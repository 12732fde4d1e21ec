"""How do memory and traffic grow with model and GPUs? Writes docs/scaling.md from the planner's formulas.

From the repository's root: `python docs/scaling.py`. `tests/tools/test_planner.py` holds the page to the formulas, and
the formulas to bytes counted in small runs.
"""

from __future__ import annotations

from pathlib import Path

from misa_kernels.tools.planner.fsdp import Need, adamw_fsdp2, lora_fsdp2, misa_fsdp2, misa_replicate
from misa_kernels.tools.planner.shapes import PRESETS, LlamaShape

PAGE = Path(__file__).parent / "scaling.md"
MODELS = ("llama3-8b", "llama3-70b", "llama3-405b")
GPUS = (1, 8, 64, 1024)
DELTA = 0.03
GB = 1e9

HEAD = f"""# Memory and traffic on many GPUs, on paper

```
python docs/scaling.py
```

writes this page from the formulas of `misa_kernels/tools/planner/fsdp.py`. Nothing on it was measured on GPUs: what
`tests/tools/test_planner.py` checks is that the formulas give the bytes which small runs of gloo processes on CPUs hold
and send, for AdamW and MISA with FSDP2 and for MISA's replicas. *Whole units* and LoRA are formulas alone.

Gigabytes (1e9 bytes) on one GPU, activations left out: weights, gradients at the end of backward, moments and masters,
and the whole units that FSDP2 holds at the same time (two layers, embedding and head, one layer's gradients). *Sent* is
what one GPU sends in a step by ring collectives. LoRA has rank 16 on all matrices, MISA δ = {DELTA} and float32
masters. Half depth: a window of layers from which backward returns half-way, and so gathers half as much again.

With replicas nothing but the gradients of the active set travels: δ of what DistributedDataParallel sends. FSDP2
gathers every layer's weights whatever is trained; where a model fits on one GPU, `replicate` is the one to take.
"""

METHODS = (
    ("AdamW, FSDP2", lambda shape, ranks: adamw_fsdp2(shape, ranks)),
    ("LoRA, FSDP2", lambda shape, ranks: lora_fsdp2(shape, ranks)),
    ("MISA, FSDP2", lambda shape, ranks: misa_fsdp2(shape, ranks, DELTA)),
    ("MISA, FSDP2, half depth", lambda shape, ranks: misa_fsdp2(shape, ranks, DELTA, shape.layers // 2)),
    ("MISA, replicate", lambda shape, ranks: misa_replicate(shape, ranks, DELTA)),
)


def row(name: str, ranks: int, need: Need) -> str:
    """Return a line of the table."""
    parts = (need.weights, need.gradients, need.states, need.gathered, need.resident, need.sent)
    return f"| {name} | {ranks} | " + " | ".join(f"{part / GB:,.2f}" for part in parts) + " |"


def table(shape: LlamaShape) -> list[str]:
    """Return the lines of a shape's table."""
    lines = [
        "| method | GPUs | weights | gradients | states | FSDP2's whole units | together | sent in a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return lines + [row(name, ranks, need(shape, ranks)) for name, need in METHODS for ranks in GPUS]


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for name in MODELS:
        shape = PRESETS[name]
        parts.append(f"## {name}, {shape.numel / 1e9:.2f} billion parameters\n\n" + "\n".join(table(shape)) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(page())
