"""A distributed checkpoint, read on any number of ranks."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from misa_kernels.optimizer import MISA
from misa_kernels.ranks.shards import is_sharded


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
    state = {
        param: {name: _listed(value) for name, value in own.items()} for param, own in tree.get("state", {}).items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _listed(value: Any) -> Any:
    """Return a list where a checkpoint has the entries of one by their numbers, and what is no dict as it is."""
    if not isinstance(value, dict):
        return value
    found = {key: _listed(each) for key, each in value.items()}
    return [found[n] for n in range(len(found))] if found.keys() == set(range(len(found))) else found
