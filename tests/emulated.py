"""The CUDA library on the CPU: the source of its kernels, compiled with tests/emulation/cuda_runtime.h for CUDA's."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from unittest.mock import patch

from misa_kernels.kernels import native

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
# The vectors of the kernels alias their elements, as is usual in CUDA.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", f"-I{ROOT / 'tests/emulation'}", f"-I{ROOT / 'csrc'}"]
FLAGS += ['-DMISA_CUDA_ARCHITECTURES="emulated"']


def compile_emulation(output: Path, *options: str) -> None:
    source = ROOT / "csrc" / "adamw_cuda.cu"
    command = [COMPILER, *FLAGS, "-x", "c++", str(source), *options, "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "libmisa_cuda.so"
        compile_emulation(file, "-O2", "-fPIC", "-shared", "-fvisibility=hidden")
        return native.load("cuda", file)


class EmulatedTable(native.NativeTable):
    """`CudaTable` for tensors on the CPU."""

    name = "cuda"

    def __init__(self, *args, **options):
        with patch.object(native, "library", lambda name: library()):
            super().__init__(*args, **options)

    def _where(self, function):
        return 0, None
