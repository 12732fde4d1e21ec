"""Which part of a parameter lies on this rank, and sums over the ranks that hold the parts.

A sharded parameter is a DTensor, as FSDP2's `fully_shard` and tensor parallelism make them. The step works on what
lies here; sizes, budgets and norms are those of the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    # Where nobody has imported them there are none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def sharded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return those of some tensors that are DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    # One look at each of 100,000 types instead of a call.
    if module is None or not any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors))):
        return []
    return [tensor for tensor in tensors if is_sharded(tensor)]


def local(tensor: Tensor) -> Tensor:
    """Return what lies on this rank of a tensor: all of it, unless it is sharded."""
    return cast(Any, tensor)._local_tensor if is_sharded(tensor) else tensor


def sharded_axes(tensor: Tensor) -> set[int]:
    """Return the axes along which a tensor is cut among ranks."""
    if not is_sharded(tensor):
        return set()
    return {placement.dim for placement in cast(Any, tensor).placements if placement.is_shard()}


def is_held(held: Tensor | None, param: Tensor) -> bool:
    """Whether what a module holds is a parameter, or what FSDP2 has gathered of that for the moment."""
    is_gathered = type(held) is nn.Parameter and is_sharded(param) and held.shape == param.shape
    return held is param or is_gathered


def everywhere(tensor: Tensor) -> Tensor:
    """Return a tensor that all ranks hold whole; a collective where it is a DTensor."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    mesh = cast(Any, tensor).device_mesh
    return cast(Tensor, cast(Any, tensor).redistribute(placements=[Replicate()] * mesh.ndim))


def average_like(grad: Tensor, param: Tensor) -> Tensor:
    """Return the average of a gradient over the ranks of a sharded parameter, sharded as that is.

    Added up in float32 at least, in the order of the stream. A collective.

    Args:
        grad: This rank's, whole, of the shape of `param` but for axes along which that is not cut.
        param: The parameter.
    """
    from torch.distributed.tensor import DTensor, Partial

    mesh, placements = cast(Any, param).device_mesh, cast(Any, param).placements
    part = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).div_(mesh.size())
    own = DTensor.from_local(part, mesh, [Partial()] * mesh.ndim, run_check=False)
    return own.redistribute(placements=placements).to(grad.dtype)


def local_like(tensor: Tensor, param: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the part of `tensor` that belongs to the part of `param` on this rank, 1-D.

    Args:
        tensor: Sharded in any way or whole.
        param: A parameter.
        shape: That of `tensor`, which differs from that of `param` in axes along which that is not cut.
    """
    if not is_sharded(param):
        return tensor.reshape(-1)
    mesh, placements = cast(Any, param).device_mesh, cast(Any, param).placements
    if is_sharded(tensor):
        if cast(Any, tensor).placements != placements:
            tensor = cast(Any, tensor).redistribute(mesh, placements)
        return local(tensor).reshape(-1)
    from torch.distributed.tensor import distribute_tensor

    # Every rank has the whole, so nothing needs to travel.
    whole = tensor.to(mesh.device_type).view(tuple(shape))
    return local(distribute_tensor(whole, mesh, placements, src_data_rank=None)).reshape(-1)


def like(part: Tensor, param: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the DTensor whose part on this rank is `part`, sharded as `param` is; `part` itself if that is not.

    Args:
        part: Its part on this rank, of its shape.
        param: A parameter.
        shape: That of the whole, which differs from that of `param` in axes along which that is not cut.
    """
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = cast(Any, param).device_mesh, cast(Any, param).placements
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def part_of(param: Tensor) -> tuple[int, int, bool]:
    """Return which part of a sharded parameter lies here.

    Returns:
        The index of its first element within the whole parameter, flattened (where the part is no range of it, a
        number that leaves the indices of different parts disjoint), its elements, and whether no rank before this one
        holds the same part.

    Raises:
        TypeError: If what the ranks hold is to be summed, or the mesh does not contain this rank.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = cast(Any, param).device_mesh, cast(Any, param).placements
    where = mesh.get_coordinate()
    if where is None or any(placement.is_partial() for placement in placements):
        raise TypeError(
            f"a DTensor of shape {tuple(param.shape)} has placements {placements} on {mesh}, and must be sharded or "
            "replicated there, on this rank, too: build MISA on the ranks of its mesh, after fully_shard()"
        )
    is_first = all(at == 0 for at, placement in zip(where, placements, strict=True) if isinstance(placement, Replicate))
    numel = local(param).numel()
    if all(
        isinstance(placement, Replicate) or type(placement) is Shard and placement.dim == 0 for placement in placements
    ):
        _, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
        row = param.numel() // max(len(param), 1) if param.ndim else 1
        return (offset[0] * row if param.ndim else 0), numel, is_first
    number = 0
    for size, at, placement in zip(mesh.shape, where, placements, strict=True):
        number = number if isinstance(placement, Replicate) else number * size + at
    return number * param.numel(), numel, is_first


class Ranks:
    """Sums of what the ranks hold of sharded parameters.

    Args:
        group: All ranks that train together.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.is_first = dist.get_rank(group) == 0

    def sum(self, x: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place and in the order of the stream; every rank gets the same bits."""
        dist.all_reduce(x, group=self._group)
        return x


def ranks_of(params: Sequence[Tensor], group: dist.ProcessGroup | None) -> Ranks | None:
    """Return the ranks that sharded parameters lie on, None if none is sharded.

    Raises:
        ValueError: If a parameter lies on other ranks than those that train together.
    """
    found = sharded(params)
    if not found:
        return None
    size = 1 if group is None else dist.get_world_size(group)
    for param in found:
        if (ranks := cast(Any, param).device_mesh.size()) != size:
            raise ValueError(
                f"a DTensor of shape {tuple(param.shape)} lies on {ranks} ranks and must lie on all {size} that train "
                "together: shard every parameter on one mesh, or give MISA its process_group"
            )
    # A mesh of one rank has DTensors, too, and a group of one.
    return Ranks(cast(Any, found[0]).device_mesh.get_group(0) if group is None else group)
