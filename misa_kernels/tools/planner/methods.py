"""What does each way of training need for one model, in its costliest step, and which of them fit into a card?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from misa_kernels.draw.matrices import Widths
from misa_kernels.draw.rehearsal import costliest
from misa_kernels.draw.sampler import ImportanceSampler
from misa_kernels.draw.scores import Candidates
from misa_kernels.draw.slices import Matrix, Slicing, axis_of, slicing
from misa_kernels.draw.streams import Linear, flows
from misa_kernels.gradients.axes import Slice
from misa_kernels.kernels.foreign import PIECE
from misa_kernels.memory.arena import MOVE_ELEMENTS
from misa_kernels.memory.storage import Storage
from misa_kernels.optimizer import MISA
from misa_kernels.presets import slices
from misa_kernels.release import HELD_BYTES, LAUNCHES
from misa_kernels.tools.planner.fsdp import unsharded
from misa_kernels.tools.planner.model import Model
from misa_kernels.tools.planner.shapes import LINEARS, LlamaShape
from misa_kernels.tools.planner.states import (
    APOLLO_RANKS,
    BITSANDBYTES_BYTES,
    FLASHOPTIM_BYTES,
    RELEASED,
    TORCHAO_BYTES,
    WHOLE,
    states_of,
)
from misa_kernels.tools.planner.step import AVERAGED_BYTES, NF4_BYTES, Memory, Workload, count
from misa_kernels.tools.planner.trial import held

SLICES = "MISA, slices"
# What each row of a plan is, and what it assumes.
METHODS = {
    "AdamW": "all weights, float32 moments and, for bfloat16 weights, float32 masters",
    "AdamW 8-bit": "bitsandbytes: all weights, moments of a byte with a scale for 256 of them, no masters",
    "AdamW paged": "bitsandbytes: AdamW 8-bit with moments in host memory where the GPU is full",
    "AdamW 4-bit": "torchao: all weights, moments of 4 bits with a scale for 128, no masters",
    "FlashOptim": "flashoptim: all weights, in 24 bits if bfloat16; moments of a byte with a scale for 32 of them",
    "APOLLO": "apollo-torch: all weights, layers' moments projected to rank 256, no masters",
    "APOLLO-Mini": "APOLLO of rank 1, one scale for a matrix",
    "LoRA": "peft: float32 adapters on the matrices of the layers, AdamW",
    "QLoRA": "LoRA on these matrices in NF4 with double quantisation; embedding, head and norms stay as they are",
    "BAdam": "one layer's matrices at a time, float32 moments and masters",
    "LISA": "two layers' matrices at a time, embedding and head always, float32 moments and masters",
    "MISA": "the costliest set of matrices it may draw",
    SLICES: "a range of columns or rows of each of these matrices",
}
# LISA (arXiv 2403.17919), section 4: two layers at a time beside embedding and head.
LISA_LAYERS = 2
# `fit` looks for delta in steps of this.
DELTA_STEP = 1e-4


@dataclass(frozen=True)
class Setup:
    """What is trained on, and how.

    Attributes:
        batch: Sequences in a step on one GPU.
        sequence: Tokens of each.
        dtype: Of the weights, "bfloat16" or "float32".
        checkpointing: Whether layers keep their inputs alone.
        loss_chunk: Tokens whose logits are held at once; 0 for all, as in transformers' own loss.
        delta: MISA's δ.
        depth_window: MISA's, see `ImportanceSampler`.
        state_dtype: MISA's.
        param_precision: MISA's.
        release_gradients: Whether MISA and the methods in `RELEASED` free each gradient within backward.
        rank: Of LoRA's and QLoRA's adapters.
        world_size: GPUs over which FSDP2 shards weights, gradients and states.
        offload_activations: Whether what the forward pass keeps for backward lies in host memory, as with torch's
            `save_on_cpu`, TRL's `activation_offloading` and torchtune's `OffloadActivations`; weights are not moved.
        rule_bytes: Bytes of state that the rule of `MISA(rule=...)` keeps for a trained parameter; None: MISA's own
            AdamW.
    """

    batch: int = 1
    sequence: int = 2048
    dtype: str = "bfloat16"
    checkpointing: bool = True
    loss_chunk: int = 0
    delta: float = 0.03
    depth_window: int | None = None
    state_dtype: str = "fp32"
    param_precision: str = "master"
    release_gradients: bool = False
    rank: int = 16
    world_size: int = 1
    offload_activations: bool = False
    rule_bytes: float | None = None

    @property
    def frees_gradients(self) -> bool:
        """Whether MISA frees each gradient within backward."""
        return self.release_gradients and self.rule_bytes is None


# What plain PyTorch takes an element where it rounds stochastically, or cuts float32 in two: measured.
ROUNDING_BYTES = {"master": 0, "split": 13, "stochastic": 49}


def own_bytes(options: Setup) -> float:
    """Return the bytes of state for a trained parameter of MISA."""
    own = state_bytes(options, options.state_dtype, options.param_precision)
    if options.rule_bytes is None:
        return own
    return own - Storage(options.state_dtype).moment_bytes(getattr(torch, options.dtype)) + options.rule_bytes


def work_of_rule(options: Setup, numel: int, largest: int, columns: int = 0) -> int:
    """Return the bytes that a step by a rule of the user's works with, that of the rule itself apart.

    Source: `RuledStep`: a copy of what is trained before the last step of a round, gradients in float32, copies of what
    stands in for 16-bit weights without masters, and of the weights of columns; and what their rounding takes.

    Args:
        options: How it is trained.
        numel: Parameters that are.
        largest: Of one tensor of them.
        columns: Of slices of columns.
    """
    if options.rule_bytes is None:
        return 0
    if options.dtype != "bfloat16":
        return 4 * numel + 4 * columns
    widened = 4 * (1 + (options.param_precision != "master"))
    return numel * (4 + widened) + 2 * columns + ROUNDING_BYTES[options.param_precision] * min(PIECE, largest)


def state_bytes(options: Setup, state_dtype: str = "fp32", param_precision: str = "master") -> float:
    """Return the bytes of state for a trained parameter of MISA, or with the defaults of float32 AdamW.

    Source: `Storage.buffers`, which the optimizer allocates by.
    """
    buffers = Storage(state_dtype, param_precision).buffers(getattr(torch, options.dtype))
    return sum(kind.entries / kind.elements * kind.dtype.itemsize for kind in buffers.values())


def is_released(method: str, options: Setup) -> bool:
    """Whether a method of others frees each gradient within backward: if its package can, APOLLO's on one GPU alone."""
    can = method in RELEASED and (options.world_size == 1 or method not in APOLLO_RANKS)
    return options.release_gradients and can


def costliest_set(shape: LlamaShape, delta: float, depth_window: int | None) -> dict[int, set[str]]:
    """Return the matrices of each layer in the admissible draw that needs the most memory.

    Source: `misa_kernels.draw.rehearsal.costliest`, with which `MISA.rehearse` makes the first round.

    Raises:
        ValueError: If the largest matrix does not fit into δ N.
    """
    budget, largest = math.floor(delta * shape.numel), shape.largest
    if largest > budget:
        least = math.ceil(largest / shape.numel / DELTA_STEP) * DELTA_STEP
        raise ValueError(
            f"delta={delta:g} must leave room for the largest matrix, {largest:,} of {shape.numel:,} parameters: "
            f"give {least:.4f} or more"
        )
    candidates = Candidates.fresh(
        numel=np.array([*shape.matrix_numel.values()] * shape.layers),
        layer=np.repeat(np.arange(shape.layers), len(LINEARS)),
    )
    width = np.array([columns for _, columns in shape.matrices.values()] * shape.layers)
    active: dict[int, set[str]] = {}
    for number in costliest(candidates, width, budget, depth_window).tolist():
        active.setdefault(number // len(LINEARS), set()).add(LINEARS[number % len(LINEARS)])
    return active


def slices_of(shape: LlamaShape | Model, delta: float) -> tuple[dict[str, Slice], Slicing]:
    """Return a slice of each matrix that MISA trains in slices, and what is said of all of them.

    Of a shape the names are those of `LINEARS` behind the number of the layer, as in "0.down_proj". Wherever a slice
    lies, it needs the same memory.

    Source: `misa_kernels.draw.slices.slicing`, which the optimizer draws by.

    Raises:
        ValueError: If δ N has no room for a line of each of them, or nothing can be sliced.
    """
    if isinstance(shape, Model):
        names = {id(param): name for name, param in shape.module.named_parameters()}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer = MISA(shape.groups, delta=delta, **slices())
        pieces = {names[id(param)]: piece for param, piece in optimizer.trained.items() if piece is not None}
        found = optimizer.coverage(total_steps=1).slicing
        optimizer.release()
        for sentence in (str(each.message) for each in said if "granularity='slice'" in str(each.message)):
            shape.note(f"{SLICES}: {sentence.partition(': ')[0]}.")
        assert found is not None
        return pieces, found
    linears = [
        Linear(
            f"{'self_attn' if name in LINEARS[:4] else 'mlp'}.{name}", Widths(frozenset(size[1:]), frozenset(size[:1]))
        )
        for name, size in shape.matrices.items()
    ]
    norms = [shape.hidden] * shape.norms + [shape.head_width] * 2 * shape.qk_norm
    matrices = []
    for size, flow in zip(shape.matrices.values(), flows(linears, norms), strict=True):
        axis = axis_of(flow.part, 1)
        matrices.append(Matrix(flow.part, axis, size[axis], size[1 - axis]))
    found = slicing(
        matrices * shape.layers,
        [matrix.size * matrix.line for matrix in matrices] * shape.layers,
        math.floor(delta * shape.numel),
        "auto",
    )
    named = [f"{layer}.{name}" for layer in range(shape.layers) for name in LINEARS]
    each = zip(named, matrices * shape.layers, found.widths, strict=True)
    return {name: Slice(matrix.axis, 0, width) for name, matrix, width in each if width}, found


def by_layer(pieces: Mapping[str, Slice]) -> dict[int, dict[str, Slice]]:
    """Return the slices of a shape by layer and by the name of the matrix within it."""
    found: dict[int, dict[str, Slice]] = {}
    for name, piece in pieces.items():
        layer, _, linear = name.partition(".")
        found.setdefault(int(layer), {})[linear] = piece
    return found


def memory(method: str, shape: LlamaShape | Model, options: Setup) -> Memory:
    """Return what a step takes on one GPU.

    Args:
        method: A key of `METHODS`.
        shape: Of the model, or the model itself.
        options: How it is trained; transformers' own norms are assumed, and an update that needs nothing beyond its
            state, as torch's fused AdamW and MISA's step do, but for APOLLO and paged states.

    Raises:
        ValueError: If MISA's δ has no room for the largest matrix or for slices, or the model has no layers for a
            method that needs some.
    """
    if isinstance(shape, Model):
        return _of_model(method, shape, options)
    everything: Mapping[int, Set[str]] = dict.fromkeys(range(shape.layers), frozenset(LINEARS))
    wide, tokens = state_bytes(options), options.batch * options.sequence
    matrices = sum(shape.matrix_numel.values())
    run = Workload(
        shape=shape,
        tokens=tokens,
        element=2 if options.dtype == "bfloat16" else 4,
        chunk=min(options.loss_chunk or tokens, tokens),
        checkpointing=options.checkpointing,
        ranks=options.world_size,
        state_bytes=wide,
        offloaded=options.offload_activations,
    )
    if method in WHOLE:
        found = [
            (n, inside, states_of(method, size, inside, run.element)) for (size, inside), n in shape.tensors.items()
        ]
        run = replace(
            run,
            active=everything,
            dense=True,
            outside=True,
            state_elements=shape.numel,
            state_bytes=sum(n * own[0] for n, _, own in found) / shape.numel,
            paged=sum(n * own[1] for n, _, own in found),
            update_outside=max(own[2] for _, inside, own in found if not inside),
            update_within=max(own[2] for _, inside, own in found if inside),
            released=is_released(method, options),
        )
    elif method in ("LoRA", "QLoRA"):
        # peft makes adapters float32 unless autocast_adapter_dtype=False.
        run = replace(run, rank=options.rank, adapter_element=4, quantised=method == "QLoRA", state_bytes=8)
        run = replace(run, state_elements=shape.lora_numel(options.rank))
    elif method == "BAdam":
        run = replace(run, active={0: set(LINEARS)}, state_elements=matrices)
    elif method == "LISA":
        active = {0: set(LINEARS), shape.layers - 1: set(LINEARS)}
        trained = len(active) * matrices + shape.outside_numel - shape.hidden
        run = replace(run, active=active, outside=True, state_elements=trained)
    elif method == SLICES:
        pieces, cut = slices_of(shape, options.delta)
        sliced = by_layer(pieces)
        sizes = [shape.slice_numel(linear, piece) for own in sliced.values() for linear, piece in own.items()]
        axes = [piece.axis for own in sliced.values() for piece in own.values()]
        columns = sum(numel for numel, axis in zip(sizes, axes, strict=True) if axis == 1)
        run = replace(
            run,
            sliced=sliced,
            # Allocated once, for the budget.
            state_elements=cut.trained,
            state_bytes=own_bytes(options),
            released=options.frees_gradients,
            waiting=HELD_BYTES,
            alone=LAUNCHES,
            round_end=max(4 * min(MOVE_ELEMENTS, max(sizes)), work_of_rule(options, cut.trained, max(sizes), columns)),
        )
    else:
        # Allocated once, for any draw.
        elements = min(math.floor(options.delta * shape.numel), shape.layers * matrices)
        run = replace(
            run,
            active=costliest_set(shape, options.delta, options.depth_window),
            state_elements=elements,
            state_bytes=own_bytes(options),
            released=options.frees_gradients,
            waiting=HELD_BYTES,
            alone=LAUNCHES,
            # States of modules that stay move through a buffer.
            round_end=max(4 * min(MOVE_ELEMENTS, shape.largest), work_of_rule(options, elements, shape.largest)),
        )
    return count(run)


def _of_model(method: str, model: Model, options: Setup) -> Memory:
    """Return what a step of a real model takes: weights and states by its tensors, all else by a dry run of it."""
    params, matrices = dict(model.module.named_parameters()), model.matrices
    if model.dtype != options.dtype:
        raise ValueError(
            f"dtype={options.dtype!r} must be the model's, {model.dtype!r}: build it in that of its training"
        )
    narrow, wide = options.dtype == "bfloat16", state_bytes(options)
    rank, released, waiting, round_end, ranks, paged = 0, False, 0.0, 0.0, options.world_size, 0.0
    sliced: Mapping[str, Slice] = {}
    updating: dict[str, float] = {}
    if method in WHOLE:
        projected = {id(owner.weight) for owner, *_ in model.linears() if isinstance(owner, nn.Linear)}
        own = {name: states_of(method, (*p.shape,), id(p) in projected, p.itemsize) for name, p in params.items()}
        of_state, paged = sum(each[0] for each in own.values()) / model.numel, sum(each[1] for each in own.values())
        trained, released = set(params), is_released(method, options)
        updating = {name: each[2] / ranks for name, each in own.items() if each[2]}
        round_end, updating = (0.0, updating) if released else (max(updating.values(), default=0.0), {})
    elif not model.layers:
        raise ValueError(f"{method} needs layers with matrices, of which {type(model.module).__name__} has none")
    elif method in ("LoRA", "QLoRA"):
        trained, rank, of_state = set(), options.rank, 8
    elif method == "BAdam":
        trained = max(map(set, model.layers.values()), key=lambda names: sum(matrices[name].numel() for name in names))
        of_state = wide
    elif method == "LISA":
        first, *_, last = [*model.layers.values()] * 2
        trained, of_state = {*first, *last, *model.embeddings()}, wide
    else:
        if method == SLICES:
            trained = set()
            sliced, found = slices_of(model, options.delta)
            numels = {name: math.prod(piece.shape_of(params[name])) for name, piece in sliced.items()}
            whole_numel, largest = found.trained, max(numels.values())
        else:
            trained = costliest_names(model, options.delta, options.depth_window)
            numels = {name: params[name].numel() for name in trained}
            whole_numel, largest = sum(map(torch.Tensor.numel, matrices.values())), model.largest
        of_state = own_bytes(options)
        together = math.ceil(len(numels) / LAUNCHES) - 1
        released = options.frees_gradients
        smallest = min(numel * params[name].itemsize for name, numel in numels.items())
        waiting = min(HELD_BYTES, together * smallest) * released
        # States of modules that stay move through a buffer.
        columns = sum(numels[name] for name, piece in sliced.items() if piece.axis == 1)
        work = work_of_rule(options, sum(numels.values()), max(numels.values()), columns)
        round_end = max(4 * min(MOVE_ELEMENTS, largest), work)
    tokens = (options.batch, options.sequence, options.loss_chunk)
    away = options.offload_activations
    step = held(model, trained, rank, tokens, options.checkpointing, ranks, released, sliced, away, updating)
    elements = sum(params[name].numel() for name in trained)
    if method in ("MISA", SLICES):
        # Allocated once, for any draw.
        elements = min(math.floor(options.delta * model.numel), whole_numel)
    linears = [(rows, columns) for _, rows, columns in model.linears()]
    elements += rank * sum(map(sum, linears))
    # peft makes adapters float32 unless autocast_adapter_dtype=False.
    weights, working = sum(param.nbytes for param in params.values()) + 4 * bool(rank) * elements, 0.0
    if method == "QLoRA":
        whole = [math.prod(features) * (2 if narrow else 4) for features in linears]
        weights -= sum(whole) * (1 - NF4_BYTES / (2 if narrow else 4))
        # One at a time is whole again, at worst when the peak is there.
        working = max(whole, default=0)
    if ranks > 1:
        inside = [{n: p for n, p in params.items() if n.startswith(f"{layer}.")} for layer in model.layers]
        sizes = [sum(param.nbytes for param in layer.values()) for layer in inside]
        gradients = [sum(param.nbytes for name, param in layer.items() if name in trained) for layer in inside]
        gradients += [AVERAGED_BYTES * numels[name] for name in sliced]
        outside = sum(param.nbytes for param in params.values()) - sum(sizes)
        largest = max(sizes, default=0) / max(sum(sizes), 1) * (weights - outside)
        working += unsharded(outside, largest, max(gradients, default=0))
    moments = [(step.peak_gradients + waiting, step.peak_activations), (step.gradients / ranks, round_end)]
    peak_gradients, peak_activations = max(moments, key=sum)
    return Memory(
        weights=weights / ranks,
        states=elements * of_state / ranks,
        gradients=step.gradients / ranks,
        kept=step.kept,
        activations=step.activations + working,
        peak_gradients=peak_gradients,
        peak_activations=peak_activations + working,
        paged=paged / ranks,
        offloaded=step.offloaded,
    )


def costliest_names(model: Model, delta: float, depth_window: int | None) -> set[str]:
    """Return the names of the matrices in the admissible draw of MISA that needs the most memory.

    Raises:
        ValueError: As `MISA`, where the largest module does not fit into δ N.
    """
    with warnings.catch_warnings():
        # It asks for an example, which the user of a plan does not have.
        warnings.filterwarnings("ignore", "rehearse.. cannot know|depth_window=")
        optimizer = MISA(model.groups, delta=delta, sampler=ImportanceSampler(depth_window=depth_window))
        optimizer.rehearse()
    names = {name for name, param in model.module.named_parameters() if param.requires_grad}
    optimizer.release()
    return names


def weights_and_states(numel: float, options: Setup) -> dict[str, tuple[float, float, float]]:
    """Return the bytes of weights, gradients and states of what needs no more than the number of parameters.

    Of AdamW paged two bytes a parameter lie in host memory beside them.
    """
    element, narrow = (2, True) if options.dtype == "bfloat16" else (4, False)
    trained = {
        "AdamW": (numel, state_bytes(options), False),
        "AdamW 8-bit": (numel, BITSANDBYTES_BYTES, options.release_gradients),
        # Its scales; the moments are paged.
        "AdamW paged": (numel, BITSANDBYTES_BYTES - 2, options.release_gradients),
        "AdamW 4-bit": (numel, TORCHAO_BYTES, options.release_gradients),
        "FlashOptim": (numel, FLASHOPTIM_BYTES + narrow, options.release_gradients),
        "MISA": (options.delta * numel, own_bytes(options), options.frees_gradients),
    }
    share = 1 / options.world_size
    return {
        name: (element * numel * share, element * active * share * (not released), active * of_state * share)
        for name, (active, of_state, released) in trained.items()
    }


def fit(shape: LlamaShape | Model, options: Setup, cap_bytes: float) -> float | None:
    """Return a δ with which MISA's peak stays within the cap, while with `DELTA_STEP` more it does not.

    1 if that fits, None if no admissible δ does. Of a real model, δ may be two per cent too low.
    """
    low, high = math.ceil(shape.largest / shape.numel / DELTA_STEP), round(1 / DELTA_STEP)

    def over(steps: int) -> float:
        return memory("MISA", shape, replace(options, delta=steps * DELTA_STEP)).peak - cap_bytes

    below, above = over(low), over(high)
    if below > 0:
        return None
    if above <= 0:
        return 1.0
    # A real model's step takes a second or two: two per cent will do.
    while high - low > (max(1, low // 50) if isinstance(shape, Model) else 1):
        # The peak is almost a line in δ; towards the middle, so that either end moves.
        guess = low + 0.8 * (high - low) * below / (below - above) + 0.1 * (high - low)
        middle = min(max(round(guess), low + 1), high - 1)
        found = over(middle)
        low, below, high, above = (middle, found, high, above) if found <= 0 else (low, below, middle, found)
    return round(low * DELTA_STEP, 4)


def advice(shape: LlamaShape | Model, options: Setup, peaks: Mapping[str, float], cap_bytes: float) -> str:
    """Return in words what to take where so many bytes may be used, given the peak of each method."""
    first = "AdamW fits, and learns more a step than what trains less. " if peaks["AdamW"] <= cap_bytes else ""
    fitting = [method for method in RELEASED if peaks[method] <= cap_bytes]
    if fitting and not first:
        first = f"{', '.join(fitting)} {'fits' if len(fitting) == 1 else 'fit'}, with all weights trained. "
    largest = fit(shape, options, cap_bytes)
    if largest is not None:
        return first + f"MISA fits, up to --delta {largest:g}."
    narrow = options.dtype == "bfloat16"
    lean = replace(options, state_dtype="int8", release_gradients=True, rule_bytes=None)
    lean = replace(lean, param_precision="split" if narrow else "master")
    largest = fit(shape, lean, cap_bytes)
    if largest is not None:
        flags = "--state-dtype int8 --release-gradients" + " --param-precision split" * narrow
        flags += " and without --rule-bytes" * (options.rule_bytes is not None)
        return first + f"MISA fits with {flags}, up to --delta {largest:g}."
    why = "MISA fits with no delta"
    weights = (2 if narrow else 4) * shape.numel / options.world_size
    if weights > cap_bytes:
        why = f"The {options.dtype} weights alone, {weights / 2**30:.1f} GiB, do not fit"
    if peaks["QLoRA"] <= cap_bytes:
        return (
            f"{first}{why}: QLoRA, whose matrices have 4 bits, is the better choice here, with a peak of "
            f"{peaks['QLoRA'] / 2**30:.1f} GiB."
        )
    return f"{first}{why}, nor does QLoRA: take more GPUs (--world-size), shorter sequences, or --loss-chunk 1024."
