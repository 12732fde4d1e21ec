"""A replicated training that torchrun restarts: `torchrun --nproc-per-node 2 tests/elastic.py DIR KILL_AT_STEP`.

Rank 1 kills itself once, before the step given (-1: never). Rank 0 checkpoints every 4 steps and writes all losses.
"""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import tiny
import torch
import torch.distributed as dist

from misa_kernels import MISA, param_groups
from misa_kernels.distributed import replicate

STEPS, EVERY = 17, 4


def main(folder: Path, kill_at: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank = dist.get_rank()
    model = tiny.build()
    optimizer = MISA(param_groups(model), lr=1e-2, delta=0.2, inner_steps=5)
    path, start, losses = folder / "checkpoint.pt", 0, []
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, losses = saved["step"], saved["losses"]
    replicate(model, optimizer)
    for step in range(start, STEPS):
        if rank == 1 and step == kill_at and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        loss = tiny.loss_of(model, tiny.batch(step)[2 * rank : 2 * rank + 2])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / 2)
        if rank == 0 and (step + 1) % EVERY == 0:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(content | {"step": step + 1, "losses": losses}, folder / "unfinished.pt")
            os.replace(folder / "unfinished.pt", path)
        # Nobody is ahead of the checkpoint.
        dist.barrier()
    if rank == 0:
        restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        (folder / "losses.json").write_text(json.dumps({"restarts": restarts, "start": start, "losses": losses}))
    dist.destroy_process_group()
    # As with DDP, the model holds the group, and its gloo threads run on. One that gives a tensor back while Python
    # ends aborts the process ("terminate called without an active exception", 1 of 112 runs on a busy machine; seen
    # with torch 2.13, whose pull request 179291 tells why), and torchrun would start all of it again.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
