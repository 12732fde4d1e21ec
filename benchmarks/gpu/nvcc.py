"""The CUDA library compiled with nvcc alone: `python -m benchmarks.gpu.nvcc` builds it for the GPUs of this machine."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.gpu import nvidia
from misa_kernels.kernels import native

SOURCE = record.ROOT / "csrc" / "adamw_cuda.cu"
# As CMakeLists.txt gives them.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static")


def missing() -> str | None:
    """Return why nothing can be compiled, None if it can."""
    return None if nvidia.find("nvcc") else "nvcc is neither on PATH nor in the CUDA folder"


def compile_source(output: Path, *options: str) -> None:
    """Run nvcc on csrc/adamw_cuda.cu.

    Raises:
        RuntimeError: With what it printed, if it failed.
    """
    architectures = " ".join(re.findall(r"code=sm_(\d+)", " ".join(options)))
    define = f'-DMISA_CUDA_ARCHITECTURES="{architectures}"'
    command = [nvidia.find("nvcc") or "nvcc", *FLAGS, define, *options, str(SOURCE), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed: {(done.stdout + done.stderr)[-1000:]}")


def compile_library(output: Path, capabilities: Iterable[int]) -> None:
    """Write the library with machine code for each sm_`capability`."""
    compile_source(output, "-shared", *(f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in capabilities))


def ensure_library() -> str:
    """Build the library for the GPUs here unless it is newer than its source; return what was done."""
    built, newest = native.path("cuda"), max(file.stat().st_mtime for file in SOURCE.parent.iterdir())
    if built is not None and built.stat().st_mtime > newest:
        return f"the CUDA library is {built}"
    if missing():
        return f"no CUDA library: {missing()}" if built is None else f"the CUDA library is {built}, older than csrc"
    found = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    capabilities = sorted({10 * major + minor for major, minor in found})
    if not capabilities:
        return "no CUDA library is built: torch sees no GPU to build it for"
    output = native.FOLDER / "libmisa_cuda.so"
    # Whole or not at all, for whoever loads it meanwhile or has the old one loaded.
    partial = output.with_suffix(f".{os.getpid()}")
    try:
        compile_library(partial, capabilities)
        partial.replace(output)
    except RuntimeError as error:
        return f"no CUDA library: {error}"
    finally:
        partial.unlink(missing_ok=True)
    return f"built {output}"


if __name__ == "__main__":
    print(ensure_library())
