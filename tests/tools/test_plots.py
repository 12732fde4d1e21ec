"""Do the figures show what the monitor recorded: the right numbers at the right places, with labels that tell them?"""

import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from misa_kernels import MISA, UniformSampler, lisa, param_groups
from misa_kernels.monitor import Part, Round
from misa_kernels.tools import plots
from misa_kernels.tools.grids import kinds_of

if importlib.util.find_spec("matplotlib") is None and not os.environ.get("CI"):
    pytest.skip("needs matplotlib", allow_module_level=True)

KINDS = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]


def record(number, active, importance, norms):
    blank = np.zeros(len(importance))
    ended = {"age": np.ones(len(active), dtype=np.int64), "grad_norm": np.array(norms)}
    return Round(number, 5 * number, active, importance, blank, 1.0, 0.1, 0.1, 0.0, 0.1, 2, **ended)


@pytest.fixture
def monitor():
    """Two layers of three kinds, out of order, in rounds 3, 4 and 6: 5 was lost when a state dict was loaded."""
    names = [f"layers.{layer}.{kind}" for layer in (1, 0) for kind in KINDS]
    score = np.array([np.nan, 0.0, 1e-4, 1e-2, 1e-1, 1.0])
    rounds = [
        record(3, (0, 5), np.full(6, np.nan), [1.0, 4.0]),
        record(4, (1, 5), score, [2.0, 6.0]),
        record(6, (2, 5), score * 2, [np.nan, 8.0]),
    ]
    layers = ["layers.0", "layers.1"]
    return SimpleNamespace(names=names, layer=np.repeat([1, 0], 3), layers=layers, rounds=rounds, parts=[])


# Rows from the bottom: the last kind first, in it layer 0 first.
ROWS = [5, 2, 4, 1, 3, 0]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_importance_stands_in_the_row_of_its_module_and_the_column_of_its_round(monitor):
    figure = plots.importance(monitor)
    axes, bar = figure.axes
    cells = axes.images[0].get_array()
    assert cells.shape == (6, 4) and axes.images[0].get_extent() == [2.5, 6.5, -0.5, 5.5]
    expected = np.array([monitor.rounds[1].importance[i] for i in ROWS])
    np.testing.assert_array_equal(cells[:, 1].filled(np.nan), np.where(expected > 0, expected, np.nan))
    # No score in round 3, no record of round 5.
    assert cells.mask[:, [0, 2]].all()
    dots = {tuple(point) for point in axes.lines[-1].get_xydata().tolist()}
    assert dots == {(r.round, ROWS.index(i)) for r in monitor.rounds for i in r.active}
    assert texts(axes) == ["down_proj", "k_proj", "q_proj"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"] * 3
    assert axes.get_xlabel() == "round" and "‖g‖²" in bar.get_ylabel() and "(dots)" in axes.get_title()
    assert axes.images[0].norm.vmin == 1e-4 and type(axes.images[0].norm).__name__ == "LogNorm"


def test_dots_are_left_out_where_they_would_run_together(monitor):
    monitor.rounds = [record(n, (0,), np.ones(6), [1.0]) for n in range(1000)]
    axes = plots.importance(monitor).axes[0]
    assert "dots" not in axes.get_title() and len(axes.lines) == 6
    assert axes.images[0].get_interpolation() == "auto" and len(axes.get_xticks()) < 15


def test_selections_have_the_colour_of_their_share(monitor):
    cells = plots.selections(monitor).axes[0].images[0].get_array()
    expected = np.full((6, 4), np.nan)
    for column, round_ in ((0, 0), (1, 1), (3, 2)):
        for i in monitor.rounds[round_].active:
            expected[ROWS.index(i), column] = 100.0 if i == 5 else 100 / 3
    np.testing.assert_allclose(cells.filled(np.nan), expected)


def test_gradient_norms_are_medians_by_kind_over_the_layers(monitor):
    axes = plots.gradient_norms(monitor).axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    # What had no gradient is left out.
    assert lines == {"q_proj": [[1, 1.0]], "k_proj": [[1, 2.0]], "down_proj": [[0, 6.0]]}
    assert axes.get_yscale() == "log" and all(tick == round(tick) for tick in axes.get_xticks())
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 3


def test_rounds_are_marked_over_the_loss(monitor):
    monitor.rounds = [record(n, (0,), np.ones(6), [1.0]) for n in range(9)]
    loss = np.linspace(3, 1, 37).tolist()
    axes = plots.losses(monitor, loss).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [
        [step, value] for step, value in zip(range(1, 38), loss, strict=True)
    ]
    # Round 8 would begin with step 41.
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_linewidth() == 0.7]
    assert marks == [5 * n + 0.5 for n in range(8)]
    assert [text.get_text() for text in axes.child_axes[0].get_xticklabels()] == [str(n) for n in range(8)]
    mean = plots.losses(monitor, [2.0] * 50 + [4.0] * 50).axes[0].lines[1].get_xydata()
    assert mean[[0, -1]].tolist() == [[2, 2.0], [100, 4.0]]
    assert mean[49].tolist() == [51, 3.0]


def test_memory_is_stacked_in_a_unit_that_suits_it():
    parts = {"AdamW": {"weights": 2**30, "moments": 2**31}, "MISA": {"weights": 2**30, "masters": 2**29}}
    axes = plots.memory(parts).axes[0]
    bars = {c.get_label(): [(bar.get_x(), bar.get_width()) for bar in c] for c in axes.containers}
    assert bars == {"weights": [(0, 1), (0, 1)], "moments": [(1, 2), (1, 0)], "masters": [(3, 0), (1, 0.5)]}
    assert axes.get_xlabel() == "memory in GiB" and texts(axes) == ["3.0", "1.5"]
    room = plots.memory(parts, room_bytes=2**31).axes[0].lines[0]
    assert (room.get_xdata(), room.get_label()) == ([2, 2], "room on the card, 2.0")
    for size, unit in ((3 * 2**20, "MiB"), (5000, "KiB"), (700, "bytes")):
        assert plots.memory({"MISA": {"weights": size}}).axes[0].get_xlabel() == f"memory in {unit}"


@pytest.fixture
def sliced():
    """Two layers; of q three slices of rows that overlap, of down two of columns in layer 1 and a narrow one in 0."""
    parts = [Part("layers.0.q", 0, *ends, 10) for ends in ((0, 4), (3, 7), (6, 10))]
    parts += [Part("layers.1.q", 0, *ends, 10) for ends in ((0, 4), (3, 7), (6, 10))]
    parts += [Part("layers.1.down", 1, 0, 2, 4), Part("layers.1.down", 1, 2, 4, 4)]
    parts += [Part("layers.0.down", 1, 50_000, 50_001, 90_000)]
    names = [f"{part.matrix}[{':, ' * part.axis}{part.first}:{part.last}]" for part in parts]
    score = np.array([1e-3, 3e-3, np.nan, 1e-2, np.nan, np.nan, 1.0, 0.0, np.nan])
    rounds = [
        record(3, (0, 3, 6, 8), np.full(9, np.nan), np.ones(4)),
        record(4, (1, 3, 7, 8), score, np.ones(4)),
        record(6, (0, 5, 7, 8), score, np.ones(4)),
    ]
    layer, layers = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0]), ["layers.0", "layers.1"]
    return SimpleNamespace(names=names, layer=layer, layers=layers, rounds=rounds, parts=parts, current=rounds[-1])


def lines_at(cells, places, size):
    """Return what a row of cells shows in the middle of some columns or rows; what is masked as NaN."""
    return cells.filled(np.nan)[[int((place + 0.5) / size * len(cells)) for place in places]].tolist()


def test_of_a_run_in_slices_each_matrix_shows_what_of_it_was_trained(sliced):
    axes, bar = plots.selections(sliced).axes
    cells = axes.images[0].get_array()
    assert axes.images[0].get_extent() == [0, 100, -0.5, 3.5] and texts(axes) == ["down\ncolumns", "q\nrows"]
    down_0, down_1, q_0, q_1 = cells
    nan = np.nan
    np.testing.assert_equal(lines_at(q_0, range(10), 10), [2, 2, 2, 3, 1, 1, 1, nan, nan, nan])
    np.testing.assert_equal(lines_at(q_1, range(10), 10), [2, 2, 2, 2, nan, nan, 1, 1, 1, 1])
    np.testing.assert_equal(lines_at(down_1, range(4), 4), [1, 1, 2, 2])
    # One column of 90,000 is seen, where it lies and nowhere else.
    assert down_0.compressed().tolist() == [3] and np.flatnonzero(~down_0.mask) == int(len(down_0) * 5 / 9)
    now = {tuple(line.get_xdata()): line.get_ydata()[0] for line in axes.lines if len(set(line.get_xdata())) == 2}
    now = {tuple(np.round(ends, 6)): row for ends, row in now.items() if ends != (0, 1)}
    narrow = (round(500 / 9, 6), round(50_001 / 900, 6))
    assert now == {(0, 40): 2, (60, 100): 3, (50, 100): 1, narrow: 0}
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"] * 2
    assert "of 3" in bar.get_ylabel() and "(lines)" in axes.get_title() and "%" in axes.get_xlabel()


def test_importance_of_slices_is_that_of_now_and_a_mean_where_they_overlap(sliced):
    cells = plots.importance(sliced).axes[0].images[0].get_array()
    nan = np.nan
    np.testing.assert_allclose(lines_at(cells[2], range(10), 10), [1e-3] * 3 + [2e-3] + [3e-3] * 3 + [nan] * 3)
    # A score of 0 has no colour in a logarithm.
    np.testing.assert_allclose(lines_at(cells[1], range(4), 4), [1, 1, nan, nan])
    assert cells.mask[0].all()


def test_slices_that_were_drawn_four_times_anew_are_drawn(tmp_path):
    model = tiny.build(hidden=48)
    sampler = UniformSampler(granularity="slice", slices="all", hold_rounds=1)
    optimizer = MISA(param_groups(model), delta=0.1, inner_steps=2, sampler=sampler)
    tiny.train(model, optimizer, 9)
    trained = {}
    for record in optimizer.monitor.rounds:
        for part in (optimizer.monitor.parts[number] for number in record.active):
            trained.setdefault(part.matrix, np.zeros(part.size))[part.first : part.last] += 1
    axes = plots.selections(optimizer.monitor).axes[0]
    assert len(axes.images[0].get_array()) == len(trained) == 28
    shown = {text.partition("\n")[0] for text in texts(axes)}
    assert shown == {"down", "up", "gate", "o", "v", "k", "q"}
    # From the bottom: down in layer 0.
    expected = trained["blocks.0.down"]
    found = lines_at(axes.images[0].get_array()[0], range(48), 48)
    np.testing.assert_equal(found, np.where(expected > 0, expected, np.nan))
    for draw in (plots.importance, plots.selections, plots.gradient_norms):
        draw(optimizer.monitor).savefig(tmp_path / f"{draw.__name__}.png")


@pytest.mark.parametrize("granularity", ["module", "layer"])
def test_a_real_run_is_drawn_into_the_axes_given(tmp_path, granularity):
    from matplotlib.figure import Figure

    model = tiny.build()
    options = lisa(delta=0.3) if granularity == "layer" else {"delta": 0.3}
    optimizer = MISA(param_groups(model), inner_steps=2, **options)
    loss = tiny.train(model, optimizer, 7)
    figure = Figure(figsize=(16, 10), layout="constrained")
    axes = figure.subplots(2, 2).flat
    drawn = [
        draw(optimizer.monitor, axes=at) for draw, at in zip((plots.importance, plots.selections), axes, strict=False)
    ]
    drawn += [plots.gradient_norms(optimizer.monitor, axes[2]), plots.losses(optimizer.monitor, loss, axes[3])]
    assert all(one is figure for one in drawn)
    figure.savefig(tmp_path / "run.png")
    kinds = ["layer"] if granularity == "layer" else ["down", "up", "gate", "o", "v", "k", "q"]
    assert texts(axes[0]) == kinds and {line.get_label() for line in axes[2].lines} == {*kinds}


@pytest.mark.filterwarnings("ignore:MISA samples")
def test_a_run_without_layers_or_rounds_is_drawn(tmp_path):
    optimizer = MISA([nn.Parameter(torch.ones(4, 4)) for _ in range(4)], delta=0.5)
    for draw in (plots.importance, plots.selections, plots.gradient_norms):
        draw(optimizer.monitor).savefig(tmp_path / f"{draw.__name__}.png")
    plots.losses(optimizer.monitor, []).savefig(tmp_path / "losses.png")


def test_kinds_that_share_their_last_name_are_told_apart():
    names = ["layers.0.mlp.up", "layers.0.experts.0.up", "layers.0.experts.11.up", "layers.0.mlp.up[rows 0:8]"]
    monitor = SimpleNamespace(names=names, layer=np.zeros(4, dtype=int), layers=["layers.0"])
    assert kinds_of(monitor) == ["mlp.up", "experts.#.up", "experts.#.up", "mlp.up"]
    monitor.names = ["layers.0.mlp.up[:, 8:16]", "layers.0.mlp.up[16:24]", *names[1:3]]
    assert kinds_of(monitor) == ["mlp.up", "mlp.up", "experts.#.up", "experts.#.up"]
