"""How large is each method in a budget, how is it built, and how long does its training take?

A model is what maps tokens to logits: the small one of the demo, or `pretrained.Logits`. Methods but AdamW confine
themselves to the matrices of its layers.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import record
from benchmarks.quality.equal_bytes import (
    ADAPTERS,
    FP32_BYTES,
    LOW_RANK,
    AdamW,
    Built,
    adamw_bytes,
    bitsandbytes_adamw,
    largest_rank,
    layers_of,
    matrices,
    misa_bytes,
    parameters,
    update_in_backward,
)
from benchmarks.quality.regime_runs import VARIANTS, Job
from benchmarks.quality.rules_runs import GRADIENT_BYTES, WHERE, split
from benchmarks.train.trainers import block_optimizer
from examples.demo.data import Batch
from examples.demo.train import train
from misa_kernels import MISA, ImportanceSampler, UniformSampler, lisa, param_groups, slices

# Of the norms beside slices, whatever the rate of these: a larger one hurts on German manuals.
NORM_LR = 1e-3


def always_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return by name what pre-training trains at every step: embedding and norms."""
    sampled = {id(matrix.weight) for matrix in matrices(model).values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in sampled}


def vectors(model: nn.Module) -> list[nn.Parameter]:
    """Return the tensors of one dimension, which in a LLaMA are the norms."""
    return [parameter for parameter in model.parameters() if parameter.ndim == 1]


def layer_share(model: nn.Module) -> float:
    """Return the fraction of the parameters that the matrices of one layer are."""
    linears = (module for module in layers_of(model)[0].modules() if isinstance(module, nn.Linear))
    return sum(linear.weight.numel() for linear in linears) / parameters(model)


def size_of(job: Job, model: nn.Module, rank: Callable[[str, nn.Module, int], int] = largest_rank) -> float:
    """Return the rank of low-rank methods, and the fraction of the parameters that others train at a time."""
    if job.method in LOW_RANK:
        return rank(job.method, model, misa_bytes(model, job.state, job.delta))
    return {"AdamW": 1.0, "BAdam": layer_share(model), "LISA": layer_share(model)}.get(job.method, job.delta)


def training_bytes(job: Job, model: nn.Module, size: float) -> int:
    """Return the bytes of states, gradients and extra weights; those trained all the time in pre-training apart."""
    if job.method == "AdamW":
        return adamw_bytes(model)
    if job.method == "BAdam":
        # Its float32 copies of the layer, their gradients and two moments.
        return math.ceil(size * parameters(model) * 4 * FP32_BYTES)
    if job.method in LOW_RANK:
        return LOW_RANK[job.method][0](model, int(size))
    if (found := split(job.method)) is not None:
        rule, where = found
        return math.ceil(int(size * parameters(model)) * (GRADIENT_BYTES + getattr(rule, where)))
    norms = sum(vector.numel() for vector in vectors(model)) if job.method == "slices and norms" else 0
    return misa_bytes(model, job.state, size + norms / parameters(model))


def build(job: Job, model: nn.Module, lr: float, steps: int, size: float, adamw: AdamW = bitsandbytes_adamw) -> Built:
    """Return what to train (LoRA wraps the model) and its optimizer.

    Args:
        job: The run.
        model: With the weights to begin with.
        lr: Highest learning rate.
        steps: Of the training.
        size: What `size_of` says.
        adamw: Trains the adapters of LoRA and DoRA.
    """
    always = always_trained(model) if job.task == "pre-training" else {}
    if job.method == "AdamW":
        return model, torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    if job.method in LOW_RANK:
        more = {"adamw": adamw} if job.method in ADAPTERS else {}
        trained, optimizer = LOW_RANK[job.method][1](model, int(size), lr, job.seed, **more)
        if always:
            for parameter in always.values():
                parameter.requires_grad_(True)
            optimizer.add_param_group({"params": list(always.values())})
            if job.method == "GaLore":
                update_in_backward(optimizer, list(always.values()))
        return trained, optimizer
    if job.method == "BAdam":
        base = torch.optim.AdamW(model.parameters(), lr=lr)
        return model, block_optimizer(model, base, job.inner_steps, list(always))
    presets: dict[str, dict[str, Any]] = {
        "uniform": {"sampler": UniformSampler()},
        "LISA": lisa(),
        "slices": slices(),
        "slices and norms": slices(),
        # Four draws in a run.
        "slices, redrawn": slices(sampler=UniformSampler(granularity="slice", hold_rounds=1), inner_steps=steps // 4),
        "MISA": {},
    }
    presets |= {method: {"sampler": ImportanceSampler(**options)} for method, options in VARIANTS.items()}
    rounds = {"inner_steps": job.inner_steps} if job.inner_steps else {"total_steps": steps}
    # Room for a whole layer must not be lost to rounding.
    delta = size * (1 + 1e-9)
    norms = vectors(model) if job.method == "slices and norms" else []
    groups = param_groups(model, "pretrain" if always else "finetune", dense=norms)
    for group in groups:
        if norms and group["role"] == "dense":
            group |= {"lr": NORM_LR, "weight_decay": 0.0}
    if (found := split(job.method)) is not None:
        rule, where = found
        more = rounds | presets[WHERE[where]]
        return model, MISA(groups, rule=lambda params: rule.make(params, lr), delta=delta, seed=job.seed, **more)
    return model, MISA(groups, lr=lr, delta=delta, state_dtype=job.state, seed=job.seed, **rounds | presets[job.method])


def clock_s(device: str) -> float:
    """Return the reading of what times a training: the process's CPU time, or on a GPU the time when all is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Plan:
    """How a run is trained, whatever its method.

    Attributes:
        lr: Highest learning rate.
        steps: Of the training.
        window: Steps whose mean loss is a point of the curve.
        device: "cpu" or "cuda".
        rank: Maps a low-rank method, a model and bytes to a rank: `largest_rank` or `nearest_rank`.
        adamw: Trains the adapters of LoRA and DoRA.
    """

    lr: float
    steps: int
    window: int
    device: str = "cpu"
    rank: Callable[[str, nn.Module, int], int] = largest_rank
    adamw: AdamW = bitsandbytes_adamw


def run(job: Job, model: nn.Module, batches: Iterator[Batch], plan: Plan) -> tuple[nn.Module, dict[str, Any]]:
    """Train once.

    Args:
        job: The run.
        model: With the weights to begin with.
        batches: At least `plan.steps`.
        plan: How.

    Returns:
        The trained model, and key and result of the run as plain types, held-out losses apart.
    """
    # Updates in backward hold a model in cycles, and its memory until they are found.
    gc.collect()
    size = size_of(job, model, plan.rank)
    held = training_bytes(job, model, size)
    trained, optimizer = build(job, model, plan.lr, plan.steps, size, plan.adamw)
    key = asdict(job) | {"lr": plan.lr, "size": size, "training_bytes": held}
    found = follow(trained, optimizer, batches, plan)
    # MISA of adapters has rounds, which train all of them.
    rounds = 0 if job.method in ("AdamW", *ADAPTERS) else found["rounds_of"] or job.inner_steps
    return trained, key | found | {"rounds_of": rounds}


def follow(
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    plan: Plan,
    loop: Callable[..., Iterator[tuple[int, Any]]] | None = None,
) -> dict[str, Any]:
    """Train to the end of a plan, by the demo's loop unless another one is given, which is called alike.

    Returns:
        Times, machine, steps of a round, 0 where there are none, and the curve.
    """
    curve: list[tuple[int, float, float]] = []
    # One number for all steps: a tensor kept of each would pin what the step has freed beneath it, 12 MB of logits.
    total = torch.zeros((), dtype=torch.float64, device=plan.device)
    began, clock_began = time.perf_counter(), clock_s(plan.device)
    for step, loss in (loop or train)(trained, optimizer, batches, plan.steps):
        total += loss
        if step % plan.window == 0:
            mean = total.item() / plan.window
            curve.append((step, round(clock_s(plan.device) - clock_began, 2), round(mean, 4)))
            total.zero_()
    training_s, seconds = clock_s(plan.device) - clock_began, time.perf_counter() - began
    if isinstance(optimizer, MISA):
        optimizer.release()
    return {
        "seconds": round(seconds, 1),
        "training_s": round(training_s, 1),
        "machine": record.describe_device(torch.device(plan.device))["name"],
        "rounds_of": getattr(optimizer, "inner_steps", 0),
        "curve": curve,
    }
