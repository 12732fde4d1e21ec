"""How do rounds get into TensorBoard or Weights & Biases? `python -m examples.loops.logging_runs tensorboard|wandb`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch

from examples.demo.data import pretraining_corpus, random_batches
from examples.demo.model import Llama, LlamaConfig
from examples.demo.train import train
from misa_kernels import MISA, param_groups
from misa_kernels.monitor import Monitor

FOLDER = "out/logging"
CURVES = ["active_fraction", "gradient_fraction", "perplexity_fraction", "backward_depth", "skipped_steps"]
CURVES += ["grad_norm", "update_ratio"]


def figures(monitor: Monitor) -> dict[str, float]:
    """Return what is worth a curve of the round that has ended last."""
    history = monitor.history()
    # The last entry is the running round. Where layers are unknown, so is the depth.
    ended = {f"misa/{name}": float(history[name][-2]) for name in CURVES}
    return {name: value for name, value in ended.items() if not math.isnan(value)}


def to_tensorboard(folder: str) -> Callable[[int, dict[str, float]], None]:
    """Return a function that writes figures of a step to TensorBoard's files in a folder."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SystemExit("TensorBoard is not installed: pip install tensorboard") from error
    writer = SummaryWriter(folder)

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def to_wandb(folder: str) -> Callable[[int, dict[str, float]], None]:
    """Return a function that gives figures of a step to Weights & Biases, which keeps them in a folder."""
    try:
        import wandb
    except ImportError as error:
        raise SystemExit("Weights & Biases is not installed: pip install wandb") from error
    # Without a network; `wandb sync` uploads the folder later, and mode="online" at once.
    run = wandb.init(project="misa", dir=folder, mode="offline")
    return lambda step, values: run.log(values, step=step)


LOGGERS = {"tensorboard": to_tensorboard, "wandb": to_wandb}


def main(logger: str = "tensorboard", folder: str = FOLDER, steps: int = 100) -> list[float]:
    """Train a small model on Python source text and log loss and rounds.

    Args:
        logger: Key of `LOGGERS`.
        folder: Where the logger writes; it is made if it is missing.
        steps: Optimizer steps.

    Returns:
        The loss of each step, in nats a byte.
    """
    torch.manual_seed(0)
    log = LOGGERS[logger](folder)
    model = Llama(LlamaConfig(layers=4, context=64))
    optimizer = MISA(param_groups(model, mode="pretrain"), lr=4e-3, delta=0.25, total_steps=steps)
    batches = random_batches(pretraining_corpus().train, batch=4, context=64, seed=0)
    losses = []
    for step, loss in train(model, optimizer, batches, steps):
        losses.append(loss.item())
        values = {"loss": losses[-1]}
        # The running round begins after this step, so that one has ended with it.
        if step == optimizer.monitor.current.first_step:
            values |= figures(optimizer.monitor)
        log(step, values)
    rounds = len(optimizer.monitor.rounds) - 1
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a byte in {steps} steps; {rounds} rounds logged to {folder}")
    optimizer.release()
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:2])
