"""Which optimizers train the model of the iteration benchmark, and what is trained how long?"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.tables import GIB
from benchmarks.train import llama
from benchmarks.train.llama import LINEARS, Llama, Shape
from misa_kernels import MISA, ImportanceSampler, badam, lisa, param_groups, slices

# Small, because the weights are random and only time counts; the update costs the same.
LR = 1e-5
LORA_RANK = 16
# As deep as the small models that people train, and of a size that two cores train on.
SHAPES = llama.SHAPES | {"11m": Shape(vocab=2048, hidden=192, intermediate=512, layers=24, heads=6, kv_heads=6)}
SHAPES |= {"12l": Shape(vocab=1024, hidden=256, intermediate=704, layers=12, heads=8, kv_heads=8)}
OURS = ("badam", "lisa", "misa", "misa_window", "misa_slices")


@dataclass(frozen=True)
class Plan:
    """What is trained, and how long.

    Attributes:
        shape: A key of `SHAPES`.
        batch: Sequences in a batch.
        sequence: Tokens in a sequence.
        delta: MISA's and BAdam's budget: room for one whole layer, which BAdam needs.
        checkpointing: Keep the layers' inputs alone and compute activations again in the backward pass.
        inner_steps: Steps in a round of a sampler: few, so that many draws are seen.
        rounds: Rounds of a sampler in a turn, an even number for the two halves of the window; BAdam gets as
            many more as it needs to visit each layer equally often.
        steps: Iterations in a turn of a peer without rounds.
        turns: How often each peer has its turn.
        together: Whether all peers stay, each with a model of its own, and take short turns of `rounds` rounds, so that
            what else the machine does hits all alike; turns times rounds are then to visit all layers equally often.
        dtype: Of the weights.
        caps_bytes: Memory under which the largest batch is looked for, up to `largest_batch` sequences.
        largest_batch: Where the search ends.
        lora_rank: Of LoRA's adapters.
        chunk: Tokens whose logits are held at a time.
    """

    shape: str
    batch: int
    sequence: int
    delta: float
    checkpointing: bool
    inner_steps: int
    rounds: int
    steps: int = 20
    turns: int = 2
    together: bool = False
    dtype: str = "bfloat16"
    caps_bytes: tuple[int, ...] = (24 * GIB, 48 * GIB, 80 * GIB)
    largest_batch: int = 16
    lora_rank: int = LORA_RANK
    chunk: int = llama.LOSS_CHUNK

    @property
    def tokens(self) -> int:
        """Tokens in a batch."""
        return self.batch * self.sequence


# In the order of their worth: what the time limit cuts off is at the end.
PLANS = {
    "8b": Plan("8b", 2, 2048, delta=0.03, checkpointing=True, inner_steps=2, rounds=12),
    "1b": Plan("1b", 4, 2048, delta=0.05, checkpointing=False, inner_steps=5, rounds=12),
    "130m": Plan("130m", 32, 512, delta=0.06, checkpointing=False, inner_steps=5, rounds=12),
    # Of float32, which CPUs multiply fastest. 1.5, 3 and 5 times the weights' bytes, as 24, 48 and 80 GiB are of 8B's.
    "11m": Plan(
        shape="11m",
        batch=2,
        sequence=128,
        delta=0.05,
        checkpointing=True,
        inner_steps=2,
        rounds=1,
        steps=2,
        turns=24,
        together=True,
        dtype="float32",
        caps_bytes=tuple(int(times * 45_650_000) for times in (1.5, 3, 5)),
    ),
    "tiny": Plan(
        shape="tiny",
        batch=2,
        sequence=32,
        delta=0.2,
        checkpointing=True,
        inner_steps=2,
        rounds=4,
        steps=4,
        caps_bytes=(450_000, 650_000),
        largest_batch=4,
    ),
}


@dataclass
class Peer:
    """An optimizer at work on the model.

    Attributes:
        optimizer: What trains.
        close: Takes back what it changed in the model.
        rounds: Rounds of a turn, 0 for an optimizer without rounds.
        early: Steps before the last of a round in which the switch to the next is made.
    """

    optimizer: torch.optim.Optimizer
    close: Callable[[], object]
    rounds: int = 0
    early: int = 0


def nothing() -> None:
    """Take nothing back."""


def full_adamw(model: Llama, plan: Plan, seed: int) -> Peer:
    """AdamW of every weight; its moments have the weights' dtype, the smallest and fastest it offers."""
    return Peer(torch.optim.AdamW(model.parameters(), lr=LR, fused=True), nothing)


def adamw_8bit(model: Llama, plan: Plan, seed: int) -> Peer:
    """Bitsandbytes' AdamW of every weight, moments in 8 bits."""
    from bitsandbytes.optim import AdamW8bit

    return Peer(AdamW8bit(model.parameters(), lr=LR), nothing)


def flash_adamw(model: Llama, plan: Plan, seed: int) -> Peer:
    """FlashOptim's AdamW of every weight, moments in 8 bits, bfloat16 weights with 8 bits of correction."""
    from flashoptim import FlashAdamW

    bits = 24 if plan.dtype == "bfloat16" else None
    return Peer(FlashAdamW(model.parameters(), lr=LR, master_weight_bits=bits), nothing)


def lora(model: Llama, plan: Plan, seed: int, targets: Sequence[str] = tuple(LINEARS)) -> Peer:
    """AdamW of peft's LoRA adapters, in the weights' dtype, its fastest form; with as many parameters as on all."""
    from peft import LoraConfig, get_peft_model

    linears = {name: part for name, part in model.layers[0].named_modules() if isinstance(part, nn.Linear)}
    sizes = {name.rpartition(".")[2]: sum(part.weight.shape) for name, part in linears.items()}
    rank = plan.lora_rank * sum(sizes.values()) // sum(sizes[name] for name in targets)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return Peer(torch.optim.AdamW(trained, lr=LR, fused=True), adapted.unload)


def sampled(model: Llama, plan: Plan, seed: int, **options: Any) -> Peer:
    """MISA with the draw that `options` describe."""
    optimizer = MISA(param_groups(model), lr=LR, delta=plan.delta, inner_steps=plan.inner_steps, seed=seed, **options)
    return Peer(optimizer, optimizer.release, plan.rounds)


def whole_cycles(plan: Plan) -> int:
    """Return the rounds of a turn in which each layer is visited equally often."""
    layers = SHAPES[plan.shape].layers
    return layers * math.ceil(plan.rounds / layers)


def badam_package(model: Llama, plan: Plan, seed: int) -> Peer:
    """BAdam's own package: fused AdamW of float32 copies of one layer's weights and norms, the first layer first."""
    base = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    return Peer(block_optimizer(model, base, plan.inner_steps), nothing, whole_cycles(plan), early=1)


def block_optimizer(
    model: nn.Module, base: torch.optim.Optimizer, inner_steps: int, always: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """Return the optimizer of the badam package, which takes the layers in turn, without all that it prints.

    Args:
        model: Its layers are recognised by the names of their parameters.
        base: What updates the parameters of a layer.
        inner_steps: Steps with a layer.
        always: Names of parameters that are trained with every layer.
    """
    from badam import BlockOptimizer

    class Quiet(BlockOptimizer):
        # It prints the names of each layer, whatever `verbose` says.
        def switch_trainable_params(self, verbose: int | None = 0) -> None:
            super().switch_trainable_params(verbose)

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # Float32 weights are not what it is made for, it says.
        warnings.simplefilter("ignore")
        return Quiet(
            base,
            list(model.named_parameters()),
            switch_block_every=inner_steps,
            switch_mode="ascending",
            active_modules=list(always),
            verbose=0,
        )


def badam_layers(model: Llama, plan: Plan, seed: int) -> Peer:
    """The BAdam preset: whole layers in turn."""
    return replace(sampled(model, plan, seed, **badam()), rounds=whole_cycles(plan))


def lisa_layers(model: Llama, plan: Plan, seed: int) -> Peer:
    """The LISA preset: whole layers at random; embedding and head frozen, as with the other samplers here."""
    return sampled(model, plan, seed, **lisa())


def misa_modules(model: Llama, plan: Plan, seed: int) -> Peer:
    """MISA with its defaults."""
    return sampled(model, plan, seed)


def misa_window(model: Llama, plan: Plan, seed: int) -> Peer:
    """MISA that draws each round from a window of half the layers."""
    window = SHAPES[plan.shape].layers // 2
    return sampled(model, plan, seed, sampler=ImportanceSampler(depth_window=window))


def compiled(model: Llama, plan: Plan, seed: int, peer: Callable[[Llama, Plan, int], Peer]) -> Peer:
    """A peer on layers that torch.compile compiles one by one."""
    made = peer(model, plan, seed)
    for layer in model.layers:
        layer.compile()

    def close() -> None:
        made.close()
        for layer in model.layers:
            layer._compiled_call_impl = None

    return replace(made, close=close)


PEERS: dict[str, Callable[[Llama, Plan, int], Peer]] = {
    "adamw": full_adamw,
    "adamw_8bit": adamw_8bit,
    "flashoptim": flash_adamw,
    "lora": lora,
    "badam_package": badam_package,
    "badam": badam_layers,
    "lisa": lisa_layers,
    "misa": misa_modules,
    "misa_window": misa_window,
    "lora_down": partial(lora, targets=("down_proj",)),
    # Columns of each down projection, the same in all rounds.
    "misa_slices": partial(sampled, **slices()),
}
# Measured on request, as compiling takes minutes.
COMPILED: dict[str, Callable[[Llama, Plan, int], Peer]] = {
    f"{name}_compiled": partial(compiled, peer=PEERS[name]) for name in ("adamw", "misa_slices")
}
