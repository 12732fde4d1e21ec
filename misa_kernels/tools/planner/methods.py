"""What does each way of training need for one model, in its costliest step, and which of them fit into a card?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from misa_kernels.gradients.axes import Slice
from misa_kernels.memory.arena import MOVE_ELEMENTS
from misa_kernels.run.arrivals import HELD_BYTES, LAUNCHES
from misa_kernels.tools.planner.draws import (
    BESIDE,
    DELTA_STEP,
    SLICES,
    by_layer,
    costliest_names,
    costliest_set,
    slices_of,
)
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
from misa_kernels.tools.planner.training import Setup as Setup
from misa_kernels.tools.planner.training import own_bytes, state_bytes, work_of_rule
from misa_kernels.tools.planner.trial import held

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
    BESIDE: "`add_slices`: columns of each down projection, beside these matrices in NF4 as QLoRA's",
}


def is_released(method: str, options: Setup) -> bool:
    """Whether a method of others frees each gradient within backward: if its package can, APOLLO's on one GPU alone."""
    can = method in RELEASED and (options.world_size == 1 or method not in APOLLO_RANKS)
    return options.release_gradients and can


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
    tokens, matrices = options.batch * options.sequence, sum(shape.matrix_numel.values())
    run = Workload(
        shape=shape,
        tokens=tokens,
        element=options.element,
        chunk=min(options.loss_chunk or tokens, tokens),
        checkpointing=options.checkpointing,
        ranks=options.world_size,
        state_bytes=state_bytes(options),
        offloaded=options.offload_activations,
    )
    if method in WHOLE:
        found = [
            (n, inside, states_of(method, size, inside, run.element)) for (size, inside), n in shape.tensors.items()
        ]
        run = replace(
            run,
            active=dict.fromkeys(range(shape.layers), frozenset(LINEARS)),
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
        run = replace(
            run,
            rank=options.rank,
            adapter_element=4,
            quantised=method == "QLoRA",
            state_elements=shape.lora_numel(options.rank),
            state_bytes=8,
        )
    elif method == "BAdam":
        run = replace(run, active={0: set(LINEARS)}, state_elements=matrices)
    elif method == "LISA":
        # arXiv 2403.17919, section 4: two layers at a time beside embedding and head.
        active = {0: set(LINEARS), shape.layers - 1: set(LINEARS)}
        trained = len(active) * matrices + shape.outside_numel - shape.hidden
        run = replace(run, active=active, outside=True, state_elements=trained)
    else:
        # States are allocated once, for the budget or any draw.
        if method in (SLICES, BESIDE):
            pieces, cut = slices_of(shape, options.delta, method)
            sliced = by_layer(pieces)
            sizes = [
                (shape.slice_numel(name, piece), piece.axis) for own in sliced.values() for name, piece in own.items()
            ]
            largest, columns = max(numel for numel, _ in sizes), sum(numel for numel, axis in sizes if axis == 1)
            run = replace(run, sliced=sliced, state_elements=cut.trained, quantised=method == BESIDE)
        else:
            largest, columns = shape.largest, 0
            elements = min(math.floor(options.delta * shape.numel), shape.layers * matrices)
            active = costliest_set(shape, options.delta, options.depth_window)
            run = replace(run, active=active, state_elements=elements)
        # States of modules that stay move through a buffer.
        moved = 4 * min(MOVE_ELEMENTS, largest)
        run = replace(
            run,
            state_bytes=own_bytes(options),
            released=options.frees_gradients,
            waiting=HELD_BYTES,
            alone=LAUNCHES,
            round_end=max(moved, work_of_rule(options, run.state_elements, largest, columns)),
        )
    return count(run)


def _of_model(method: str, model: Model, options: Setup) -> Memory:
    """Return what a step of a real model takes: weights and states by its tensors, all else by a dry run of it."""
    params, matrices = dict(model.module.named_parameters()), model.matrices
    if model.dtype != options.dtype:
        raise ValueError(
            f"dtype={options.dtype!r} must be the model's, {model.dtype!r}: build it in that of its training"
        )
    wide, element = state_bytes(options), options.element
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
        if method in (SLICES, BESIDE):
            trained = set()
            sliced, found = slices_of(model, options.delta, method)
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
    if method in ("MISA", SLICES, BESIDE):
        # Allocated once, for any draw.
        elements = min(math.floor(options.delta * model.numel), whole_numel)
    linears = [(rows, columns) for _, rows, columns in model.linears()]
    elements += rank * sum(map(sum, linears))
    # peft makes adapters float32 unless autocast_adapter_dtype=False.
    weights, working = sum(param.nbytes for param in params.values()) + 4 * bool(rank) * elements, 0.0
    if method == BESIDE:
        weights += elements * element
    if method in ("QLoRA", BESIDE):
        whole = [math.prod(features) * element for features in linears]
        weights -= sum(whole) * (1 - NF4_BYTES / element)
        # One at a time is whole again, at worst when the peak is there.
        working = max(whole, default=0)
    if ranks > 1:
        inside = [{n: p for n, p in params.items() if n.startswith(f"{layer}.")} for layer in model.layers]
        sizes = [sum(param.nbytes for param in layer.values()) for layer in inside]
        gradients = [sum(param.nbytes for name, param in layer.items() if name in trained) for layer in inside]
        gradients += [(AVERAGED_BYTES if method == SLICES else element) * numels[name] for name in sliced]
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


def weights_and_states(numel: float, options: Setup) -> dict[str, tuple[float, float, float]]:
    """Return the bytes of weights, gradients and states of what needs no more than the number of parameters.

    Of AdamW paged two bytes a parameter lie in host memory beside them.
    """
    element, narrow = options.element, options.dtype == "bfloat16"
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
    weights = options.element * shape.numel / options.world_size
    if weights > cap_bytes:
        why = f"The {options.dtype} weights alone, {weights / 2**30:.1f} GiB, do not fit"
    fits = []
    if peaks["QLoRA"] <= cap_bytes:
        fits.append(f"QLoRA, whose matrices have 4 bits, fits with a peak of {peaks['QLoRA'] / 2**30:.1f} GiB")
    flags, beside = "", peaks.get(BESIDE, math.inf)
    if beside > cap_bytes and BESIDE in peaks:
        flags = " with --state-dtype int8" + " --param-precision split" * narrow
        flags += " and without --rule-bytes" * (options.rule_bytes is not None)
        beside = memory(BESIDE, shape, replace(lean, release_gradients=options.release_gradients)).peak
    if beside <= cap_bytes:
        fits.append(f"slices beside matrices of 4 bits (`add_slices`) fit{flags} with {beside / 2**30:.1f} GiB")
    if fits:
        return f"{first}{why}: {', and '.join(fits)}."
    return f"{first}{why}, nor does QLoRA: take more GPUs (--world-size), shorter sequences, or --loss-chunk 1024."
