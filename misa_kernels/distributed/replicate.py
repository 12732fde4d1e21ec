"""Copies of one model on several ranks: the average of the gradients that there are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from misa_kernels.gradients.axes import Slice
from misa_kernels.gradients.sliced import SlicedGradient, part_of
from misa_kernels.memory.arena import host, sent
from misa_kernels.optimizer import MISA
from misa_kernels.ranks.agreement import group_of
from misa_kernels.ranks.shards import is_sharded
from misa_kernels.run.arrivals import hooked

# A gradient of so many bytes travels alone and in place; smaller ones are put together up to as many.
BUCKET_BYTES = 1 << 20


def replicate(model: nn.Module, optimizer: MISA, *, process_group: dist.ProcessGroup | None = None) -> Replica:
    """Train copies of a model on the ranks of a process group, each on its part of every batch.

    Once, what MISA begins with is compared, and weights and buffers of rank 0 are sent to all. From then on every
    backward pass averages the gradients of what is trained in this round, while it still runs: nothing is sent for
    frozen modules, no copy of the gradients is kept beyond 1 MiB at a time, and a module that got no gradient on one
    rank counts there as 0.

    Args:
        model: The model, on this rank's device. Call it itself; it is not wrapped.
        optimizer: The MISA of its parameters, without `release_gradients`.
        process_group: The ranks; all of them if None.

    Returns:
        A handle with `no_sync()`, to be entered around backward passes whose gradients only add up, and `close()`.

    Raises:
        RuntimeError: If torch.distributed is not initialised, `release_gradients` is on, or the ranks differ.
        ValueError: If a parameter of the model is sharded, or requires a gradient and is not in the optimizer.

    Example::

        replica = replicate(model, optimizer)
        for batch in loader:
            model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("replicate() needs torch.distributed: start with torchrun and call init_process_group()")
    group = dist.group.WORLD if process_group is None else process_group
    assert group is not None
    if optimizer.releases_gradients:
        raise RuntimeError(
            "replicate() averages gradients before step(), and release_gradients=True uses them up in backward: leave "
            "one of them out"
        )
    optimizer.compare_with(group_of(group))
    return Replica(model, optimizer, group)


class Replica:
    """Averages the gradients of what is trained over all ranks, during backward; see `replicate`.

    Attributes:
        reduced_bytes: Bytes of gradients that this rank has put into the averages so far.
    """

    def __init__(self, model: nn.Module, optimizer: MISA, group: dist.ProcessGroup) -> None:
        self._group = group
        self._optimizer = optimizer
        self._size = dist.get_world_size(group)
        # Gradients arrive in about this order.
        self._params = [param for group in optimizer.param_groups for param in group["params"]][::-1]
        self._pending: list[_Bucket] = []
        self._bucket_of: dict[Tensor, _Bucket] = {}
        self._is_syncing = True
        self.reduced_bytes = 0
        self._is_reduced = False
        self._hooks = [hooked(param, self._arrive) for param in self._params if param.is_floating_point()]
        self._hooks.append(optimizer.register_step_pre_hook(self._catch_up))
        known = set(self._params)
        for name, param in model.named_parameters():
            if param.requires_grad and param not in known:
                raise ValueError(
                    f"{name} requires a gradient and must be in the optimizer, or the ranks would not average it: give "
                    "all parameters to MISA(...), or freeze it"
                )
            if is_sharded(param):
                raise ValueError(
                    f"{name} is sharded and must be whole to be replicated: FSDP2 averages gradients itself, those of "
                    "replicated shards, too, on a mesh of two dimensions"
                )
        first = dist.get_global_rank(group, 0)
        works = [
            dist.broadcast(tensor.detach(), first, group=group, async_op=True)
            for tensor in [*model.parameters(), *model.buffers()]
        ]
        for work in works:
            work.wait()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward passes inside add up gradients on each rank; the next one outside averages the sums."""
        before, self._is_syncing = self._is_syncing, False
        try:
            yield
        finally:
            self._is_syncing = before

    def close(self) -> None:
        """Average nothing from now on."""
        for hook in self._hooks:
            hook.remove()

    def _arrive(self, param: Tensor) -> None:
        """Note that a gradient is complete, and send off what waited for it (in backward, on its stream)."""
        if not self._is_syncing:
            return
        if not self._pending:
            self._begin()
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._bucket_of[param].waiting.discard(param)
        # In the same order on all ranks.
        for bucket in self._pending:
            if bucket.waiting:
                break
            if bucket.work is None:
                self._send(bucket)

    def _end(self) -> None:
        """Finish behind what else waits for the end of backward: of the last gradients of slices we are told there."""
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _begin(self) -> None:
        self._slices = {param: own for param, own in self._optimizer.trained.items() if own is not None}
        self._pending = _buckets([p for p in self._params if p.requires_grad or p in self._slices], self._slices)
        self._bucket_of = {param: bucket for bucket in self._pending for param in bucket.params}

    def _catch_up(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Take part in what the other ranks average if no gradient came up here since the last step."""
        has_closure = kwargs.get("closure") is not None or any(argument is not None for argument in args[1:])
        if not (self._is_reduced or has_closure):
            self._begin()
            self._finish()
        self._is_reduced = False

    def _send(self, bucket: _Bucket) -> None:
        grads = []
        for param in bucket.params:
            if param.grad is not None and param.grad.layout is not torch.strided:
                raise TypeError(f"a gradient of shape {tuple(param.shape)} is sparse: MISA trains dense gradients")
            grads.append(part_of(self._zeros(param) if param.grad is None else param.grad))
        alone = len(grads) == 1 and grads[0].is_contiguous()
        bucket.flat = grads[0].view(-1) if alone else torch.cat([grad.reshape(-1) for grad in grads])
        bucket.alone = alone
        bucket.flat.div_(self._size)
        bucket.work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)
        self.reduced_bytes += bucket.flat.nbytes

    def _zeros(self, param: Tensor) -> Tensor:
        """Return a gradient of zeros, of a slice where only that is trained."""
        own = self._slices.get(param)
        if own is None:
            return torch.zeros_like(param)
        return SlicedGradient(param.new_zeros(own.shape_of(param)), param.shape, own.axis, own.first)

    def _finish(self) -> None:
        """Send what is left, wait for everything, and put the averages into the gradients (at the end of backward)."""
        buckets, self._pending = self._pending, []
        self._is_reduced = True
        params = [param for bucket in buckets for param in bucket.params]
        for bucket in buckets:
            if bucket.work is None:
                self._send(bucket)
        # An expert that got no token on this rank may have got some on another.
        device = params[0].device
        present = [param.grad is not None for param in params]
        here = sent(host(present, torch.int32), device)
        dist.all_reduce(here, dist.ReduceOp.MAX, group=self._group)
        missing = {param for param in params if param.grad is None}
        if missing:
            # The only place that waits for the device.
            missing = {param for param, found in zip(params, here.tolist(), strict=True) if found} & missing
        for bucket in buckets:
            assert bucket.work is not None and bucket.flat is not None
            bucket.work.wait()
            pieces = torch.split(bucket.flat, bucket.numels)
            for param, piece in zip(bucket.params, pieces, strict=True):
                if param in missing:
                    param.grad = self._zeros(param)
                if param in missing or (param.grad is not None and not bucket.alone):
                    own = part_of(param.grad)
                    own.copy_(piece.view_as(own))


class _Bucket:
    """Gradients that travel together."""

    def __init__(self, params: list[Tensor], numels: list[int]) -> None:
        self.params = params
        self.numels = numels
        self.waiting = set(params)
        self.flat: Tensor | None = None
        self.alone = False
        self.work: Any = None


def _buckets(params: Sequence[Tensor], slices: Mapping[Tensor, Slice] = MappingProxyType({})) -> list[_Bucket]:
    """Cut parameters, in their order, into what travels together: one dtype, and few bytes or one tensor."""
    cut: list[_Bucket] = []
    held = 0
    for param in params:
        numel = math.prod(slices[param].shape_of(param)) if param in slices else param.numel()
        nbytes = numel * param.element_size()
        if not cut or param.dtype != cut[-1].params[0].dtype or held + nbytes > BUCKET_BYTES:
            cut.append(_Bucket([], []))
            held = 0
        cut[-1].params.append(param)
        cut[-1].numels.append(numel)
        cut[-1].waiting.add(param)
        held += nbytes
    return cut
