"""Whole iterations: the stage e2e on the CPU, who trains, what is measured, and the model that is timed."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tables import missing

from benchmarks.gpu import stages as gpu
from benchmarks.train import e2e
from benchmarks.train.e2e import Samples, build_model, in_rounds, measure, model_flops, run_turn, summary
from benchmarks.train.llama import Llama
from benchmarks.train.trainers import OURS, PEERS, PLANS, SHAPES

# What users need not have, of which BAdam's collects garbage for a second at every switch.
PACKAGES = {"adamw_8bit": "bitsandbytes", "flashoptim": "flashoptim", "badam_package": "badam"}


def test_shapes_have_their_published_sizes():
    published = {"130m": 134_105_856, "1b": 1_235_814_400, "8b": 8_030_261_248}
    for name, count in published.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in Llama(SHAPES[name]).parameters()) == count


@pytest.mark.parametrize("checkpointing", [False, True])
def test_llama_is_transformers_llama(checkpointing):
    """Loss and every gradient, with the weights carried over by name."""
    transformers = pytest.importorskip("transformers")
    shape = SHAPES["tiny"]
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config)
    ours = Llama(shape, checkpointing)
    ours.load_state_dict({name.removeprefix("model."): p for name, p in theirs.state_dict().items()})
    tokens = torch.randint(shape.vocab, (2, 48))
    expected, loss = theirs(tokens, labels=tokens).loss, ours(tokens)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    gradients = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    for name, param in ours.named_parameters():
        torch.testing.assert_close(param.grad, gradients[name])


def test_chunked_loss_is_the_whole_loss(monkeypatch):
    monkeypatch.setattr("benchmarks.train.llama.LOSS_CHUNK", 7)
    torch.manual_seed(0)
    model = Llama(SHAPES["tiny"])
    tokens = torch.randint(256, (3, 11))
    logits = model.lm_head(model.hidden_states(tokens))
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 256), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(model(tokens), expected)


@pytest.mark.parametrize("lowest", [0, 2, 3])
def test_backward_depth_counts_the_layers_whose_backward_runs(lowest):
    model = Llama(SHAPES["tiny"]).requires_grad_(False)
    model.layers[lowest].mlp.up_proj.requires_grad_(True)
    ran = []
    for layer in model.layers:
        layer.mlp.down_proj.register_full_backward_hook(lambda module, *_: ran.append(module))
    model(torch.randint(256, (1, 8))).backward()
    assert model.backward_depth == len(ran) == 4 - lowest


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("bench") / "new"
    command = ["--stage", "e2e", "--device", "cpu", "--shape", "tiny", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        for name in PACKAGES:
            patch.delitem(PEERS, name)
        assert gpu.main(command) == 0
    assert (out / "e2e.png").stat().st_size > 4_000
    return json.loads((out / "e2e.json").read_text())


def test_e2e_says_where_it_ran(record):
    assert record["stage"] == "e2e"
    assert record["device"]["type"] == "cpu" and record["device"]["name"]
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "triton", "numpy", "cuda"} <= record["versions"].keys()
    assert record["commit"] and record["command"] and record["date"]


def test_e2e_measures_every_peer(record):
    (shape,) = record["shapes"]
    assert shape["left_out"] == []
    assert shape["plan"]["shape"] == "tiny" and shape["plan"]["checkpointing"] is True
    assert list(shape["peers"]) == [name for name in PEERS if name not in PACKAGES]
    for name, peer in shape["peers"].items():
        assert "error" not in peer, (name, peer)
        phases = [peer[key] for key in ("forward_ms", "backward_ms", "iteration_ms", "optimizer_ms")]
        assert all(0 < phase["p10"] <= phase["p90"] for phase in phases)
        assert len(peer["tokens_per_second_by_turn"]) == 2
        assert peer["loss"] == pytest.approx(math.log(256), rel=0.05)
        # The clock around a turn sees what the marks within it see, and the gaps between.
        seconds = shape["plan"]["batch"] * shape["plan"]["sequence"] * peer["iterations"]
        seconds /= peer["tokens_per_second"]
        assert peer["iteration_ms"]["mean"] * peer["iterations"] <= seconds * 1e3 * 1.001
        assert 0 < peer["optimizer_share"] < 1 and peer["mfu"] > 0
    limits = [(line["goal"], line["limit"]) for line in record["goals"]]
    assert limits == [
        ("tokens/s, misa / adamw", 1.45),
        ("tokens/s, misa / lora", 1.15),
        ("tokens/s, misa_window / misa", 1.25),
        ("tokens/s, misa_slices / lora", 1.25),
        ("optimizer's share of misa's iteration", 0.01),
    ]


def test_e2e_counts_rounds_and_depth(record):
    (shape,) = record["shapes"]
    plan, peers, layers = PLANS["tiny"], shape["peers"], SHAPES["tiny"].layers
    for name in OURS:
        assert peers[name]["rounds"] == plan.rounds * plan.turns
        assert peers[name]["switch_ms"]["mean"] > 0
    for name in ("adamw", "lora"):
        assert peers[name]["rounds"] == 0 and peers[name]["switch_ms"] is None
        assert peers[name]["backward_depth"]["mean"] == layers
    # BAdam visits each layer equally often, so its depth is 1, 2, ... layers in turn.
    assert peers["badam"]["backward_depth"]["mean"] == (layers + 1) / 2
    assert 1 <= peers["misa"]["backward_depth"]["mean"] <= layers


@pytest.mark.parametrize("package", PACKAGES)
def test_other_packages_train_in_turns(package, monkeypatch):
    if importlib.util.find_spec(PACKAGES[package]) is None:
        missing(f"needs {PACKAGES[package]}")
    plan = replace(PLANS["tiny"], turns=1)
    monkeypatch.setattr(e2e, "PEERS", {package: PEERS[package]})
    *_, content = measure(plan, torch.device("cpu"), deadline=math.inf)
    peer = content["peers"][package]
    if package == "flashoptim":
        assert peer == {"error": "NotImplementedError: Quantization requires a CUDA device."}
        return
    assert "error" not in peer and peer["loss"] == pytest.approx(math.log(256), rel=0.05)
    if package == "badam_package":
        assert peer["rounds"] == plan.rounds == SHAPES["tiny"].layers
        # Each layer for as many steps, and its switches are where they were looked for.
        assert peer["backward_depth"]["mean"] == (SHAPES["tiny"].layers + 1) / 2
        assert peer["switch_ms"]["p10"] > 2 * peer["optimizer_ms"]["p90"]


def test_operations_of_a_model_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    # Without checkpointing, and whole pairs of tokens, since torch counts attention without regard to what is causal.
    plan = replace(PLANS["tiny"], checkpointing=False, sequence=128)
    model = build_model(replace(plan, dtype="float32"), torch.device("cpu"))
    tokens = torch.randint(256, (plan.batch, plan.sequence))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens).backward()
    shape = SHAPES["tiny"]
    causal = 6.0 * plan.tokens * shape.layers * shape.hidden * plan.sequence
    # The chunked loss computes logits twice.
    again = 2.0 * plan.tokens * shape.vocab * shape.hidden
    assert counter.get_total_flops() == pytest.approx(model_flops(plan) + causal + again, rel=0.01)


def test_peers_that_stay_go_through_all_layers_in_short_turns(monkeypatch):
    plan = replace(PLANS["tiny"], together=True, rounds=1, turns=4, steps=2)
    monkeypatch.setattr(e2e, "PEERS", {name: PEERS[name] for name in ("adamw", "badam")})
    *_, content = measure(plan, torch.device("cpu"), deadline=math.inf)
    adamw, badam = content["peers"].values()
    assert adamw["iterations"] == badam["iterations"] == 8 and badam["rounds"] == 4
    assert len(badam["tokens_per_second_by_turn"]) == 4
    assert badam["backward_depth"]["mean"] == (SHAPES["tiny"].layers + 1) / 2


def test_rounds_of_fifty_steps_from_known_means():
    samples = Samples([10.0, 10.0], [20.0, 20.0], [1.0], [11.0], [31.0, 41.0], [0.1], [2], rounds=1)
    found = in_rounds(samples, tokens=100)
    # 49 steps of 1 ms and one of 11: 1.2 ms.
    assert found["tokens_per_second"] == pytest.approx(100 / 0.0312)
    assert found["optimizer_share"] == pytest.approx(1.2 / 31.2)
    without = in_rounds(Samples([10.0], [20.0], [2.0], [], [32.0], [0.1], [1]), tokens=100)
    assert without["tokens_per_second"] == pytest.approx(100 / 0.032)


def test_largest_batches_under_caps(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(e2e, "PEERS", {name: PEERS[name] for name in ("adamw", "misa")})
    monkeypatch.setitem(PLANS, "tiny", replace(PLANS["tiny"], caps_bytes=(1, 500_000, 10**9)))
    assert gpu.main(["--stage", "caps", "--device", "cpu", "--shape", "tiny", "--out", str(tmp_path)]) == 0
    (shape,) = json.loads((tmp_path / "caps.json").read_text())["shapes"]
    for name, peer in shape["peers"].items():
        peaks = {int(batch): peak for batch, peak in peer["peak_bytes"].items()}
        assert list(peaks) == [1, 2, 4] and sorted(peaks.values()) == list(peaks.values())
        nothing, some, all_ = peer["caps"]
        assert nothing["batch"] is None and nothing["tokens_per_second"] is None
        assert some["batch"] == max((batch for batch, peak in peaks.items() if peak <= 500_000), default=None)
        assert all_["batch"] == 4 and all_["tokens_per_second"] > 0, name
    # Gradients and moments of all weights cost more than those of a few.
    assert shape["peers"]["adamw"]["peak_bytes"]["1"] > 1.2 * shape["peers"]["misa"]["peak_bytes"]["1"]
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("peer", OURS)
@pytest.mark.parametrize("name", sorted(PLANS))
def test_plans_leave_room_for_a_layer_and_see_many_draws(name, peer):
    """On weights without data: an error of the budget must not wait for a GPU."""
    with torch.device("meta"):
        model = Llama(SHAPES[name])
    plan = PLANS[name]
    made = PEERS[peer](model, plan, 0)
    optimizer = made.optimizer
    assert optimizer.active
    assert made.rounds * plan.turns >= 20 or name == "tiny"
    assert made.rounds % 2 == 0 or plan.together
    if peer == "badam":
        assert made.rounds % SHAPES[name].layers == 0
        (active,) = optimizer.active
        assert optimizer.modules[active].numel == sum(p.numel() for p in model.layers[0].parameters() if p.dim() > 1)


def test_e2e_says_what_the_time_limit_left_out(tmp_path, capsys):
    command = ["--stage", "e2e", "--device", "cpu", "--shape", "tiny", "--out", str(tmp_path)]
    assert gpu.main([*command, "--time-limit", "0"]) == 0
    (shape,) = json.loads((tmp_path / "e2e.json").read_text())["shapes"]
    assert shape["peers"] == {}
    assert len(shape["left_out"]) == 2 * len(PEERS)
    assert "left out at the time limit: tiny: adamw, turn 1" in capsys.readouterr().out


def test_e2e_keeps_the_others_when_a_peer_fails(monkeypatch):
    def broken(model, plan, seed):
        raise ImportError("No module named 'peft'")

    monkeypatch.setattr(e2e, "PEERS", {"lora": broken, "misa": PEERS["misa"]})
    *_, record = measure(replace(PLANS["tiny"], turns=1), torch.device("cpu"), deadline=math.inf)
    assert record["peers"]["lora"] == {"error": "ImportError: No module named 'peft'"}
    assert record["peers"]["misa"]["tokens_per_second"] > 0


def test_summary_of_known_times():
    times = np.arange(1.0, 12.0).tolist()
    samples = Samples(times, times, times[:9], times[9:], times, [2.0, 3.0], [5, 6], [4] * 11, [], [], 2, 1.0)
    result = summary(samples, tokens=100, flops=1e9, peak_flops=1e10)
    assert result["mfu"] == pytest.approx(11e9 / 5 / 1e10)
    assert result["tokens_per_second"] == 1100 / 5
    assert result["tokens_per_second_by_turn"] == [250.0, 200.0]
    assert result["forward_ms"] == {"mean": 6.0, "p10": 2.0, "p90": 10.0}
    assert result["switch_ms"]["mean"] == 10.5


@pytest.mark.gpu
@pytest.mark.parametrize("name", PEERS)
def test_turn_on_the_gpu(name):
    device = torch.device("cuda")
    plan = PLANS["tiny"]
    model = build_model(plan, device)
    tokens = torch.randint(256, (plan.batch, plan.sequence), device=device)
    samples = Samples()
    run_turn(model, tokens, name, plan, 0, samples)
    assert all(ms > 0 for ms in samples.iteration_ms)
    assert samples.allocated_bytes[0] > sum(2 * p.numel() for p in model.parameters())
