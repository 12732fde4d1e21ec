"""How does backward come to make the gradient of a slice of a linear layer's weight, and nothing of the rest?

The weight requires no gradient, so that autograd keeps nothing for it. A forward hook of its layer passes the output
through a function that keeps the columns of the input which the slice reads, and has a leaf of the slice's shape as an
input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from misa_kernels.gradients.axes import Slice, input_axis
from misa_kernels.gradients.sliced import SlicedGradient
from misa_kernels.outside.notices import warn
from misa_kernels.outside.tracing import guard_hooks, not_traced
from misa_kernels.ranks.shards import average_like, is_held, is_sharded, local


class SliceHooks:
    """Which slices get gradients: in backward `weight.grad` becomes a `SlicedGradient`.

    Of a weight that FSDP2 has sharded it is averaged over the ranks at once, and each holds its part.

    Args:
        follow: Called where a layer has another weight than expected; it may call `train`.

    Attributes:
        messenger: Tells of gradients that have come.
    """

    def __init__(self, follow: Callable[[], None] | None = None) -> None:
        self._trained: dict[nn.Parameter, _SlicedWeight] = {}
        self.messenger = _Messenger()
        self._follow = follow

    def train(
        self,
        slices: Mapping[nn.Parameter, tuple[Slice, Sequence[nn.Module]]],
        names: Mapping[nn.Parameter, str] | None = None,
    ) -> None:
        """Let these slices get gradients, and no others.

        Those that stay keep their hooks and gradients; the gradients of those that leave are set to None. While a
        weight requires a gradient itself, autograd makes all of it, and this nothing.

        Args:
            slices: By weight, the slice and all modules that are called with this weight.
            names: Of weights, for what is said to the user.
        """
        for weight, (piece, modules) in slices.items():
            if not 0 <= piece.first < piece.last <= weight.shape[piece.axis]:
                raise ValueError(f"{piece} must be a range within a weight of shape {tuple(weight.shape)}")
            for module in modules:
                if input_axis(module) is None:
                    raise ValueError(
                        f"a {type(module).__name__} cannot be trained in slices, which only linear layers of torch and "
                        "transformers' Conv1D can: sample its weight as a whole"
                    )
        for weight in self._trained.keys() - slices.keys():
            self._trained.pop(weight).leave()
        if slices.keys() - self._trained.keys():
            guard_hooks()
        for weight, (piece, modules) in slices.items():
            if weight not in self._trained:
                self._trained[weight] = _SlicedWeight(weight, piece, (names or {}).get(weight), self)
            self._trained[weight].hook(modules)
            self._trained[weight].move(piece)

    def close(self) -> None:
        """Remove all hooks, and the gradients of slices."""
        self.train({})

    def now(self, module: nn.Module) -> _SlicedWeight | None:
        """Return what is trained of a module's weight, which was exchanged."""
        if self._follow is not None:
            self._follow()
        return next((trained for trained in self._trained.values() if trained.has(module)), None)


class _Messenger:
    """Tells those who wait for a weight's gradient, one gradient later than it is there.

    They may write to the weight, which its layer still needs for the gradient of its input: that is made right behind
    the gradient of the slice, and so before that of any other. The last ones are told at the end of backward.
    """

    def __init__(self) -> None:
        self._waiting: list[nn.Parameter] = []
        self._backward = -1

    def note(self, weight: nn.Parameter) -> None:
        """Tell of what came before, and later of this weight."""
        if not weight._post_accumulate_grad_hooks:
            return
        now = torch._C._current_graph_task_id()
        if now != self._backward:
            # One within another, as of re-entrant checkpointing, ends before the outer goes on.
            self._backward = now
            torch.autograd.Variable._execution_engine.queue_callback(self._tell)
        self._tell()
        self._waiting.append(weight)

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        # A backward that failed may have left some whose gradient is gone.
        for weight in (weight for weight in waiting if weight.grad is not None):
            for hook in tuple((weight._post_accumulate_grad_hooks or {}).values()):
                hook(weight)


class _SlicedWeight:
    """A slice that gets gradients.

    Args:
        weight: The parameter that it is a slice of.
        piece: The slice.
        name: Of the weight, or None.
        owner: Knows the others.
    """

    def __init__(self, weight: nn.Parameter, piece: Slice, name: str | None, owner: SliceHooks) -> None:
        self._owner, self._messenger = weakref.ref(owner), owner.messenger
        self.weight, self.piece = weight, piece
        self._name = name
        # A module holds its hook, and so this: weakly, to be freed when it goes.
        self._hooks: MutableMapping[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()
        self._leaf: Tensor | None = None
        self._has_warned = self._has_warned_of_order = self._has_left = False

    def hook(self, modules: Sequence[nn.Module]) -> None:
        """Hook these modules, and no others."""
        for module in [module for module in self._hooks if module not in modules]:
            self._hooks.pop(module).remove()
        for module in modules:
            if module not in self._hooks:
                hook = _Hook(self)
                self._hooks[module] = module.register_forward_hook(hook, with_kwargs=True, prepend=True)

    def has(self, module: nn.Module) -> bool:
        """Whether it is trained in this module."""
        return module in self._hooks

    def move(self, piece: Slice) -> None:
        """Go on with another slice, or the same; hooks stay, as what was compiled with them goes on calling them."""
        if piece != self.piece:
            self.piece = piece
            self._forget()

    def leave(self) -> None:
        """Remove all hooks, and the gradient."""
        self.hook(())
        self._has_left = True
        self._forget()

    def _forget(self) -> None:
        # What a backward that is still to come makes is dropped.
        self._leaf = self.weight.grad = None

    def tie(self, module: nn.Module, x: Tensor, out: Tensor) -> Tensor | None:
        """Return the output of a module, tied to the slice; None where the slice is not to be trained."""
        weight, (axis, first, last) = self.weight, self.piece
        if self._has_left or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return None
        if torch._C._get_tracing_state() is not None:
            # Who traces a model wants its outputs.
            return None
        held = module._parameters.get("weight")
        if not is_held(held, weight) or last > weight.shape[axis]:
            owner = None if self._has_warned else self._owner()
            now = None if owner is None else owner.now(module)
            if now is not None and now is not self:
                return now.tie(module, x, out)
            self._say()
            return None
        if is_sharded(cast(Tensor, held)):
            raise RuntimeError(
                f"the layer of {self._name or 'a weight'} multiplies by a DTensor, as in tensor parallelism, and "
                "granularity='slice' needs what fully_shard() gathers or whole weights: draw modules with "
                "granularity='module'"
            )
        if weight.requires_grad:
            return None
        reads = input_axis(module)
        if reads is None:
            self._say()
            return None
        is_input = axis == reads
        kept = x.detach()
        if is_input and last - first < x.shape[-1]:
            # A copy always: a view would keep all of the input alive.
            kept = kept[..., first:last].to(out.dtype, memory_format=torch.contiguous_format, copy=True)
        columns = None if is_input else (first, last)
        is_input_first = axis == 0 if is_input else axis == 1
        tied: Tensor = _Tie.apply(out, kept, self._leaf_now(), columns, is_input_first)  # type: ignore[no-untyped-call]
        return tied

    def put_first(self, module: nn.Module, hook: _Hook) -> None:
        """Let a hook run before all others from the next call on: it needs the output of the layer itself."""
        number = next(number for number, other in module._forward_hooks.items() if other is hook)
        cast(Any, module._forward_hooks).move_to_end(number, last=False)
        if not self._has_warned_of_order:
            self._has_warned_of_order = True
            warn(
                f"a hook was registered with prepend=True on the layer of {self._name or 'a weight'} after its slice "
                "became active, and in this call the slice's gradient lacks what it does to the output: from the next "
                "call on MISA's hook comes first; register such hooks before MISA is constructed"
            )

    def _leaf_now(self) -> Tensor:
        """Return the leaf, anew where the weight was moved or cast."""
        weight, leaf = self.weight, self._leaf
        shape = self.piece.shape_of(weight)
        form = shape, weight.dtype, weight.device, _grad_dtype(weight)
        if leaf is None or (leaf.shape, leaf.dtype, leaf.device, _grad_dtype(leaf)) != form:
            # One element stands for all: nobody reads it.
            leaf = local(weight).detach().new_zeros(1).expand(shape).requires_grad_()
            if form[-1] != weight.dtype:
                leaf.grad_dtype = form[-1]
            own = weakref.ref(self)

            def arrived(leaf: Tensor) -> None:
                trained = own()
                grad, leaf.grad = leaf.grad, None
                if trained is not None and grad is not None:
                    trained.take(leaf, grad)

            leaf.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
            self._leaf = leaf
        return leaf

    @torch.no_grad()
    def take(self, leaf: Tensor, grad: Tensor) -> None:
        """Add what backward made for a leaf to the weight's gradient, and tell those who wait for it."""
        if leaf is not self._leaf:
            return
        weight, piece = self.weight, self.piece
        part = average_like(grad, weight) if is_sharded(weight) else grad.contiguous()
        made = SlicedGradient(part, weight.shape, piece.axis, piece.first)
        for hook in tuple((weight._backward_hooks or {}).values()):
            changed = hook(made)
            if isinstance(changed, SlicedGradient) and made.fits(changed):
                made = changed
            elif changed is not None:
                made = made.like(made.within(changed).contiguous(), 0)
        if weight.grad is None:
            weight.grad = made
        elif not isinstance(weight.grad, SlicedGradient):
            made.within(weight.grad).add_(made.part)
        elif made.fits(weight.grad):
            weight.grad.part.add_(made.part)
        else:
            weight.grad = weight.grad + made
        self._messenger.note(weight)

    def _say(self) -> None:
        # Export calls layers with stand-ins of their weights.
        is_exporting = getattr(torch.compiler, "is_exporting", bool)
        if not self._has_warned and not is_exporting():
            self._has_warned = True
            warn(
                f"{self._name or 'a weight'} is trained in slices, and its layer is called with another weight than "
                "when the round began (exchanged, resized, or computed by a parametrization), or has another forward "
                "now: the slice gets no gradient; make a new MISA of the model as it is now"
            )


def _grad_dtype(param: Tensor) -> torch.dtype | None:
    """Return the dtype of a parameter's gradients, which newer torch lets the user choose; None for any."""
    dtype: torch.dtype | None = getattr(param, "grad_dtype", param.dtype)
    return dtype


class _Hook:
    """The forward hook of one layer; a copy of it, in a copy of the model, removes itself.

    Args:
        trained: The slice.
    """

    def __init__(self, trained: _SlicedWeight | None = None) -> None:
        self._own = trained

    @not_traced
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        if self._own is not None:
            if next(iter(module._forward_hooks.values())) is not self:
                self._own.put_first(module, self)
            if not isinstance(out, Tensor):
                return None
            return self._own.tie(module, args[0] if args else next(iter(kwargs.values())), out)
        for number in [number for number, hook in module._forward_hooks.items() if hook is self]:
            module._forward_hooks.pop(number, None)
            module._forward_hooks_with_kwargs.pop(number, None)
        return None

    # Copies are made by this, too.
    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _Tie(torch.autograd.Function):
    """out → out, and backward beside it: the gradient of a slice, G the gradient of the output, X what was kept.

    Gᵀ X, or Xᵀ G where the input's axis comes first; of G the columns of the slice, where it is one of outputs.
    Autograd casts it to the leaf's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, kept: Tensor, leaf: Tensor, columns: tuple[int, int] | None, is_input_first: bool
    ) -> Tensor:
        """Return the output, which may be written to as ever: a view would forbid that."""
        ctx.save_for_backward(kept)
        ctx.columns, ctx.is_input_first = columns, is_input_first
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        """Pass the gradient on, and make that of the slice."""
        (kept,) = ctx.saved_tensors
        own = grad if ctx.columns is None else grad[..., slice(*ctx.columns)]
        left, right = own.flatten(0, -2) if own.ndim > 1 else own[None], kept.to(own.dtype)
        right = right.flatten(0, -2) if right.ndim > 1 else right[None]
        if ctx.is_input_first:
            left, right = right, left
        return grad, None, left.T @ right, None, None
