"""What is the gradient of a slice to those who expect one of the whole weight? A tensor that stores its slice alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from misa_kernels.ranks.shards import everywhere, is_sharded, local

Op = Any
Args = tuple[Any, ...]
aten = torch.ops.aten
# Each element of the result depends on the same element of the arguments alone.
_POINTWISE = frozenset(
    "abs neg positive sign sgn square sqrt pow nan_to_num clamp clamp_min clamp_max maximum minimum add sub eq ne lt "
    "le gt ge isnan isinf isposinf isneginf logical_not logical_and logical_or bitwise_not bitwise_and bitwise_or "
    "clone detach alias _to_copy".split()
)
# What is 0 stays 0, whatever the factor.
_SCALES = frozenset(("mul", "div"))
# Over lists, and what they take beside the list is one number.
_EACH = frozenset(("_foreach_mul_", "_foreach_div_", "_foreach_zero_", "_foreach_norm"))
_SHARES = frozenset(("allreduce_", "allreduce_coalesced_", "broadcast_", "reduce_"))
_SINGLE = {"norm": aten.linalg_vector_norm}


class SlicedGradient(torch.Tensor):
    """A tensor of a weight's shape, of which a slice is stored, and which has one value elsewhere: 0 in a gradient.

    What loops do with gradients (clip, scale, add, compare, measure, copy, set to zero) is done to the slice and does
    not make the zeros; sums may round in another order than those of the dense tensor. Factors leave the zeros 0, NaN
    and infinity among them. Any other operator gets a dense copy, so that a view of a sliced gradient is one of a copy.

    Args:
        part: The slice, contiguous; it is shared, not copied.
        shape: Of the weight.
        axis: Which axis of the weight the slice is a range of.
        first: Where on this axis it begins.
        rest: The value elsewhere; others than 0 are what comparisons give.
    """

    part: Tensor
    axis: int
    first: int
    rest: float

    @staticmethod
    def __new__(cls, part: Tensor, shape: Iterable[int], axis: int, first: int, rest: float = 0) -> SlicedGradient:
        """Make the outside: shape, dtype and device without memory."""
        kind = _OfShards if is_sharded(part) else cls
        made = torch.Tensor._make_wrapper_subclass(kind, tuple(shape), dtype=part.dtype, device=part.device)
        return made

    def __init__(self, part: Tensor, shape: Iterable[int], axis: int, first: int, rest: float = 0) -> None:
        self.part, self.axis, self.first, self.rest = part, axis, first, rest

    # Python's side of torch adds nothing; operators come to __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Op, types: Any, args: Args = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do an operator on the slice where that is all it changes or looks at, and on a dense copy elsewhere."""
        kwargs = kwargs or {}
        name: str = func.overloadpacket.__name__
        if name.startswith("_foreach_"):
            return _foreach(func, name, args, kwargs)
        # Ranks that average their gradients have drawn the same slices.
        is_shared = func.namespace == "c10d" and name in _SHARES
        if is_shared or name == "_amp_foreach_non_finite_check_and_unscale_":
            return func(*tree_map(part_of, args), **tree_map(part_of, kwargs))
        own = args[0] if args else None
        if isinstance(own, SlicedGradient):
            is_written = func._schema.arguments[0].alias_info is not None and func._schema.is_mutable
            if name == "copy_" and own.fits(args[1]) and args[1].rest == own.rest:
                func(own.part, args[1].part, *args[2:], **kwargs)
                return own
            if name == "zero_":
                own.part.zero_()
                own.rest = 0
                return own
            known = _pointwise(func, name.rstrip("_"), args, kwargs)
            if known is not None and not is_written:
                return own.like(known[0](), known[1])
            if known is not None:
                if known[1] != own.rest:
                    raise own.refusal(name)
                known[0]()
                return own
            reduced = None if is_written else _reduced(name, own, args[1:], kwargs)
            if reduced is not None:
                return reduced
        return _on_dense(func, args, kwargs)

    def fits(self, other: object) -> bool:
        """Whether another tensor is one of the same slice."""
        place = self.axis, self.first, self.part.shape, self.shape
        if not isinstance(other, SlicedGradient):
            return False
        return place == (other.axis, other.first, other.part.shape, other.shape)

    def like(self, part: Tensor, rest: float) -> SlicedGradient:
        """Return another tensor of the same slice."""
        return SlicedGradient(part, self.shape, self.axis, self.first, rest)

    def within(self, dense: Tensor) -> Tensor:
        """Return the slice of a dense tensor of this shape."""
        return dense.narrow(self.axis, self.first, self.part.shape[self.axis])

    def dense(self) -> Tensor:
        """Return a copy that stores all elements."""
        dense = self.part.new_full(self.shape, self.rest)
        self.within(dense).copy_(self.part)
        return dense

    def store(self, dense: Tensor, name: str) -> None:
        """Take over the slice of a dense tensor that has the same value elsewhere, or raise a RuntimeError."""
        outside = dense.clone()
        self.within(outside).fill_(self.rest)
        if not bool(local(everywhere((outside == self.rest).all()))):
            raise self.refusal(name)
        self.part.copy_(self.within(dense))

    def refusal(self, name: str) -> RuntimeError:
        """Return what is raised where the rest would change."""
        last = self.first + self.part.shape[self.axis]
        return RuntimeError(
            f"{name} on a gradient of shape {tuple(self.shape)} would change elements beside {self.first}:{last} of "
            f"axis {self.axis}, which are not trained in this round of MISA and have no gradient: write to .part, or "
            "to a copy"
        )

    @property
    def data(self) -> Tensor:
        """The same slice, to be read or assigned: torch itself would exchange the outside alone."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, SlicedGradient) and self.fits(value) and value.dtype == self.dtype:
            self.part, self.rest = value.part, value.rest
        else:
            self.copy_(value)

    def numpy(self, *, force: bool = False) -> Any:
        """Return the elements, as torch does of a tensor that stores them."""
        return self.dense().numpy(force=force)

    def tolist(self) -> Any:
        """Return the elements, as torch does of a tensor that stores them."""
        return self.dense().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        last = self.first + self.part.shape[self.axis]
        where = ", ".join([":"] * self.axis + [f"{self.first}:{last}"])
        return f"SlicedGradient([{where}] of {tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return SlicedGradient, (self.part, tuple(self.shape), self.axis, self.first, self.rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> SlicedGradient:
        return cast(SlicedGradient, memo.setdefault(id(self), self.like(self.part.clone(), self.rest)))


class _OfShards(SlicedGradient):
    """One whose slice is a DTensor, which would not let an operator come here where it stands before this."""

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Op, types: Any, args: Args = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do it with all operators coming here first."""
        with torch._C.DisableTorchFunctionSubclass(), _First():  # type: ignore[no-untyped-call]
            return func(*args, **(kwargs or {}))

    def full_tensor(self) -> Tensor:
        """Return all elements of all ranks, as DTensors do; a collective."""
        return cast(Tensor, cast(Any, self.dense()).full_tensor())


class _First(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Brings operators to the sliced gradients among their arguments, whatever else is there."""

    def __torch_dispatch__(self, func: Op, types: Any, args: Args = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Do an operator."""
        if any(isinstance(value, SlicedGradient) for value in tree_leaves((args, kwargs))):
            return SlicedGradient.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def part_of(grad: Any) -> Any:
    """Return the slice of a sliced gradient, and anything else as it is."""
    return grad.part if isinstance(grad, SlicedGradient) else grad


def _is_number(value: object) -> bool:
    return not isinstance(value, Tensor)


def _pointwise(func: Op, name: str, args: Args, kwargs: Mapping[str, Any]) -> tuple[Callable[[], Tensor], float] | None:
    """Return how the slice of an operator's result is made, and its value elsewhere; None where that is not known."""
    own = args[0]
    if not all(map(_is_number, kwargs.values())):
        return None
    others = [value for value in args[1:] if not _is_number(value)]
    parts = [part_of(value) for value in args]
    if name == "_to_copy":
        # Weights of channels-last order are no matrices.
        kwargs = {key: value for key, value in kwargs.items() if key not in ("layout", "memory_format")}

    def make() -> Tensor:
        return cast(Tensor, func(*parts, **kwargs))

    if name in _SCALES and own.rest == 0 and all(value.ndim == 0 for value in others):
        return make, 0
    if name in ("clone", "detach", "alias", "_to_copy"):
        return make, own.rest
    if name in _POINTWISE | _SCALES and all(map(own.fits, others)):
        rests = [_rest_of(value) if isinstance(value, SlicedGradient) else value for value in args]
        single = getattr(aten, name)
        return make, single(*rests, **kwargs).item()
    return None


def _rest_of(tensor: SlicedGradient) -> Tensor:
    return torch.full((), tensor.rest, dtype=tensor.dtype)


def _reduced(name: str, own: SlicedGradient, args: Args, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return what an operator makes of all elements; None where that is not known."""
    part, others = own.part, own.numel() - own.part.numel()
    if name in ("linalg_vector_norm", "norm"):
        order = args[0] if args else kwargs.get("ord", 2)
        is_all = len(args) < 2 or args[1] in (None, []) or sorted(args[1]) == [0, 1]
        keeps = len(args) > 2 and args[2] or kwargs.get("keepdim")
        dtype = kwargs.get("dtype")
        order = 2 if order is None else order
        if is_all and not keeps and own.rest == 0 and order >= 0 and _is_number(order):
            return cast(Tensor, torch.linalg.vector_norm(part, order, dtype=dtype))
        return None
    if args or kwargs.keys() - {"dtype"}:
        return None
    if name == "sum":
        return part.sum(**kwargs) + own.rest * others if own.rest else part.sum(**kwargs)
    if name == "mean" and own.rest == 0:
        return part.mean(**kwargs) * (part.numel() / own.numel())
    if name in ("any", "all", "max", "min"):
        made = everywhere(getattr(part, name)())
        further = torch.maximum if name in ("any", "max") else torch.minimum
        return further(made, torch.full_like(made, own.rest)) if others else made
    return None


def _foreach(func: Op, name: str, args: Args, kwargs: Mapping[str, Any]) -> Any:
    """Do an operator on lists: at once where it needs the slices only, else on one element after the other."""
    lists = [value for value in args if isinstance(value, (list, tuple))]
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    if name in _EACH and len(lists) == 1 and all(value.rest == 0 for value in args[0] if not _is_plain(value)):
        if name != "_foreach_norm" or order >= 0:
            return func(list(map(part_of, args[0])), *args[1:], **kwargs)
    single = name.removeprefix("_foreach_")
    call = _SINGLE.get(single) or getattr(aten, single)
    made = []
    for i in range(len(lists[0])):
        own = [value[i] if isinstance(value, (list, tuple)) else value for value in args]
        options = {key: value[i] if isinstance(value, (list, tuple)) else value for key, value in kwargs.items()}
        made.append(call(*own, **options))
    return None if name.endswith("_") else made


def _is_plain(value: object) -> bool:
    return not isinstance(value, SlicedGradient)


def _on_dense(func: Op, args: Args, kwargs: Mapping[str, Any]) -> Any:
    """Do an operator on dense copies, and keep what it wrote to them."""
    copies: dict[int, tuple[SlicedGradient, Tensor]] = {}

    def dense(value: Any) -> Any:
        if not isinstance(value, SlicedGradient):
            return value
        return copies.setdefault(id(value), (value, value.dense()))[1]

    made = func(*tree_map(dense, args), **tree_map(dense, dict(kwargs)))
    if func._schema.is_mutable:
        name = func.overloadpacket.__name__
        for own, copy in copies.values():
            own.store(copy, name)
    # What wrote in place returns what it wrote to, whatever comes from here.
    return made
