"""Processes that train together, for the tests: gloo on this machine, started from one warm process."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import CONTEXT

TIMEOUT = timedelta(seconds=60)


def run(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work(rank, *arguments)` returned on each rank, or the text of the exception that it raised.

    Args:
        size: Number of processes.
        folder: An empty folder, through which they meet and answer.
        work: A function of a module, run in all of them.
        arguments: Further arguments, to be pickled.
    """
    processes = [CONTEXT.Process(target=_begin, args=(rank, size, folder, work, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT.total_seconds() + 30)
        if process.is_alive():
            process.kill()
    answers = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path, weights_only=False) if path.exists() else "no answer" for path in answers]


def _begin(rank: int, size: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / "store"), size)
    store.set_timeout(TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        answer = work(rank, *arguments)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
        if not isinstance(error, (RuntimeError, ValueError, TypeError)):
            answer += traceback.format_exc()
    torch.save(answer, folder / f"part-{rank}.pt")
    (folder / f"part-{rank}.pt").rename(folder / f"{rank}.pt")
    dist.destroy_process_group()
