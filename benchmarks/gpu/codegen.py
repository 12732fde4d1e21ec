"""What machine code do Triton and nvcc make of the step? Compiled for several GPUs on any machine, without one.

python -m benchmarks.gpu.codegen    a table: registers, spills, access widths, instructions and bytes an element
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu import nvcc
from benchmarks.gpu.assembly import CAPABILITIES, Code, Variant, instruction_lines, loop, read, row, tool
from misa_kernels.kernels import launch, native
from misa_kernels.memory.codec import FORMATS
from misa_kernels.memory.storage import KEYS, PRECISIONS

# An ordinary run compiles one to three of these.
USUAL = [
    Variant(torch.float32, torch.float32, master=False),
    Variant(torch.bfloat16, torch.bfloat16, master=True),
    Variant(torch.bfloat16, torch.bfloat16, master=False),
    Variant(torch.bfloat16, torch.bfloat16, master=True, launch="norm"),
    Variant(torch.bfloat16, torch.bfloat16, master=True, launch="clipped"),
]
# And of slices of columns.
USUAL += [replace(variant, pitched=True) for variant in USUAL if variant.launch == "update"]
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
# Of csrc/adamw_cuda.cu: threads of a block, and elements in a turn of the update's loop and of the norm's.
LIBRARY_THREADS, LIBRARY_BLOCK, LIBRARY_CHUNK = 256, 2048, 8192


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
    return (
        [
            Variant(*dtype, aligned, kind, scaler)
            for scaler in (False, True)
            for aligned in (True, False)
            for kind in ("update", "norm", "clipped")
            for dtype in dtypes
            # A norm launch reads gradients alone.
            if kind != "norm" or dtype in dtypes[0::2]
        ]
        + [
            replace(variant, aligned=aligned)
            for aligned in (True, False)
            for state_dtype in FORMATS
            for variant in stored(state_dtype)
            if variant.state_dtype != "fp32" or variant.split
        ]
        + [
            replace(variant, aligned=aligned, pitched=True)
            for aligned in (True, False)
            for state_dtype in FORMATS
            for variant in stored(state_dtype)
            if aligned or state_dtype in ("fp32", "int8")
        ]
    )


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


def compile_variant(variant: Variant, capability: int) -> Code:
    """Compile one variant for sm_`capability` and read its machine code."""
    kernel = launch.kernels.step_kernel
    buffers = variant.storage.buffers(variant.weight)
    arguments = ARGUMENTS | {f"{key}_ptr": POINTERS[buffer.dtype] for key, buffer in buffers.items()}
    constants: dict[str, Any] = {
        "WEIGHT_DTYPE": launch.TRITON_DTYPES[variant.weight],
        "GRAD_DTYPE": launch.TRITON_DTYPES[variant.grad],
        "ALIGNED": variant.aligned,
        "PITCHED": variant.pitched,
        "UPDATE": variant.launch != "norm",
        "CONTROLLED": variant.launch == "clipped",
        "BLOCK": launch.BLOCK,
        "BLOCKS": launch.BLOCKS,
        **launch.codecs(variant.storage),
        **{f"{key}_ptr": None for key in KEYS if key not in buffers},
    }
    if not variant.scaler:
        constants["grad_scale_ptr"] = constants["found_inf_ptr"] = None
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else arguments[name] for name in names}
    # Torch allocates on 512 bytes, and the launcher of Triton finds that out.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {**launch.OPTIONS, "maxnreg": launch.max_registers(variant.storage, variant.aligned)}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", path)
        assembly = tool("nvdisasm", "-c", path)
    body, elements = loop(assembly), launch.BLOCK
    if variant.launch == "norm":
        opcodes = Counter(opcode for _, opcode in instruction_lines(assembly))
        body, elements = list((opcodes - Counter(body)).elements()), launch.TritonTable.chunk
    code = read(variant, capability, usage, assembly, body, 32 * launch.OPTIONS["num_warps"] / elements)
    return dataclasses.replace(code, shared=compiled.metadata.shared)


def compile_all(wanted: Sequence[tuple[Variant, int]], processes: int) -> list[Code]:
    """Compile in fresh processes, outside the interpreter whatever the environment says."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            return list(pool.map(compile_variant, *zip(*wanted, strict=True)))
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def compile_library(capability: int) -> list[Code]:
    """Compile all kernels of the step for sm_`capability`, and read them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "step.cubin"
        nvcc.compile_source(cubin, "-cubin", f"-arch=sm_{capability}")
        usages = re.findall(r"Function (\S+):\s+(.*)", tool("cuobjdump", "-res-usage", cubin))
        sections = tool("nvdisasm", "-c", cubin).split("\t.section\t")
    codes = []
    for name, usage in usages:
        variant = variant_of(name)
        if variant is None:
            continue
        assembly = next(section for section in sections if section.startswith(f".text.{name},"))
        body = loop(assembly, 8 * 4 * variant.grad.itemsize)
        elements = LIBRARY_CHUNK if variant.launch == "norm" else LIBRARY_BLOCK
        codes.append(read(variant, capability, usage, assembly, body, LIBRARY_THREADS / elements))
    return codes


def variant_of(name: str) -> Variant | None:
    """Return which variant a kernel is, from its mangled name; None if it is none."""
    update = re.search(r"update_kernelILi(\d)ELi(\d)ELb(\d)ELb(\d)E", name)
    if update:
        return Variant(
            native.NativeTable.dtypes[int(update[1])],
            native.NativeTable.dtypes[int(update[2])],
            update[3] == "1",
            pitched=update[4] == "1",
            compiler="nvcc",
        )
    norm = re.search(r"norm_kernelILi(\d)E", name)
    if not norm:
        return None
    # The weights play no part in it.
    grad = native.NativeTable.dtypes[int(norm[1])]
    return Variant(grad, grad, grad == torch.bfloat16, launch="norm", compiler="nvcc")


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.codegen", description=__doc__.splitlines()[0])
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
    if nvcc.missing():
        print(f"no rows of the CUDA library: {nvcc.missing()}")
        return 0
    for capability in args.capability or CAPABILITIES:
        for code in compile_library(capability):
            print(row(code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
