"""Which blocks backward runs through, counted, and what the watch says when they are not those of the draw."""

from __future__ import annotations

import copy
import gc
import importlib
import os
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from misa_kernels import MISA, CyclicSampler, ImportanceSampler, param_groups, watch_backward

LAYERS = 6

# How a block is run: with itself, what runs it, and its input.


def plain(block, run, x):
    return run(x)


def nonreentrant(block, run, x):
    return checkpoint(run, x, use_reentrant=False)


def reentrant(block, run, x):
    return checkpoint(run, x, use_reentrant=True)


def selective(within):
    """As LLaMA-Factory does it: only what holds trainable parameters is checkpointed, and its input made to require."""

    def policy(block, run, x):
        if not any(param.requires_grad for param in block.parameters()):
            return run(x)
        return within(block, run, x.requires_grad_(True))

    return policy


def every_second(block, run, x):
    return (nonreentrant if block.number % 2 else plain)(block, run, x)


class Inside(tiny.Decoder):
    """A block that checkpoints itself, so that its hooks lie outside: Transformers 5."""

    def forward(self, x):
        return self.policy(self, super().forward, x)


class Model(tiny.Tiny):
    """Runs its blocks by a policy, around their calls (Transformers 4) or inside of them."""

    def __init__(self, policy: Callable[..., Any], place: str) -> None:
        super().__init__(LAYERS)
        self.policy, self.place = policy, place
        for number, block in enumerate(self.blocks):
            block.number, block.policy = number, policy
            if place == "inside":
                block.__class__ = Inside

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = self.policy(block, block, x) if self.place == "around" else block(x)
        return self.head(self.norm(x))


def build(policy=plain, place: str = "around") -> Model:
    torch.manual_seed(0)
    return Model(policy, place)


def misa(model: nn.Module, mode: str = "finetune", **settings: Any) -> MISA:
    settings = {"delta": 0.06, "inner_steps": 1, "sampler": ImportanceSampler(depth_window=3), **settings}
    return MISA(param_groups(model, mode), **settings)


def require_grad_of(module: nn.Module) -> Any:
    """Make the outputs of a module require a gradient, as `enable_input_require_grads` does."""

    def hook(module, inputs, output):
        output.requires_grad_(True)

    return module.register_forward_hook(hook)


@contextmanager
def said() -> Iterator[list[str]]:
    """Collect what the watch says; torch warns of its own accord in some of these cases."""
    sentences: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield sentences
    sentences.extend(str(one.message) for one in caught if " in round " in str(one.message))


@contextmanager
def blocks_run(blocks: nn.ModuleList) -> Iterator[set[int]]:
    """Collect the numbers of blocks whose output receives a gradient: those whose backward runs."""
    ran: set[int] = set()

    def hook(number, block, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(lambda grad: ran.add(number))

    handles = [block.register_forward_hook(partial(hook, number)) for number, block in enumerate(blocks)]
    yield ran
    for handle in handles:
        handle.remove()


def count(model: nn.Module, blocks: nn.ModuleList, optimizer: MISA, rounds: int, loss_of=tiny.loss_of):
    """Train rounds of one step; return the depths of the draws and the blocks that backward ran through."""
    depths, ran = [], []
    for step in range(rounds):
        depths.append(optimizer.monitor.current.backward_depth)
        with blocks_run(blocks) as numbers:
            loss_of(model, tiny.batch(step)).backward()
        assert numbers == set(range(LAYERS - len(numbers), LAYERS))
        ran.append(len(numbers))
        optimizer.step()
        optimizer.zero_grad()
    return depths, ran


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


PLACES = pytest.mark.parametrize("place", ["around", "inside"])


# Counted in every round, by how the blocks are run


@PLACES
@pytest.mark.parametrize("policy", [plain, nonreentrant, every_second])
def test_backward_stops_at_the_lowest_active_layer(policy, place):
    model = build(policy, place)
    optimizer = misa(model)
    with said() as sentences, watch_backward(model, optimizer):
        depths, ran = count(model, model.blocks, optimizer, 12)
    assert ran == depths
    assert len(set(depths)) > 2
    assert sentences == []


@PLACES
@pytest.mark.parametrize("policy", [nonreentrant, reentrant])
def test_backward_that_a_dense_embedding_needs_is_no_fault(policy, place):
    model = build(policy, place)
    optimizer = misa(model, "pretrain")
    with said() as sentences, watch_backward(model, optimizer):
        depths, ran = count(model, model.blocks, optimizer, 6)
    assert ran == depths == [LAYERS] * 6
    assert sentences == []


@PLACES
@pytest.mark.parametrize("policy", [plain, nonreentrant, reentrant])
def test_backward_driven_to_the_embedding_is_counted_and_explained(policy, place):
    model = build(policy, place)
    optimizer = misa(model)
    handle = require_grad_of(model.embedding)
    first = optimizer.monitor.current.backward_depth
    with said() as sentences, watch_backward(model, optimizer):
        depths, ran = count(model, model.blocks, optimizer, 8)
    assert ran == [LAYERS] * 8
    assert first < LAYERS
    (sentence,) = sentences
    assert f"the input of blocks.0, through 6 layers, and must stop after {first}, at blocks.{6 - first}," in sentence
    assert "disable_input_require_grads()" in sentence

    # The remedy.
    handle.remove()
    if policy is not reentrant:
        with said() as sentences, watch_backward(model, optimizer):
            depths, ran = count(model, model.blocks, optimizer, 8)
        assert ran == depths
        assert sentences == []


@PLACES
@pytest.mark.parametrize("within", [nonreentrant, reentrant])
def test_checkpointing_by_trainability_is_counted_and_explained(within, place):
    model = build(selective(within), place)
    optimizer = misa(model)
    kept: list[set[int]] = []

    def unwrapped(block, run, x):
        """What is not checkpointed though its activations are kept for backward."""
        if x.requires_grad and not any(param.requires_grad for param in block.parameters()):
            kept[-1].add(block.number)
        return selective(within)(block, run, x)

    model.policy = unwrapped
    for block in model.blocks:
        block.policy = unwrapped
    with watch_backward(model, optimizer):
        sentences: list[str] = []
        while not sentences and len(kept) < 8:
            kept.append(set())
            with said() as sentences:
                depths, ran = count(model, model.blocks, optimizer, 1)
            assert ran == depths
        rounds, kept_then = len(kept), sorted(kept[-1])
        with said() as again:
            count(model, model.blocks, optimizer, 8)
    (sentence,) = sentences
    assert 1 < rounds < 6
    assert f"blocks.{kept_then[0]} is frozen in round {rounds - 1} and keeps" in sentence
    assert f"one of {len(kept_then)} such layers" in sentence
    assert "checkpoint" in sentence
    assert again == []


def test_checkpointing_by_trainability_is_seen_in_the_second_of_cyclic_rounds():
    model = build(selective(nonreentrant))
    optimizer = misa(model, delta=0.16, sampler=CyclicSampler(granularity="layer"))
    with watch_backward(model, optimizer):
        for step in range(2):
            with said() as sentences:
                one_step(model, optimizer, step)
            assert len(sentences) == step


@pytest.mark.parametrize("alternate", [0, 1])
def test_choice_of_layers_that_is_not_by_trainability_is_no_fault(alternate):
    """Of every second layer, and of the others in the next round; in some rounds it agrees with what is trained."""
    model = build()
    optimizer = misa(model, delta=0.16, sampler=CyclicSampler(granularity="layer"))

    def policy(block, run, x):
        is_chosen = (block.number + alternate * optimizer.monitor.current.round) % 2 == 0
        return (nonreentrant if is_chosen else plain)(block, run, x)

    model.policy = policy
    with said() as sentences, watch_backward(model, optimizer):
        for step in range(4 if alternate else 6):
            one_step(model, optimizer, step)
    assert sentences == []


# Re-entrant checkpointing of frozen inputs


@PLACES
def test_reentrant_checkpointing_is_explained_before_backward_fails(place):
    model = build(reentrant, place)
    optimizer = misa(model)
    lowest = LAYERS - optimizer.monitor.current.backward_depth
    with watch_backward(model, optimizer):
        with said() as sentences:
            loss = tiny.loss_of(model, tiny.batch(0))
        with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
            loss.backward()
        with said() as again:
            tiny.loss_of(model, tiny.batch(1))
    (sentence,) = sentences
    assert sentence.startswith(f"blocks.{lowest} trains in round 0")
    assert "use_reentrant=False" in sentence
    assert again == []


@PLACES
def test_reentrant_checkpointing_is_explained_where_backward_would_not_fail(place):
    """A dense head makes the loss require a gradient; the active modules silently get none."""
    model = build(reentrant, place)
    optimizer = MISA(param_groups(model, dense=[model.head]), delta=0.06, sampler=ImportanceSampler(depth_window=3))
    with said() as sentences, watch_backward(model, optimizer):
        tiny.loss_of(model, tiny.batch(0)).backward()
    active = [p for p in model.blocks.parameters() if p.requires_grad]
    assert active
    assert all(p.grad is None for p in active)
    assert model.head.weight.grad is not None
    assert len(sentences) == 1


@PLACES
def test_reentrant_lower_half_is_explained_although_the_upper_trains(place):
    def lower_half(block, run, x):
        return (reentrant if block.number < LAYERS // 2 else plain)(block, run, x)

    model = build(lower_half, place)
    optimizer = MISA(param_groups(model), delta=0.9, sampler=ImportanceSampler())
    with said() as sentences, watch_backward(model, optimizer):
        tiny.loss_of(model, tiny.batch(0)).backward()
    assert any(p.requires_grad for p in model.blocks[0].parameters())
    assert all(p.grad is None for p in model.blocks[0].parameters())
    assert any(p.grad is not None for p in model.blocks[5].parameters())
    (sentence,) = sentences
    assert sentence.startswith("blocks.0 trains in round 0")


# Transformers


def library(name: str) -> Any:
    """Import it; a test without it is skipped, but not in CI."""
    return importlib.import_module(name) if "CI" in os.environ else pytest.importorskip(name)


def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS, "vocab_size": tiny.VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    module = library("transformers")
    torch.manual_seed(0)
    return module.LlamaForCausalLM(module.LlamaConfig(**sizes, **heads)).train()


def llama_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def checkpointing(model: Any, use_reentrant: bool) -> None:
    with warnings.catch_warnings():
        # Deprecated in favour of a name that version 4 does not have.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


def enable_only(model: Any) -> None:
    model.enable_input_require_grads()


def stop_at_inputs(model: Any) -> None:
    checkpointing(model, use_reentrant=False)
    model.disable_input_require_grads()


def reentrant_and_enable(model: Any) -> None:
    checkpointing(model, use_reentrant=True)
    model.enable_input_require_grads()


def trainable_only(model: Any) -> None:
    def function(run, *args, **kwargs):
        # Version 5 passes a function bound by partial(), version 4 a bound method.
        layer = run.args[0] if isinstance(run, partial) else run.__self__
        if not any(param.requires_grad for param in layer.parameters()):
            return run(*args, **kwargs)
        args[0].requires_grad_(True)
        return checkpoint(run, *args, use_reentrant=True, **kwargs)

    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)


@pytest.mark.parametrize(
    ("prepare", "through_all", "sentence"),
    [
        (lambda model: None, False, None),
        (stop_at_inputs, False, None),
        (enable_only, True, "backward ran down to the input of model.layers.0"),
        (reentrant_and_enable, True, "backward ran down to the input of model.layers.0"),
        (trainable_only, False, "only layers with trainable parameters are checkpointed"),
    ],
    ids=["plain", "stop_at_inputs", "enable_only", "reentrant_and_enable", "trainable_only"],
)
def test_transformers_layers_run_as_counted(prepare, through_all, sentence):
    model = llama()
    optimizer = misa(model)
    prepare(model)
    with said() as sentences, watch_backward(model, optimizer):
        depths, ran = count(model, model.model.layers, optimizer, 8, llama_loss)
    assert ran == ([LAYERS] * 8 if through_all else depths)
    assert len(set(depths)) > 1
    assert [sentence in one for one in sentences] == ([True] if sentence else [])


def test_transformers_reentrant_checkpointing_is_explained_before_backward_fails():
    model = llama()
    optimizer = misa(model)
    checkpointing(model, use_reentrant=True)
    # Version 5 makes inputs require gradients with checkpointing, version 4 does not.
    model.disable_input_require_grads()
    with said() as sentences, watch_backward(model, optimizer):
        loss = llama_loss(model, tiny.batch(0))
    with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
        loss.backward()
    (sentence,) = sentences
    assert "use_reentrant=False" in sentence


def test_only_the_inner_model_is_called():
    """As with a fused loss: the hooks of the outermost module do not run."""
    model = llama()
    optimizer = misa(model)
    checkpointing(model, use_reentrant=True)
    model.disable_input_require_grads()
    with said() as sentences, watch_backward(model, optimizer):
        model.model(input_ids=tiny.batch(0), use_cache=False)
    assert len(sentences) == 1


# No false alarms: ways to train, each with blocks that are checkpointed well


def one_step(model, optimizer, step, parts=1):
    for part in range(parts):
        (tiny.loss_of(model, tiny.batch(10 * step + part)) / parts).backward()
    optimizer.step()
    optimizer.zero_grad()


def evaluation(model, optimizer, step):
    model.eval()
    with torch.no_grad():
        tiny.loss_of(model, tiny.batch(step))
    model.train()
    one_step(model, optimizer, step)
    with torch.inference_mode():
        tiny.loss_of(model, tiny.batch(step))


def evaluation_with_gradients_on(model, optimizer, step):
    model.eval()
    tiny.loss_of(model, tiny.batch(step))
    model.train()
    one_step(model, optimizer, step)


def training_in_evaluation_mode(model, optimizer, step):
    model.eval()
    one_step(model, optimizer, step)


def accumulation(model, optimizer, step):
    one_step(model, optimizer, step, parts=3)


def several_forwards(model, optimizer, step):
    losses = [tiny.loss_of(model, tiny.batch(3 * step + n)) for n in range(3)]
    (losses[0] + losses[2]).backward()
    optimizer.step()
    optimizer.zero_grad()


def closure(model, optimizer, step):
    def reevaluate():
        optimizer.zero_grad()
        loss = tiny.loss_of(model, tiny.batch(step))
        loss.backward()
        return loss

    optimizer.step(reevaluate)


def exceptions(model, optimizer, step):
    for broken in (model.blocks[3].down, model.norm):
        handle = broken.register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError):
            tiny.loss_of(model, tiny.batch(step))
        handle.remove()
    handle = model.blocks[5].register_full_backward_hook(fail)
    with pytest.raises(ArithmeticError):
        tiny.loss_of(model, tiny.batch(step)).backward()
    handle.remove()
    optimizer.zero_grad()
    one_step(model, optimizer, step)


def fail(*_):
    raise ArithmeticError


def called_repeatedly(model, optimizer, step):
    """A recurrence whose first pass is without gradients, and whose upper blocks run once more."""

    def forward(tokens):
        x = model.embedding(tokens)
        with torch.no_grad():
            for block in model.blocks:
                x = block(x)
        for block in [*model.blocks, *model.blocks[3:]]:
            x = model.policy(block, block, x) if model.place == "around" else block(x)
        return model.head(x)

    model.forward = forward
    one_step(model, optimizer, step)


def early_exit(model, optimizer, step):
    """The last block runs, and the loss does not depend on it."""
    outputs = {}
    handle = model.blocks[4].register_forward_hook(lambda block, inputs, output: outputs.update(out=output))
    tiny.loss_of(model, tiny.batch(step))
    handle.remove()
    if outputs["out"].requires_grad:
        outputs["out"].square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def layer_by_hand(model, optimizer, step):
    model.blocks[2](torch.randn(1, 3, tiny.WIDTH, requires_grad=True)).mean()
    one_step(model, optimizer, step)


WAYS = [
    evaluation,
    evaluation_with_gradients_on,
    training_in_evaluation_mode,
    accumulation,
    several_forwards,
    closure,
    exceptions,
    called_repeatedly,
    early_exit,
    layer_by_hand,
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("policy", "place"), [(nonreentrant, "inside"), (every_second, "around")])
def test_nothing_is_said_of_a_good_loop(policy, place, way):
    model = build(policy, place)
    optimizer = misa(model)
    with said() as sentences, watch_backward(model, optimizer) as watch:
        for step in range(4):
            way(model, optimizer, step)
        # It did look.
        assert watch._judged is optimizer.monitor.rounds[-2]
    assert sentences == []


@pytest.mark.parametrize("way", [w for w in WAYS if w not in (closure, called_repeatedly, early_exit)])
def test_faults_are_seen_in_the_same_loops(way):
    model = build(selective(nonreentrant))
    optimizer = misa(model)
    require_grad_of(model.embedding)
    sentences: list[str] = []
    with watch_backward(model, optimizer):
        for step in range(8):
            if len(sentences) < 2:
                with said() as now:
                    way(model, optimizer, step)
                sentences += now
    assert len(sentences) == 2


def test_fault_is_seen_in_a_closure():
    model = build()
    optimizer = misa(model)
    require_grad_of(model.embedding)
    with said() as sentences, watch_backward(model, optimizer):
        for step in range(4):
            closure(model, optimizer, step)
    assert len(sentences) == 1


def test_segments_of_several_layers_get_their_gradients():
    """Inside a re-entrant segment, only the first layer has an input that requires a gradient."""
    model = build()
    model.forward = lambda tokens: model.head(
        checkpoint_sequential(list(model.blocks), 2, model.embedding(tokens), use_reentrant=True)
    )
    optimizer = misa(model, "pretrain")
    with said() as sentences, watch_backward(model, optimizer):
        for step in range(4):
            one_step(model, optimizer, step)
    assert sentences == []


def test_active_module_that_is_not_called_is_no_reentrant_checkpointing():
    """An expert that got no token."""
    model = build()
    for block in model.blocks:
        block.expert = nn.Linear(tiny.WIDTH, 100, bias=False)
    experts = [(name, param) for name, param in model.named_parameters() if "expert" in name]
    layers = [name.removesuffix(".expert.weight") for name, _ in experts]
    optimizer = MISA([{"params": experts, "layers": layers}], delta=0.5)
    for param in set(model.parameters()) - {param for _, param in experts}:
        param.requires_grad_(False)
    with said() as sentences, watch_backward(model, optimizer):
        assert not tiny.loss_of(model, tiny.batch(0)).requires_grad
    assert sentences == []


def test_embedding_trained_by_another_optimizer_is_no_fault():
    model = build()
    prompt = nn.Parameter(torch.randn(1, 1, tiny.WIDTH))
    model.embedding.register_forward_hook(lambda module, inputs, output: 2 * (output + prompt))
    optimizer = misa(model)
    assert optimizer.monitor.current.backward_depth < LAYERS
    with said() as sentences, watch_backward(model, optimizer):
        _, ran = count(model, model.blocks, optimizer, 4)
    assert ran == [LAYERS] * 4
    assert sentences == []


def test_rollouts_without_gradients_are_no_reentrant_checkpointing():
    """A module that calls the model without gradients, in a forward of its own that has them."""

    class Rollout(nn.Module):
        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def forward(self, tokens):
            with torch.no_grad():
                return self.policy(tokens).argmax(-1)

    model = build()
    wrapper = Rollout(model)
    optimizer = misa(model)
    with said() as sentences, watch_backward(wrapper, optimizer):
        wrapper(tiny.batch(0))
        one_step(model, optimizer, 0)
    assert sentences == []


# Life


def test_hooks_are_there_in_the_first_step_of_a_round_only():
    model = build()
    optimizer = misa(model, inner_steps=3)
    with watch_backward(model, optimizer) as watch:
        attached = []
        for step in range(7):
            attached.append(hooks_on(model) > 0)
            one_step(model, optimizer, step)
        assert attached == [True, False, False, True, False, False, True]
    assert hooks_on(model) == 0
    assert not optimizer._optimizer_step_post_hooks
    watch.close()


def test_fault_of_a_later_round_is_seen():
    model = build()
    optimizer = misa(model, inner_steps=2)
    with said() as sentences, watch_backward(model, optimizer):
        one_step(model, optimizer, 0)
        require_grad_of(model.embedding)
        one_step(model, optimizer, 1)
        assert sentences == []
        for step in range(2, 12):
            one_step(model, optimizer, step)
    assert len(sentences) == 1


def test_round_loaded_before_the_step_is_the_one_compared():
    model = build(reentrant)
    optimizer = misa(model, inner_steps=50)
    other = misa(build(), inner_steps=50, seed=1)
    states = {o.monitor.current.backward_depth: o.state_dict() for o in (optimizer, other)}
    assert len(states) == 2
    with watch_backward(model, optimizer):
        for state in states.values():
            optimizer.load_state_dict(state)
            with torch.no_grad():
                tiny.loss_of(model, tiny.batch(0))
        with said() as sentences:
            tiny.loss_of(model, tiny.batch(0))
    (sentence,) = sentences
    assert sentence.startswith(f"blocks.{LAYERS - optimizer.monitor.current.backward_depth} trains")


def test_a_watch_that_has_said_all_is_gone():
    model = build(selective(nonreentrant))
    optimizer = misa(model)
    require_grad_of(model.embedding)
    others = hooks_on(model)
    with said() as sentences:
        watch = watch_backward(model, optimizer)
        watch._unsaid.remove("reentrant")
        for step in range(8):
            one_step(model, optimizer, step)
    assert len(sentences) == 2
    assert hooks_on(model) == others
    assert not optimizer._optimizer_step_post_hooks


def test_watch_keeps_neither_model_nor_optimizer_alive():
    model = build()
    optimizer = misa(model)
    watch = watch_backward(model, optimizer)
    one_step(model, optimizer, 0)
    alive = [weakref.ref(model), weakref.ref(optimizer)]
    del optimizer
    gc.collect()
    assert alive[1]() is None
    # Without its optimizer the watch ends at the next forward.
    tiny.loss_of(model, tiny.batch(0))
    assert hooks_on(model) == 0
    del model
    gc.collect()
    assert alive[0]() is None
    watch.close()


def test_watch_ends_with_release():
    model = build()
    optimizer = misa(model)
    watch_backward(model, optimizer)
    one_step(model, optimizer, 0)
    optimizer.release()
    tiny.loss_of(model, tiny.batch(0))
    assert hooks_on(model) == 0


def test_a_dropped_watch_goes_on():
    model = build()
    optimizer = misa(model)
    require_grad_of(model.embedding)
    with said() as sentences:
        watch_backward(model, optimizer)
        gc.collect()
        for step in range(4):
            one_step(model, optimizer, step)
    assert len(sentences) == 1


def test_copies_and_pickles_of_the_model_are_not_watched():
    model = build(reentrant)
    optimizer = misa(model)
    with said() as sentences, watch_backward(model, optimizer):
        saved = pickle.dumps(model)
        assert b"misa_kernels" not in saved
        for other in (copy.deepcopy(model), pickle.loads(saved)):
            tiny.loss_of(other, tiny.batch(0))
    assert sentences == []


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_watch_runs_no_operation_on_tensors():
    """So it can neither wait for a device nor change a result."""
    names = []
    for watched in (False, True):
        model = build(nonreentrant)
        optimizer = misa(model)
        if watched:
            watch_backward(model, optimizer)
        with Operations() as operations:
            for step in range(2):
                one_step(model, optimizer, step)
        names.append(operations.names)
    assert names[0] == names[1]
    assert len(names[0]) > 500


# Models by other names


class Wrapper(nn.Module):
    """As DDP or PEFT wrap a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args):
        return self.module(*args)


@pytest.mark.parametrize("named_in", ["inner", "wrapper"])
@pytest.mark.parametrize("watched", ["inner", "wrapper"])
@pytest.mark.parametrize("wrap", [Wrapper, partial(torch.compile, backend="eager")], ids=["module", "compiled"])
def test_layers_are_found_through_wrappers(wrap, named_in, watched):
    model = build()
    models = {"inner": model, "wrapper": wrap(model)}
    optimizer = misa(models[named_in])
    require_grad_of(model.embedding)
    with said() as sentences, watch_backward(models[watched], optimizer):
        # What is compiled is not seen, so the inner model is what runs.
        for step in range(4):
            one_step(models["inner"], optimizer, step)
    (sentence,) = sentences
    assert optimizer.monitor.layers[0] in sentence


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "blocks"])
def test_compilation_is_left_alone(part):
    """No graph breaks, no graph more than without the watch, nothing said."""
    graphs: list[int] = []

    def backend(graph, inputs):
        graphs[-1] += 1
        return graph

    for watched in (False, True):
        torch._dynamo.reset()
        model = build()
        optimizer = misa(model, inner_steps=2)
        graphs.append(0)
        compiled: Any = model
        if part == "model":
            compiled = torch.compile(model, backend=backend, fullgraph=True)
        else:
            for number, block in enumerate(model.blocks):
                model.blocks[number] = torch.compile(block, backend=backend, fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=64), said() as sentences:
            if watched:
                watch_backward(compiled, optimizer)
            for step in range(6):
                one_step(compiled, optimizer, step)
        assert sentences == []
    assert graphs[0] == graphs[1] > 0


@pytest.mark.slow
def test_peft_adapters_are_watched():
    peft = library("peft")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    optimizer = misa(adapted, delta=0.3)
    assert optimizer.monitor.current.backward_depth < LAYERS
    inner = adapted.get_base_model()
    with said() as sentences, watch_backward(inner, optimizer):
        depths, ran = count(adapted, inner.model.layers, optimizer, 4, llama_loss)
    assert ran == depths
    assert sentences == []
    adapted.enable_input_require_grads()
    with said() as sentences, watch_backward(inner, optimizer):
        _, ran = count(adapted, inner.model.layers, optimizer, 4, llama_loss)
    assert ran == [LAYERS] * 4
    assert len(sentences) == 1


def test_module_that_two_layers_share_is_no_sign_of_either():
    """Its calls in the backward of one would pass for those of the other, frozen and not checkpointed."""
    model = build(selective(nonreentrant))
    shared = nn.LayerNorm(tiny.WIDTH)
    for block in model.blocks:
        block.norm1 = shared
    optimizer = misa(model)
    with said() as sentences, watch_backward(model, optimizer):
        for step in range(5):
            one_step(model, optimizer, step)
    (sentence,) = sentences
    assert "only layers with trainable parameters are checkpointed" in sentence


# Errors


def test_what_cannot_be_watched_raises():
    model = build()
    optimizer = misa(model)
    with pytest.raises(TypeError, match="model is dict"):
        watch_backward({}, optimizer)
    with pytest.raises(TypeError, match="optimizer is AdamW and must be a MISA"):
        watch_backward(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="blocks.0 of the optimizer must be in the model, and Linear"):
        watch_backward(nn.Linear(2, 2), optimizer)
    assert hooks_on(model) == 0
    with pytest.warns(UserWarning, match="param_groups"):
        nameless = MISA(build().parameters(), delta=0.3)
    with pytest.raises(ValueError, match=r"param_groups\(model\)"):
        watch_backward(model, nameless)
