"""The machine code of the Triton step and of the CUDA library, compiled without a GPU."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu import assembly, codegen, nvcc
from benchmarks.gpu.assembly import CAPABILITIES, Code, Variant
from benchmarks.gpu.codegen import USUAL, compile_all, compile_library, main, stored, variants
from misa_kernels.kernels import launch
from misa_kernels.memory.codec import FORMATS
from misa_kernels.memory.storage import KEYS, Storage

# Bytes of shared memory: one float64 a warp for the sum of squares, where a change of layouts would take
# kilobytes. And loads and stores of it: of one sum, of two and the word who came last, of none. Triton 3.6 and
# 3.7 take these many, 3.8 and 3.9 half; a change of layouts would add 12 a block.
SHARED_BYTES = {"update": 32, "norm": 32, "clipped": 0}
SHARED_ACCESSES = {"update": 4, "norm": 10, "clipped": 0}
# A block of weights that are not aligned goes through shared memory once where a thread must keep 4 neighbours, for
# the scale of their group.
CROSSING_BYTES, CROSSING_ACCESSES = 4096, 12
# An element, with bfloat16 weights rounded stochastically, whose hash takes 16. The IEEE division and root of fp32
# take 20 to 30.
INSTRUCTIONS = {"fp32": 75, "bf16": 75, "int8": 75, "fp8": 110, "int8+int4": 80}
# More where the weight is pitched: the division of its lines, once a vector.
PITCHED = 6
# Spilling instructions and bytes of stack, of the variants that have any: Triton 3.6 has one.
SPILLS = {"3.6": {("update bf16 bf16 master bf16 unaligned", 80): (4, 8)}}.get(triton.__version__[:3], {})


def expected_widths(variant: Variant) -> tuple[dict[int, int], dict[int, int]]:
    """Two vectors of 4 elements a thread and tensor, and each scale of the two groups they are in."""
    weight, grad = {8 * 4 * variant.weight.itemsize: 2}, {8 * 4 * variant.grad.itemsize: 2}
    state = added(
        *(
            {32: 2 * buffer.entries}
            if name.endswith("scale")
            else {8 * 4 // buffer.elements * buffer.dtype.itemsize: 2}
            for name, buffer in variant.storage.buffers(variant.weight).items()
        )
    )
    # The weight is in its master, which is read instead.
    return added(state, grad, weight), added(state, weight)


def added(*counts: dict[int, int]) -> dict[int, int]:
    return {bits: sum(one.get(bits, 0) for one in counts) for bits in sorted({bits for one in counts for bits in one})}


def check(code: Code) -> None:
    variant = code.variant
    assert (code.spills, code.stack) == SPILLS.get((str(variant), code.capability), (0, 0)), code
    registers = launch.MAX_REGISTERS_E4M3 if variant.state_dtype == "fp8" else launch.MAX_REGISTERS
    assert code.registers <= registers[variant.aligned], code
    crossing = not variant.aligned and scaled(variant)
    assert code.shared <= (CROSSING_BYTES if crossing else SHARED_BYTES[variant.launch]), code
    assert code.shared_accesses <= SHARED_ACCESSES[variant.launch] + CROSSING_ACCESSES * crossing, code
    if variant.launch == "norm":
        # 8 blocks of two vectors; what is narrower or left over reads the tables.
        wide = 8 * 4 * variant.grad.itemsize
        assert code.loads.get(wide, 0) >= 16 or not variant.aligned, code
        assert not variant.aligned or 16 not in code.loads, code
    elif variant.aligned:
        assert (code.loads, code.stores) == expected_widths(variant), code
        assert code.instructions < INSTRUCTIONS[variant.state_dtype] + PITCHED * variant.pitched, code
    else:
        # Element by element, never wider than the dtype allows.
        assert max(*code.loads, *code.stores) <= 32, code


def test_usual_variants_on_every_gpu():
    codes = compile_all([(variant, capability) for capability in CAPABILITIES for variant in USUAL], processes=2)
    assert len(codes) == 24
    for code in codes:
        check(code)
    instructions = {(code.capability, code.variant): code.instructions for code in codes}
    for (capability, variant), found in instructions.items():
        if variant.pitched:
            assert found <= instructions[capability, replace(variant, pitched=False)] + PITCHED, variant


def scaled(variant: Variant) -> bool:
    return any(codec.scales for codec in variant.storage.codecs.values())


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", FORMATS)
def test_formats_on_every_gpu(state_dtype):
    for code in compile_all(
        [(variant, capability) for capability in CAPABILITIES for variant in stored(state_dtype)], 2
    ):
        check(code)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_variants(capability):
    for code in compile_all([(variant, capability) for variant in variants()], processes=2):
        check(code)


needs_nvcc = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))


@needs_nvcc
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_cuda_library(capability):
    codes = compile_library(capability)
    assert len({code.variant for code in codes}) == 14
    for code in codes:
        variant = code.variant
        assert code.spills == 0 and code.stack == 0, code
        # Half of the threads that a multiprocessor has room for.
        assert code.registers <= 64, code
        loads, stores = expected_widths(variant)
        if variant.launch == "norm":
            # All of a chunk before any is used.
            assert code.loads == {8 * 4 * variant.grad.itemsize: 8} and code.stores == {}, code
            continue
        # And more, since at age 0 weight and gradient are loaded by instructions of their own.
        assert code.loads.keys() == loads.keys() and all(code.loads[bits] >= n for bits, n in loads.items()), code
        assert code.stores == stores, code
        assert code.instructions < 85 + PITCHED * variant.pitched, code


@needs_nvcc
def test_cuda_library_rounds_as_ieee_754_does(tmp_path):
    """No approximation and no flush to zero; in float32 there is no sum that a compiler could contract."""
    nvcc.compile_source(tmp_path / "step.ptx", "-ptx", "-arch=sm_80")
    operations = re.findall(r"\s([a-z]+(?:\.[a-z]+)*)\.f(32|64)\s", (tmp_path / "step.ptx").read_text())
    operations = {f"{name}.f{bits}" for name, bits in operations}
    assert {"div.rn.f32", "sqrt.rn.f32", "fma.rn.f32", "div.rn.f64", "sqrt.rn.f64", "mul.rn.f64"} <= operations
    assert not any("approx" in name or "ftz" in name for name in operations)
    # float64 is rounded after every operation: the processor's bits would be others with contraction.
    assert not operations & {"add.f32", "sub.f32", "add.rn.f32", "fma.rn.f64", "mul.f64", "add.f64", "sub.f64"}


def test_bytes_are_those_of_the_design():
    bytes_of = {str(variant): variant.bytes_per_element for variant in variants()}
    assert bytes_of["update bf16 bf16 master"] == bytes_of["update fp32 fp32"] == 28
    assert bytes_of["update bf16 bf16 stochastic"] == 22
    assert (bytes_of["norm bf16 bf16 master"], bytes_of["norm fp32 fp32"]) == (2, 4)
    assert bytes_of["update bf16 bf16 split"] == 26


@pytest.mark.parametrize(("state_dtype", "most"), [("bf16", 14), ("int8", 10.2), ("fp8", 10.5), ("int8+int4", 9.6)])
def test_bytes_of_compressed_states(state_dtype, most):
    """With bfloat16 weights and gradients and neither masters nor residuals, whose 6 bytes are the least."""
    *_, stochastic = stored(state_dtype)
    assert str(stochastic) == f"update bf16 bf16 stochastic {state_dtype}"
    assert 6 + 2 * 1.5 < stochastic.bytes_per_element <= most


@pytest.mark.slow
def test_table_has_a_line_a_variant(capsys):
    assert main(["--capability", "90"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sm_90")]
    assert len(lines) == len(variants()) + (0 if nvcc.missing() else 14)


CLOSED = [(torch.float32, Storage()), (torch.bfloat16, Storage()), (torch.float16, Storage())]
CLOSED += [(torch.bfloat16, Storage("int8", "stochastic")), (torch.bfloat16, Storage("fp8", "split"))]
CLOSED += [(torch.float32, Storage("bf16")), (torch.bfloat16, Storage("int8+int4"))]


@pytest.mark.parametrize("capability", [80, 90, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("weight, storage", CLOSED, ids=str)
@pytest.mark.parametrize("measured, pitched", [(True, True), (False, False), (False, True)])
def test_the_end_of_a_round_needs_no_stack(tmp_path, capability, weight, storage, measured, pitched):
    kernel, buffers = launch.close_kernel, storage.buffers(weight)
    pointers = codegen.ARGUMENTS | {"moved_ptr": "*fp64", "chunks": "i32"}
    pointers |= {f"{key}_ptr": codegen.POINTERS[kind.dtype] for key, kind in buffers.items()}
    constants = {"WEIGHT_DTYPE": launch.TRITON_DTYPES[weight], "ALIGNED": True, **launch.codecs(storage)}
    constants["PITCHED"] = pitched
    constants |= {"BLOCK": launch.BLOCK, "BLOCKS": launch.BLOCKS}
    constants |= {f"{key}_ptr": None for key in KEYS if key not in buffers} | ({} if measured else {"moved_ptr": None})
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else pointers[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    given = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, given, aligned)
    options = {**launch.OPTIONS, "maxnreg": launch.max_registers(storage, aligned=False)}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    path = tmp_path / "close.cubin"
    path.write_bytes(compiled.asm["cubin"])
    usage = assembly.tool("cuobjdump", "-res-usage", path)
    assert " STACK:0 " in usage, usage
