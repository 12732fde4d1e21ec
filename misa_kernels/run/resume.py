"""How is a run saved, resumed from a saved state, begun anew, copied? What a state holds is in `checkpoint.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from misa_kernels.draw.sampler import described
from misa_kernels.outside.tracing import not_traced, refuse_capture
from misa_kernels.run import checkpoint
from misa_kernels.run.run import Run


@not_traced
def prepare_to_save(run: Run) -> None:
    """Bring weights, masters and `state` into agreement."""
    refuse_capture("state_dict()")
    run.follow()
    if run.ended is None:
        run.reconcile()
        run.updater.adopt()


@not_traced
def complete(run: Run, state_dict: dict[str, Any]) -> None:
    """Make a state dict, as torch makes it, independent of the arena, and add the position of the run."""
    clock = replace(run.clock, skipped_steps=run.skipped_steps)
    order = run.order.names if run.order.is_told else None
    checkpoint.write(state_dict, run.updater, clock, run.scores.unheard(), _given(run), order)


@not_traced
@torch.no_grad()
def load(run: Run, state_dict: dict[str, Any]) -> None:
    """Resume from a saved state; see `MISA.load_state_dict`."""
    if run.ended is not None:
        raise RuntimeError(f"load_state_dict() came after {run.ended}: construct a new MISA and load into that")
    refuse_capture("load_state_dict()")
    run.follow()
    saved = checkpoint.read(state_dict, run.groups, run.layout, run.scores, run.updater.rule)
    if saved.order is not None and saved.order != run.layout.partition.layers:
        _reorder(run, saved.order)
    made = f" ('auto' with total_steps={run.given.total_steps})" if run.given.inner_steps == "auto" else ""
    saved.warn_of_differences(run.storage, _given(run), made)

    for name in checkpoint.CLOCK:
        setattr(run.clock, name, saved.position[name])
    run.scores.load(saved.scores, saved.position.get("unheard", ()))
    run.updater.load(saved.own, saved.storage, saved.hyperparameters)
    run.scores.show(run.live.state)
    run.show(saved.active)
    run.record(run.draw())


@not_traced
@torch.no_grad()
def reset(run: Run) -> None:
    """Forget all that gradients have told, and begin the round anew; see `MISA.reset_state`."""
    if run.ended is not None:
        raise RuntimeError(f"reset_state() came after {run.ended}: construct a new MISA, which knows nothing yet")
    refuse_capture("reset_state()")
    if run.updater.is_within_step:
        raise RuntimeError(
            "reset_state() came between backward() and step() with release_gradients=True, when some weights are "
            "updated and others are not: call it after step()"
        )
    run.follow()
    if run.live.arena is not None:
        run.live.arena.erase()
    run.updater.load({}, run.storage, [{} for _ in run.groups])
    run.scores.forget()
    run.monitor.rounds.clear()
    run.clock.round_step = run.clock.skipped_steps = 0
    if not run.flags.lent:
        run.flags.compare()
    # As at the end of a round.
    layout, is_paused = run.lay_out_anew(run.flags.due)
    if layout is not None:
        run.move(layout)
    draw = run.draw()
    run.settle(set(), run.active if is_paused else draw.active)
    run.record(draw)


def _given(run: Run) -> tuple[int, str, float]:
    """Return what a run was given of `checkpoint.GIVEN`."""
    return run.inner_steps, described(run.sampler), float(run.given.delta)


def _reorder(run: Run, names: Sequence[str]) -> None:
    """Number the layers as another run has seen them run; modules and state stay as they are."""
    run.order.take(names)
    places = run.layout.places_of(run.active.tolist())
    run.move(run.lay_out())
    run.settle(places, run.active)


def to_copy(run: Run, state_dict: Callable[[], dict[str, Any]]) -> tuple[Any, ...]:
    """Return what `resume_copy` needs: flags, whether the run was rehearsed, and its state unless it has ended."""
    return *run.flags.choices(), run.is_rehearsed, None if run.ended is not None else state_dict()


def resume_copy(
    run: Run, held: dict[str, Any], shown: set[int], is_rehearsed: bool, state_dict: dict[str, Any] | None
) -> None:
    """Go on as the run whose `to_copy` this is, in a new run on copies of its parameters."""
    run.is_rehearsed = is_rehearsed
    if state_dict is None:
        run.release()
    else:
        load(run, state_dict)
    run.flags.choose(held, shown)
