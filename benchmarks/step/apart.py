"""A process of its own that takes a few steps: cold, for the time of the first, or under a profiler."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.step.peers import BF16, FORMATS, PEERS
from benchmarks.step.update import wait
from misa_kernels import MISA

# What ncu looks at: 64M elements in 60 tensors.
SHAPE, TENSORS = (4369, 256), 60


def main(argv: list[str] | None = None) -> int:
    """Run what the command line names; print one line of JSON."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.step.apart", description=__doc__.splitlines()[0])
    made.add_argument("what", choices=("cold", "profile"))
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--peer", choices=(PEERS | FORMATS).keys(), default="bf16 misa", help="who is profiled")
    args = made.parse_args(argv)
    device = torch.device(args.device)
    print(json.dumps(ordinary_run(device) if args.what == "cold" else profiled_run(device, args.peer)))
    return 0


def ordinary_run(device: torch.device) -> dict[str, Any]:
    """Train matrices and always-on vectors over three rounds with a schedule; return the first step's seconds."""
    matrices = [torch.randn(64, 64, device=device, dtype=BF16).requires_grad_() for _ in range(12)]
    vectors = [torch.randn(100, device=device, dtype=BF16).requires_grad_() for _ in range(3)]
    groups = [{"params": matrices, "role": "sampled"}, {"params": vectors, "role": "dense"}]
    backend = "triton" if device.type == "cuda" else "reference"
    optimizer = MISA(groups, delta=0.3, inner_steps=3, backend=backend)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    seconds = []
    for _ in range(9):
        for param in (*matrices, *vectors):
            param.grad = torch.randn_like(param) if param.requires_grad else None
        wait(device)
        started = time.perf_counter()
        optimizer.step()
        wait(device)
        seconds.append(time.perf_counter() - started)
        schedule.step()
    return {"first_step_s": seconds[0], "slowest_later_step_s": max(seconds[1:]), "steps": len(seconds)}


def profiled_run(device: torch.device, name: str) -> dict[str, Any]:
    """Take three steps of a peer of `PEERS` or `FORMATS`; return the bytes that one must move."""
    peer = (PEERS | FORMATS)[name]
    shape = SHAPE if device.type == "cuda" else (8, 8)
    weights = [torch.randn(shape, device=device, dtype=peer.dtype).requires_grad_() for _ in range(TENSORS)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = peer.make(weights)
    for _ in range(3):
        optimizer.step()
    wait(device)
    return {"counted_bytes": int(peer.moved_bytes * sum(weight.numel() for weight in weights))}


def cold(device: torch.device, deadline: float) -> dict[str, Any]:
    """Return the seconds of a first step with an empty Triton cache, and the variants that a run compiles.

    Or "absent", a sentence that says why there are no figures.
    """
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.step.apart", "cold", "--device", device.type]
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        try:
            done = subprocess.run(
                command,
                cwd=record.ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=max(deadline - time.monotonic(), 0.1),
            )
        except subprocess.TimeoutExpired:
            return {"absent": "the cold run did not end within the time limit"}
        if done.returncode:
            return {"absent": f"the cold run failed: {done.stderr[-500:]}"}
        variants = sorted(path.stem for path in Path(cache).rglob("*.cubin"))
    return json.loads(done.stdout.splitlines()[-1]) | {"variants": variants}


if __name__ == "__main__":
    sys.exit(main())
