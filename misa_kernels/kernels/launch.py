"""Which programs of the Triton step run on which pointers: buckets, uploads and launches of one round."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from misa_kernels.kernels import triton as kernels
from misa_kernels.kernels.table import (
    ALL,
    DTYPES,
    FIRST_CHUNK,
    GRAD,
    GRAD_DTYPE,
    NORMS,
    NUMEL,
    PITCH,
    ROW_COLUMNS,
    UPDATE,
    WEIGHT,
    WEIGHT_DTYPE,
    WIDTH,
    RowTable,
)
from misa_kernels.kernels.triton_close import close_kernel, collect_kernel
from misa_kernels.kernels.triton_codec import CODECS, INTERPRETED
from misa_kernels.memory.arena import sent
from misa_kernels.memory.codec import E4M3
from misa_kernels.memory.storage import KEYS, Storage

# A thread holds 8 elements at a time, two 16-byte vectors of float32, and a program takes 8 such blocks in turn.
# The interpreter pays by the block instead of by the element.
BLOCK, BLOCKS = (4096, 2) if INTERPRETED else (1024, 8)
# num_stages=1: a staged loop would pass its loads through shared memory. Contraction is off because every fma
# that is wanted is written out; Triton 3.9 warns if the flag is not given.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
# By alignment. 80 registers let six programs share an SM: left alone, ptxas takes up to 85 for sm_100, and with
# 72 it spills there. Rows without alignment move single elements and spill with 96.
MAX_REGISTERS = {True: 80, False: 128}
# The logarithms and powers of E4M3 spill with 80.
MAX_REGISTERS_E4M3 = {True: 88, False: 128}
# Of columns of a matrix, and of elements of a slice of them: the kernel divides in 32 bits.
COLUMNS_BELOW, PITCHED_BELOW = 2**30, 2**32
# One buffer would be overwritten while the device still reads it; the host is rarely three steps ahead.
UPLOAD_BUFFERS = 4

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Bucket(NamedTuple):
    """Rows of one compiled variant: what it is compiled for, and their stretch of the programs.

    Attributes:
        dtypes: Those of weights and gradients.
        aligned: Whether all weights and gradients can be read in vectors.
        pitched: Whether the weight of one of them is: no row pays more for it than a few instructions.
        first_program: Where the programs begin.
        programs: How many there are.
    """

    dtypes: tuple[torch.dtype, torch.dtype]
    aligned: bool
    pitched: bool
    first_program: int
    programs: int


def codecs(storage: Storage) -> dict[str, int]:
    """Return what tells the kernels how m and v are stored."""
    m, v = map(CODECS.index, storage.codecs.values())
    return {"M_CODEC": m, "V_CODEC": v}


def max_registers(storage: Storage, aligned: bool) -> int:
    """Return how many registers a thread may take."""
    return (MAX_REGISTERS_E4M3 if E4M3 in storage.codecs.values() else MAX_REGISTERS)[aligned]


def as_words(buffers: Mapping[str, Tensor]) -> list[Tensor | None]:
    """Return the state of one weight dtype as the kernels read it."""
    # As bytes, since Triton has no float8 on sm_80 and its interpreter truncates it.
    found = {key: x.view(torch.uint8) if x.dtype == E4M3.dtype else x for key, x in buffers.items()}
    return list(map(found.get, KEYS))


class Upload:
    """A device tensor refreshed from the host in stream order, without waiting for the device.

    Args:
        values: First content; its size and dtype are those of the tensor, which is 1-D.
        device: Where the tensor is.
    """

    def __init__(self, values: npt.NDArray[Any], device: torch.device) -> None:
        self.tensor = sent(torch.from_numpy(values.reshape(-1).copy()), device)
        self._is_free = False
        self._ring: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        if device.type == "cuda":
            for _ in range(UPLOAD_BUFFERS):
                buffer = torch.empty_like(self.tensor, device="cpu", pin_memory=True)
                self._ring.append((buffer, torch.cuda.Event()))  # type: ignore[no-untyped-call]

    def put(self, values: npt.NDArray[Any], words: slice = ALL) -> None:
        """Copy the values to the device, or some words of them, until `turn` each word once."""
        source = torch.from_numpy(values.reshape(-1)[words])
        if self.tensor.device.type == "cpu":
            self.tensor[words].copy_(source)
            return
        buffer, done = self._ring[0]
        if not self._is_free:
            # Returns at once unless the device is as many steps behind as there are buffers.
            done.synchronize()
            self._is_free = True
        buffer[words].copy_(source)
        self.tensor[words].copy_(buffer[words], non_blocking=True)

    def turn(self) -> None:
        """Take another buffer for the next step, since the device may still read this one."""
        if self._is_free:
            self._ring[0][1].record()
            self._ring.rotate(-1)
            self._is_free = False


class TritonTable(RowTable):
    """The steps of one round on the Triton kernel; see `RowTable`.

    Raises:
        RuntimeError: For CPU tensors without the interpreter, or CUDA tensors within it.
        ValueError: For dtypes that the kernel does not know, float16 weights without master, or slices that are too
            large.
    """

    name = "triton"
    chunk = BLOCK * BLOCKS

    def _open(self) -> None:
        if (self._device.type == "cpu") != bool(INTERPRETED):
            raise RuntimeError(
                f"the Triton kernels cannot run on {self._device}: they need CUDA tensors, or CPU tensors and "
                "TRITON_INTERPRET=1 in the environment before the import"
            )

    def _bind(self) -> None:
        device, rows = self._device, self._rows
        if (rows[rows[:, WIDTH] > 0][:, [PITCH, NUMEL]] >= (COLUMNS_BELOW, PITCHED_BELOW)).any():
            raise ValueError(
                "backend='triton' trains slices of fewer than 2^32 elements, of matrices of fewer than 2^30 columns: "
                "use backend='reference'"
            )
        self._on_device: AbstractContextManager[Any] = (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        )
        self._compiled: dict[Any, Any] = {}
        self._codecs = tuple(codecs(self._storage).values())
        self._divisible = (rows[:, [NUMEL, WIDTH, PITCH]] % 4 == 0).all(1)
        self._row_of_chunk = np.repeat(np.arange(len(rows)), self._chunks)
        self._number = np.arange(len(self._row_of_chunk)) - rows[self._row_of_chunk, FIRST_CHUNK]
        self._sent = self._tables.copy()
        self._table_upload = Upload(self._tables, device)
        self._device_rows = self._table_upload.tensor[: self._row_words]
        self._programs = np.zeros((len(self._number), 2), dtype=np.int32)
        self._aligned = self._divisible.copy()
        self._fill_buckets()
        self._program_upload = Upload(self._programs, device)
        device_hyper = self._table_upload.tensor[self._row_words :].view(torch.float64)
        # The first arguments of the kernels, by weight dtype.
        self._first = {
            dtype: (self._program_upload.tensor, self._device_rows, device_hyper, *as_words(held), self._ages)
            for dtype, held in self._state.items()
        }

    def _run(
        self,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        half: int,
        rows: slice = ALL,
    ) -> None:
        control = max_grad_norm is not None or skip_nonfinite
        scalars = float("inf") if max_grad_norm is None else float(max_grad_norm), int(skip_nonfinite)
        with self._on_device:
            self._upload(rows)
            buckets = self._buckets if rows is ALL else self._buckets_of(rows)
            if control and half != UPDATE:
                # The coefficient needs the norms of all buckets.
                for bucket in buckets:
                    self._launch(bucket, grad_scale, found_inf, *scalars, update=False, controlled=False)
            for bucket in buckets if half != NORMS else ():
                self._launch(bucket, grad_scale, found_inf, *scalars, update=True, controlled=control)

    def _upload(self, rows: slice) -> None:
        """Bring the device's tables up to date, as far as they are about these rows."""
        pointers = self._rows[rows]
        aligned = self._divisible[rows] & ((pointers[:, WEIGHT] | pointers[:, GRAD]) & 15 == 0)
        if not np.array_equal(aligned, self._aligned[rows]):
            self._aligned[rows] = aligned
            self._fill_buckets()
            self._program_upload.put(self._programs)
            # Once more within the step, where it comes in several calls, would be the same words again.
            self._program_upload.turn()
        first, end, _ = rows.indices(len(self._rows))
        if rows is ALL:
            # Of a step in several calls some words may be on their way.
            self._table_upload.turn()
            stretches = [ALL]
        else:
            stretches = [slice(first * ROW_COLUMNS, end * ROW_COLUMNS), slice(self._row_words, None)]
        for words in stretches:
            if not np.array_equal(self._tables[words], self._sent[words]):
                self._table_upload.put(self._tables, words)
                self._sent[words] = self._tables[words]
        if rows is ALL or first == end:
            self._table_upload.turn()

    def _collect(self) -> None:
        with self._on_device:
            collect_kernel[(len(self._chunks),)](
                self._device_rows, self._ages, self.sq_sums, self.collected, CHUNK=self.chunk, **OPTIONS
            )

    def _close(self, moved: Tensor | None) -> None:
        with self._on_device:
            self._upload(ALL)
            for bucket in self._buckets:
                weight_dtype, _ = bucket.dtypes
                close_kernel[(bucket.programs,)](
                    *self._first[weight_dtype],
                    moved,
                    bucket.first_program,
                    len(self._programs),
                    TRITON_DTYPES[weight_dtype],
                    *self._codecs,
                    bucket.aligned,
                    bucket.pitched,
                    BLOCK,
                    BLOCKS,
                    # Once a round: spilling would cost more than programs that wait.
                    maxnreg=max_registers(self._storage, aligned=False),
                    **OPTIONS,
                )

    def _fill_buckets(self) -> None:
        """Sort the programs by bucket. Ages and sums stay where they are, being numbered by chunk."""
        pair = len(DTYPES) * self._rows[:, WEIGHT_DTYPE] + self._rows[:, GRAD_DTYPE]
        self._kind = 2 * pair + ~self._aligned
        order = np.argsort(self._kind[self._row_of_chunk], kind="stable")
        self._programs[:, 0] = self._row_of_chunk[order]
        self._programs[:, 1] = self._number[order]
        self._pitched = set(self._kind[self._rows[:, WIDTH] > 0].tolist())
        # A row's first program, beside which all others of it lie.
        self._first_program = np.argsort(order)[self._rows[:, FIRST_CHUNK]]
        self._buckets = self._buckets_of(ALL)

    def _buckets_of(self, rows: slice) -> list[Bucket]:
        """Return the programs of some neighbouring rows, which lie side by side in each bucket."""
        kinds, first_program, chunks = self._kind[rows], self._first_program[rows], self._chunks[rows]
        return [
            Bucket(
                (DTYPES[kind // 6], DTYPES[kind // 2 % 3]),
                kind % 2 == 0,
                kind in self._pitched,
                int(first_program[kinds == kind].min()),
                int(chunks[kinds == kind].sum()),
            )
            for kind in np.unique(kinds).tolist()
        ]

    def _launch(
        self,
        bucket: Bucket,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_grad_norm: float,
        skip_nonfinite: int,
        update: bool,
        controlled: bool,
    ) -> None:
        weight_dtype, grad_dtype = bucket.dtypes
        # A norm launch reads gradients alone.
        pitched = bucket.pitched and update
        arguments = (
            *self._first[weight_dtype],
            self.sq_sums,
            self._partials,
            self._arrived,
            self.control,
            grad_scale,
            found_inf,
            bucket.first_program,
            len(self._programs),
            max_grad_norm,
            skip_nonfinite,
            TRITON_DTYPES[weight_dtype],
            TRITON_DTYPES[grad_dtype],
            *self._codecs,
            bucket.aligned,
            pitched,
            update,
            controlled,
            BLOCK,
            BLOCKS,
        )
        # All that decides a variant and may change within a round. Triton asks for it and for the module's constants at
        # each launch through `step_kernel`, and that would be a third of the step's time on the host.
        scaler = specialization(grad_scale), specialization(found_inf)
        variant = bucket.dtypes, bucket.aligned, pitched, update, controlled, scaler
        compiled = self._compiled.get(variant)
        if compiled is not None:
            compiled[bucket.programs, 1, 1](*arguments)
            return
        registers = max_registers(self._storage, bucket.aligned)
        compiled = kernels.step_kernel[(bucket.programs,)](*arguments, maxnreg=registers, **OPTIONS)
        # Something else within Triton's asynchronous compilation, and None in its interpreter.
        if kernels.LAUNCHES_COMPILED and isinstance(compiled, CompiledKernel):
            self._compiled[variant] = compiled


def specialization(scalar: Tensor | None) -> tuple[torch.dtype, bool] | None:
    """Return what Triton looks at in a pointer to choose the variant."""
    return None if scalar is None else (scalar.dtype, scalar.data_ptr() % 16 == 0)
