"""How is a model trained? With a loop that does not know which optimizer it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.demo.data import Batch


def warmup_cosine(steps: int, warmup: float = 0.1) -> Callable[[int], float]:
    """Return the learning rate's course: up in a straight line, then down along a cosine.

    Args:
        steps: Length of the training in steps.
        warmup: Fraction of the steps until the full learning rate is reached.

    Returns:
        A function from the step's number to the factor on the learning rate, in (0, 1].
    """
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))

    return factor


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a batch, in nats a token, a scalar."""
    tokens, targets = (part.to(next(model.parameters()).device) for part in batch)
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the mean cross-entropy over batches of equal size, in nats a token."""
    return torch.stack([batch_loss(model, batch) for batch in batches]).mean().item()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], steps: int
) -> Iterator[tuple[int, Tensor]]:
    """Train a model in place, handing control back after every step.

    Args:
        model: Maps tokens (batch, positions) to logits (batch, positions, vocabulary).
        optimizer: Any PyTorch optimizer over the model's parameters: AdamW, MISA, ...
        batches: At least `steps` batches.
        steps: Number of optimizer steps.

    Yields:
        The number of steps done and the loss of the last batch before its step (a scalar, nats a token).
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps))
    for step in range(1, steps + 1):
        loss = batch_loss(model, next(batches))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step, loss.detach()
