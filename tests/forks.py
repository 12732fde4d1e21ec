"""One process that has imported what tests run in processes of their own, and forks them."""

from __future__ import annotations

import multiprocessing

# Importing torch takes a process five seconds of computing, most of it what FSDP2, DTensors and the first optimizer
# import at their first use; the work of most tests takes a tenth of that.
CONTEXT = multiprocessing.get_context("forkserver")
# The first of a pytest process that starts one decides for all of them.
CONTEXT.set_forkserver_preload(
    [
        "examples.loops.resumable",
        "misa_kernels.distributed",
        "pytest",
        "tiny",
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
    ]
)
