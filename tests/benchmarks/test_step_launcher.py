"""Launches past Triton's JIT: the same call that the JIT would make, on a stub of its driver."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks.step import launcher  # noqa: E402
from misa_kernels import MISA  # noqa: E402
from misa_kernels.kernels import launch  # noqa: E402
from misa_kernels.kernels.table import ROW_COLUMNS  # noqa: E402
from misa_kernels.memory.codec import FORMATS  # noqa: E402
from misa_kernels.memory.storage import KEYS  # noqa: E402

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
STATES = {
    "fp32": ([FP32], {}),
    "master": ([BF16], {}),
    "stochastic": ([BF16], {"param_precision": "stochastic"}),
    "split": ([BF16], {"param_precision": "split"}),
    "bf16": ([BF16], {"state_dtype": "bf16", "param_precision": "split"}),
    "int8": ([BF16], {"state_dtype": "int8"}),
    "fp8": ([FP32], {"state_dtype": "fp8"}),
    "int8+int4": ([BF16], {"state_dtype": "int8+int4", "param_precision": "stochastic"}),
    "three dtypes": ([FP32, BF16, FP16], {}),
}
STEPS = {"plain": {}, "clipped": {"max_grad_norm": 1.0}, "skipping": {"max_grad_norm": 0.5, "skip_nonfinite": True}}
SHAPE, MATRICES = (8, 16), 6


class Comparison:
    """Makes every launch of the step twice, as the round would and through the JIT, and compares the two calls."""

    def __init__(self, stub):
        self.stub, self.direct, self.seen = stub, 0, []
        self.original = launch.TritonTable._launch
        self.run = launch.kernels.step_kernel.run

    def launch_both(self, table, *args, **options):
        ours, compiled_anew = self.call(table, *args, **options)
        kept, table._compiled = table._compiled, {}
        expected, through_jit = self.call(table, *args, **options)
        table._compiled = kept
        assert through_jit and same(ours, expected)
        self.direct += not compiled_anew
        self.seen.append(ours)

    def call(self, table, *args, **options):
        self.stub.calls.clear()
        with patch.object(launch.kernels.step_kernel, "run", side_effect=self.run) as jit:
            self.original(table, *args, **options)
        (call,) = self.stub.calls
        return call, jit.call_count == 1


def same(a, b):
    """Of objects, the same ones; the kernel is told apart by its metadata, which each variant has its own of."""
    heads = (a.grid, a.stream, a.function) == (b.grid, b.stream, b.function) and a.kernel is b.kernel
    pairs = list(zip(a.arguments, b.arguments, strict=True))
    return heads and all(x is y if isinstance(x, torch.Tensor) else type(x) is type(y) and x == y for x, y in pairs)


@pytest.fixture
def stub():
    with launcher.stubbed(keep=True) as made:
        yield made


@pytest.fixture
def comparison(stub):
    made = Comparison(stub)
    with patch.object(
        launch.TritonTable, "_launch", lambda table, *args, **options: made.launch_both(table, *args, **options)
    ):
        yield made


def matrices(dtypes, count=MATRICES):
    return [nn.Parameter(torch.ones(SHAPE, dtype=dtypes[i % len(dtypes)])) for i in range(count)]


def optimizer_of(params, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MISA(params, **{"delta": 1.0, "inner_steps": 100, "backend": "triton"} | options)


def gradient(param, shift):
    """A gradient that begins `shift` elements after an address on 16 bytes."""
    return torch.ones(param.numel() + shift, dtype=param.dtype)[shift:].view(param.shape)


def walk(optimizer, params, shifts):
    """A step for each number, by which the gradient of the first matrix is off its alignment; None for no gradient."""
    for shift in shifts:
        for number, param in enumerate(params):
            shifted = 0 if number else shift
            param.grad = gradient(param, shifted) if param.requires_grad and shifted is not None else None
        optimizer.step()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("state", STATES)
def test_every_variant_is_launched_as_by_the_jit(comparison, state, steps):
    dtypes, options = STATES[state]
    params = matrices(dtypes)
    walk(optimizer_of(params, **options, **STEPS[steps]), params, (0, 0, None, 0))
    launches = len(dtypes) * (1 if steps == "plain" else 2)
    assert (len(comparison.seen), comparison.direct) == (4 * launches, 3 * launches)


def test_a_scaler_of_any_alignment_has_its_own_variant(comparison):
    """Aligned, off by 4 bytes, absent, and another dtype: never the kernel of another."""
    params = matrices([BF16])
    optimizer = optimizer_of(params, max_grad_norm=1.0)
    scales = [None, torch.ones(8)[0], torch.ones(8)[1]]
    for _ in range(2):
        for scale in scales:
            for found in (*scales, torch.ones(8, dtype=torch.float64)[0]):
                optimizer.grad_scale, optimizer.found_inf = scale, found
                walk(optimizer, params, [0])
    assert (len(comparison.seen), comparison.direct) == (48, 24)
    # In the norm launch, and in the update after it.
    assert len({id(call.kernel) for call in comparison.seen}) == 24


def test_the_launches_of_a_clipped_step_have_their_own_variants(comparison):
    params = matrices([BF16])
    optimizer = optimizer_of(params)
    walk(optimizer, params, [0])
    step = optimizer._run.updater._step
    for norm in (1.0, None, 1.0, None):
        step._settings = replace(step._settings, max_grad_norm=norm)
        walk(optimizer, params, [0])
    assert (len(comparison.seen), comparison.direct) == (7, 4)
    assert len({id(call.kernel) for call in comparison.seen}) == 3


def test_gradients_off_their_alignment_have_their_own_variant(comparison):
    params = matrices([BF16])
    walk(optimizer_of(params), params, (0, 1, 0, 3, 8, None, 1))
    assert [call.grid[0] for call in comparison.seen] == [6, 5, 1, 6, 5, 1, 6, 6, 5, 1]
    assert len({id(call.kernel) for call in comparison.seen}) == 2
    assert comparison.direct == 8


def test_a_switch_begins_anew(comparison, stub):
    params = matrices([BF16])
    optimizer = optimizer_of(params, delta=0.5, inner_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        walk(optimizer, params, [0] * 12)
    # The buffers are those of the arena, and the tables those of the round.
    assert len({id(call.kernel) for call in comparison.seen}) == 1
    tables = [id(call.arguments[0]) for call in comparison.seen]
    assert [tables[i : i + 3] for i in range(0, 12, 3)] == [[tables[i]] * 3 for i in range(0, 12, 3)]
    assert comparison.direct == 8


def test_each_device_has_its_own_function(comparison, stub):
    made = []
    for device in (0, 1):
        stub.device = device
        params = matrices([FP32])
        made.append((optimizer_of(params), params))
        walk(*made[-1], (0, 0))
    for device in (1, 0):
        stub.device = device
        walk(*made[device], [0])
    where = [(call.function.split()[-1], call.stream) for call in comparison.seen]
    assert where == [(str(device), 100 + device) for device in (0, 0, 1, 1, 1, 0)]


def test_the_arguments_are_those_that_the_kernel_names(stub):
    params = matrices([BF16], count=3)
    optimizer = optimizer_of(params, state_dtype="int8", max_grad_norm=0.25, skip_nonfinite=True)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    walk(optimizer, params, (0, 0))
    norm, update = (dict(zip(launch.kernels.step_kernel.arg_names, c.arguments, strict=True)) for c in stub.calls[-2:])
    arena, table = optimizer._run.live.arena, optimizer._run.updater._step._table
    for key in KEYS:
        buffer, given = arena.pools[BF16].buffers.get(key), update[f"{key}_ptr"]
        assert given is buffer or given.data_ptr() == buffer.data_ptr(), key
    for name, tensor in {
        "age": table._ages,
        "sq_sum": table.sq_sums,
        "partial": table._partials,
        "arrived": table._arrived,
        "control": table.control,
        "grad_scale": optimizer.grad_scale,
        "found_inf": optimizer.found_inf,
    }.items():
        assert update[f"{name}_ptr"] is tensor, name
    assert update["row_ptr"].data_ptr() + 8 * 3 * ROW_COLUMNS == update["hyper_ptr"].data_ptr()
    assert update["program_ptr"].tolist() == [0, 0, 1, 0, 2, 0]
    numbers = {"first_program": 0, "programs": 3, "max_grad_norm": 0.25, "skip_nonfinite": 1}
    codecs = {"M_CODEC": launch.CODECS.index(FORMATS["int8"]["exp_avg"])}
    codecs["V_CODEC"] = launch.CODECS.index(FORMATS["int8"]["exp_avg_sq"])
    assert numbers.items() <= update.items() and codecs.items() <= update.items() and update["ALIGNED"] is True
    flags = [(call["UPDATE"], call["CONTROLLED"]) for call in (norm, update)]
    assert flags == [(False, False), (True, True)]


def test_profilers_see_every_launch(stub):
    params = matrices([FP32])
    optimizer = optimizer_of(params)
    seen = []
    hook = lambda made: seen.append(made.get()["name"])  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        walk(optimizer, params, (0, 0, 0))
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["step_kernel"] * 3


def test_an_unknown_version_of_triton_goes_through_the_jit(comparison):
    params = matrices([FP32])
    with patch.object(launch.kernels, "LAUNCHES_COMPILED", False):
        walk(optimizer_of(params), params, (0, 0, 0))
    assert (len(comparison.seen), comparison.direct) == (3, 0)


def test_this_version_of_triton_is_known():
    """Else every launch costs ten times as much: look whether `CompiledKernel` is as it was, and raise the limit."""
    assert launch.kernels.LAUNCHES_COMPILED


def test_the_stub_leaves_nothing_behind():
    function = launch.kernels.step_kernel
    before = function.device_caches
    with launcher.stubbed() as stub:
        walk(optimizer_of(params := matrices([FP32])), params, [0])
        assert function.device_caches[0][0] and stub.calls == []
    assert function.device_caches is before
    with pytest.raises((RuntimeError, ValueError)):
        optimizer_of(params)


def test_the_record(tmp_path, capsys):
    with patch.object(launcher, "TENSORS", (3,)):
        assert launcher.main(["--out", str(tmp_path), "--repeats", "2"]) == 0
    record = json.loads((tmp_path / "launcher.json").read_text())
    assert record["host_us"].keys() == {f"3 tensors, {name}" for name in launcher.KINDS}
    for parts in record["host_us"].values():
        assert all(0 < us["p20"] <= us["median"] <= us["p80"] for us in parts.values())
        assert parts["launch"]["median"] < parts["launch through the JIT"]["median"]
    assert "optimizer.step, uploading" in capsys.readouterr().out
