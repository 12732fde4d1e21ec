"""How the compiled libraries are found and called: csrc/misa.h in ctypes, and the tables of a round for them."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from misa_kernels.kernels.table import ALL, NONE, ROW_COLUMNS, RowTable
from misa_kernels.memory.storage import KEYS

FOLDER = Path(__file__).parents[1]
SUFFIXES = {".so", ".dylib", ".dll"}
COMPILER = {"cpu": "a C++ compiler", "cuda": "nvcc"}
CLIP, SKIP_NONFINITE = 1, 2
# MisaFormat: the number of a `state_dtype`.
STATE_DTYPES = ("fp32", "bf16", "int8")
POINTER, INT64 = ctypes.c_void_p, ctypes.c_int64


class MisaState(ctypes.Structure):
    """Buffers of the state of one weight dtype."""

    _fields_ = [(name, POINTER) for name in KEYS] + [("elements", INT64)]


class MisaStep(ctypes.Structure):
    """All that a library is given."""

    _fields_ = [
        ("bytes", INT64),
        ("row_bytes", INT64),
        ("rows", POINTER),
        ("row_count", INT64),
        ("hyper", POINTER),
        ("group_count", INT64),
        ("state", MisaState * 2),
        ("format", INT64),
        ("chunk_count", INT64),
        ("age", POINTER),
        ("sq_sum", POINTER),
        ("partial", POINTER),
        ("arrived", POINTER),
        ("control", POINTER),
        ("grad_scale", POINTER),
        ("found_inf", POINTER),
        ("max_grad_norm", ctypes.c_double),
        ("flags", INT64),
    ]


def path(name: str) -> Path | None:
    """Return where the library "cpu" or "cuda" lies, None if it was not built."""
    return next((file for file in FOLDER.glob(f"*misa_{name}.*") if file.suffix in SUFFIXES), None)


@cache
def library(name: str) -> ctypes.CDLL:
    """Load the library "cpu" or "cuda".

    Raises:
        RuntimeError: If it was not built, or cannot be loaded; the message is the rest of a sentence.
    """
    file = path(name)
    if file is None:
        raise RuntimeError(
            f"was not built when misa_kernels was installed: install {COMPILER[name]}, then run "
            "`pip install --force-reinstall --no-deps --no-binary misa-kernels misa-kernels`"
        )
    return load(name, file)


@cache
def show_openmp() -> None:
    """Show the CPU library torch's OpenMP runtime, or the machine's where torch brings none.

    What GCC built for Linux calls the runtime and names no file of it. Importing torch makes its own visible to what is
    loaded later, as long as torch loads `libtorch_global_deps.so`; the search is for those that do not.
    """
    if sys.platform != "linux" or hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    for runtime in (*sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")), "libgomp.so.1"):
        with suppress(OSError):
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
            return


def load(name: str, file: Path) -> ctypes.CDLL:
    """Load a library "cpu" or "cuda" from a file.

    Raises:
        RuntimeError: If it cannot be loaded; the message is the rest of a sentence.
    """
    if name == "cpu":
        show_openmp()
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise RuntimeError(f"cannot be loaded: {error}") from error
    step = ctypes.POINTER(MisaStep)
    stream = [] if name == "cpu" else [ctypes.c_int, POINTER]
    loaded.misa_message.restype = ctypes.c_char_p
    loaded.misa_message.argtypes = [ctypes.c_int]
    for function, result, arguments in (
        ("chunk", INT64, []),
        ("built", ctypes.c_char_p, []),
        ("step", ctypes.c_int, [step, *(stream or [ctypes.c_int])]),
        ("collect", ctypes.c_int, [step, POINTER, *stream]),
        ("close", ctypes.c_int, [step, POINTER, *(stream or [ctypes.c_int])]),
    ):
        entry = getattr(loaded, f"misa_{name}_{function}")
        entry.restype, entry.argtypes = result, arguments
    if name == "cpu":
        loaded.misa_cpu_instructions.restype = ctypes.c_char_p
        loaded.misa_cpu_use_instructions.argtypes = [ctypes.c_char_p]
    return loaded


def unusable(name: str) -> str | None:
    """Return why the library "cpu" or "cuda" cannot be used on this machine, None if it can."""
    try:
        loaded = library(name)
    except RuntimeError as error:
        return str(error)
    if name == "cpu":
        return None
    driver, runtime = loaded.misa_cuda_driver_version(), loaded.misa_cuda_runtime_version()
    if driver // 1000 < runtime // 1000:
        found = f"the one here is for CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "there is none here"
        return f"needs a driver for CUDA {runtime // 1000}, and {found}: update it, or build with an older nvcc"
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch sees none here"
    built = [int(number) for number in loaded.misa_cuda_built().decode().split()]
    capabilities = (torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count()))
    here = [10 * major + minor for major, minor in capabilities]
    # Machine code runs on the later GPUs of its generation; for those newer than all, the driver compiles PTX.
    if any(gpu > max(built) or any(sm <= gpu < sm - sm % 10 + 10 for sm in built) for gpu in here):
        return None
    architectures = ", ".join(f"sm_{number}" for number in built)
    return (
        f"was built for {architectures}, which sm_{here[0]} here does not run: "
        f"build it with CMAKE_ARGS=-DMISA_CUDA_ARCHITECTURES={here[0]}"
    )


class NativeTable(RowTable):
    """The tables of a round as a library reads them; see `RowTable`.

    Raises:
        RuntimeError: If the library is missing, or refuses what it is given.
    """

    dtypes = (torch.float32, torch.bfloat16)

    def _open(self) -> None:
        self._library = library(self.name)
        self.chunk = getattr(self._library, f"misa_{self.name}_chunk")()

    def _bind(self) -> None:
        self._struct = struct = MisaStep(
            bytes=ctypes.sizeof(MisaStep),
            row_bytes=self._rows.itemsize * ROW_COLUMNS,
            rows=self._rows.ctypes.data,
            row_count=len(self._rows),
            hyper=self._hyper.ctypes.data,
            group_count=len(self._hyper),
            format=STATE_DTYPES.index(self._storage.state_dtype),
            chunk_count=len(self._ages),
            age=self._ages.data_ptr(),
            sq_sum=self.sq_sums.data_ptr(),
            partial=self._partials.data_ptr(),
            arrived=self._arrived.data_ptr(),
            control=self.control.data_ptr(),
        )
        for number, dtype in enumerate(self.dtypes):
            buffers = self._state.get(dtype, {})
            for name, buffer in buffers.items():
                setattr(struct.state[number], name, buffer.data_ptr())
            struct.state[number].elements = len(buffers["exp_avg"]) if buffers else 0
        self._reference = ctypes.byref(struct)
        self._first_row, self._collected_at = struct.rows, self.collected.data_ptr()

    def _run(
        self,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        half: int,
        rows: slice = ALL,
    ) -> None:
        struct = self._struct
        if rows is NONE:
            return
        struct.flags = (max_grad_norm is not None) * CLIP | skip_nonfinite * SKIP_NONFINITE | half
        struct.max_grad_norm = 0.0 if max_grad_norm is None else max_grad_norm
        struct.grad_scale = None if grad_scale is None else grad_scale.data_ptr()
        struct.found_inf = None if found_inf is None else found_inf.data_ptr()
        if rows is ALL:
            self._call("step")
            return
        whole = struct.row_count
        struct.rows, struct.row_count = self._first_row + rows.start * self._rows.strides[0], rows.stop - rows.start
        try:
            self._call("step")
        finally:
            struct.rows, struct.row_count = self._first_row, whole

    def _collect(self) -> None:
        self._call("collect", self._collected_at)

    def _close(self, moved: Tensor | None) -> None:
        self._call("close", None if moved is None else moved.data_ptr())

    def _call(self, function: str, *pointers: int | None) -> None:
        entry = getattr(self._library, f"misa_{self.name}_{function}")
        if status := entry(self._reference, *pointers, *self._where(function)):
            message = self._library.misa_message(status).decode()
            raise RuntimeError(f"the {self.name} library: {message} (status {status})")

    def _where(self, function: str) -> tuple[int | None, ...]:
        """Return the last arguments of a function: on what it runs."""
        raise NotImplementedError


class CpuTable(NativeTable):
    """The tables of a round on the CPU."""

    name = "cpu"
    eager = True

    def _where(self, function: str) -> tuple[int | None, ...]:
        return () if function == "collect" else (torch.get_num_threads(),)


class CudaTable(NativeTable):
    """The tables of a round on a GPU."""

    name = "cuda"

    def _where(self, function: str) -> tuple[int | None, ...]:
        # Not the device asked for, which may have no index.
        device = self._ages.device
        return device.index, torch.cuda.current_stream(device).cuda_stream
