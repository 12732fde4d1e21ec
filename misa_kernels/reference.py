"""What one optimizer step computes, in plain PyTorch: the specification every kernel is tested against.

Imports nothing of ours. The arithmetic runs in float32, or in float64 for float64 weights; no operation
waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
Integers = TypeVar("Integers", int, Tensor, npt.NDArray[np.int64])


class Hyper(NamedTuple):
    """AdamW's hyperparameters of one param group; `lr` may be a 0-dim tensor."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(slots=True)
class Operands:
    """One tensor of a step: flat views of n elements each, and 0-dim views on the device.

    Attributes:
        exp_avg: m, of shape (n,) in float32, or in float64 for float64 weights.
        exp_avg_sq: v, like `exp_avg`.
        master: The weight in float32, of shape (n,), or None where the weight itself is enough.
        age: Updates since activation, 0-dim int32; read, never written here.
        sq_norm: Where ‖g‖² of this step goes, 0-dim float64.
        start: Index of the first element within the whole parameter; keys the rounding noise.
        theta: The weight, of shape (n,) in float32, float64, bfloat16 or float16.
        grad: The gradient, of shape (n,), any floating dtype.
        hyper: The hyperparameters of this step.
        noise_key: Key of stochastic rounding, or None for round to nearest.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    age: Tensor
    sq_norm: Tensor
    start: int
    theta: Tensor
    grad: Tensor
    hyper: Hyper
    noise_key: int | None


def adamw(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    decay: float | Tensor,
    step_size: Tensor,
    beta1: float,
    beta2: float,
    denom_scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (θ, m, v) after one AdamW update; decoupled decay, as in `torch.optim.AdamW`.

    Args:
        theta: The weight.
        g: The gradient, already clipped.
        m: First moment.
        v: Second moment.
        decay: 1 − lr · weight_decay.
        step_size: lr / (1 − β₁ᵗ).
        beta1: β₁.
        beta2: β₂.
        denom_scale: 1 / √(1 − β₂ᵗ).
        eps: ε.
    """
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    denom = denom_scale * v.sqrt() + eps
    theta = decay * theta - step_size * (m / denom)
    return theta, m, v


def adamw_step(
    rows: Sequence[Operands],
    *,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """Update every row in place and write the squared norm of its gradient.

    Args:
        rows: The tensors of the step. `theta`, `exp_avg`, `exp_avg_sq` and `master` are
            modified in place, `sq_norm` is overwritten with ‖g‖² before clipping; ages are left to the
            caller, who advances all of them at once.
        max_grad_norm: Scale all gradients by min(1, max_grad_norm / (‖g‖ + 1e-6)), ‖g‖ over all rows.
        skip_nonfinite: Leave everything but `sq_norm` as it was when ‖g‖² is NaN or infinite.
        grad_scale: Divide all gradients by it first, 0-dim; norms are of the quotients.
        found_inf: Leave everything but `sq_norm` as it was where it is nonzero, 0-dim.
        total: Makes ‖g‖² over all rows of those of the rows, a 0-dim tensor of a 1-D one; None: their sum.

    Returns:
        Where the step may be skipped a 0-dim bool on the device, whether it was applied; else None.
    """
    unscale = None if grad_scale is None else 1 / grad_scale.double()
    for row in rows:
        norm = torch.linalg.vector_norm(row.grad, dtype=torch.promote_types(row.grad.dtype, row.exp_avg.dtype)).double()
        row.sq_norm.copy_((norm if unscale is None else norm * unscale).square())
    sq_norms = [row.sq_norm for row in rows]
    coefficient, finite = scale_of(sq_norms, max_grad_norm, skip_nonfinite, unscale, found_inf, total)
    for row in rows:
        _update(row, coefficient, finite)
    return finite


def scale_of(
    sq_norms: Sequence[Tensor] | Tensor,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    unscale: Tensor | None,
    found_inf: Tensor | None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return what to multiply all gradients of a step by, and whether it is applied; None each where that is certain.

    Args:
        sq_norms: ‖g‖² of each tensor, 0-dim float64, after unscaling.
        max_grad_norm: As in `adamw_step`, and so are `skip_nonfinite`, `found_inf` and `total`.
        skip_nonfinite: Whether a nonfinite norm leaves the step out.
        unscale: One over `grad_scale`, 0-dim float64.
        found_inf: Nonzero where the step is left out.
        total: Makes ‖g‖² over all tensors of those of each.
    """
    coefficient, finite = unscale, None
    if len(sq_norms) and (max_grad_norm is not None or skip_nonfinite):
        sq_norm = (total or Tensor.sum)(torch.stack(list(sq_norms)))
        if skip_nonfinite:
            finite = sq_norm.isfinite()
        if max_grad_norm is not None:
            clip = (max_grad_norm / (sq_norm.sqrt() + 1e-6)).clamp(max=1.0)
            coefficient = clip if unscale is None else clip * unscale
    if found_inf is not None:
        found = found_inf == 0
        finite = found if finite is None else finite & found
    return coefficient, finite


def _update(row: Operands, coefficient: Tensor | None, finite: Tensor | None) -> None:
    compute_dtype = row.exp_avg.dtype
    g = row.grad.to(compute_dtype)
    if coefficient is not None:
        g = g * coefficient.to(compute_dtype)
    old = row.theta.to(compute_dtype)
    if row.master is not None:
        # Before its first update the weight is what counts, as for the kernels.
        old = torch.where(row.age > 0, row.master, old)
    h = row.hyper
    # In float64 and rounded once: 1 - beta2^t in float32 is off by 1e-5 at small t.
    t = row.age.double() + 1
    theta, m, v = adamw(
        old,
        g,
        row.exp_avg,
        row.exp_avg_sq,
        1 - h.lr * h.weight_decay,
        (h.lr / (1 - h.beta1**t)).to(compute_dtype),
        h.beta1,
        h.beta2,
        (1 - h.beta2**t).rsqrt().to(compute_dtype),
        h.eps,
    )
    if finite is not None:
        theta = torch.where(finite, theta, old)
        m = torch.where(finite, m, row.exp_avg)
        v = torch.where(finite, v, row.exp_avg_sq)
    row.exp_avg.copy_(m)
    row.exp_avg_sq.copy_(v)
    if row.master is not None:
        row.master.copy_(theta)
    store_weight(row.theta, theta, row.start, row.noise_key)


def momentum_flush(theta: Tensor, m: Tensor, v: Tensor, hyper: Hyper, age: Tensor) -> Tensor:
    """Return θ − lr · β₁/(1−β₁) · m̂ / (√v̂ + ε), the paper's line 16, or θ where the age is 0.

    Args:
        theta: The weight in the arithmetic dtype.
        m: First moment about to be discarded.
        v: Second moment.
        hyper: Hyperparameters of the last step; weight decay is not applied.
        age: Updates since activation, 0-dim; its bias corrections are those of the last step.
    """
    t = age.double().clamp(min=1)
    flush_size = hyper.lr * hyper.beta1 / (1 - hyper.beta1) / (1 - hyper.beta1**t)
    return torch.where(age > 0, theta - flush_size.to(m.dtype) * update_ratio(m, v, hyper, age), theta)


def update_ratio(m: Tensor, v: Tensor, hyper: Hyper, age: Tensor) -> Tensor:
    """Return m / (√v̂ + ε): the last update, weight decay apart, is lr / (1−β₁ᵗ) times this."""
    t = age.double().clamp(min=1)
    return m / ((1 - hyper.beta2**t).rsqrt().to(v.dtype) * v.sqrt() + hyper.eps)


def store_weight(target: Tensor, theta: Tensor, start: int, noise_key: int | None) -> None:
    """Write θ into `target` in the dtype of `target`, rounded to nearest or stochastically.

    Args:
        target: The weight, shape (n,); modified in place.
        theta: The new value, shape (n,), in the arithmetic dtype.
        start: Index of the first element within the whole parameter.
        noise_key: Key of the noise, or None for round to nearest, ties to even.
    """
    if noise_key is None or target.dtype == theta.dtype:
        target.copy_(theta)
        return
    index = torch.arange(start, start + theta.numel(), device=theta.device)
    target.copy_(round_stochastic(theta, target.dtype, noise16(index, noise_key)))


def round_stochastic(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Round float32 to one of its two neighbours in a 16-bit dtype, the nearer with higher probability.

    Args:
        x: float32, any shape. NaN and infinities are converted as they are.
        dtype: bfloat16 or float16.
        noise: Uniform integers in [0, 65536), the shape of `x`. For bfloat16 the result is that of
            adding them to the bits of `x` and truncating, except beyond its largest finite value, where
            `x` stays.
    """
    nearest = x.to(dtype)
    bits = nearest.view(torch.int16)
    below = (bits - (nearest.abs().to(x.dtype) > x.abs()).to(torch.int16)).view(dtype)
    above = (below.view(torch.int16) + 1).view(dtype)
    low, high = below.abs().to(x.dtype), above.abs().to(x.dtype)
    share = ((x.abs() - low) / (high - low) * 65536).to(torch.int64)
    rounded = torch.where(share + noise >= 65536, above, below)
    return torch.where(x.isfinite(), rounded, nearest)


def noise16(index: Tensor, key: int) -> Tensor:
    """Return 16 bits of noise for each element, from its index and a key alone (counter-based).

    Args:
        index: int64, element indices within the whole parameter, any shape.
        key: 32-bit key of this parameter and step, see `noise_key`.

    Returns:
        int64 in [0, 65536), the shape of `index`.
    """
    return noise32(index, key) & 0xFFFF


def noise32(index: Tensor, key: int) -> Tensor:
    """Return 32 bits of noise for each element, of which `noise16` is the lower half."""
    high = index >> 32
    # Beyond 2^32 elements the upper half of the index enters the key.
    keys = torch.where(high != 0, lowbias32(high ^ key), key)
    return lowbias32((index & MASK32) ^ keys)


def noise_key(seed: int, step: int, parameter: Integers) -> Integers:
    """Return the 32-bit key of one parameter's noise in one step, or those of many parameters, in their shape."""
    key = 0
    for word in (seed & MASK32, seed >> 32, step):
        key = lowbias32((key + 0x9E3779B9 & MASK32) ^ word & MASK32)
    return lowbias32((key + 0x9E3779B9 & MASK32) ^ parameter & MASK32)


def lowbias32(x: Integers) -> Integers:
    """Hash 32 bits to 32 bits; C. Wellons' constants, https://nullprogram.com/blog/2018/07/31/."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & MASK32
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & MASK32
    return x ^ (x >> 16)
