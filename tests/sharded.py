"""Models sharded by FSDP2, and their weights as wholes: what tests of several processes share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def weights(model):
    return {name: whole(param.detach()) for name, param in model.named_parameters()}


def shard(model, size, how):
    mesh = dist.init_device_mesh("cpu", (size,))
    if how == "hybrid":
        mesh = dist.init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if how == "mixed" else None
    options = {"mesh": mesh} | ({"mp_policy": policy} if policy else {})
    if how != "root":
        for block in model.blocks:
            fully_shard(block, **options)
    fully_shard(model, **options)
