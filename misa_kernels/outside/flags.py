"""Who set `requires_grad`: what the user chose, what MISA set, and what somebody else has set since.

In a round MISA switches parameters off that the user wants trained, so the flag alone no longer tells what the user
chose. It is remembered here, for the next MISA on these parameters too, and given back at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress, count
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from misa_kernels.outside.chosen import choice_of, enlist
from misa_kernels.outside.copies import Marks
from misa_kernels.outside.notices import listed, names_of, warn

REQUIRES_GRAD = attrgetter("requires_grad")
# What a copy of an optimizer goes on with.
COPIED = ("chosen", "counted", "laid_out", "due", "is_suspended", "_presumed", "_drawn", "_on")


class Seen(NamedTuple):
    """What somebody else has made of the flags, as positions, ascending.

    Attributes:
        frozen: What they froze.
        thawed: What they thawed of what the user had frozen.
        stray: What they switched on that is merely off in this round.
        is_whole: Whether they switched on the whole model.
    """

    frozen: list[int]
    thawed: list[int]
    stray: list[int]
    is_whole: bool = False


class Flags:
    """`requires_grad` of all parameters of an optimizer, by position.

    Args:
        groups: The optimizer's param groups. Only read: `hold` takes the parameters, `train` sets the first flag.
        known: What is to be taken for `chosen` and `counted`, where somebody knows; None: found out.

    Attributes:
        chosen: Whether the user wants it trained.
        counted: Whether the user wanted it trained at any time: what N is the size of.
        laid_out: `chosen` and `counted` at the last `settle`.
        due: Whether `chosen` has changed since then.
        sliced: Positions of what is off and gets gradients of a slice.
        sentinel: One that is off though chosen; None where there is none. Where it is on, somebody has switched it on.
        lent: How many blocks of `thawed` show the user's flags now.
        is_suspended: Whether all that should be trained was off at the last `compare`: mostly somebody has frozen the
            whole model for a while, and the flags stay as they are for another round.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], known: tuple[Sequence[bool], Sequence[bool]] | None = None
    ) -> None:
        self.params: list[Tensor] = [param for group in groups for param in group["params"]]
        self._names = names_of(groups)
        self._layers: list[Any] = [
            layer for group in groups for layer in group.get("layers", [None] * len(group["params"]))
        ]
        # Of each parameter where it is not frozen by the user.
        self._roles: list[Any] = [
            role for group in groups for role in group.get("thawed", [group.get("role")] * len(group["params"]))
        ]
        self._marks = Marks(self._names, self.params)
        # Positions of what MISA has left on, and of what it switched on when the round began.
        self._on = self._now()
        self._drawn: set[int] = set()
        # Of what is off and trained all the same, by slices.
        self.sliced: frozenset[int] = frozenset()
        self.sentinel: Tensor | None = None
        self.is_suspended = False
        self.lent = 0
        self._has_ended = False
        self._said: set[str] = set()
        self.due = False
        self._refused: list[int] = []
        choice = choice_of(self._marks, self._layers)
        self._others = choice.runs
        self._presumed = choice.presumed if known is None else set()
        self.advice = choice.advice if known is None else []
        self.chosen, self.counted = map(list, known or (choice.flags, choice.flags))
        self.note_laid_out()

    def _now(self) -> set[int]:
        """Return the positions of what requires a gradient."""
        return set(compress(count(), map(REQUIRES_GRAD, self.params)))

    def claim(self, run: Any) -> None:
        """Take the parameters for a run, and release the runs that have them now."""
        for other in self._others:
            other.release("another MISA was constructed on its parameters, which released it")
        if self._others:
            self._others.clear()
            self._on = self._now()
        enlist(run)

    def exchange(self, params: Sequence[Tensor]) -> None:
        """Go on with other tensors in the place of the parameters."""
        for before, after in zip(self.params, params, strict=True):
            _set(after, before.requires_grad)
        self.params = list(params)
        self._marks = Marks(self._names, self.params)

    def train(self, indices: set[int], sliced: Collection[int] = ()) -> None:
        """Switch these parameters on, and all others off; what is as it should be is left alone.

        Args:
            indices: Positions of what is trained as a whole, or in row blocks.
            sliced: Positions of what gets gradients of a slice, which nobody else drops while it is off.
        """
        before, self._on, self._drawn = self._on, set(indices), indices
        self.sliced = frozenset(sliced)
        if self.lent:
            return
        # As `_switch_off`, but without a call for each of 100,000.
        for param in map(self.params.__getitem__, before - indices):
            if param.requires_grad:
                param.requires_grad_(False)
            param.grad = None
        for index in indices:
            _set(self.params[index], True)
        first = next((index for index, flag in enumerate(self.chosen) if flag and index not in indices), None)
        self.sentinel = None if first is None else self.params[first]
        if first is not None:
            self._marks.remember(indices, self.chosen, self.sliced)

    def put_back(self) -> None:
        """Switch off again what somebody switched on, if one look at one parameter says so: cheap enough for a step."""
        if self.sentinel is None or not self.sentinel.requires_grad or self.lent:
            return
        seen = self._seen()
        self._put_back(seen.stray)
        if seen.is_whole:
            self._take_thawed(seen.thawed)

    def compare(self, is_idle: bool = False) -> None:
        """Take over what somebody else froze and thawed since the last call, switch off what is merely on.

        Args:
            is_idle: Whether nothing that is drawn had a gradient in the round that ends.
        """
        if self.lent:
            return
        was_suspended, self.is_suspended = self.is_suspended, False
        now = self._now()
        if now == self._on:
            return
        are_all_meant = was_suspended and is_idle
        frozen, thawed, stray, _ = self._seen(are_all_meant)
        self._put_back(stray)
        if are_all_meant:
            self._presumed.update(frozen)
        self.is_suspended = bool(self._on) and not (frozen or thawed) and self._on.isdisjoint(now)
        for index in frozen:
            self.chosen[index] = False
            self._switch_off(index)
        self._refused = [index for index in thawed if not self.counted[index]]
        self._take_thawed(thawed)
        self.due = self.due or bool(frozen or thawed)
        if frozen:
            warn(
                f"{self._listed(frozen)} had requires_grad switched off in mid-round and will not be trained any more; "
                "what was not active then looks as before, so freeze within `with optimizer.thawed():` to say what you "
                "mean"
            )
        if drawable := [index for index in thawed if self._roles[index] != "frozen"]:
            warn(f"{self._listed(drawable)} had requires_grad switched on in mid-run and can be drawn from now on")
        elif thawed:
            warn(
                f"{self._listed(thawed)} had requires_grad switched on in mid-run, and MISA switches it off, its role "
                "being 'frozen': leave out of MISA's groups what something else trains"
            )

    def _take_thawed(self, indices: Collection[int]) -> None:
        for index in indices:
            self.chosen[index] = self.counted[index] = self.due = True
            # What was frozen in this round goes on, all other waits for the next one.
            if index in self._drawn:
                self._on.add(index)
            else:
                self._switch_off(index)
        self._presumed.difference_update(indices)

    def note_laid_out(self) -> None:
        """Note that the modules were made anew of what is chosen."""
        self.laid_out = list(self.chosen), list(self.counted)
        self.due = False
        self._refused = []

    def refuse(self) -> str:
        """Leave frozen all that was thawed last, of some of which no modules can be made; return which, listed."""
        for index in self._refused:
            self.chosen[index] = self.counted[index] = False
        refused, self._refused = self._listed(self._refused), []
        return refused

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Show the flags that the user chose, and take over what the user makes of them; within another, do nothing."""
        self.compare()
        if not self.lent:
            for param, flag in zip(self.params, self.chosen, strict=True):
                _set(param, flag)
        self.lent += 1
        try:
            yield
        finally:
            self.lent -= 1
            # A run that has ended within has given them back.
            if not (self.lent or self._has_ended):
                self._take_shown()
                for index, param in enumerate(self.params):
                    if index in self._on:
                        _set(param, True)
                    else:
                        self._switch_off(index, self.sliced)

    def _take_shown(self) -> None:
        """Take over what the user has made of the flags that are lent."""
        now = self._now()
        changed = now ^ {index for index, flag in enumerate(self.chosen) if flag}
        self.due = self.due or bool(changed)
        self._refused = sorted(index for index in changed & now if not self.counted[index])
        for index in changed:
            self.chosen[index] = index in now
            self.counted[index] = self.counted[index] or index in now
        # What was frozen in this round, and is thawed again, goes on.
        self._on = self._on - changed | changed & now & self._drawn
        self.sliced -= changed

    def choices(self) -> tuple[dict[str, Any], set[int]]:
        """Return what a copy of the optimizer is given with `choose`: attributes, and positions of what is on."""
        if self.lent:
            self._take_shown()
        shown = set(self._on) if self.lent else self._now()
        return {name: copy.copy(getattr(self, name)) for name in COPIED}, shown

    def choose(self, held: dict[str, Any], shown: set[int]) -> None:
        """Take over the flags of the optimizer that this one is a copy of."""
        self.__dict__.update(held)
        for index, param in enumerate(self.params):
            _set(param, index in shown)

    def chosen_now(self) -> list[bool]:
        """Return what the user chooses, with what `compare` would take over; changes nothing."""
        if self.lent:
            return list(map(REQUIRES_GRAD, self.params))
        seen = self._seen()
        frozen, thawed = set(seen.frozen), set(seen.thawed)
        return [flag and i not in frozen or i in thawed for i, flag in enumerate(self.chosen)]

    def give_back(self, is_late: bool = False) -> None:
        """Give every parameter the flag that the user chose, and let go of it.

        Args:
            is_late: Whether it is Python that found the optimizer unused, maybe long after it was. Who has switched
                everything on since then, or something else instead of what was on, means it and keeps it.
        """
        self._has_ended = True
        self.sentinel = None
        flags = self.chosen_now()
        if is_late and not self.lent:
            now = self._now()
            if self._seen().is_whole or now and self._on.isdisjoint(now):
                flags = list(map(REQUIRES_GRAD, self.params))
        for param, flag in zip(self.params, flags, strict=True):
            _set(param, flag)

    def _seen(self, are_all_meant: bool = False) -> Seen:
        """Compare the flags with what was set; all that is drawn being off says nothing, unless `are_all_meant`."""
        now = self._now()
        frozen, on = sorted(self._on - now), sorted(now - self._on)
        if any(self.chosen[index] or index in self._presumed for index in on) and all(
            index in now or not param.is_floating_point() for index, param in enumerate(self.params)
        ):
            # Wholesale, as GANs and frameworks do: no statement about what the user had frozen, if they had.
            presumed = [i for i in on if i in self._presumed]
            return Seen([], presumed, [i for i in on if i not in self._presumed], is_whole=True)
        if self._on.isdisjoint(now) and not are_all_meant:
            frozen = []
        if frozen:
            # Nobody freezes the two matrices of a layer that happen to be active.
            left = {self._layers[index] for index in self._on & now}
            whole = {self._layers[index] for index in frozen} - left - {None}
            meant = set(frozen)
            frozen = [i for i, flag in enumerate(self.chosen) if flag and (i in meant or self._layers[i] in whole)]
        return Seen(frozen, [i for i in on if not self.chosen[i]], [i for i in on if self.chosen[i]])

    def _put_back(self, stray: list[int]) -> None:
        for index in stray:
            # Backward has made all of a gradient of which the slice is wanted.
            self._switch_off(index, self.sliced)
        if stray:
            self.warn_once(
                "stray",
                f"{self._listed(stray)} had requires_grad switched on while not active: MISA switches it off again, "
                "at zero_grad() and step(), or gradients of the whole model would be held; to thaw what you had "
                "frozen, and for what reads the flags, use `with optimizer.thawed():`",
            )

    def _switch_off(self, index: int, kept: Collection[int] = ()) -> None:
        """Switch a parameter off, and drop its gradient unless it is one of those kept."""
        _set(self.params[index], False)
        if index not in kept:
            self.params[index].grad = None
        self._on.discard(index)

    def _listed(self, indices: Iterable[int]) -> str:
        return listed([self._names[index] for index in indices])

    def warn_once(self, about: str, sentence: str) -> None:
        """Warn, if nothing was said about this before."""
        if about not in self._said:
            self._said.add(about)
            warn(sentence)


def _set(param: Tensor, flag: bool) -> None:
    # An integer parameter takes no flag at all.
    if param.requires_grad != flag:
        param.requires_grad_(flag)
