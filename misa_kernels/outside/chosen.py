"""What does the user want trained, where flags may be those of a round: another run's, or that of a copied model?"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from misa_kernels.outside.copies import Marks, is_irregular

# The runs that have had parameters. Who has one is asked of them: to note it with each of 100,000 takes 0.2 s.
_runs: list[weakref.ref[Any]] = []


class Choice(NamedTuple):
    """What the user wants trained of some parameters.

    Attributes:
        flags: Whether each is.
        presumed: Positions of those not chosen of which that is a guess: whoever thaws the whole model means them, too.
        advice: What to warn of.
        runs: The living runs that have some of them.
    """

    flags: list[bool]
    presumed: set[int]
    advice: list[str]
    runs: list[Any]


def enlist(run: Any) -> None:
    """Note that a run has its parameters, until it ends."""
    _runs[:] = [*(other for other in _runs if other() is not None), weakref.ref(run)]


def choice_of(marks: Marks, layers: Sequence[Any] = ()) -> Choice:
    """Return what the user wants trained, whatever MISA has set on it or on what it is a copy of.

    Args:
        marks: Those of the model.
        layers: The layer of each parameter, where somebody knows.
    """
    params = marks.params
    runs = [run for run in (reference() for reference in _runs) if run is not None and run.ended is None]
    wanted = set(map(id, params)) if runs else set()
    if runs := [run for run in runs if not wanted.isdisjoint(map(id, run.flags.params))]:
        known: dict[int, bool] = {}
        for run in runs:
            known.update(zip(map(id, run.flags.params), run.flags.chosen_now(), strict=True))
        flags = [known.get(id(param), param.requires_grad) for param in params]
        advice = (
            f"MISA takes {len(params)} parameters over from an earlier one on the same model, which is released and "
            "can step no more: call release() on it first"
        )
        return Choice(flags, set(), [advice], runs)
    flags = [param.requires_grad for param in params]
    copied, is_certain = marks.recall({index for index, flag in enumerate(flags) if flag}) or (flags, True)
    if copied != flags and is_certain:
        advice = (
            "this model is a copy of one that MISA trained at that moment, so what was off in the round counts as "
            "trainable again: copy and save models within `with optimizer.thawed():`"
        )
        return Choice(copied, set(), [advice], [])
    if copied != flags or (layers and is_irregular(params, marks.names, layers, flags)):
        advice = (
            f"{sum(flags)} of {len(flags)} parameters require a gradient, other ones in each layer, as in a model that "
            "was copied or saved while MISA trained it, and the others will never be trained: call "
            "model.requires_grad_(True) before param_groups(model), and copy and save models within "
            "`with optimizer.thawed():`"
        )
        return Choice(flags, {index for index, flag in enumerate(flags) if not flag}, [advice], [])
    return Choice(flags, set(), [], [])
