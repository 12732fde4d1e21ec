"""What was built, for which processors, and which backend each device will use."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from collections.abc import Iterator

import torch

import misa_kernels
from misa_kernels import kernels
from misa_kernels.kernels import native
from misa_kernels.memory.storage import Storage

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Line = tuple[str, str]

EXAMPLES = """examples:
  python -m misa_kernels info
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add none: there is nothing to choose."""


def run(options: argparse.Namespace) -> int:
    """Print versions, libraries and backends, a line each."""
    lines = [*versions(), *cpu_library(), *cuda_library(), *devices()]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:{width}}  {text}")
    return 0


def versions() -> Iterator[Line]:
    """Yield the versions that decide what can run."""
    yield "misa_kernels", misa_kernels.__version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    if importlib.util.find_spec("triton") is None:
        yield "Triton", "not installed"
    else:
        import triton

        yield "Triton", triton.__version__


def cpu_library() -> Iterator[Line]:
    """Yield what the library for CPUs was built for, and what of it is used here."""
    try:
        library = native.library("cpu")
    except RuntimeError:
        yield "CPU library", "none"
        return
    yield "CPU library", file_name("cpu")
    yield "  instructions", f"{library.misa_cpu_built().decode()}; in use: {library.misa_cpu_instructions().decode()}"
    openmp = library.misa_cpu_openmp()
    yield "  threads", f"{torch.get_num_threads()}, OpenMP" if openmp else "1, built without OpenMP"


def cuda_library() -> Iterator[Line]:
    """Yield what the library for GPUs was built for, and the driver it finds here."""
    try:
        library = native.library("cuda")
    except RuntimeError:
        yield "CUDA library", "none"
        return
    driver = library.misa_cuda_driver_version()
    yield "CUDA library", file_name("cuda")
    yield "  architectures", " ".join(f"sm_{number}" for number in library.misa_cuda_built().decode().split())
    yield "  CUDA runtime", cuda_version(library.misa_cuda_runtime_version())
    yield "  driver", f"for CUDA {cuda_version(driver)}" if driver else "none"


def devices() -> Iterator[Line]:
    """Yield what `backend="auto"` takes on each device, by weight dtype, and why it takes nothing better."""
    here = [torch.device("cpu"), *(torch.device("cuda", number) for number in range(torch.cuda.device_count()))]
    for device in here:
        yield str(device), platform.machine() if device.type == "cpu" else gpu(device)
        chosen: dict[str, list[str]] = {}
        for dtype in DTYPES:
            backend = kernels.select("auto", device, {dtype}, Storage()).name
            chosen.setdefault(backend, []).append(str(dtype).removeprefix("torch."))
        for backend, dtypes in chosen.items():
            yield "  auto", f"{backend} for {', '.join(dtypes)}"
    for backend in kernels.BACKENDS:
        reason = kernels.unusable(backend)
        if reason:
            yield "not usable", f"{backend!r} {reason}"


def gpu(device: torch.device) -> str:
    """Return a GPU's name and architecture."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"


def file_name(name: str) -> str:
    """Return the name of a library's file, which has been loaded."""
    path = native.path(name)
    assert path is not None
    return path.name


def cuda_version(number: int) -> str:
    """Return CUDA's version as people write it: 12080 is 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}"
