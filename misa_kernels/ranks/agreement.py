"""Which ranks train together, and do they hold the same?"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from misa_kernels.ranks.shards import is_sharded

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
    model = wrapper_of(params)
    return None if model is None else group_of(cast(Any, model).process_group)


def wrapper_of(params: Sequence[Tensor]) -> nn.Module | None:
    """Return the DistributedDataParallel around a model with these parameters."""
    # Neither torch nor a parameter knows the DDP around it, so that all objects are looked at, once in a run:
    # 0.25 s for a million on a CPU of two cores. What gc.freeze() has put away is not among them.
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, nn.parallel.DistributedDataParallel)}
    known = set(params)
    for model in objects:
        if type(model) in kinds and not known.isdisjoint(model.parameters()):
            return cast(nn.Module, model)
    return None


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

    def share(self, what: str, own: str) -> str:
        """Return what the first rank gives; each gives something."""
        return self._gather(what, own)[1][0]

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
