"""How is a model trained without a backward pass? By how its loss changes along a random direction of what is active.

MeZO (arXiv 2305.17333) takes (L(W + eps z) - L(W - eps z)) / (2 eps) z for the gradient, z being normal: two forward
passes a step, and no activation is kept. SubZero (arXiv 2410.08989) draws z = U Z V^T in a random subspace of r
directions on each side, which stays for some steps; fewer directions vary less. What moves is what MISA has drawn,
modules or slices, and what it makes of the estimate is what it makes of a gradient, or a rule such as SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from misa_kernels import MISA
from misa_kernels.gradients.sliced import SlicedGradient


class ForwardGradients:
    """Sets the gradients of what an optimizer trains in this round, from two forward passes.

    Beside the weights it holds two tensors of what is active: the weights as they were, to put them back to the bit,
    and the direction, which becomes the gradient.

    Args:
        optimizer: Says what is active.
        eps: Length of a step along the direction, which has a standard deviation of 1 an element; with `rank` of 1 a
            coordinate of the subspace.
        rank: Directions r on each side of a matrix; None: all, as MeZO.
        every: Calls that a subspace stays.
        seed: Of the directions, the same on every rank.

    Attributes:
        forwards: Forward passes so far.

    Example::

        optimizer = MISA(param_groups(model), delta=0.03, rule=lambda params: torch.optim.SGD(params, lr=1e-4))
        gradients = ForwardGradients(optimizer)
        for tokens in batches:
            loss = gradients(lambda: model(input_ids=tokens, labels=tokens).loss)
            optimizer.step()
            optimizer.zero_grad()
    """

    def __init__(
        self, optimizer: MISA, eps: float = 1e-3, rank: int | None = None, every: int = 100, seed: int = 0
    ) -> None:
        if not eps > 0 or every < 1 or (rank is not None and rank < 1):
            raise ValueError(f"eps={eps}, rank={rank}, every={every} must be above 0, None or 1 or more, and 1 or more")
        self._optimizer, self._eps, self._rank, self._every, self._seed = optimizer, eps, rank, every, seed
        self._calls = self.forwards = 0

    @torch.no_grad()
    def __call__(self, loss: Callable[[], Tensor]) -> float:
        """Set the gradients, which come to what `step()` finds, and return the mean of both losses; waits for them.

        Args:
            loss: Runs the model on one batch, the same in both calls; torch's random numbers are the same, too.
        """
        active = self._optimizer.trained
        places = {
            param: param.data if piece is None else param.data.narrow(piece.axis, piece.first, piece.last - piece.first)
            for param, piece in active.items()
        }
        kept = {param: place.clone() for param, place in places.items()}
        directions = {param: self._direction(number, place) for number, (param, place) in enumerate(places.items())}
        losses = []
        devices = {place.device for place in places.values() if place.device.type == "cuda"}
        try:
            for sign in (1, -1):
                for param, place in places.items():
                    place.copy_(kept[param].add(directions[param], alpha=sign * self._eps))
                # The same dropout in both; the second one leaves the random numbers where a single pass would.
                with torch.random.fork_rng(devices, enabled=sign > 0):
                    losses.append(float(loss()))
        finally:
            for param, place in places.items():
                place.copy_(kept[param])
        self._calls, self.forwards = self._calls + 1, self.forwards + 2
        slope = (losses[0] - losses[1]) / (2 * self._eps)
        for param, piece in active.items():
            part = directions[param].mul_(slope)
            param.grad = part if piece is None else SlicedGradient(part, param.shape, piece.axis, piece.first)
        return sum(losses) / 2

    def _direction(self, number: int, place: Tensor) -> Tensor:
        """Return the direction of a tensor in this call, of its shape and dtype."""
        if self._rank is None or place.ndim != 2:
            return self._normal(place, place.shape, number, self._calls)
        # What stays in a subspace has it for as long as the round lasts, or shorter.
        since, rank = self._calls // self._every, min(self._rank, *place.shape)
        sides = (self._normal(place, (size, rank), number, since, 1 + axis) for axis, size in enumerate(place.shape))
        left, right = (torch.linalg.qr(side.float()).Q for side in sides)
        inner = self._normal(place, (rank, rank), number, self._calls).float()
        return (left @ inner @ right.T).to(place.dtype)

    def _normal(self, place: Tensor, shape: Sequence[int], *key: int) -> Tensor:
        """Return normal numbers of a key, on the device and of the dtype of a tensor, whoever else draws meanwhile."""
        generator = torch.Generator(place.device)
        generator.manual_seed(int(np.random.SeedSequence([self._seed, *key]).generate_state(1)[0]))
        return torch.randn(tuple(shape), generator=generator, dtype=place.dtype, device=place.device)
