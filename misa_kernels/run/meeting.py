"""What do ranks that train together compare? What they begin with, the gradients of a round's first step, the draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

from misa_kernels.clock import Clock
from misa_kernels.draw.candidates import Ints
from misa_kernels.draw.partition import Partition
from misa_kernels.draw.sampler import Sampler, described
from misa_kernels.ranks.agreement import Agreement
from misa_kernels.ranks.shards import is_sharded
from misa_kernels.run.layout import Layout
from misa_kernels.run.updater import Updater

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Meeting:
    """The comparisons of one run; each raises on all ranks where two differ or one does not come, see `Agreement`.

    Args:
        group: The ranks.
        layout: What may be updater.
        clock: The position.
        active: Numbers of the active modules.
        sampler: What draws.
        inner_steps: Steps in a round.
    """

    def __init__(
        self, group: ProcessGroup, layout: Layout, clock: Clock, active: Ints, sampler: Sampler, inner_steps: int
    ) -> None:
        self._agreement = Agreement(group)
        # Whether the gradients of this round were.
        self._has_compared = False
        names = layout.partition.names
        tensors = [(name, (*shape, dtype)) for name, (shape, dtype) in zip(names, layout.form, strict=True)]
        self._agreement.check(
            "what MISA begins with",
            [
                *tensors,
                ("seed", clock.seed),
                ("inner_steps", inner_steps),
                ("sampler", described(sampler)),
                ("the budget", layout.partition.budget),
                ("round", clock.round),
                ("step in the round", clock.round_step),
                ("the active set", active.tolist()),
            ],
            "give every rank the same model, groups, arguments and state dict",
        )

    def begin_round(self) -> None:
        """Let the gradients of the next step be compared."""
        self._has_compared = False

    def compare_gradients(self, updater: Updater, round: int) -> None:
        """Compare what the first step of a round, or after a resume, saw; waits for the device then."""
        if self._has_compared:
            return
        self._has_compared = True
        arena, layout = updater.live.arena, updater.live.layout
        assert arena is not None
        updater.collect()
        (sq_norm, updates), skipped = arena.read_round(arena.score_sum, arena.updates)
        # Of a sharded parameter every rank has another part.
        slots = [slot for slot, row in updater.live.rows.items() if not is_sharded(row.param)]
        self._agreement.check(
            f"the gradients' squared norms in the first step of round {round}",
            [(layout.name_of(slot), (sq_norm[slot], int(updates[slot]), skipped)) for slot in slots],
            "average gradients before step() with misa_kernels.distributed.replicate(model, optimizer), or wrap the "
            "model in DistributedDataParallel(find_unused_parameters=True) before MISA freezes any of it",
        )

    def share(self, own: str) -> str:
        """Return what the first rank gave of what each of them knows."""
        return self._agreement.share("the order of the layers", own)

    def compare_draw(self, active: Ints, partition: Partition, round: int) -> None:
        """Compare the active set of a round."""
        self._agreement.check(
            f"the active set of round {round}",
            [(partition.modules[number].name, number) for number in active.tolist()],
            "load the same state dict on all of them, or begin anew",
        )
