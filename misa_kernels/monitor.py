"""What was sampled, how important it is and how far it moves: a record a round, and tables of all of them."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from misa_kernels.clock import Clock
from misa_kernels.draw.candidates import Candidates
from misa_kernels.draw.partition import Partition

Table = dict[str, npt.NDArray[Any]]

# Rounds, and numbers in the two arrays of B float64 that each of them keeps: a long run stays under 64 MB.
HISTORY, HISTORY_NUMBERS = 1000, 1 << 23
# Modules that a printed table shows.
PRINTED = 20


class Part(NamedTuple):
    """Which part of a matrix a slice is.

    Attributes:
        matrix: Name of the matrix's module.
        axis: 0 for rows, 1 for columns.
        first: The first of them,
        last: and the last one, exclusive.
        size: How many the matrix has.
    """

    matrix: str
    axis: int
    first: int
    last: int
    size: int


@dataclass
class Round:
    """One round: what was drawn, why, what it costs, and what came of it.

    Attributes:
        round: Number of the round, from 0.
        first_step: Number of `step()` calls before it.
        active: Numbers of the k modules (or layers) trained in it, ascending.
        importance: float64[B], corrected score at the draw; NaN where there is none yet.
        probability: float64[B], p at the draw; 0 outside the depth window.
        perplexity: exp(H(p)), the effective number of modules the draw chooses from.
        perplexity_fraction: exp(H(p)) / B.
        active_fraction: Active sampled parameters / N; at most δ.
        dense_fraction: Always-on parameters / N.
        gradient_fraction: Parameters that receive a gradient / N, the whole of a split tensor counted.
        backward_depth: Layers that backward runs through, or None where layers are unknown.
        skipped_steps: Steps of this round left out for nonfinite gradients; this and the following is known when it
            has ended, and 0 or empty before.
        unscored: Modules whose score was not finite and was not used.
        age: int64[k], updates of each active module since its activation.
        grad_norm: float64[k], √ of the mean of ‖g‖² over the round's updates, before clipping (the mean of ‖g‖ where
            the sampler has `importance_norm="norm"`); NaN without an update.
        update_ratio: float64[k], RMS of the last update, weight decay apart, over that of the weight; NaN without an
            update, or for a weight of zeros.
    """

    round: int
    first_step: int
    active: tuple[int, ...]
    importance: npt.NDArray[np.float64]
    probability: npt.NDArray[np.float64]
    perplexity: float
    perplexity_fraction: float
    active_fraction: float
    dense_fraction: float
    gradient_fraction: float
    backward_depth: int | None
    skipped_steps: int = 0
    unscored: int = 0
    age: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    grad_norm: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    update_ratio: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def has_ended(self) -> bool:
        """Whether all of its steps were taken."""
        return len(self.age) > 0


class Monitor:
    """The record of a run; `optimizer.monitor`.

    A state dict carries what the draws need, so importance, times sampled and last round survive it; the records of
    rounds, and with them norms and update ratios, do not.

    Args:
        partition: What may be trained.
        candidates: The optimizer's live scores.
        clock: The position of the run.
        ages: Returns the updates of each module since its activation; waits for the device.

    Attributes:
        names: Names of the B modules (or layers), by number.
        layer: int64[B], the layer of each, by its place in `layers`; -1 where it is unknown.
        layers: Names of the layers, from the input to the output.
        parts: Where the modules are slices, of what each is one; else empty.
        rounds: The last 1000 rounds (with more than 4,194 modules fewer), oldest first; the last one is running.
    """

    def __init__(
        self, partition: Partition, candidates: Candidates, clock: Clock, ages: Callable[[], npt.NDArray[np.int64]]
    ) -> None:
        self._clock = clock
        self._ages = ages
        self._show(partition, candidates)
        self.rounds: deque[Round] = deque(maxlen=min(HISTORY, HISTORY_NUMBERS // (2 * len(self.names)) + 1))

    def _show(self, partition: Partition, candidates: Candidates) -> None:
        self._partition = partition
        self._candidates = candidates
        self.names = [module.name for module in partition.modules]
        self.layer = candidates.layer
        self.layers = partition.layers
        sliced = [] if partition.slicing is None else partition.modules
        self.parts = [
            Part(module.name.rpartition("[")[0], block.axis, *block.ends, block.param.shape[block.axis])
            for module in sliced
            for block in module.blocks
            if block.axis is not None
        ]

    def renumber(self, partition: Partition, candidates: Candidates, numbers: npt.NDArray[np.int64]) -> None:
        """Go on with other modules; the records keep what they have of those that are still there.

        Args:
            partition: What may be trained now.
            candidates: Its live scores.
            numbers: int64[B], the number that each module had, -1 if it is new.
        """
        new = {old: number for number, old in enumerate(numbers.tolist()) if old >= 0}
        order = np.where(numbers >= 0, numbers, 0)
        for record in self.rounds:
            kept = [i for i, old in enumerate(record.active) if old in new]
            record.active = tuple(new[record.active[i]] for i in kept)
            record.importance = np.where(numbers >= 0, record.importance[order], np.nan)
            record.probability = np.where(numbers >= 0, record.probability[order], 0.0)
            if record.has_ended:
                record.age, record.grad_norm = record.age[kept], record.grad_norm[kept]
                record.update_ratio = record.update_ratio[kept]
        self._show(partition, candidates)

    @property
    def skipped_steps(self) -> int:
        """Steps left out for nonfinite gradients, in the rounds that have ended; waits for nothing."""
        return self._clock.skipped_steps

    @property
    def current(self) -> Round:
        """The running round."""
        return self.rounds[-1]

    def begin_round(
        self,
        number: int,
        first_step: int,
        active: Sequence[int],
        importance: npt.NDArray[np.float64],
        probability: npt.NDArray[np.float64],
        perplexity: float,
    ) -> None:
        """Append the record of a round; the arguments are fields of `Round`."""
        # A state dict that is loaded breaks off the running round, and may take the run back: one record each.
        while self.rounds and (self.rounds[-1].round >= number or not self.rounds[-1].has_ended):
            self.rounds.pop()
        chosen = [self._partition.modules[i] for i in active]
        dense = self._partition.dense
        blocks = [*(block for module in chosen for block in module.blocks), *dense]
        whole = {block.param for block in blocks if block.axis is None}
        gradients = sum(param.numel() for param in whole) + sum(b.numel for b in blocks if b.axis is not None)
        lowest = [module.layer for module in chosen]
        if self._partition.dense_layer is not None:
            lowest.append(self._partition.dense_layer)
        total = self._partition.total_numel
        self.rounds.append(
            Round(
                round=number,
                first_step=first_step,
                active=tuple(active),
                importance=importance,
                probability=probability,
                perplexity=perplexity,
                perplexity_fraction=perplexity / len(self.names),
                active_fraction=sum(module.numel for module in chosen) / total,
                dense_fraction=sum(block.numel for block in dense) / total,
                gradient_fraction=gradients / total,
                backward_depth=None if -1 in lowest else len(self.layers) - min(lowest),
            )
        )

    def table(self) -> Table:
        """Return what is known of the B modules, an array of B entries a column; waits for the device.

        Returns:
            module (name), layer (-1: unknown), active, importance (NaN: none yet) and probability at the draw of the
            running round, times_sampled (rounds that gave it a score, and the running one), last_round (-1: none), age
            (updates since activation), and of the last recorded round that trained it grad_norm and update_ratio, see
            `Round`; of slices the first and last (exclusive) column or row, else -1.
        """
        active = np.zeros(len(self.names), dtype=np.bool_)
        active[list(self.current.active)] = True
        latest = np.full((2, len(self.names)), np.nan)
        for record in self.rounds:
            if record.has_ended:
                latest[:, list(record.active)] = record.grad_norm, record.update_ratio
        ends = [(part.first, part.last) for part in self.parts] or [(-1, -1)] * len(self.names)
        first, last = np.array(ends, dtype=np.int64).T
        return {
            "module": np.array(self.names),
            "layer": self.layer.copy(),
            "active": active,
            "importance": self.current.importance.copy(),
            "probability": self.current.probability.copy(),
            "times_sampled": self._candidates.count + active,
            "last_round": self._candidates.last_round.copy(),
            "age": self._ages(),
            "grad_norm": latest[0],
            "update_ratio": latest[1],
            "first": first,
            "last": last,
        }

    def history(self) -> Table:
        """Return what is known of the recorded rounds, an array of one entry a round a column.

        Returns:
            The scalar fields of `Round` under their names (backward_depth NaN where it is unknown); grad_norm, the root
            of the sum of squares over its modules, and update_ratio, their median, both NaN in the running round; and
            modules, the names of those trained, joined by "; ".
        """
        names = ["round", "first_step", "perplexity", "perplexity_fraction", "active_fraction", "dense_fraction"]
        names += ["gradient_fraction", "skipped_steps", "unscored"]
        columns = {name: np.array([getattr(record, name) for record in self.rounds]) for name in names}
        depth = [np.nan if record.backward_depth is None else record.backward_depth for record in self.rounds]
        columns["backward_depth"] = np.array(depth, dtype=np.float64)
        norms = [np.sqrt(np.nansum(r.grad_norm**2)) if r.has_ended else np.nan for r in self.rounds]
        columns["grad_norm"] = np.array(norms)
        ratios = [r.update_ratio[np.isfinite(r.update_ratio)] for r in self.rounds]
        columns["update_ratio"] = np.array([np.median(ratio) if len(ratio) else np.nan for ratio in ratios])
        columns["modules"] = np.array(["; ".join(self.names[i] for i in record.active) for record in self.rounds])
        return columns

    def save(self, path: str | Path, table: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
        """Write a table, a line a module or round; a number that is not there is empty, in JSON null.

        Args:
            path: File to write: ".csv" makes it comma-separated values under a line of names, ".jsonl" a JSON object a
                line.
            table: What `table()` returned; None: what `history()` returns now.

        Raises:
            ValueError: For another suffix.
        """
        path, table = Path(path), self.history() if table is None else table
        if path.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"path={str(path)!r} ends in {path.suffix!r} and must end in '.csv' or '.jsonl'")
        lines = [
            [None if x != x else x for x in line] for line in zip(*(c.tolist() for c in table.values()), strict=True)
        ]
        with path.open("w", newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                csv.writer(file).writerows([list(table), *lines])
            else:
                file.writelines(json.dumps(dict(zip(table, line, strict=True))) + "\n" for line in lines)

    def __str__(self) -> str:
        """Return the modules as columns of text: the active ones, then the most important; waits for the device."""
        table = self.table()
        importance = np.nan_to_num(table["importance"], nan=-1.0)
        order = np.lexsort((-importance, ~table["active"]))
        rows = [
            ("", "module", "importance", "probability", "sampled", "last round", "age", "gradient", "update/weight")
        ]
        for i in order[:PRINTED]:
            row = {name: column[i] for name, column in table.items()}
            rows.append(
                (
                    "*" if row["active"] else "",
                    row["module"],
                    _short(row["importance"]),
                    f"{row['probability']:.2%}",
                    str(row["times_sampled"]),
                    "" if row["last_round"] < 0 else str(row["last_round"]),
                    str(row["age"]) if row["active"] else "",
                    _short(row["grad_norm"]),
                    _short(row["update_ratio"]),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            " ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1])])
            + "  "
            + "  ".join(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))
            for row in rows
        ]
        left = order[PRINTED:]
        if len(left):
            active = int(table["active"][left].sum())
            lines.append(
                f"and {len(left)} more, {active} of them active" if active else f"and {len(left)} less important"
            )
        return "\n".join(lines)


def _short(x: float) -> str:
    return "" if np.isnan(x) else f"{x:.2e}"
