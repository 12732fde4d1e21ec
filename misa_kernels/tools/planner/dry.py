"""What does a training step of any model hold? Its own operators run, on tensors that have shapes and no bytes.

Weights and activations lie on the meta device. Integers and masks, which are small and which a model asks for their
values, lie on the CPU and are computed; indices that come of activations, as those of experts, are spread evenly.
Attention and dropout are those of GPUs: fused, and with a mask of bytes. What a kernel takes within itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from misa_kernels.gradients.sliced import part_of

META, CPU = torch.device("meta"), torch.device("cpu")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
CHOOSING = ("topk", "sort", "argmax")
GROUPED = "_grouped_mm"
SPECIAL = {*INDEXING, *CHOOSING, GROUPED, "_local_scalar_dense"}
# A LLaMA of 126 layers has 45,000.
MOST_OPERATORS = 100_000


class TooLongError(RuntimeError):
    """A step has more than `MOST_OPERATORS` operators, as where it takes its tokens one by one."""


@dataclass(frozen=True)
class Held:
    """Bytes of a step beyond weights and states.

    Attributes:
        kept: Left by the forward pass, the loss's included.
        gradients: Left by the backward pass, on all ranks together.
        activations: The most that there is at once beside gradients.
        peak_gradients: Gradients at the moment of the peak, on one rank.
        peak_activations: All else at this moment.
        unused: Names of trained parameters that got no gradient.
        offloaded: Bytes in host memory when backward begins.
    """

    kept: float
    gradients: float
    activations: float
    peak_gradients: float
    peak_activations: float
    unused: frozenset[str] = frozenset()
    offloaded: float = 0


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators on shapes, and counts the bytes of what they make for as long as that lives.

    Args:
        there: Tensors that do not count, such as weights.
        ranks: GPUs over which gradients are sharded.

    Attributes:
        operators: How many ran.
        live: Bytes now, gradients left out.
        gradients: Bytes of gradients now.
        most: The largest `live` so far.
        peak: (gradients on one rank, live) when their sum was the largest.

    A gradient counts as one once autograd has accumulated it, which follows the operator that makes it.
    """

    def __init__(self, there: Iterable[Tensor] = (), ranks: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = self.live = self.gradients = self.most = 0
        self.peak: tuple[float, float] = (0, 0)
        self._ranks = ranks
        # (gradients, live) after the last operator: what it has made may yet turn out to be a gradient.
        self._last = (0, 0)
        # Bytes of each storage, negative for gradients.
        self._sizes: dict[weakref.ref[torch.UntypedStorage], int] = {}
        for tensor in there:
            self._sizes[weakref.ref(tensor.untyped_storage())] = 0

    def turn_into_gradient(self, tensor: Tensor) -> None:
        """Count a tensor among the gradients from now on."""
        reference = weakref.ref(tensor.untyped_storage())
        size = self._sizes.get(reference, 0)
        if size > 0:
            self._sizes[reference] = -size
            self.live -= size
            self.gradients += size
            self._last = (self._last[0] + size, self._last[1] - size)

    def is_there(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of those that do not count."""
        return self._sizes.get(weakref.ref(tensor.untyped_storage())) == 0

    def settle(self) -> None:
        """Take the last operator into account."""
        gradients, live = self._last[0] / self._ranks, self._last[1]
        self.most = max(self.most, live)
        if gradients + live > sum(self.peak):
            self.peak = (gradients, live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        self.settle()
        self.operators += 1
        if self.operators > MOST_OPERATORS:
            raise TooLongError(f"Its step has more than {MOST_OPERATORS:,} operators")
        out = _run(func, args, kwargs or {})
        _mapped(out, self._see)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if weakref.ref(storage) in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[weakref.ref(storage, self._drop)] = size
        self.live += size
        self._last = (self.gradients, self.live)

    def _drop(self, reference: weakref.ref[torch.UntypedStorage]) -> None:
        size = self._sizes.pop(reference)
        self.live -= max(size, 0)
        self.gradients += min(size, 0)


@contextmanager
def counted(there: Iterable[Tensor] = (), ranks: int = 1) -> Iterator[Counted]:
    """Run what is called within on shapes, with a GPU's attention and dropout, and count; see `Counted`."""
    kept = F.scaled_dot_product_attention, F.dropout
    F.scaled_dot_product_attention, F.dropout = _attention, _dropout
    try:
        # Layers that a model drops at random are the same ones at each call.
        with torch.random.fork_rng(devices=[]), Counted(there, ranks) as mode:
            torch.manual_seed(0)
            yield mode
    finally:
        F.scaled_dot_product_attention, F.dropout = kept


def step(
    loss: Callable[[], Tensor],
    trained: Mapping[str, nn.Parameter],
    there: Iterable[Tensor],
    ranks: int = 1,
    released: bool = False,
    offloaded: bool = False,
    updating: Mapping[str, float] | None = None,
) -> Held:
    """Return what forward and backward of a loss hold.

    Args:
        loss: Computes it; called once.
        trained: The parameters that require gradients, or get those of a slice, by name.
        there: Weights and buffers.
        ranks: GPUs over which gradients are sharded.
        released: Whether each gradient is freed when it is complete.
        offloaded: Whether what forward keeps lies in host memory until it is used.
        updating: Bytes that the update of each parameter works with, within backward if gradients are released.
    """
    unused, working, away = set(trained), updating or {}, _Away(offloaded)

    def arrived(name: str, mode: Counted, param: Tensor) -> None:
        unused.discard(name)
        assert param.grad is not None
        mode.turn_into_gradient(part_of(param.grad))
        if released:
            if name in working:
                torch.empty(int(working[name]), dtype=torch.uint8, device=META)
            param.grad = None

    def hook(name: str, mode: Counted, param: nn.Parameter) -> Any:
        # torch takes no hook of what requires no gradient.
        required = param.requires_grad
        made = param.requires_grad_(True).register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            partial(arrived, name, mode)
        )
        param.requires_grad_(required)
        return made

    with counted(there, ranks) as mode:
        hooks = [hook(name, mode, param) for name, param in trained.items()]
        try:
            with away.offload(mode):
                value = loss()
            kept = mode.live
            torch.autograd.backward(value)
            mode.settle()
            gradients = mode.gradients
        finally:
            for handle, param in zip(hooks, trained.values(), strict=True):
                handle.remove()
                param.grad = None
    return Held(kept, gradients, mode.most, *mode.peak, frozenset(unused), sum(away.sizes.values()))


class _Away:
    """What lies in host memory: `sizes`, bytes by storage. Weights stay, and what has values, which is small."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.sizes: dict[weakref.ref[torch.UntypedStorage], int] = {}

    def offload(self, mode: Counted) -> Any:
        """Return the context within which what is kept for backward is dropped, and made again when it is used."""

        def pack(tensor: Tensor) -> Any:
            if not tensor.is_meta or mode.is_there(tensor):
                return tensor
            storage = tensor.untyped_storage()
            self.sizes[weakref.ref(storage)] = storage.nbytes()
            return tensor.shape, tensor.stride(), tensor.dtype

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            return torch.empty_strided(*kept[:2], dtype=kept[2], device=META)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack) if self.wanted else nullcontext()


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the meta device; on the CPU if all that it takes has values and what it makes is no float."""
    name, place = func.overloadpacket.__name__, kwargs.get("device")
    given: list[Tensor] = []
    _mapped((args, tuple(kwargs.values())), given.append)
    if given and place is None and name not in SPECIAL and all(tensor.is_meta for tensor in given):
        return func(*args, **kwargs)
    has_values = not any(tensor.is_meta for tensor in given)
    if has_values and place != META:
        try:
            # Numbers keep their values, whatever their kind.
            return _mapped(func(*args, **kwargs), lambda made: _shape(made) if made.ndim and _is_float(made) else made)
        except NotImplementedError:
            has_values = False
    if name == "_local_scalar_dense":
        # A model asks its activations whether all is well.
        return args[0].dtype.is_floating_point or args[0].dtype == torch.bool or 1
    meant = list(args)
    if name in INDEXING:
        # A mask with values says how many elements it selects.
        masks = [index is not None and not index.is_meta and index.dtype == torch.bool for index in args[1]]
        chosen = [i.nonzero().unbind(1) if is_mask else (i,) for i, is_mask in zip(args[1], masks, strict=True)]
        meant[1] = [index for indices in chosen for index in indices]
    elif name == GROUPED:
        # Its shape is known for bfloat16 alone.
        meant = [each.bfloat16() if isinstance(each, Tensor) and _is_float(each) else each for each in args]
    options = {key: _mapped(each, _shape) for key, each in kwargs.items()}
    out = func(*_mapped(meant, _shape), **options | ({} if place is None else {"device": META}))
    if has_values and not _is_float(out):
        return func(*args, **kwargs | {"device": CPU})
    if name in CHOOSING:
        of = args[0].shape[-1]
        return _mapped(out, lambda made: made if _is_float(made) else _spread(made, of))
    return args[0] if name.endswith("_") else out.to(args[0].dtype) if name == GROUPED else out


def _mapped(value: Any, convert: Callable[[Tensor], Any]) -> Any:
    """Convert the tensors of a value, of its tuples and lists."""
    if isinstance(value, Tensor):
        return convert(value)
    return type(value)([_mapped(each, convert) for each in value]) if isinstance(value, (list, tuple)) else value


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _shape(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.to(META)


def _spread(indices: Tensor, of: int) -> Tensor:
    """Return indices below `of` in this shape, each equally often."""
    return torch.arange(indices.numel()).remainder_(of).reshape(indices.shape)


class _Attention(torch.autograd.Function):
    """What FlashAttention and its relatives keep: their inputs, the output and a log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if query.shape[-1] == value.shape[-1]:
            # Its layout is the query's, which decides whether the next layer has to copy.
            out = torch.empty_like(query)
        else:
            out = value.new_empty((*query.transpose(1, 2).shape[:-1], value.shape[-1])).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, out, out.new_empty(out.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return tuple(torch.empty_like(tensor) if needs else None for tensor, needs in needed)


_unfused_attention = F.scaled_dot_product_attention


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> Any:
    # Keys that are broadcast over heads have no fused kernel.
    if query.ndim != 4 or (query.shape[1] != key.shape[1] and not options.get("enable_gqa")):
        return _unfused_attention(query, key, value, attn_mask, *rest, **options)
    return _Attention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input
