"""What differs from `LiveState` and `Updater` where optimizers of the user's update what is trained?

`optimizer.state` shows it under names of its own, "rule.exp_avg" what the optimizer calls "exp_avg".
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from misa_kernels.clock import Clock
from misa_kernels.kernels import Backend, Row, Step
from misa_kernels.kernels.ruled import RuledStep, shape_of
from misa_kernels.kernels.user_rules import PREFIX, Rules
from misa_kernels.memory.storage import Storage
from misa_kernels.options import ADAMW, ADAMW_ONLY, Options, check_range
from misa_kernels.reference import Hyper
from misa_kernels.run.layout import Layout
from misa_kernels.run.live import LiveState
from misa_kernels.run.updater import Updater


class RuledState(LiveState):
    """What `LiveState` is, with what the optimizers keep in the place of moments.

    Args:
        layout: What may be trained.
        storage: How state is stored.
        root: Whether scores add up ‖g‖ instead of ‖g‖².
        clock: Keys the noise of what is converted.
        groups: The optimizer's live `param_groups`.
        rules: The optimizers.
    """

    def __init__(
        self,
        layout: Layout,
        storage: Storage,
        root: bool,
        clock: Clock,
        groups: Sequence[Mapping[str, Any]],
        rules: Rules,
    ) -> None:
        super().__init__(layout, storage, root, clock)
        self._groups = groups
        self._rules = rules

    @property
    def nbytes(self) -> int:
        """Bytes of masters, residuals and what the optimizers keep, 0 before the first step."""
        return super().nbytes + (0 if self.arena is None else self._rules.nbytes)

    def _keys(self, own: Mapping[str, Any], slot: int) -> list[str]:
        return [*super()._keys(own, slot), *self._names(own, slot).values()]

    def _names(self, own: Mapping[str, Any], slot: int) -> dict[str, str]:
        """Return under which key an entry of the state holds what an optimizer calls by a name, of one slot."""
        suffix = self.layout.key("", slot)
        held = [key for key in own if key.startswith(PREFIX) and key.endswith(suffix)]
        return {key[len(PREFIX) : len(key) - len(suffix)]: key for key in held}

    def _drop(self, slot: int) -> None:
        super()._drop(slot)
        self._rules.forget(slot)

    def show_rules(self) -> None:
        """Show what the optimizers keep."""
        for slot, row in self.rows.items():
            own = self.state[row.param]
            for key in self._names(own, slot).values():
                own.drop(key)
            kept = self._rules.state_of(slot)
            own.put({self.layout.key(f"{PREFIX}{name}", slot): value for name, value in kept.items()})

    def _restore(self, row: Row, own: Mapping[str, Any]) -> None:
        super()._restore(row, own)
        self._put(row, own)

    def _take_over(self, row: Row, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        super()._take_over(row, own, saved)
        if self._rules.state_of(row.slot).keys() <= self._names(own, row.slot).keys():
            self._put(row, own)
        else:
            # Something was deleted.
            self._begin(row)

    def _begin(self, row: Row) -> None:
        super()._begin(row)
        self._rules.put(row.slot, {})

    def check(self) -> None:
        """Refuse what does not fit; see `LiveState.check`."""
        super().check()
        for slot, row in self.rows.items():
            own: Mapping[str, Any] = self.state.get(row.param, {})
            for name, kept in self._rules.state_of(slot).items():
                value = own.get(self.layout.key(f"{PREFIX}{name}", slot))
                if isinstance(value, Tensor) and isinstance(kept, Tensor) and value.shape != kept.shape:
                    raise ValueError(
                        f"optimizer.state has {PREFIX + name!r} of shape {tuple(value.shape)} for "
                        f"{self.layout.name_of(slot)}, where {tuple(kept.shape)} belongs: write as many, or delete the "
                        "entry to begin anew"
                    )

    def _put(self, row: Row, own: Mapping[str, Any]) -> None:
        """Let an optimizer go on with what the state holds of a row."""
        assert self.arena is not None
        device, group = self.arena.device, self._groups[row.group]
        # A count is read on the host, unless the optimizer was told otherwise, wherever a state dict was moved.
        stays = not (group.get("capturable") or group.get("fused"))
        kept = {}
        for name, key in self._names(own, row.slot).items():
            place = "cpu" if name == "step" and stays else device
            kept[name] = tree_map_only(Tensor, partial(Tensor.to, device=place), own[key])
        self._rules.put(row.slot, kept)

    def forget(self) -> None:
        """Drop rows, arena and optimizers; what is in `state` counts from now on."""
        super().forget()
        self._rules.clear()


class RuledUpdater(Updater):
    """What `Updater` is, for `MISA(rule=...)`.

    Args:
        live: Rows and state.
        groups: The optimizer's live `param_groups`, which have the hyperparameters of the rule.
        options: Its other arguments.
        clock: The position.
        rules: The optimizers.
    """

    live: RuledState

    def __init__(
        self, live: RuledState, groups: list[dict[str, Any]], options: Options, clock: Clock, rules: Rules
    ) -> None:
        super().__init__(live, groups, options, clock)
        self._rules = rules
        self.rule, self.defaults = rules.name, rules.defaults

    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Take one optimizer step on all tensors that have a gradient, and show what the optimizers keep of them."""
        super().update(grad_scale, found_inf)
        self.live.show_rules()

    def before_last(self) -> None:
        """Before the last step of a round, let it note how far it moves each tensor, too."""
        super().before_last()
        assert isinstance(self._step, RuledStep)
        self._step.is_measured = True

    def _hyper_now(self) -> list[Hyper]:
        # AdamW's, which nothing here reads.
        return [Hyper(0.0, 0.0, 0.0, 0.0, 0.0)] * len(self._groups)

    def _select(self, device: torch.device, dtypes: Collection[torch.dtype]) -> Backend:
        return RuledStep

    def _made(self) -> Step:
        assert self.live.arena is not None
        return RuledStep(list(self.live.rows.values()), self.live.arena, self._settings(), self._rules)

    def move(self, layout: Layout, kept: Container[tuple[int, int]]) -> None:
        """Go on with another layout, and let what was counted in groups begin anew; see `Updater.move`."""
        super().move(layout, kept)
        self._drop_counts()

    def load(
        self,
        own: Mapping[Tensor, Mapping[str, Any]],
        storage: Storage,
        hyperparameters: Sequence[Mapping[str, Any]],
    ) -> None:
        """Drop all state and all counts, and take over what was saved; see `Updater.load`."""
        self._drop_counts()
        super().load(own, storage, hyperparameters)

    def _drop_counts(self) -> None:
        for number in range(len(self._groups)):
            self._rules.drop_counts(number)


def ruled_updater(
    layout: Layout, groups: list[dict[str, Any]], options: Options, storage: Storage, root: bool, clock: Clock
) -> RuledUpdater:
    """Return what updates by `options.rule`, after checks of what that makes of the parameters and of the groups."""
    assert options.rule is not None
    given = [set(group) for group in groups]
    shapes: list[dict[Any, None]] = [{} for _ in groups]
    for row in map(layout.row, range(len(layout.blocks))):
        shapes[row.group][shape_of(row), row.param.dtype, row.param.device] = None
    shown = []
    for group, own in zip(groups, shapes, strict=True):
        kinds = own or dict.fromkeys((param.shape, param.dtype, param.device) for param in group["params"])
        shown.append(([_looking_like(*kind) for kind in kinds if kind[1].is_floating_point], bool(own)))
    rules = Rules(options.rule, groups, shown)
    for number, (group, names) in enumerate(zip(groups, rules.names, strict=True)):
        _check_group(number, group, given[number] - names if shown[number][1] else set(), rules.name)
    return RuledUpdater(RuledState(layout, storage, root, clock, groups, rules), groups, options, clock, rules)


def _looking_like(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor as large as what stands in for a weight, and without the memory."""
    return torch.empty(1, dtype=torch.promote_types(dtype, torch.float32), device=device).expand(tuple(shape))


def _check_group(number: int, group: Mapping[str, Any], others: Collection[str], rule: str) -> None:
    """Check the lr of a group that a rule updates, and refuse what would do nothing there.

    Args:
        number: Of the group.
        group: With the rule's hyperparameters.
        others: Names that the user has in it and the rule has not.
        rule: What updates.
    """
    if isinstance(group["lr"], (Real, Tensor)):
        check_range("lr", group["lr"], 0.0, math.inf, "a number >= 0")
    for name in (*ADAMW, *Options.__dataclass_fields__, *ADAMW_ONLY):
        if name in others:
            raise ValueError(
                f"{name}={group[name]!r} stands in param group {number} and is nothing that {rule} has: leave it out"
            )
