"""What does a user of MISA own after each thing that they can do? A float64 account, kept beside the optimizer.

Nothing of ``misa_kernels`` is imported here. The account takes the draws from the optimizer, since they are random, and
computes all else by itself: weights, moments, ages, `requires_grad` of every parameter, N and the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Bits of the significand, the leading one included.
BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
# Smallest step of each dtype, that of its subnormal numbers.
LEAST = {torch.float64: 2.0**-1074, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
# Error of one update in units of lr, by the dtype of the moments. m / (sqrt(v) + eps) is below 32 at these betas and
# has a few roundings; bfloat16 moments are used as they are stored, off by 2^-7; what int8 makes of it is bounded only
# by how far Adam can move at all.
UPDATE = {"fp64": 1e-11, "fp32": 2e-5, "bf16": 0.2, "int8": 60.0}
# Relative error of stored moments: a few roundings of float32, or one stochastic rounding to bfloat16.
MOMENT = {"fp64": 1e-13, "fp32": 2e-6, "bf16": 2.0**-7}


def ulp(theta: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbours in `dtype` at theta."""
    exponent = torch.frexp(theta.abs())[1].double()
    return (2.0 ** (exponent - BITS[dtype])).clamp(min=LEAST[dtype])


def nearest(theta: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a float32 master, held in float64, as its weight is; ties to even."""
    return theta.float().to(dtype).double()


@dataclass
class Kept:
    """What the account keeps of one parameter.

    Attributes:
        role: As its group says.
        module: What it is drawn with.
        layer: Where it lies.
        user: Whether the user wants it trained.
        counted: Whether they wanted so at any time.
        flag: What MISA set `requires_grad` to.
        drawn: What it was set to when the round began.
        theta: The weight with all its bits, float64.
        seen: The weight as it was last found, which nobody but the user may change unless it is trained.
        m, v, age: Adam's state; None, None, 0 without one.
        unseen: How many updates its moments have had since they were last compared.
        overwritten: Whether the user has written where no version counter shows.
        noticed: Whether a version counter, or an address, shows since the last step that the user has written.
    """

    role: str
    module: str
    layer: str | None
    theta: Tensor
    seen: Tensor
    user: bool = True
    counted: bool = True
    flag: bool = True
    drawn: bool = False
    m: Tensor | None = None
    v: Tensor | None = None
    age: int = 0
    unseen: int = 0
    overwritten: bool = False
    noticed: bool = False

    @property
    def is_drawable(self) -> bool:
        return self.user and self.role == "sampled"

    def begin(self) -> None:
        """Fresh state: m = v = 0, t = 0, and the master is the weight."""
        self.theta = self.seen.double()
        self.m, self.v, self.age = torch.zeros_like(self.theta), torch.zeros_like(self.theta), 0

    def drop(self) -> None:
        self.m, self.v, self.age, self.overwritten = None, None, 0, False
        self.theta = self.seen.double()


@dataclass
class Account:
    """A run of MISA as its user understands it.

    Attributes:
        kept: What is kept of each parameter, by name.
        delta, inner_steps, precision, state_dtype, keep_states, backend: Arguments of the optimizer.
        hyper: lr, betas, eps and weight decay by role.
        active: Names of the modules of this round.
        position: Steps taken in this round.
        begun: Whether there was a first step.
    """

    kept: dict[str, Kept]
    delta: float
    inner_steps: int
    precision: str
    state_dtype: str
    keep_states: str
    backend: str
    hyper: dict[str, dict[str, float]]
    active: set[str] = field(default_factory=set)
    position: int = 0
    steps: int = 0
    begun: bool = False
    is_suspended: bool = False
    is_idle: bool = True
    presumed: set[str] = field(default_factory=set)

    # What is trained, and how much of it

    @property
    def total_numel(self) -> int:
        return sum(kept.seen.numel() for kept in self.kept.values() if kept.counted)

    @property
    def budget(self) -> int:
        return math.floor(self.delta * self.total_numel)

    def numel(self) -> dict[str, int]:
        """Numel of each module that can be drawn."""
        sizes: dict[str, int] = {}
        for kept in self.kept.values():
            if kept.is_drawable:
                sizes[kept.module] = sizes.get(kept.module, 0) + kept.seen.numel()
        return sizes

    def is_trained(self, kept: Kept) -> bool:
        return kept.user and (kept.role == "dense" or kept.role == "sampled" and kept.module in self.active)

    def refusal(self) -> str | None:
        """Why the constructor, and the first step, must raise; None if they must not."""
        sizes = self.numel()
        if not sizes:
            return "nothing can be sampled"
        if max(sizes.values()) > self.budget:
            return "a module is larger than the budget"
        dtypes = {kept.seen.dtype for kept in self.kept.values() if kept.user and kept.role != "frozen"}
        if self.precision != "master" and torch.float16 in dtypes:
            return "only masters are for float16"
        if self.state_dtype != "fp32" and torch.float64 in dtypes:
            return "float64 has no compressed moments"
        return None

    def lacks_backend(self) -> bool:
        """Whether the compiled step has no code for a weight; known at the first step only."""
        dtypes = {kept.seen.dtype for kept in self.kept.values() if kept.user and kept.role != "frozen"}
        return self.backend == "cpu" and not dtypes <= {torch.float32, torch.bfloat16}

    # Flags

    def draw(self, active: set[str]) -> None:
        """A draw: who leaves loses its state, who stays keeps it, newcomers begin."""
        sizes = self.numel()
        assert active <= sizes.keys(), f"drawn, but not the user's to train: {active - sizes.keys()}"
        used = sum(sizes[module] for module in active)
        assert 0 < used <= self.budget, f"{used} active parameters, and the budget is {self.budget}"
        self.active = active
        for kept in self.kept.values():
            trained = self.is_trained(kept)
            kept.flag = kept.drawn = trained
            if self.begun:
                if not trained or kept.role == "sampled" and self.keep_states == "none":
                    kept.drop()
                if trained and kept.m is None:
                    kept.begin()

    def leaving(self, active: set[str]) -> set[str]:
        """Names of what has state now and will not keep it when these are active."""
        names = set()
        for name, kept in self.kept.items():
            stays = kept.user and (kept.role == "dense" or kept.module in active and self.keep_states == "staying")
            if kept.m is not None and not stays:
                names.add(name)
        return names

    def compare(self, flags: Mapping[str, bool], is_idle: bool = False) -> tuple[set[str], set[str]]:
        """Take over, at the end of a round, what the user made of `requires_grad` since the last one.

        Returns:
            Names of what is frozen and of what is thawed from now on.
        """
        was_suspended, self.is_suspended = self.is_suspended, False
        if self.is_wholesale(flags):
            return set(), self.thaw_presumed()
        on = {name for name, kept in self.kept.items() if kept.flag}
        frozen = {name for name in on if not flags[name]}
        are_all = frozen == on and bool(on)
        thawed = {name for name, kept in self.kept.items() if flags[name] and not kept.flag and not kept.user}
        if frozen == on and not (was_suspended and is_idle):
            # Mostly the whole model is frozen for a while; if it was not trained in another round either, it is meant.
            self.is_suspended = not thawed
            frozen = set()
        for layer in {self.kept[name].layer for name in frozen} - {None}:
            if not any(self.kept[name].layer == layer for name in on - frozen):
                frozen |= {name for name, kept in self.kept.items() if kept.layer == layer and kept.user}
        self.choose(dict.fromkeys(frozen, False) | dict.fromkeys(thawed, True))
        if are_all:
            self.presumed |= frozen
        return frozen, thawed

    def thaw_presumed(self) -> set[str]:
        """Whoever thaws the whole model means what was only presumed to be frozen for good."""
        thawed = {name for name in self.presumed if not self.kept[name].user}
        self.choose(dict.fromkeys(thawed, True))
        self.presumed.clear()
        return thawed

    def choose(self, flags: Mapping[str, bool]) -> None:
        """What the user says within `thawed()`, or what was understood of flags set outside of it."""
        for name, flag in flags.items():
            kept = self.kept[name]
            kept.user = flag
            kept.counted = kept.counted or flag
            # What was frozen in this round, and is thawed again, goes on.
            kept.flag = flag and kept.drawn

    def is_wholesale(self, flags: Mapping[str, bool]) -> bool:
        """Whether `model.requires_grad_(True)` was called: no statement about any one parameter."""
        meant = {name for name, kept in self.kept.items() if kept.user} | self.presumed
        return all(flags.values()) and any(not self.kept[name].flag for name in meant)

    # Weights

    def found(self, name: str, weight: Tensor, is_visible: bool = True) -> None:
        """The user wrote to a weight; without a version counter that tells, a master does not know yet."""
        kept = self.kept[name]
        had_more_bits = kept.seen.dtype.itemsize == 2
        kept.seen = weight.detach().clone()
        if kept.theta.shape != weight.shape:
            kept.drop()
        elif not had_more_bits:
            kept.theta = kept.seen.double()
        kept.noticed = kept.noticed or is_visible
        # Before the first update a master is not read.
        kept.overwritten = not kept.noticed and kept.age > 0
        if not kept.overwritten or not self.has_master(kept):
            self.adopt(kept)

    def adopt_all(self) -> None:
        """The weights win before anything is saved."""
        for kept in self.kept.values():
            kept.noticed = False
            if kept.overwritten:
                self.adopt(kept)

    def has_master(self, kept: Kept) -> bool:
        return kept.m is not None and self.precision == "master" and kept.seen.dtype.itemsize == 2

    def adopt(self, kept: Kept) -> None:
        """The weight wins over the master where it is another number; where it is not, no bit is lost."""
        weight = kept.seen.double()
        kept.overwritten = False
        if self.has_master(kept):
            same = nearest(kept.theta, kept.seen.dtype) == weight
        elif kept.m is not None and self.precision == "split":
            same = (kept.theta - weight).abs() <= ulp(weight, kept.seen.dtype)
        else:
            same = torch.zeros((), dtype=torch.bool)
        kept.theta = torch.where(same, kept.theta, weight)

    def step(self, grads: Mapping[str, Tensor | None]) -> None:
        """AdamW on what is trained and has a gradient."""
        if not self.begun:
            self.begun = True
            for kept in self.kept.values():
                if self.is_trained(kept) and kept.m is None:
                    kept.begin()
        for name, kept in self.kept.items():
            g, kept.noticed = grads.get(name), False
            if kept.m is None or kept.v is None or g is None:
                continue
            g, h = g.double(), self.hyper[kept.role]
            kept.age, kept.unseen = kept.age + 1, kept.unseen + 1
            kept.m = h["beta1"] * kept.m + (1 - h["beta1"]) * g
            kept.v = h["beta2"] * kept.v + (1 - h["beta2"]) * g**2
            m_hat, v_hat = kept.m / (1 - h["beta1"] ** kept.age), kept.v / (1 - h["beta2"] ** kept.age)
            decayed = kept.theta * (1 - h["lr"] * h["weight_decay"])
            kept.theta = decayed - h["lr"] * m_hat / (v_hat.sqrt() + h["eps"])
            # What was written behind the master's back is gone.
            kept.overwritten = False
            self.is_idle = self.is_idle and kept.role != "sampled"
        self.steps += 1
        self.position += 1

    @property
    def ends_round(self) -> bool:
        return self.position == self.inner_steps

    def settle(
        self, name: str, weight: Tensor, shown: Mapping[str, Tensor], is_updated: bool, leaves: bool, ends: bool
    ) -> None:
        """Compare a weight and its state with the account, which then goes on from what was found.

        Args:
            name: Of the parameter.
            weight: As it is now.
            shown: Its state as `optimizer.state` shows it.
            is_updated: Whether it had a gradient in the step before.
            leaves: Whether its state was dropped since.
            ends: Whether a round has ended.
        """
        kept = self.kept[name]
        weight = weight.detach()
        assert weight.shape == kept.seen.shape and weight.dtype == kept.seen.dtype, name
        if kept.overwritten and (kept.m is None or ends):
            self.adopt(kept)
        if kept.m is None or not (is_updated or leaves):
            assert torch.equal(weight, kept.seen), f"{name} is not trained in this step and has changed"
            return
        dtype, lr = weight.dtype, self.hyper[kept.role]["lr"]
        moments = "fp64" if dtype == torch.float64 else self.state_dtype
        arithmetic = torch.promote_types(dtype, torch.float32)
        bound = 4 * ulp(kept.theta, arithmetic) + (lr * UPDATE[moments] if is_updated else 0.0)
        if "master" in shown and not leaves:
            master = shown["master"].detach().double().view(weight.shape)
            within(f"master of {name}", master, kept.theta, bound)
            kept.theta = master
            if not kept.overwritten:
                assert torch.equal(weight.double(), nearest(master, dtype)), f"{name} is not its master, rounded"
        # The bits that "split" has beside the weight are not looked at, so that they may be off by half a step more.
        steps = 0 if dtype == arithmetic else 2 if self.precision == "split" else 1
        limit = bound + steps * ulp(kept.theta, dtype)
        within(name, weight.double(), kept.theta, limit)
        kept.seen = weight.clone()
        # Where nothing shows the bits beyond the weight, and the account has not followed them, it is the weight.
        if (
            dtype == arithmetic
            or self.precision == "stochastic"
            or "master" not in shown
            and moments in ("bf16", "int8")
        ):
            kept.theta = kept.seen.double()

    def check_moments(self, name: str, shown: Mapping[str, Tensor]) -> None:
        """Compare moments, which have no meaning before the first update."""
        kept = self.kept[name]
        if kept.m is None:
            assert "exp_avg" not in shown, f"{name} is not trained and has state"
        elif kept.age:
            assert "exp_avg" in shown, f"{name} was updated {kept.age} times and has no moments"
            assert int(shown["age"].max()) == kept.age, f"{name}: age {shown['age']}, not {kept.age}"
            moments = "fp64" if kept.seen.dtype == torch.float64 else self.state_dtype
            if moments in MOMENT:
                for key in ("m", "v"):
                    expected = getattr(kept, key)
                    value = shown[{"m": "exp_avg", "v": "exp_avg_sq"}[key]].double().view(expected.shape)
                    # Between steps of opposite sign m cancels, but never below a rounding of what was added. Each
                    # update since they were last compared has rounded once.
                    bound = MOMENT[moments] * (expected.abs() + kept.v.sqrt() * (key == "m")) + 1e-38
                    bound = bound * max(kept.unseen, 1)
                    within(f"{key} of {name}", value, expected, bound)
                    setattr(kept, key, value.clone())
            kept.unseen = 0


def within(what: str, found: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    error = (found - expected).abs()
    excess = error - bound
    if not bool((excess <= 0).all()):
        worst = int(excess.flatten().argmax())
        values = (float(x.flatten()[worst]) for x in (found, expected, error))
        raise AssertionError("{}: element {} is {!r}, not {!r}, off by {:.3g}".format(what, worst, *values))
