"""Is a torch.optim.Optimizer through `MISA(rule=...)` what it is alone, and is its state ours to enter, leave and save?

`tests/test_rounds.py` compares AdamW through the door with the independent simulation of whole runs.
"""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from libraries import required
from torch import Tensor, nn

from benchmarks.memory import PeakMemory
from misa_kernels import MISA, UniformSampler, param_groups, reference, rules, slices
from misa_kernels.reference import Hyper, Operands

LR = 1e-2
# Widths that are no multiples of anything.
SIZES = {"width": 20, "hidden": 36}
Rule = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.1, foreach=False)


RULES: dict[str, Rule] = {
    "AdamW": adamw,
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, lr=LR, foreach=True),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=LR, fused=True),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=LR),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.3),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=LR),
    "Muon": lambda params: torch.optim.Muon(params, lr=LR),
    "bitsandbytes AdamW8bit": lambda params: required("bitsandbytes").optim.AdamW8bit(params, lr=LR, min_8bit_size=64),
    "torchao AdamW8bit": lambda params: required("torchao.optim").AdamW8bit(params, lr=LR, block_size=4),
    # Its first updates are eleven times as long as others.
    "CAME": lambda params: required("came_pytorch").CAME(params, lr=1e-4),
    "pytorch_optimizer CAME": lambda params: required("pytorch_optimizer").CAME(params, lr=LR),
    "pytorch_optimizer Muon": lambda params: required("pytorch_optimizer").Muon(
        [{"params": params, "use_muon": True}], lr=LR
    ),
    "schedule-free AdamW": lambda params: required("pytorch_optimizer").ScheduleFreeAdamW(params, lr=LR),
}
# torchao compiles its update for every shape.
EACH = [pytest.param(name, marks=pytest.mark.slow) if "torchao" in name else name for name in RULES]
MODES: dict[str, dict[str, Any]] = {
    "modules": {"delta": 0.4, "sampler": UniformSampler()},
    "slices": slices(sampler=UniformSampler(granularity="slice", hold_rounds=1)) | {"delta": 0.15},
}


def made(model: nn.Module, rule: Rule, mode: str = "modules", **arguments: Any) -> MISA:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MISA(param_groups(model), rule=rule, **{"inner_steps": 3} | MODES[mode] | arguments)


def weight_of(param: Tensor, piece: Any) -> Tensor:
    """Return a view of what is trained of a parameter."""
    weight = param.detach()
    return weight if piece is None else weight.narrow(piece.axis, piece.first, piece.last - piece.first)


def trained_by_hand(rule: Rule, mode: str, steps: int, keep_states: str) -> tuple[nn.Module, nn.Module]:
    """Return a model that MISA trained by a rule, and one in which each tensor had an optimizer of its own.

    The second gets the gradients of whole matrices, which are cut, and copies of what is trained.
    """
    ours, theirs = tiny.build(**SIZES), tiny.build(**SIZES)
    twins = dict(zip(ours.parameters(), theirs.parameters(), strict=True))
    optimizer = made(ours, rule, mode, keep_states=keep_states)
    alone: dict[Any, tuple[nn.Parameter, torch.optim.Optimizer]] = {}
    for step in range(steps):
        trained = {(twins[param], piece) for param, piece in optimizer.trained.items()}
        if step % 3 == 0:
            stay = trained if keep_states == "staying" else set()
            alone = {key: own for key, own in alone.items() if key in stay}
        for param, piece in trained - alone.keys():
            copied = nn.Parameter(weight_of(param, piece).clone(memory_format=torch.contiguous_format))
            alone[param, piece] = copied, rule([copied])
        for model in (ours, theirs):
            tiny.loss_of(model, tiny.batch(step)).backward()
        for (param, piece), (copied, own) in alone.items():
            copied.data.copy_(weight_of(param, piece))
            copied.grad = weight_of(param.grad, piece).contiguous()
            own.step()
            weight_of(param, piece).copy_(copied.detach())
        optimizer.step()
        optimizer.zero_grad()
        theirs.zero_grad()
    optimizer.release()
    return ours, theirs


def distance(a: nn.Module, b: nn.Module) -> float:
    """Return the root of the sum of squared differences of two models' weights."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return math.sqrt(sum((x.detach() - y.detach()).double().square().sum().item() for x, y in pairs))


@pytest.mark.parametrize("keep_states", ["staying", "none"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["AdamW", "SGD with momentum", "Adafactor", "Muon", "CAME"])
def test_a_rule_does_what_it_does_alone(name, mode, keep_states):
    ours, theirs = trained_by_hand(RULES[name], mode, 15, keep_states)
    moved = distance(theirs, tiny.build(**SIZES))
    assert moved > 0.01
    # Gradients of slices are other sums of the same products than cuts of whole gradients are.
    assert distance(ours, theirs) <= (0 if mode == "modules" else 1e-3 * moved)


class Reference(torch.optim.Optimizer):
    """AdamW as `misa_kernels.reference` computes it."""

    def step(self, closure: Any = None) -> None:
        """Update by the reference, which is told the age."""
        for group in self.param_groups:
            hyper = Hyper(group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            for param in group["params"]:
                if param.grad is None:
                    continue
                own = self.state[param]
                if not own:
                    own |= {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
                    own["age"] = torch.zeros((), dtype=torch.int32)
                theta, grad = param.detach().view(-1), param.grad.view(-1)
                moments = own["exp_avg"].view(-1), own["exp_avg_sq"].view(-1)
                number = torch.zeros((), dtype=torch.float64)
                operands = Operands(*moments, None, own["age"], number, 0, theta, grad, hyper, None)
                reference.adamw_step([operands])
                own["age"] += 1


def referenced(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Reference(params, {"lr": LR, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1})


PRECISIONS = [(torch.float32, "master"), *((torch.bfloat16, name) for name in ("master", "split", "stochastic"))]


@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.5}, {"keep_states": "none", "skip_nonfinite": True}])
@pytest.mark.parametrize("dtype, param_precision", PRECISIONS)
@pytest.mark.parametrize("mode", MODES)
def test_adamw_through_the_door_is_the_reference_to_the_bit(mode, dtype, param_precision, more):
    arguments = {**MODES[mode], "inner_steps": 3, "param_precision": param_precision, **more}
    models, losses = [tiny.build(dtype=dtype, **SIZES) for _ in range(2)], []
    hyperparameters = {"lr": LR, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    for model, own in zip(models, ({"rule": referenced}, {"backend": "reference", **hyperparameters}), strict=True):
        optimizer = MISA(param_groups(model), **arguments, **own)
        losses.append(tiny.train(model, optimizer, 14))
        optimizer.release()
    assert losses[0] == losses[1]
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EACH)
def test_a_run_saved_in_mid_round_goes_on_to_the_bit(name, mode):
    model = tiny.build(**SIZES)
    optimizer = made(model, RULES[name], mode)
    tiny.train(model, optimizer, 8)
    copied = tiny.build(**SIZES)
    copied.load_state_dict(saved_and_loaded(model.state_dict()))
    resumed = made(copied, RULES[name], mode)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert resumed.active == optimizer.active
    for own, trained in ((model, optimizer), (copied, resumed)):
        tiny.train(own, trained, 8, start=8)
    for ours, theirs in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_copies_go_on_as_the_original():
    model = tiny.build(**SIZES)
    optimizer = made(model, RULES["Muon"])
    tiny.train(model, optimizer, 8)
    twin, copied = copy.deepcopy((model, optimizer))
    for own, trained in ((model, optimizer), (twin, copied)):
        tiny.train(own, trained, 8, start=8)
    assert distance(model, twin) == 0


def test_state_is_that_of_what_is_active():
    model = tiny.build(**SIZES)
    optimizer = made(model, adamw)
    seen = []
    for step in range(12):
        tiny.train(model, optimizer, 1, start=step)
        held = {param for param, own in optimizer.state.items() if "rule.exp_avg" in own}
        trained = set(optimizer.trained)
        # What has entered at the end of a round has no state yet.
        is_new = (step + 1) % 3 == 0
        assert held <= trained if is_new else held == trained
        for param in held:
            age = 3 if is_new else (step + 1) % 3
            assert optimizer.state[param]["rule.step"].item() >= age
            assert optimizer.state[param]["rule.step"].item() == optimizer.state[param]["age"].item()
            assert optimizer.state[param]["rule.exp_avg"].shape == param.shape
        seen.append(frozenset(trained))
        assert optimizer.state_bytes == sum(2 * param.nbytes + 4 for param in held)
    assert len(set(seen)) > 2


def test_blocks_of_a_tensor_have_state_apart():
    stacked = nn.Parameter(torch.randn(6, 8, 4))
    shapes = []

    def rule(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        shapes.extend(tuple(param.shape) for param in params)
        return torch.optim.Muon(params, lr=0.1)

    group = {"params": [stacked], "modules": [[f"expert {n}" for n in range(6)]], "role": "sampled"}
    optimizer = MISA([group], delta=0.4, inner_steps=2, sampler=UniformSampler(), rule=rule)
    before = stacked.detach().clone()
    active = optimizer.active
    stacked.grad = torch.randn_like(stacked)
    optimizer.step()
    # A stack of matrices would be refused by Muon.
    assert set(shapes) == {(8, 4)}
    moved = [n for n in range(6) if not torch.equal(before[n], stacked[n].detach())]
    assert moved == active and len(active) == 2
    kept = [name for name in optimizer.state[stacked] if name.startswith("rule.momentum")]
    assert sorted(kept) == [f"rule.momentum_buffer.{n}" for n in active]


def test_schedulers_and_users_set_hyperparameters():
    model = tiny.build(**SIZES)
    optimizer = made(model, lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.5))
    assert {group["lr"] for group in optimizer.param_groups} == {1.0}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=40)
    for step in range(5):
        tiny.loss_of(model, tiny.batch(step)).backward()
        lr, momentum = (optimizer.param_groups[0][name] for name in ("lr", "momentum"))
        before = {param: param.detach().clone() for param in optimizer.trained}
        kept = {param: optimizer.state[param].get("rule.momentum_buffer") for param in before}
        kept = {param: None if own is None else own.clone() for param, own in kept.items()}
        grads = {param: param.grad for param in before}
        optimizer.step()
        for param, old in before.items():
            velocity = grads[param] if kept[param] is None else momentum * kept[param] + grads[param]
            torch.testing.assert_close(param.detach(), old - lr * velocity)
        optimizer.zero_grad()
        schedule.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model)
    tiny.train(model, optimizer, 4, start=5)
    assert distance(model, before) == 0


@pytest.mark.slow
def test_a_rate_in_a_tensor_may_be_set_as_a_float():
    model = tiny.build(**SIZES)
    optimizer = made(model, RULES["torchao AdamW8bit"])
    tiny.train(model, optimizer, 2)
    before = copy.deepcopy(model)
    for group in optimizer.param_groups:
        group |= {"lr": 0.0, "weight_decay": 0.0}
    tiny.train(model, optimizer, 4, start=2)
    assert distance(model, before) == 0


def test_groups_have_rules_and_rates_of_their_own():
    model = tiny.build(**SIZES)
    groups = param_groups(model, "pretrain")
    for group in groups:
        if group["role"] == "sampled":
            group["lr"] = 0.5

    def rule(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        if all(param.ndim == 2 and is_inner(param) for param in params):
            return torch.optim.Muon(params, lr=0.1)
        return torch.optim.AdamW(params, lr=0.01)

    def is_inner(param: Tensor) -> bool:
        return tiny.VOCABULARY not in param.shape

    optimizer = MISA(groups, delta=0.4, inner_steps=2, rule=rule)
    for group in optimizer.param_groups:
        if group["role"] == "sampled":
            assert group["lr"] == 0.5 and "momentum" in group
        elif group["role"] == "dense":
            assert group["lr"] == 0.01 and "betas" in group
    losses = tiny.train(model, optimizer, 6)
    assert all(map(math.isfinite, losses))
    assert "AdamW" in optimizer.state_dict()["param_groups"][0]["rule"]


def test_a_step_with_nonfinite_gradients_is_left_out():
    model = tiny.build(**SIZES)
    optimizer = made(model, adamw, skip_nonfinite=True)
    tiny.train(model, optimizer, 1)
    before, kept = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    tiny.loss_of(model, tiny.batch(1)).backward()
    next(iter(optimizer.trained)).grad.view(-1)[0] = math.nan
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.skipped_steps == 1 and distance(model, before) == 0
    for number, own in optimizer.state_dict()["state"].items():
        for name in own.keys() & {"rule.exp_avg", "rule.step", "age", "score_sum"}:
            assert torch.equal(own[name], kept[number][name])
    tiny.train(model, optimizer, 4, start=2)
    assert distance(model, before) > 0 and all(torch.isfinite(param).all() for param in model.parameters())


@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.1}])
def test_a_grad_scaler_unscales_and_skips(more):
    models = [tiny.build(**SIZES) for _ in range(2)]
    optimizers = [made(model, adamw, **more) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(8):
        tiny.loss_of(models[0], tiny.batch(step)).backward()
        optimizers[0].step()
        scaler.scale(tiny.loss_of(models[1], tiny.batch(step))).backward()
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert distance(*models) < 1e-6
    before = copy.deepcopy(models[1])
    scaler.scale(tiny.loss_of(models[1], tiny.batch(9))).backward()
    next(iter(optimizers[1].trained)).grad.view(-1)[0] = math.inf
    scaler.step(optimizers[1])
    assert distance(models[1], before) == 0


def test_gradients_add_up_over_backward_passes():
    models = [tiny.build(**SIZES) for _ in range(2)]
    optimizers = [made(model, adamw) for model in models]
    for step in range(7):
        both = torch.cat([tiny.batch(2 * step), tiny.batch(2 * step + 1)])
        tiny.loss_of(models[0], both).backward()
        for part in (0, 1):
            (tiny.loss_of(models[1], tiny.batch(2 * step + part)) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert distance(*models) < 1e-3


def test_clearing_the_state_begins_anew():
    model, other = tiny.build(**SIZES), tiny.build(**SIZES)
    optimizer = made(model, RULES["SGD with momentum"], inner_steps=20)
    tiny.train(model, optimizer, 3)
    optimizer.state.clear()
    other.load_state_dict(model.state_dict())
    fresh = made(other, RULES["SGD with momentum"], inner_steps=20)
    assert fresh.active == optimizer.active
    for own, trained in ((model, optimizer), (other, fresh)):
        tiny.train(own, trained, 3, start=3)
    assert distance(model, other) == 0


def test_what_is_written_to_the_state_counts():
    model = tiny.build(**SIZES)
    optimizer = made(model, RULES["SGD with momentum"], inner_steps=20)
    tiny.train(model, optimizer, 2)
    param = next(iter(optimizer.trained))
    optimizer.state[param]["rule.momentum_buffer"] = torch.full_like(param, 5.0)
    tiny.loss_of(model, tiny.batch(3)).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["rule.momentum_buffer"], 4.5 + param.grad)


@pytest.mark.parametrize("steps", [1, 2])
def test_weights_that_somebody_writes_win_over_masters(steps):
    model = tiny.build(dtype=torch.bfloat16, **SIZES)
    optimizer = made(model, lambda params: torch.optim.SGD(params, lr=0.0), inner_steps=20)
    if steps > 1:
        tiny.train(model, optimizer, 1)
    else:
        # Allocated, and without an update.
        optimizer.step()
    param = next(iter(optimizer.trained))
    with torch.no_grad():
        param.fill_(0.25)
    tiny.train(model, optimizer, 1, start=1)
    assert (param == 0.25).all() and (optimizer.state[param]["master"] == 0.25).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_monitor_knows_gradients_and_updates(mode):
    model = tiny.build(**SIZES)
    optimizer = made(model, adamw, mode)
    record, grads, ratios = optimizer.monitor, [], {}
    for step in range(3):
        tiny.loss_of(model, tiny.batch(step)).backward()
        trained = optimizer.trained
        parts = {param: getattr(param.grad, "part", param.grad).detach().clone() for param in trained}
        grads.append({param: part.double().square().sum().item() for param, part in parts.items()})
        before = {param: weight_of(param, piece).clone() for param, piece in trained.items()}
        names, current = [optimizer.modules[n] for n in optimizer.active], record.current
        optimizer.step()
        for param, piece in trained.items():
            now = weight_of(param, piece)
            ratios[param] = ((now - before[param]).norm() / now.norm()).item()
        optimizer.zero_grad()
    for n, module in enumerate(names):
        param = module.blocks[0].param
        mean = sum(own[param] for own in grads) / 3
        assert current.grad_norm[n] == pytest.approx(math.sqrt(mean), rel=1e-5)
        assert current.update_ratio[n] == pytest.approx(ratios[param], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_two_steps_of_a_rehearsed_run_show_the_peak(dtype, mode):
    model = tiny.build(4, dtype, width=64, hidden=160)
    optimizer = made(model, lambda params: torch.optim.AdamW(params, lr=LR, foreach=True), mode)
    optimizer.rehearse()
    peaks = []
    # One context, as what a step frees may have been made in one before it.
    for steps in (2, 8):
        with PeakMemory() as memory:
            tiny.train(model, optimizer, steps, start=len(peaks))
        peaks.append((memory.peak_bytes, memory.held_bytes))
    assert peaks[0][1] + peaks[1][0] <= 1.01 * peaks[0][0]


def test_a_rule_is_checked():
    model = tiny.build(**SIZES)
    groups = param_groups(model)
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"rule": "AdamW"}, TypeError, "rule='AdamW' must be a function"),
        ({"rule": torch.optim.SGD(model.parameters(), lr=0.1)}, TypeError, "must be a function"),
        ({"rule": lambda params: None}, TypeError, "rule returned a NoneType"),
        ({"rule": lambda params: torch.optim.SGD(params[1:], lr=0.1)}, ValueError, "of these and no others"),
        (
            {"rule": lambda params: torch.optim.SGD([{"params": [param]} for param in params], lr=0.1)},
            ValueError,
            "must return one",
        ),
        ({"lr": 1e-3}, ValueError, "lr=0.001 belongs to AdamW"),
        ({"betas": (0.9, 0.99)}, ValueError, "betas"),
        ({"weight_decay": 0.0}, ValueError, "weight_decay"),
        ({"state_dtype": "int8"}, ValueError, "state_dtype='int8' must be 'fp32'"),
        ({"backend": "cpu"}, ValueError, "backend='cpu' must be 'auto'"),
        ({"momentum_flush": True}, ValueError, "momentum_flush"),
        ({"release_gradients": True}, ValueError, "release_gradients"),
    ]
    before = [param.requires_grad for param in model.parameters()]
    for arguments, error, sentence in refused:
        with pytest.raises(error, match=sentence):
            MISA(groups, delta=0.4, **{"rule": adamw} | arguments)
        assert before == [param.requires_grad for param in model.parameters()]


def test_states_of_other_rules_are_refused():
    states = {}
    for name in ("AdamW", "Muon", None):
        model = tiny.build(**SIZES)
        optimizer = made(model, RULES[name]) if name else MISA(param_groups(model), **MODES["modules"], inner_steps=3)
        tiny.train(model, optimizer, 2)
        states[name] = optimizer.state_dict()
        for other, state in states.items():
            if other != name:
                with pytest.raises(ValueError, match=f"state of .*{other} .*updates by .*{name or chr(77)}"):
                    optimizer.load_state_dict(state)
        optimizer.release()


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 4), nn.Linear(4, 4))
    groups = [{"params": [model[0].weight], "role": "dense"}, {"params": [model[n].weight for n in (1, 2)]}]
    with pytest.warns(UserWarning):
        optimizer = MISA(groups, delta=0.4, rule=adamw)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        optimizer.step()


def test_other_functions_see_that_weights_were_written():
    model = tiny.build(**SIZES)
    optimizer = made(model, adamw)
    loss = tiny.loss_of(model, tiny.batch(0))
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Counting(torch.optim.Optimizer):
    """Adam's first moment, corrected by a count of the group, there from the beginning or from the first step."""

    def __init__(self, params: Any, lr: float = 1e-2, **counts: int) -> None:
        super().__init__(params, {"lr": lr} | counts)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update by a mean that is corrected for the group's age."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    m = self.state[param].setdefault("exp_avg", torch.zeros_like(param)).lerp_(param.grad, 0.1)
                    self.state[param]["seen"] = group["step"]
                    param.add_(m / (1 - 0.9 ** group["step"]), alpha=-group["lr"])


COUNTED: dict[str, Rule] = {
    "from the beginning": lambda params: Counting(params, step=0),
    "from the first step": lambda params: Counting(params),
    "schedule-free": RULES["schedule-free AdamW"],
}


@pytest.mark.parametrize("name", COUNTED)
def test_counts_of_a_group_begin_anew_with_its_members(name):
    ours, theirs = trained_by_hand(COUNTED[name], "modules", 15, "none")
    assert distance(ours, theirs) == 0 < distance(theirs, tiny.build(**SIZES))


def test_counts_of_groups_that_are_empty_for_a_round_begin_anew():
    model = tiny.build(**SIZES)
    groups = [{"params": [p for p in block.parameters() if p.ndim == 2], "role": "sampled"} for block in model.blocks]
    optimizer = MISA(groups, delta=0.1, inner_steps=3, sampler=UniformSampler(), rule=Counting, keep_states="none")
    for step in range(36):
        tiny.train(model, optimizer, 1, start=step)
        for param in optimizer.trained:
            own = optimizer.state[param]
            assert "rule.seen" not in own or own["rule.seen"] == own["age"].item()


@pytest.mark.parametrize("name", COUNTED)
def test_loading_takes_counts_back(name):
    model = tiny.build(**SIZES)
    optimizer = made(model, COUNTED[name])
    tiny.train(model, optimizer, 3)
    weights, state = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    tiny.train(model, optimizer, 2, start=3)
    other = tiny.build(**SIZES)
    fresh = made(other, COUNTED[name])
    for own, trained in ((model, optimizer), (other, fresh)):
        own.load_state_dict(weights)
        trained.load_state_dict(state)
        tiny.train(own, trained, 5, start=3)
    assert distance(model, other) == 0


def test_a_group_that_is_thawed_has_its_own_hyperparameters():
    def rule(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        if all(param.ndim == 2 for param in params):
            return torch.optim.Muon(params, lr=0.1)
        return torch.optim.SGD(params, lr=1e-6)

    model = tiny.build(**SIZES)
    for param in model.parameters():
        param.requires_grad_(param.ndim == 2 and param.shape[0] != tiny.VOCABULARY)
    optimizer = MISA(param_groups(model, "pretrain"), delta=0.4, inner_steps=3, sampler=UniformSampler(), rule=rule)
    tiny.train(model, optimizer, 3)
    with optimizer.thawed():
        for param in model.parameters():
            param.requires_grad_(param.ndim < 2 or param.requires_grad)
    tiny.train(model, optimizer, 3, start=3)
    tiny.loss_of(model, tiny.batch(6)).backward()
    norm = model.norm.weight
    before, grad = norm.detach().clone(), norm.grad.clone()
    optimizer.step()
    torch.testing.assert_close(before - norm.detach(), 1e-6 * grad, rtol=0.2, atol=1e-7)


def test_a_group_that_is_frozen_in_mid_run_is_loaded_by_what_begins_with_it_frozen():
    def rule(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return (torch.optim.Muon if all(param.ndim == 2 for param in params) else torch.optim.SGD)(params, lr=0.01)

    def built(model: nn.Module, delta: float = 0.4) -> MISA:
        matrices = [param for param in model.blocks.parameters() if param.ndim == 2]
        vectors = [param for param in model.parameters() if param.ndim == 1]
        return MISA([{"params": matrices}, {"params": vectors, "role": "dense"}], delta=delta, inner_steps=3, rule=rule)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, other = tiny.build(**SIZES), tiny.build(**SIZES)
        optimizer = built(model)
        tiny.train(model, optimizer, 4)
        with optimizer.thawed():
            for param in model.parameters():
                param.requires_grad_(param.ndim > 1 and param.requires_grad)
        tiny.train(model, optimizer, 4, start=4)
        for param in other.parameters():
            param.requires_grad_(param.ndim > 1)
        # What is frozen from the beginning does not count.
        fresh = built(other, 0.45)
        fresh.load_state_dict(optimizer.state_dict())
    assert fresh.active == optimizer.active


def test_a_rate_that_groups_share_in_a_tensor_is_not_written_to():
    rate = torch.tensor(1e-3)
    model = tiny.build(**SIZES)
    groups = param_groups(model, "pretrain")
    for group in groups:
        if group["role"] == "sampled":
            group["lr"] = 0.5
    optimizer = MISA(groups, delta=0.4, rule=lambda params: torch.optim.SGD(params, lr=rate))
    tiny.train(model, optimizer, 2)
    assert rate == 1e-3
    assert sorted({round(float(group["lr"]), 6) for group in optimizer.param_groups}) == [1e-3, 0.5]


NAMES_OF_OURS = {
    "AdamW, fused": RULES["AdamW, fused"],
    "AdamW, maximize": lambda params: torch.optim.AdamW(params, lr=LR, maximize=True, amsgrad=True),
    "a seed": lambda params: rules.LowRankAdam(params, lr=LR, rank=2, projector="random", every=2, seed=11),
    "a delta": lambda params: required("pytorch_optimizer").AdamP(params, lr=LR, delta=0.7),
}


@pytest.mark.parametrize("name", NAMES_OF_OURS)
def test_hyperparameters_may_have_names_of_ours(name):
    model = tiny.build(**SIZES)
    optimizer = made(model, NAMES_OF_OURS[name], seed=3)
    tiny.train(model, optimizer, 4)
    twin, copied = copy.deepcopy((model, optimizer))
    other = tiny.build(**SIZES)
    other.load_state_dict(model.state_dict())
    loaded = made(other, NAMES_OF_OURS[name], seed=3)
    loaded.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for own in (copied, loaded):
        for group, theirs in zip(optimizer.param_groups, own.param_groups, strict=True):
            for key in group.keys() - {"params"}:
                assert group[key] == theirs[key], key
    for own, trained in ((model, optimizer), (twin, copied), (other, loaded)):
        tiny.train(own, trained, 5, start=4)
    assert distance(model, twin) == distance(model, other) == 0


def test_what_a_group_says_of_its_own_holds():
    model = tiny.build(**SIZES)
    groups = [group | {"maximize": True, "lr": 0.25} for group in param_groups(model)]
    optimizer = MISA(groups, delta=0.4, rule=lambda params: torch.optim.SGD(params, lr=1.0), inner_steps=9)
    tiny.loss_of(model, tiny.batch(0)).backward()
    param = next(iter(optimizer.trained))
    expected = param.detach() + 0.25 * param.grad
    optimizer.step()
    torch.testing.assert_close(param.detach(), expected)
    for name, value, sentence in (
        ("betas", (0.9, 0.99), "nothing that torch.SGD has"),
        ("lr", -1.0, "lr=-1.0 must be"),
    ):
        with pytest.raises(ValueError, match=sentence):
            MISA(
                [group | {name: value} for group in param_groups(tiny.build(**SIZES))],
                delta=0.4,
                rule=lambda params: torch.optim.SGD(params, lr=1.0),
            )


def test_saved_states_are_copies_of_what_is_in_lists():
    soap = required("pytorch_optimizer").SOAP
    model = tiny.build(**SIZES)
    optimizer = made(model, lambda params: soap(params, lr=1e-3), inner_steps=50)
    tiny.train(model, optimizer, 4)
    state = optimizer.state_dict()
    held = [x for own in state["state"].values() for x in own.get("rule.GG", ())]
    before = [x.clone() for x in held]
    tiny.train(model, optimizer, 2, start=4)
    assert held and all(map(torch.equal, held, before))
    in_lists = sum(x.nbytes for own in optimizer.state.values() for x in own.get("rule.GG", ()))
    assert optimizer.state_bytes > in_lists > 0


def test_half_precision_trains_with_a_grad_scaler():
    model = tiny.build(dtype=torch.float16, **SIZES)
    optimizer = made(model, adamw)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model)
    for step in range(4):
        scaler.scale(tiny.loss_of(model, tiny.batch(step))).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    # As float32 does, which needs no scaler.
    wide = tiny.build(**SIZES)
    wide.load_state_dict(before.state_dict())
    tiny.train(wide, made(wide, adamw), 4)
    assert distance(model, wide) < 0.1 * distance(wide, before)


def test_deleting_an_entry_begins_anew_and_wrong_shapes_are_named():
    model = tiny.build(**SIZES)
    optimizer = made(model, adamw, inner_steps=10)
    tiny.train(model, optimizer, 2)
    param, other, *_ = optimizer.trained
    del optimizer.state[param]["rule.exp_avg"]
    tiny.train(model, optimizer, 1, start=2)
    assert [optimizer.state[own]["rule.step"].item() for own in (param, other)] == [1, 3]
    optimizer.state[param]["rule.exp_avg"] = torch.zeros(3)
    tiny.loss_of(model, tiny.batch(3)).backward()
    with pytest.raises(ValueError, match=r"'rule.exp_avg' of shape \(3,\) for blocks"):
        optimizer.step()


@pytest.mark.parametrize("now", ["master", "split"])
@pytest.mark.parametrize("saved", ["master", "split"])
def test_bits_beyond_the_weight_are_converted(saved, now):
    model, other = (tiny.build(dtype=torch.bfloat16, **SIZES) for _ in range(2))
    rule: Rule = lambda params: torch.optim.SGD(params, lr=1e-5, momentum=0.9)  # noqa: E731
    optimizer = made(model, rule, inner_steps=20, param_precision=saved)
    tiny.train(model, optimizer, 3)
    other.load_state_dict(model.state_dict())
    loaded = made(other, rule, inner_steps=20, param_precision=now)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.load_state_dict(optimizer.state_dict())
    for own, trained in ((model, optimizer), (other, loaded)):
        tiny.train(own, trained, 8, start=3)
        trained.release()
    assert distance(model, other) == 0


def test_a_gradient_of_a_step_that_failed_is_forgotten():
    fails = [True]

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            if fails[0]:
                raise RuntimeError("out of memory")
            super().step()

    model = tiny.build(**SIZES)
    optimizer = made(model, lambda params: Failing(params, lr=0.1), inner_steps=9)
    tiny.loss_of(model, tiny.batch(0)).backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.zero_grad()
    fails[0] = False
    before = copy.deepcopy(model)
    tiny.loss_of(model, tiny.batch(1)).backward()
    param, *_ = optimizer.trained
    param.grad = None
    optimizer.step()
    names = dict(zip(model.parameters(), before.parameters(), strict=True))
    assert torch.equal(param, names[param]) and distance(model, before) > 0


class Wrapping(torch.optim.Optimizer):
    """Keeps slow weights beside the state of another optimizer."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)


class Aside(torch.optim.SGD):
    """Keeps a count where no parameter's state is."""

    def step(self, closure: Any = None) -> None:
        super().step()
        self.state["k"] = torch.zeros(1)


def test_optimizers_that_cannot_be_rules_are_refused():
    model = tiny.build(**SIZES)
    one = torch.optim.SGD([nn.Parameter(torch.zeros(2, 2))], lr=0.1)
    for rule, error, sentence in (
        (lambda params: torch.optim.LBFGS(params), TypeError, "needs a closure"),
        (Wrapping, TypeError, "a Wrapping around a SGD"),
        (lambda params: one, ValueError, "must make a new one in every call"),
    ):
        with pytest.raises(error, match=sentence):
            made(model, rule)

    class Nameless(Counting):
        def __init__(self, params: Any) -> None:
            torch.optim.Optimizer.__init__(self, params, {})

    with pytest.raises(ValueError, match="a Nameless without lr"):
        made(model, Nameless)
    optimizer = made(model, lambda params: Aside(params, lr=0.1, momentum=0.9))
    with pytest.raises(TypeError, match="keeps state under 'k'"):
        tiny.train(model, optimizer, 1)


@pytest.mark.parametrize("name", ["Muon", "SOAP"])
def test_a_distributed_checkpoint_goes_on_to_the_bit(name, tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    from misa_kernels.distributed import load

    soap = required("pytorch_optimizer").SOAP
    rule: Rule = RULES["Muon"] if name == "Muon" else lambda params: soap(params, lr=1e-3)
    model, other = tiny.build(**SIZES), tiny.build(**SIZES)
    optimizer, resumed = made(model, rule), made(other, rule)
    tiny.train(model, optimizer, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    other.load_state_dict(model.state_dict())
    load(other, resumed, tmp_path)
    for own, trained in ((model, optimizer), (other, resumed)):
        tiny.train(own, trained, 5, start=4)
    assert distance(model, other) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu_no_step_but_the_last_of_a_round_waits(mode):
    model = tiny.build(device="cuda", **SIZES)
    optimizer = made(model, lambda params: torch.optim.AdamW(params, lr=LR, foreach=True), mode)
    losses = []
    for step in range(6):
        loss = tiny.loss_of(model, tiny.batch(step, "cuda"))
        loss.backward()
        # The first step of a run makes its state.
        torch.cuda.set_sync_debug_mode("error" if step % 3 == 1 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
        losses.append(loss.item())
    twin = tiny.build(**SIZES)
    expected = tiny.train(twin, made(twin, lambda params: torch.optim.AdamW(params, lr=LR, foreach=True), mode), 6)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)
