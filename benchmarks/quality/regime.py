"""What share of AdamW's improvement does MISA reach where δ is small and the model deep, per step and per second?

From the repository's root: `python -m benchmarks.quality run [--workers N]` trains what is missing, as often as it is
started; `python -m benchmarks.quality table` writes benchmarks/results/regime.{json,md,png}. Beside the `train` extra
it needs `pip install bitsandbytes galore-torch badam`. `make gpu STAGE=regime` does both with a larger model on a GPU.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import record
from benchmarks.quality import regime_table
from benchmarks.quality.equal_bytes import parameters
from benchmarks.quality.methods import Plan, run
from benchmarks.quality.regime_runs import CPU_SEARCHES, GPU_SEARCHES, LR_RATIO, PACKAGES, SCALES, Job, Scale
from benchmarks.quality.searches import Search, outcome, read, run_all
from examples.demo.data import (
    finetuning_corpus,
    halves,
    header_files,
    pretraining_corpus,
    python_files,
    random_batches,
    validation_batches,
)
from examples.demo.model import Llama
from examples.demo.train import mean_loss, train

OUT = Path("out/regime")
RESULTS = Path("benchmarks/results")
# Of all finished runs, a line each: whoever has the repository goes on from there.
RUNS = "regime-runs.jsonl"


def lr_of(job: Job, scale: Scale) -> float:
    """Return the learning rate of a run."""
    return scale.lr * LR_RATIO**job.power


def new_model(scale: Scale) -> Llama:
    """Return the model with random weights, always the same."""
    torch.manual_seed(0)
    return Llama(scale.shape).to(scale.device)


def base_weights(scale: Scale) -> dict[str, torch.Tensor]:
    """Return the weights that fine-tuning begins with, trained on Python source if they are not there yet."""
    path = OUT / f"base-{scale.name}.pt"
    if not path.exists():
        model = new_model(scale)
        optimizer = torch.optim.AdamW(model.parameters(), lr=scale.lr)
        batches = random_batches(pretraining_corpus().train, scale.base_batch, scale.shape.context, 0)
        for _ in train(model, optimizer, batches, scale.base_steps):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        torch.save(model.state_dict(), unfinished)
        shutil.move(unfinished, path)
    return torch.load(path)


def held_out_losses(task: str, model: nn.Module, scale: Scale) -> dict[str, float]:
    """Return a model's losses in nats a byte, by name.

    They are "tuning_loss", "loss" on the reporting text, and in fine-tuning "source_loss" on what was learned before.
    """
    tuning, reporting = halves(header_files() if task == "fine-tuning" else python_files())
    texts = {"tuning_loss": (tuning, scale.held_out[0]), "loss": (reporting, scale.held_out[1])}
    if task == "fine-tuning":
        texts["source_loss"] = halves(python_files())[1], scale.held_out[1]
    return {
        name: round(mean_loss(model, validation_batches(text, 32, scale.shape.context, batches)), 6)
        for name, (text, batches) in texts.items()
    }


@cache
def losses_before(task: str, scale: Scale) -> dict[str, float]:
    """Return the losses of the model that all runs of a task begin with."""
    base = new_model(scale)
    if task == "fine-tuning":
        base.load_state_dict(base_weights(scale))
    return {f"{name}_before": loss for name, loss in held_out_losses(task, base, scale).items()}


def clock_s(device: str) -> float:
    """Return the reading of what times a training: the process's CPU time, or on a GPU the time when all is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def execute(scale: Scale, job: Job) -> dict[str, Any]:
    """Train once and return key and result of the run as plain types."""
    torch.set_num_threads(1)
    if scale.device == "cuda":
        # TF32, with which the weights to begin with are trained, too.
        torch.set_float32_matmul_precision("high")
    base = new_model(scale)
    if job.task == "fine-tuning":
        base.load_state_dict(base_weights(scale))
    before = losses_before(job.task, scale)
    corpus = finetuning_corpus() if job.task == "fine-tuning" else pretraining_corpus()
    batches = random_batches(corpus.train, scale.batch, scale.shape.context, job.seed)
    plan = Plan(lr_of(job, scale), scale.steps, scale.window, scale.device)
    trained, found = run(job, base, batches, plan)
    return found | before | held_out_losses(job.task, trained, scale)


def run_missing(workers: int) -> dict[Job, str]:
    """Train what the table of the CPU wants and has not; return the error of each run that failed."""
    base_weights(SCALES["5m"])
    return run_all(CPU_SEARCHES, partial(execute, SCALES["5m"]), RESULTS / RUNS, Job, workers)


def write_tables() -> None:
    """Write the table of the CPU."""
    write_table(RESULTS, SCALES["5m"], CPU_SEARCHES)


def on_the_gpu(scale: Scale, deadline: float, folder: Path) -> dict[str, Any]:
    """Train what is missing until the deadline, one run at a time, and write the table; return its content.

    Args:
        scale: Of the models.
        deadline: Reading of `time.monotonic` after which no run begins.
        folder: Of the table and of the finished runs. Where it has none, they are those that the repository has.

    Returns:
        What regime.json contains: also "absent", the methods whose packages are not installed, and "failed", the errors
        of runs by method.
    """
    runs, known = folder / RUNS, RESULTS / "gpu" / RUNS
    if not runs.exists() and known.exists() and scale.device == "cuda":
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(known, runs)
    needs = {search.first.method: PACKAGES.get(search.first.method, ()) for search in GPU_SEARCHES}
    absent = {
        method: f"{package} is not installed"
        for method, packages in needs.items()
        for package in packages
        if importlib.util.find_spec(package) is None
    }
    searches = [search for search in GPU_SEARCHES if search.first.method not in absent]
    failed = run_all(searches, partial(execute, scale), runs, Job, 1, deadline)
    errors = {job.method: error for job, error in failed.items()}
    return write_table(folder, scale, searches, absent=absent, failed=errors)


def write_table(folder: Path, scale: Scale, searches: Sequence[Search], **more: Any) -> dict[str, Any]:
    """Write regime.json, regime.md and regime.png from the finished runs in a folder; return what the first contains.

    Args:
        folder: Where to read from and to write to.
        scale: Of the models.
        searches: What the table needs.
        more: Goes into regime.json.
    """
    tuning, reporting, missing = outcome(searches, results := read(folder / RUNS, Job))
    trained = {"scale": asdict(scale) | {"parameters": parameters(new_model(scale))}}
    content = trained | regime_table.summary(tuning, reporting) | {"missing": missing} | more
    content = record.environment(torch.device(scale.device)) | content
    record.write(folder, "regime", content)
    (folder / "regime.md").write_text(regime_table.markdown(content), encoding="utf-8")
    print(regime_table.markdown(content), regime_table.draw(content["curves"], folder / "regime.png"))
    print(f"{len(results)} runs, {missing} more wanted; written: {folder}/regime.json, .md, .png")
    return content
