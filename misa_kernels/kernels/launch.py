"""Which programs of the Triton step run on which pointers: the tables, uploads and launches of one round."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from torch import Tensor

from misa_kernels.kernels import triton as kernels

# A thread holds 8 elements at a time, two 16-byte vectors of float32, and a program takes 8 such blocks in turn.
# The interpreter pays by the block instead of by the element.
BLOCK, BLOCKS = (4096, 2) if kernels.INTERPRETED else (1024, 8)
CHUNK = BLOCK * BLOCKS
# num_stages=1: a staged loop would pass its loads through shared memory. Contraction is off because every fma
# that is wanted is written out; Triton 3.9 warns if the flag is not given.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
# By alignment. 80 registers let six programs share an SM: left alone, ptxas takes up to 85 for sm_100, and with
# 72 it spills there. Rows without alignment move single elements and spill with 96.
MAX_REGISTERS = {True: 80, False: 128}
# One buffer would be overwritten while the device still reads it; the host is rarely three steps ahead.
UPLOAD_BUFFERS = 4

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
Integers = npt.NDArray[np.int64]


class Bucket(NamedTuple):
    """Rows of one compiled variant: (weight, gradient) dtypes, alignment, and their stretch of the programs."""

    dtypes: tuple[torch.dtype, torch.dtype]
    aligned: bool
    first_program: int
    programs: int


class Upload:
    """A device tensor refreshed from the host in stream order, without waiting for the device.

    Args:
        values: First content; its size and dtype are those of the tensor, which is 1-D.
        device: Where the tensor is.
    """

    def __init__(self, values: npt.NDArray[Any], device: torch.device) -> None:
        self.tensor = torch.from_numpy(values.reshape(-1)).to(device, copy=True)
        self._ring: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        if device.type == "cuda":
            for _ in range(UPLOAD_BUFFERS):
                buffer = torch.empty_like(self.tensor, device="cpu", pin_memory=True)
                self._ring.append((buffer, torch.cuda.Event()))  # type: ignore[no-untyped-call]
        self._captured: list[Tensor] = []

    def put(self, values: npt.NDArray[Any], changed: bool) -> None:
        """Copy the values to the device if they changed since the last call."""
        source = torch.from_numpy(values.reshape(-1))
        if self.tensor.device.type == "cpu":
            if changed:
                self.tensor.copy_(source)
            return
        capturing = torch.cuda.is_current_stream_capturing()
        # A graph that is replayed leaves its own values on the device.
        if not (changed or capturing or self._captured):
            return
        if len(self._ring) == 1 and capturing:
            raise RuntimeError(f"{len(self._captured)} steps are in CUDA graphs already: capture one and replay it")
        buffer, done = self._ring.popleft()
        if not capturing:
            # Returns at once unless the device is as many uploads behind as there are buffers.
            done.synchronize()
        buffer.copy_(source)
        self.tensor.copy_(buffer, non_blocking=True)
        if capturing:
            # Every replay reads this buffer again.
            self._captured.append(buffer)
        else:
            done.record()
            self._ring.append((buffer, done))


class Launch:
    """The steps of one round: tables, ages and sums of the rows that are trained until the next switch.

    A row is one tensor or row block; rows are numbered by their position in the arguments.

    Args:
        numel: int64, elements of each row.
        offset: int64, where its state begins in the buffers of its weight dtype: a multiple of 64 elements.
        group: int64, its line of the table of hyperparameters.
        start: int64, index of its first element within the whole parameter; keys stochastic rounding.
        weight_dtypes: float32, bfloat16 or float16.
        grad_dtypes: The same; need not be those of the weights.
        state: Per weight dtype `exp_avg`, `exp_avg_sq` and, for 16-bit weights with a master, `master`:
            float32, 1-D, on 16 bytes. bfloat16 without master is rounded stochastically.
        device: Where all of it is.

    Attributes:
        control: float32[3] on the device: clip coefficient, ‖g‖ and 1 if the step was skipped, of the last
            step with `max_grad_norm` or `skip_nonfinite`.

    Raises:
        RuntimeError: For CPU tensors without the interpreter, or CUDA tensors within it.
        ValueError: For dtypes that the kernel does not know, or float16 weights without master.
    """

    def __init__(
        self,
        numel: Integers,
        offset: Integers,
        group: Integers,
        start: Integers,
        weight_dtypes: Sequence[torch.dtype],
        grad_dtypes: Sequence[torch.dtype],
        state: Mapping[torch.dtype, Mapping[str, Tensor]],
        device: torch.device,
    ) -> None:
        check(weight_dtypes, grad_dtypes, state, device)
        self._device = device
        self._state = state
        self._divisible = numel % 4 == 0
        pairs = list(zip(weight_dtypes, grad_dtypes, strict=True))
        self._pairs = list(dict.fromkeys(pairs))
        self._pair = np.array([self._pairs.index(pair) for pair in pairs], dtype=np.int64)
        # An empty row has a chunk too, which holds its age.
        self._chunks = np.maximum(-(-numel // CHUNK), 1)
        first_chunk = np.cumsum(self._chunks) - self._chunks
        self._row_of_chunk = np.repeat(np.arange(len(numel)), self._chunks)
        self._number = np.arange(len(self._row_of_chunk)) - first_chunk[self._row_of_chunk]

        # One array for rows and hyperparameters, so that one copy uploads both; the latter are float64.
        groups = int(group.max(initial=-1)) + 1
        row_table = len(numel) * kernels.ROW_COLUMNS.value
        self._tables = np.zeros(row_table + groups * kernels.HYPER_COLUMNS.value, dtype=np.int64)
        rows = self._tables[:row_table].reshape(-1, kernels.ROW_COLUMNS.value)
        rows[:, kernels.NUMEL.value] = numel
        rows[:, kernels.OFFSET.value] = offset
        rows[:, kernels.GROUP.value] = group
        rows[:, kernels.START.value] = start
        rows[:, kernels.FIRST_CHUNK.value] = first_chunk
        self._weights = rows[:, kernels.WEIGHT.value]
        self._grads = rows[:, kernels.GRAD.value]
        self._noise_keys = rows[:, kernels.KEY.value]
        self._hyper = self._tables[row_table:].view(np.float64).reshape(groups, kernels.HYPER_COLUMNS.value)
        self._sent = self._tables.copy()
        self._table_upload = Upload(self._tables, device)
        self._device_rows = self._table_upload.tensor[:row_table]
        self._device_hyper = self._table_upload.tensor[row_table:].view(torch.float64)

        chunks = len(self._number)
        self._ages = torch.zeros(chunks, dtype=torch.int32, device=device)
        self._sq_sums = torch.zeros(chunks, dtype=torch.float64, device=device)
        self._partials = torch.zeros(chunks, dtype=torch.float64, device=device)
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self._collected = torch.zeros(len(numel), 2, dtype=torch.float64, device=device)
        self.control = torch.zeros(kernels.CONTROL_COLUMNS.value, dtype=torch.float32, device=device)

        self._programs = np.zeros((chunks, 2), dtype=np.int32)
        self._group(self._divisible)
        self._program_upload = Upload(self._programs, device)

    def step(
        self,
        weights: npt.ArrayLike,
        grads: npt.ArrayLike,
        hyper: npt.ArrayLike,
        noise_keys: npt.ArrayLike | None = None,
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Update all rows that have a gradient, on the current stream; nothing waits for the device.

        Args:
            weights: `data_ptr()` of each row's weight.
            grads: `data_ptr()` of its gradient, 0 for none: weight, state, age and sum stay.
            hyper: lr, β₁, β₂, ε and weight decay of each group, shape (groups, 5).
            noise_keys: 32-bit key of each row for this step; for stochastic rounding.
            max_grad_norm: Scale gradients by min(1, max_grad_norm / (‖g‖ + 1e-6)), ‖g‖ over all rows.
            skip_nonfinite: Change nothing, ages and sums included, when ‖g‖² is NaN or infinite.
            grad_scale: What `GradScaler` multiplied the loss by, one float32 on the device, or None.
            found_inf: Change nothing where this is not 0, one float32 on the device, or None.
        """
        if not len(self._chunks):
            return
        self._weights[:] = weights
        self._grads[:] = grads
        self._hyper[:] = hyper
        if noise_keys is not None:
            self._noise_keys[:] = noise_keys
        aligned = self._divisible & ((self._weights | self._grads) & 15 == 0)
        regroup = not np.array_equal(aligned, self._aligned)
        if regroup:
            self._group(aligned)
        control = max_grad_norm is not None or skip_nonfinite
        scalars = float("inf") if max_grad_norm is None else float(max_grad_norm), int(skip_nonfinite)
        with self._on_device():
            self._program_upload.put(self._programs, regroup)
            self._table_upload.put(self._tables, not np.array_equal(self._tables, self._sent))
            np.copyto(self._sent, self._tables)
            if control:
                # The coefficient needs the norms of all buckets.
                for bucket in self._buckets:
                    self._launch(bucket, grad_scale, found_inf, *scalars, UPDATE=False, CONTROLLED=False)
            for bucket in self._buckets:
                self._launch(bucket, grad_scale, found_inf, *scalars, UPDATE=True, CONTROLLED=control)

    def collect(self) -> Tensor:
        """Return age and Σ‖g‖² since `clear_sums` of each row: float64 of shape (rows, 2), on the device.

        Every call returns the same tensor, with new values.
        """
        if len(self._chunks):
            with self._on_device():
                kernels.collect_kernel[(len(self._chunks),)](
                    self._device_rows, self._ages, self._sq_sums, self._collected, CHUNK=CHUNK, **OPTIONS
                )
        return self._collected

    def clear_sums(self) -> None:
        """Begin the sums of a round."""
        self._sq_sums.zero_()

    def set_ages(self, ages: Tensor) -> None:
        """Set how many updates each row has had; integers of shape (rows,), on any device."""
        chunks = torch.from_numpy(self._chunks).to(self._device)
        ages = ages.to(self._device, torch.int32)
        self._ages.copy_(torch.repeat_interleave(ages, chunks, output_size=len(self._ages)))

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _group(self, aligned: npt.NDArray[np.bool_]) -> None:
        """Sort the programs by bucket. Ages and sums stay where they are, being numbered by chunk."""
        self._aligned = aligned
        kind = (2 * self._pair + ~aligned)[self._row_of_chunk]
        order = np.argsort(kind, kind="stable")
        self._programs[:, 0] = self._row_of_chunk[order]
        self._programs[:, 1] = self._number[order]
        kinds, first, count = np.unique(kind[order], return_index=True, return_counts=True)
        self._buckets = [
            Bucket(self._pairs[kind // 2], kind % 2 == 0, first_program, programs)
            for kind, first_program, programs in zip(kinds.tolist(), first.tolist(), count.tolist(), strict=True)
        ]

    def _launch(self, bucket: Bucket, *arguments: Any, **flags: bool) -> None:
        grad_scale, found_inf, max_grad_norm, skip_nonfinite = arguments
        weight_dtype, grad_dtype = bucket.dtypes
        state = self._state[weight_dtype]
        kernels.step_kernel[(bucket.programs,)](
            self._program_upload.tensor,
            self._device_rows,
            self._device_hyper,
            state["exp_avg"],
            state["exp_avg_sq"],
            state.get("master"),
            self._ages,
            self._sq_sums,
            self._partials,
            self._arrived,
            self.control,
            grad_scale,
            found_inf,
            bucket.first_program,
            len(self._programs),
            max_grad_norm,
            skip_nonfinite,
            WEIGHT_DTYPE=DTYPES[weight_dtype],
            GRAD_DTYPE=DTYPES[grad_dtype],
            ALIGNED=bucket.aligned,
            BLOCK=BLOCK,
            BLOCKS=BLOCKS,
            maxnreg=MAX_REGISTERS[bucket.aligned],
            **flags,
            **OPTIONS,
        )


def check(
    weight_dtypes: Sequence[torch.dtype],
    grad_dtypes: Sequence[torch.dtype],
    state: Mapping[torch.dtype, Mapping[str, Tensor]],
    device: torch.device,
) -> None:
    """Raise what `Launch` raises."""
    if (device.type == "cpu") != bool(kernels.INTERPRETED):
        raise RuntimeError(
            f"the Triton kernels cannot run on {device}: they need CUDA tensors, or CPU tensors and "
            "TRITON_INTERPRET=1 in the environment before the import"
        )
    for dtype in {*weight_dtypes, *grad_dtypes}:
        if dtype not in DTYPES:
            raise ValueError(f"{dtype} must be one of {', '.join(map(str, DTYPES))}: use backend='reference'")
    if torch.float16 in weight_dtypes and "master" not in state[torch.float16]:
        raise ValueError("float16 weights must have a master: stochastic rounding is for bfloat16")
