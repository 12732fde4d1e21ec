"""How much of AdamW's improvement does each method reach in the same bytes of training memory?

From the repository's root: `python -m benchmarks.quality.quality run [--workers N]` trains what is missing, as often as
it is started; `python -m benchmarks.quality.quality table` writes benchmarks/results/quality.{json,md,png}. Beside the
`train` extra it needs `pip install bitsandbytes galore-torch`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import record
from benchmarks.quality.equal_bytes import METHODS
from benchmarks.quality.quality_table import draw, markdown, summary
from benchmarks.quality.searches import Search, outcome, read, run_all
from examples.data import finetuning_corpus, random_batches, tuning_and_reporting, validation_batches
from examples.runs import Settings, new_model, pretrain
from examples.train import mean_loss, train

OUT = Path("out/quality")
RESULTS = Path("benchmarks/results")
# Of all finished runs, a line each: whoever has the repository goes on from there.
RUNS = RESULTS / "quality-runs.jsonl"
# Learning rates are this base times a power of the ratio; the power is the job's `power`.
LR_BASE, LR_RATIO = 4e-3, 1.5
TUNING_SEED = 100
MODELS = {
    "8 layers": Settings(validation_batches=16),
    "24 layers": Settings(layers=24, pretrain_batch=8, finetune_steps=300, batch=4, validation_batches=16),
}


@dataclass(frozen=True)
class Job:
    """One training run; its fields are the key of its result.

    Attributes:
        model: Key of `MODELS`.
        method: Key of `METHODS`.
        state: Format of the optimizer states.
        rank: The budget: as many training bytes as LoRA with states of `budget_state` has at this rank.
        budget_state: Format of LoRA's states in the budget.
        power: Says the learning rate, see `lr_of`.
        seed: Seed of the batches, of what is drawn, and of LoRA's adapters.
    """

    model: str
    method: str
    state: str
    rank: int
    budget_state: str
    power: int
    seed: int


def arms(*kinds: tuple[str, str, int, int]) -> tuple[tuple[dict[str, Any], int], ...]:
    """Return a search's arms from format, method, budget and number of seeds of each."""
    return tuple(({"state": state, "method": method, "rank": rank}, seeds) for state, method, rank, seeds in kinds)


def small(method: str, state: str, power: int) -> Job:
    """Return the first run of a search with the model of 8 layers in the bytes of LoRA's rank 8."""
    return Job("8 layers", method, state, 8, "fp32", power, TUNING_SEED)


def deep(method: str, state: str, power: int) -> Job:
    """Return the first run of a search with the model of 24 layers in the bytes of LoRA's rank 1, 8-bit states."""
    return Job("24 layers", method, state, 1, "int8", power, TUNING_SEED)


MISA_INT8, GALORE_INT8, LORA_INT8 = small("MISA", "int8", 1), small("GaLore", "int8", 1), small("LoRA", "int8", 1)
MISA_FP32, GALORE_RANK4 = small("MISA", "fp32", 1), replace(GALORE_INT8, rank=4)
DEEP_MISA = deep("MISA", "int8", 0)
# A search may come up in several stages; its runs are shared.
SEARCHES = (
    Search(1, small("AdamW", "fp32", 0), arms(("fp32", "AdamW", 8, 3))),
    Search(1, MISA_INT8, arms(("int8", "MISA, released", 4, 3), ("int8", "MISA", 8, 3))),
    # The same δ as with int8 states in half the bytes.
    Search(1, MISA_FP32, arms(("int8", "MISA", 4, 3))),
    Search(1, GALORE_RANK4, arms(("int8", "GaLore", 4, 3))),
    Search(1, LORA_INT8, arms(("int8", "LoRA, released", 4, 3), ("int8", "LoRA", 4, 3), ("int8", "LoRA", 8, 3))),
    Search(1, GALORE_INT8, arms(("int8", "GaLore", 8, 3))),
    Search(3, MISA_INT8, arms(("int8+int4", "MISA, released", 4, 3), ("fp8", "MISA, released", 4, 3))),
    Search(3, MISA_FP32, arms(("bf16", "MISA, released", 4, 3), ("fp32", "MISA, released", 4, 3))),
    Search(8, DEEP_MISA, arms(("int8", "MISA", 1, 3), ("int8", "MISA, released", 1, 3))),
    Search(8, deep("AdamW", "fp32", 0), arms(("fp32", "AdamW", 1, 3))),
    Search(8, deep("GaLore", "int8", 0), arms(("int8", "GaLore", 1, 3))),
    Search(8, deep("LoRA", "int8", 1), arms(("int8", "LoRA", 1, 3), ("int8", "LoRA, released", 1, 3))),
    Search(7, small("AdamW", "fp32", 0), arms(("fp32", "AdamW", 8, 5))),
    Search(7, MISA_INT8, arms(("int8", "MISA, released", 4, 5), ("int8", "MISA", 8, 5))),
    Search(7, MISA_FP32, arms(("int8", "MISA", 4, 5))),
    Search(7, GALORE_RANK4, arms(("int8", "GaLore", 4, 5))),
    Search(7, LORA_INT8, arms(("int8", "LoRA, released", 4, 5), ("int8", "LoRA", 4, 5), ("int8", "LoRA", 8, 5))),
    Search(7, GALORE_INT8, arms(("int8", "GaLore", 8, 5))),
    Search(5, MISA_INT8, arms(*((state, "MISA", 8, 3) for state in ("int8+int4", "fp8", "bf16")))),
    Search(5, MISA_INT8, arms(("int8", "uniform", 8, 3))),
    Search(5, MISA_FP32, arms(("fp32", "MISA", 8, 3))),
    Search(5, small("LoRA", "fp32", 2), arms(("fp32", "LoRA", 8, 3))),
    Search(5, small("BAdam", "int8", 1), arms(("int8", "BAdam", 8, 3))),
    # The other ranks at which people use LoRA, 4 and 16.
    Search(6, small("LoRA", "fp32", 2), arms(("fp32", "LoRA", 4, 3), ("fp32", "LoRA", 16, 3))),
    Search(6, LORA_INT8, arms(("int8", "LoRA", 16, 3))),
    Search(6, MISA_INT8, arms(("int8", "MISA", 16, 3))),
)


def lr_of(power: int) -> float:
    """Return the learning rate of a power."""
    return LR_BASE * LR_RATIO**power


def budget_bytes(job: Job) -> int:
    """Return the training bytes that a run may have."""
    return METHODS["LoRA"].training_bytes(new_model(MODELS[job.model], "cpu"), job.budget_state, job.rank)


def pretrained(model: str) -> Path:
    """Return the file with a model's pre-trained weights and its losses before fine-tuning, made if it is not there."""
    path = OUT / f"{model.replace(' ', '-')}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        weights = pretrain(MODELS[model], "cpu", lambda steps: None)
        base = new_model(MODELS[model], "cpu")
        base.load_state_dict(weights)
        torch.save({"weights": weights, "losses": held_out_losses(base, MODELS[model])}, path)
    return path


def held_out_losses(model: nn.Module, settings: Settings) -> list[float]:
    """Return a model's loss on the tuning text and on the reporting text, in nats a byte."""
    return [
        mean_loss(model, validation_batches(text, 32, settings.context, settings.validation_batches))
        for text in tuning_and_reporting()
    ]


def execute(job: Job) -> dict:
    """Fine-tune once and return key and result of the run as plain types."""
    torch.set_num_threads(1)
    settings, method = MODELS[job.model], METHODS[job.method]
    base = new_model(settings, "cpu")
    start = torch.load(pretrained(job.model))
    base.load_state_dict(start["weights"])
    size = method.size(base, job.state, budget_bytes(job))
    training_bytes = method.training_bytes(base, job.state, size)
    steps = settings.finetune_steps
    model, optimizer = method.build(base, job.state, size, lr_of(job.power), steps, job.seed)
    batches = random_batches(finetuning_corpus().train, settings.batch, settings.context, job.seed)
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in train(model, optimizer, batches, steps):
        pass
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    tuning_loss, loss = held_out_losses(model, settings)
    return asdict(job) | {
        "lr": lr_of(job.power),
        "size": size,
        "training_bytes": training_bytes,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "tuning_loss_before": start["losses"][0],
        "loss_before": start["losses"][1],
        "tuning_loss": tuning_loss,
        "loss": loss,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run or tabulate with the command-line arguments given, those of the process if None."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.quality", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (%(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "run":
        for model in MODELS:
            pretrained(model)
        if failed := run_all(SEARCHES, execute, RUNS, Job, options.workers):
            sys.exit(f"{len(failed)} runs failed")
    else:
        write_table(RESULTS)


def write_table(folder: Path) -> None:
    """Write quality.json, quality.md and quality.png from the runs of the searches.

    Args:
        folder: Where to write to.
    """
    tuning, reporting, missing = outcome(SEARCHES, results := read(RUNS, Job))
    content = summary(tuning, reporting)
    record.write(folder, "quality", record.environment(torch.device("cpu")) | {"missing": missing} | content)
    (folder / "quality.md").write_text(markdown(content), encoding="utf-8")
    draw(content, folder / "quality.png")
    print(markdown(content))
    print(f"{len(results)} runs, {missing} more wanted; written: {folder}/quality.json, .md, .png")


if __name__ == "__main__":
    main()
