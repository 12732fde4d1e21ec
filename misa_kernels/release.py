"""Which rows can be updated within backward: those of a module all of whose gradients are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from misa_kernels.kernels import Row


class Arrivals:
    """The gradients that have come since the last step, module by module, for `release_gradients`.

    Rows of a module are neighbours, and so one stretch of the kernels' table. A parameter may have rows in several
    modules, which are its row blocks; its gradient is free when all of them are updated.

    Args:
        rows: What is trained in this round.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._modules_of: dict[Tensor, list[slice]] = {}
        self._missing: dict[int, set[Tensor]] = {}
        self._left: dict[Tensor, int] = {}
        first = 0
        while first < len(rows):
            module = slice(first, first + len(rows[first].fellows))
            params = dict.fromkeys(row.param for row in rows[module])
            self._missing[first] = set(params)
            for param in params:
                self._modules_of.setdefault(param, []).append(module)
            first = module.stop
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        for first, missing in self._missing.items():
            missing.update(row.param for row in self._rows[first : first + len(self._rows[first].fellows)])
        self._left = {param: len(modules) for param, modules in self._modules_of.items()}
        self._arrived: set[Tensor] = set()
        self._updated: set[int] = set()

    def __bool__(self) -> bool:
        """Whether a gradient has come since the last step."""
        return bool(self._arrived)

    def has(self, param: Tensor) -> bool:
        """Whether the gradient of a parameter has come since the last step."""
        return param in self._arrived

    def take(self, param: Tensor) -> Iterator[slice]:
        """Note a gradient, and give the rows of each module that waited for it alone, which are then updated."""
        self._arrived.add(param)
        for module in self._modules_of.get(param, ()):
            missing = self._missing[module.start]
            missing.discard(param)
            if missing:
                continue
            yield module
            self._updated.update(range(module.start, module.stop))
            for other in dict.fromkeys(row.param for row in self._rows[module]):
                self._left[other] -= 1
                if not self._left[other]:
                    other.grad = None

    def left_over(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients of rows that were not updated."""
        return [None if number in self._updated else grad for number, grad in enumerate(grads)]
