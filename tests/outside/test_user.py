"""Can a user do anything at all that makes MISA train wrongly, or fail without a sentence? One is played at random.

`make user` plays for an hour; a minute of it is in `make test`, and one with AddressSanitizer in `make slow`.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tables import missing
from test_sanitizers import FLAGS, INSTRUCTIONS
from torch import nn
from user import Account, Kept

from misa_kernels import MISA, kernels

ROOT = Path(__file__).parents[2]
MINUTES = float(os.environ.get("MISA_USER_MINUTES", "0"))
BACKENDS = ["reference", *(name for name in ("cpu",) if kernels.unusable(name) is None)]
# Rows and columns of the matrices of a layer: below, at and above the width of a vector, none a multiple of it.
SHAPES = {"a": (5, 7), "b": (16, 9), "c": (33, 16), "bias": (33,)}
LAYERS = 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GUARD = -1234.5
# Elements of guard on either side of a weight; none where AddressSanitizer guards the memory itself.
MARGIN = 16
# Ways to write to weights: those that a version counter or another address tells of, and those that nothing does.
SEEN = ["no_grad", "foreach", "exchange", "load"]
UNSEEN = ["numpy", "data", "foreach on data"]
# Flags of rounds in this process, by which MISA recognises copies; whoever freezes just so is taken for one.
ROUNDS: set[tuple] = set()

seeds = st.integers(0, 2**16 - 1).map(random.Random)


class Model(nn.Module):
    """Parameters that lie between guards, and know how they are to be trained."""

    def __init__(self, rng: random.Random, dtype: torch.dtype, is_paired: bool) -> None:
        super().__init__()
        self.roles, self.modules_of, self.layers = {}, {}, {}
        for layer in range(LAYERS):
            for kind, shape in SHAPES.items():
                name = f"L{layer}_{kind}"
                self.roles[name] = "dense" if kind == "bias" else "sampled"
                self.modules_of[name] = f"L{layer}_ab" if is_paired and kind in "ab" else name
                self.layers[name] = f"L{layer}"
                self.register_parameter(name, nn.Parameter(normal(rng, shape, dtype)))
        self.roles["table"], self.modules_of["table"], self.layers["table"] = "frozen", "table", None
        self.register_parameter("table", nn.Parameter(normal(rng, (11, 4), dtype)))
        self.seat(rng)

    def seat(self, rng: random.Random) -> None:
        """Move all weights between new guards."""
        self.guards = {}
        for name in self.roles:
            self.put(rng, name, getattr(self, name).data)

    def put(self, rng: random.Random, name: str, value: torch.Tensor) -> None:
        """Let the parameter have a copy of a tensor for its data, aligned to nothing but its elements."""
        before = MARGIN and MARGIN + rng.randrange(8)
        memory = torch.full((before + value.numel() + MARGIN,), GUARD, dtype=value.dtype)
        inner = memory[before : before + value.numel()].view(value.shape)
        inner.copy_(value)
        self.guards[name] = (memory, before)
        getattr(self, name).data = inner

    def check_guards(self) -> None:
        for name, (memory, before) in self.guards.items():
            param = getattr(self, name)
            # A cast or a copy has moved it.
            if param.data_ptr() == memory.data_ptr() + before * memory.element_size() and param.dtype == memory.dtype:
                around = torch.cat([memory[:before], memory[before + param.numel() :]])
                guard = torch.tensor(GUARD, dtype=memory.dtype)
                assert bool((around == guard).all()), f"something was written beside {name}"

    def groups(self) -> list[dict]:
        """Groups as `param_groups` makes them, of this model's own kind of layers."""
        groups = []
        for role in ("sampled", "dense", "frozen"):
            names = [name for name, own in self.roles.items() if own == role]
            groups.append(
                {
                    "params": [getattr(self, name) for name in names],
                    "param_names": names,
                    "role": role,
                    "modules": [self.modules_of[name] for name in names],
                    "layers": [self.layers[name] for name in names],
                }
            )
        return groups


def normal(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def sentence(error: BaseException | Warning) -> str:
    """The message of what is said to users: one sentence, and no more."""
    message = str(error)
    assert 20 < len(message) and "\n" not in message and ". " not in message.replace("e.g. ", ""), repr(message)
    return message


class User(RuleBasedStateMachine):
    """What a user may do, and after each of these what they should find.

    Every rule draws one generator, since a thousand steps must fit into what hypothesis draws.
    """

    def __init__(self) -> None:
        super().__init__()
        self.catch = warnings.catch_warnings(record=True)
        self.said = self.catch.__enter__()
        warnings.simplefilter("always")
        self.optimizer: MISA | None = None
        self.account: Account | None = None
        self.model: Model | None = None
        self.saved: tuple | None = None
        # What `requires_grad` must be, and whose flag MISA may take back before the round ends.
        self.flags: dict[str, bool] = {}
        self.strays: set[str] = set()
        # Shape and dtype that a parameter had, where the user has changed it since the first step.
        self.broken: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self.is_resized = self.is_due = self.is_edited = False

    def teardown(self) -> None:
        self.optimizer = self.saved = None
        self.catch.__exit__(None, None, None)
        for warning in self.said:
            if issubclass(warning.category, UserWarning):
                sentence(warning.message)

    # What can be asked

    def param(self, name: str) -> nn.Parameter:
        return getattr(self.model, name)

    @property
    def names(self) -> list[str]:
        return list(self.model.roles)

    def now(self) -> dict[str, bool]:
        return {name: self.param(name).requires_grad for name in self.names}

    @property
    def is_allocated(self) -> bool:
        """Whether there was a step since construction and since a state dict was loaded."""
        return self.optimizer is not None and self.optimizer.state_bytes > 0

    @property
    def is_calm(self) -> bool:
        """Whether nothing that the user did waits for the next step or the end of the round."""
        return (
            self.optimizer is not None
            and not (self.broken or self.is_resized or self.is_due or self.is_edited)
            and self.now() == {name: kept.flag for name, kept in self.account.kept.items()}
        )

    has_optimizer = precondition(lambda self: self.optimizer is not None)
    is_sound = precondition(lambda self: self.optimizer is not None and not self.broken)
    calm = precondition(lambda self: self.is_calm)

    def shown(self, name: str) -> dict[str, torch.Tensor]:
        return self.optimizer.state.get(self.param(name), {})

    def active(self) -> set[str]:
        modules = self.optimizer.modules
        return {modules[number].name for number in self.optimizer.active}

    def refused(self, call, *words: str, flags: bool = True, kinds=(ValueError, TypeError, RuntimeError)) -> None:
        """Something must be refused in one sentence that has one of the words, and nothing have changed."""
        weights = {name: self.param(name).detach().clone() for name in self.names}
        before = self.now()
        try:
            call()
        except kinds as error:
            message = sentence(error)
            assert not words or any(word in message for word in words), (words, message)
        else:
            raise AssertionError(f"accepted, but should be refused with one of {words}")
        for name, weight in weights.items():
            param = self.param(name)
            assert param.dtype == weight.dtype and torch.equal(param, weight), f"{name} changed in what was refused"
        changed = {name for name, flag in self.now().items() if flag != before[name]}
        # But for those that were put back.
        on = set() if self.account is None else {name for name, kept in self.account.kept.items() if kept.flag}
        assert not flags or changed.isdisjoint(on), "flags changed in what was refused"
        self.flags |= {name: False for name in changed}

    # Construction

    @initialize(rng=seeds)
    def begin(self, rng: random.Random) -> None:
        dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float64])
        precision = "master"
        if dtype == torch.bfloat16:
            precision = rng.choice(["master", "master", "split", "stochastic"])
        backends = BACKENDS if dtype in (torch.float32, torch.bfloat16) else ["reference"]
        self.options = {
            "delta": rng.choice([0.3, 0.4, 0.6]),
            "inner_steps": rng.choice([1, 2, 3, 5]),
            "param_precision": precision,
            "state_dtype": "fp32" if dtype == torch.float64 else rng.choice(["fp32", "fp32", "bf16", "int8"]),
            "keep_states": rng.choice(["staying", "staying", "none"]),
            "backend": rng.choice(backends),
            "seed": rng.randrange(100),
            "lr": 1e-2,
            "weight_decay": 0.1,
        }
        self.model = Model(rng, dtype, rng.random() < 0.5)
        for name in rng.sample(self.names, rng.choice([0, 0, 1, 3])):
            self.param(name).requires_grad_(False)
        self.construct()

    def open(self, user: dict[str, bool]) -> Account:
        """An account of a new optimizer on the weights as they are."""
        kept = {
            name: Kept(
                role=role,
                module=self.model.modules_of[name],
                layer=self.model.layers[name],
                theta=self.param(name).detach().double(),
                seen=self.param(name).detach().clone(),
                user=user[name],
                counted=user[name],
                flag=False,
            )
            for name, role in self.model.roles.items()
        }
        hyper = {"lr": self.options["lr"], "weight_decay": self.options["weight_decay"]}
        hyper |= {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
        return Account(
            kept,
            self.options["delta"],
            self.options["inner_steps"],
            self.options["param_precision"],
            self.options["state_dtype"],
            self.options["keep_states"],
            self.options["backend"],
            {role: dict(hyper) for role in ("sampled", "dense", "frozen")},
        )

    def construct(self, user: dict[str, bool] | None = None) -> bool:
        """Construct a MISA, or see it refused where it must be; whether there is a new one."""
        flags = self.now()
        account = self.open(flags if user is None else user)
        if account.refusal():
            self.refused(lambda: MISA(self.model.groups(), **self.options), *self.names, "none of")
            return False
        pattern, heard = self.pattern(), len(self.said)
        try:
            optimizer = MISA(self.model.groups(), **self.options)
        except ValueError as error:
            # A copy of which the user has changed weights, so that it is not surely one.
            assert user is not None and "copied" in sentence(error), error
            return False
        self.optimizer = optimizer
        self.account, self.broken, self.saved = account, {}, None
        self.is_resized = self.is_due = self.is_edited = False
        if pattern in ROUNDS:
            with self.optimizer.thawed():
                understood = self.now()
            if understood != {name: kept.user for name, kept in account.kept.items()}:
                self.account = self.open(understood)
        if any("copied or saved" in str(w.message) for w in self.said[heard:]):
            # The flags look like those of a round.
            self.account.presumed = {name for name, kept in self.account.kept.items() if not kept.user}
        self.take_draw()
        return True

    def form(self) -> list[tuple]:
        return [(self.param(name).shape, self.param(name).dtype) for name in self.names]

    def pattern(self) -> tuple:
        return tuple((tuple(self.param(name).shape), flag) for name, flag in self.now().items())

    def take_draw(self, numbers: Sequence[int] | None = None) -> None:
        """The account goes on with the modules of these numbers, or with what is active now."""
        modules = self.optimizer.modules
        numbers = self.optimizer.active if numbers is None else numbers
        self.account.draw({modules[number].name for number in numbers})
        self.flags = {name: kept.flag for name, kept in self.account.kept.items()}
        self.strays = set()
        self.laid_out = self.form()
        ROUNDS.add(self.pattern())

    # Training

    def gradients(self, rng: random.Random) -> None:
        """Gradients of what requires one, some missing, from backward or put there."""
        scale = 10.0 ** rng.uniform(-3, 1)
        missing = set(rng.sample(self.names, rng.choice([0, 0, 0, 2, 6])))
        of = {name: self.param(name) for name in self.names if name not in missing}
        of = {name: param for name, param in of.items() if param.requires_grad}
        directions = {name: normal(rng, param.shape, param.dtype, scale) for name, param in of.items()}
        if of and rng.random() < 0.5:
            sum((param * directions[name]).sum() for name, param in of.items()).backward()
        else:
            for name, param in of.items():
                param.grad = directions[name]

    @has_optimizer
    @rule(rng=seeds)
    def train(self, rng: random.Random) -> None:
        for _ in range(rng.choice([1, 1, 2, 5])):
            if not self.broken:
                self.gradients(rng)
            self.step(rng)
            if rng.random() < 0.8:
                self.clear_gradients(set_to_none=rng.random() < 0.8)

    @has_optimizer
    @rule(rng=seeds)
    def train_on(self, rng: random.Random) -> None:
        self.train(rng)

    @is_sound
    @rule(rng=seeds)
    def backward_only(self, rng: random.Random) -> None:
        self.gradients(rng)

    @has_optimizer
    @rule(rng=seeds)
    def clear(self, rng: random.Random) -> None:
        self.clear_gradients(set_to_none=rng.random() < 0.7)

    def clear_gradients(self, set_to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self.take_back()

    @has_optimizer
    @rule(rng=seeds)
    def lose_gradients(self, rng: random.Random) -> None:
        for name in rng.sample(self.names, 4):
            self.param(name).grad = None

    def take_back(self) -> set[str]:
        """What step() and zero_grad() do about flags; returns what loses its gradient by it."""
        if not self.account.is_wholesale(self.now() | self.flags):
            return set()
        self.is_due = bool(self.account.thaw_presumed()) or self.is_due
        self.flags = {name: kept.flag for name, kept in self.account.kept.items()}
        self.strays = set()
        return {name for name, flag in self.flags.items() if not flag}

    def step(self, rng: random.Random) -> None:
        account, was_due = self.account, False
        dropped = self.take_back()
        if not self.is_allocated:
            frozen, thawed = set(), set()
            if not account.steps or self.is_resized:
                frozen, thawed = account.compare(self.flags)
            for name in frozen | thawed:
                self.flags[name] = False
            was_due = self.is_resized or not account.steps and (self.is_due or bool(frozen or thawed))
            if was_due:
                for name in self.names:
                    self.param(name).grad = None
            if was_due and account.refusal() or account.lacks_backend():
                self.refused(self.optimizer.step, flags=False)
                self.flags, self.strays = self.now(), set()
                self.is_due = self.is_due or bool(frozen or thawed)
                if was_due and not account.refusal():
                    # The modules were made anew before the backend was asked.
                    self.take_draw()
                    self.is_resized = self.is_due = False
                return
        changed = {n for n in self.broken if account.kept[n].flag}
        if account.position + 1 == account.inner_steps:
            changed |= {n for n in self.broken if account.kept[n].user and account.kept[n].role != "frozen"}
        if changed:
            self.refused(self.optimizer.step, *self.broken, kinds=RuntimeError)
            return
        # Of what is switched off here, the step takes no gradient.
        of = {name: None if name in dropped else self.param(name).grad for name in self.names}
        grads = {name: None if grad is None else grad.clone() for name, grad in of.items()}
        before = {name: flag for name, flag in self.flags.items()}
        frozen_since = {n for n in self.broken if account.kept[n].role != "frozen"} - changed
        try:
            self.optimizer.step()
        except RuntimeError as error:
            # What the user has frozen in this round may be refused, too.
            assert any(name in sentence(error) for name in frozen_since), error
            return
        if was_due:
            # The step may have ended the round, too.
            ends = account.position + 1 == account.inner_steps
            self.take_draw(self.optimizer.monitor.rounds[-2 if ends else -1].active)
            before = dict(self.flags)
            self.is_resized = self.is_due = False
        self.is_edited = False
        account.step(grads)
        leaving: set[str] = set()
        ended = account.ends_round
        if ended:
            before |= {name: False for name in self.strays}
            account.compare(before, is_idle=account.is_idle)
            account.is_idle = True
            is_held = account.is_suspended or account.refusal() is not None
            leaving = set() if is_held else account.leaving(self.active())
        for name, kept in account.kept.items():
            if name in self.broken:
                continue
            updated = grads[name] is not None and kept.m is not None
            account.settle(name, self.param(name), self.shown(name), updated, name in leaving, ended)
            if kept.m is not None and kept.user and name not in leaving:
                account.check_moments(name, self.shown(name))
        if ended:
            account.position = 0
            self.is_due = is_held and (self.is_due or account.refusal() is not None)
            if is_held:
                assert self.active() == account.active
                self.flags = {
                    name: flag and not (account.kept[name].user and not account.kept[name].flag)
                    for name, flag in before.items()
                }
                self.strays = set()
            else:
                self.take_draw()

    @invariant()
    def looks_as_expected(self) -> None:
        if self.model is None:
            return
        self.model.check_guards()
        now = self.now()
        for name in [name for name in self.strays if not now[name]]:
            self.strays.discard(name)
            self.flags[name] = False
        if self.optimizer is not None:
            wrong = [name for name in self.names if now[name] != self.flags[name]]
            assert not wrong, f"requires_grad is {[now[name] for name in wrong]} for {wrong}"
        if self.optimizer is None or self.broken or self.is_resized:
            return
        for name, kept in self.account.kept.items():
            assert torch.equal(self.param(name), kept.seen), f"{name} has changed between steps"
            if self.account.begun and not self.is_edited and kept.user:
                self.account.check_moments(name, self.shown(name))
        sizes = self.account.numel()
        assert self.is_due or sum(sizes.get(module, 0) for module in self.account.active) <= self.account.budget

    @has_optimizer
    @rule(rng=seeds)
    def set_lr(self, rng: random.Random) -> None:
        role = rng.choice(["sampled", "dense"])
        lr = rng.choice([0.0, 1e-4, 1e-2])
        self.account.hyper[role]["lr"] = lr
        next(group for group in self.optimizer.param_groups if group["role"] == role)["lr"] = lr

    # Flags

    def spare(self, frozen: set[str], thawed: set[str]) -> bool:
        """Whether there would be something to draw, all of which fits."""
        account = copy.deepcopy(self.account)
        account.choose(dict.fromkeys(frozen, False) | dict.fromkeys(thawed, True))
        return account.refusal() is None and len(account.numel()) > 2

    @is_sound
    @rule(rng=seeds)
    def freeze(self, rng: random.Random) -> None:
        """In mid-round, without `thawed()`."""
        names = [n for n in rng.sample(self.names, rng.choice([1, 1, 2, 4])) if self.account.kept[n].flag]
        flags = self.now() | dict.fromkeys(names, False)
        on = {name for name, kept in self.account.kept.items() if kept.flag}
        trial = copy.deepcopy(self.account)
        trial.compare(flags)
        if not names or not any(flags[name] for name in on) or trial.refusal() or len(trial.numel()) <= 2:
            return
        for name in names:
            self.param(name).requires_grad_(False)
            self.param(name).grad = None
            self.flags[name] = False

    @is_sound
    @rule(rng=seeds)
    def thaw(self, rng: random.Random) -> None:
        names = rng.sample(self.names, rng.choice([1, 1, 2]))
        flags = self.now() | dict.fromkeys(names, True)
        if all(flags.values()) or not self.spare(set(), set(names)):
            return
        for name in names:
            kept = self.account.kept[name]
            self.param(name).requires_grad_(True)
            if kept.user and not kept.flag:
                self.strays.add(name)
            self.flags[name] = True

    @is_sound
    @rule(rng=seeds)
    def freeze_and_thaw_all(self, rng: random.Random) -> None:
        """As GANs and frameworks do around a pass that shall not train."""
        on = {name for name, kept in self.account.kept.items() if kept.flag}
        if rng.random() < 0.5:
            several = len({self.model.layers[name] for name in on}) > 1
            if (
                self.account.keep_states == "none"
                or not several
                or any(self.now()[n] != f for n, f in self.flags.items())
            ):
                return
            if self.now() != {name: kept.flag for name, kept in self.account.kept.items()}:
                return
            self.model.requires_grad_(False)
            for name in self.names:
                self.param(name).grad = None
            self.flags = dict.fromkeys(self.names, False)
            self.strays = set()
        elif any(kept.user and not kept.flag for kept in self.account.kept.values()):
            self.model.requires_grad_(True)
            self.flags = dict.fromkeys(self.names, True)
            self.strays = {name for name, kept in self.account.kept.items() if kept.user and not kept.flag}

    @is_sound
    @rule(rng=seeds)
    def within_thawed(self, rng: random.Random) -> None:
        account = self.account
        if self.is_resized or not any(self.now()[name] for name, kept in account.kept.items() if kept.flag):
            return
        flags = self.now()
        trial = copy.deepcopy(account)
        trial.compare(flags)
        names = rng.sample(self.names, rng.choice([0, 1, 2, 4]))
        chosen = {name: not trial.kept[name].user for name in names}
        trial.choose(chosen)
        if trial.refusal() or len(trial.numel()) <= 2:
            return
        frozen, thawed = account.compare(flags)
        with self.optimizer.thawed():
            assert self.now() == {name: kept.user for name, kept in account.kept.items()}
            if rng.random() < 0.3:
                self.refused(self.optimizer.step, "thawed", kinds=RuntimeError)
            if rng.random() < 0.3:
                twin = copy.deepcopy(self.model)
                assert all(getattr(twin, n).requires_grad == kept.user for n, kept in account.kept.items())
            for name, flag in chosen.items():
                self.param(name).requires_grad_(flag)
        account.choose(chosen)
        self.flags = {name: kept.flag for name, kept in account.kept.items()}
        self.strays = set()
        is_due = bool(chosen or frozen or thawed)
        if account.steps:
            self.is_due = self.is_due or is_due
        elif is_due:
            self.take_draw()
        for name, kept in account.kept.items():
            assert kept.flag or self.param(name).grad is None, f"{name} is off and has a gradient"

    # Weights

    @is_sound
    @rule(rng=seeds)
    def write(self, rng: random.Random) -> None:
        names = rng.sample(self.names, rng.choice([1, 3, 16]) % len(self.names) or 1)
        params = [self.param(name) for name in names]
        values = [normal(rng, p.shape, p.dtype) for p in params]
        how = rng.choice([*SEEN, *UNSEEN])
        if how == "no_grad":
            with torch.no_grad():
                for param, value in zip(params, values, strict=True):
                    param.copy_(value)
        elif how == "foreach":
            with torch.no_grad():
                torch._foreach_copy_(params, values)
        elif how == "foreach on data":
            torch._foreach_copy_([param.data for param in params], values)
        elif how == "numpy":
            for param, value in zip(params, values, strict=True):
                if param.dtype == torch.bfloat16:
                    param.data.view(torch.int16).numpy()[...] = value.view(torch.int16).numpy()
                else:
                    param.data.numpy()[...] = value.numpy()
        elif how == "data":
            for param, value in zip(params, values, strict=True):
                param.data.copy_(value)
        elif how == "exchange":
            for name, value in zip(names, values, strict=True):
                self.model.put(rng, name, value)
        else:
            own = {name: value for name, value in zip(names, values, strict=True)}
            self.model.load_state_dict(own, strict=False)
        for name in names:
            self.account.found(name, self.param(name), how in SEEN)

    @has_optimizer
    @rule(rng=seeds)
    def resize(self, rng: random.Random) -> None:
        """As `resize_token_embeddings` of some libraries."""
        name = rng.choice([name for name in self.names if self.model.roles[name] == "sampled" or not self.is_allocated])
        self.change(name)
        shape = self.param(name).shape
        rows = rng.choice([1, shape[0], shape[0] + 1, 2 * shape[0], max(1, shape[0] - 3)])
        self.model.put(rng, name, normal(rng, (rows, *shape[1:]), self.param(name).dtype))
        self.param(name).grad = None
        self.changed(name)

    @has_optimizer
    @rule(rng=seeds)
    def cast(self, rng: random.Random) -> None:
        dtype = rng.choice(DTYPES)
        for name in self.names:
            self.change(name)
        self.model.to(dtype)
        for name in self.names:
            self.changed(name)

    def change(self, name: str) -> None:
        if self.is_allocated:
            self.broken.setdefault(name, (self.param(name).shape, self.param(name).dtype))

    def changed(self, name: str) -> None:
        param = self.param(name)
        if not self.is_allocated:
            self.is_resized = self.form() != self.laid_out
            self.account.found(name, param)
        elif self.broken[name] == (param.shape, param.dtype):
            del self.broken[name]
            self.account.found(name, param)

    @precondition(lambda self: self.optimizer is not None and self.broken)
    @rule(rng=seeds)
    def mend(self, rng: random.Random) -> None:
        for name, (shape, dtype) in list(self.broken.items()):
            self.model.put(rng, name, normal(rng, shape, dtype))
            self.param(name).grad = None
            self.changed(name)

    # State

    @calm
    @rule(rng=seeds)
    def edit_state(self, rng: random.Random) -> None:
        state, account = self.optimizer.state, self.account
        trained = [name for name, kept in account.kept.items() if kept.m is not None]
        how = rng.choice(["assign", "clear", "delete", "empty", "moment", "age"])
        if how in ("assign", "clear"):
            if how == "assign":
                self.optimizer.state = type(torch.optim.SGD([torch.zeros(1)]).state)(dict)
            else:
                state.clear()
            anew = trained
        elif not trained:
            return
        else:
            name = rng.choice(trained)
            param, kept = self.param(name), account.kept[name]
            anew = [name]
            if how == "delete":
                del state[param]
            elif how == "empty":
                state[param] = {}
            elif how == "age":
                state[param].pop("age", None)
            elif self.options["state_dtype"] in ("fp32", "bf16") and kept.age:
                held = state[param]["exp_avg"]
                state[param]["exp_avg"] = normal(rng, held.shape, held.dtype, 0.01)
                kept.m = state[param]["exp_avg"].double()
                anew = []
            else:
                return
        for name in anew:
            account.kept[name].begin()
            # It begins in the next step, with what the weight is by then.
            account.kept[name].noticed = True
        self.is_edited = account.begun

    @calm
    @rule(rng=seeds)
    def save(self, rng: random.Random) -> None:
        state = self.optimizer.state_dict()
        self.account.adopt_all()
        if rng.random() < 0.5:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        self.saved = state, copy.deepcopy(self.account)

    @calm
    @precondition(lambda self: self.saved is not None)
    @rule(rng=seeds)
    def load(self, rng: random.Random) -> None:
        state, then = self.saved
        now = self.account
        same = all(kept.user == then.kept[name].user for name, kept in now.kept.items())
        same = same and all(kept.seen.shape == then.kept[n].seen.shape for n, kept in now.kept.items())
        same = same and now.budget == then.budget
        if not same or any(kept.seen.dtype != then.kept[n].seen.dtype for n, kept in now.kept.items()):
            return
        self.optimizer.load_state_dict(state)
        self.restore(now, then)

    def restore(self, now: Account, then: Account) -> None:
        """The account after a state dict was loaded beside the weights of now."""
        then = copy.deepcopy(then)
        for name, kept in then.kept.items():
            kept.seen = self.param(name).detach().clone()
            if kept.m is not None and kept.age:
                then.adopt(kept)
            elif kept.m is not None:
                kept.begin()
            else:
                kept.drop()
            kept.counted = now.kept[name].counted
            # The next step begins with what the weights are by then.
            kept.noticed = True
        then.presumed = now.presumed
        self.account = then
        assert self.active() == then.active
        self.flags = {name: kept.flag for name, kept in then.kept.items()}
        self.strays = set()
        self.is_edited = True

    @calm
    @rule(rng=seeds)
    def resume_elsewhere(self, rng: random.Random) -> None:
        """Save, and go on with another optimizer on other parameters."""
        state = copy.deepcopy(self.optimizer.state_dict())
        self.account.adopt_all()
        then, model = self.account, self.model
        if then.total_numel != sum(kept.seen.numel() for kept in then.kept.values() if kept.user):
            return
        self.model = copy.deepcopy(model)
        for name, kept in then.kept.items():
            self.param(name).requires_grad_(kept.user)
            self.param(name).grad = None
        self.model.seat(rng)
        if then.refusal() or then.lacks_backend():
            self.model = model
            return
        assert self.construct()
        self.optimizer.load_state_dict(state)
        self.restore(self.account, then)

    # Copies

    @is_sound
    @rule(rng=seeds)
    def copy_together(self, rng: random.Random) -> None:
        """A copy of model and optimizer does bit for bit what they do, and the user goes on with it."""
        if self.is_resized:
            return
        pair = (self.model, self.optimizer)
        if rng.random() < 0.5:
            twin, other = copy.deepcopy(pair)
        else:
            twin, other = pickle.loads(pickle.dumps(pair))
        self.account.adopt_all()
        for name in self.names:
            mine, theirs = self.param(name), getattr(twin, name)
            assert torch.equal(mine, theirs) and mine.requires_grad == theirs.requires_grad
        if self.is_calm and not self.account.lacks_backend():
            self.gradients(rng)
            for name in self.names:
                grad = self.param(name).grad
                getattr(twin, name).grad = None if grad is None else grad.clone()
            self.step(rng)
            other.step()
            for name in self.names:
                assert torch.equal(self.param(name), getattr(twin, name)), f"{name} differs in the copy"
                assert self.param(name).requires_grad == getattr(twin, name).requires_grad, name
        self.model, self.optimizer = twin, other

    @has_optimizer
    @rule()
    def copy_alone(self) -> None:
        self.refused(lambda: copy.copy(self.optimizer), "deepcopy", kinds=TypeError)

    @calm
    @rule(rng=seeds)
    def copy_model(self, rng: random.Random) -> None:
        """A copy made in mid-round, given to a new optimizer: the user's flags are found again."""
        user = {name: kept.user for name, kept in self.account.kept.items()}
        old = self.model, self.optimizer
        is_told = any(kept.user != kept.flag for kept in self.account.kept.values())
        self.model = copy.deepcopy(self.model)
        for name in self.names:
            self.param(name).grad = None
        self.model.seat(rng)
        heard = len(self.said)
        if self.construct(user):
            assert not is_told or any("copy" in str(w.message) for w in self.said[heard:])
        else:
            self.model, self.optimizer = old

    # Ends

    def close(self) -> dict[str, bool]:
        """The user's flags, as the account has them."""
        self.account.compare(self.now())
        return {name: kept.user for name, kept in self.account.kept.items()}

    def ended(self, user: dict[str, bool], written_back: bool) -> None:
        assert self.now() == user, "flags are not the user's"
        if not self.broken:
            for name, kept in self.account.kept.items():
                leaves = written_back and kept.m is not None
                self.account.settle(name, self.param(name), {}, False, leaves, leaves)
        self.flags, self.strays, self.saved = user, set(), None

    @has_optimizer
    @rule()
    def drop(self) -> None:
        now, drawn = self.now(), {name for name, kept in self.account.kept.items() if kept.flag}
        # Nothing there is as MISA left it.
        is_theirs = self.account.is_wholesale(now) or any(now.values()) and not any(now[name] for name in drawn)
        user = self.close()
        user = now if is_theirs else user
        alive = weakref.ref(self.optimizer)
        self.optimizer = None
        gc.collect()
        assert alive() is None, "something keeps the optimizer alive"
        self.ended(user, written_back=False)

    @has_optimizer
    @rule()
    def release(self) -> None:
        user = self.close()
        released, self.optimizer = self.optimizer, None
        released.release()
        self.ended(user, written_back=True)
        self.refused(released.step, "release", kinds=RuntimeError)
        released.release()
        assert self.now() == user

    @precondition(lambda self: self.model is not None and self.optimizer is None)
    @rule(rng=seeds)
    def construct_again(self, rng: random.Random) -> None:
        self.broken = {}
        if rng.random() < 0.5:
            self.model.to(torch.float32)
        if rng.random() < 0.5 or self.open(self.now()).refusal():
            self.model.requires_grad_(True)
            for name, shape in [(name, SHAPES.get(name[3:], (11, 4))) for name in self.names]:
                if self.param(name).shape != shape:
                    self.model.put(rng, name, normal(rng, shape, self.param(name).dtype))
        for name in self.names:
            self.param(name).grad = None
        if not self.open(self.now()).lacks_backend():
            self.construct()

    @has_optimizer
    @rule()
    def construct_over(self) -> None:
        """A second optimizer takes over from a living one, or is refused and has changed nothing."""
        trial = copy.deepcopy(self.account)
        trial.compare(self.now())
        user = {name: kept.user for name, kept in trial.kept.items()}
        earlier, heard = self.optimizer, len(self.said)
        if self.open(user).lacks_backend():
            return
        opened = self.open(user)
        if opened.refusal():
            self.refused(lambda: MISA(self.model.groups(), **self.options), *self.names, "none of")
            return
        broken, self.account = dict(self.broken), trial
        new = MISA(self.model.groups(), **self.options)
        assert any("earlier" in str(w.message) for w in self.said[heard:]), "took over without a word"
        self.optimizer, self.broken = None, broken
        if not broken and not self.is_resized:
            for name, kept in trial.kept.items():
                leaves = kept.m is not None
                trial.settle(name, self.param(name), {}, False, leaves, leaves)
        self.refused(earlier.step, "release", kinds=RuntimeError)
        self.optimizer, self.broken, self.saved = new, {}, None
        self.is_resized = self.is_due = self.is_edited = False
        self.account = self.open(user)
        self.take_draw()

    @precondition(lambda self: self.is_calm and not self.account.begun)
    @rule()
    def rehearse(self) -> None:
        self.optimizer.rehearse()
        self.take_draw()


def play(seed: int, examples: int, steps: int) -> None:
    """Play a number of users of one seed."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    gc.collect()
    # What exists by now need not be looked through whenever an optimizer is dropped.
    gc.freeze()
    run_state_machine_as_test(hypothesis.seed(seed)(type("User", (User,), {})), settings=chosen)


def play_on(examples: int) -> None:
    """Play some users for fifty steps, and then, for `MISA_USER_MINUTES`, others for a thousand."""
    end, seed = time.monotonic() + 60 * MINUTES, int(os.environ.get("MISA_USER_SEED", "0"))
    play(seed, examples, steps=50)
    while time.monotonic() < end:
        seed += 1
        play(seed, examples=3, steps=1000)


def test_a_user_at_random() -> None:
    play_on(examples=20)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The CPU library with AddressSanitizer, and the runtime that must be loaded before Python."""
    compiler = shutil.which("g++")
    if compiler is None or "cpu" not in BACKENDS:
        missing("needs g++ and the CPU library")
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(found.stdout.strip())
    if not runtime.is_absolute():
        missing(f"{compiler} has no AddressSanitizer")
    folder = tmp_path_factory.mktemp("sanitized")
    flags = [compiler, *FLAGS, "-O1", "-fsanitize=address", "-fopenmp", "-fPIC", f"-I{ROOT / 'csrc'}"]
    objects = [folder / f"{name}.o" for name in INSTRUCTIONS]
    for file in objects:
        instructions = [*INSTRUCTIONS[file.stem], f"-DMISA_INSTRUCTIONS=chunk_{file.stem}"]
        subprocess.run([*flags, *instructions, "-c", ROOT / "csrc/chunk.cpp", "-o", file], check=True)
    library = folder / "libmisa_cpu.so"
    subprocess.run([*flags, "-shared", ROOT / "csrc/adamw_cpu.cpp", *objects, "-o", library], check=True)
    return library, str(runtime.resolve())


# The library is exchanged before anything has looked for one.
SANITIZED = """
import sys
from pathlib import Path

import torch

from misa_kernels.kernels import native

native.path = lambda name: Path(sys.argv[1])
import test_user

test_user.BACKENDS[:] = ["cpu"]
test_user.MARGIN = 0
step, short, steps = native.CpuTable.step, torch.zeros(3), []


def counted(self, weights, *args, **kwargs):
    steps.append(1)
    step(self, [short.data_ptr()] * len(weights) if sys.argv[2] == "planted" else weights, *args, **kwargs)


native.CpuTable.step = counted
test_user.play_on(examples=80)
print(len(steps), "steps on", native.library("cpu")._name)
"""


def play_sanitized(sanitized: tuple[Path, str], how: str) -> subprocess.CompletedProcess[str]:
    library, runtime = sanitized
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join(
            str(ROOT / folder) for folder in (".", "tests", "tests/kernels", "tests/outside")
        ),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", SANITIZED, str(library), how]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600 + 120 * MINUTES)


@pytest.mark.slow
def test_a_user_at_random_under_the_address_sanitizer(sanitized: tuple[Path, str]) -> None:
    done = play_sanitized(sanitized, "as it is")
    assert done.returncode == 0, done.stderr[-3000:]
    steps, library = done.stdout.strip().split(" steps on ")
    assert int(steps) > 200 and library == str(sanitized[0])


@pytest.mark.slow
def test_the_address_sanitizer_sees_a_weight_that_is_too_small(sanitized: tuple[Path, str]) -> None:
    done = play_sanitized(sanitized, "planted")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
    assert "csrc/chunk.cpp" in done.stderr
