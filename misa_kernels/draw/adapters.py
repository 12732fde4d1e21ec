"""What of a model is peft's? Wrappers around modules, and the tensors of adapters in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

# Where a model of peft keeps what it was made with.
_CONFIGS = {"peft_config", "_peft_config"}


def is_of_peft(module: nn.Module) -> bool:
    """Whether a module wraps another for peft: all of these say which of their attributes hold an entry an adapter."""
    return hasattr(type(module), "adapter_layer_names")


def bare(module: nn.Module) -> nn.Module:
    """Return the module that peft has wrapped, others as they are."""
    while is_of_peft(module):
        inner = module._modules.get("base_layer", module._modules.get("original_module"))
        if inner is None:
            break
        module = inner
    return module


def wrappers(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Yield those of some modules, by their names, in which peft holds the module that they adapt."""
    for path, module in modules:
        if is_of_peft(module) and "base_layer" in module._modules:
            yield path, module


def adapters(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, str | None]:
    """Return the module that each tensor of an adapter makes, by its identity; None where several wrappers share it."""
    names: dict[int, set[str]] = {}
    for path, wrapper in wrappers(modules):
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


def trains_for_peft(modules: Iterable[nn.Module]) -> bool:
    """Whether peft has chosen what is trained: by adapters in a model, or by a prompt in front of it."""
    return any(is_of_peft(module) or not _CONFIGS.isdisjoint(module.__dict__) for module in modules)
