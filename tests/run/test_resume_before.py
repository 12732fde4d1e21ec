"""A state that 0.1 saved, before the package was rearranged, goes on bit by bit as the code that saved it went on.

`states/before_0_2.pt` was written by the code of commit 25b560f, with its library for CPUs, by

    git worktree add ../before 25b560f && cp misa_kernels/*.so ../before/misa_kernels/
    PYTHONPATH=../before python tests/run/test_resume_before.py

No machine is in it: gradients are fractions of powers of 2, whose squares add up exactly in any order, from a generator
whose stream NumPy has frozen.
"""

from __future__ import annotations

import copy
import hashlib
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import misa_kernels
from misa_kernels import MISA, ImportanceSampler, lisa
from misa_kernels.kernels import native

FILE = Path(__file__).parents[1] / "states" / "before_0_2.pt"
NUMBERS = ("round", "round_step", "steps", "seed", "skipped_steps")
# Saved amid the fourth round of four steps, and taken on over the ends of three more.
BEFORE, AFTER = 14, 11

# Two layers of two matrices, one of them of two groups of int8 moments, and a norm that is always on.
LAYERS = [
    {
        "shapes": [[6, 8], [17, 8]] * 2,
        "role": "sampled",
        "modules": [f"{layer}.{name}" for layer in range(2) for name in ("q", "up")],
        "layers": ["0"] * 2 + ["1"] * 2,
    },
    {"shapes": [[9]], "role": "dense", "modules": ["norm"], "layers": [None]},
]
# A matrix of twice the budget, and one that stacks four experts.
OVERSIZED = [
    {
        "shapes": [[20, 6], [4, 5, 3]],
        "role": "sampled",
        "modules": ["wide", [f"expert.{number}" for number in range(4)]],
        "layers": ["0", "0"],
    }
]
CONFIGURATIONS = {
    "default": {"groups": LAYERS, "dtype": "float32", "options": {"delta": 0.5}},
    "int8, split": {
        "groups": LAYERS,
        "dtype": "bfloat16",
        "options": {"delta": 0.4, "state_dtype": "int8", "param_precision": "split"},
    },
    "bf16, master": {
        "groups": LAYERS,
        "dtype": "bfloat16",
        "options": {"delta": 0.5, "state_dtype": "bf16", "param_precision": "master"},
    },
    "oversized": {"groups": OVERSIZED, "dtype": "float32", "options": {"delta": 0.3}, "oversized": "split"},
    "lisa": {"groups": LAYERS, "dtype": "float32", "options": {"delta": 0.6}, "preset": "lisa"},
}


def build(case: dict, backend: str) -> tuple[list[nn.Parameter], MISA]:
    """Construct what a case describes, with weights of zeros."""
    groups = copy.deepcopy(case["groups"])
    for group in groups:
        dtype = getattr(torch, case["dtype"])
        group["params"] = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in group.pop("shapes")]
    options = {"inner_steps": 4, "lr": 3e-2, "weight_decay": 0.1, "seed": case["seed"], "backend": backend}
    options |= case["options"]
    if "preset" in case:
        options = {"lisa": lisa}[case["preset"]](**options)
    if "oversized" in case:
        options["sampler"] = ImportanceSampler(oversized=case["oversized"])
    with warnings.catch_warnings():
        # It says at construction what it cuts.
        warnings.filterwarnings("ignore", ".*row blocks")
        optimizer = MISA(groups, **options)
    return [param for group in groups for param in group["params"]], optimizer


def fractions(random: np.random.RandomState, shape: torch.Size) -> torch.Tensor:
    """Return numbers that bfloat16 holds exactly, in [-2, 2]."""
    return torch.from_numpy(random.randint(-128, 129, size=tuple(shape))) / 64


def train(params: list[nn.Parameter], optimizer: MISA, seed: int, start: int, steps: int) -> None:
    """Take steps; the gradients of one depend on its number alone, and now and then there is none."""
    for step in range(start, start + steps):
        random = np.random.RandomState(1000 * seed + step)
        for number, param in enumerate(params):
            grad = fractions(random, param.shape) / 2 ** (number % 4)
            if param.requires_grad and (step + number) % 7:
                param.grad = grad.to(param.dtype)
        optimizer.step()
        optimizer.zero_grad()


def reached(params: list[nn.Parameter], optimizer: MISA) -> dict:
    """Return weights, position and a checksum of all else that is saved of each parameter."""
    saved = optimizer.state_dict()
    digest = hashlib.sha256()
    for index, own in sorted(saved["state"].items()):
        for name, value in sorted(own.items()):
            value = value.contiguous()
            digest.update(f"{index} {name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    position = {name: saved["param_groups"][0][name] for name in NUMBERS}
    return {"weights": weights_of(params), "position": position, "sha256": digest.hexdigest()}


def weights_of(params: list[nn.Parameter]) -> torch.Tensor:
    """Return all weights in one vector, a copy."""
    return torch.cat([param.detach().reshape(-1) for param in params])


def set_weights(params: list[nn.Parameter], weights: torch.Tensor) -> None:
    """Write all weights from one vector."""
    with torch.no_grad():
        for param, part in zip(params, weights.split([param.numel() for param in params]), strict=True):
            param.copy_(part.view_as(param))


def resumed(case: dict, backend: str) -> dict:
    """Return what a case reaches that goes on from what was saved."""
    params, optimizer = build(case, backend)
    set_weights(params, case["weights"])
    optimizer.load_state_dict(case["state"])
    train(params, optimizer, case["gradients"], case["before"], case["after"])
    return reached(params, optimizer)


def record() -> None:
    """Write the file, with the package that is imported."""
    torch.set_num_threads(1)
    cases = {}
    for number, (name, configuration) in enumerate(CONFIGURATIONS.items()):
        case = configuration | {"seed": 6 + number, "gradients": 20 + number, "before": BEFORE, "after": AFTER}
        params, optimizer = build(case, "reference")
        random = np.random.RandomState(case["seed"])
        set_weights(params, torch.cat([fractions(random, param.shape).reshape(-1) for param in params]))
        train(params, optimizer, case["gradients"], 0, BEFORE)
        case |= {"weights": weights_of(params), "state": optimizer.state_dict()}
        # Without an interruption; the library, which sums norms otherwise, goes on from the same state.
        train(params, optimizer, case["gradients"], BEFORE, AFTER)
        case["reached"] = {"reference": reached(params, optimizer), "cpu": resumed(case, "cpu")}
        cases[name] = case
    folder = Path(misa_kernels.__file__).parent
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()
    FILE.parent.mkdir(exist_ok=True)
    torch.save({"commit": commit, "version": misa_kernels.__version__, "cases": cases}, FILE)
    print(f"{FILE}: {FILE.stat().st_size} bytes, written by {folder} at {commit}")


@pytest.fixture(scope="module")
def cases() -> dict:
    return torch.load(FILE, weights_only=True)["cases"]


def test_the_file_holds_what_it_is_to_hold(cases):
    assert list(cases) == list(CONFIGURATIONS)
    position = cases["default"]["state"]["param_groups"][0]
    # What 0.1 said of its sampler.
    assert "first_visits=None, " in position["sampler"]
    assert (position["round"], position["round_step"]) == (3, 2)
    keys = {name: {key for own in case["state"]["state"].values() for key in own} for name, case in cases.items()}
    assert {"exp_avg.0", "exp_avg.1", "exp_avg_sq.1"} <= keys["oversized"]
    assert {"exp_avg_scale", "residual"} <= keys["int8, split"]
    assert "master" in keys["bf16, master"]
    for case in cases.values():
        assert not any(torch.equal(case["weights"], end["weights"]) for end in case["reached"].values())


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_state_of_before_goes_on_bit_by_bit(name, backend, cases):
    if backend == "cpu" and native.unusable("cpu") is not None:
        pytest.skip("the library for CPUs was not built")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resumed(cases[name], backend)
    expected = cases[name]["reached"][backend]
    assert found["position"] == expected["position"]
    words = [each["weights"].view(torch.uint8) for each in (found, expected)]
    assert found["weights"].dtype == expected["weights"].dtype and torch.equal(*words)
    assert found["sha256"] == expected["sha256"]


if __name__ == "__main__":
    record()
