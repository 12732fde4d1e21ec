"""How is MISA used with Lightning? `configure_optimizers` returns it: `python -m examples.loops.loop_lightning`."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor

from examples.demo.data import Batch
from examples.demo.model import Llama, LlamaConfig
from examples.demo.train import batch_loss, warmup_cosine
from examples.loops.loop_accelerate import loader
from misa_kernels import MISA, param_groups


class LanguageModel(lightning.LightningModule):
    """A small LLaMA and how it is trained.

    Args:
        steps: Optimizer steps of the run, for the course of the learning rate.
        inner_steps: Optimizer steps in a round.
    """

    def __init__(self, steps: int, inner_steps: int | str = "auto") -> None:
        """Make the model with random weights."""
        super().__init__()
        self.model = Llama(LlamaConfig(layers=4, context=64))
        self.steps, self.inner_steps = steps, inner_steps
        self.losses: list[float] = []

    def training_step(self, batch: Batch, number: int) -> Tensor:
        """Return the loss; Lightning does backward, clipping and step."""
        loss = batch_loss(self.model, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        """Return MISA and a schedule that moves with each of its steps."""
        optimizer = MISA(
            param_groups(self.model, mode="pretrain"),
            lr=4e-3,
            delta=0.25,
            inner_steps=self.inner_steps,
            total_steps=self.steps,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_end(self) -> None:
        """Write masters back and give every parameter its `requires_grad` again."""
        misa = self.trainer.optimizers[0]
        print(f"loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f} nats a byte; {misa!r}")
        misa.release()


def main(steps: int = 150) -> list[float]:
    """Train a small model on Python source text.

    Args:
        steps: Optimizer steps, of two batches each.

    Returns:
        The loss of each batch, in nats a byte.
    """
    torch.manual_seed(0)
    module = LanguageModel(steps)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(8 * steps))
    return module.losses


if __name__ == "__main__":
    main()
