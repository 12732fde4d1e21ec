"""How are the optimizers of the user's that update what is active made, told, stepped, and what do they keep?

Modules, row blocks and slices are shown to them as parameters of their own, which *stand in* for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# Of names that are the optimizers', in `state` and in groups, beside the hyperparameters that these begin with.
PREFIX = "rule."
# Makes what updates, of what is active.
RuleFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


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
        self._members: dict[int, dict[int, nn.Parameter]] = {}
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
            # With the parameters themselves, or others might get the numbers of those that are gone.
            these, last = {id(param): param for param in params}, self._members.get(number)
            is_same = last is None or last.keys() == these.keys()
            if is_same and number in earlier:
                self._optimizers[number] = earlier[number]
                continue
            if not is_same:
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
