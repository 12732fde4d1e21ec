"""How an optimizer's state is written and read: tensors and plain types in `state` and `param_groups` only.

A saved state is what `torch.optim.Optimizer.state_dict` makes of the live one, with two changes: its tensors
are copies (the live ones are views of the arena), and the first group carries the position of the run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from misa_kernels.codec import FORMATS
from misa_kernels.storage import KEYS, PRECISIONS, Storage

# Kept in the first group of a saved state: the round, the step in it, step() calls so far, the seed of all
# draws (a draw depends on nothing but seed, round and scores), steps skipped in earlier rounds, and how the
# moments are stored.
POSITION = ("round", "round_step", "steps", "seed", "skipped_steps", "state_dtype", "param_precision")


def detach(state: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Return a copy of a state whose tensors share no memory with it.

    Views of one vector (the scores of 20,000 modules, say) remain views of one vector, so that saving them
    writes one storage.
    """
    copies: dict[int, Tensor] = {}

    def copied(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        base = value._base
        if base is None or name.split(".")[0] in KEYS:
            return value.detach().clone()
        if id(base) not in copies:
            copies[id(base)] = base.detach().clone()
        return copies[id(base)].as_strided(value.size(), value.stride(), value.storage_offset())

    return {param: {name: copied(name, value) for name, value in own.items()} for param, own in state.items()}


def storage_of(saved: dict[str, Any]) -> Storage:
    """Return how the moments of a saved state are stored.

    Raises:
        ValueError: If it is another optimizer's, or a later version's.
    """
    groups = saved["param_groups"]
    if not groups or any(name not in groups[0] for name in POSITION):
        raise ValueError("state dict has no 'round' in its first group: it was not saved by MISA")
    storage = Storage(groups[0]["state_dtype"], groups[0]["param_precision"])
    if storage.state_dtype not in FORMATS or storage.param_precision not in PRECISIONS:
        raise ValueError(
            f"state dict has {storage}, which this version of misa_kernels does not know: load it with the one that "
            "saved it"
        )
    return storage


def match(
    saved: dict[str, Any], groups: Sequence[dict[str, Any]], sizes: dict[Tensor, dict[str, int]]
) -> dict[Tensor, dict[str, Any]]:
    """Return the saved state of each parameter that may be trained.

    Args:
        saved: What `state_dict` returned.
        groups: The live `param_groups`.
        sizes: For every parameter that may be trained, the keys of what is stored of it and their numel.

    Raises:
        ValueError: If it is another model's, or made with other block boundaries.
    """
    saved_groups = saved["param_groups"]
    counts, saved_counts = ([len(group["params"]) for group in side] for side in (groups, saved_groups))
    if counts != saved_counts:
        raise ValueError(
            f"state dict has param groups of {saved_counts} tensors but this optimizer has {counts}: it belongs to "
            "another model"
        )
    own = {}
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        _check_names([group.get("role")], [saved_group.get("role")], f"role of group {number}")
        for name in ("modules", "layers", "param_names"):
            _check_names(group.get(name), saved_group.get(name), f"{name} of group {number}")
        for param, index in zip(group["params"], saved_group["params"], strict=True):
            if param in sizes:
                own[param] = saved["state"].get(index, {})
                _check_elements(own[param], sizes[param], f"parameter {index}")
    return own


def hyperparameters(saved_group: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of what a saved group holds beside its parameters and the position of the run."""
    return copy.deepcopy({name: value for name, value in saved_group.items() if name not in ("params", *POSITION)})


def _check_names(ours: list[Any] | None, theirs: list[Any] | None, what: str) -> None:
    if ours is None or theirs is None or list(ours) == list(theirs):
        return
    a, b = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
    raise ValueError(
        f"state dict names {b!r} in {what} where this optimizer has {a!r}: build the groups as they were when it "
        "was saved"
    )


def _check_elements(state: dict[str, Any], sizes: dict[str, int], name: str) -> None:
    for field, size in sizes.items():
        if field in state and state[field].numel() != size:
            raise ValueError(
                f"state dict has {field} of {state[field].numel()} elements for {name} but this optimizer needs "
                f"{size}: it belongs to another model"
            )
