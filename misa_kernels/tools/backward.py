"""Does backward run through the layers that the draw needs, and through no others?"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from misa_kernels.monitor import Round
from misa_kernels.optimizer import MISA
from misa_kernels.outside.notices import warn

SENTENCES = {
    "reentrant": (
        "{layer} trains in round {round} but ran with gradients off and an input that requires none, as re-entrant "
        "checkpointing does, so its active parameters get no gradient: checkpoint with use_reentrant=False "
        "(Transformers: gradient_checkpointing_kwargs={{'use_reentrant': False}})"
    ),
    "driven": (
        "backward ran down to the input of {layer}, through {through} layers, and must stop after {depth}, at "
        "{lowest}, in round {round}: something makes an input require a gradient, mostly Transformers' "
        "model.enable_input_require_grads(), which since version 5 gradient_checkpointing_enable() calls, too; call "
        "model.disable_input_require_grads() after them, and checkpoint with use_reentrant=False, which needs no such "
        "input"
    ),
    "selective": (
        "{layer} is frozen in round {round} and keeps its activations, one of {count} such layers, since only layers "
        "with trainable parameters are checkpointed and all that backward runs through should be: set checkpointing "
        "anew without that wrapper (LLaMA-Factory: disable_gradient_checkpointing: true and gradient_checkpointing: "
        "true)"
    ),
}


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
    """What `watch_backward` returns; also a context manager that ends the watch."""

    def __init__(self, model: nn.Module, optimizer: MISA) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__} and must be an nn.Module: pass the model itself")
        if not isinstance(optimizer, MISA):
            raise TypeError(f"optimizer is {type(optimizer).__name__} and must be a MISA: pass what MISA(...) returned")
        self._names = optimizer.monitor.layers
        layers = _find(model, self._names)
        owners = Counter(part for layer in layers.values() for part in layer.modules())
        self._optimizer = weakref.ref(optimizer)
        # The number of its layer for each layer and all that it calls; a call of what two share tells of neither.
        self._number = weakref.WeakKeyDictionary(
            {part: number for number, layer in layers.items() for part in layer.modules() if owners[part] == 1}
        )
        self._outer = weakref.WeakSet(
            module
            for module in model.modules()
            if module not in owners and any(part in owners for part in module.modules())
        )
        self._unsaid = set(SENTENCES)
        # Layers that checkpointing was seen to follow: recomputed while trainable, kept while frozen.
        self._once_recomputed: set[int] = set()
        self._once_kept: set[int] = set()
        self._judged: Round | None = None
        self._handles: list[Any] = []
        self._look()
        self._step_handle = optimizer.register_step_post_hook(_Hook(self._after_step))

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
        """Hook the layers, what they call, and what they run in, to observe a step."""
        self._round: Round | None = None
        self._seen = False
        self._recomputed: set[int] = set()
        self._kept: set[int] = set()
        self._driven: set[int] = set()
        for part in self._number:
            self._handles.append(part.register_forward_pre_hook(_Hook(self._before_part), with_kwargs=True))
        for module in self._outer:
            self._handles.append(module.register_forward_pre_hook(_Hook(self._before_forward)))
            self._handles.append(module.register_forward_hook(_Hook(self._after_forward)))

    def _look_away(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_forward(self, *_: object) -> None:
        """Note what the running round trains, before layers run."""
        if _in_backward():
            return
        optimizer = self._optimizer()
        if optimizer is None or optimizer.is_released:
            self.close()
            return
        self._round = optimizer.monitor.current
        self._sliced = {id(param) for param, own in optimizer.trained.items() if own is not None}
        self._trainable = {number for part, number in self._number.items() if self._trains(part)}
        # Backward need not go below this layer; into all of them where that of something active is unknown.
        self._lowest = len(self._names) - (self._round.backward_depth or len(self._names))
        self._with_gradients = torch.is_grad_enabled()
        # Whether anything was given a tensor that requires a gradient yet.
        self._flows = False
        # What trains and ran without gradients before that, so that none will reach it.
        self._blind: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def _before_part(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        """See what a layer, or what it calls, is given, and whether gradients are on."""
        number = self._number.get(part)
        # Replicas of a module share its hooks.
        if self._round is None or number is None:
            return
        # In a layer that is compiled nothing is seen, and it would be compiled anew if its hooks came and went.
        self._seen |= next(part.children(), None) is None
        if _in_backward():
            self._recomputed.add(number)
            return
        source: Any = _requiring_grad((args, kwargs))
        if source is not None:
            if not self._flows and number < self._lowest and not _comes_from_parameter(source):
                driven = self._driven
                source.register_hook(lambda grad: driven.add(number))
            self._flows = True
        if torch.is_grad_enabled():
            # What ran without gradients before was another pass.
            self._blind.discard(part)
            if self._flows:
                self._kept.add(number)
        elif self._with_gradients and not self._flows and part.training and self._trains(part):
            self._blind.add(part)

    def _after_forward(self, *_: object) -> None:
        if self._round is not None and not _in_backward():
            self._say("reentrant", {self._number[part] for part in self._blind})

    def _after_step(self, optimizer: MISA, *_: object) -> None:
        """Say what was seen in the step, and look again when the next round begins."""
        if self._handles and self._seen:
            self._say("driven", self._driven)
            kept = self._kept - self._trainable
            if not self._recomputed <= self._trainable:
                # Checkpointing follows something else.
                self._unsaid.discard("selective")
            elif self._recomputed:
                self._once_recomputed |= self._recomputed
                self._once_kept |= kept
                if self._once_recomputed & self._once_kept:
                    self._say("selective", kept)
            self._look_away()
            self._judged = self._round
        if not self._unsaid:
            self.close()
        elif not self._handles and self._judged is not optimizer.monitor.current:
            self._look()

    def _trains(self, module: nn.Module) -> bool:
        return any(param.requires_grad or id(param) in self._sliced for param in module.parameters())

    def _say(self, cause: str, layers: set[int]) -> None:
        if layers and cause in self._unsaid:
            assert self._round is not None
            self._unsaid.remove(cause)
            sentence = SENTENCES[cause].format(
                layer=self._names[min(layers)],
                lowest=self._names[self._lowest],
                round=self._round.round,
                count=len(layers),
                through=len(self._names) - min(layers),
                depth=self._round.backward_depth,
            )
            warn(sentence)


class _Hook:
    """Calls a method; dynamo passes over it, and a copy of the model, or a pickle, does not hold it."""

    def __init__(self, method: Callable[..., None]) -> None:
        self._method = method

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._method(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        # A function of the standard library that takes anything and returns None.
        return getattr, (contextlib.nullcontext(), "__exit__")


def _find(model: nn.Module, names: list[str]) -> dict[int, nn.Module]:
    """Return the layers by number; those of a model may be named as in what wraps it, or in what it wraps."""
    if not names:
        raise ValueError(
            "optimizer.monitor.layers is empty, and the layers to watch must be known: make the groups of MISA with "
            "param_groups(model)"
        )
    best: dict[int, nn.Module] = {}
    for outer in range(names[0].count(".") + 1):
        own = [name.split(".", outer)[-1] for name in names]
        for module in model.modules():
            parts = dict(module.named_modules(remove_duplicate=False))
            best = max(best, {number: parts[name] for number, name in enumerate(own) if name in parts}, key=len)
    if not best:
        raise ValueError(
            f"layer {names[0]} of the optimizer must be in the model, and {type(model).__name__} has no such module: "
            "pass the model whose parameters MISA was given"
        )
    return best


def _in_backward() -> bool:
    # What torch's own checkpointing asks; torch has no public name for it.
    return bool(torch._C._current_graph_task_id() != -1)


def _requiring_grad(value: Any) -> Tensor | None:
    """Return the first tensor that requires a gradient in nested arguments."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else None
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return None
    return next((found for part in value if (found := _requiring_grad(part)) is not None), None)


def _comes_from_parameter(tensor: Tensor) -> bool:
    """Whether a parameter below asks for the gradient of a tensor, for an optimizer of its own."""
    if tensor.grad_fn is None:
        return isinstance(tensor, nn.Parameter)
    stack, seen = [tensor.grad_fn], {tensor.grad_fn}
    while stack:
        node = stack.pop()
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        below = {one for one, _ in node.next_functions if one is not None} - seen
        seen |= below
        stack += below
    return False
