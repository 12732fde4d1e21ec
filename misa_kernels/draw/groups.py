"""Which role does each tensor of a model play, which tensors make a module, and in which layer do they lie?

The answer comes from the module tree: from types, shapes and identity, never from the spelling of a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from misa_kernels.outside.flags import chosen_of

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# The first axis of their three-dimensional weights counts output features, not experts.
_NOT_EXPERTS = (nn.Conv1d, nn.ConvTranspose1d, nn.Bilinear, ParametrizationList)


def param_groups(
    model: nn.Module,
    mode: Literal["finetune", "pretrain"] = "finetune",
    *,
    experts: Literal["each", "whole"] = "each",
    dense: Iterable[nn.Module | nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Sort the parameters of a model into groups for `MISA`, by how they are trained.

    Every parameter gets one of three roles:

    - "sampled": the weight matrices inside the layers (query, key, gate, ...), trained in turns;
    - "dense": trained at every step, on top of the budget that `delta` sets;
    - "frozen": never trained. It still counts in the total that `delta` is a fraction of, unless its
      `requires_grad` is False already.

    What is left beside those matrices (embeddings, norms, biases, the output head, a projector between
    towers) is frozen with `mode="finetune"`, where training it changes little and would take most of the
    memory that sampling saves, and dense with `mode="pretrain"`, where it starts at random. Whatever deserves
    training all the same, such as a new classification head, is named in `dense`.

    A layer is an element of a stack: an outermost ModuleList, Sequential or ModuleDict in which modules of
    one class, with matrices inside, repeat. Several stacks, of an encoder and a decoder or of a vision and a
    text model, follow one another as they are registered. In a model without a stack each matrix is a layer.

    In a model with adapters of the peft package, all trained tensors of one adapter at one place (A and B of
    LoRA, its bias, DoRA's magnitudes) are one module, named after the module that they adapt, plus the
    adapter's name where several lie there. peft has frozen what it does not mean to train, so what else it
    trains (a head in `modules_to_save`, an adapter beside the layers) is dense in either mode.

    The model is only read. What has `requires_grad=False`, as all quantised weights do, is frozen, and the group tells
    MISA what becomes of it where it is thawed in mid-run; tied parameters appear once, under their first name.

    Args:
        model: The model, complete: adapters attached, weights tied, frozen parts frozen.
        mode: What happens to parameters that are not sampled, see above.
        experts: "each" makes every expert of a stacked weight of shape (experts, ..., ...) a module, together
            with its share of the other stacked weights beside it; "whole" makes every stacked weight one.
        dense: Modules or parameters of the model to train at every step.

    Returns:
        At most three groups, without empty ones, with the keys

        - "params": (name, parameter) pairs;
        - "role": "sampled", "dense" or "frozen";
        - "modules": for each parameter the name of its module, or a list of E names where the parameter
          is E modules' equal row blocks along its first axis; equal names form one module;
        - "layers": for each parameter the name of the lowest layer that backward must run through to train
          it: the one that it lies in, else the next one registered, None behind the last;
        - "thawed", where the user has frozen some: the role of each frozen one if it is thawed in mid-run.

    Raises:
        TypeError: If `model` is not a module, or `dense` holds anything but modules and parameters.
        ValueError: For an unknown `mode` or `experts`, or if `dense` names something that is not in the model
            or that cannot be trained.

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
    places = list(_places(model))
    chosen = chosen_of([place.name for place in places], [place.param for place in places])
    trained = {id(place.param) for place, is_chosen in zip(places, chosen, strict=True) if is_chosen}
    always_on = _always_on(dense, model, trained)
    inside = _layers_inside(places, model)
    is_adapted = any(map(_is_of_peft, model.modules()))

    roles = ("sampled", "dense", "frozen")
    groups: dict[str, dict[str, Any]] = {
        role: {"params": [], "role": role, "modules": [], "layers": []} for role in roles
    }
    thawed: list[str] = []
    for place, layer, lowest in zip(places, inside, _next_layers(inside), strict=True):
        module: str | list[str] = place.name
        if not place.param.is_floating_point():
            role = "frozen"
        elif id(place.param) in always_on:
            role = "dense"
        elif place.is_matrix and layer is not None:
            role, module = "sampled", place.module
            if place.is_stacked and experts == "each":
                stem = place.name.rpartition(".")[0] or place.name
                module = [f"{stem}.{expert}" for expert in range(len(place.param))]
        else:
            role = "dense" if mode == "pretrain" or is_adapted else "frozen"
        group = groups[role if id(place.param) in trained else "frozen"]
        if group["role"] == "frozen":
            thawed.append(role)
        group["params"].append((place.name, place.param))
        group["modules"].append(module)
        group["layers"].append(lowest)
    if not {"sampled", "dense"}.isdisjoint(thawed):
        groups["frozen"]["thawed"] = thawed
    return [group for group in groups.values() if group["params"]]


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in the module tree.

    Args:
        name: Its first name in the model.
        param: The parameter.
        owner: The torch module it is an attribute of.
        module: Name of the module it makes when sampled: its adapter's, or the owner's if that holds no other
            matrix, else its own.
        is_matrix: Whether it is sampled when it lies in a layer.
        is_stacked: Whether it is the matrices of several experts, along the first axis.
    """

    name: str
    param: nn.Parameter
    owner: nn.Module
    module: str
    is_matrix: bool
    is_stacked: bool


def _places(model: nn.Module) -> Iterator[_Place]:
    """Yield the place of every parameter once, in the order and under the names of `model.named_parameters()`."""
    seen: set[int] = set()
    adapters = _adapters(model)
    for path, owner in model.named_modules():
        own = list(owner.named_parameters(prefix=path, recurse=False))
        stacked = {len(param) for _, param in own if _is_stacked(param, owner)}
        alone = bool(own) and sum(param.ndim >= 2 for param in owner.parameters()) == 1
        for name, param in own:
            if id(param) in seen:
                continue
            seen.add(id(param))
            # Beside the stacked matrices of E experts, a tensor of E rows is their biases.
            vectors = param.ndim < 2 or (param.ndim == 2 and len(param) in stacked)
            module = path if alone and path else name
            is_matrix = not vectors and not isinstance(owner, _EMBEDDINGS)
            if id(param) in adapters:
                adapter = adapters[id(param)]
                module, is_matrix = adapter or module, adapter is not None
            is_stacked = id(param) not in adapters and _is_stacked(param, owner)
            yield _Place(name, param, owner, module, is_matrix, is_stacked)


def _adapters(model: nn.Module) -> dict[int, str | None]:
    """Return the module that each tensor of an adapter makes, by its identity; None where several wrappers share it."""
    names: dict[int, set[str]] = {}
    for path, wrapper in _wrappers(model):
        tensors = [
            (adapter, param)
            for name in wrapper.adapter_layer_names  # type: ignore[union-attr]
            for adapter, part in getattr(wrapper, name, {}).items()
            for param in (part.parameters() if isinstance(part, nn.Module) else [part])
        ]
        several = len({adapter for adapter, _ in tensors}) > 1
        for adapter, param in tensors:
            own = f"{path}.{adapter}" if path and several else path or adapter
            names.setdefault(id(param), set()).add(own)
    return {param: own.pop() if len(own) == 1 else None for param, own in names.items()}


def _wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each of peft's layers, which hold the module that they adapt, from the outside in."""
    for path, module in model.named_modules():
        if _is_of_peft(module) and "base_layer" in module._modules:
            yield path, module


def _is_of_peft(module: nn.Module) -> bool:
    """Whether a module is peft's: all of these say so which of their attributes hold an entry for each adapter."""
    return hasattr(type(module), "adapter_layer_names")


def _bare(module: nn.Module) -> nn.Module:
    """Return the module that peft has wrapped, others as they are."""
    while _is_of_peft(module):
        inner = module._modules.get("base_layer", module._modules.get("original_module"))
        if inner is None:
            break
        module = inner
    return module


def _is_stacked(param: nn.Parameter, owner: nn.Module) -> bool:
    return param.ndim == 3 and len(param) > 1 and not isinstance(owner, _NOT_EXPERTS)


def _layers_inside(places: Sequence[_Place], model: nn.Module) -> list[str | None]:
    """Return the layer that each parameter lies in, None outside of them."""
    layers: dict[int, str] = {}
    for path, layer in _stacked_layers(model):
        for part in layer.modules():
            layers.setdefault(id(part), path)
    if layers:
        return [layers.get(id(place.owner)) for place in places]
    wrapped: dict[int, str] = {}
    for path, wrapper in _wrappers(model):
        for part in wrapper.modules():
            wrapped.setdefault(id(part), path)
    # Without a stack, what lies beside a matrix, such as its bias and its adapters, lies in the same layer as it.
    own = [wrapped.get(id(place.owner), place.module) for place in places]
    for place, name in zip(places, own, strict=True):
        if place.is_matrix:
            layers.setdefault(id(place.owner), name)
    return [name if place.is_matrix else layers.get(id(place.owner)) for place, name in zip(places, own, strict=True)]


def _next_layers(inside: Sequence[str | None]) -> list[str | None]:
    """Fill in the next layer for what lies outside; what lies behind the last keeps None."""
    filled: list[str | None] = []
    following = None
    for layer in reversed(inside):
        following = layer or following
        filled.append(following)
    return filled[::-1]


def _stacked_layers(module: nn.Module, path: str = "", holds_adapters: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of the elements of the outermost stacks, in registration order."""
    stack = not holds_adapters and _is_stack(module)
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if stack and _can_be_layer(child):
            yield child_path, child
        else:
            yield from _stacked_layers(child, child_path, _is_of_peft(module))


def _is_stack(module: nn.Module) -> bool:
    """Whether this container is a stack of layers.

    In it, layers of one class repeat, or it holds nothing but layers, perhaps only one. A ModuleDict, or a
    Sequential where none repeat, may also hold towers, or a backbone and a head: where something repeats
    beneath, that is the stack.
    """
    if not isinstance(module, _CONTAINERS):
        return False
    children = list(module.children())
    repeats = _repeats(module)
    if not repeats and not (children and all(map(_can_be_layer, children))):
        return False
    may_wrap = isinstance(module, nn.ModuleDict) or (isinstance(module, nn.Sequential) and not repeats)
    return not may_wrap or not any(_repeats(part) for child in children for part in child.modules())


def _repeats(module: nn.Module) -> bool:
    if not isinstance(module, _CONTAINERS):
        return False
    classes = [type(_bare(child)) for child in module.children() if _can_be_layer(child)]
    return len(set(classes)) < len(classes)


def _can_be_layer(module: nn.Module) -> bool:
    module = _bare(module)
    if isinstance(module, ParametrizationList) or next(module.children(), None) is None:
        return False
    return any(param.ndim >= 2 for param in module.parameters())


def _always_on(dense: Iterable[nn.Module | nn.Parameter], model: nn.Module, trained: set[int]) -> set[int]:
    """Return the identities of the parameters that `dense` names; those that the user wants trained are given."""
    if isinstance(dense, (nn.Module, torch.Tensor, str)):
        raise TypeError(f"dense is a single {type(dense).__name__} and must be a list: write dense=[...]")
    own = {id(param) for param in model.parameters()}
    named: set[int] = set()
    for i, entry in enumerate(dense):
        if not isinstance(entry, (nn.Module, nn.Parameter)):
            raise TypeError(
                f"dense[{i}] is {type(entry).__name__} and must be a module or a parameter of the model: pass "
                "the object itself, not its name"
            )
        params = list(entry.parameters()) if isinstance(entry, nn.Module) else [entry]
        what = f"dense[{i}], {type(entry).__name__} of {sum(param.numel() for param in params):,} elements,"
        if any(id(param) not in own for param in params):
            raise ValueError(f"{what} must lie in the model: take it from the one given to param_groups")
        if trained.isdisjoint(map(id, params)):
            raise ValueError(
                f"{what} must hold a parameter with requires_grad=True to train: set that, or leave it out"
            )
        named.update(map(id, params))
    return named
