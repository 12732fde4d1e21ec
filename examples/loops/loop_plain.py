"""How is MISA used in a loop of one's own, accumulating and clipping? `python -m examples.loops.loop_plain`."""

from __future__ import annotations

import torch

from examples.demo.data import pretraining_corpus, random_batches
from examples.demo.model import Llama, LlamaConfig
from examples.demo.train import batch_loss, warmup_cosine
from misa_kernels import MISA, param_groups

ACCUMULATE = 2


def main(steps: int = 150) -> list[float]:
    """Train a small model on Python source text.

    Args:
        steps: Optimizer steps, of `ACCUMULATE` batches each.

    Returns:
        The mean loss of each step, in nats a byte.
    """
    torch.manual_seed(0)
    model = Llama(LlamaConfig(layers=4, context=64))
    batches = random_batches(pretraining_corpus().train, batch=4, context=64, seed=0)
    optimizer = MISA(param_groups(model, mode="pretrain"), lr=4e-3, delta=0.25, total_steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps))

    losses = []
    for _ in range(steps):
        step_loss = 0.0
        for _ in range(ACCUMULATE):
            loss = batch_loss(model, next(batches)) / ACCUMULATE
            loss.backward()
            step_loss += loss.item()
        # Only active parameters have a gradient, so only they are clipped.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(step_loss)
    # In mid-round, too, `optimizer.state_dict()` and `schedule.state_dict()` are all that a resume needs.
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a byte in {steps} steps; {optimizer!r}")
    optimizer.release()
    return losses


if __name__ == "__main__":
    main()
