"""What does machine code hold? Registers, spills, widths of accesses: read with the tools of Triton's wheel."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from misa_kernels.memory.storage import Storage

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES = (80, 90, 100)
ACCESS_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


@dataclass(frozen=True)
class Variant:
    """One compilation of `step_kernel`, or one kernel of csrc/adamw_cuda.cu.

    Attributes:
        weight: Dtype of the weights.
        grad: Dtype of the gradients.
        master: Whether there is a float32 master; without one, bfloat16 is rounded stochastically or split.
        aligned: Whether the host guarantees 16-byte pointers and sizes divisible by 4.
        launch: "update", "norm", or "clipped": the update that a norm launch came before.
        scaler: Whether gradients are unscaled and steps skipped for `GradScaler`; the CUDA library decides at run time.
        state_dtype: How m and v are stored.
        split: Whether the lower halves of bfloat16 weights are kept.
        pitched: Whether the weights are in lines with gaps between them.
        compiler: "triton" or "nvcc".
    """

    weight: torch.dtype
    grad: torch.dtype
    master: bool
    aligned: bool = True
    launch: str = "update"
    scaler: bool = False
    state_dtype: str = "fp32"
    split: bool = False
    pitched: bool = False
    compiler: str = "triton"

    @property
    def storage(self) -> Storage:
        """What the state is made of."""
        return Storage(self.state_dtype, "master" if self.master else "split" if self.split else "stochastic")

    def __str__(self) -> str:
        """Name it as a row of the table."""
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        kind = self.storage.param_precision if self.weight.itemsize == 2 else ""
        state = "" if self.state_dtype == "fp32" else self.state_dtype
        named = {"pitched": self.pitched, "unaligned": not self.aligned, "scaler": self.scaler}
        flags = (kind, state, *(name for name, given in named.items() if given))
        compiler = "cuda" if self.compiler == "nvcc" else ""
        return " ".join(filter(None, (compiler, self.launch, short[self.weight], short[self.grad], *flags)))

    @property
    def bytes_per_element(self) -> float:
        """Bytes that must move for each element of a step after the first."""
        if self.launch == "norm":
            return self.grad.itemsize
        # Gradient read, state read and written; the weight written, and read unless the master is.
        buffers = self.storage.buffers(self.weight).values()
        state = sum(2 * buffer.dtype.itemsize * buffer.entries / buffer.elements for buffer in buffers)
        return self.grad.itemsize + state + self.weight.itemsize * (1 if self.master else 2)


@dataclass(frozen=True)
class Code:
    """What was compiled.

    Attributes:
        variant: Of what.
        capability: 90 for sm_90.
        registers: A thread.
        stack: Bytes a thread.
        spills: Instructions that move registers to or from local memory.
        shared: Bytes of shared memory that were asked for.
        shared_accesses: Loads and stores of shared memory.
        loads: Global loads of the loop over elements, by width in bits. Of a norm launch, whose loop is
            unrolled, all but those of the final sum.
        stores: Global stores there.
        instructions: Instructions there for each element, the calls of slow paths included.
    """

    variant: Variant
    capability: int
    registers: int
    stack: int
    spills: int
    shared: int
    shared_accesses: int
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: float


def read(variant: Variant, capability: int, usage: str, assembly: str, body: Sequence[str], repeated: float) -> Code:
    """Return what the tools' output says of one kernel.

    Args:
        variant: What it is.
        capability: Of the GPU.
        usage: Its lines of `cuobjdump -res-usage`.
        assembly: Its lines of `nvdisasm -c`.
        body: Opcodes of its loop over elements.
        repeated: How often an element takes each of them.
    """
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert found is not None, usage
    opcodes = [opcode for _, opcode in instruction_lines(assembly)]
    return Code(
        variant,
        capability,
        registers=int(found[1]),
        stack=int(found[2]),
        spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        shared=int(found[3]),
        shared_accesses=sum(opcode.startswith(("LDS", "STS")) for opcode in opcodes),
        loads=widths(body, "LDG"),
        stores=widths(body, "STG"),
        instructions=len(body) * repeated,
    )


def tool(name: str, *arguments: Any) -> str:
    """Return what one of the tools in Triton's wheel prints."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def instruction_lines(assembly: str) -> list[tuple[int, str]]:
    """Return (line, opcode) of every instruction, predicates dropped."""
    pattern = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    matches = ((i, pattern.match(line)) for i, line in enumerate(assembly.splitlines()))
    return [(i, match[1]) for i, match in matches if match]


def loop(assembly: str, bits: int | None = None) -> list[str]:
    """Return the opcodes of the loop over elements: of the backward branches, the span with most of the loads.

    Args:
        assembly: Lines of `nvdisasm -c`.
        bits: Loads of this width only, if not None.
    """

    def counts(opcode: str) -> bool:
        # A strong load reads what other programs wrote, which is no element.
        return opcode.startswith("LDG") and "STRONG" not in opcode and (bits is None or str(bits) in opcode.split("."))

    lines = assembly.splitlines()
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    instructions = instruction_lines(assembly)
    spans = []
    for i, opcode in instructions:
        target = re.search(r"\((\.L_x_\d+)\)", lines[i])
        if opcode.startswith("BRA") and target and labels[target[1]] < i:
            spans.append([code for j, code in instructions if labels[target[1]] <= j <= i])
    return max(spans, key=lambda span: (sum(map(counts, span)), -len(span)))


def widths(opcodes: Sequence[str], kind: str) -> dict[int, int]:
    """Return how many accesses of one kind there are, by width in bits."""
    found = Counter(
        next((ACCESS_BITS[part] for part in opcode.split(".") if part in ACCESS_BITS), 32)
        for opcode in opcodes
        if opcode.startswith(kind)
    )
    return dict(sorted(found.items()))


def row(code: Code) -> str:
    """Return one line of the table."""
    loads, stores = (" ".join(f"{n}x{bits}" for bits, n in found.items()) for found in (code.loads, code.stores))
    return (
        f"sm_{code.capability:<4} {code.variant!s:48} {code.registers:4} {code.spills:6} {code.stack:5} "
        f"{code.shared_accesses:6}  {loads:24} {stores:24} {code.instructions:6.1f} "
        f"{code.variant.bytes_per_element:6.2f}"
    )
