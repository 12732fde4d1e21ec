"""Which runs does the benchmark of small δ consist of, and how large are their models?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.quality.searches import Search
from examples.demo.model import LlamaConfig

TUNING_SEED = 100
TASKS = ("fine-tuning", "pre-training")
# Of 7 matrices each, at every scale.
LAYERS = 24
# Learning rates are AdamW's guess times powers of two.
LR_RATIO = 2.0


@dataclass(frozen=True)
class Scale:
    """How large a model is, and how long it is trained.

    Attributes:
        name: A key of `SCALES`.
        shape: Of the model.
        device: Where it is trained, "cpu" or "cuda".
        lr: Learning rate of power 0, AdamW's guess.
        batch: Sequences in a batch.
        base_batch: The same in the training from random weights to those that are fine-tuned.
        steps: Of a run.
        base_steps: Of AdamW, from random weights to those that are fine-tuned.
        window: Steps whose mean loss is a point of the curve.
        held_out: Batches of 32 sequences of the text for tuning and of that for reporting.
    """

    name: str
    shape: LlamaConfig
    device: str
    lr: float
    batch: int
    base_batch: int
    steps: int = 400
    base_steps: int = 400
    window: int = 20
    held_out: tuple[int, int] = (4, 8)


SCALES = {
    scale.name: scale
    for scale in (
        # 4.9 million parameters.
        Scale(
            "5m", LlamaConfig(width=128, hidden=352, layers=LAYERS, heads=4, context=128), "cpu", 2e-3, 2, 8, window=80
        ),
        # 128 million; the learning rate falls as the width grows.
        Scale("128m", LlamaConfig(width=640, hidden=1920, layers=LAYERS, heads=10, context=512), "cuda", 5e-4, 16, 16),
        Scale(
            name="tiny",
            shape=LlamaConfig(width=32, hidden=64, layers=LAYERS, heads=2, context=32),
            device="cpu",
            lr=2e-3,
            batch=2,
            base_batch=2,
            steps=8,
            base_steps=4,
            window=4,
            held_out=(1, 1),
        ),
    )
}


@dataclass(frozen=True)
class Job:
    """One training run; its fields are the key of its result.

    Attributes:
        task: One of `TASKS`.
        method: "AdamW", a key of `LOW_RANK`, "BAdam" (its package), "LISA", "uniform", "MISA", "slices" (of each down
            projection, or at a large δ of more, see `slices()`), or a key of `VARIANTS`.
        state: Format of the optimizer states.
        delta: Budget δ; of low-rank methods that of the MISA which has as many training bytes with the same states.
            BAdam and LISA train one layer, whatever it says, and AdamW everything.
        inner_steps: Steps in a round, 0 for what MISA takes by itself.
        power: Says the learning rate, see `lr_of`.
        seed: Seed of the batches, of what is drawn, and of LoRA's adapters.
    """

    task: str
    method: str
    state: str
    delta: float
    inner_steps: int
    power: int
    seed: int


def first(method: str, state: str = "int8", delta: float = 0.03, inner_steps: int = 0, power: int = 1) -> Job:
    """Return the run in the middle of a search for a learning rate of fine-tuning."""
    return Job("fine-tuning", method, state, delta, inner_steps, power, TUNING_SEED)


def at(seeds: int, *deltas: float, **changes: Any) -> tuple[tuple[dict[str, Any], int], ...]:
    """Return arms that differ in δ, each with so many seeds."""
    return tuple(({"delta": delta, **changes}, seeds) for delta in deltas)


# Draws that differ from the default in one option: the window is half of the layers.
VARIANTS: dict[str, dict[str, Any]] = {
    "MISA, window": {"depth_window": LAYERS // 2},
    "MISA, perplexity .25": {"perplexity": 0.25},
    "MISA, perplexity 1": {"perplexity": 1.0},
    "MISA, perplexity 2": {"perplexity": 2.0},
    "MISA, least recent 0": {"least_recent": 0},
    "MISA, least recent 4": {"least_recent": 4},
}
OTHER_DRAWS = (*at(3, 0.03, method="uniform"), *at(3, 0.03, method="MISA, window"))
OTHER_OPTIONS = tuple(arm for method in VARIANTS if method != "MISA, window" for arm in at(3, 0.03, method=method))
# BAdam and LISA visit every layer once, and some once more.
LAYER_STEPS = 16
CPU_SEARCHES = (
    Search(1, first("AdamW", "fp32", 1.0, power=0), at(3, 1.0)),
    Search(1, first("MISA"), (*at(3, 0.03, 0.01, 0.05), *OTHER_DRAWS)),
    Search(1, first("MISA", delta=0.25), at(3, 0.25)),
    Search(1, first("LoRA", power=2), at(3, 0.03)),
    Search(1, first("BAdam", "fp32", inner_steps=LAYER_STEPS), at(3, 0.03)),
    Search(1, first("MISA", inner_steps=25), at(3, 0.03)),
    # The rate of rank 1 ruins rank 12.
    Search(2, first("LoRA", delta=0.25, power=0), at(3, 0.25)),
    Search(2, first("LISA", "fp32", inner_steps=LAYER_STEPS), at(3, 0.03)),
    Search(2, first("MISA"), at(3, 0.03, 0.01, 0.05, state="fp32")),
    Search(2, first("MISA", delta=0.25), at(3, 0.25, state="fp32")),
    Search(3, first("MISA"), OTHER_OPTIONS),
    Search(3, first("GaLore", power=2), at(3, 0.03)),
)
CPU_SEARCHES += tuple(
    Search(4 + search.stage, replace(search.first, task="pre-training"), search.arms)
    for search in CPU_SEARCHES
    if search.first.method in ("AdamW", "MISA", "LISA") and search.stage < 3
)
# At the paper's budget for pre-training.
CPU_SEARCHES += tuple(
    Search(stage, replace(job, task="pre-training"), at(3, job.delta))
    for stage, job in (
        (5, first("BAdam", "fp32", delta=0.25, inner_steps=LAYER_STEPS)),
        (5, first("LoRA", delta=0.25)),
        (7, first("GaLore", delta=0.25)),
    )
)
CPU_SEARCHES += (
    # Fourth seeds are as new as slices; the runs before do not have the loss on the source text.
    Search(8, first("AdamW", "fp32", 1.0, power=0), at(4, 1.0)),
    Search(8, first("slices", power=2), (*at(3, 0.03, 0.01, 0.05), *at(3, 0.03, 0.01, state="fp32"))),
    Search(9, first("MISA"), at(4, 0.03)),
    # Rank 1 of LoRA of all matrices needs twice the bytes of .01, that of DoRA a little more than those of .03.
    Search(9, first("LoRA", power=2), (*at(4, 0.03), *at(3, 0.05))),
    Search(10, first("LoRA, down", power=2), at(3, 0.03, 0.01, 0.05)),
    Search(11, first("slices", delta=0.25, power=0), (*at(3, 0.25), *at(3, 0.25, state="fp32"))),
    Search(12, first("LoRA, down", delta=0.25, power=0), at(3, 0.25)),
    Search(13, first("DoRA", delta=0.032, power=2), at(3, 0.032)),
    Search(14, replace(first("slices", power=2), task="pre-training"), at(3, 0.03)),
    Search(14, replace(first("slices", delta=0.25, power=0), task="pre-training"), at(3, 0.25)),
    Search(15, first("GaLore", delta=0.25, power=0), at(3, 0.25)),
)
# What answers most comes first: a stage of `make gpu` ends before they all have.
GPU_SEARCHES = (
    Search(1, first("AdamW", "fp32", 1.0, power=0), at(3, 1.0)),
    Search(1, first("MISA"), (*at(3, 0.03), *at(3, 0.03, method="uniform"))),
    Search(1, first("LoRA", power=2), at(3, 0.03)),
    Search(2, first("MISA"), (*at(3, 0.01, 0.05), *at(3, 0.03, method="MISA, window"))),
    Search(2, first("MISA", delta=0.25), at(3, 0.25)),
    Search(2, first("BAdam", "fp32", inner_steps=LAYER_STEPS), at(3, 0.03)),
    Search(2, first("LoRA", delta=0.25, power=0), at(3, 0.25)),
    Search(3, replace(first("AdamW", "fp32", 1.0, power=0), task="pre-training"), at(3, 1.0)),
    Search(3, replace(first("MISA", delta=0.25), task="pre-training"), at(3, 0.25)),
    Search(3, replace(first("LoRA", delta=0.25), task="pre-training"), at(3, 0.25)),
)
# Packages of the methods that need some.
PACKAGES = {name: ("peft", "bitsandbytes") for name in ("LoRA", "LoRA, down", "DoRA")}
PACKAGES |= {"GaLore": ("galore_torch", "bitsandbytes"), "BAdam": ("badam",)}
