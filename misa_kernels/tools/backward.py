"""Does backward run through the layers that the draw needs, and through no others?"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from misa_kernels.monitor import Round
from misa_kernels.optimizer import MISA


def watch_backward(model: nn.Module, optimizer: MISA) -> BackwardWatch:
    """Warn when the backward pass runs further than the active modules need, or does not reach them.

    Three causes are told from how the layers behave, each with one `UserWarning`, once:

    - Re-entrant checkpointing of layers whose input requires no gradient: their active parameters would get none.
      Said at the end of the model's forward, before `loss.backward()` fails or passes over them.
    - An input that somebody made require a gradient, as Transformers' `enable_input_require_grads()` does: backward
      runs through the layers below the lowest active one, too. Said at the end of the step.
    - Checkpointing of only those layers that hold trainable parameters: frozen layers above the lowest active one
      keep all their activations. Said in the second round or soon after, when a layer has been seen both ways.

    It looks at the first step of every round, all of its forwards and backwards, and has no hooks on the model
    otherwise, nor when all was said. Forwards without gradients, and what `torch.compile` made of a layer, are not
    seen. Layers that the optimizer does not know (no "layers" in the param groups) cannot be watched.

    Args:
        model: The model that `optimizer` trains, or a wrapper of it, or what is wrapped.
        optimizer: The optimizer, made from `misa_kernels.param_groups`.

    Returns:
        The watch. It lives as long as the model and the optimizer and keeps neither alive; `close()` ends it.

    Raises:
        TypeError: If `model` is not a module, or `optimizer` not a `MISA`.
        ValueError: If the optimizer knows no layers, or none of them is in the model.
    """
    return BackwardWatch(model, optimizer)


class BackwardWatch:
    """What `watch_backward` returns; also a context manager that ends the watch.

    Args:
        model: See `watch_backward`.
        optimizer: See `watch_backward`.
    """

    def __init__(self, model: nn.Module, optimizer: MISA) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__} and must be an nn.Module: pass the model itself")
        if not isinstance(optimizer, MISA):
            raise TypeError(f"optimizer is {type(optimizer).__name__} and must be a MISA: pass what MISA(...) returned")
        self._names = optimizer.monitor.layers
        layers = _find(model, self._names)
        self._optimizer = weakref.ref(optimizer)
        self._layers = {number: weakref.ref(layer) for number, layer in layers.items()}
        self._inner = {number: weakref.ref(part) for number, part in _inner_parts(layers).items()}
        held = {id(layer) for layer in layers.values()}
        self._outer = [
            weakref.ref(module)
            for module in model.modules()
            if any(id(part) in held for part in module.modules() if part is not module)
        ]
        self._unsaid = {"reentrant", "driven", "selective"}
        # Layers that checkpointing was seen to follow: recomputed while trainable, kept while frozen.
        self._once_recomputed: set[int] = set()
        self._once_kept: set[int] = set()
        self._judged: Round | None = None
        self._handles: list[Any] = []
        self._look()
        self._step_handle = optimizer.register_step_post_hook(_Hook(self._judge))

    def close(self) -> None:
        """Remove all hooks; a second call does nothing."""
        self._look_away()
        self._step_handle.remove()

    def __enter__(self) -> BackwardWatch:
        """Return the watch."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close it."""
        self.close()

    def _look(self) -> None:
        """Hook the layers, what runs inside of them, and what they run in."""
        for number, reference in self._layers.items():
            if (layer := reference()) is not None:
                hook = _Hook(self._after_layer, number)
                self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        for number, reference in self._inner.items():
            if (part := reference()) is not None:
                self._handles.append(part.register_forward_pre_hook(_Hook(self._before_inner, number)))
        for number, reference in enumerate(self._outer):
            if (module := reference()) is not None:
                self._handles.append(module.register_forward_pre_hook(_Hook(self._enter, number)))
                leave = module.register_forward_hook(_Hook(self._leave, number), always_call=True)
                self._handles.append(leave)
        self._forget()

    def _look_away(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forget(self) -> None:
        """Begin to observe a step."""
        self._round: Round | None = None
        self._recomputed: set[int] = set()
        self._kept: set[int] = set()
        self._driven: set[int] = set()
        self._forget_forward()
        # The modules that are running now, outermost first, and whether gradients were on when they were called.
        self._running: list[tuple[int, bool]] = []

    def _forget_forward(self) -> None:
        self._lit: set[int] = set()
        self._dark: set[int] = set()
        self._blind: set[int] = set()
        self._flows = self._traced = False

    def _refresh(self) -> bool:
        """Note what the running round trains; False when there is nothing left to watch."""
        optimizer = self._optimizer()
        if optimizer is None or optimizer.is_released:
            self.close()
            return False
        if self._round is not optimizer.monitor.current:
            self._round = optimizer.monitor.current
            layers = ((number, layer()) for number, layer in self._layers.items())
            self._trainable = {
                number
                for number, layer in layers
                if layer is not None and any(param.requires_grad for param in layer.parameters())
            }
        return True

    def _lowest(self) -> int:
        """Return the number of the lowest layer that backward needs; 0 where it is unknown."""
        assert self._round is not None
        depth = self._round.backward_depth
        return 0 if depth is None else len(self._names) - depth

    # Hooks, in the order in which they run.

    def _enter(self, number: int, *_: object) -> None:
        if _in_backward():
            return
        # An interrupt leaves entries that no hook removed.
        self._cut(number)
        if not self._running:
            self._forget_forward()
            if not self._refresh():
                return
        self._running.append((number, torch.is_grad_enabled()))

    def _before_inner(self, number: int, *_: object) -> None:
        if _in_backward():
            self._recomputed.add(number)
        elif torch.is_grad_enabled():
            self._lit.add(number)
        else:
            self._dark.add(number)

    def _after_layer(self, number: int, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if _in_backward() or (self._round is None and not self._refresh()):
            return
        source = _requiring_grad((args, kwargs))
        # Re-entrant checkpointing calls what it is given without gradients, and connects its output afterwards.
        connects = _requiring_grad(output) if torch.is_grad_enabled() else source
        if connects is not None:
            self._flows = True
        if number in self._lit:
            self._blind.discard(number)
            if connects is not None:
                self._kept.add(number)
        elif connects is not None:
            self._blind.discard(number)
        elif (
            not self._flows
            and number in self._trainable
            and number in self._dark
            and self._running
            and self._running[-1][1]
        ):
            self._blind.add(number)
        if source is not None and not self._traced and number < self._lowest():
            self._traced = True
            if not _comes_from_parameter(source):
                driven = self._driven
                cast(Any, source).register_hook(lambda grad: driven.add(number))

    def _leave(self, number: int, *_: object) -> None:
        if _in_backward():
            return
        self._cut(number)
        if not self._running and self._blind and "reentrant" in self._unsaid:
            layer = self._layers[min(self._blind)]()
            if layer is not None and layer.training:
                self._say("reentrant", self._reentrant(min(self._blind)))

    def _cut(self, number: int) -> None:
        """Take a module, and what it called, from those that are running."""
        running = [outer for outer, _ in self._running]
        if number in running:
            del self._running[running.index(number) :]

    def _judge(self, *_: object) -> None:
        """After a step: say what was seen in it, and look again when the next round begins."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if self._round is not None and (self._kept or self._recomputed):
            if self._driven:
                self._say("driven", self._driven_by(min(self._driven)))
            if follows := self._follows_trainability():
                self._say("selective", self._selective(follows))
            self._look_away()
            self._judged = self._round
            self._forget()
        if not self._unsaid:
            self.close()
        elif not self._handles and self._judged is not optimizer.monitor.current:
            self._look()

    def _follows_trainability(self) -> set[int]:
        """Return frozen layers that kept their activations, once layers were seen to be checkpointed by that."""
        if not self._recomputed:
            return set()
        if not self._recomputed <= self._trainable:
            self._once_recomputed.clear()
            self._once_kept.clear()
            return set()
        kept = self._kept - self._trainable
        seen_both_ways = (kept & self._once_recomputed) | (self._recomputed & self._once_kept)
        self._once_recomputed |= self._recomputed
        self._once_kept |= kept
        return kept if seen_both_ways else set()

    # What is said.

    def _say(self, cause: str, sentence: str) -> None:
        if cause in self._unsaid:
            self._unsaid.remove(cause)
            warnings.warn(sentence, stacklevel=2)

    def _reentrant(self, number: int) -> str:
        assert self._round is not None
        return (
            f"{self._names[number]} trains in round {self._round.round} but ran with gradients off and an input that "
            "requires none, as re-entrant checkpointing does, so its active parameters get no gradient: checkpoint "
            "with use_reentrant=False (Transformers: gradient_checkpointing_kwargs={'use_reentrant': False})"
        )

    def _driven_by(self, number: int) -> str:
        assert self._round is not None
        depth, total = self._round.backward_depth, len(self._names)
        return (
            f"backward ran down to the input of {self._names[number]}, through {total - number} layers, and must stop "
            f"after {depth}, at {self._names[self._lowest()]}, in round {self._round.round}: something makes an input "
            "require a gradient, mostly Transformers' model.enable_input_require_grads(), which since version 5 "
            "gradient_checkpointing_enable() calls, too; call model.disable_input_require_grads() after them, and "
            "checkpoint with use_reentrant=False, which needs no such input"
        )

    def _selective(self, kept: set[int]) -> str:
        assert self._round is not None
        return (
            f"{self._names[min(kept)]} is frozen in round {self._round.round} and keeps its activations, one of "
            f"{len(kept)} such layers, since only layers with trainable parameters are checkpointed and all that "
            "backward runs through should be: set checkpointing anew without that wrapper (LLaMA-Factory: "
            "disable_gradient_checkpointing: true and gradient_checkpointing: true)"
        )


class _Hook:
    """A hook that dynamo passes over, and that a copy of the model, or a pickle, does not hold.

    Args:
        method: What to call, with `arguments` before those of the hook.
        *arguments: See there.
    """

    def __init__(self, method: Callable[..., None], *arguments: int) -> None:
        self._method, self._arguments = method, arguments

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._method(*self._arguments, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        # A function of the standard library that takes anything and returns None.
        return getattr, (contextlib.nullcontext(), "__exit__")


def _in_backward() -> bool:
    # What torch's own checkpointing asks; torch has no public name for it.
    return bool(torch._C._current_graph_task_id() != -1)


def _find(model: nn.Module, names: list[str]) -> dict[int, nn.Module]:
    """Return the layers by number; those of a model may be named as in what wraps it, or in what it wraps."""
    if not names:
        raise ValueError(
            "optimizer.monitor.layers is empty, and the layers to watch must be known: make the groups of MISA with "
            "param_groups(model)"
        )
    best: dict[int, nn.Module] = {}
    for cut, prefix in _renamings(model, names):
        found: dict[int, nn.Module] = {}
        for number, name in enumerate(names):
            # A tensor behind the last layer may be a layer by its own name, without a module.
            with contextlib.suppress(AttributeError):
                found[number] = model.get_submodule(prefix + name[cut:])
        best = max(best, found, key=len)
    if not best:
        raise ValueError(
            f"layer {names[0]} of the optimizer must be in the model, and {type(model).__name__} has no such module: "
            "pass the model whose parameters MISA was given"
        )
    return best


def _renamings(model: nn.Module, names: list[str]) -> Iterator[tuple[int, str]]:
    """Yield how names may have to change: the characters to drop in front, and those to put there."""
    yield 0, ""
    for path, _ in model.named_modules():
        if path.endswith("." + names[0]):
            yield 0, path[: -len(names[0])]
        elif path and names[0].endswith("." + path):
            yield len(names[0]) - len(path), ""


def _inner_parts(layers: dict[int, nn.Module]) -> dict[int, nn.Module]:
    """Return the largest module that each layer calls: what is checkpointed may be the layer or lie inside of it."""
    parts = {number: _called(layer) for number, layer in layers.items()}
    owners = Counter(id(part) for found in parts.values() for part in found)
    own = {number: [part for part in found if owners[id(part)] == 1] for number, found in parts.items()}
    return {number: max(found, key=_numel) for number, found in own.items() if found}


def _numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _called(module: nn.Module) -> list[nn.Module]:
    """Return the children, those of containers that are never called in their place; a leaf itself."""
    found: list[nn.Module] = []
    for child in module.children():
        found.extend([child] if type(child).forward is not nn.Module.forward else _called(child))
    return found or [module]


def _requiring_grad(value: Any) -> Tensor | None:
    """Return the first tensor that requires a gradient in nested arguments or outputs."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else None
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return None
    for part in value:
        if (found := _requiring_grad(part)) is not None:
            return found
    return None


def _comes_from_parameter(tensor: Tensor) -> bool:
    """Whether a parameter below asks for the gradient of a tensor, for an optimizer of its own."""
    if tensor.grad_fn is None:
        return isinstance(tensor, nn.Parameter)
    stack, seen = [tensor.grad_fn], {tensor.grad_fn}
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in seen:
                if isinstance(getattr(node, "variable", None), nn.Parameter):
                    return True
                seen.add(node)
                stack.append(node)
    return False
