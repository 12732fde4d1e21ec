"""How is MISA used with Hugging Face accelerate? `prepare` takes it: `python -m examples.loops.loop_accelerate`."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from examples.demo.data import pretraining_corpus
from examples.demo.model import Llama, LlamaConfig
from examples.demo.train import batch_loss, warmup_cosine
from misa_kernels import MISA, param_groups


def loader(sequences: int, context: int = 64) -> torch.utils.data.DataLoader:
    """Return batches of four sequences of Python source text, shuffled; each one is inputs and targets."""
    windows = pretraining_corpus().train.unfold(0, context + 1, context)[:sequences].long()
    dataset = torch.utils.data.TensorDataset(windows[:, :-1], windows[:, 1:])
    return torch.utils.data.DataLoader(dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(0))


def main(steps: int = 150) -> list[float]:
    """Train a small model on Python source text.

    Args:
        steps: Optimizer steps, of two batches each.

    Returns:
        The loss of each batch, in nats a byte.
    """
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = Llama(LlamaConfig(layers=4, context=64))
    optimizer = MISA(param_groups(model, mode="pretrain"), lr=4e-3, delta=0.25, total_steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps))
    misa = optimizer
    model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, loader(8 * steps), schedule)

    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = batch_loss(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    # `accelerator.save_state(folder)` and `load_state(folder)` keep the round and the active set, too.
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a byte in {steps} steps; {misa!r}")
    misa.release()
    return losses


if __name__ == "__main__":
    main()
