"""Is the step right on this device? What is timed, beside float64, plain PyTorch and the CPU library.

A result counts as right where its error against float64 is at most twice that of plain PyTorch in the same dtypes: the
root of the mean square over all elements and steps, and the largest relative error of a row's ‖g‖². No element may be
off by more than twice plain PyTorch's largest error. So no tolerance is set by hand.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.step.peers import BF16, FP32, MAX_NORM, misa
from benchmarks.step.sliced import SlicedStep, bits, differing_bits
from benchmarks.step.update import failure
from misa_kernels import MISA
from misa_kernels.kernels import native
from misa_kernels.memory.storage import KEYS, Storage

# Around the vectors, the groups of scales and the chunks of every kernel, and more than one chunk.
SIZES = (1, 3, 15, 127, 128, 1023, 4097, 8191, 8192, 8193, 32_769, 100_003)
# Elements by which some rows lie off their alignment.
SHIFT = 1
# Matrices, and their columns that are trained where slices are: widths and heights around vectors, lines and chunks.
SLICED = [
    (300, 5, (2, 3)),
    (2100, 64, (16, 32)),
    (700, 50, (1, 49)),
    (340, 101, (0, 100)),
    (70, 1024, (512, 768)),
    (2, 33_001, (1, 33_001)),
    (129, 144, (0, 144)),
]
# Elements around every weight that must stay as they are.
GUARD = 64
STEPS = 3
# So large that a step shows in bfloat16.
LR, BETAS, EPS, WEIGHT_DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1
TIMES_PLAIN = 2.0


@dataclass(frozen=True)
class Variant:
    """A way in which MISA steps.

    Attributes:
        dtype: Of weights and gradients.
        options: Arguments of MISA.
        backend: Who runs it on a GPU.
        sliced: Whether columns of matrices are trained, which must have the bits of matrices of their own.
    """

    dtype: torch.dtype
    options: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "triton"
    sliced: bool = False

    @property
    def exact(self) -> bool:
        """Whether the CPU library gives the same bits: without a norm, and without the quick division of codes."""
        return "max_grad_norm" not in self.options and "state_dtype" not in self.options and self.dtype in (FP32, BF16)


STOCHASTIC, CLIP = {"param_precision": "stochastic"}, {"max_grad_norm": MAX_NORM}
# In the order of their worth, those that are timed by the names that they have in `PEERS` and `FORMATS`.
VARIANTS = {
    "bf16 misa": Variant(BF16),
    "fp32 misa": Variant(FP32),
    "bf16 misa stochastic": Variant(BF16, STOCHASTIC),
    "bf16 misa int8": Variant(BF16, STOCHASTIC | {"state_dtype": "int8"}),
    "bf16 misa clip": Variant(BF16, CLIP),
    "fp32 misa clip": Variant(FP32, CLIP),
    "bf16 misa cuda": Variant(BF16, backend="cuda"),
    "fp32 misa cuda": Variant(FP32, backend="cuda"),
    "bf16 misa cuda clip": Variant(BF16, CLIP, "cuda"),
    "bf16 misa slices": Variant(BF16, sliced=True),
    "fp32 misa slices": Variant(FP32, sliced=True),
    "bf16 misa slices cuda": Variant(BF16, backend="cuda", sliced=True),
    "bf16 misa split": Variant(BF16, {"param_precision": "split"}),
    "bf16 misa int8 master": Variant(BF16, {"state_dtype": "int8"}),
    "bf16 misa int8 split": Variant(BF16, {"param_precision": "split", "state_dtype": "int8"}),
    "bf16 misa bf16": Variant(BF16, STOCHASTIC | {"state_dtype": "bf16"}),
    "bf16 misa fp8": Variant(BF16, STOCHASTIC | {"state_dtype": "fp8"}),
    "bf16 misa int8+int4": Variant(BF16, STOCHASTIC | {"state_dtype": "int8+int4"}),
    "fp16 misa": Variant(torch.float16),
}
# What the stage `first` looks at: what users get, and what is timed there.
FIRST = tuple(VARIANTS)[:14]


class Rows:
    """Matrices of one row each, amid memory that must stay as it is, and their gradients of every step."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._held: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.gradients: list[list[Tensor | None]] = [[] for _ in range(STEPS)]
        for number, size in enumerate(SIZES):
            # Every third lies off its alignment by its weight, every third by its gradient.
            drawn = torch.randn(size, generator=generator)
            weight = self._amid(drawn.to(device, dtype), SHIFT * (number % 3 == 1))
            self.weights.append(weight.requires_grad_())
            for step in range(STEPS):
                drawn = torch.randn(size, generator=generator) * 10.0 ** (number % 4 - 2)
                gradient = self._amid(drawn.to(device, dtype), SHIFT * (number % 3 == 2))
                # An expert that got no token: weight, state and age stay.
                self.gradients[step].append(None if (number, step) == (5, 1) else gradient)

    def _amid(self, values: Tensor, shift: int) -> Tensor:
        held = torch.full((len(values) + 2 * GUARD + shift,), math.nan, dtype=values.dtype, device=values.device)
        inner = held[GUARD + shift : GUARD + shift + len(values)]
        inner.copy_(values)
        self._held.append(held)
        return inner.view(1, -1).detach()

    def spoilt(self) -> int:
        """Return how many elements around weights and gradients were written to."""
        counts = []
        for held, part in zip(self._held, self._parts(), strict=True):
            # What is no number was put there, and what is one belongs to the row.
            counts.append(int((~held.isnan()).sum()) - part.numel())
        return sum(map(abs, counts))

    def _parts(self) -> Iterator[Tensor]:
        for number, weight in enumerate(self.weights):
            yield weight
            for step in range(STEPS):
                gradient = self.gradients[step][number]
                yield weight if gradient is None else gradient


def exact_steps(
    weights: Sequence[Tensor], gradients: Sequence[Sequence[Tensor | None]], max_norm: float | None
) -> Iterator[tuple[dict[str, Tensor], list[float]]]:
    """Yield θ, m and v of all rows, one after the other, and each row's Σ‖g‖², after each step of AdamW in float64."""
    theta = [weight.detach().double().view(-1) for weight in weights]
    m, v = ([torch.zeros_like(x) for x in theta] for _ in range(2))
    age, squares = [0] * len(theta), [0.0] * len(theta)
    for given in gradients:
        present = [None if g is None else g.double().view(-1) for g in given]
        norm = math.sqrt(sum(float(g.square().sum()) for g in present if g is not None))
        coefficient = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        for i, g in enumerate(present):
            if g is None:
                continue
            squares[i] += float(g.square().sum())
            age[i] += 1
            g = g * coefficient
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
            unbiased_m, unbiased_v = m[i] / (1 - BETAS[0] ** age[i]), v[i] / (1 - BETAS[1] ** age[i])
            theta[i] = theta[i] * (1 - LR * WEIGHT_DECAY) - LR * unbiased_m / (unbiased_v.sqrt() + EPS)
        yield {"theta": torch.cat(theta), "m": torch.cat(m), "v": torch.cat(v)}, list(squares)


def make(rows: Rows, variant: Variant, backend: str) -> MISA:
    """Return MISA of all rows in one endless round, with the hyperparameters of `exact_steps`."""
    optimizer = misa(rows.weights, backend=backend, **variant.options)
    for group in optimizer.param_groups:
        group.update(lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    return optimizer


def take_step(rows: Rows, optimizer: MISA, step: int) -> None:
    """Take a step with the gradients of `rows`."""
    for weight, gradient in zip(rows.weights, rows.gradients[step], strict=True):
        weight.grad = gradient
    optimizer.step()


def reached(rows: Rows, optimizer: MISA, variant: Variant) -> dict[str, Tensor]:
    """Return θ, m and v of all rows as they are stored, decoded to float32 and one after the other."""
    options = variant.options
    storage = Storage(options.get("state_dtype", "fp32"), options.get("param_precision", "master"))
    found: dict[str, list[Tensor]] = {"theta": [], "m": [], "v": []}
    for weight in rows.weights:
        own, flat = optimizer.state[weight], weight.detach().reshape(-1)
        views = {name: own[name].reshape(-1) for name in KEYS if name in own}
        found["theta"].append(storage.theta(views, flat).float())
        found["m"].append(storage.decode("exp_avg", views, len(flat)).float())
        found["v"].append(storage.decode("exp_avg_sq", views, len(flat)).float())
    return {name: torch.cat(parts) for name, parts in found.items()}


def check(name: str, device_type: str) -> dict[str, Any]:
    """Step in one variant, and return what was found.

    Args:
        name: A key of `VARIANTS`.
        device_type: "cuda", or "cpu" for the C++ library in the place of the GPU's kernels.

    Returns:
        "ok"; "backend", what ran it; "times_plain", the error over plain PyTorch's, of θ, m, v and ‖g‖²; of the first
        three "wrong" elements, and "differing", the share that is not plain PyTorch's; "spoilt" elements around the
        rows; "other_bits" than the CPU library's, or None where those may be others, or why that is open. "ok" and
        "error" for what failed. Of slices "backend", "other_bits" and "spoilt" alone.
    """
    variant, device = VARIANTS[name], torch.device(device_type)
    backend = variant.backend if device.type == "cuda" else "auto"
    try:
        if variant.sliced:
            return check_slices(variant.dtype, device, backend)
        ours, plain = Rows(variant.dtype, device), Rows(variant.dtype, device)
        exact = exact_steps(ours.weights, ours.gradients, variant.options.get("max_grad_norm"))
        runs = [(ours, make(ours, variant, backend)), (plain, make(plain, variant, "reference"))]
        found = compare(runs, exact, variant)
        found["other_bits"] = other_bits(ours, runs[0][1], variant) if variant.exact else None
    # Whatever one variant fails at, the others are looked at; the record shows the failure.
    except Exception as error:
        return {"ok": False} | failure(error)
    found["ok"] = (
        all(ratio <= TIMES_PLAIN for ratio in found["times_plain"].values())
        and not any(found["wrong"].values())
        and found["spoilt"] == 0
        and not (isinstance(found["other_bits"], int) and found["other_bits"])
    )
    return found


def check_slices(dtype: torch.dtype, device: torch.device, backend: str) -> dict[str, Any]:
    """Step columns of matrices, and as many matrices of their own in the CPU library; return as `check` does."""
    generator, storage = torch.Generator().manual_seed(0), Storage()
    wide = [torch.randn(height, pitch, generator=generator).to(dtype) for height, pitch, _ in SLICED]
    spans = [span for *_, span in SLICED]
    alone = [matrix[:, a:b].contiguous() for matrix, (a, b) in zip(wide, spans, strict=True)]
    held = [matrix.to(device, copy=True) for matrix in wide]
    ours = SlicedStep(held, spans, backend, storage)
    theirs = SlicedStep(alone, [(0, matrix.shape[1]) for matrix in alone], "cpu", storage)
    for step in range(STEPS):
        drawn = [torch.randn(matrix.shape, generator=generator).to(dtype) for matrix in alone]
        ours.gradients, theirs.gradients = [x.to(device) for x in drawn], drawn
        if step == 1:
            # An expert that got no token: weight, state and age stay.
            ours.gradients[1] = theirs.gradients[1] = None
        ours.step()
        theirs.step()
    spoilt = 0
    for matrix, before, (a, b) in zip(held, wide, spans, strict=True):
        changed = bits(matrix) != bits(before)
        spoilt += int(changed.view(matrix.shape)[:, [*range(a), *range(b, matrix.shape[1])]].sum())
    other = differing_bits(ours, theirs)
    return {"ok": not other and not spoilt, "backend": ours.backend, "other_bits": other, "spoilt": spoilt}


def compare(runs: Sequence[tuple[Rows, MISA]], exact: Iterator[Any], variant: Variant) -> dict[str, Any]:
    """Take the steps of two runs, ours and plain PyTorch's, beside the exact ones; see `check`."""
    errors = [{key: 0.0 for key in ("theta", "m", "v")} for _ in runs]
    wrong, differing, elements = dict.fromkeys(errors[0], 0), dict.fromkeys(errors[0], 0), 0
    squares: list[float] = []
    for step, (wanted, so_far) in enumerate(exact):
        squares = so_far
        states = []
        for rows, optimizer in runs:
            take_step(rows, optimizer, step)
            states.append(reached(rows, optimizer, variant))
        elements += len(wanted["theta"])
        for key, target in wanted.items():
            off, plainly = ((state[key].double() - target).abs() for state in states)
            # So that NaN counts as wrong, of either: what plain PyTorch gets wrong says nothing.
            limit = TIMES_PLAIN * plainly.max()
            wrong[key] += int((~((off <= limit) & limit.isfinite())).sum())
            differing[key] += int((states[0][key] != states[1][key]).sum())
            for total, error in zip(errors, (off, plainly), strict=True):
                total[key] += float(error.square().sum())
    for total, (rows, optimizer) in zip(errors, runs, strict=True):
        # Brings the scores up to date.
        optimizer.state_dict()
        scores = [float(optimizer.state[weight]["score_sum"]) for weight in rows.weights]
        total["norm"] = max((a / b - 1) ** 2 for a, b in zip(scores, squares, strict=True))
    return {
        "backend": runs[0][1].backend,
        "times_plain": {key: ratio(errors[0][key], errors[1][key]) for key in errors[0]},
        "wrong": wrong,
        "differing": {key: count / elements for key, count in differing.items()},
        "spoilt": runs[0][0].spoilt(),
    }


def ratio(ours: float, plain: float) -> float:
    """Return the ratio of two errors whose squares are given; 0 / 0 is 1."""
    return math.sqrt(ours / plain) if plain else 1.0 if ours == 0 else math.inf


def other_bits(rows: Rows, optimizer: MISA, variant: Variant) -> int | str:
    """Return how many elements of weights and state have other bits than the CPU library gives, or why that is open."""
    reason = native.unusable("cpu")
    if reason is not None:
        return f"the CPU library {reason}"
    peer = Rows(variant.dtype, torch.device("cpu"))
    theirs = make(peer, variant, "cpu")
    for step in range(STEPS):
        take_step(peer, theirs, step)
    count = 0
    for a, b in zip(rows.weights, peer.weights, strict=True):
        pairs = [(a.detach(), b.detach())]
        pairs += [(optimizer.state[a][key], theirs.state[b][key]) for key in KEYS if key in theirs.state[b]]
        count += sum(int((bits(x) != bits(y)).sum()) for x, y in pairs)
    return count


def excused(peer: dict[str, Any]) -> bool:
    """Return whether what failed is for want of memory or of the CUDA library."""
    return str(peer.get("error", "")).startswith(("OutOfMemoryError", "ValueError: backend='cuda'"))


def check_all(names: Sequence[str], device: torch.device) -> Iterator[dict[str, dict[str, Any]]]:
    """Check variants, several at a time, since Triton compiles each for a second; yield what is known so far.

    Each has a process of its own: one that dies, or leaves the device in an error, says nothing of the others.
    """
    found: dict[str, dict[str, Any]] = {}
    workers = min(len(names), 8, max(2, (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(checked_apart, name, device.type): name for name in names}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            yield {name: found[name] for name in names if name in found}


def checked_apart(name: str, device_type: str) -> dict[str, Any]:
    """Return what `check` finds in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu.first.parity", name, device_type]
    # On a CPU threads would wait for those of the other processes.
    done = subprocess.run(
        command, cwd=record.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    try:
        return {"ok": False} | json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1][:200]
        return {"ok": False, "error": f"exit code {done.returncode}: {last}"}


def measure(device: torch.device, deadline: float, so_far: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the variants looked at under "variants"; a part of the stage `first`."""
    # On a CPU the GPU library's would be the same once more.
    wanted = [name for name in FIRST if device.type == "cuda" or VARIANTS[name].backend != "cuda"]
    for variants in check_all(wanted, device):
        yield {"variants": variants, "wanted": wanted}


if __name__ == "__main__":
    print(json.dumps(check(*sys.argv[1:])))
