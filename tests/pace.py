"""How slow is this machine at the moment? Limits of processor time are meant for one that nobody else uses."""

import time
from dataclasses import dataclass

# Objects made and sorted into a dict, on the processors that the limits were set on, at rest. Much of such work is
# waiting for memory, which other users of the machine slow down more than arithmetic.
OBJECTS, NOMINAL_S = 20_000, 0.015


@dataclass(frozen=True, slots=True)
class Entry:
    """As the package has them for blocks and modules."""

    number: int
    start: int
    stop: int


def slowness() -> float:
    """Return how many times as long as at rest such work takes now; 1 if it is faster."""
    taken = []
    for _ in range(5):
        start = time.thread_time()
        by_name: dict[str, list[Entry]] = {}
        for number in range(OBJECTS):
            by_name.setdefault(str(number), []).append(Entry(number, number, number + 1))
        taken.append(time.thread_time() - start)
    return max(1.0, min(taken) / NOMINAL_S)
