"""What is trained where optimizers of the user's update it: their state enters, leaves and is saved as ours is.

`optimizer.state` shows it under names of its own, "rule.exp_avg" what the optimizer calls "exp_avg".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from misa_kernels.clock import Clock
from misa_kernels.kernels import Backend, Row, Step
from misa_kernels.kernels.foreign import PREFIX, RuledStep, Rules, shape_of
from misa_kernels.layout import Layout
from misa_kernels.memory.storage import Storage
from misa_kernels.options import Options
from misa_kernels.reference import Hyper
from misa_kernels.trained import Trained


class Ruled(Trained):
    """What `Trained` is, for `MISA(rule=...)`; the arguments are the same."""

    def __init__(
        self,
        layout: Layout,
        groups: list[dict[str, Any]],
        options: Options,
        storage: Storage,
        root: bool,
        clock: Clock,
    ) -> None:
        super().__init__(layout, groups, options, storage, root, clock)
        assert options.rule is not None
        shown: dict[int, dict[Any, Tensor]] = {}
        for slot in range(len(layout.blocks)):
            row = layout.row(slot)
            key = shape_of(row), torch.promote_types(row.param.dtype, torch.float32), row.param.device
            found = shown.setdefault(row.group, {})
            if key not in found:
                # As large as it looks, and without the memory.
                found[key] = torch.empty(1, dtype=key[1], device=key[2]).expand(key[0])
        self._rules = Rules(options.rule, groups, {number: found.values() for number, found in sorted(shown.items())})
        self.rule, self.defaults = self._rules.name, self._rules.defaults

    @property
    def nbytes(self) -> int:
        """Bytes of masters, residuals and what the optimizers keep, 0 before the first step."""
        return super().nbytes + (0 if self.arena is None else self._rules.nbytes)

    # A step.

    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Take one optimizer step on all tensors that have a gradient, and show what the optimizers keep of them."""
        super().update(grad_scale, found_inf)
        self._show_rules()

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
        assert self.arena is not None
        return RuledStep(list(self.rows.values()), self.arena, self._settings(), self._rules)

    # The state.

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

    def _show_rules(self) -> None:
        for slot, row in self.rows.items():
            own = self.state[row.param]
            for key in self._names(own, slot).values():
                own.drop(key)
            kept = self._rules.state_of(slot)
            own.put({self.layout.key(f"{PREFIX}{name}", slot): value for name, value in kept.items()})

    def _restore(self, row: Row, own: Mapping[str, Any]) -> None:
        super()._restore(row, own)
        self._put(row, own)

    def _take_over_state(self, row: Row, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        super()._take_over_state(row, own, saved)
        self._put(row, own)

    def _begin(self, row: Row) -> None:
        super()._begin(row)
        self._rules.put(row.slot, {})

    def forget(self) -> None:
        """Drop rows, arena and optimizers; what is in `state` counts from now on."""
        super().forget()
        self._rules.clear()

    def _put(self, row: Row, own: Mapping[str, Any]) -> None:
        """Let an optimizer go on with what the state holds of a row."""
        assert self.arena is not None
        device, group = self.arena.device, self._groups[row.group]
        # A count is read on the host, unless the optimizer was told otherwise, wherever a state dict was moved.
        stays = not (group.get("capturable") or group.get("fused"))
        kept = {}
        for name, key in self._names(own, row.slot).items():
            value = own[key]
            if isinstance(value, Tensor):
                value = value.to("cpu" if name == "step" and stays else device)
            kept[name] = value
        self._rules.put(row.slot, kept)
