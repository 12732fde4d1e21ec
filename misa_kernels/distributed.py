"""How several processes train one model: what they must agree on, and the sum of the gradients that there are."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from misa_kernels.arena import host, sent
from misa_kernels.shards import is_sharded

if TYPE_CHECKING:
    from misa_kernels.optimizer import MISA

# A gradient of so many bytes travels alone and in place; smaller ones are put together up to as many.
BUCKET_BYTES = 1 << 20
# Seconds before an error that all ranks raise: the first to end may take the store along, before all have read it.
LINGER = 1.0


def group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the processes that train together: those given, else all there are; None where it is one alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    return group if dist.get_world_size(group) > 1 else None


def together(process_group: dist.ProcessGroup | None, params: Sequence[Tensor]) -> dist.ProcessGroup | None:
    """Return the processes that the user has train these parameters together; None if nobody said so.

    It is said by a process group, by DTensors, and by DistributedDataParallel around the parameters.
    """
    group = group_of(process_group)
    if group is None or process_group is not None or any(map(is_sharded, params)):
        return group
    # Neither torch nor a parameter knows the DDP around it, so that all objects are looked at, once in a run:
    # 0.25 s for a million on a CPU of two cores. What gc.freeze() has put away is not among them.
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, nn.parallel.DistributedDataParallel)}
    known = set(params)
    for model in objects:
        if type(model) in kinds and not known.isdisjoint(model.parameters()):
            return group_of(model.process_group)
    return None


class Agreement:
    """Compares what every rank holds, and raises on all of them where two differ or one does not come.

    Args:
        group: The processes that train one model.
    """

    # It goes through the store by which the group was made, not through its collectives: there it is known who has not
    # come. For gloo, monitored_barrier could tell. A collective of NCCL that not all join ends the process from torch's
    # watchdog (the default of TORCH_NCCL_ASYNC_ERROR_HANDLING, by its documentation), before Python could say why.
    # NCCL's groups are made by such a store, too, but nothing of this has run with them.

    def __init__(self, group: dist.ProcessGroup) -> None:
        from torch.distributed.distributed_c10d import PrefixStore, _get_process_group_store

        self._ranks = dist.get_process_group_ranks(group)
        self._at = dist.get_rank(group)
        self._store = PrefixStore("misa", _get_process_group_store(group))

    def check(self, what: str, values: Sequence[tuple[str, object]], remedy: str) -> None:
        """Compare named values, bit by bit; a digest travels, and the values themselves only where digests differ.

        Args:
            what: What is compared, as the subject of the sentence.
            values: Name and value of each part, plain types whose `repr` tells unequal ones apart.
            remedy: What to do about a difference.

        Raises:
            RuntimeError: On every rank, if one of them holds other values than rank 0 does; on those that wait, if one
                does not come within the timeout of the group's store, which is that of `init_process_group`.
        """
        held = json.dumps([(name, repr(value)) for name, value in values])
        turn, digests = self._gather(what, hashlib.sha256(held.encode()).hexdigest())
        if len(set(digests)) == 1:
            return
        other = next(at for at, digest in enumerate(digests) if digest != digests[0])
        if self._at in (0, other):
            self._store.set(f"{turn} held by {self._at}", held)
        ours, theirs = (json.loads(self._store.get(f"{turn} held by {at}")) for at in (0, other))
        here, there = self._ranks[0], self._ranks[other]
        if len(ours) != len(theirs):
            difference = f"{len(ours)} entries on rank {here} and {len(theirs)} on rank {there}"
        else:
            (name, a), (name_there, b) = next((x, y) for x, y in zip(ours, theirs, strict=True) if x != y)
            name_there = "" if name == name_there else f"{name_there} "
            difference = f"{name} {a} on rank {here} and {name_there}{b} on rank {there}"
        time.sleep(LINGER)
        raise RuntimeError(f"{what} must be the same on all ranks, and there is {difference}: {remedy}")

    def _gather(self, what: str, own: str) -> tuple[int, list[str]]:
        """Return how many times this rank has come, and what every rank gave."""
        store, size = self._store, len(self._ranks)
        turn = store.add(f"turns of {self._at}", 1)
        keys = [f"{turn} by {at}" for at in range(size)]
        # Else the others have given up on this rank, as told below.
        if not store.check([keys[self._at]]):
            store.set(keys[self._at], own)
        seconds, pause = cast(Any, store).timeout.total_seconds(), 0.001
        deadline = time.monotonic() + seconds
        # Not by `store.wait`: it listens to no Ctrl-C, and holds a lock that NCCL's watchdog may need.
        while not store.check(keys):
            if time.monotonic() < deadline:
                time.sleep(pause)
                # A thousand ranks would ask for a thousand keys each.
                pause = min(2 * pause, 0.05 + size / 1000)
                continue
            for key in keys:
                if not store.check([key]):
                    store.set(key, "")
        found = [value.decode() for value in store.multi_get(keys)]
        # All have come here, and so have read what was given before.
        store.delete_key(f"{turn - 1} by {self._at}")
        if absent := [str(rank) for rank, value in zip(self._ranks, found, strict=True) if not value]:
            time.sleep(LINGER)
            raise RuntimeError(
                f"{what} must be the same on all {size} ranks that train together, and rank{'s' * (len(absent) > 1)} "
                f"{', '.join(absent)} did not come to compare it within {seconds:g} s: construct MISA on all of them "
                "and call step() equally often, or give it the process_group of those that train together"
            )
        return turn, found


class Replica:
    """Averages the gradients of what is trained over all ranks, during backward; see `replicate`.

    Attributes:
        reduced_bytes: Bytes of gradients that this rank has put into the averages so far.
    """

    def __init__(self, model: nn.Module, optimizer: MISA, group: dist.ProcessGroup) -> None:
        self._group = group
        self._size = dist.get_world_size(group)
        # Gradients arrive in about this order.
        self._params = [param for group in optimizer.param_groups for param in group["params"]][::-1]
        self._pending: list[_Bucket] = []
        self._bucket_of: dict[Tensor, _Bucket] = {}
        self._is_syncing = True
        self.reduced_bytes = 0
        self._is_reduced = False
        self._hooks = [_hooked(param, self._arrive) for param in self._params if param.is_floating_point()]
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
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._bucket_of[param].waiting.discard(param)
        # In the same order on all ranks.
        for bucket in self._pending:
            if bucket.waiting:
                break
            if bucket.work is None:
                self._send(bucket)

    def _begin(self) -> None:
        self._pending = _buckets([param for param in self._params if param.requires_grad])
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
            grads.append(torch.zeros_like(param) if param.grad is None else param.grad)
        alone = len(grads) == 1 and grads[0].is_contiguous()
        bucket.flat = grads[0].view(-1) if alone else torch.cat([grad.reshape(-1) for grad in grads])
        bucket.alone = alone
        bucket.flat.div_(self._size)
        bucket.work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)
        self.reduced_bytes += bucket.flat.nbytes

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
            pieces = torch.split(bucket.flat, [param.numel() for param in bucket.params])
            for param, piece in zip(bucket.params, pieces, strict=True):
                if param in missing:
                    param.grad = piece.view_as(param).clone()
                elif param.grad is not None and not bucket.alone:
                    param.grad.copy_(piece.view_as(param))


class _Bucket:
    """Gradients that travel together."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.waiting = set(params)
        self.flat: Tensor | None = None
        self.alone = False
        self.work: Any = None


def _buckets(params: Sequence[Tensor]) -> list[_Bucket]:
    """Cut parameters, in their order, into what travels together: one dtype, and few bytes or one tensor."""
    cut: list[list[Tensor]] = []
    held = 0
    for param in params:
        if not cut or param.dtype != cut[-1][0].dtype or held + param.nbytes > BUCKET_BYTES:
            cut.append([])
            held = 0
        cut[-1].append(param)
        held += param.nbytes
    return [_Bucket(part) for part in cut]


def _hooked(param: Tensor, hook: Any) -> Any:
    """Register a hook for complete gradients; torch takes none while a parameter requires no gradient."""
    required = param.requires_grad
    param.requires_grad_(True)
    handle = cast(Any, param).register_post_accumulate_grad_hook(hook)
    param.requires_grad_(required)
    return handle


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
    optimizer._run.meet(group_of(group))
    return Replica(model, optimizer, group)


def load(model: nn.Module, optimizer: MISA, checkpoint_id: str | os.PathLike[str], *, key: str = "optimizer") -> None:
    """Resume the optimizer from a distributed checkpoint, saved by any number of ranks.

    The checkpoint is one of `torch.distributed.checkpoint.save`, with the optimizer as `get_optimizer_state_dict` gives
    it. torch's own way back, `set_optimizer_state_dict`, drops what is frozen at the moment, while the saved active set
    is another; so what is saved is read off the checkpoint itself. A collective: all ranks call it. Load the model's
    weights first.

    Args:
        model: The model, sharded as it shall be trained now.
        optimizer: A MISA of its parameters, constructed as the one that was saved.
        checkpoint_id: Folder of the checkpoint.
        key: Name of the optimizer in what was saved.

    Raises:
        ValueError: If the checkpoint holds no optimizer of that name, or one that does not fit; nothing is changed.

    Example::

        dcp.save({"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)},
                 checkpoint_id=folder)

        weights = get_model_state_dict(model)
        dcp.load({"model": weights}, checkpoint_id=folder)
        set_model_state_dict(model, weights)
        load(model, optimizer, folder)
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as read

    metadata = FileSystemReader(checkpoint_id).read_metadata()
    params = dict(model.named_parameters())
    wanted: dict[str, Any] = {}
    paths: dict[str, tuple[Any, ...]] = {}
    for name, stored in metadata.state_dict_metadata.items():
        path = (metadata.planner_data or {}).get(name, (name,))
        if path[0] != key:
            continue
        paths[name] = path[1:]
        if not isinstance(stored, TensorStorageMetadata):
            wanted[name] = None
            continue
        param = params.get(str(path[2])) if path[1] == "state" else None
        place = torch.empty(stored.size, dtype=stored.properties.dtype, device="cpu")
        # Moments and masters come back cut as the parameter is now, all else whole.
        if param is not None and is_sharded(param) and param.shape == stored.size:
            place = torch.empty_like(param, dtype=stored.properties.dtype)
        wanted[name] = place
    if not wanted:
        raise ValueError(
            f"the checkpoint {checkpoint_id} has no {key!r}: name what the optimizer was saved as with key="
        )
    read(wanted, checkpoint_id=checkpoint_id)
    tree: dict[Any, Any] = {}
    for name, path in paths.items():
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = wanted[name]
    groups = tree.get("param_groups", {})
    if isinstance(groups, dict):
        groups = [groups[number] for number in sorted(groups)]
    optimizer.load_state_dict({"state": tree.get("state", {}), "param_groups": groups})


def refuse_engines(params: Sequence[Tensor]) -> None:
    """Refuse parameters that FSDP1 or DeepSpeed ZeRO has flattened or partitioned.

    Raises:
        TypeError: With what to use instead.
    """
    for param in params:
        if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
            engine = "FullyShardedDataParallel (FSDP1) has flattened it"
        elif hasattr(param, "ds_id"):
            engine = "DeepSpeed ZeRO has partitioned it"
        else:
            continue
        raise TypeError(
            f"a parameter of shape {tuple(param.shape)} is not the model's own, {engine}, and modules cannot be told "
            "apart in it: use FSDP2, which is fsdp_version: 2 in accelerate's configuration or fully_shard() before "
            "MISA, or, if the model fits on one GPU, misa_kernels.distributed.replicate(model, optimizer)"
        )
