"""How fast is each method, and how much memory does it take? All in one process, taking turns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.memory import PeakMemory
from examples.demo.data import Batch, finetuning_corpus, random_batches
from examples.demo.methods import METHODS
from examples.demo.model import Llama
from examples.demo.runs import Settings, new_model
from examples.demo.train import batch_loss, train
from misa_kernels import MISA

STEPS_A_ROUND = 5


@dataclass
class Cost:
    """What a step of a method costs.

    Attributes:
        step_ms: Time of a training step, mean over rounds, in milliseconds.
        tokens_per_second: Tokens trained on in a second.
        peak_bytes: Most memory that tensors held at once, weights included.
        backward_depth: Layers that backward ran through, mean over the timed steps.
    """

    step_ms: float
    tokens_per_second: float
    peak_bytes: int
    backward_depth: float


def measure(
    names: list[str],
    weights: dict[str, Tensor],
    settings: Settings,
    device: str,
    advance: Callable[[int], object],
) -> dict[str, Cost]:
    """Measure speed and memory of all methods in this process.

    The methods take turns, five steps each, so that whatever else the machine does meets all of them; what
    a method draws changes from turn to turn, so the mean over turns is reported.

    Args:
        names: Keys of `METHODS`.
        weights: The pre-trained model's weights.
        settings: Size of the demo; `timing_rounds` turns are timed, after one that is not.
        device: Where to measure.
        advance: Called with a number of steps whenever these are done.

    Returns:
        The costs, by method.
    """
    text = finetuning_corpus().train
    peak_bytes = {}
    for name in names:
        batch = next(random_batches(text, settings.batch, settings.context, settings.seed))
        peak_bytes[name] = peak_memory(name, weights, settings, device, batch)
        advance(2)

    turns = {}
    bases = {}
    steps = STEPS_A_ROUND * (settings.timing_rounds + 1)
    for name in names:
        base = new_model(settings, device)
        base.load_state_dict(weights)
        bases[name] = base
        # A short training makes MISA's rounds as short as they may be: a new draw for every turn.
        with warnings.catch_warnings():
            # Too few steps to learn from, which is not what they are for.
            warnings.filterwarnings("ignore", "a run of .* visits each of the")
            model, optimizer = METHODS[name].build(base, METHODS[name].lr, steps, settings.seed)
        batches = random_batches(text, settings.batch, settings.context, settings.seed)
        turns[name] = train(model, optimizer, batches, steps)

    for name in names:
        for _ in range(STEPS_A_ROUND):
            next(turns[name])
        advance(STEPS_A_ROUND)

    seconds: dict[str, list[float]] = {name: [] for name in names}
    depths = {name: Depth(bases[name]) for name in names}
    for _ in range(settings.timing_rounds):
        for name in names:
            _wait(device)
            start = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                next(turns[name])
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
            advance(STEPS_A_ROUND)

    costs = {}
    for name in names:
        step_seconds = float(np.mean(seconds[name])) / STEPS_A_ROUND
        tokens = settings.batch * settings.context
        costs[name] = Cost(1e3 * step_seconds, tokens / step_seconds, peak_bytes[name], depths[name].mean())
    return costs


def peak_memory(name: str, weights: dict[str, Tensor], settings: Settings, device: str, batch: Batch) -> int:
    """Return the most memory, in bytes, that tensors hold up to the end of a second training step.

    MISA's memory depends on what it draws; `rehearse` makes its first step the costliest it may take.
    """
    with PeakMemory(device) as memory:
        base = new_model(settings, device)
        base.load_state_dict(weights)
        model, optimizer = METHODS[name].build(base, METHODS[name].lr, settings.finetune_steps, settings.seed)
        if isinstance(optimizer, MISA):
            optimizer.rehearse()
        for _ in range(2):
            loss = batch_loss(model, batch)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    return memory.peak_bytes


class Depth:
    """Counts, from now on, the layers that backward runs through: those whose output needs a gradient."""

    def __init__(self, model: Llama) -> None:
        self.forwards = 0
        self.layers = 0
        for layer in model.layers:
            layer.register_forward_hook(self._count)
        model.norm.register_forward_hook(self._count_forward)

    def _count(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.layers += output.requires_grad

    def _count_forward(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.forwards += 1

    def mean(self) -> float:
        """Return the mean number of layers in a step."""
        return self.layers / self.forwards


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
