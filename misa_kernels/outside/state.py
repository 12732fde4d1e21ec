"""`optimizer.state`: plain dicts to whoever looks, which note that somebody else has written to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

Result = TypeVar("Result")


def _noting(method: Callable[..., Result]) -> Callable[..., Result]:
    def noting(self: Any, *args: Any, **kwargs: Any) -> Result:
        self.changed[0] = True
        return method(self, *args, **kwargs)

    noting.__name__ = method.__name__
    return noting


class Entry(dict[str, Any]):
    """The state of one parameter. MISA itself writes with `put` and `drop`, of which nothing is noted.

    Attributes:
        changed: One bool, shared by all entries of a state.
    """

    __slots__ = ("changed",)

    def __init__(self, changed: list[bool], values: Mapping[str, Any] | None = None) -> None:
        if values:
            super().__init__(values)
        self.changed = changed

    def put(self, values: Mapping[str, Any]) -> None:
        """Write as MISA."""
        dict.update(self, values)

    def drop(self, name: str) -> None:
        """Remove as MISA; what is not there is passed over."""
        dict.pop(self, name, None)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle it as a plain dict."""
        return dict, (dict(self),)

    __setitem__ = _noting(dict.__setitem__)
    __delitem__ = _noting(dict.__delitem__)
    __ior__ = _noting(dict.__ior__)
    clear = _noting(dict.clear)
    pop = _noting(dict.pop)
    popitem = _noting(dict.popitem)
    setdefault = _noting(dict.setdefault)
    update = _noting(dict.update)


class State(defaultdict[Tensor, Entry]):
    """The state of all parameters, an empty entry for one that has none.

    Args:
        values: What somebody assigned to `optimizer.state`.

    Attributes:
        changed: One bool: whether somebody but MISA has written to it or to an entry; MISA sets it back.
    """

    def __init__(self, values: Mapping[Tensor, Mapping[str, Any]] | None = None) -> None:
        super().__init__(None)
        self.changed = [values is not None]
        for param, own in (values or {}).items():
            dict.__setitem__(self, param, Entry(self.changed, own))

    def __missing__(self, param: Tensor) -> Entry:
        """Add an empty entry, as a lookup in torch's state does."""
        entry = Entry(self.changed)
        dict.__setitem__(self, param, entry)
        return entry

    def put(self, params: Iterable[Tensor], values: Mapping[str, Iterable[Any]]) -> None:
        """Write as MISA, under each name one value for each of some parameters."""
        names, known = list(values), dict.get
        for param, own in zip(params, zip(*values.values(), strict=True), strict=True):
            if (entry := known(self, param)) is None:
                entry = self.__missing__(param)
            dict.update(entry, zip(names, own, strict=True))

    def __setitem__(self, param: Tensor, own: Mapping[str, Any]) -> None:
        """Take a copy of the entry, and note it."""
        self.changed[0] = True
        super().__setitem__(param, Entry(self.changed, own))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take copies of entries, and note it."""
        for param, own in dict(*args, **kwargs).items():
            self[param] = own

    def setdefault(self, param: Tensor, own: Mapping[str, Any] = MappingProxyType({})) -> Entry:
        """Return an entry, after taking a copy of the one given where there is none."""
        if param not in self:
            self[param] = own
        return self[param]

    def copy(self) -> dict[Tensor, Entry]:  # type: ignore[override]
        """Return a plain dict of the entries, of which it is a copy as a defaultdict's is."""
        return dict(self)

    __copy__ = copy  # type: ignore[assignment]

    def __or__(self, other: Any) -> Any:
        """Join it with another one in a plain dict."""
        return dict(self) | other

    def __ior__(self, other: Any) -> State:  # type: ignore[override]
        """Take copies of entries, and note it."""
        self.update(other)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle it as a plain dict."""
        return dict, (dict(self),)

    def move(self, before: Tensor, after: Tensor | None) -> None:
        """Give an entry to another parameter, or to none, as MISA."""
        own = dict.pop(self, before, None)
        if own is not None and after is not None:
            dict.__setitem__(self, after, own)

    __delitem__ = _noting(dict.__delitem__)
    clear = _noting(dict.clear)
    pop = _noting(dict.pop)
    popitem = _noting(dict.popitem)
