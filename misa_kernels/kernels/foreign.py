"""A round on optimizers of the user's: what is active is updated by any `torch.optim.Optimizer`, not by ours.

Modules, row blocks and slices are shown to it as parameters of their own, which *stand in* for them: with all bits that
a master or residual has beyond the weight, in the shape of what they stand for, and with a gradient of that shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from misa_kernels import reference
from misa_kernels.kernels.plain import PlainStep
from misa_kernels.kernels.rows import Row, Settings
from misa_kernels.kernels.table import ADOPT
from misa_kernels.memory.arena import Arena, host, sent
from misa_kernels.memory.storage import split
from misa_kernels.reference import Hyper, noise_key, store_weight

# Elements that are rounded at a time.
PIECE = 1 << 20
# Of names that are the optimizers', in `state` and in groups, beside the hyperparameters that these begin with.
PREFIX = "rule."
# Makes what updates, of what is active.
RuleFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def shape_of(row: Row) -> tuple[int, ...]:
    """Return the shape of what stands in for a row: an expert of a stacked weight is the matrix that it is."""
    shape = tuple(row.param.shape)
    if row.width:
        return row.numel // row.width, row.width
    if row.numel == row.param.numel():
        return shape
    lines = row.numel // prod(shape[1:])
    return shape[1:] if lines == 1 and len(shape) > 2 else (lines, *shape[1:])


class Rules:
    """The optimizers of the user's, one a param group, made anew when others are active: what stays keeps its state.

    The hyperparameters of an optimizer are those of the param group of MISA, which has all that are in its own. What
    its steps change in its group, as a count of steps, is kept apart under names with a prefix, as long as the
    optimizer has the same members, and unless the user changes it, too.

    Args:
        factory: Makes an optimizer of parameters.
        groups: The live `param_groups`; each gets the hyperparameters that it lacks.
        shown: Of each group tensors with the shapes, dtypes and devices of what may stand in, and whether any of it is
            to be trained.

    Attributes:
        name: The classes of the optimizers.
        defaults: Hyperparameters of the first group that is trained.
        names: Those of each group.

    Raises:
        TypeError: If the factory returns anything but an optimizer that can be stepped by itself.
        ValueError: If that has other parameters than it was given, several groups of them, or no lr.
    """

    def __init__(
        self, factory: RuleFactory, groups: Sequence[dict[str, Any]], shown: Sequence[tuple[Iterable[Tensor], bool]]
    ) -> None:
        self._factory = factory
        self._groups = groups
        self._optimizers: dict[int, torch.optim.Optimizer] = {}
        self._stand_ins: dict[int, nn.Parameter] = {}
        self._group_of: dict[int, int] = {}
        # Of each group the members that its counts are of, and what was last given to its optimizer.
        self._members: dict[int, set[int]] = {}
        self._given: dict[int, dict[str, Any]] = {}
        self.names: list[set[str]] = [set() for _ in groups]
        made: dict[int, torch.optim.Optimizer] = {}
        for number, (tensors, is_trained) in enumerate(shown):
            try:
                made[number] = self._make(number, [nn.Parameter(x) for x in tensors])
            except Exception:
                # Of what is frozen it need not know what to do.
                if is_trained:
                    raise
                continue
            self._name(number, made[number])
        first = next(number for number, (_, is_trained) in enumerate(shown) if is_trained)
        self.defaults = dict(made[first].defaults)
        self.name = ", ".join(dict.fromkeys(map(_name_of, made.values())))
        for group in groups:
            # Schedulers want an lr of all groups.
            group.setdefault("lr", groups[first]["lr"])

    def _name(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        """Let a group have the hyperparameters that its optimizer has."""
        own = optimizer.param_groups[0]
        self.names[number] = own.keys() - {"params"}
        for name in self.names[number]:
            self._groups[number].setdefault(name, own[name])

    def _make(self, number: int, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = self._factory(params)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"rule returned a {type(optimizer).__name__} and must return a torch.optim.Optimizer of the parameters "
                "it is given, such as rule=lambda params: torch.optim.SGD(params, lr=0.1)"
            )
        kind = type(optimizer).__name__
        wrapped = [x for x in vars(optimizer).values() if isinstance(x, torch.optim.Optimizer)]
        if any(each.state is not optimizer.state for each in wrapped):
            raise TypeError(
                f"rule returned a {kind} around a {type(wrapped[0]).__name__}, whose state is not its own, and must "
                "return one that has all state in `state`: return the inner one, or write a rule that does both"
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(f"rule returned a {kind}, whose step() needs a closure, and MISA calls it without one")
        own = [id(param) for group in optimizer.param_groups for param in group["params"]]
        if sorted(own) != sorted(map(id, params)):
            raise ValueError(
                f"rule returned a {kind} of {len(own)} parameters for the {len(params)} given to it of group {number}, "
                "and must make a new one in every call, of these and no others: give the role 'frozen' to what it "
                "shall not update"
            )
        if len(optimizer.param_groups) != 1:
            raise ValueError(
                f"rule returned {len(optimizer.param_groups)} param groups for group {number}, and must return one: "
                "make the groups before, as rule is called for each"
            )
        if "lr" not in optimizer.param_groups[0]:
            raise ValueError(
                f"rule returned a {kind} without lr in its group, which MISA and schedulers look for there"
            )
        return optimizer

    def begin(self, thetas: Mapping[int, tuple[int, Tensor]]) -> None:
        """Make the optimizers of a round, as far as they have other members than before.

        Args:
            thetas: By slot the number of its group and what stands in for it, in its shape.
        """
        held = {slot: self.state_of(slot) for slot in thetas if slot in self._stand_ins}
        before, self._stand_ins = self._stand_ins, {}
        members: dict[int, list[nn.Parameter]] = {}
        for slot, (number, theta) in thetas.items():
            stand_in = before[slot] if slot in before else nn.Parameter(theta)
            stand_in.data = theta
            self._stand_ins[slot] = stand_in
            members.setdefault(number, []).append(stand_in)
        self._group_of = {slot: number for slot, (number, _) in thetas.items()}
        earlier, self._optimizers = self._optimizers, {}
        for number, params in members.items():
            these = set(map(id, params))
            if these == self._members.get(number) and number in earlier:
                self._optimizers[number] = earlier[number]
                continue
            if self._members.get(number, these) != these:
                self.drop_counts(number)
            self._members[number], self._given[number] = these, {}
            self._optimizers[number] = self._make(number, params)
            # One that was frozen so far may have been unknown.
            self._name(number, self._optimizers[number])
        for slot, own in held.items():
            if own:
                self.put(slot, own)
        self._hide()

    def step(self, slots: Sequence[int], thetas: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """Update what stands in for some slots.

        Args:
            slots: Their numbers.
            thetas: What stands in for each, in its shape; updated in place where the optimizer works in place.
            grads: The gradient of each, of the same shape and dtype.

        Returns:
            What each has become.
        """
        stand_ins = [self._stand_ins[slot] for slot in slots]
        for stand_in, theta, grad in zip(stand_ins, thetas, grads, strict=True):
            stand_in.data = theta
            stand_in.grad = grad
        due = {self._group_of[slot] for slot in slots}
        try:
            for number, optimizer in self._optimizers.items():
                if number in due:
                    self._step(number, optimizer)
            return [stand_in.detach() for stand_in in stand_ins]
        finally:
            self._hide()

    def _step(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        group, own, given = self._groups[number], optimizer.param_groups[0], self._given[number]
        for name in self.names[number]:
            value = group[name]
            if name in given and _differs(value, given[name]):
                # What the user sets wins over what the optimizer has made of it.
                group.pop(f"{PREFIX}{name}", None)
            given[name] = value
            # Where an optimizer holds a number in a tensor, schedulers of others may have put a float.
            is_bare = isinstance(own[name], Tensor) and not isinstance(value, Tensor)
            own[name] = torch.full_like(own[name], value) if is_bare else value
        own.update({key[len(PREFIX) :]: value for key, value in group.items() if key.startswith(PREFIX)})
        before = dict(own)
        optimizer.step()
        # Some adapt a rate there, or count steps.
        for name in own.keys() - {"params"}:
            if name not in before or _differs(own[name], before[name]):
                group[f"{PREFIX}{name}"] = own[name]
        members = set(map(id, own["params"]))
        for key, kept in optimizer.state.items():
            if id(key) not in members or not all(isinstance(name, str) for name in kept):
                names = [key] if id(key) not in members else [name for name in kept if not isinstance(name, str)]
                raise TypeError(
                    f"rule's {type(optimizer).__name__} keeps state under {names[0]!r}, and MISA saves and drops "
                    "what an optimizer keeps in state[param] under names alone: take another, or keep it there"
                )

    def _hide(self) -> None:
        """Hold no memory of weights and gradients between steps."""
        for stand_in in self._stand_ins.values():
            stand_in.grad = None
            stand_in.data = stand_in.data.new_empty(0)

    def state_of(self, slot: int) -> Mapping[str, Any]:
        """Return what the optimizer keeps of a slot that is trained."""
        state: Mapping[Tensor, Any] = self._optimizers[self._group_of[slot]].state
        own: Mapping[str, Any] = state.get(self._stand_ins[slot], {})
        return own

    def put(self, slot: int, own: Mapping[str, Any]) -> None:
        """Let the optimizer go on with what it had kept of a slot; it begins anew where that is nothing."""
        state: MutableMapping[Tensor, Any] = self._optimizers[self._group_of[slot]].state
        state.pop(self._stand_ins[slot], None)
        if own:
            state[self._stand_ins[slot]] = dict(own)

    def forget(self, slot: int) -> None:
        """Let a slot begin anew in the round that `begin` makes next."""
        self._stand_ins.pop(slot, None)

    def clear(self) -> None:
        """Forget all slots, and what was kept of them; what was counted in groups stays for those that come next."""
        self._optimizers, self._stand_ins, self._group_of, self._members = {}, {}, {}, {}

    def drop_counts(self, number: int) -> None:
        """Let what an optimizer has counted in a group begin anew."""
        group = self._groups[number]
        for key in [key for key in group if key.startswith(PREFIX)]:
            del group[key]

    @property
    def nbytes(self) -> int:
        """Bytes of what the optimizers keep of tensors."""
        return sum(_nbytes(value) for slot in self._stand_ins for value in self.state_of(slot).values())


class RuledStep(PlainStep):
    """The steps of one round on optimizers of the user's.

    Args:
        rows: The tensors that are trained.
        arena: Their ages, scores and masters.
        settings: What holds for all steps.
        rules: The optimizers.

    Attributes:
        is_measured: Whether the next step notes how far it moves each tensor.
    """

    name = "rule"
    is_at_once = True

    def __init__(self, rows: Sequence[Row], arena: Arena, settings: Settings, rules: Rules) -> None:
        super().__init__(rows, arena, settings)
        self._rules = rules
        self.is_measured = False
        self._moved = torch.zeros(2, len(arena.age), dtype=torch.float64, device=arena.device)
        rules.begin({row.slot: (row.group, self._theta(row, row.weight())) for row in rows})

    def _theta(self, row: Row, weight: Tensor) -> Tensor:
        return self._settings.storage.theta(self._arena.views(row.slot), weight).view(shape_of(row))

    def _update(
        self,
        given: Sequence[tuple[Row, Tensor]],
        hyper: Sequence[Hyper],
        noise: tuple[int, int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor | None:
        """Update rows; waits for the device where the step may be skipped, as an optimizer cannot be told there."""
        arena, settings, rows = self._arena, self._settings, [row for row, _ in given]
        grads = [_part(row, grad) for row, grad in given]
        unscale = None if grad_scale is None else 1 / grad_scale.double()
        sq_norms = _sq_norms(grads, arena.device)
        if unscale is not None:
            sq_norms = sq_norms * unscale.square()
        index = sent(host([row.slot for row in rows]), arena.device)
        arena.sq_norm.index_copy_(0, index, sq_norms)
        coefficient, finite = reference.scale_of(
            sq_norms, settings.max_grad_norm, settings.skip_nonfinite, unscale, found_inf
        )
        if not rows or finite is not None and not finite:
            return finite
        weights = [row.weight() for row in rows]
        thetas = [self._theta(row, weight) for row, weight in zip(rows, weights, strict=True)]
        before = [theta.clone() for theta in thetas] if self.is_measured else None
        grads = [grad.to(theta.dtype).view(theta.shape) for grad, theta in zip(grads, thetas, strict=True)]
        if coefficient is not None:
            grads = [grad * coefficient.to(grad.dtype) for grad in grads]
        updated = self._rules.step([row.slot for row in rows], thetas, grads)
        if before is not None:
            torch._foreach_sub_(before, updated)
            self._moved.zero_()
            for line, values in enumerate((before, updated)):
                self._moved[line].index_copy_(0, index, _sq_norms(values, arena.device))
            self.is_measured = False
        for row, weight, theta in zip(rows, weights, updated, strict=True):
            self._store(row, weight, theta.reshape(-1), noise_key(*noise, row.index))
        return finite

    def _store(self, row: Row, weight: Tensor, theta: Tensor, key: int) -> None:
        views, is_rounded = self._arena.views(row.slot), self._settings.storage.param_precision == "stochastic"
        if weight.data_ptr() == theta.data_ptr():
            # What stood in for the weight was the weight, under another version.
            torch.autograd.graph.increment_version(weight)
        elif "residual" in views or is_rounded:
            # What rounding works with takes up to 60 bytes an element.
            for at in range(0, len(theta), PIECE):
                target, part = weight[at : at + PIECE], theta[at : at + PIECE]
                if is_rounded:
                    store_weight(target, part, row.noise_start + at, key)
                    continue
                rounded, residual = split(part)
                target.copy_(rounded)
                views["residual"][at : at + PIECE].copy_(residual)
        else:
            if "master" in views and views["master"].data_ptr() != theta.data_ptr():
                views["master"].copy_(theta)
            weight.copy_(theta)
        row.put(weight)

    def _close(self, row: Row, action: int, start: int, weight: Tensor, hyper: Hyper, key: int) -> None:
        master = self._arena.views(row.slot, start, len(weight)).get("master")
        if action & ADOPT and master is not None:
            # One without an update has been filled, too.
            is_ours = master.to(weight.dtype) == weight
            master.copy_(torch.where(is_ours, master, weight.to(master.dtype)))
        super()._close(row, action, start, weight, hyper, key)

    def measure(self, weights: Sequence[int], hyper: Sequence[Hyper]) -> Tensor:
        """Return Σ of the squares of what the measured step moved of each slot, decay included, and of its weight."""
        return self._moved.clone()

    def rehearse(self, hyper: Sequence[Hyper]) -> None:
        """Let the next step take the memory that the last one of a round takes."""
        self.is_measured = True


def _part(row: Row, grad: Tensor) -> Tensor:
    """Return the gradient of a row, 1-D, from that of what it is part of."""
    first = 0 if row.is_slice else row.offset
    return grad.reshape(-1)[first : first + row.numel]


def _nbytes(value: Any) -> int:
    """Return the bytes of a tensor, of one made of several those of all; and of those in lists and dicts."""
    if not isinstance(value, Tensor):
        return sum(_nbytes(each) for each in tree_leaves(value) if isinstance(each, Tensor))
    if not hasattr(value, "__tensor_flatten__"):
        return value.nbytes
    return sum(_nbytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])


def _name_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the class of an optimizer and the package that it is of."""
    return f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__qualname__}"


def _differs(a: Any, b: Any) -> bool:
    return a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor) or bool(a != b))


def _sq_norms(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return Σx² of each tensor, float64[k] on the device, which is not waited for."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=device)
    wide = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=wide)).double().square()
