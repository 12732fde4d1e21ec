"""Which keys has a state dict, and does one fit? Tensors and plain types in `state` and `param_groups` only.

A saved state is what `torch.optim.Optimizer.state_dict` makes of the live one, with changes: its tensors are copies
(the live ones are views of the arena), what `LiveState.to_save` says is left out or summed up, and the first group
carries the position of the run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from misa_kernels.clock import Clock
from misa_kernels.memory.codec import FORMATS
from misa_kernels.memory.storage import FOREIGN, PRECISIONS, Storage
from misa_kernels.options import check_hyperparameters
from misa_kernels.outside.notices import warn
from misa_kernels.outside.wrappers import is_same, unwrapped
from misa_kernels.run.layout import SHOWN, Layout
from misa_kernels.run.scores import Scores
from misa_kernels.run.updater import Updater

# Kept in the first group of a saved state: the position of the run, how the moments are stored, and what the run may
# have been given otherwise. A draw depends on nothing but seed, round, scores and `Scores.unheard`, which is kept here,
# too, as torch's tools want the same entries in every `state`.
CLOCK = tuple(field.name for field in fields(Clock))
STORED = ("state_dtype", "param_precision")
GIVEN = ("inner_steps", "sampler", "delta")
# What updates, where that is a rule of the user's.
RULE = "rule"
# The layers in the order in which they were seen to run, where their registration does not tell.
ORDER = "layer_order"
POSITION = (*CLOCK, *STORED, *GIVEN, "unheard", ORDER, RULE)
# Before what a group itself has under these names.
OWN = "own."
# What groups hold of names, which are those of the model here, in its wrappers.
NAMES = ("modules", "layers", "param_names")
# The other reason of several differences, and its remedy.
CHANGED = (
    "; or, if layers were frozen or thawed in mid-run, construct MISA with the flags of the first time, repeat that "
    "within `with optimizer.thawed():`, and load then"
)


def write(
    state_dict: dict[str, Any],
    updater: Updater,
    clock: Clock,
    unheard: list[int],
    given: Sequence[Any],
    order: Sequence[str] | None,
) -> None:
    """Make a state dict, as torch makes it, independent of the arena, and add the position of the run.

    Args:
        state_dict: What `torch.optim.Optimizer.state_dict` makes of the live state; modified.
        updater: What has the live state.
        clock: The position, with all steps skipped so far.
        unheard: What `Scores.unheard` returns.
        given: What the run was given, in the order of `GIVEN`.
        order: The layers as they run, where more than their registration tells.
    """
    state_dict["state"] = updater.to_save(state_dict["state"])
    for group in state_dict["param_groups"]:
        # Those of a rule may have the names of what follows.
        for name in [name for name in POSITION if name in group]:
            group[f"{OWN}{name}"] = group.pop(name)
        # A scheduler writes to an lr that is a tensor.
        group.update({name: value.detach().clone() for name, value in group.items() if isinstance(value, Tensor)})
    stored = updater.live.storage_in_state
    state_dict["param_groups"][0].update(
        asdict(clock),
        **dict(zip(STORED, (stored.state_dtype, stored.param_precision), strict=True)),
        **dict(zip(GIVEN, given, strict=True)),
        unheard=unheard,
        **({} if order is None else {ORDER: list(order)}),
        **({} if updater.rule is None else {RULE: updater.rule}),
    )


@dataclass(frozen=True)
class Saved:
    """A saved state that fits an optimizer.

    Attributes:
        position: What the first group carries of `CLOCK` and, where the version that saved it did, `GIVEN` and
            "unheard".
        storage: How moments are stored in it.
        own: What it has of each parameter that may be updater.
        hyperparameters: What its groups hold beside parameters, names and position, copied.
        active: int64[k], numbers of the active modules, ascending.
        scores: One number a module of what is known of it, by the names in `SHOWN`.
        order: The layers as they were seen to run; None if it has none of them.
    """

    position: dict[str, Any]
    storage: Storage
    own: dict[Tensor, dict[str, Any]]
    hyperparameters: list[dict[str, Any]]
    active: npt.NDArray[np.int64]
    scores: dict[str, npt.NDArray[Any]]
    order: list[str] | None

    def warn_of_differences(self, storage: Storage, given: Sequence[Any], made: str) -> None:
        """Say what of the run is not as it is given here, and holds all the same.

        Args:
            storage: How state is stored here.
            given: What the run was given here, in the order of `GIVEN`.
            made: What is to be said of where `inner_steps` comes from.
        """
        if self.storage != storage:
            warn(f"MISA converts a state dict with {self.storage} to {storage}")
        other = [
            f"{name}={self.position[name]} where this optimizer has {ours}{made if name == 'inner_steps' else ''}"
            for name, ours in zip(GIVEN, given, strict=True)
            if self.position.get(name, ours) != ours
        ]
        if other:
            warn(
                f"the state dict was saved with {', and '.join(other)}, which holds from here on: construct MISA as it "
                "was to go on as the run would have"
            )


def read(
    saved: Mapping[str, Any], groups: Sequence[dict[str, Any]], layout: Layout, scores: Scores, rule: str | None
) -> Saved:
    """Return a saved state after checking all of it; nothing is changed.

    Args:
        saved: What `state_dict` returned.
        groups: The live `param_groups`.
        layout: What may be updater.
        scores: What is known of it; only read.
        rule: What updates it, where that is a rule of the user's.

    Raises:
        ValueError: If it is another optimizer's, another model's, or of other modules or a larger budget.
        TypeError: If a hyperparameter is not a number.
    """
    position, storage = _position(saved)
    if position.get(RULE) != rule:
        theirs, ours = (name or "MISA's own AdamW" for name in (position.get(RULE), rule))
        raise ValueError(
            f"state dict holds the state of {theirs} and this optimizer updates by {ours}: give both one rule"
        )
    own = _match(saved, groups, layout, layout.sizes(storage))
    active, values = scores.read(own)
    _check_unheard(position.get("unheard", []), scores.candidates.numel.size)
    needed = int(scores.candidates.numel[active].sum())
    if needed > layout.partition.budget:
        raise ValueError(
            f"state dict has {needed} active parameters but delta allows {layout.partition.budget}: use the delta "
            "it was saved with"
        )
    hyperparameters, others = [], ("params", "slices", *NAMES, *POSITION)
    for group, saved_group in zip(groups, saved["param_groups"], strict=True):
        kept = {name.removeprefix(OWN): _number(x) for name, x in saved_group.items() if name not in others}
        if rule is None:
            check_hyperparameters({**group, **kept})
        hyperparameters.append(copy.deepcopy(kept))
    return Saved(position, storage, own, hyperparameters, active, values, _order(position, layout))


def _number(value: Any) -> Any:
    """Return a tensor, such as an lr, on the CPU: `map_location` and accelerate move all that a state dict holds."""
    return value.cpu() if isinstance(value, Tensor) and not value.is_meta else value


def _position(saved: Mapping[str, Any]) -> tuple[dict[str, Any], Storage]:
    groups = saved["param_groups"]
    if not groups or any(name not in groups[0] for name in (*CLOCK, *STORED)):
        raise ValueError("state dict has no 'round' in its first group: it was not saved by MISA")
    position = {name: groups[0][name] for name in POSITION if name in groups[0]}
    if "sampler" in position:
        # An option that samplers had in 0.1, at the value that does nothing.
        position["sampler"] = str(position["sampler"]).replace("first_visits=None, ", "")
    for name in CLOCK:
        if isinstance(position[name], bool) or not isinstance(position[name], int) or position[name] < 0:
            raise ValueError(
                f"state dict has {name}={position[name]!r}, which must be a whole number >= 0: it was changed after it "
                "was saved"
            )
    storage = Storage(*(position[name] for name in STORED))
    if storage.state_dtype not in (*FORMATS, FOREIGN) or storage.param_precision not in PRECISIONS:
        raise ValueError(
            f"state dict has {storage}, which this version of misa_kernels does not know: load it with the one that "
            "saved it"
        )
    return position, storage


def _order(position: dict[str, Any], layout: Layout) -> list[str] | None:
    """Return the layers that are here in the order that was saved, under the names that they have here."""
    if ORDER not in position:
        return None
    bare, here = unwrapped([position[ORDER]])[0], unwrapped([layout.partition.layers])[0]
    known = dict(zip(cast(list[str], here), layout.partition.layers, strict=True))
    return [known[name] for name in cast(list[str], bare) if name in known]


def _check_unheard(unheard: Any, modules: int) -> None:
    """Refuse what `Scores.unheard` does not return: a number and a count each."""
    are_whole = isinstance(unheard, Sequence) and all(type(number) is int and number >= 0 for number in unheard)
    if not are_whole or len(unheard) % 2 or max(unheard[::2], default=0) >= modules:
        raise ValueError(
            f"state dict has unheard={unheard!r}, which must be numbers below {modules} of modules, each with a whole "
            "number >= 0 of rounds: it was changed after it was saved"
        )


def _match(
    saved: Mapping[str, Any], groups: Sequence[dict[str, Any]], layout: Layout, sizes: dict[Tensor, dict[str, int]]
) -> dict[Tensor, dict[str, Any]]:
    """Return the saved state of each parameter that may be updater."""
    saved_groups = saved["param_groups"]
    counts, saved_counts = ([len(group["params"]) for group in side] for side in (groups, saved_groups))
    if counts != saved_counts:
        raise ValueError(
            f"state dict has param groups of {saved_counts} tensors but this optimizer has {counts}: it belongs to "
            f"another model{CHANGED}"
        )
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        ours, theirs = group.get("role"), saved_group.get("role")
        if ours != theirs:
            raise ValueError(_other_name(ours, theirs, f"role of group {number}"))
    for key in NAMES:
        # In which layer what is not sampled lies also depends on whether the order of the layers was known.
        are_compared = [key != "layers" or group.get("role") in (None, "sampled") for group in groups]
        ours, theirs = (
            [group.get(key) if is_compared else None for group, is_compared in zip(side, are_compared, strict=True)]
            for side in (groups, saved_groups)
        )
        _check_names(ours, theirs, key)
    names = iter(layout.partition.names)
    own = {}
    strangers = []
    for group, saved_group in zip(groups, saved_groups, strict=True):
        for param, index in zip(group["params"], saved_group["params"], strict=True):
            name, found = next(names), saved["state"].get(index, {})
            if param in sizes:
                own[param] = found
                if layout.spans[param].start >= layout.dense:
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


def _check_names(ours: Sequence[Any], theirs: Sequence[Any], key: str) -> None:
    """Compare what the groups have under a key, and where that differs, without the wrappers of either model."""
    if all(a is None or b is None or list(a) == list(b) for a, b in zip(ours, theirs, strict=True)):
        return
    for number, (ours_bare, theirs_bare) in enumerate(zip(unwrapped(ours), unwrapped(theirs), strict=True)):
        if ours_bare is None or theirs_bare is None:
            continue
        pairs = zip(ours_bare, theirs_bare, ours[number], theirs[number], strict=True)
        if (other := next(((a, b) for bare, there, a, b in pairs if not is_same(bare, there)), None)) is not None:
            raise ValueError(_other_name(*other, f"{key} of group {number}"))


def _other_name(ours: Any, theirs: Any, what: str) -> str:
    return (
        f"state dict names {theirs!r} in {what} where this optimizer has {ours!r}: build the groups as they were when "
        "it was saved"
    )


def _check_scores(state: dict[str, Any], name: str) -> None:
    for score in SHOWN:
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
