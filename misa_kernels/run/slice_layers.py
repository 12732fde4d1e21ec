"""Which layers make the gradients of the slices of a round, and what is said where these layers are gone?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from misa_kernels.draw import linears
from misa_kernels.gradients.axes import Slice
from misa_kernels.gradients.hooks import SliceHooks
from misa_kernels.outside.flags import Flags
from misa_kernels.run.layout import Layout


class SliceLayers:
    """The linear layers whose weights are trained in slices.

    Args:
        flags: Who set `requires_grad`; says what is to be said.
        follow: What has to happen before it is known which parameters are trained, where some were exchanged.
    """

    def __init__(self, flags: Flags, follow: Callable[[], None]) -> None:
        self._flags = flags
        self._hooks = SliceHooks(follow)

    def train(self, layout: Layout, active: Sequence[int], is_first: bool) -> None:
        """Let backward make the gradients of the active slices, as far as the user wants them trained.

        Args:
            layout: What can be drawn.
            active: Numbers of the active modules.
            is_first: Whether no step has been taken yet.

        Raises:
            RuntimeError: If a layer is not to be found, before the first step.
        """
        slices: dict[nn.Parameter, tuple[Slice, list[nn.Module]]] = {}
        names: dict[nn.Parameter, str] = {}
        for block in layout.slices_of(active):
            if block.index in self._flags.sliced and (piece := block.piece) is not None:
                slices[block.param] = piece, linears.linears_of(block.param)
                names[block.param] = layout.partition.names[block.index]
        for param in [param for param, (_, modules) in slices.items() if not modules]:
            del slices[param]
            if is_first:
                raise RuntimeError(_no_layer(names[param]))
            self._flags.warn_once("lost", f"{_no_layer(names[param])}; no slice of it is trained from now on")
        self._hooks.train(slices, names)

    def check(self, layout: Layout) -> None:
        """Refuse a weight that slices may be trained of and whose layer is not to be found.

        Raises:
            RuntimeError: With the name of the first one.
        """
        for param, span in layout.spans.items() if layout.partition.slicing is not None else ():
            if layout.blocks[span.start].piece is not None and not linears.linears_of(param):
                raise RuntimeError(_no_layer(layout.name_of(span.start)))

    def look_for_strangers(self, layout: Layout) -> None:
        """Say once that a layer was wrapped or exchanged, as by an adapter, for what has parameters of its own.

        Slices go on without a sign of it: nobody need switch a weight off that requires no gradient.
        """
        if layout.partition.slicing is None:
            return
        known = set(map(id, self._flags.params))
        for index, param in enumerate(self._flags.params):
            for module in linears.successors_of(param):
                own = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in known]
                if own:
                    self._flags.warn_once(
                        "strangers",
                        f"where the layer with the weight {layout.partition.names[index]} was, there is a "
                        f"{type(module).__name__} now, as when adapters are attached, and MISA does not train what it "
                        f"has of its own, such as {own[0]}: call param_groups(model) on the model as it is now, or "
                        "leave that to another optimizer",
                    )
                    return

    def layers(self, layout: Layout) -> list[nn.Module]:
        """Return all layers that slices may be trained in, which a copy of the optimizer must know before it begins."""
        if layout.partition.slicing is None:
            return []
        return [module for param in layout.spans for module in linears.linears_of(param)]

    def close(self) -> None:
        """Remove all hooks, and the gradients of slices."""
        self._hooks.close()


def _no_layer(name: str) -> str:
    """Return what is said where the layer of a weight is not to be found."""
    return (
        f"granularity='slice' finds no linear layer with the weight {name}: make the groups with param_groups(model), "
        "of the model that is trained, and keep that and its layers"
    )
