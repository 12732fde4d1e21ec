"""How does MISA compare at equal state memory? Trains, fine-tunes by seven methods, prints a table, draws.

From the repository's root: `python -m examples.demo [--quick] [--out DIR] [--device cpu|cuda] [--seed N]`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from examples.demo import plot
from examples.demo.measure import STEPS_A_ROUND, Cost, measure
from examples.demo.methods import DELTA, METHODS, lora_rank
from examples.demo.runs import Run, Settings, finetune, new_model, pretrain

FULL = Settings()
QUICK = Settings(pretrain_steps=120, finetune_steps=120, evaluations=4, validation_batches=3, timing_rounds=4)

# Steps done in all runs together; set in the processes of the runs.
_done: Synchronized[int]


def main(arguments: list[str] | None = None) -> None:
    """Run the demo with the command-line arguments given, those of the process if None."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about a minute: short trainings, rough figures")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where to write (%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default_device)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches, draws (%(default)s)")
    options = parser.parse_args(arguments)
    compare(replace(QUICK if options.quick else FULL, seed=options.seed), options.device, options.out)


def compare(settings: Settings, device: str, out: Path) -> None:
    """Run everything; print the table and write demo.png, results.json and table.txt.

    Args:
        settings: Size of the demo.
        device: "cpu" or "cuda".
        out: Directory to write to; made if it is not there.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = list(METHODS)
    # Alone on two cores a second thread saves a third of the pre-training; beside other work the two wait for
    # each other at every operator (measured: 1.8 s a step instead of 0.08), and one thread does not.
    torch.set_num_threads(1)
    with tqdm(total=settings.pretrain_steps, desc="pre-training on Python", unit=" steps", mininterval=0.5) as bar:
        weights = pretrain(settings, device, bar.update)
    with tqdm(
        total=settings.finetune_steps * len(names), desc="fine-tuning on C++", unit=" steps", mininterval=0.5
    ) as bar:
        runs = finetune_all(names, weights, settings, device, bar)
    steps = len(names) * (2 + STEPS_A_ROUND * (settings.timing_rounds + 1))
    with tqdm(total=steps, desc="measuring speed and memory", unit=" steps", mininterval=0.5) as bar:
        costs = measure(names, weights, settings, device, bar.update)

    model = new_model(settings, "cpu")
    size = sum(parameter.numel() for parameter in model.parameters())
    text = "\n".join([*table(runs, costs), "", *notes(settings, size, lora_rank(model), device, runs)])
    print(f"\n{text}\n")
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    record: dict[str, object] = {"settings": asdict(settings), "device": device, "torch": torch.__version__}
    record["results"] = [asdict(run) | {"cost": asdict(costs[run.method])} for run in runs]
    (out / "results.json").write_text(json.dumps(record, default=_plain, allow_nan=False), encoding="utf-8")
    title = f"A model of {size:,} parameters, taught Python, learns C++: all but AdamW with equal optimizer state"
    plot.draw(runs, costs, title, out / "demo.png")
    print(f"written: {out / 'demo.png'}, {out / 'table.txt'}, {out / 'results.json'}")


def finetune_all(names: list[str], weights: dict[str, Tensor], settings: Settings, device: str, bar: tqdm) -> list[Run]:
    """Fine-tune by all methods in processes of one thread each, two at a time (one on a GPU).

    Args:
        names: Keys of `METHODS`.
        weights: The pre-trained model's weights.
        settings: Size of the demo.
        device: Where to train.
        bar: Progress bar, advanced by one for every step of every run.

    Returns:
        The runs, in the order of `names`.
    """
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    with ProcessPoolExecutor(2 if device == "cpu" else 1, context, _begin_process, (done,)) as pool:
        futures = {pool.submit(_finetune, name, weights, settings, device): name for name in names}
        waiting: set[Future[Run]] = set(futures)
        while waiting:
            finished, waiting = wait(waiting, timeout=0.2)
            bar.update(done.value - bar.n)
            for future in finished:
                bar.write(f"{futures[future]}: validation loss {future.result().losses[-1]:.3f} nats a byte")
        return [future.result() for future in futures]


def _begin_process(done: Synchronized[int]) -> None:
    """Prepare a process for runs: one thread, and the counter of steps that it shares with the demo."""
    global _done
    torch.set_num_threads(1)
    _done = done


def _finetune(name: str, weights: dict[str, Tensor], settings: Settings, device: str) -> Run:
    return finetune(name, weights, settings, device, _advance)


def _advance(steps: int) -> None:
    with _done.get_lock():
        _done.value += steps


def _plain(array: np.ndarray) -> list[object]:
    # JSON has no NaN: a module without a score gets null.
    return np.where(np.isnan(array), None, array).tolist()


def table(runs: list[Run], costs: dict[str, Cost]) -> list[str]:
    """Return the lines of the table, a method a line.

    Args:
        runs: All runs; "AdamW" must be among them, since the others are compared with it.
        costs: What a step of each method costs.
    """
    adamw = next(run for run in runs if run.method == "AdamW")
    gain = adamw.losses[0] - adamw.losses[-1]
    rows = [
        ("method", "validation loss", "share of", "state", "peak memory", "tokens", "layers in"),
        ("", "nats a byte", "AdamW's gain", "kB", "MB", "per second", "backward"),
        *(_row(run, gain, costs[run.method]) for run in runs),
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [*lines[:2], "-" * len(lines[0]), *lines[2:]]


def _row(run: Run, gain: float, cost: Cost) -> tuple[str, ...]:
    # MISA's rounds of the run itself say more than the few of the timing; the others do not change.
    depth = cost.backward_depth if run.rounds is None else float(np.mean(run.rounds.backward_depth))
    return (
        run.method,
        f"{run.losses[-1]:.3f}",
        f"{(run.losses[0] - run.losses[-1]) / gain:.0%}",
        f"{run.state_bytes / 1e3:,.0f}",
        f"{cost.peak_bytes / 1e6:.1f}",
        f"{cost.tokens_per_second:,.0f}",
        f"{depth:.1f}",
    )


STEPS = {
    "triton": "a Triton kernel",
    "cuda": "the CUDA library",
    "cpu": "the C++ library for CPUs",
    "reference": "plain PyTorch: `python -m misa_kernels info` says why",
}


def notes(settings: Settings, size: int, rank: int, device: str, runs: list[Run]) -> list[str]:
    """Return the lines that say under which conditions the table was made."""
    backends = sorted({run.backend for run in runs if run.backend})
    return [
        f"{size:,} parameters, delta = {DELTA}; LoRA has rank {rank}, the highest that needs no more state.",
        f"{settings.finetune_steps} steps of {settings.batch} x {settings.context} bytes on {device}, "
        f"seed {settings.seed}.",
        f"backend of MISA, slices and their relatives: {', '.join(f'{name!r}, {STEPS[name]}' for name in backends)}.",
        "state: the averages of the optimizer in the run, at most.",
        "peak memory: tensors in a training step at the costliest draw, weights and activations included.",
        "tokens per second and peak memory are measured after the runs, the methods taking turns.",
        "One run each: repeat with other seeds (--seed) before making much of small differences in loss.",
    ]
