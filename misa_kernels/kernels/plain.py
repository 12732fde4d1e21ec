"""How a round runs on the plain PyTorch of `misa_kernels.reference`, on any device."""

from __future__ import annotations

from collections.abc import Sequence

from misa_kernels import reference
from misa_kernels.arena import Arena
from misa_kernels.kernels.rows import Row, Settings, StepInput


class PlainStep:
    """The steps of one round; a backend as `misa_kernels.kernels` describes it.

    Args:
        rows: The tensors that are trained.
        arena: Their state, lent.
        settings: What holds for all steps.
    """

    # The reference reads moments and masters at age 0.
    reads_fresh_state = True

    def __init__(self, rows: Sequence[Row], arena: Arena, settings: Settings) -> None:
        self._rows = rows
        self._arena = arena
        self._settings = settings
        self._views = [arena.views(row.slot) for row in rows]

    def run(self, step: StepInput) -> None:
        """Update everything that has a gradient, and count it in the arena."""
        arena, settings = self._arena, self._settings
        present = []
        for row, views, grad in zip(self._rows, self._views, step.grads, strict=True):
            if grad is None:
                arena.sq_norm[row.slot].zero_()
                continue
            present.append(
                reference.Row(
                    exp_avg=views["exp_avg"],
                    exp_avg_sq=views["exp_avg_sq"],
                    master=views.get("master"),
                    age=arena.age[row.slot],
                    sq_norm=arena.sq_norm[row.slot],
                    v_floor=None if arena.v_floor is None or row.module is None else arena.v_floor[row.fellows[0]],
                    start=row.start,
                    theta=row.weight(),
                    grad=grad.reshape(-1)[row.start : row.stop],
                    hyper=step.hyper[row.group],
                    noise_key=step.noise_key(row) if settings.stochastic else None,
                )
            )
        finite = reference.adamw_step(
            present,
            max_grad_norm=settings.max_grad_norm,
            skip_nonfinite=settings.skip_nonfinite,
            grad_scale=step.grad_scale,
            found_inf=step.found_inf,
        )
        if settings.root:
            arena.root_of_squares(row.fellows for row in self._rows if row.slot == row.fellows[0])
        missing = {row.slot for row, grad in zip(self._rows, step.grads, strict=True) if grad is None}
        idle = [row.slot for row in self._rows if missing.issuperset(row.fellows)]
        arena.advance(missing, idle, finite)

    def collect(self) -> None:
        """Do nothing: the arena's counters are up to date after every step."""
