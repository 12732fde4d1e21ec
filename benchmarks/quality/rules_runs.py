"""Which update rules are compared with int8 AdamW in equal bytes, under modules and under slices, and by which runs?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.quality.regime_runs import at, first
from benchmarks.quality.searches import Search
from misa_kernels import rules

# What MISA draws, and what of ours is compared there.
WHERE = {"slices": "slices", "modules": "MISA"}
# Steps between two projectors of what stays that long, and between two preconditioners.
GAP = 50
SHAMPOO = {"every": 10, "start": 10}
# δ of int8 AdamW.
DELTA = 0.03
# A gradient, and with int8 AdamW both moments with their scales.
GRADIENT_BYTES, INT8_BYTES = 4, 2.0625

Make = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Rule:
    """An update rule.

    Attributes:
        make: Makes its optimizer of parameters and a learning rate.
        slices: Bytes of state a parameter of slices of the benchmark's model.
        modules: The same of whole modules.
        power: Of the learning rate in the middle of the search under slices, see `lr_of`.
        lower: By how much that is lower under modules.
    """

    make: Make
    slices: float
    modules: float
    power: int = 2
    lower: int = 1


def came(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return CAME of its authors' package."""
    from came_pytorch import CAME

    return CAME(params, lr=lr)


def four_bits(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return AdamW with torchao's 4-bit states."""
    from torchao.optim import AdamW4bit

    return AdamW4bit(params, lr=lr, weight_decay=1e-2)


def low_rank(projector: str, residual: str) -> Make:
    """Return what makes Adam in eight coordinates."""
    return lambda params, lr: rules.LowRankAdam(
        params, lr=lr, rank=8, every=GAP, projector=projector, residual=residual
    )


RULES: dict[str, Rule] = {
    "SGD, momentum": Rule(lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9), 4.0, 4.0, power=6, lower=0),
    "Muon": Rule(
        lambda params, lr: torch.optim.Muon(params, lr=lr, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw"), 4.0, 4.0
    ),
    "Adafactor": Rule(lambda params, lr: torch.optim.Adafactor(params, lr=lr), 0.089, 0.050, power=6),
    "CAME": Rule(came, 4.299, 4.106, power=-1),
    "AdamW, 4 bits": Rule(four_bits, 1.081, 1.068),
    "FOAM": Rule(lambda params, lr: rules.FOAM(params, lr=lr), 2.0, 2.0),
    "Haar wavelets": Rule(lambda params, lr: rules.HaarAdam(params, lr=lr), 2.0, 2.0),
    "Subset-Norm": Rule(lambda params, lr: rules.SubsetNorm(params, lr=lr), 4.113, 4.031),
    "Subset-Norm, Subspace-Momentum": Rule(lambda params, lr: rules.SubsetNorm(params, lr=lr, rank=8), 0.864, 0.415),
    "AdaLomo": Rule(lambda params, lr: rules.AdaLomo(params, lr=lr), 0.088, 0.050, power=6),
    "GaLore": Rule(low_rank("svd", "dropped"), 1.481, 0.633),
    "GaLore, residual normalised": Rule(low_rank("svd", "normalised"), 1.481, 0.633),
    "I3S, residual normalised": Rule(low_rank("importance", "normalised"), 1.481, 0.633),
    "RSO": Rule(low_rank("random", "dropped"), 1.481, 0.633),
    "MicroAdam": Rule(lambda params, lr: rules.MicroAdam(params, lr=lr), 0.902, 0.901),
    "4-bit Shampoo": Rule(lambda params, lr: rules.Shampoo4bit(params, lr=lr, **SHAMPOO), 20.57, 11.5),
    "Sparse Gradient Compression": Rule(
        lambda params, lr: rules.SparseGradientCompression(params, lr=lr), 1.0, 1.0, power=3
    ),
}


def split(method: str) -> tuple[Rule, str] | None:
    """Return the rule of a run's method, such as "Muon, slices", and what is drawn; None if it is none."""
    name, _, where = method.rpartition(", ")
    return (RULES[name], where) if name in RULES and where in WHERE else None


def delta_of(rule: Rule, where: str) -> float:
    """Return the δ at which a rule has as many bytes of states and gradients as int8 AdamW at `DELTA`."""
    held: float = getattr(rule, where)
    return round(DELTA * (GRADIENT_BYTES + INT8_BYTES) / (GRADIENT_BYTES + held), 4)


def _search(name: str, where: str) -> Search:
    rule = RULES[name]
    # What was asked first.
    stage = 2 if name == "Muon" else 3 if where == "slices" else 4
    delta = delta_of(rule, where)
    power = rule.power - (rule.lower if where == "modules" else 0)
    return Search(stage, first(f"{name}, {where}", "rule", delta, power=power), at(3, delta))


REFERENCES = (
    Search(1, first("AdamW", "fp32", 1.0, power=0), at(3, 1.0)),
    Search(1, first("slices", power=2), at(3, DELTA)),
    Search(1, first("MISA", power=0), at(3, DELTA)),
)
SEARCHES = (*REFERENCES, *(_search(name, where) for where in WHERE for name in RULES))
