"""Do compiled models train as eager ones do, with few graphs, and is there a warning where these do not level off?"""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest
import torch
import torch._dynamo
from tiny import batch, build, loss_of
from torch._dynamo.backends.debugging import aot_eager

from misa_kernels import MISA, ImportanceSampler, UniformSampler, param_groups

# A layer without an active module, or with one of its seven, after an input that requires gradients or not.
TRAINING_GRAPHS = 2 * (1 + 7)


@pytest.fixture
def dynamo():
    """Dynamo without what other tests left in it, and its limit restored afterwards."""
    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    yield torch._dynamo.config
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self, compiler) -> None:
        self.compiler, self.graphs = compiler, 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.compiler(graph, inputs)


def keep(graph, inputs):
    """Compile to the graph itself: what is counted is dynamo's work, and this is the fastest way to it."""
    return graph.forward


def prepare(how: str, sampler, backend, layers: int = 4, delta: float = 0.1):
    """A model, what is called in its place, and its optimizer with rounds of one step."""
    model = build(layers)
    compiled = model
    if how == "layers":
        for block in model.blocks:
            block.compile(backend=backend)
    elif how == "wrapped layers":
        for number, block in enumerate(model.blocks):
            model.blocks[number] = torch.compile(block, backend=backend)
    elif how == "whole":
        compiled = torch.compile(model, backend=backend)
    optimizer = MISA(param_groups(model), lr=1e-3, delta=delta, inner_steps=1, sampler=sampler)
    return compiled, optimizer


def train(model, optimizer, rounds: int, evaluate: bool = False) -> tuple[list[float], list[int]]:
    """Train so many rounds of a step; return the losses and the steps at which a warning about torch.compile came."""
    losses, warned = [], []
    for step in range(rounds):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = loss_of(model, batch(step))
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        warned += [step + 1 for warning in caught if "torch.compile has compiled" in str(warning.message)]
        if evaluate:
            with torch.no_grad():
                loss_of(model, batch(step))
    return losses, warned


@pytest.mark.slow
def test_layers_level_off_at_sixteen_graphs_and_train_as_eager(dynamo, caplog):
    dynamo.recompile_limit = 32
    sampler = ImportanceSampler(max_per_layer=1)
    counting = Counting(aot_eager)
    with caplog.at_level(logging.WARNING):
        compiled, warned = train(*prepare("layers", sampler, counting), rounds=100)
    expected, _ = train(*prepare("eager", sampler, None), rounds=100)
    assert TRAINING_GRAPHS - 3 <= counting.graphs <= TRAINING_GRAPHS
    assert not warned
    assert "recompile_limit" not in caplog.text
    # aot_eager runs the same operations; LayerNorm and silu are decomposed, and round otherwise.
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(expected), rtol=2e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "sampler", "most"),
    [
        # A third case for each: no gradients at all.
        ("layers", ImportanceSampler(max_per_layer=1), 3 * (1 + 7)),
        pytest.param("wrapped layers", UniformSampler(max_per_layer=1), 3 * (1 + 7), marks=pytest.mark.slow),
        # All of a layer is active or nothing is.
        ("layers", UniformSampler(granularity="layer"), 3 * 2),
    ],
)
def test_evaluation_adds_a_graph_a_set_and_no_warning(dynamo, caplog, how, sampler, most):
    dynamo.recompile_limit = 32 if most > 8 else 8
    counting = Counting(keep)
    delta = 0.1 if sampler.granularity == "module" else 0.25
    with caplog.at_level(logging.WARNING):
        _, warned = train(*prepare(how, sampler, counting, delta=delta), rounds=40, evaluate=True)
    assert most - 5 <= counting.graphs <= most
    assert not warned
    assert "recompile_limit" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "sampler", "layers", "rounds"),
    [
        # A graph a round.
        ("whole", ImportanceSampler(), 4, 12),
        # A layer by itself would need six graphs at most, and so had room below the limit.
        pytest.param("whole", UniformSampler(granularity="layer"), 10, 30, marks=pytest.mark.slow),
        # Several graphs a round.
        ("layers", ImportanceSampler(), 4, 12),
        ("layers", ImportanceSampler(max_per_layer=1), 4, 12),
    ],
)
def test_one_warning_before_dynamo_gives_up(dynamo, caplog, how, sampler, layers, rounds):
    dynamo.recompile_limit = 8
    counting = Counting(keep)
    model, optimizer = prepare(how, sampler, counting, layers)
    graphs_when_warned = []
    with caplog.at_level(logging.WARNING):
        for _ in range(rounds):
            if train(model, optimizer, 1)[1]:
                graphs_when_warned.append(counting.graphs)
                assert "recompile_limit" not in caplog.text
    assert len(graphs_when_warned) == 1 and graphs_when_warned[0] < 8
    # It was right.
    assert counting.graphs == 8
    assert "hit config.recompile_limit" in caplog.text


def test_warning_names_the_frame_the_numbers_and_the_remedy(dynamo):
    torch._dynamo.config.recompile_limit = 4
    model, optimizer = prepare("whole", ImportanceSampler(), keep)
    with pytest.warns(UserWarning, match="torch.compile has compiled") as caught:
        for step in range(4):
            loss_of(model, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    (message,) = (str(warning.message) for warning in caught if "torch.compile" in str(warning.message))
    assert "forward (" in message and "tiny.py" in message
    assert " 3 times in 3 rounds" in message and "recompile_limit=4" in message
    assert "ImportanceSampler(max_per_layer=1)" in message and "recompile_limit = 32" in message


def test_what_recompiles_for_other_reasons_is_none_of_our_business(dynamo):
    model, optimizer = prepare("eager", ImportanceSampler(), None)
    weight = torch.ones(3)
    shift = torch.compile(lambda x, n: x * weight + n.count("a"), backend=keep)
    warned = []
    for step in range(8):
        # Another string each time: a graph each.
        shift(torch.ones(3), "a" * step)
        warned += train(model, optimizer, 1)[1]
    assert not warned


def test_dynamo_is_not_imported_for_the_look_at_it():
    code = """
import sys, numpy
from misa_kernels.outside.recompiles import Recompiles
before = "torch._dynamo" in sys.modules
watch = Recompiles(numpy.arange(4), None)
watch.check(1)
print(before, "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
