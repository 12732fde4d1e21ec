"""When, within backward, is a gradient complete, and which rows can be updated then?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from misa_kernels.kernels import Row

# Gradients of so many bytes are worth a launch, and so is each module where a backward pass has no more than these;
# else small ones wait for others, or for the end of backward.
HELD_BYTES, LAUNCHES = 1 << 18, 32


def hooked(param: Tensor, hook: Callable[[Tensor], None]) -> Any:
    """Register a hook for complete gradients; torch takes none while a parameter requires no gradient."""
    required = param.requires_grad
    param.requires_grad_(True)
    handle = cast(Any, param).register_post_accumulate_grad_hook(hook)
    param.requires_grad_(required)
    return handle


@dataclass(slots=True)
class Waiting:
    """A module of this round.

    Attributes:
        rows: Its stretch of the rows.
        params: Those that it has rows of.
        nbytes: Of their gradients.
        missing: How many of these have not come since the last step.
        is_updated: Whether it was updated since then.
    """

    rows: slice
    params: list[nn.Parameter]
    nbytes: int
    missing: int = 0
    is_updated: bool = False


class Arrivals:
    """The gradients that have come since the last step, module by module, for `release_gradients`.

    Rows of a module are neighbours, and so one stretch of the kernels' table. A parameter may have rows in several
    modules, which are its row blocks; its gradient is free when all of them are updated. Parameters are told apart by
    their `id`: torch's own hash of them takes longer than all the rest.

    Args:
        rows: What is trained in this round.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._modules: list[Waiting] = []
        self._of: dict[int, list[Waiting]] = {}
        first = 0
        while first < len(rows):
            stretch = slice(first, first + len(rows[first].fellows))
            params = list({id(row.param): row.param for row in rows[stretch]}.values())
            module = Waiting(stretch, params, sum(param.nbytes for param in params))
            self._modules.append(module)
            for param in params:
                self._of.setdefault(id(param), []).append(module)
            first = stretch.stop
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        for module in self._modules:
            module.missing, module.is_updated = len(module.params), False
        self._left = {param: len(modules) for param, modules in self._of.items()}
        self._arrived: set[int] = set()
        self._complete: list[Waiting] = []
        self._held_bytes = 0

    def __bool__(self) -> bool:
        """Whether a gradient has come since the last step."""
        return bool(self._arrived)

    def has(self, param: Tensor) -> bool:
        """Whether the gradient of a parameter has come since the last step."""
        return id(param) in self._arrived

    @property
    def is_waiting(self) -> bool:
        """Whether modules are complete that were not updated."""
        return bool(self._complete)

    def note(self, param: Tensor) -> bool:
        """Note a gradient; return whether what is complete by now is worth a launch."""
        self._arrived.add(id(param))
        for module in self._of.get(id(param), ()):
            module.missing -= 1
            if not module.missing:
                self._complete.append(module)
                self._held_bytes += module.nbytes
        waiting = len(self._complete)
        return self._held_bytes >= HELD_BYTES or 0 < waiting >= len(self._modules) / LAUNCHES

    def use(self) -> Iterator[slice]:
        """Give the stretches of rows that are complete, to be updated, and free their gradients after each."""
        complete, self._complete, self._held_bytes = self._complete, [], 0
        # Backward comes to the last rows first.
        complete.sort(key=lambda module: module.rows.start)
        while complete:
            stretch = [complete.pop()]
            while complete and complete[-1].rows.stop == stretch[-1].rows.start:
                stretch.append(complete.pop())
            yield slice(stretch[-1].rows.start, stretch[0].rows.stop)
            for module in stretch:
                module.is_updated = True
                for param in module.params:
                    self._left[id(param)] -= 1
                    if not self._left[id(param)]:
                        param.grad = None

    def left_over(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of rows that were not updated."""
        left = list(grads)
        for module in self._modules:
            if module.is_updated:
                left[module.rows] = [None] * len(left[module.rows])
        return left
