"""What is known of each module: the one owner of importance, which `optimizer.state` shows block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from misa_kernels.draw.candidates import Bools, Candidates, Floats, Ints, fold, scores
from misa_kernels.draw.sampler import Sampler
from misa_kernels.outside.state import State
from misa_kernels.run.layout import SHOWN, Layout

# The scores that a draw knows, by their names in `Candidates`.
KNOWN = {"importance": "importance", "importance_count": "count", "last_round": "last_round"}


class Scores:
    """The scores of all modules.

    Args:
        layout: The modules and their slots.
        sampler: Says how importance is folded.

    Attributes:
        candidates: One number a module: what a draw is made of.
    """

    def __init__(self, layout: Layout, sampler: Sampler) -> None:
        modules = layout.partition.modules
        numel, layer = [module.numel for module in modules], [module.layer for module in modules]
        rival = None if layout.partition.slicing is None else np.array([module.rival for module in modules])
        self.candidates = Candidates.fresh(np.array(numel), np.array(layer), rival)
        self._layout = layout
        self._beta, self._norm = sampler.importance_beta, sampler.importance_norm
        # One number a slot, on the host, whose parts the entries of `optimizer.state` are.
        self._shown = {
            name: torch.zeros(len(layout.blocks), dtype=dtype, device="cpu") for name, dtype in SHOWN.items()
        }
        self._spread("module", np.arange(len(modules)))

    def forget(self) -> None:
        """Let nothing be known of any module."""
        known = self.candidates
        known.importance[:], known.count[:], known.last_round[:], known.unheard[:] = 0.0, 0, -1, 0

    def carry(self, other: Scores) -> Ints:
        """Take over what is known of modules of the same name.

        Returns:
            int64[B], the number that each module has in the other one; -1 where it has none.
        """
        theirs = {module.name: number for number, module in enumerate(other._layout.partition.modules)}
        modules = self._layout.partition.modules
        numbers = np.array([theirs.get(module.name, -1) for module in modules], dtype=np.int64)
        known = numbers >= 0
        for name in (*KNOWN.values(), "unheard"):
            getattr(self.candidates, name)[known] = getattr(other.candidates, name)[numbers[known]]
        return numbers

    def corrected(self) -> Floats:
        """Return s of every module, float64[B]; see `scores`."""
        return scores(self.candidates, self._beta, self._norm)

    def fold(self, active: Ints, mean: Floats, applied: Bools) -> int:
        """Fold what a round has measured into G; return how many scores were not finite and not used."""
        return fold(self.candidates, active, mean, applied, self._beta)

    def unheard(self) -> list[int]:
        """Return for a state dict number and rounds of each module that is unheard, one after the other."""
        numbers = np.flatnonzero(self.candidates.unheard)
        pairs: list[int] = np.stack([numbers, self.candidates.unheard[numbers]], axis=1).reshape(-1).tolist()
        return pairs

    def activate(self, active: Ints, round: int) -> None:
        """Note which modules a round trains, and publish that."""
        self.candidates.last_round[active] = round
        self.publish(active)

    def publish(self, active: Ints) -> None:
        """Bring up to date what the state shows."""
        for name, held in KNOWN.items():
            self._spread(name, getattr(self.candidates, held))
        is_active = np.zeros(self.candidates.numel.size, dtype=np.bool_)
        is_active[active] = True
        self._spread("active", is_active)

    def show(self, state: State) -> None:
        """Put the scores of every sampled parameter where torch's tools look for them."""
        # Dense slots come first, one a parameter.
        dense = self._layout.dense
        state.put(
            islice(self._layout.spans, dense, None),
            {name: self._layout.pieces(vector)[dense:] for name, vector in self._shown.items()},
        )

    def take(self, state: State) -> None:
        """Take over what somebody wrote to `optimizer.state`; what is missing there begins anew."""
        for name, held in KNOWN.items():
            found = self._shown[name].clone()
            for param, span in self._layout.spans.items():
                value = state[param].get(name, -1 if name == "last_round" else 0)
                found[span] = value.reshape(-1).cpu() if isinstance(value, Tensor) else value
            getattr(self.candidates, held)[:] = self._first(found)
        # Of one that begins anew nothing is known.
        self.candidates.unheard[self.candidates.last_round < 0] = 0

    def load(self, saved: Mapping[str, npt.NDArray[Any]], unheard: Sequence[int]) -> None:
        """Take over one number a module of each, from a state dict, and what `unheard` returned."""
        for name, held in KNOWN.items():
            getattr(self.candidates, held)[:] = saved[name]
        self.candidates.unheard[:] = 0
        self.candidates.unheard[list(unheard[::2])] = unheard[1::2]

    def read(self, own: Mapping[Tensor, Mapping[str, Any]]) -> tuple[Ints, dict[str, npt.NDArray[Any]]]:
        """Return the active modules of a saved state, and one number a module of each score, after checking them.

        Args:
            own: Saved state by parameter, with all scores of the sampled ones.

        Raises:
            ValueError: If blocks belonged together otherwise, or a module is not active as a whole.
        """
        layout = self._layout
        entries = [own[param] for param in islice(layout.spans, layout.dense, None)]
        vectors = {name: torch.zeros_like(vector) for name, vector in self._shown.items()}
        for name, vector in vectors.items():
            vector[layout.dense :] = _joined([entry[name] for entry in entries])
        differing = (vectors["module"] != self._shown["module"])[layout.dense :].nonzero()
        if len(differing):
            slot = layout.dense + int(differing[0])
            here = int(layout.module[slot])
            raise ValueError(
                f"state dict has {layout.name_of(slot)} in module {int(vectors['module'][slot])}, and here it is in "
                f"{here}, {layout.partition.modules[here].name}: use the granularity, oversized, delta and groups that "
                "it was saved with"
            )
        active = np.flatnonzero(self._first(vectors["active"]))
        spread = torch.from_numpy(np.isin(layout.module, active))
        if not len(active) or not torch.equal(spread, vectors["active"]):
            raise ValueError(
                f"state dict has {len(active)} active modules, of some of which a part is not active, and must have "
                "one at least: it was changed after it was saved"
            )
        return active, {name: self._first(vectors[name]) for name in KNOWN}

    def _first(self, values: Tensor) -> npt.NDArray[Any]:
        """Return one number a module, that of its first slot, from one a slot."""
        return np.asarray(values.numpy()[[slots[0] for slots in self._layout.slots]])

    def _spread(self, name: str, values: npt.NDArray[Any]) -> None:
        """Write one number a module into all its slots."""
        sampled = self._layout.module[self._layout.dense :]
        self._shown[name].numpy()[self._layout.dense :] = values[sampled]


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Return the elements of some tensors in one vector on the CPU; from a device they come in one transfer."""
    if len({value.device for value in values}) > 1:
        values = [value.cpu() for value in values]
    return torch.cat([value if value.ndim == 1 else value.reshape(-1) for value in values]).cpu()
