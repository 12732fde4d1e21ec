"""How does a training survive a kill at any moment? Its checkpoint is one file, replaced as a whole or not at all."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.demo.data import finetuning_corpus
from examples.demo.model import Llama
from examples.demo.train import batch_loss, warmup_cosine
from misa_kernels import MISA, param_groups

CHECKPOINT, WEIGHTS = "checkpoint.pt", "weights.pt"
# No multiple of the usual intervals: checkpoints and kills then fall into all parts of a round.
INNER_STEPS = 5
BATCH, CONTEXT = 4, 64


def save(content: dict[str, Any], path: Path) -> None:
    """Write a file such that at every moment `path` is the old one or the new one, whole, even if the power fails.

    Args:
        content: Tensors and plain types, so that `torch.load(weights_only=True)` can read it.
        path: The file to make or to replace; a file with the suffix `.partial` beside it exists meanwhile.
    """
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        # Else the new name could reach the disk before the content does.
        os.fsync(file.fileno())
    # In the same folder, since across file systems it would be a copy.
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def next_batch(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, int64, both (BATCH, CONTEXT); one input in twenty is blanked out."""
    windows = text.unfold(0, CONTEXT + 1, 1)
    tokens = windows[torch.randint(len(windows), (BATCH,), generator=generator)].long()
    # Like dropout, this draws from torch's own generator.
    blank = torch.rand(BATCH, CONTEXT) < 0.05
    return tokens[:, :-1].masked_fill(blank, 0), tokens[:, 1:]


def train(folder: Path, steps: int, every: int) -> None:
    """Train from the checkpoint in `folder`, or from the start, and leave the weights there as `weights.pt`.

    Prints the step it begins after, then a line a step: its number and its loss, in nats a byte, all digits.

    Args:
        folder: Where the checkpoint is; made if it does not exist.
        steps: Optimizer steps in all; the same at every start, since the learning rate's course depends on it.
        every: Steps between two checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.partial"):
        leftover.unlink()

    torch.manual_seed(0)
    text, data = finetuning_corpus().train, torch.Generator().manual_seed(1)
    model = Llama()
    optimizer = MISA(param_groups(model, mode="pretrain"), lr=4e-3, delta=0.125, inner_steps=INNER_STEPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps))
    done = 0
    if (folder / CHECKPOINT).exists():
        saved = torch.load(folder / CHECKPOINT, weights_only=True)
        done = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        # Last, since nothing random may happen between these and the next batch.
        data.set_state(saved["data"])
        torch.set_rng_state(saved["rng"])
    print(f"after step {done}", flush=True)

    for step in range(done + 1, steps + 1):
        loss = batch_loss(model, next_batch(text, data))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(step, loss.item(), flush=True)
        if step % every == 0 or step == steps:
            checkpoint = {
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "data": data.get_state(),
                "rng": torch.get_rng_state(),
            }
            save(checkpoint, folder / CHECKPOINT)

    optimizer.release()
    save(model.state_dict(), folder / WEIGHTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small model; killed and started again, it goes on.")
    parser.add_argument("--dir", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps in all")
    parser.add_argument("--every", type=int, default=12, help="steps between checkpoints")
    options = parser.parse_args()
    train(options.dir, options.steps, options.every)
