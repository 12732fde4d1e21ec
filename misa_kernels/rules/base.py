"""What the rules of this folder share: the loop over tensors, precision, decoupled weight decay, loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from misa_kernels.options import check_hyperparameters


class Rule(torch.optim.Optimizer):
    """θ ← (1 − lr · weight_decay) θ − lr · u, where a subclass says u and the state that it is made of.

    The arithmetic is that of float32, or of float64 for float64 weights, and so is the state, whatever the weights are.

    Every group has lr, eps and weight_decay, betas unless the subclass takes none, and what else that has of its own.
    """

    def check(self, group: Mapping[str, Any]) -> None:
        """Check the hyperparameters of a group that the subclass has of its own."""

    def begin(self, g: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a tensor before its first update, of which `g` is the gradient, with one axis or more."""
        raise NotImplementedError

    def direction(self, g: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
        """Bring the state up to date and return u, of the shape of the gradient `g`; `state["step"]` counts from 1."""
        raise NotImplementedError

    def step_size(self, theta: Tensor, group: Mapping[str, Any]) -> Any:
        """Return the factor of u: lr, unless the subclass has it depend on the weight `theta` before the update."""
        return group["lr"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group whose hyperparameters are checked."""
        # Before it is added, as one that is refused would stay. A rule without betas has nothing to check there.
        checked = {"betas": (0.0, 0.0)} | self.defaults | param_group
        check_hyperparameters(checked)
        self.check(checked)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: For a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: Mapping[str, Any]) -> None:
        assert param.grad is not None
        if param.grad.layout is not torch.strided:
            raise TypeError(
                f"{type(self).__name__} got a gradient that is {param.grad.layout} and updates dense ones: use "
                "sparse=False in the embedding"
            )
        g = param.grad.to(torch.promote_types(param.dtype, torch.float32))
        # A weight without axes is a vector of one element to the rules.
        g = g if g.ndim else g.reshape(1)
        state = self.state[param]
        if not state:
            state.update({"step": 0} | self.begin(g, group))
        state["step"] += 1
        u, theta = self.direction(g, state, group).reshape(param.shape), param.to(g.dtype)
        decay = 1 - group["lr"] * group["weight_decay"]
        param.copy_(decay * theta - self.step_size(theta, group) * u)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state; its tensors keep their dtypes, which torch would make those of the weights."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for param, number in zip(params, numbers, strict=True):
            if number in state_dict["state"]:
                saved = state_dict["state"][number]
                self.state[param] = {
                    name: value.to(param.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in saved.items()
                }
