"""Has the code become dearer? Counts that no other work on the machine can touch, beside those committed.

python -m benchmarks.gate             every figure that grew beyond its tolerance; exit code 1 if there is one
python -m benchmarks.gate --update    writes benchmarks/results/gate.json anew

Figures of other versions of compiler or Triton than those recorded are not compared: they would say nothing of us.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import triton
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import record
from benchmarks.memory import PeakMemory
from benchmarks.step.growth import iteration
from benchmarks.tables import cells
from misa_kernels import MISA
from misa_kernels.kernels import native

RECORD = record.ROOT / "benchmarks" / "results" / "gate.json"
Figures = dict[str, float]
# What a figure may grow by, relatively, before the gate shuts. A spill, a launch or a byte more is one too many.
TOLERANCE = {"instructions": 0.02, "machine code": 0.02, "host": 0.0, "released": 0.0, "launches": 0.0}
# Elements and tensors of tests/native/count.cpp.
ELEMENTS, TENSORS = 2 * 32768, 300
FEW, MANY = 10, 1000
# Layers of an iteration that releases gradients: what each hook does for all tensors would show 4 times over.
RELEASED = (25, 100)
CAPABILITY = 90


def instructions() -> Figures:
    """Return instructions an element of a step of `misa_cpu`, and a tensor of 16 elements, counted by callgrind.

    Not those of AVX-512, which valgrind does not know.

    Raises:
        RuntimeError: Where valgrind, its headers, g++ or the library is missing.
    """
    absent = [name for name in ("valgrind", "g++") if shutil.which(name) is None]
    library = native.path("cpu")
    if absent or library is None:
        raise RuntimeError(f"{' and '.join(absent) or 'the library for CPUs'} is missing: apt-get install valgrind g++")
    found: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The library leaves the OpenMP runtime to the program, which mostly has torch's.
        build = [
            "g++",
            "-std=c++17",
            "-O1",
            "-fopenmp",
            f"-I{record.ROOT / 'csrc'}",
            f"-I{record.ROOT / 'tests/native'}",
        ]
        build += [str(record.ROOT / "tests/native/count.cpp"), str(library), f"-Wl,-rpath,{library.parent}"]
        run([*build, "-o", str(folder / "count")])
        built = native.library("cpu").misa_cpu_built().decode().split()
        for set_ in (name for name in built if name != "avx512"):
            output = folder / f"{set_}.out"
            command = ["valgrind", "-q", "--tool=callgrind", "--collect-atstart=no"]
            run([*command, f"--callgrind-out-file={output}", str(folder / "count"), set_])
            for dump in folder.glob(f"{set_}.out.*"):
                text = dump.read_text()
                kind = re.search(r"Client Request: (.*)", text)
                total = re.search(r"^totals: (\d+)", text, re.MULTILINE)
                assert kind is not None and total is not None, text[:500]
                found[f"{set_}, {kind[1]}"] = int(total[1]) / (TENSORS if "tensor" in kind[1] else ELEMENTS)
    return dict(sorted(found.items()))


def run(command: list[str]) -> None:
    """Run a command; raise RuntimeError with the end of what it printed if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stdout[-500:]}")


def variants() -> list[Any]:
    """Return the variants of the GPU step that are in README.md, whose machine code is counted."""
    # Imported here: the other counts need no compiler for GPUs.
    from benchmarks.gpu.codegen import USUAL, stored

    return [*USUAL, *(stored(format_)[-1] for format_ in ("int8", "fp8", "int8+int4"))]


def machine_code() -> Figures:
    """Return registers, spills and instructions an element of these variants, for sm_90."""
    from benchmarks.gpu.codegen import compile_all

    found: Figures = {}
    for code in compile_all([(variant, CAPABILITY) for variant in variants()], processes=2):
        for name in ("registers", "spills", "instructions"):
            found[f"sm_{CAPABILITY}, {code.variant}, {name}"] = getattr(code, name)
    return found


class Operators(TorchDispatchMode):
    """Counts torch's operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count it and run it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def host() -> Figures:
    """Return Python and C calls, torch's operators and bytes allocated in a step of few tensors, and of many."""
    found: Figures = {}
    for options in ({}, {"max_grad_norm": 1.0}):
        for tensors in (FEW, MANY):
            head = f"{'clipped, ' if options else ''}{tensors} tensors"
            step = stepper(tensors, **options)
            calls: Counter[str] = Counter()
            counted(step, calls)
            found |= {f"{head}, Python calls": calls["call"], f"{head}, C calls": calls["c_call"]}
            with Operators() as operators:
                step()
            found[f"{head}, operators"] = operators.count
            found[f"{head}, allocated bytes"] = allocated_bytes(step)
    return found


def stepper(tensors: int, **options: Any) -> Callable[[], object]:
    """Return the step of an optimizer with so many small active tensors, warmed up."""
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(tensors)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = MISA(params, delta=1.0, inner_steps=10**6, **options)
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
    return optimizer.step


def released() -> Figures:
    """Return calls, bytecodes and operators, a layer, of an iteration that releases its gradients, at two depths.

    A loop over all tensors in every hook would be no call; its bytecodes are counted.
    """
    found: Figures = {}
    for layers in RELEASED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = iteration(layers, torch.device("cpu"), release_gradients=True)
        for _ in range(2):
            step()
        calls: Counter[str] = Counter()
        counted(step, calls)
        with Operators() as operators:
            step()
        figures = {"Python calls": calls["call"], "C calls": calls["c_call"], "operators": operators.count}
        figures["bytecodes"] = bytecodes(step)
        found |= {f"{layers} layers, {name} a layer": count / layers for name, count in figures.items()}
    return found


def bytecodes(step: Callable[[], object]) -> int:
    """Run a step and return how many instructions of Python's it took."""
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        step()
    finally:
        sys.settrace(before)
    return count


def counted(step: Callable[[], object], calls: Counter[str]) -> None:
    """Run a step and add up its calls."""
    sys.setprofile(lambda frame, event, argument: calls.update((event,)))
    try:
        step()
    finally:
        sys.setprofile(None)


def allocated_bytes(step: Callable[[], object]) -> int:
    """Return the most bytes of tensors that a step holds beyond those there before."""
    with PeakMemory() as memory:
        step()
    return memory.peak_bytes


def launches() -> Figures:
    """Return launches of the step on a GPU, counted in Triton's interpreter in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(record.ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gate", "--count-launches"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=record.ROOT, timeout=300)
    if done.returncode:
        raise RuntimeError(f"the launches could not be counted: {done.stderr[-500:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def interpreted_launches() -> Figures:
    """Count launches by kind of step; within the interpreter."""
    from misa_kernels.kernels.launch import TritonTable

    number = 0
    original = TritonTable._launch

    def counting(self: TritonTable, *arguments: Any, **flags: bool) -> None:
        nonlocal number
        number += 1
        original(self, *arguments, **flags)

    TritonTable._launch = counting  # type: ignore[method-assign]
    found: Figures = {}
    fp32, bf16 = torch.float32, torch.bfloat16
    for name, dtypes, options in (
        ("fp32", [fp32] * 6, {}),
        ("bf16", [bf16] * 6, {}),
        ("bf16 int8", [bf16] * 6, {"state_dtype": "int8"}),
        ("bf16 clipped", [bf16] * 6, {"max_grad_norm": 1.0}),
        ("fp32 and bf16", [fp32, bf16] * 3, {}),
        ("fp32 and bf16 clipped", [fp32, bf16] * 3, {"max_grad_norm": 1.0}),
    ):
        params = [nn.Parameter(torch.ones(4, 4, dtype=dtype)) for dtype in dtypes]
        optimizer = MISA(params, delta=1.0, inner_steps=10**6, backend="triton", **options)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        number = 0
        optimizer.step()
        found[f"{name}, launches"] = number
    return found


COUNTS: dict[str, Callable[[], Figures]] = {
    "instructions": instructions,
    "machine code": machine_code,
    "host": host,
    "released": released,
    "launches": launches,
}


def tools() -> dict[str, str]:
    """Return, for each kind of figure, what they depend on beside our code."""
    library = native.path("cpu")
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}, torch {torch.__version__.split('+')[0]}"
    compiler = re.search(rb"GCC: \([^)]*\) [\d.]+", library.read_bytes()) if library else None
    return {
        "instructions": compiler[0].decode() if compiler else "unknown",
        "machine code": f"triton {triton.__version__}",
        "host": python,
        "released": python,
        "launches": "",
    }


def compare(kind: str, found: Figures, recorded: Figures) -> Iterator[str]:
    """Yield a sentence for each figure that grew beyond its tolerance, is missing, or was never recorded."""
    for name in sorted(found.keys() | recorded.keys()):
        if name not in found or name not in recorded:
            yield f"{kind}: {name} is {'not measured any more' if name in recorded else 'new'}: --update records it"
        elif found[name] > recorded[name] * (1 + TOLERANCE[kind]):
            yield (
                f"{kind}: {name} grew from {recorded[name]:.4g} to {found[name]:.4g}, which may be "
                f"{TOLERANCE[kind]:.0%} at most: find out why, or --update accepts it"
            )


def check(kind: str, content: dict[str, Any]) -> tuple[Figures, list[str] | None]:
    """Return the figures of a kind and what is wrong with them; None in its place where the tools are others.

    Or where no figure of that kind has been recorded.
    """
    found = COUNTS[kind]()
    if tools()[kind] != content["tools"].get(kind):
        return found, None
    return found, list(compare(kind, found, content["figures"][kind]))


def lines(content: dict[str, Any]) -> list[str]:
    """Return what was counted as tables in Markdown."""
    found = [
        "Counted, not timed; `tests/benchmarks/test_gate.py` fails where a figure grows. "
        + "; ".join(f"{kind}: {tool}" for kind, tool in content["tools"].items() if tool)
        + ".",
        "",
    ]
    code: dict[str, dict[str, float]] = {}
    for name, value in content["figures"]["machine code"].items():
        variant, _, figure = name.rpartition(", ")
        code.setdefault(variant, {})[figure] = value
    found += cells(
        "Triton kernel | registers | spills | instructions an element",
        (
            (name, f"{of['registers']:.0f}", f"{of['spills']:.0f}", f"{of['instructions']:.1f}")
            for name, of in code.items()
        ),
    )
    titles = {"instructions": "instructions an element (a tensor), CPU library", "host": "host, a step"}
    titles |= {"released": "an iteration that releases gradients", "launches": "launches, a step"}
    for kind, title in titles.items():
        figures = content["figures"].get(kind, {})
        found += cells(f"{title} | ", ((name, f"{value:.4g}") for name, value in figures.items())) if figures else []
    return found


def main(argv: list[str] | None = None) -> int:
    """Count everything; print what grew, or record it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the record anew")
    parser.add_argument("--count-launches", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.count_launches:
        print(json.dumps(interpreted_launches()))
        return 0
    if args.update:
        figures = {kind: count() for kind, count in COUNTS.items()}
        content = record.environment(torch.device("cpu")) | {"tools": tools(), "figures": figures}
        print(record.write(RECORD.parent, RECORD.stem, content))
        return 0
    content = json.loads(RECORD.read_text())
    wrong: list[str] = []
    for kind in COUNTS:
        found, sentences = check(kind, content)
        if sentences is None:
            print(f"{kind}: recorded with {content['tools'].get(kind)}, here {tools()[kind]}: not compared")
            continue
        print(f"{kind}: {len(found)} figures, {len(sentences)} too large or unknown")
        wrong += sentences
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0
