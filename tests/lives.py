"""Run examples.loops.resumable in processes that die: at a random moment, or at a chosen one of a write."""

from __future__ import annotations

import io
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from forks import CONTEXT

from examples.loops import resumable


class Life(NamedTuple):
    """What one process did: the step it began after, the losses it printed, how it ended."""

    begun_after: int
    losses: list[tuple[int, str]]
    exitcode: int | None


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(content: dict[str, Any], file: Any) -> None:
    """Write half of what torch.save would write, then die."""
    whole = io.BytesIO()
    real_save(content, whole)
    with file if hasattr(file, "write") else open(file, "wb") as opened:
        opened.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        opened.flush()
        die()


def not_atomic(content: dict[str, Any], path: Path) -> None:
    """The fault that the tests must see: a checkpoint written in place."""
    torch.save(content, path)


real_save = torch.save
# What dies, and after how many calls of the same function; os.fsync is called for the file, then for the folder.
MOMENTS: dict[str, tuple[Any, str, Callable[..., None], int]] = {
    "half of it written": (torch, "save", half_written, 0),
    "all written, not on the disk yet": (os, "fsync", die, 0),
    "before the replacement": (os, "replace", die, 0),
    "after the replacement": (os, "fsync", die, 1),
}


def live(folder: Path, steps: int, every: int, out: Connection, moment: str | None, write: int, in_place: bool) -> None:
    """Train in this process; with `moment`, die there in the checkpoint's write number `write`, counted from 0."""
    os.dup2(out.fileno(), 1)
    torch.set_num_threads(1)
    if in_place:
        resumable.save = not_atomic
    if moment is not None:
        owner, name, fatal, later = MOMENTS[moment]
        real = getattr(owner, name)
        # os.fsync is called twice a write, the others once.
        left = write * (2 if name == "fsync" else 1) + later

        def counted(*args: Any) -> Any:
            nonlocal left
            left -= 1
            return fatal(*args) if left < 0 else real(*args)

        setattr(owner, name, counted)
    resumable.train(folder, steps, every)


def run(
    folder: Path,
    steps: int,
    every: int,
    *,
    lines: int | None = None,
    delay: Callable[[float], float] = lambda step_s: 0.0,
    moment: str | None = None,
    write: int = 0,
    in_place: bool = False,
) -> Life:
    """Run one process to its end.

    Args:
        folder: The folder of its checkpoint.
        steps: Steps of the whole training.
        every: Steps between checkpoints.
        lines: Kill it after so many steps and `delay`, unless it has ended by itself; None: do not.
        delay: From the seconds that a step with its checkpoint takes to the seconds waited before the kill.
        moment: One of `MOMENTS`, where the process kills itself.
        write: Number of the write in which it does.
        in_place: Whether checkpoints are written as they should not be.
    """
    reader, writer = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=live, args=(folder, steps, every, writer, moment, write, in_place))
    process.start()
    writer.close()
    printed: list[str] = []
    stamps: list[float] = []
    with os.fdopen(os.dup(reader.fileno())) as out:
        reader.close()
        for line in out:
            printed.append(line)
            stamps.append(time.monotonic())
            if lines is not None and len(printed) == lines + 1:
                step_s = (stamps[-1] - stamps[0]) / lines if lines else 0.05
                time.sleep(delay(step_s))
                process.kill()
    process.join()
    return life_of(printed, process.exitcode)


def life_of(printed: list[str], exitcode: int | None) -> Life:
    """Read what a process printed; where its output is unbuffered, a kill can leave half of the last line."""
    finished = [line.split() for line in printed if line.endswith("\n")]
    # A process that failed before its first line has begun nothing.
    begun_after = int(finished[0][-1]) if finished else -1
    return Life(begun_after, [(int(step), loss) for step, loss in finished[1:]], exitcode)


def random_kills(
    folder: Path, steps: int, every: int, kills: int, seed: int, check: Callable[[Life], None]
) -> tuple[int, int]:
    """Kill the training `kills` times, then let it finish; `check` sees each life.

    Returns:
        The kills that hit, and how many of them left half a checkpoint behind.
    """
    rng = random.Random(seed)
    hit = partial = 0
    while True:
        aimed = hit < kills
        lines = rng.randint(0, 2) if aimed else None
        share = 1.2 * rng.random()
        life = run(folder, steps, every, lines=lines, delay=lambda step_s, share=share: share * step_s)
        check(life)
        if life.exitcode != -signal.SIGKILL:
            return hit, partial
        hit += 1
        partial += any(folder.glob("*.partial"))
