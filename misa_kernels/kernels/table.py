"""Which numbers of each row does a fused kernel read, and which does a round add up?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from misa_kernels.draw.candidates import Ints
from misa_kernels.memory.arena import sent
from misa_kernels.memory.storage import Storage

# Columns of the row table, int64: MisaRow of csrc/misa.h. A gradient pointer of 0 means that there is no gradient
# this step; the state begins at element `OFFSET` of its pool; `START` is the first element's index in the whole
# parameter, or in a slice that is pitched: whose lines of `WIDTH` elements begin `PITCH` elements apart.
WEIGHT, GRAD, NUMEL, OFFSET, GROUP, START, KEY, FIRST_CHUNK, WEIGHT_DTYPE, GRAD_DTYPE, ACTION = range(11)
WIDTH, PITCH, ROW_COLUMNS = range(11, 14)
# What `close` does with a row: MisaAction.
MEASURE, ADOPT, FLUSH, WRITE_BACK = 1, 2, 4, 8
# Stretches of rows.
ALL, NONE = slice(None), slice(0, 0)
# Columns of the table of hyperparameters, float64, one line a param group: MisaHyper.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, HYPER_COLUMNS = range(6)
# Columns of `control`, float32.
COEFFICIENT, NORM, SKIP, CONTROL_COLUMNS = range(4)
# Which half of a step with clipping or skipping to take: MisaFlag.
BOTH, NORMS, UPDATE = 0, 4, 8
# By the number that stands for them in the row table.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RowTable:
    """The tables, ages and sums of the rows that are trained until the next switch, for one kind of kernel.

    A row is one tensor or row block; rows are numbered by their position in the arguments. Every chunk of a row, the
    work of one program or thread, has its own age and its own sum of squares, written by it alone: no races, no
    atomics on floats.

    Args:
        numel: int64, elements of each row.
        offset: int64, where its state begins in the buffers of its weight dtype: a multiple of `codec.GROUP` elements.
        group: int64, its line of the table of hyperparameters.
        start: int64, index of its first element within the whole parameter, or within a pitched slice; keys stochastic
            rounding.
        weight_dtypes: Of `dtypes`.
        grad_dtypes: The same; need not be those of the weights.
        state: Per weight dtype the 1-D buffers of `Storage.buffers`, on 16 bytes. bfloat16 with neither master nor
            residual is rounded stochastically.
        storage: How moments are stored in them.
        device: Where all of it is.
        width: int64, elements of a line of each row's weight, where it is pitched; else 0. None: no row is.
        pitch: int64, elements from one line to the next; else 0.

    Attributes:
        name: What `backend=` calls the kernel.
        chunk: Elements of a chunk.
        dtypes: What the kernel can read and write.
        eager: Whether everybody who looks at `optimizer.state` finds it as it is after the last step, since nothing has
            to be waited for: counters are collected in every step, and moments of age 0 are there, though the kernels
            do not read them.
        collected: float64[rows, 2] on the device, what `collect` returns.
        chunks: int64[rows], the chunks of each row, on the host.
        sq_sums: float64[chunks] on the device, Σ‖g‖² of each since the beginning; for who adds up something else.
        control: float32[3] on the device: clip coefficient, ‖g‖ and 1 if the step was skipped, of the last
            step with `max_grad_norm` or `skip_nonfinite`.

    Raises:
        ValueError: For dtypes that the kernel does not know, or float16 weights without master.
    """

    name: str
    chunk: int
    eager = False
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __init__(
        self,
        numel: Ints,
        offset: Ints,
        group: Ints,
        start: Ints,
        weight_dtypes: Sequence[torch.dtype],
        grad_dtypes: Sequence[torch.dtype],
        state: Mapping[torch.dtype, Mapping[str, Tensor]],
        storage: Storage,
        device: torch.device,
        width: Ints | None = None,
        pitch: Ints | None = None,
    ) -> None:
        self._device, self._state, self._storage = device, state, storage
        self._open()
        for dtype in {*weight_dtypes, *grad_dtypes}:
            if dtype not in self.dtypes:
                raise ValueError(f"{dtype} must be one of {', '.join(map(str, self.dtypes))}: use backend='reference'")
        if torch.float16 in weight_dtypes and "master" not in state[torch.float16]:
            raise ValueError("float16 weights must have a master: stochastic rounding is for bfloat16")
        # An empty row has a chunk too, which holds its age.
        self._chunks = np.maximum(-(-numel // self.chunk), 1)
        self.chunks = torch.from_numpy(self._chunks)

        # One array for rows and hyperparameters, so that one copy uploads both; the latter are float64.
        groups = int(group.max(initial=-1)) + 1
        self._row_words = len(numel) * ROW_COLUMNS
        self._tables = np.zeros(self._row_words + groups * HYPER_COLUMNS, dtype=np.int64)
        self._rows = self._tables[: self._row_words].reshape(-1, ROW_COLUMNS)
        self._rows[:, NUMEL] = numel
        self._rows[:, OFFSET] = offset
        self._rows[:, GROUP] = group
        self._rows[:, START] = start
        self._rows[:, WIDTH] = 0 if width is None else width
        self._rows[:, PITCH] = 0 if pitch is None else pitch
        self._rows[:, FIRST_CHUNK] = np.cumsum(self._chunks) - self._chunks
        self._rows[:, WEIGHT_DTYPE] = [DTYPES.index(dtype) for dtype in weight_dtypes]
        self._rows[:, GRAD_DTYPE] = [DTYPES.index(dtype) for dtype in grad_dtypes]
        self._hyper = self._tables[self._row_words :].view(np.float64).reshape(groups, HYPER_COLUMNS)

        chunks = int(self._chunks.sum())
        self._ages = torch.zeros(chunks, dtype=torch.int32, device=device)
        self.sq_sums = torch.zeros(chunks, dtype=torch.float64, device=device)
        self._partials = torch.zeros(chunks, dtype=torch.float64, device=device)
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self.collected = torch.zeros(len(numel), 2, dtype=torch.float64, device=device)
        self.control = torch.zeros(CONTROL_COLUMNS, dtype=torch.float32, device=device)
        self._bind()

    def step(
        self,
        weights: npt.ArrayLike,
        grads: npt.ArrayLike,
        hyper: npt.ArrayLike | None,
        noise_keys: npt.ArrayLike | None = None,
        *,
        rows: slice = ALL,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Update all rows that have a gradient, on the current stream; nothing waits for the device.

        Args:
            weights: `data_ptr()` of each row's weight.
            grads: `data_ptr()` of its gradient, 0 for none: weight, state, age and sum stay.
            hyper: lr, β₁, β₂, ε and weight decay of each group, shape (groups, 5); None: as in the last call.
            noise_keys: 32-bit key of each row for this step; for stochastic rounding.
            rows: A stretch of the rows, where a step comes in several calls, the last of them with all or with none;
                the other arguments are for these. Not with `max_grad_norm` or `skip_nonfinite`.
            max_grad_norm: Scale gradients by min(1, max_grad_norm / (‖g‖ + 1e-6)), ‖g‖ over all rows.
            skip_nonfinite: Change nothing, ages and sums included, when ‖g‖² is NaN or infinite.
            grad_scale: What `GradScaler` multiplied the loss by, one float32 on the device, or None.
            found_inf: Change nothing where this is not 0, one float32 on the device, or None.
            total: Makes ‖g‖² of the sums of squares of the chunks, float64[chunks], a 0-dim float64 on the device: that
                of all processes which train together. None: their sum.
        """
        if not self._row_words:
            return
        self._fill(weights, hyper, noise_keys, rows)
        self._rows[rows, GRAD] = grads
        if total is None or (max_grad_norm is None and not skip_nonfinite):
            self._run(max_grad_norm, skip_nonfinite, grad_scale, found_inf, BOTH, rows)
            return
        self._run(max_grad_norm, skip_nonfinite, grad_scale, found_inf, NORMS)
        # What `write_control` of the kernels does, with another sum.
        sq_norm = total(self._partials)
        norm = sq_norm.sqrt()
        self.control[NORM] = norm
        if max_grad_norm is not None:
            self.control[COEFFICIENT] = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if skip_nonfinite:
            self.control[SKIP] = torch.maximum(self.control[SKIP], (~sq_norm.isfinite()).float())
        self._run(max_grad_norm, skip_nonfinite, grad_scale, found_inf, UPDATE)

    def collect(self) -> Tensor:
        """Return age and Σ‖g‖² of each row: float64 of shape (rows, 2), on the device.

        Every call returns the same tensor, with new values.
        """
        if self._row_words:
            self._collect()
        return self.collected

    def close(
        self,
        weights: npt.ArrayLike,
        hyper: npt.ArrayLike | None,
        actions: npt.ArrayLike,
        noise_keys: npt.ArrayLike | None = None,
    ) -> None:
        """Do with each row what its action says, at the end of a round: in place, in one pass, without workspace.

        A row of age 0 stays as it is: it has no state.

        Args:
            weights: As in `step`; looked at where there is an action.
            hyper: As in the last step.
            actions: Of each row, a sum of `ADOPT`, `FLUSH` and `WRITE_BACK`, or 0.
            noise_keys: 32-bit key of each row for the stochastic rounding of `WRITE_BACK`.
        """
        if not self._row_words:
            return
        self._fill(weights, hyper, noise_keys, ALL)
        self._rows[:, ACTION] = actions
        self._close(None)

    def measure(self, weights: npt.ArrayLike, hyper: npt.ArrayLike | None) -> Tensor:
        """Return Σ of the squares of each row's last update, weight decay apart, and of its weight: float64[2, rows].

        Args:
            weights: As in `step`.
            hyper: As in the last step.
        """
        moved = self.sq_sums.new_zeros(2, len(self.sq_sums))
        if not self._row_words:
            return moved
        self._fill(weights, hyper, None, ALL)
        self._rows[:, ACTION] = MEASURE
        self._close(moved)
        lengths = sent(self.chunks, self._device)
        return torch.stack([torch.segment_reduce(sums, "sum", lengths=lengths, unsafe=True) for sums in moved])

    def _fill(
        self, weights: npt.ArrayLike, hyper: npt.ArrayLike | None, noise_keys: npt.ArrayLike | None, rows: slice
    ) -> None:
        self._rows[rows, WEIGHT] = weights
        if hyper is not None:
            self._hyper[:] = hyper
        if noise_keys is not None:
            self._rows[rows, KEY] = noise_keys

    def set_ages(self, ages: Tensor) -> None:
        """Set how many updates each row has had; integers of shape (rows,), on any device."""
        chunks = sent(self.chunks, self._device)
        ages = ages.to(self._device, torch.int32)
        self._ages.copy_(torch.repeat_interleave(ages, chunks, output_size=len(self._ages)))

    def _open(self) -> None:
        """Refuse a device that the kernel does not run on, and load what says how large its chunks are."""

    def _bind(self) -> None:
        """Tell the kernel where the tables and the state are."""
        raise NotImplementedError

    def _run(
        self,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        half: int,
        rows: slice = ALL,
    ) -> None:
        """Take a step, or half of one, of some rows; of `NONE`, know that the step is complete."""
        raise NotImplementedError

    def _collect(self) -> None:
        """Write age and the sum over the chunks of each row into `collected`."""
        raise NotImplementedError

    def _close(self, moved: Tensor | None) -> None:
        """Do what the rows' actions say; of `MEASURE`, put the sums of each chunk into float64[2, chunks]."""
        raise NotImplementedError
