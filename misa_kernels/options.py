"""Which arguments `MISA` accepts: every check of the constructor and of param groups, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from misa_kernels import kernels
from misa_kernels.draw.partition import Partition
from misa_kernels.draw.sampler import Sampler, check_sampler
from misa_kernels.kernels.user_rules import RuleFactory
from misa_kernels.memory.codec import FORMATS
from misa_kernels.memory.storage import FOREIGN, PRECISIONS, Storage
from misa_kernels.ranks.shards import is_sharded, sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# AdamW's hyperparameters.
ADAMW = ("lr", "betas", "eps", "weight_decay")
# What torch.optim.AdamW has and MISA does not; only these values mean the same in both.
ADAMW_ONLY: dict[str, bool | None] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


def check_range(name: str, value: Any, low: float, high: float, rule: str) -> None:
    """Raise unless `value` is a number in [low, high).

    Args:
        name: The argument's name.
        value: A number; a tensor of one element on the CPU passes for its value.
        low: Lower end, included.
        high: Upper end, excluded.
        rule: What the sentence says after "must be".

    Raises:
        TypeError: If `value` is not a number, or is on a device.
        ValueError: If it is out of range.
    """
    check_place(name, value)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be {rule}")
    if not low <= float(value) < high:
        raise ValueError(f"{name}={value!r} must be {rule}")


def check_place(name: str, value: Any) -> None:
    """Refuse a tensor that is not on the CPU."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise TypeError(
            f"{name} is a tensor on {value.device}, and reading it would wait for the device: use a float or a tensor "
            "on the CPU"
        )


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Check lr, betas, eps and weight_decay of one param group."""
    check_range("lr", group["lr"], 0.0, math.inf, "a number >= 0")
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise TypeError(f"betas={betas!r} must be two numbers in [0, 1): the decay of m and of v")
    for beta in betas:
        check_range("betas", beta, 0.0, 1.0, "two numbers in [0, 1): the decay of m and of v")
    check_range("eps", group["eps"], 0.0, math.inf, "a number >= 0")
    check_range("weight_decay", group["weight_decay"], 0.0, math.inf, "a number >= 0")


def check_group(group: dict[str, Any]) -> None:
    """Refuse sampler settings and AdamW's switches inside a param group."""
    for name in Options.__dataclass_fields__:
        if name in group:
            raise ValueError(
                f"{name}={group[name]!r} stands in a param group but holds for all of them: pass it to MISA(...)"
            )
    check_adamw_only({name: group[name] for name in ADAMW_ONLY if name in group})


def check_adamw_only(options: dict[str, Any]) -> None:
    """Accept AdamW's own switches at their defaults, refuse anything else.

    Raises:
        TypeError: For a name that AdamW does not have either.
        ValueError: For a switch that is not at its default.
    """
    for name, value in options.items():
        if name not in ADAMW_ONLY:
            raise TypeError(f"MISA got an unexpected keyword argument {name!r}; help(MISA) lists what it takes")
        if value != ADAMW_ONLY[name]:
            raise ValueError(
                f"{name}={value!r} belongs to torch.optim.AdamW: MISA takes only its default "
                f"{ADAMW_ONLY[name]!r}; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `MISA` that hold for all groups, checked; see there for their meaning.

    Raises:
        TypeError: For one of the wrong kind.
        ValueError: For one out of range.
    """

    delta: float
    inner_steps: int | str
    total_steps: int | None
    sampler: Sampler | None
    keep_states: str
    momentum_flush: bool
    param_precision: str
    state_dtype: str
    max_grad_norm: float | None
    skip_nonfinite: bool
    release_gradients: bool
    seed: int
    process_group: ProcessGroup | None
    backend: str
    rule: RuleFactory | None

    def __post_init__(self) -> None:
        fraction = "in (0, 1]: the fraction of parameters that may be active"
        check_range("delta", self.delta, math.nextafter(0.0, 1.0), math.nextafter(1.0, 2.0), fraction)
        if self.inner_steps != "auto":
            check_count("inner_steps", self.inner_steps, 1, "'auto' or a whole number >= 1: optimizer steps in a round")
        if self.total_steps is not None:
            check_count("total_steps", self.total_steps, 1, "None or a whole number >= 1: optimizer steps of the run")
        if self.sampler is not None:
            check_sampler(self.sampler)
        for name in ("momentum_flush", "skip_nonfinite", "release_gradients"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        _check_choice("keep_states", self.keep_states, ("staying", "none"))
        _check_choice("param_precision", self.param_precision, PRECISIONS)
        _check_choice("state_dtype", self.state_dtype, tuple(FORMATS))
        if self.max_grad_norm is not None:
            check_range("max_grad_norm", self.max_grad_norm, math.nextafter(0.0, 1.0), math.inf, "None or a number > 0")
        if self.release_gradients and (self.max_grad_norm is not None or self.skip_nonfinite):
            raise ValueError(
                f"release_gradients=True with max_grad_norm={self.max_grad_norm!r}, "
                f"skip_nonfinite={self.skip_nonfinite!r} must be without both: they need all gradients at once, and it "
                "frees each before the next; leave it out, or them"
            )
        check_count("seed", self.seed, 0, "a whole number >= 0 below 2**63")
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed!r} must be a whole number >= 0 below 2**63")
        if self.process_group is not None and not isinstance(self.process_group, torch.distributed.ProcessGroup):
            raise TypeError(
                f"process_group={self.process_group!r} must be None or a process group of torch.distributed"
            )
        kernels.check(self.backend)
        if self.rule is not None:
            self._check_rule()

    def _check_rule(self) -> None:
        """Refuse what a rule of the user's does not have, or has in a way of its own."""
        if not callable(self.rule) or isinstance(self.rule, torch.optim.Optimizer):
            raise TypeError(
                f"rule={self.rule!r} must be a function that makes an optimizer of a list of parameters, such as "
                "lambda params: torch.optim.SGD(params, lr=0.1)"
            )
        reasons = {
            "state_dtype": ("fp32", "the rule keeps state in a way of its own"),
            "backend": ("auto", "the rule does what backends do"),
            "momentum_flush": (False, "only AdamW's momentum can be flushed"),
            "release_gradients": (False, "the rule is given all gradients at once"),
        }
        for name, (default, reason) in reasons.items():
            if getattr(self, name) != default:
                value = getattr(self, name)
                raise ValueError(f"{name}={value!r} must be {default!r} with rule=...: {reason}; leave it out")


def check_rules_own(given: Mapping[str, Any], defaults: Sequence[Any] | None) -> None:
    """Refuse hyperparameters of AdamW beside a rule, which has its own.

    Args:
        given: All that are given to the constructor, in the order of its arguments.
        defaults: What the constructor has where nothing is given; the very objects.
    """
    for (name, value), default in zip(given.items(), defaults or (), strict=True):
        if value is not default:
            raise ValueError(
                f"{name}={value!r} belongs to AdamW and would do nothing with rule=...: give the rule its own, as in "
                "rule=lambda params: torch.optim.SGD(params, lr=0.1), or a param group of its own"
            )


def copied_groups(params: Iterable[Any], are_checked: bool = True) -> list[dict[str, Any]]:
    """Return param groups that share no dict or list with the caller's.

    Args:
        params: As given to the optimizer.
        are_checked: Whether what stands in them may be AdamW's hyperparameters alone.

    Raises:
        TypeError: If `params` is a tensor or a set.
        ValueError: If it holds nothing, or a parameter twice.
    """
    if isinstance(params, (Tensor, set)):
        raise TypeError(
            f"params is a {type(params).__name__}: give a list, such as model.parameters() or param_groups(model)"
        )
    entries = list(params)
    groups = [dict(entry) for entry in entries if isinstance(entry, dict)]
    if groups and len(groups) < len(entries):
        raise TypeError(
            f"params mixes {len(groups)} groups with {len(entries) - len(groups)} parameters: give either groups or "
            "parameters"
        )
    grouped = groups or [{"params": entries}]
    seen: set[int] = set()
    for number, group in enumerate(grouped):
        if are_checked:
            check_group(group)
        if "params" not in group:
            raise ValueError(f"group {number} has no 'params': give it a list of parameters")
        tensors = group["params"]
        group["params"] = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        params = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        before = len(seen)
        seen.update(map(id, params))
        if len(seen) - before < len(params):
            raise ValueError(f"{_twice(grouped, number)} is given twice: every parameter belongs to one group, once")
    if not seen:
        raise ValueError("params is empty: give the model's parameters, such as param_groups(model)")
    return grouped


def _twice(groups: Sequence[dict[str, Any]], last: int) -> str:
    """Return the name of the first parameter that occurs again in the groups up to the last one."""
    seen: set[int] = set()
    for number, group in enumerate(groups[: last + 1]):
        for position, entry in enumerate(group["params"]):
            name, param = entry if isinstance(entry, tuple) else (f"parameter {position} of group {number}", entry)
            if id(param) in seen:
                return str(name)
            seen.add(id(param))
    raise AssertionError("no parameter occurs twice")


def check_trainable(partition: Partition, storage: Storage) -> None:
    """Refuse weight dtypes that no step can update."""
    for block in partition.trained:
        dtype, name = block.param.dtype, partition.names[block.index]
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(
                f"{name} is {dtype}: MISA trains float32, bfloat16, float16 and float64; give it the role 'frozen'"
            )
        if storage.param_precision != "master" and dtype == torch.float16:
            raise ValueError(
                f"param_precision={storage.param_precision!r} is for bfloat16 weights, but {name} is float16: use "
                "'master'"
            )
        if storage.state_dtype not in ("fp32", FOREIGN) and dtype == torch.float64:
            raise ValueError(
                f"state_dtype={storage.state_dtype!r} is for weights up to float32, but {name} is float64: use 'fp32'"
            )


def check_exchanged(before: Sequence[Tensor], now: Sequence[Tensor], releases_gradients: bool) -> None:
    """Refuse tensors in the place of the parameters given that are not the same weights, held in another way."""
    if [param.shape for param in before] != [param.shape for param in now] or releases_gradients:
        raise RuntimeError(
            "param_groups hold other parameters than at construction, as in DeepSpeed's ZeRO: use FSDP2, which is "
            "fsdp_version: 2 in accelerate's configuration, or shard with fully_shard() and construct MISA after that"
        )


def check_cast(dtypes: Sequence[torch.dtype], params: Sequence[Tensor], partition: Partition) -> None:
    """Refuse weights of one dtype at construction of which some have another one now."""
    became: dict[torch.dtype, torch.dtype] = {}
    for block in partition.trained:
        before, now = dtypes[block.index], params[block.index].dtype
        if became.setdefault(before, now) != now:
            raise RuntimeError(
                f"{partition.names[block.index]} is {now} now and other weights of {before} are {became[before]}: "
                "accelerate casts what requires a gradient to float32 for mixed precision with FSDP2, so load the "
                "model in float32, or in bfloat16 without mixed_precision, as MISA has float32 masters of what is "
                "active"
            )


def check_sharded(params: Sequence[Tensor], partition: Partition, storage: Storage, release_gradients: bool) -> None:
    """Refuse what sharded parameters, by their position in the optimizer, do not have in this version."""
    if not sharded(params):
        return
    names = [partition.names[block.index] for block in partition.trained if is_sharded(params[block.index])]
    if not names:
        return
    if storage.state_dtype == FOREIGN:
        raise ValueError(
            f"rule=... needs whole tensors, and {names[0]} is sharded: leave it out to train with MISA's own AdamW, or "
            "replicate the model with misa_kernels.distributed.replicate"
        )
    if storage.state_dtype not in ("fp32", "bf16"):
        raise ValueError(
            f"state_dtype={storage.state_dtype!r} has scales for groups that shards would cut, and {names[0]} is "
            "sharded: use 'bf16' or 'fp32'"
        )
    if release_gradients:
        raise ValueError(
            f"release_gradients=True needs gradients within backward, and {names[0]}, being sharded, gets it "
            "afterwards: leave it out"
        )


def check_count(name: str, value: Any, low: int, rule: str) -> None:
    """Raise unless `value` is a whole number, `low` or more; `rule` is what the sentence says after "must be"."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} must be {rule}")
    if value < low:
        raise ValueError(f"{name}={value!r} must be {rule}")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
