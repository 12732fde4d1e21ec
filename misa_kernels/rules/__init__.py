"""Update rules around AdamW that have no package of their own, each an ordinary `torch.optim.Optimizer`."""

__all__: list[str] = []
