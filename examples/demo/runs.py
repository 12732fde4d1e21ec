"""What does one training give? The demo's pre-training and its fine-tuning runs, with what they record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.demo.data import finetuning_corpus, pretraining_corpus, random_batches, validation_batches
from examples.demo.methods import METHODS, state_bytes
from examples.demo.model import Llama, LlamaConfig
from examples.demo.train import mean_loss, train
from misa_kernels import MISA
from misa_kernels.monitor import Part

PRETRAIN_LR = 4e-3


@dataclass(frozen=True)
class Settings:
    """Size of the demo; the same for all methods.

    Attributes:
        pretrain_steps: Steps of pre-training.
        pretrain_batch: Sequences in a batch of pre-training.
        finetune_steps: Steps of fine-tuning.
        batch: Sequences in a batch of fine-tuning.
        context: Tokens (bytes) in a sequence.
        evaluations: Number of times that the validation loss is measured during fine-tuning, evenly spread.
        validation_batches: Batches of 32 sequences in a measurement of the validation loss.
        timing_rounds: Rounds of the pass that measures speed.
        layers: Layers of the model.
        seed: Seed of the weights, the batches and the draws.
    """

    pretrain_steps: int = 600
    pretrain_batch: int = 16
    finetune_steps: int = 600
    batch: int = 8
    context: int = 128
    evaluations: int = 10
    validation_batches: int = 8
    timing_rounds: int = 16
    layers: int = 8
    seed: int = 0


@dataclass
class Rounds:
    """What MISA drew.

    Attributes:
        names: Names of the B modules or layers that are drawn, in the model's order.
        layer: Layer of each, 0 nearest the input.
        inner_steps: Optimizer steps in a round.
        importance: Score of each at each draw, float64, shape (rounds, B); NaN where there was none yet.
        active: Whether it was drawn, bool, shape (rounds, B).
        backward_depth: Layers that backward ran through, one number a round.
        parts: Of slices the range of lines that each is; nothing of whole modules.
    """

    names: list[str]
    layer: list[int]
    inner_steps: int
    importance: np.ndarray
    active: np.ndarray
    backward_depth: list[int]
    parts: list[Part]


@dataclass
class Run:
    """What a fine-tuning run gave.

    Attributes:
        method: Key of `METHODS`.
        steps: Steps done at each measurement of the validation loss, beginning with 0.
        losses: Validation loss at each, in nats a byte.
        state_bytes: Most memory that the optimizer's averages took at a measurement.
        rounds: What was drawn; None for AdamW and LoRA, which draw nothing.
        backend: What ran MISA's steps; None for AdamW and LoRA.
    """

    method: str
    steps: list[int]
    losses: list[float]
    state_bytes: int
    rounds: Rounds | None
    backend: str | None = None


def new_model(settings: Settings, device: str) -> Llama:
    """Make a model with random weights for the settings' context on the device."""
    torch.manual_seed(settings.seed)
    return Llama(LlamaConfig(context=settings.context, layers=settings.layers)).to(device)


def pretrain(settings: Settings, device: str, advance: Callable[[int], object]) -> dict[str, Tensor]:
    """Train a model from scratch with AdamW on Python source text.

    Args:
        settings: Size of the demo.
        device: Where to train.
        advance: Called with 1 after every step.

    Returns:
        The weights, on the CPU.
    """
    model = new_model(settings, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR)
    text = pretraining_corpus().train
    batches = random_batches(text, settings.pretrain_batch, settings.context, settings.seed)
    for _ in train(model, optimizer, batches, settings.pretrain_steps):
        advance(1)
    return {name: weight.cpu() for name, weight in model.state_dict().items()}


def finetune(
    method: str, weights: dict[str, Tensor], settings: Settings, device: str, advance: Callable[[int], object]
) -> Run:
    """Adapt the pre-trained model to C++ headers by one method.

    Args:
        method: Key of `METHODS`.
        weights: The pre-trained model's weights.
        settings: Size of the demo.
        device: Where to train.
        advance: Called with 1 after every step.

    Returns:
        The run's losses and draws.
    """
    corpus = finetuning_corpus()
    held_out = list(validation_batches(corpus.validation, 32, settings.context, settings.validation_batches))
    batches = random_batches(corpus.train, settings.batch, settings.context, settings.seed + 1)

    base = new_model(settings, device)
    base.load_state_dict(weights)
    steps = settings.finetune_steps
    model, optimizer = METHODS[method].build(base, METHODS[method].lr, steps, settings.seed)

    run = Run(method, [0], [mean_loss(model, held_out)], 0, None)
    stops = {round(steps * part / settings.evaluations) for part in range(1, settings.evaluations + 1)}
    for step, _ in train(model, optimizer, batches, steps):
        advance(1)
        if step in stops:
            run.steps.append(step)
            run.losses.append(mean_loss(model, held_out))
            run.state_bytes = max(run.state_bytes, state_bytes(optimizer))
    if isinstance(optimizer, MISA):
        run.rounds = drawn(optimizer, steps)
        run.backend = optimizer.backend
    return run


def drawn(optimizer: MISA, steps: int) -> Rounds:
    """Read from the optimizer's monitor what it drew in a training of so many steps."""
    # The switch after the last step has drawn a set that no step will use.
    rounds = [record for record in optimizer.monitor.rounds if record.first_step < steps]
    active = np.zeros((len(rounds), len(optimizer.modules)), dtype=bool)
    for row, record in zip(active, rounds, strict=True):
        row[list(record.active)] = True
    return Rounds(
        names=list(optimizer.monitor.names),
        layer=[module.layer for module in optimizer.modules],
        inner_steps=optimizer.inner_steps,
        importance=np.stack([record.importance for record in rounds]),
        active=active,
        backward_depth=[record.backward_depth or 0 for record in rounds],
        parts=list(optimizer.monitor.parts),
    )
