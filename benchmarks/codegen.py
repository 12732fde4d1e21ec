"""What machine code does Triton make of the step? Compiled for several GPUs on any machine, without one.

python -m benchmarks.codegen    a table: registers, spills, access widths, instructions and bytes an element
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from misa_kernels.codec import FORMATS
from misa_kernels.kernels import launch
from misa_kernels.storage import KEYS, PRECISIONS, Storage

CAPABILITIES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What `step_kernel` is given; the pointers that a variant has no use for are None there.
ARGUMENTS = {
    "program_ptr": "*i32",
    "row_ptr": "*i64",
    "hyper_ptr": "*fp64",
    "age_ptr": "*i32",
    "sq_sum_ptr": "*fp64",
    "partial_ptr": "*fp64",
    "arrived_ptr": "*i32",
    "control_ptr": "*fp32",
    "grad_scale_ptr": "*fp32",
    "found_inf_ptr": "*fp32",
    "first_program": "i32",
    "programs": "i32",
    "max_grad_norm": "fp32",
    "skip_nonfinite": "i32",
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8"}
# What the launcher passes for it.
POINTERS[torch.float8_e4m3fn] = POINTERS[torch.uint8]
ACCESS_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


@dataclass(frozen=True)
class Variant:
    """One compilation of `step_kernel`.

    Attributes:
        weight: Dtype of the weights.
        grad: Dtype of the gradients.
        master: Whether there is a float32 master; without one, bfloat16 is rounded stochastically or split.
        aligned: Whether the host guarantees 16-byte pointers and sizes divisible by 4.
        launch: "update", "norm", or "clipped": the update that a norm launch came before.
        scaler: Whether gradients are unscaled and steps skipped for `GradScaler`.
        state_dtype: How m and v are stored.
        split: Whether the lower halves of bfloat16 weights are kept.
    """

    weight: torch.dtype
    grad: torch.dtype
    master: bool
    aligned: bool = True
    launch: str = "update"
    scaler: bool = False
    state_dtype: str = "fp32"
    split: bool = False

    @property
    def storage(self) -> Storage:
        """What the state is made of."""
        return Storage(self.state_dtype, "master" if self.master else "split" if self.split else "stochastic")

    def __str__(self) -> str:
        """Name it as a row of the table."""
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        kind = self.storage.param_precision if self.weight.itemsize == 2 else ""
        state = "" if self.state_dtype == "fp32" else self.state_dtype
        flags = (kind, state, "" if self.aligned else "unaligned", "scaler" if self.scaler else "")
        return " ".join(filter(None, (self.launch, short[self.weight], short[self.grad], *flags)))

    @property
    def bytes_per_element(self) -> float:
        """Bytes that must move for each element of a step after the first."""
        if self.launch == "norm":
            return self.grad.itemsize
        # Gradient read, state read and written; the weight written, and read unless the master is.
        buffers = self.storage.buffers(self.weight).values()
        state = sum(2 * buffer.dtype.itemsize * buffer.entries / buffer.elements for buffer in buffers)
        return self.grad.itemsize + state + self.weight.itemsize * (1 if self.master else 2)


def variants() -> list[Variant]:
    """Return every variant that a run may compile, those of all param precisions and scaler settings together."""
    dtypes = [
        (torch.float32, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.float16, torch.float16, True),
        (torch.float16, torch.float32, True),
    ]
    return [
        Variant(*dtype, aligned, kind, scaler)
        for scaler in (False, True)
        for aligned in (True, False)
        for kind in ("update", "norm", "clipped")
        for dtype in dtypes
        # A norm launch reads gradients alone.
        if kind != "norm" or dtype in dtypes[0::2]
    ] + [
        replace(variant, aligned=aligned)
        for aligned in (True, False)
        for state_dtype in FORMATS
        for variant in stored(state_dtype)
        if variant.state_dtype != "fp32" or variant.split
    ]


def stored(state_dtype: str) -> list[Variant]:
    """Return the updates that store moments so, one for each way to keep a weight."""
    return [
        Variant(torch.float32, torch.float32, master=False, state_dtype=state_dtype),
        *(
            Variant(
                torch.bfloat16,
                torch.bfloat16,
                precision == "master",
                state_dtype=state_dtype,
                split=precision == "split",
            )
            for precision in PRECISIONS
        ),
    ]


@dataclass(frozen=True)
class Code:
    """What was compiled.

    Attributes:
        variant: Of what.
        capability: 90 for sm_90.
        registers: A thread.
        stack: Bytes a thread.
        spills: Instructions that move registers to or from local memory.
        shared: Bytes of shared memory that Triton asked for.
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


def compile_variant(variant: Variant, capability: int) -> Code:
    """Compile one variant for sm_`capability` and read its machine code."""
    kernel = launch.kernels.step_kernel
    buffers = variant.storage.buffers(variant.weight)
    state = launch.State.of(
        {key: torch.empty(buffer.numel(128), dtype=buffer.dtype) for key, buffer in buffers.items()}
    )
    arguments = ARGUMENTS | {f"{key}_ptr": POINTERS[buffer.dtype] for key, buffer in buffers.items()}
    constants: dict[str, Any] = {
        "WEIGHT_DTYPE": launch.TRITON_DTYPES[variant.weight],
        "GRAD_DTYPE": launch.TRITON_DTYPES[variant.grad],
        "ALIGNED": variant.aligned,
        "UPDATE": variant.launch != "norm",
        "CONTROLLED": variant.launch == "clipped",
        "BLOCK": launch.BLOCK,
        "BLOCKS": launch.BLOCKS,
        **state.codecs,
        **{f"{key}_ptr": None for key in KEYS if key not in buffers},
    }
    if not variant.scaler:
        constants["grad_scale_ptr"] = constants["found_inf_ptr"] = None
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else arguments[name] for name in names}
    # Torch allocates on 512 bytes, and the launcher of Triton finds that out.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {**launch.OPTIONS, "maxnreg": state.max_registers[variant.aligned]}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", path)
        assembly = tool("nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    opcodes = [opcode for _, opcode in instruction_lines(assembly)]
    body, elements = loop(assembly), launch.BLOCK
    if variant.launch == "norm":
        body, elements = list((Counter(opcodes) - Counter(body)).elements()), launch.Launch.chunk
    return Code(
        variant,
        capability,
        registers=int(found[1]),
        stack=int(found[2]),
        spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        shared=compiled.metadata.shared,
        shared_accesses=sum(opcode.startswith(("LDS", "STS")) for opcode in opcodes),
        loads=widths(body, "LDG"),
        stores=widths(body, "STG"),
        instructions=len(body) * 32 * launch.OPTIONS["num_warps"] / elements,
    )


def tool(name: str, *arguments: Any) -> str:
    """Return what one of the tools in Triton's wheel prints."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def instruction_lines(assembly: str) -> list[tuple[int, str]]:
    """Return (line, opcode) of every instruction, predicates dropped."""
    pattern = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    matches = ((i, pattern.match(line)) for i, line in enumerate(assembly.splitlines()))
    return [(i, match[1]) for i, match in matches if match]


def loop(assembly: str) -> list[str]:
    """Return the opcodes of the loop over elements: of the backward branches, the span with most of the loads."""
    lines = assembly.splitlines()
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    instructions = instruction_lines(assembly)
    spans = []
    for i, opcode in instructions:
        target = re.search(r"\((\.L_x_\d+)\)", lines[i])
        if opcode.startswith("BRA") and target and labels[target[1]] < i:
            spans.append([code for j, code in instructions if labels[target[1]] <= j <= i])
    return max(spans, key=lambda span: (sum(code.startswith("LDG") for code in span), -len(span)))


def widths(opcodes: Sequence[str], kind: str) -> dict[int, int]:
    """Return how many accesses of one kind there are, by width in bits."""
    found = Counter(
        next((ACCESS_BITS[part] for part in opcode.split(".") if part in ACCESS_BITS), 32)
        for opcode in opcodes
        if opcode.startswith(kind)
    )
    return dict(sorted(found.items()))


def compile_all(wanted: Sequence[tuple[Variant, int]], processes: int) -> list[Code]:
    """Compile in fresh processes, outside the interpreter whatever the environment says."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            return list(pool.map(compile_variant, *zip(*wanted, strict=True)))
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def row(code: Code) -> str:
    """Return one line of the table."""
    loads, stores = (" ".join(f"{n}x{bits}" for bits, n in found.items()) for found in (code.loads, code.stores))
    return (
        f"sm_{code.capability:<4} {code.variant!s:48} {code.registers:4} {code.spills:6} {code.stack:5} "
        f"{code.shared_accesses:6}  {loads:24} {stores:24} {code.instructions:6.1f} "
        f"{code.variant.bytes_per_element:6.2f}"
    )


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--capability", type=int, action="append", help="80, 90 or 100; may be repeated")
    args = parser.parse_args(argv)
    wanted = [(one, capability) for capability in args.capability or CAPABILITIES for one in variants()]
    print(f"triton {triton.__version__}, {launch.BLOCKS} blocks of {launch.BLOCK} elements a program\n")
    print(
        f"{'GPU':7} {'variant':48} {'regs':>4} {'spills':>6} {'stack':>5} {'shared':>6}  {'loads':24} {'stores':24} "
        f"{'instr':>6} {'bytes':>6}"
    )
    for code in compile_all(wanted, args.processes):
        print(row(code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
