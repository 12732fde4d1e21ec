"""Which training runs does a table need, at which learning rates, and how does it come to have them all?

A benchmark describes a run by a frozen dataclass with the fields `power`, which says the learning rate, and `seed`.
Finished runs are lines of a file, so that a benchmark goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

Job = Any


@dataclass(frozen=True)
class Search:
    """The search for a method's learning rate, and what uses it.

    Attributes:
        stage: Searches of a lower stage come first, with all their seeds.
        first: The run in the middle of the first three.
        arms: Of the runs that use the learning rate found: what differs from `first`, and how many seeds are reported;
            0 of them report the run of the search itself.
    """

    stage: int
    first: Job
    arms: tuple[tuple[Mapping[str, Any], int], ...]


def wanted(searches: Iterable[Search], tuning_losses: Mapping[Job, float]) -> list[Job]:
    """Return the runs that the results so far call for, those that come first in front.

    Every search tries three neighbouring learning rates, and the next one beyond while the best lies at an end. Its
    arms follow at the best.

    Args:
        searches: What the table needs.
        tuning_losses: Loss on the tuning text of all finished runs.
    """
    # In a stage tuning comes first, as seed 0, from the middle outwards, then all arms' first seed, and so on.
    jobs: list[tuple[int, int, int, Job]] = []
    for search in searches:
        powers, best = come_to(search.first, tuning_losses)
        tuning = [replace(search.first, power=power) for power in powers]
        jobs += [(search.stage, 0, abs(job.power - search.first.power), job) for job in tuning]
        if best is not None:
            jobs += [(search.stage, job.seed, 0, job) for job in reported(search, best)]
    jobs.sort(key=lambda entry: entry[:3])
    return [job for job in dict.fromkeys(job for *_, job in jobs) if job not in tuning_losses]


def come_to(first: Job, tuning_losses: Mapping[Job, float]) -> tuple[list[int], int | None]:
    """Return the powers that a search has come to, and the best one if the search is over."""
    low, high = first.power - 1, first.power + 1
    while True:
        powers = list(range(low, high + 1))
        jobs = {power: replace(first, power=power) for power in powers}
        if not all(job in tuning_losses for job in jobs.values()):
            return powers, None
        best = min(powers, key=lambda power: tuning_losses[jobs[power]])
        if low < best < high:
            return powers, best
        low, high = low - (best == low), high + (best == high)


def reported(search: Search, power: int) -> list[Job]:
    """Return the runs that a search's arms consist of."""
    return [
        replace(search.first, **changes, power=power, seed=seed)
        for changes, seeds in search.arms
        for seed in (range(1, seeds + 1) if seeds else [search.first.seed])
    ]


def read(path: Path, kind: type[Job]) -> dict[Job, dict[str, Any]]:
    """Return the finished runs of a file by their keys, which are of this kind."""
    lines = path.read_text().splitlines() if path.exists() else []
    names = [field.name for field in fields(kind)]
    return {kind(**{name: run[name] for name in names}): run for run in map(json.loads, lines)}


def outcome(
    searches: Iterable[Search], results: Mapping[Job, dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Return the runs of the searches, the finished runs at the rates found, and how many runs are missing."""
    searches = tuple(searches)
    losses = {job: run["tuning_loss"] for job, run in results.items()}
    found = [(search, come_to(search.first, losses)[1]) for search in searches]
    reporting = dict.fromkeys(job for search, best in found if best is not None for job in reported(search, best))
    own = {replace(search.first, power=0) for search in searches}
    tuning = [run for job, run in results.items() if replace(job, power=0) in own]
    return tuning, [results[job] for job in reporting if job in results], len(wanted(searches, losses))


def run_all(
    searches: Iterable[Search],
    execute: Callable[[Job], dict[str, Any]],
    path: Path,
    kind: type[Job],
    workers: int,
    deadline: float = math.inf,
) -> dict[Job, str]:
    """Run what is wanted until nothing is, appending each result to a file as it ends, and printing it.

    A run that fails is printed, too, and what waits for it is left out.

    Args:
        searches: What the table needs.
        execute: Maps a job to key and result of its run as plain types, "tuning_loss" among them.
        path: File of the finished runs.
        kind: Of the jobs.
        workers: Processes, in which `execute` is called.
        deadline: Reading of `time.monotonic` after which no run begins.

    Returns:
        The error of each run that failed.
    """
    searches = tuple(searches)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = read(path, kind)
    running: dict[Future[dict[str, Any]], Job] = {}
    failed: dict[Job, str] = {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        while True:
            losses = {job: run["tuning_loss"] for job, run in results.items()}
            ready = [job for job in wanted(searches, losses) if job not in running.values() and job not in failed]
            free = workers - len(running) if time.monotonic() < deadline else 0
            for job in ready[:free]:
                running[pool.submit(execute, job)] = job
            if not running:
                return failed
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job, error = running.pop(future), future.exception()
                key = " ".join(str(getattr(job, field.name)) for field in fields(job))
                if error is not None:
                    failed[job] = f"{type(error).__name__}: {error}"
                    print(f"{time.strftime('%H:%M:%S')} {key}: {failed[job]}", flush=True)
                    continue
                run = future.result()
                names = [name for name in run if name.endswith("loss")]
                for name in names:
                    # One that is not finite loses against all others, but JSON and min() must be able to hold it.
                    run[name] = run[name] if math.isfinite(run[name]) else 1e9
                results[job] = run
                with path.open("a") as file:
                    file.write(json.dumps(run, separators=(",", ":")) + "\n")
                figures = f"{' '.join(f'{run[name]:.4f}' for name in names)} nats, {run['seconds']} s"
                print(f"{time.strftime('%H:%M:%S')} {key}: {figures}", flush=True)
