"""What may MISA train of a model in a round? The costliest set of matrices, or a slice of each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Literal

import numpy as np

from misa_kernels.draw.candidates import Candidates
from misa_kernels.draw.matrices import Widths
from misa_kernels.draw.rehearsal import costliest
from misa_kernels.draw.sampler import ImportanceSampler, UniformSampler
from misa_kernels.draw.slices import Matrix, Slicing, axis_of, slicing
from misa_kernels.draw.streams import Linear, flows
from misa_kernels.gradients.axes import Slice
from misa_kernels.optimizer import MISA
from misa_kernels.presets import slices
from misa_kernels.tools.planner.model import Model
from misa_kernels.tools.planner.shapes import LINEARS, LlamaShape

# Slices of weights, and beside weights of 4 bits, of each down projection.
SLICES, BESIDE = "MISA, slices", "4-bit slices"
REACH: dict[str, Literal["auto", "down"]] = {SLICES: "auto", BESIDE: "down"}
# A plan gives δ in steps of this.
DELTA_STEP = 1e-4


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


def slices_of(shape: LlamaShape | Model, delta: float, method: str = SLICES) -> tuple[dict[str, Slice], Slicing]:
    """Return a slice of each matrix that is trained in slices, and what is said of all of them.

    Of a shape the names are those of `LINEARS` behind the number of the layer, as in "0.down_proj". Wherever a slice
    lies, it needs the same memory.

    Source: `misa_kernels.draw.slices.slicing`, which the optimizer draws by.

    Raises:
        ValueError: If δ N has no room for a line of each of them, or nothing can be sliced.
    """
    if method == BESIDE and isinstance(shape, Model) and all(each.part != "down" for each in shape.groups.found):
        raise ValueError("`add_slices` sees no linear layers that are the last ones of feed-forward networks")
    if isinstance(shape, Model):
        names = {id(param): name for name, param in shape.module.named_parameters()}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            sampler = UniformSampler(granularity="slice", slices=REACH[method])
            optimizer = MISA(shape.groups, delta=delta, **slices(sampler=sampler))
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
        REACH[method],
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
