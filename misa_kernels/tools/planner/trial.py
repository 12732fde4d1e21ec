"""What does a step of a real model hold beside weights and states, whatever of it is trained?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from misa_kernels.draw.linears import linears_of
from misa_kernels.gradients.axes import Slice, input_axis
from misa_kernels.gradients.hooks import SliceHooks
from misa_kernels.tools.planner.dry import META, Held, TooLongError, step
from misa_kernels.tools.planner.model import Model, reason_of

# Tokens of a sequence, where a step that takes them one by one has too many operators.
SHORT = 16


def held(
    model: Model,
    trained: Set[str],
    rank: int,
    tokens: tuple[int, int, int],
    checkpointing: bool,
    ranks: int = 1,
    released: bool = False,
    sliced: Mapping[str, Slice] | None = None,
    offloaded: bool = False,
    updating: Mapping[str, float] | None = None,
) -> Held:
    """Return what a training step holds beside weights and states; the model notes what that leaves out.

    Args:
        model: The model.
        trained: Names of the parameters that are, as a whole.
        rank: Of LoRA's adapters on the linears of the layers, 0 for none.
        tokens: Sequences, tokens of each, and tokens whose logits are held at once, 0 for all.
        checkpointing: Whether layers keep their inputs alone, where the model can.
        ranks: GPUs over which gradients are sharded.
        released: Whether each gradient is freed when it is complete.
        sliced: Slices that are trained, by the name of the parameter.
        offloaded: Whether what forward keeps lies in host memory.
        updating: Bytes that the update of each parameter works with where gradients are released.
    """
    sliced, updating = sliced or {}, updating or {}
    parts = frozenset(sliced.items()), frozenset(updating.items())
    key = (frozenset(trained), rank, tokens, checkpointing, ranks, released, offloaded, *parts)
    if key not in model.held:
        params = dict(model.module.named_parameters())
        for name, param in params.items():
            param.requires_grad_(name in trained)
        with _checkpointed(model, checkpointing), _adapted(model, rank) as adapters, _sliced(params, sliced):
            own = {name: params[name] for name in (*trained, *sliced)} | adapters
            model.held[key] = _tried(model, own, sliced, [*params.values(), *adapters.values()], key)
        model.module.requires_grad_(True)
    return model.held[key]


def _tried(
    model: Model, trained: Mapping[str, nn.Parameter], sliced: Mapping[str, Slice], weights: Sequence[Tensor], key: Any
) -> Held:
    """Run the step, in short sequences if it has too many operators; if it cannot be run, return a lower bound."""
    _, _, (batch, sequence, chunk), checkpointing, ranks, released, offloaded, _, updating = key
    if sequence > model.longest:
        model.note(f"Its positions end at {model.longest:,}: sequences have no more tokens.")
        sequence = model.longest

    def run(batch: int, length: int) -> Held:
        there = [*weights, *model.module.buffers()]
        return step(
            lambda: model.loss(batch, length, chunk), trained, there, ranks, released, offloaded, dict(updating)
        )

    try:
        try:
            found = run(batch, sequence) if model.is_whole else None
        except TooLongError as error:
            found, model.is_whole = None, False
            model.note(f"{error}: planned with sequences of {SHORT}, and as many tokens.")
        found = found or run(batch * math.ceil(sequence / SHORT), SHORT)
    except Exception as error:
        model.note(
            f"Its step cannot be run without values ({reason_of(error)}): activations and peaks are lower bounds, the "
            "inputs of trained matrices or the gradients alone."
        )
        least = _least(model, trained, sliced, batch * sequence, checkpointing)
        return Held(0, least.gradients, 0, least.gradients, 0, offloaded=least.kept) if offloaded else least
    if found.unused & model.matrices.keys():
        model.note(
            f"Some matrices get no gradient from {model.module.main_input_name}, all that it is planned with: their "
            "activations are left out."
        )
    return found


def _least(
    model: Model, trained: Mapping[str, nn.Parameter], sliced: Mapping[str, Slice], tokens: int, checkpointing: bool
) -> Held:
    """Return the gradients, or inputs of trained matrices: each width once a layer, and one width if it runs again."""
    read = {name: param.shape[-1] for name, param in trained.items()}
    sizes = {name: param.numel() for name, param in trained.items()}
    for name, piece in sliced.items():
        sizes[name] = math.prod(piece.shape_of(trained[name]))
        reads = input_axis(linears_of(trained[name])[0])
        read[name] = piece.last - piece.first if piece.axis == reads else trained[name].shape[1 - piece.axis]
    widths = {
        (layer, not checkpointing and read[name]): read[name] * trained[name].itemsize
        for layer, names in model.layers.items()
        for name in names
        if name in trained
    }
    gradients = sum(param.itemsize * sizes[name] for name, param in trained.items())
    kept = tokens * sum(widths.values())
    return Held(kept, gradients, kept, *max((gradients, 0), (0, kept), key=sum))


@contextmanager
def _checkpointed(model: Model, wanted: bool) -> Iterator[None]:
    module = model.module
    # The name until transformers 5.
    name = "activation" if hasattr(module, "activation_checkpointing_enable") else "gradient"
    if wanted:
        try:
            getattr(module, f"{name}_checkpointing_enable")({"use_reentrant": False})
        except ValueError:
            wanted = False
            model.note(f"{type(module).__name__} has no activation checkpointing: all is kept.")
    try:
        yield
    finally:
        if wanted:
            getattr(module, f"{name}_checkpointing_disable")()
            # It makes the embedding's output require a gradient, and leaves that behind.
            with suppress(AttributeError):
                module.disable_input_require_grads()


@contextmanager
def _sliced(params: Mapping[str, nn.Parameter], sliced: Mapping[str, Slice]) -> Iterator[None]:
    """Let backward make the gradients of slices, with the hooks of a training."""
    gradients = SliceHooks()
    gradients.train({params[name]: (piece, linears_of(params[name])) for name, piece in sliced.items()})
    try:
        yield
    finally:
        gradients.close()


@contextmanager
def _adapted(model: Model, rank: int) -> Iterator[dict[str, nn.Parameter]]:
    """Yield LoRA's A and B beside the linears of the layers, float32 and applied as peft's."""
    adapters: dict[str, nn.Parameter] = {}
    hooks: list[RemovableHandle] = []
    for owner, rows, columns in model.linears() if rank else ():
        a, b = (nn.Parameter(torch.empty(shape, device=META)) for shape in ((rank, columns), (rows, rank)))
        adapters |= {f"A.{len(hooks)}": a, f"B.{len(hooks)}": b}

        def adapt(_: Any, given: Any, out: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return (out + F.linear(F.linear(given[0].to(a.dtype), a), b) * 1.0).to(out.dtype)

        hooks.append(owner.register_forward_hook(adapt))
    try:
        yield adapters
    finally:
        for hook in hooks:
            hook.remove()
