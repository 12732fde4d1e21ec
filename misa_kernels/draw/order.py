"""In which order does a forward pass run the layers, and what does each matrix keep for backward?

Registration tells only of layers in one stack. For others an example is run, or the first training step is watched.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

# Functions that keep what they return, so that what reads it has nothing more to keep.
_KEEP_RESULT = {"relu", "relu_", "sigmoid", "tanh", "softmax", "exp", "scaled_dot_product_attention"}
# So many rounds the layers are watched that had no part in a forward pass so far, such as a tower without inputs.
_ROUNDS = 20


class _Calls:
    """Which modules a forward pass has called, in the order of first calls. Hooks hold it, so it can be copied."""

    def __init__(self) -> None:
        self.now: dict[str, int] = {}
        self.most: dict[str, int] = {}

    # Within a graph of torch.compile nothing is noted, as it would be for ever.

    def begin(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            if len(self.now) > len(self.most):
                self.most = self.now
            self.now = {}

    def note(self, name: str, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.now.setdefault(name, len(self.now))


class Order:
    """The layers of a model in the order in which they run, as far as that is known.

    Args:
        model: The model; None where nothing is known of one.
        layers: Names and modules of its layers, as they are registered.
        stacks: Name of the stack of each; one stack runs in its order.
        is_known: Whether `layers` are in the order in which they run,
        is_told: or some of them are.
        inputs: For weights whose inputs were seen, by name: the number of the input and its elements that are kept for
            the sake of the weight alone.

    Attributes:
        names: The layers, in order as far as it is known.
        is_known: Whether they run like that, as far as anybody can tell.
        is_told: Whether more than their registration says so.
        inputs: As given.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        layers: Mapping[str, nn.Module] = MappingProxyType({}),
        stacks: Mapping[str, str] = MappingProxyType({}),
        is_known: bool = False,
        is_told: bool = False,
        inputs: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    ) -> None:
        self.names = list(layers)
        self.is_told = is_known or is_told
        self.is_known = is_known or len(set(stacks.values())) < 2
        self.inputs = dict(inputs)
        self._stacks = dict(stacks)
        self._model = None if model is None else weakref.ref(model)
        self._modules = {name: weakref.ref(module) for name, module in layers.items()}
        self._calls: _Calls | None = None
        self._handles: list[Any] = []
        self._rounds = 0

    @property
    def is_pending(self) -> bool:
        """Whether the model is watched."""
        return self._calls is not None

    @property
    def first(self) -> list[str]:
        """The first layer of each stack."""
        firsts: dict[str, str] = {}
        for name in self.names:
            firsts.setdefault(self._stacks[name], name)
        return list(firsts.values())

    def watch(self) -> None:
        """Have the model's forward passes note the layers that they run, until all have run or `close`."""
        model = None if self._model is None else self._model()
        if self.is_known or self._handles or model is None:
            return
        self._calls = calls = _Calls()
        watched: list[tuple[nn.Module | None, Any]] = [(model, calls.begin)]
        watched += [(module(), partial(calls.note, name)) for name, module in self._modules.items()]
        for module, hook in watched:
            # TorchScript runs no hook that is not compiled.
            if module is not None and not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(module.register_forward_pre_hook(hook))
        weakref.finalize(self, _remove, self._handles).atexit = False

    def learn(self, share: Callable[[str], str] = str) -> bool:
        """Take over what the forward passes since the last call have shown; whether that changes the order.

        Args:
            share: Returns to each of several ranks what the first of them gave.
        """
        if self._calls is None:
            return False
        self._calls.begin()
        calls, self._calls.most = self._calls.most, {}
        self._rounds += bool(calls)
        is_all = len(calls) == len(self.names) or self._rounds >= _ROUNDS
        known = json.dumps([merged(self.names, calls), is_all, bool(calls)])
        names, is_all, is_seen = cast(tuple[list[str], bool, bool], json.loads(share(known)))
        before, self.names = self.names, names
        self.is_told |= is_seen
        if is_all:
            self.is_known = True
            self.close()
        return names != before

    def take(self, names: Sequence[str]) -> None:
        """Take over the order that another run has learned."""
        self.names, self.is_told = merged(self.names, {name: number for number, name in enumerate(names)}), True

    def close(self) -> None:
        """Watch no longer."""
        self._calls = None
        _remove(self._handles)


# Those of a model and of its parts, by the first parameter: whoever copies the list of groups has the same parameters.
_orders = WeakIdKeyDictionary()


def remember(order: Order, param: Tensor) -> None:
    """Keep an order for as long as the first parameter of its model lives."""
    known = _orders.get(param, [])  # type: ignore[no-untyped-call]
    others = [other for other in known if set(other.names) != set(order.names)]
    _orders[param] = [*others, order]


def recall(groups: Sequence[Mapping[str, Any]]) -> Order:
    """Return the order that is kept of the layers that param groups name; an empty one where there is none."""
    layers = {layer for group in groups for layer in group.get("layers", ())} - {None}
    # What is sampled against all appearance is a layer under its own name.
    own = {name for group in groups for name in group.get("param_names", ())}
    params = {id(param) for group in groups for param in group["params"]}
    pairs = list(_orders.items())  # type: ignore[no-untyped-call]
    for order in (order for param, orders in pairs if id(param) in params for order in reversed(orders)):
        names = set(order.names)
        if layers & names and layers - names <= own:
            return cast(Order, order)
    return Order()


def merged(names: Sequence[str], calls: Mapping[str, int]) -> list[str]:
    """Return names in the order of their calls; what was not called stays behind the one that precedes it."""
    rank, last = {}, -1
    for name in names:
        last = calls.get(name, last)
        rank[name] = last
    return sorted(names, key=lambda name: rank[name])


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


class _Results(TorchFunctionMode):
    """Notes which tensors are kept by the functions that return them."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _KEEP_RESULT and isinstance(result, Tensor):
            self._kept[id(result)] = weakref.ref(result)
        return result

    def holds(self, tensor: Tensor) -> bool:
        kept = self._kept.get(id(tensor))
        return kept is not None and kept() is tensor


class Trace:
    """What one forward pass of an example showed.

    Attributes:
        calls: How many modules were called before each for the first time, by the identity of the module.
        inputs: For each module with tensors of its own, by its identity: the number of the tensor that it read first,
            and how many of its elements are kept for that.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.calls: dict[int, int] = {}
        self.inputs: dict[int, tuple[int, int]] = {}
        self._seen: list[Any] = []
        self._results = _Results()
        handles = [
            module.register_forward_pre_hook(self._note, with_kwargs=True)
            for module in model.modules()
            # TorchScript runs no hook that is not compiled.
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        try:
            with torch.no_grad(), _uncompiled(), _undisturbed(model), self._results:
                if isinstance(example, Mapping):
                    model(**example)
                elif isinstance(example, (tuple, list)):
                    model(*example)
                else:
                    model(example)
        finally:
            _remove(handles)

    def _note(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.calls.setdefault(id(module), len(self.calls))
        read = next((x for x in _tensors((*args, *kwargs.values())) if x.is_floating_point()), None)
        if read is None or not module._parameters or id(module) in self.inputs:
            return
        # Query, key and value read the same tensor, one right behind the other.
        count = len(self._seen)
        number = next((i for i in range(count - 1, max(count - 9, -1), -1) if self._seen[i]() is read), count)
        if number == count:
            self._seen.append(weakref.ref(read))
        self.inputs[id(module)] = number, 0 if self._results.holds(read) else read.numel()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _uncompiled() -> Any:
    """Run what torch.compile has wrapped as it is; nothing is wrapped where dynamo is not loaded."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave buffers, such as running means, and the random numbers as they were."""
    before = [(m._buffers, dict(m._buffers)) for m in model.modules() if len(m._buffers)]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {param.device for param in model.parameters() if param.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for held, own in before:
            held.update(own)
        for buffer, value in values:
            buffer.copy_(value)
