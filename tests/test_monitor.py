"""Is what the monitor shows of modules and rounds what happened, and do its tables say the same in every form?"""

import csv
import json

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from misa_kernels import MISA, ImportanceSampler, UniformSampler, authors, param_groups
from misa_kernels.monitor import Part

COLUMNS = ["module", "layer", "active", "importance", "probability", "times_sampled", "last_round", "age"]


def weights_of(optimizer):
    return [
        np.concatenate([b.param.detach().double().flatten()[b.start : b.stop].numpy() for b in module.blocks])
        for module in optimizer.modules
    ]


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


# What rounding moments to 8 bits after the step leaves of the update that was made of them before.
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-4),
        ({"backend": "reference"}, 1e-4),
        ({"lr": torch.tensor(2e-3), "keep_states": "none"}, 1e-4),
        ({"state_dtype": "int8"}, 0.05),
    ],
    ids=["default", "reference", "lr tensor", "int8"],
)
def test_update_ratio_is_how_far_the_weights_moved_in_the_last_step(options, tolerance):
    model = tiny.build()
    groups = param_groups(model, "pretrain")
    # Two learning rates, so that one taken for the other would show.
    sampled = next(group for group in groups if group["role"] == "sampled")
    half = len(sampled["params"]) // 2
    parts = [
        {key: value[cut] if isinstance(value, list) else value for key, value in sampled.items()} | {"lr": lr}
        for cut, lr in ((slice(None, half), 1e-3), (slice(half, None), 4e-3))
    ]
    groups = [group for group in groups if group is not sampled] + parts
    optimizer = MISA(groups, delta=0.4, inner_steps=3, weight_decay=0.0, **options)
    for step in range(12):
        active, before = optimizer.active, weights_of(optimizer)
        tiny.train(model, optimizer, 1, step)
        if step % 3 == 2:
            after, ended = weights_of(optimizer), optimizer.monitor.rounds[-2]
            expected = [rms(after[i] - before[i]) / rms(after[i]) for i in active]
            np.testing.assert_allclose(ended.update_ratio, expected, rtol=tolerance)
            assert ended.update_ratio.min() > 0 and list(ended.active) == active


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_large_tensors_are_measured_in_pieces_and_modules_of_several_tensors_as_one(monkeypatch, backend):
    monkeypatch.setattr("misa_kernels.kernels.plain.PIECE", 256)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(n)) for n in (1000, 7, 130, 1, 4097)]
    groups = [{"params": params, "role": "sampled", "modules": ["a", "b", "a", "b", "c"]}]
    optimizer = MISA(groups, delta=1.0, inner_steps=2, weight_decay=0.0, sampler=UniformSampler(), backend=backend)
    for _ in range(2):
        before = weights_of(optimizer)
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    after = weights_of(optimizer)
    expected = [rms(y - x) / rms(y) for x, y in zip(before, after, strict=True)]
    np.testing.assert_allclose(optimizer.monitor.rounds[0].update_ratio, expected, rtol=1e-4)


def test_norms_and_ages_are_those_of_the_gradients_given():
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    for options, mean in (({}, np.sqrt((9 + 25) / 2)), ({"sampler": authors()["sampler"]}, (3 + 5) / 2)):
        optimizer = MISA([{"params": params, "role": "sampled"}], delta=1.0, inner_steps=2, **options)
        for norm in (3.0, 5.0):
            params[0].grad = torch.full((4, 4), norm / 4)
            params[1].grad = torch.full((4, 4), norm / 8) if norm == 3.0 else None
            optimizer.step()
            # Written down without a step's end: read from the optimizer.
            assert optimizer.monitor.table()["age"].tolist()[:2] == [1 + (norm == 5.0), 1]
        ended = optimizer.monitor.rounds[0]
        np.testing.assert_allclose(ended.grad_norm, [mean, 1.5, np.nan], rtol=1e-6)
        assert ended.age.tolist() == [2, 1, 0] and np.isnan(ended.update_ratio[2])
        total = optimizer.monitor.history()["grad_norm"]
        assert total[0] == pytest.approx(np.hypot(mean, 1.5)) and np.isnan(total[1])
        optimizer.release()
        assert not optimizer.monitor.table()["age"].any()


def test_table_counts_what_was_drawn_and_survives_a_state_dict():
    model = tiny.build()
    optimizer = MISA(param_groups(model), delta=0.3, inner_steps=2)
    tiny.train(model, optimizer, 11)
    seen, table = list(optimizer.monitor.rounds), optimizer.monitor.table()
    assert list(table)[:8] == COLUMNS and {len(column) for column in table.values()} == {28}
    for i, module in enumerate(optimizer.modules):
        rounds = [record.round for record in seen if i in record.active]
        assert (table["module"][i], table["layer"][i]) == (module.name, module.layer)
        assert table["times_sampled"][i] == len(rounds)
        assert table["last_round"][i] == max(rounds, default=-1)
        assert table["active"][i] == (i in optimizer.active)
        ended = [record for record in seen[:-1] if i in record.active]
        norm = ended[-1].grad_norm[ended[-1].active.index(i)] if ended else np.nan
        np.testing.assert_equal(table["grad_norm"][i], norm)
        own = optimizer.state[module.blocks[0].param]
        assert table["age"][i] == int(own["age"])
    assert table["age"].max() > 2 and (table["age"][optimizer.active] > 0).all()

    other = tiny.build()
    resumed = MISA(param_groups(other), delta=0.3, inner_steps=2)
    resumed.load_state_dict(optimizer.state_dict())
    # Before a step, and after one: from what was loaded, and from the arena.
    again = resumed.monitor.table()
    for name in COLUMNS:
        np.testing.assert_array_equal(again[name], table[name], err_msg=name)
    # The round that was drawn at construction and never trained is no part of the run.
    assert [record.round for record in resumed.monitor.rounds] == [5]
    tiny.train(other, resumed, 1, start=11)
    assert [record.round for record in resumed.monitor.rounds] == [5, 6]


def test_the_table_tells_where_slices_lie():
    model = tiny.build(hidden=48)
    sampler = UniformSampler(granularity="slice", slices="all", hold_rounds=1)
    optimizer = MISA(param_groups(model), delta=0.06, inner_steps=2, sampler=sampler)
    tiny.train(model, optimizer, 5)
    monitor, table = optimizer.monitor, optimizer.monitor.table()
    axes = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 1}
    for i, name in enumerate(monitor.names):
        matrix, _, ends = name.removesuffix("]").rpartition("[")
        axis = axes[matrix.rpartition(".")[2]]
        first, last = map(int, ends.removeprefix(":, ").split(":"))
        assert ends.startswith(":, ") == (axis == 1)
        size = model.get_parameter(f"{matrix}.weight").shape[axis]
        assert monitor.parts[i] == Part(matrix, axis, first, last, size)
        assert (table["first"][i], table["last"][i]) == (first, last)
    trained = {name: place for name, p in model.named_parameters() if (place := optimizer.trained.get(p)) is not None}
    rows = zip(table["module"], table["first"], table["last"], table["active"], strict=True)
    assert {(name.rpartition("[")[0] + ".weight", a, b) for name, a, b, active in rows if active} == {
        (name, place.first, place.last) for name, place in trained.items()
    }
    assert len(monitor.names) > 300 and len(str(monitor).splitlines()) == 22
    assert str(monitor).endswith(f"and {len(monitor.names) - 20} more, {len(trained) - 20} of them active")
    modules = MISA(param_groups(tiny.build()), delta=0.5).monitor
    assert modules.parts == [] and {*modules.table()["first"], *modules.table()["last"]} == {-1}


def test_history_holds_the_records():
    model = tiny.build()
    optimizer = MISA(
        param_groups(model, "pretrain"), delta=0.3, inner_steps=3, sampler=ImportanceSampler(depth_window=2)
    )
    tiny.train(model, optimizer, 14)
    history, rounds = optimizer.monitor.history(), optimizer.monitor.rounds
    assert {len(column) for column in history.values()} == {5}
    assert history["round"].tolist() == [0, 1, 2, 3, 4] and history["first_step"].tolist() == [0, 3, 6, 9, 12]
    for name in ("perplexity", "active_fraction", "gradient_fraction", "backward_depth"):
        assert history[name].tolist() == [getattr(record, name) for record in rounds], name
    assert history["modules"][2].split("; ") == [optimizer.monitor.names[i] for i in rounds[2].active]
    assert history["update_ratio"][1] == np.median(rounds[1].update_ratio)
    unknown = MISA([nn.Parameter(torch.ones(4, 4)) for _ in range(4)], delta=0.5)
    assert np.isnan(unknown.monitor.history()["backward_depth"]).all()


def test_tables_are_written_by_suffix(tmp_path):
    model = tiny.build()
    optimizer = MISA(param_groups(model), delta=0.3, inner_steps=2)
    tiny.train(model, optimizer, 5)
    optimizer.monitor.save(tmp_path / "rounds.csv")
    table = optimizer.monitor.table()
    optimizer.monitor.save(str(tmp_path / "modules.jsonl"), table)

    with (tmp_path / "rounds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    history = optimizer.monitor.history()
    assert list(rows[0]) == list(history) and len(rows) == 3
    assert [float(row["perplexity"]) for row in rows] == history["perplexity"].tolist()
    assert rows[2]["grad_norm"] == "" and float(rows[1]["grad_norm"]) == history["grad_norm"][1]
    lines = [json.loads(line) for line in (tmp_path / "modules.jsonl").read_text().splitlines()]
    assert [line["module"] for line in lines] == optimizer.monitor.names
    missing = [line["importance"] is None for line in lines]
    assert missing == np.isnan(table["importance"]).tolist() and any(missing)
    assert [line["active"] for line in lines] == table["active"].tolist()

    with pytest.raises(ValueError, match=r"rounds\.xlsx' ends in '\.xlsx' and must end in '\.csv' or '\.jsonl'$"):
        optimizer.monitor.save(tmp_path / "rounds.xlsx")
    assert not (tmp_path / "rounds.xlsx").exists()


def test_a_printed_optimizer_shows_the_active_and_the_most_important_modules():
    model = tiny.build(layers=6)
    optimizer = MISA(param_groups(model), delta=0.2, inner_steps=2)
    tiny.train(model, optimizer, 41)
    head, columns, *lines, rest = str(optimizer).splitlines()
    assert head == repr(optimizer) and columns.split()[:3] == ["module", "importance", "probability"]
    names = [line[2:].split()[0] for line in lines]
    active = {optimizer.modules[i].name for i in optimizer.active}
    assert (
        {name for name, line in zip(names, lines, strict=True) if line[0] == "*"} == active == {*names[: len(active)]}
    )
    scores = dict(zip(optimizer.monitor.names, optimizer.monitor.current.importance, strict=True))
    most = sorted({*scores} - active, key=lambda name: -np.nan_to_num(scores[name], nan=-1.0))
    assert names[len(active) :] == most[: 20 - len(active)]
    assert rest == "and 22 less important"
    # Every module active: the rest is, too.
    everything = MISA(param_groups(tiny.build(layers=6)), delta=1.0)
    assert str(everything).endswith("and 22 more, 22 of them active")
    assert len({len(line) for line in lines}) == 1
