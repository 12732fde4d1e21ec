"""Which role does each tensor of a model play, which tensors make a module, and in which layer do they lie?

The answer comes from the module tree: from types, shapes and identity, never from the spelling of a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from misa_kernels.draw import linears
from misa_kernels.draw.adapters import trains_for_peft
from misa_kernels.draw.found import Found, Groups
from misa_kernels.draw.order import Trace, remember
from misa_kernels.draw.roles import EXPERTS, MATRICES, places_of
from misa_kernels.draw.slices import axis_of
from misa_kernels.draw.spots import BEFORE, BEHIND, UNSURE, spots_of
from misa_kernels.draw.tree import Layer, Node, layers_of, nodes_of
from misa_kernels.outside.chosen import choice_of
from misa_kernels.outside.copies import Marks
from misa_kernels.outside.garbage import kept
from misa_kernels.outside.notices import warn

# Said from this share of the model on, where matrices are frozen that are neither embedding nor output head.
_MUCH = 0.2


@kept()
def param_groups(
    model: nn.Module,
    mode: Literal["finetune", "pretrain"] = "finetune",
    *,
    experts: Literal["each", "whole"] = "each",
    sampled: Iterable[nn.Module | nn.Parameter] = (),
    dense: Iterable[nn.Module | nn.Parameter] = (),
    frozen: Iterable[nn.Module | nn.Parameter] = (),
    layers: Iterable[nn.Module] | None = None,
    example: Any = None,
) -> Groups:
    """Sort the parameters of a model into groups for `MISA`, by how they are trained.

    Every parameter gets one of three roles:

    - "sampled": the weight matrices inside the layers (query, key, gate, ...) and between them, trained in turns;
    - "dense": trained at every step, on top of the budget that `delta` sets;
    - "frozen": never trained. It still counts in the total that `delta` is a fraction of, unless its
      `requires_grad` is False already.

    What is left beside those matrices (embeddings, position tables, norms, biases, scales of whatever shape, what
    stands before the first layer, poolers and heads behind the last) is frozen with `mode="finetune"`, where training
    it changes little and would take most of the memory that sampling saves, and dense with `mode="pretrain"`, where it
    starts at random. Whatever deserves training all the same, such as a new classification head, is named in `dense`.

    A layer is a module whose class repeats in a list of modules, or among the attributes of one, and which reads what
    another one writes; where such lists nest, the innermost that holds several matrices, so that a block of a stage is
    a layer and an expert in a layer is none. A matrix between layers, such as a projector between towers, is a layer of
    its own, as is a recurrent network. In a model without a stack each matrix is a layer.

    Layers of one stack run as they are registered. The order of several stacks shows in an `example`, or else in the
    first training step, in which MISA watches which of them is called first; until then they count as registered.

    In a model with adapters of the peft package, all trained tensors of one adapter at one place (A and B of
    LoRA, its bias, DoRA's magnitudes) are one module, named after the module that they adapt, plus the
    adapter's name where several lie there. peft has frozen what it does not mean to train, so what else it
    trains (a head in `modules_to_save`, an adapter beside the layers, a prompt) is dense in either mode.

    The model is only read. What has `requires_grad=False`, as all quantised weights do, is frozen, and the group tells
    MISA what becomes of it where it is thawed in mid-run; tied parameters appear once, under their first name.

    Args:
        model: The model, complete: adapters attached, weights tied, frozen parts frozen.
        mode: What happens to parameters that are not sampled, see above.
        experts: "each" makes every expert of a stacked weight of shape (experts, ..., ...) a module, together
            with its share of the other stacked weights beside it; "whole" makes every stacked weight one. Three axes
            are taken for experts where a router beside them, or another such weight, says so.
        sampled: Modules or parameters of the model to train in turns, whatever they look like.
        dense: Modules or parameters to train at every step.
        frozen: Modules or parameters to leave as they are.
        layers: The layers, in the order in which they run, if what is found is not what is meant.
        example: Arguments of one forward pass, a dict, a tuple or a tensor, which is run without gradients to see in
            which order the layers run and what they read. `rehearse()` is exact to a few per cent with it.

    Returns:
        At most three groups, without empty ones; printed, a table of what was found, which `found` holds. Each group
        has the keys

        - "params": (name, parameter) pairs;
        - "role": "sampled", "dense" or "frozen";
        - "modules": for each parameter the name of its module, or a list of E names where the parameter
          is E modules' equal row blocks along its first axis; equal names form one module;
        - "layers": for each parameter the name of the lowest layer that backward must run through to train
          it: the one that it lies in, else the next one, None behind the last;
        - "slices": for each parameter how it is cut with `granularity="slice"`: its part, such as "down", and the
          axis, 0 for rows and 1 for columns of the tensor; None where it is not;
        - "thawed", where the user has frozen some: the role of each frozen one if it is thawed in mid-run.

    Raises:
        TypeError: If `model` is not a module, or a list of modules and parameters holds anything else.
        ValueError: For an unknown `mode` or `experts`, or if a list names something that is not in the model, that
            cannot be trained, or that another list names, too.

    Example, a BERT classifier, whose head is new::

        groups = param_groups(model, dense=[model.classifier])
        optimizer = MISA(groups, lr=1e-5, delta=0.03)
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__} and must be an nn.Module: pass the model itself")
    if mode not in ("finetune", "pretrain"):
        raise ValueError(f"mode={mode!r} must be 'finetune' (the rest is frozen) or 'pretrain' (the rest is dense)")
    if experts not in ("each", "whole"):
        raise ValueError(f"experts={experts!r} must be 'each' (an expert is a module) or 'whole' (a stack of them is)")
    nodes = nodes_of(model)
    places = places_of(nodes)
    chosen = choice_of(Marks([place.name for place in places], [place.param for place in places])).flags
    trained = {id(place.param) for place, is_chosen in zip(places, chosen, strict=True) if is_chosen}
    meant = _meant({"sampled": sampled, "dense": dense, "frozen": frozen}, model, trained)
    stack = layers_of(nodes[0]) if layers is None else _given(layers, model)
    trace = None if example is None else Trace(model, example)
    kinds, spots, order = spots_of(nodes, places, stack, trace, is_ordered=layers is not None)
    rest = "dense" if mode == "pretrain" or trains_for_peft(node.module for node in nodes) else "frozen"

    groups: dict[str, dict[str, Any]] = {
        role: {"params": [], "role": role, "modules": [], "layers": [], "slices": []}
        for role in ("sampled", "dense", "frozen")
    }
    thawed: list[str] = []
    found: list[Found] = []
    axes = linears.find(node.module for node in nodes)
    for (name, param, _, _), (what, module, _), spot in zip(places, kinds, spots, strict=True):
        role, why = "sampled" if what in MATRICES and spot.layer is not None else rest, spot.why
        if id(param) in meant:
            role = meant[id(param)]
            why = f"named in {role}=[...]"
        if not param.is_floating_point():
            role, why = "frozen", str(param.dtype).removeprefix("torch.")
        modules: tuple[str, ...] = (name,)
        if role == "sampled" and what != EXPERTS:
            modules = (module,)
        elif role == "sampled" and experts == "each":
            modules = tuple(f"{module}.{expert}" for expert in range(len(param)))
        if id(param) in trained:
            group = groups[role]
        else:
            group, why = groups["frozen"], f"you froze it ({why})"
        if group is groups["frozen"]:
            thawed.append(role)
        group["params"].append((name, param))
        group["modules"].append(modules[0] if len(modules) == 1 else list(modules))
        # What is sampled against all appearance is a layer of its own.
        group["layers"].append(name if role == "sampled" and spot.layer is None else spot.lowest)
        part, reads = spot.flow.part, axes.get(id(param))
        group["slices"].append(None if reads is None else (part, axis_of(part, reads)))
        found.append(Found(name, param, spot.layer, modules, group["role"], why, *spot.flow))
    if not {"sampled", "dense"}.isdisjoint(thawed):
        groups["frozen"]["thawed"] = thawed
    _say(found, nodes, trained, set(meant))
    if places:
        remember(order, places[0].param)
    return Groups((group for group in groups.values() if group["params"]), found, order)


def _meant(
    lists: Mapping[str, Iterable[nn.Module | nn.Parameter]], model: nn.Module, trained: set[int]
) -> dict[int, str]:
    """Return the roles that the user gives to parameters, by their identity; those that may be trained are given."""
    own: set[int] = set()
    meant: dict[int, str] = {}
    for role, entries in lists.items():
        if isinstance(entries, (nn.Module, torch.Tensor, str)):
            raise TypeError(f"{role} is a single {type(entries).__name__} and must be a list: write {role}=[...]")
        for i, entry in enumerate(entries):
            if not isinstance(entry, (nn.Module, nn.Parameter)):
                raise TypeError(
                    f"{role}[{i}] is {type(entry).__name__} and must be a module or a parameter of the model: pass "
                    "the object itself, not its name"
                )
            params = list(entry.parameters()) if isinstance(entry, nn.Module) else [entry]
            own = own or {id(param) for param in model.parameters()}
            what = f"{role}[{i}], {type(entry).__name__} of {sum(param.numel() for param in params):,} elements,"
            if any(id(param) not in own for param in params):
                raise ValueError(f"{what} must lie in the model: take it from the one given to param_groups")
            if role != "frozen" and trained.isdisjoint(map(id, params)):
                raise ValueError(
                    f"{what} must hold a parameter with requires_grad=True to train: set that, or leave it out"
                )
            for param in params:
                if meant.setdefault(id(param), role) != role:
                    raise ValueError(f"{what} must not be in {meant[id(param)]}, too: name it in one of the lists")
    return meant


def _given(layers: Iterable[nn.Module], model: nn.Module) -> list[Layer]:
    """Return the layers that the user names."""
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    found = []
    for i, module in enumerate(layers):
        if not isinstance(module, nn.Module):
            raise TypeError(f"layers[{i}] is {type(module).__name__} and must be a module of the model")
        if not names.get(id(module)):
            raise ValueError(
                f"layers[{i}], {type(module).__name__}, must lie in the model: take it from the one given to "
                "param_groups"
            )
        found.append(Layer(names[id(module)], module, names[id(module)]))
    if not found:
        raise ValueError(
            "layers is empty and must hold the modules that are the layers, or be left out to have them found"
        )
    return found


def _say(found: Sequence[Found], nodes: Sequence[Node], trained: set[int], meant: set[int]) -> None:
    """Warn of what is frozen, and the user may not expect; what they froze themselves and what they named they do."""
    total = sum(f.param.numel() for f in found if id(f.param) in trained) or 1
    found = [f for f in found if id(f.param) in trained and id(f.param) not in meant]
    if odd := [f.name for f in found if f.param.is_complex()]:
        warn(
            f"{odd[0]}{f' and {len(odd) - 1} other tensors' if len(odd) > 1 else ''}: MISA trains real tensors; "
            "complex ones are frozen, so train them with another optimizer, or as their real and imaginary parts"
        )
    ends = [f for f in found if f.role == "frozen" and f.why in (BEFORE, BEHIND, UNSURE)]
    # The output head is expected.
    vocabularies = {node.module.num_embeddings for node in nodes if isinstance(node.module, nn.Embedding)}
    ends = [f for f in ends if vocabularies.isdisjoint(f.param.shape)]
    share = sum(f.param.numel() for f in ends) / total
    if share > _MUCH:
        largest = max(ends, key=lambda f: f.param.numel())
        what = f"{len(ends)} matrices" if len(ends) > 1 else "a matrix"
        where = largest.why if largest.why == UNSURE else f"which stands {largest.why}"
        warn(
            f"param_groups freezes {what} outside of the layers, {share:.0%} of the model, the largest {largest.name}, "
            f"{where}: name what is to be trained in sampled=[...] or dense=[...], or what is meant to be frozen in "
            "frozen=[...]"
        )
