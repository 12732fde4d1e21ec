"""How does Trainer resume a MISA whose states FSDP2 has sharded? A subclass that loads them by MISA's own way.

`accelerate config` writes `fsdp_version: 2`; give Trainer `optimizers=(MISA(param_groups(model), ...), None)` as ever.
Load the model in float32, or in bfloat16 without `bf16=True`, where MISA has float32 masters of what is active.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Trainer

from misa_kernels.distributed import load


class ShardedTrainer(Trainer):
    """Trainer that resumes from a checkpoint of FSDP2 whatever was active when it was written, on any number of GPUs.

    Trainer's own way reads only what is active now and then drops what is frozen; plain checkpoints go that way still.
    """

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        saved = None if checkpoint is None else Path(checkpoint) / "optimizer_0"
        if saved is None or not saved.is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load(self.model_wrapped, self.optimizer.optimizer, saved)
        self.lr_scheduler.load_state_dict(torch.load(saved.parent / "scheduler.pt", weights_only=True))
