"""How an optimizer's state is written and read: tensors and plain types in `state` and `param_groups` only.

A saved state is what `torch.optim.Optimizer.state_dict` makes of the live one, with two changes: its tensors
are copies (the live ones are views of the arena), and the first group carries the position of the run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from misa_kernels import options as arguments
from misa_kernels.layout import SCORES, Layout
from misa_kernels.memory.codec import FORMATS
from misa_kernels.memory.storage import KEYS, PRECISIONS, Storage

# Kept in the first group of a saved state: the round, the step in it, step() calls so far, the seed of all
# draws (a draw depends on nothing but seed, round and scores) and steps skipped in earlier rounds; how the
# moments are stored; and what the run may have been given otherwise.
NUMBERS = ("round", "round_step", "steps", "seed", "skipped_steps")
STORED = ("state_dtype", "param_precision")
GIVEN = ("inner_steps", "sampler", "delta")
POSITION = (*NUMBERS, *STORED, *GIVEN)
# The other reason of several differences, and its remedy.
CHANGED = (
    "; or, if layers were frozen or thawed in mid-run, construct MISA with the flags of the first time, repeat that "
    "within `with optimizer.thawed():`, and load then"
)


def detach(state: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
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


@dataclass(frozen=True)
class Saved:
    """A saved state that fits an optimizer.

    Attributes:
        position: What the first group carries of `NUMBERS` and, where the version that saved it did, `GIVEN`.
        storage: How moments are stored in it.
        own: What it has of each parameter that may be trained.
        hyperparameters: What its groups hold beside parameters and position, copied.
        active: int64[k], numbers of the active modules, ascending.
        scores: One number a module, by the names of `SCORES`.
    """

    position: dict[str, Any]
    storage: Storage
    own: dict[Tensor, dict[str, Any]]
    hyperparameters: list[dict[str, Any]]
    active: npt.NDArray[np.int64]
    scores: dict[str, npt.NDArray[Any]]


def read(saved: Mapping[str, Any], groups: Sequence[dict[str, Any]], layout: Layout) -> Saved:
    """Return a saved state after checking all of it; nothing is changed.

    Args:
        saved: What `state_dict` returned.
        groups: The live `param_groups`.
        layout: What may be trained.

    Raises:
        ValueError: If it is another optimizer's, another model's, or of other modules or a larger budget.
        TypeError: If a hyperparameter is not a number.
    """
    position, storage = _position(saved)
    own = _match(saved, groups, layout, layout.slots.sizes(storage))
    values = layout.slots.read(own)
    _check_modules(values["module"], layout)
    active = np.flatnonzero(layout.slots.first(values["active"]))
    spread = torch.from_numpy(np.isin(layout.slots.candidate, active))
    if not len(active) or not torch.equal(spread, values["active"]):
        raise ValueError(
            f"state dict has {len(active)} active modules, of some of which a part is not active, and must have one at "
            "least: it was changed after it was saved"
        )
    needed = int(layout.candidates.numel[active].sum())
    if needed > layout.partition.budget:
        raise ValueError(
            f"state dict has {needed} active parameters but delta allows {layout.partition.budget}: use the delta "
            "it was saved with"
        )
    hyperparameters = []
    for group, saved_group in zip(groups, saved["param_groups"], strict=True):
        kept = {name: _number(value) for name, value in saved_group.items() if name not in ("params", *POSITION)}
        arguments.check_hyperparameters({**group, **kept})
        hyperparameters.append(copy.deepcopy(kept))
    return Saved(
        position, storage, own, hyperparameters, active, {name: layout.slots.first(values[name]) for name in SCORES}
    )


def _number(value: Any) -> Any:
    """Return a tensor, such as an lr, on the CPU: `map_location` and accelerate move all that a state dict holds."""
    return value.cpu() if isinstance(value, Tensor) and not value.is_meta else value


def _position(saved: Mapping[str, Any]) -> tuple[dict[str, Any], Storage]:
    groups = saved["param_groups"]
    if not groups or any(name not in groups[0] for name in (*NUMBERS, *STORED)):
        raise ValueError("state dict has no 'round' in its first group: it was not saved by MISA")
    position = {name: groups[0][name] for name in POSITION if name in groups[0]}
    if "sampler" in position:
        # An option that samplers had in 0.1, at the value that does nothing.
        position["sampler"] = str(position["sampler"]).replace("first_visits=None, ", "")
    for name in NUMBERS:
        if isinstance(position[name], bool) or not isinstance(position[name], int) or position[name] < 0:
            raise ValueError(
                f"state dict has {name}={position[name]!r}, which must be a whole number >= 0: it was changed after it "
                "was saved"
            )
    storage = Storage(*(position[name] for name in STORED))
    if storage.state_dtype not in FORMATS or storage.param_precision not in PRECISIONS:
        raise ValueError(
            f"state dict has {storage}, which this version of misa_kernels does not know: load it with the one that "
            "saved it"
        )
    return position, storage


def _match(
    saved: Mapping[str, Any], groups: Sequence[dict[str, Any]], layout: Layout, sizes: dict[Tensor, dict[str, int]]
) -> dict[Tensor, dict[str, Any]]:
    """Return the saved state of each parameter that may be trained."""
    saved_groups = saved["param_groups"]
    counts, saved_counts = ([len(group["params"]) for group in side] for side in (groups, saved_groups))
    if counts != saved_counts:
        raise ValueError(
            f"state dict has param groups of {saved_counts} tensors but this optimizer has {counts}: it belongs to "
            f"another model{CHANGED}"
        )
    names = iter(layout.partition.names)
    own = {}
    strangers = []
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        _check_names([group.get("role")], [saved_group.get("role")], f"role of group {number}")
        for key in ("modules", "layers", "param_names"):
            _check_names(group.get(key), saved_group.get(key), f"{key} of group {number}")
        for param, index in zip(group["params"], saved_group["params"], strict=True):
            name, found = next(names), saved["state"].get(index, {})
            if param in sizes:
                own[param] = found
                if layout.slots.spans[param].start >= layout.slots.dense:
                    _check_scores(found, name)
                _check_elements(found, sizes[param], name)
            elif "importance" in found or "exp_avg" in found:
                strangers.append(name)
    if strangers:
        raise ValueError(
            f"state dict has scores or moments of {len(strangers)} tensors that are frozen here, {strangers[0]} the "
            f"first of them: set the requires_grad that they had when it was saved{CHANGED}"
        )
    return own


def _check_names(ours: list[Any] | None, theirs: list[Any] | None, what: str) -> None:
    if ours is None or theirs is None or list(ours) == list(theirs):
        return
    a, b = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
    raise ValueError(
        f"state dict names {b!r} in {what} where this optimizer has {a!r}: build the groups as they were when it "
        "was saved"
    )


def _check_scores(state: dict[str, Any], name: str) -> None:
    for score in SCORES:
        if score not in state:
            raise ValueError(
                f"state dict has no scores ({score!r}) for {name}: it belongs to another model, or went through "
                "torch's set_optimizer_state_dict, as accelerate does, which drops what is frozen now: use "
                "misa_kernels.distributed.load(model, optimizer, folder), or optimizer.load_state_dict for what "
                f"get_optimizer_state_dict gave{CHANGED}"
            )


def _check_elements(state: dict[str, Any], sizes: dict[str, int], name: str) -> None:
    for field, size in sizes.items():
        if field in state and state[field].numel() != size:
            raise ValueError(
                f"state dict has {field} of {state[field].numel()} elements for {name} but this optimizer needs "
                f"{size}: it belongs to another model, or use the delta, granularity and oversized it was saved with"
            )


def _check_modules(saved: Tensor, layout: Layout) -> None:
    """Refuse blocks that belonged together otherwise."""
    slots = layout.slots
    differing = (saved != slots.scores["module"])[slots.dense :].nonzero()
    if len(differing):
        slot = slots.dense + int(differing[0])
        name = layout.partition.names[slots.blocks[slot].index]
        module = layout.partition.modules[int(slots.candidate[slot])].name
        raise ValueError(
            f"state dict has {name} in module {int(saved[slot])}, and here it is in {int(slots.candidate[slot])}, "
            f"{module}: use the granularity, oversized, delta and groups that it was saved with"
        )
