"""What is a name without the wrappers around a model and its parts, which a run need not be resumed with?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# Attributes that hold the wrapped module: of torch.compile, FSDP1 and torch's checkpoint wrapper. No model has its own.
INNER = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# That of DataParallel and DistributedDataParallel, which a model may have, too, but not around all that it holds.
OUTER = "module"


def unwrapped(groups: Sequence[Sequence[Any] | None]) -> list[list[Any] | None]:
    """Return names as they are without wrappers: "a.b" for "module._orig_mod.a.b", where all of them begin so.

    Args:
        groups: Names of a whole model, in groups, or None where a group has none. A name is a string, None or a
            sequence of strings.

    Returns:
        The same, in lists. The name of the model itself is "".
    """
    found = [None if names is None else [_parts(name) for name in names] for names in groups]
    flat = [parts for names in found for entry in names or () for parts in entry or ()]
    depth = min(map(_depth, flat), default=0)
    return [None if names is None else [_joined(entry, depth) for entry in names] for names in found]


def is_same(a: Any, b: Any) -> bool:
    """Whether two names without wrappers may mean the same.

    A model that is one matrix has no name of its own, and the module is named after its parameter; in a wrapper it has.
    """
    return a == b or isinstance(a, str) and isinstance(b, str) and "" in (a, b) and "." not in a + b


def _parts(name: Any) -> list[list[str]] | None:
    """Return the parts of a name, or of each of several, without inner wrappers."""
    if name is None:
        return None
    names: Iterable[Any] = name if isinstance(name, (list, tuple)) else (name,)
    return [[part for part in str(each).split(".") if part not in INNER] for each in names]


def _depth(parts: Sequence[str]) -> int:
    """Return how often a name begins with the outer wrapper's."""
    return next((number for number, part in enumerate(parts) if part != OUTER), len(parts))


def _joined(entry: list[list[str]] | None, depth: int) -> Any:
    if entry is None:
        return None
    names = [".".join(parts[depth:]) for parts in entry]
    return names[0] if len(names) == 1 else names
