"""What share of AdamW's improvement does MISA reach where δ is small and the model deep, per step and per second?

From the repository's root: `python -m benchmarks.regime run [--workers N]` trains what is missing, as often as it is
started; `python -m benchmarks.regime table` writes benchmarks/results/regime.{json,md,png}. It needs what
`benchmarks.quality` needs, and `pip install badam`.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import equal_bytes, record, regime_table
from benchmarks.searches import Search, outcome, read, run_all
from benchmarks.trainers import block_optimizer
from examples.data import (
    finetuning_corpus,
    halves,
    header_files,
    pretraining_corpus,
    python_files,
    random_batches,
    validation_batches,
)
from examples.methods import matrices
from examples.model import Llama, LlamaConfig
from examples.train import mean_loss, train
from misa_kernels import MISA, ImportanceSampler, UniformSampler, lisa, param_groups

OUT = Path("out/regime")
RESULTS = Path("benchmarks/results")
# Of all finished runs, a line each: whoever has the repository goes on from there.
RUNS = RESULTS / "regime-runs.jsonl"
TUNING_SEED = 100
# Learning rates are AdamW's guess times powers of two.
LR_BASE, LR_RATIO = 2e-3, 2.0
# 24 layers of 7 matrices, 4.9 million parameters.
SHAPE = LlamaConfig(width=128, hidden=352, layers=24, heads=4, context=128)
STEPS, BATCH = 400, 2
# Of AdamW, from random weights to those that are fine-tuned.
BASE_STEPS, BASE_BATCH = 400, 8
# A point of the curves is the mean of so many steps.
WINDOW = 20
# Batches of 32 sequences of the text for tuning and of that for reporting.
TUNING_BATCHES, REPORTING_BATCHES = 4, 8
TASKS = ("fine-tuning", "pre-training")


@dataclass(frozen=True)
class Job:
    """One training run; its fields are the key of its result.

    Attributes:
        task: One of `TASKS`.
        method: "AdamW", "LoRA", "GaLore", "BAdam" (its package), "LISA", "uniform", "MISA", or a key of `VARIANTS`.
        state: Format of the optimizer states.
        delta: Budget δ; of LoRA and GaLore that of the MISA which has as many training bytes with the same states.
            BAdam and LISA train one layer, whatever it says, and AdamW everything.
        inner_steps: Steps in a round, 0 for what MISA takes by itself.
        power: Says the learning rate, see `lr_of`.
        seed: Seed of the batches, of what is drawn, and of LoRA's adapters.
    """

    task: str
    method: str
    state: str
    delta: float
    inner_steps: int
    power: int
    seed: int


def first(method: str, state: str = "int8", delta: float = 0.03, inner_steps: int = 0, power: int = 1) -> Job:
    """Return the run in the middle of a search for a learning rate of fine-tuning."""
    return Job("fine-tuning", method, state, delta, inner_steps, power, TUNING_SEED)


def at(seeds: int, *deltas: float, **changes: Any) -> tuple[tuple[dict[str, Any], int], ...]:
    """Return arms that differ in δ, each with so many seeds."""
    return tuple(({"delta": delta, **changes}, seeds) for delta in deltas)


# Draws that differ from the default in one option: the window is half of the layers.
VARIANTS: dict[str, dict[str, Any]] = {
    "MISA, window": {"depth_window": SHAPE.layers // 2},
    "MISA, perplexity .25": {"perplexity": 0.25},
    "MISA, perplexity 1": {"perplexity": 1.0},
    "MISA, perplexity 2": {"perplexity": 2.0},
    "MISA, least recent 0": {"least_recent": 0},
    "MISA, least recent 4": {"least_recent": 4},
}
OTHER_DRAWS = (*at(3, 0.03, method="uniform"), *at(3, 0.03, method="MISA, window"))
OTHER_OPTIONS = tuple(arm for method in VARIANTS if method != "MISA, window" for arm in at(3, 0.03, method=method))
# BAdam and LISA visit every layer once, and some once more.
LAYER_STEPS = 16
SEARCHES = (
    Search(1, first("AdamW", "fp32", 1.0, power=0), at(3, 1.0)),
    Search(1, first("MISA"), (*at(3, 0.03, 0.01, 0.05), *OTHER_DRAWS)),
    Search(1, first("MISA", delta=0.25), at(3, 0.25)),
    Search(1, first("LoRA", power=2), at(3, 0.03)),
    Search(1, first("BAdam", "fp32", inner_steps=LAYER_STEPS), at(3, 0.03)),
    Search(1, first("MISA", inner_steps=25), at(3, 0.03)),
    # The rate of rank 1 ruins rank 12.
    Search(2, first("LoRA", delta=0.25, power=0), at(3, 0.25)),
    Search(2, first("LISA", "fp32", inner_steps=LAYER_STEPS), at(3, 0.03)),
    Search(2, first("MISA"), at(3, 0.03, 0.01, 0.05, state="fp32")),
    Search(2, first("MISA", delta=0.25), at(3, 0.25, state="fp32")),
    Search(3, first("MISA"), OTHER_OPTIONS),
    Search(3, first("GaLore", power=2), at(3, 0.03)),
)
SEARCHES += tuple(
    Search(4 + search.stage, replace(search.first, task="pre-training"), search.arms)
    for search in SEARCHES
    if search.first.method in ("AdamW", "MISA", "LISA") and search.stage < 3
)
# At the paper's budget for pre-training.
SEARCHES += tuple(
    Search(7, replace(job, task="pre-training"), at(3, job.delta))
    for job in (
        first("BAdam", "fp32", delta=0.25, inner_steps=LAYER_STEPS),
        first("LoRA", delta=0.25),
        first("GaLore", delta=0.25),
    )
)


def lr_of(power: int) -> float:
    """Return the learning rate of a power."""
    return LR_BASE * LR_RATIO**power


def new_model() -> Llama:
    """Return the model with random weights, always the same."""
    torch.manual_seed(0)
    return Llama(SHAPE)


def always_trained(model: Llama) -> dict[str, nn.Parameter]:
    """Return by name what pre-training trains at every step: embedding and norms."""
    sampled = {id(matrix.weight) for matrix in matrices(model).values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in sampled}


def layer_share(model: Llama) -> float:
    """Return the fraction of the parameters that the matrices of one layer are."""
    matrices = sum(module.weight.numel() for module in model.layers[0].modules() if isinstance(module, nn.Linear))
    return matrices / equal_bytes.parameters(model)


def size_of(job: Job, model: Llama) -> float:
    """Return the rank of LoRA and GaLore, and the fraction of the parameters that are trained at a time of others."""
    if job.method in ("LoRA", "GaLore"):
        budget = equal_bytes.METHODS["MISA"].training_bytes(model, job.state, job.delta)
        return equal_bytes.METHODS[job.method].size(model, job.state, budget)
    return {"AdamW": 1.0, "BAdam": layer_share(model), "LISA": layer_share(model)}.get(job.method, job.delta)


def training_bytes(job: Job, model: Llama) -> int:
    """Return the bytes of states, gradients and extra weights; those trained all the time in pre-training apart."""
    size = size_of(job, model)
    if job.method == "BAdam":
        # Its float32 copies of the layer, their gradients and two moments.
        return math.ceil(size * equal_bytes.parameters(model) * 4 * equal_bytes.FP32_BYTES)
    name = job.method if job.method in ("AdamW", "LoRA", "GaLore") else "MISA"
    return equal_bytes.METHODS[name].training_bytes(model, job.state, size)


def build(job: Job, model: Llama) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return what to train (LoRA wraps the model) and its optimizer."""
    lr, size = lr_of(job.power), size_of(job, model)
    always = always_trained(model) if job.task == "pre-training" else {}
    if job.method in ("AdamW", "LoRA", "GaLore"):
        trained, optimizer = equal_bytes.METHODS[job.method].build(model, job.state, size, lr, STEPS, job.seed)
        if always and job.method != "AdamW":
            for parameter in always.values():
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": list(always.values())})
            if job.method == "GaLore":
                equal_bytes.update_in_backward(optimizer, list(always.values()))
        return trained, optimizer
    if job.method == "BAdam":
        base = torch.optim.AdamW(model.parameters(), lr=lr)
        return model, block_optimizer(model, base, job.inner_steps, list(always))
    presets: dict[str, dict[str, Any]] = {
        "uniform": {"sampler": UniformSampler()},
        "LISA": lisa(),
        "MISA": {},
    }
    presets |= {method: {"sampler": ImportanceSampler(**options)} for method, options in VARIANTS.items()}
    rounds = {"inner_steps": job.inner_steps} if job.inner_steps else {"total_steps": STEPS}
    # Room for a whole layer must not be lost to rounding.
    delta = size * (1 + 1e-9)
    groups = param_groups(model, "finetune" if job.task == "fine-tuning" else "pretrain")
    return model, MISA(
        groups, lr=lr, delta=delta, state_dtype=job.state, seed=job.seed, **presets[job.method], **rounds
    )


def base_weights() -> dict[str, torch.Tensor]:
    """Return the weights that fine-tuning begins with, trained on Python source if they are not there yet."""
    path = OUT / "base.pt"
    if not path.exists():
        model = new_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR_BASE)
        batches = random_batches(pretraining_corpus().train, BASE_BATCH, SHAPE.context, 0)
        for _ in train(model, optimizer, batches, BASE_STEPS):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        torch.save(model.state_dict(), unfinished)
        shutil.move(unfinished, path)
    return torch.load(path)


def held_out_losses(job: Job, model: nn.Module) -> list[float]:
    """Return a model's loss on the tuning text and on the reporting text, in nats a byte."""
    texts = halves(header_files() if job.task == "fine-tuning" else python_files())
    return [
        mean_loss(model, validation_batches(text, 32, SHAPE.context, batches))
        for text, batches in zip(texts, (TUNING_BATCHES, REPORTING_BATCHES), strict=True)
    ]


def execute(job: Job) -> dict[str, Any]:
    """Train once and return key and result of the run as plain types."""
    torch.set_num_threads(1)
    base = new_model()
    if job.task == "fine-tuning":
        base.load_state_dict(base_weights())
    before = held_out_losses(job, base)
    size, held = size_of(job, base), training_bytes(job, base)
    model, optimizer = build(job, base)
    corpus = finetuning_corpus() if job.task == "fine-tuning" else pretraining_corpus()
    batches = random_batches(corpus.train, BATCH, SHAPE.context, job.seed)
    curve: list[tuple[int, float, float]] = []
    losses: list[torch.Tensor] = []
    began, cpu_began = time.perf_counter(), time.process_time()
    for step, loss in train(model, optimizer, batches, STEPS):
        losses.append(loss)
        if step % WINDOW == 0:
            curve.append((step, round(time.process_time() - cpu_began, 2), round(torch.stack(losses).mean().item(), 4)))
            losses.clear()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    if isinstance(optimizer, MISA):
        optimizer.release()
    tuning_loss, loss_after = held_out_losses(job, model)
    return asdict(job) | {
        "lr": lr_of(job.power),
        "size": size,
        "training_bytes": held,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "rounds_of": getattr(optimizer, "inner_steps", job.inner_steps) if job.method != "AdamW" else 0,
        "curve": curve,
        "tuning_loss_before": before[0],
        "loss_before": before[1],
        "tuning_loss": tuning_loss,
        "loss": loss_after,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run or tabulate with the command-line arguments given, those of the process if None."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regime", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (%(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "run":
        base_weights()
        run_all(SEARCHES, execute, RUNS, Job, options.workers)
    else:
        write_table(RESULTS)


def write_table(folder: Path) -> None:
    """Write regime.json, regime.md and regime.png from the finished runs.

    Args:
        folder: Where to write to.
    """
    tuning, reporting, missing = outcome(SEARCHES, results := read(RUNS, Job))
    content = regime_table.summary(tuning, reporting) | {"missing": missing}
    record.write(folder, "regime", record.environment(torch.device("cpu")) | content)
    (folder / "regime.md").write_text(regime_table.markdown(content), encoding="utf-8")
    print(regime_table.markdown(content), regime_table.draw(content["curves"], folder / "regime.png"))
    print(f"{len(results)} runs, {missing} more wanted; written: {folder}/regime.json, .md, .png")


if __name__ == "__main__":
    main()
