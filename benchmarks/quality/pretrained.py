"""What share of AdamW's improvement does each method reach where real weights are fine-tuned?

SmolLM2-135M, on two kinds of text that it is bad at. `python -m benchmarks.quality run --model smollm2 [--workers N]`
trains what is missing, as often as it is started; `python -m benchmarks.quality table --model smollm2` writes
benchmarks/results/pretrained.{json,md,png}. It needs the `bench` extra.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import record
from benchmarks.memory import PeakMemory
from benchmarks.quality import pretrained_table, texts
from benchmarks.quality.equal_bytes import misa_adamw, nearest_rank, parameters
from benchmarks.quality.methods import Plan, build, run, size_of
from benchmarks.quality.regime_runs import LR_RATIO, TUNING_SEED, Job, at
from benchmarks.quality.searches import Search, outcome, read, run_all
from examples.demo.data import random_batches
from examples.demo.train import mean_loss, train
from misa_kernels import MISA

RESULTS = Path("benchmarks/results")
RUNS = "pretrained-runs.jsonl"
# Of power 0: AdamW's guess.
LR = 1e-4
BATCH, CONTEXT, STEPS = 1, 128, 100
# Of long runs, which take hours: what is reported is the run of the best rate itself, by its tuning loss.
LONG_CONTEXT, LONG_STEPS, LONG_SEED = 64, 1000, 1
# Sequences of the texts for tuning and for reporting.
HELD_OUT = (24, 40)
DELTAS = (0.01, 0.03, 0.25)
TASKS = ("German manuals", "C++ headers")
LAYERS = 30
LONG = "German manuals, 1,000 steps"


def steps_of(task: str) -> int:
    """Return the steps of a task's runs."""
    return LONG_STEPS if task == LONG else STEPS


def context_of(task: str) -> int:
    """Return the tokens of a task's sequences."""
    return LONG_CONTEXT if task == LONG else CONTEXT


def texts_of(task: str) -> texts.Texts:
    """Return the text of a task, whatever its length."""
    return texts.texts(task.partition(",")[0])


def plan_of(job: Job) -> Plan:
    """Return how a run is trained; adapters by MISA's AdamW, which bitsandbytes' on CPUs is slow beside."""
    steps = steps_of(job.task)
    return Plan(LR * LR_RATIO**job.power, steps, steps, rank=nearest_rank, adamw=misa_adamw)


def held_out_losses(job: Job, model: nn.Module) -> dict[str, float]:
    """Return a model's losses in nats a token, by name: of a run that tunes a rate "tuning_loss" alone."""
    own, context = texts_of(job.task), context_of(job.task)
    found = {"tuning_loss": mean_loss(model, texts.sequences(own.tuning, HELD_OUT[0], context))}
    if job.seed != TUNING_SEED:
        found["loss"] = mean_loss(model, texts.sequences(own.reporting, HELD_OUT[1], context))
        found["source_loss"] = texts.answers_loss(model)
    return {name: round(loss, 6) for name, loss in found.items()}


@cache
def losses_before(task: str) -> dict[str, float]:
    """Return the losses of the model that all runs of a task begin with."""
    job = Job(task, "", "", 1.0, 0, 0, 1)
    return {f"{name}_before": loss for name, loss in held_out_losses(job, texts.base()).items()}


def batches_of(job: Job) -> Any:
    """Return the training batches of a run."""
    return random_batches(texts_of(job.task).train, BATCH, context_of(job.task), job.seed)


def peak_bytes(job: Job) -> int:
    """Return the most bytes that tensors take in two training steps, weights and all; of a sampler at its costliest."""
    plan = plan_of(job)
    with PeakMemory() as memory:
        model = copy.deepcopy(texts.base())
        trained, optimizer = build(job, model, plan.lr, plan.steps, size_of(job, model, plan.rank), plan.adamw)
        if isinstance(optimizer, MISA):
            optimizer.rehearse()
        for _ in train(trained, optimizer, batches_of(job), 2):
            pass
    return memory.peak_bytes


def execute(job: Job) -> dict[str, Any]:
    """Train once and return key and result of the run as plain types."""
    torch.set_num_threads(1)
    before = losses_before(job.task)
    trained, found = run(job, copy.deepcopy(texts.base()), batches_of(job), plan_of(job))
    found |= before | held_out_losses(job, trained)
    # It is the same with all seeds.
    return found | ({"peak_bytes": peak_bytes(job)} if job.seed == 1 else {})


def first(task: str, method: str, delta: float, power: int, state: str = "int8", inner_steps: int = 0) -> Job:
    """Return the run in the middle of a search for a learning rate."""
    return Job(task, method, state, delta, inner_steps, power, TUNING_SEED)


def searched(stage: int, job: Job, seeds: int = 3) -> Search:
    """Return the search for a method's learning rate, which begins at the job's."""
    return Search(stage, job, at(seeds, job.delta))


def searches_of(task: str, early: int) -> Iterator[Search]:
    """Yield the searches of a task: those that decide, at stage `early`, and the rest."""
    yield searched(early, first(task, "AdamW", 1.0, 1, "fp32"))
    for method, powers, stages in (
        ("slices", (6, 5, 2), (early, early, 5)),
        ("LoRA", (5, 5, 2), (early, early, 5)),
        ("LoRA, down", (5, 5, 3), (early, early, 5)),
        ("MISA", (3, 3, 2), (3, 3, 7)),
        # They take twice LoRA's time and more.
        ("DoRA", (5, 5, 2), (10, 7 + early, 10)),
        ("GaLore", (5, 4, 3), (10, 7 + early, 11)),
    ):
        for delta, power, stage in zip(DELTAS, powers, stages, strict=True):
            yield searched(stage, first(task, method, delta, power))
    # One round a layer, for what trains whole ones.
    for method in ("BAdam", "LISA"):
        yield searched(6, first(task, method, 0.03, 1, "fp32", STEPS // LAYERS))


SEARCHES = (
    *searches_of(TASKS[0], 1),
    *searches_of(TASKS[1], 2),
    # Norms are thin parts of layers, too: are they worth it?
    *(searched(1, first(TASKS[0], "slices and norms", delta, power)) for delta, power in ((0.01, 6), (0.03, 5))),
    # Who leads when a run is long: the rates of short ones are in the middle of the search.
    *(
        Search(4, replace(first(LONG, method, delta, power, state), seed=LONG_SEED), at(0, delta))
        for method, delta, power, state in (
            ("AdamW", 1.0, 1, "fp32"),
            ("slices", 0.03, 5, "int8"),
            ("slices, redrawn", 0.03, 5, "int8"),
            ("LoRA", 0.03, 4, "int8"),
            ("MISA", 0.03, 3, "int8"),
        )
    ),
)


def run_missing(workers: int) -> dict[Job, str]:
    """Train what the table wants and has not; return the error of each run that failed."""
    # Before the workers, who would make the same files at once.
    for task in TASKS:
        texts.texts(task)
    texts.answers()
    return run_all(SEARCHES, execute, RESULTS / RUNS, Job, workers)


def write_tables() -> None:
    """Write pretrained.json, pretrained.md and pretrained.png from the finished runs."""
    results = read(RESULTS / RUNS, Job)
    tuning, reporting, missing = outcome(SEARCHES, results)
    tasks = [*TASKS, LONG]
    plan = {"parameters": parameters(texts.base()), "batch": BATCH}
    plan |= {"steps": {task: steps_of(task) for task in tasks}, "context": {task: context_of(task) for task in tasks}}
    content = {"plan": plan, "missing": missing}
    content = record.environment(torch.device("cpu")) | content | pretrained_table.summary(tuning, reporting, tasks)
    record.write(RESULTS, "pretrained", content)
    text = pretrained_table.markdown(content)
    (RESULTS / "pretrained.md").write_text(text, encoding="utf-8")
    print(text, pretrained_table.draw(content["rows"], RESULTS / "pretrained.png"))
    print(f"{len(results)} runs, {missing} more wanted; written: {RESULTS}/pretrained.json, .md, .png")
