"""Are slices trained as a masked gradient would train them, and does nothing of the rest exist or change?"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny import HIDDEN, WIDTH, Tiny, batch, build, loss_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from misa_kernels import MISA, CyclicSampler, ImportanceSampler, UniformSampler, param_groups, slices
from misa_kernels.gradients.axes import Slice
from misa_kernels.gradients.sliced import SlicedGradient

BACKENDS = ["reference", "cpu"]
SAMPLERS = [ImportanceSampler, UniformSampler, CyclicSampler]


def sliced(model: nn.Module, hold: int | str = 1, reach: str = "auto", kind: type = UniformSampler, **options) -> MISA:
    options = {"lr": 1e-2, "delta": 0.1, "inner_steps": 3} | options
    sampler = kind(granularity="slice", slices=reach, hold_rounds=hold)
    return MISA(param_groups(model), sampler=sampler, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def train(model: nn.Module, optimizer: MISA, steps: int, start: int = 0, each: Callable = lambda: None) -> None:
    for step in range(start, start + steps):
        loss_of(model, batch(step)).backward()
        each()
        optimizer.step()
        optimizer.zero_grad()


def is_hooked(model: nn.Module) -> bool:
    return any(module._forward_hooks for module in model.modules())


class Masked:
    """Rounds of slices in float64: the full gradient by autograd, masked; AdamW as printed, state dropped as said."""

    def __init__(self, model: nn.Module, optimizer: MISA) -> None:
        self.model = copy.deepcopy(model).double().requires_grad_(True)
        self.names = {id(param): name for name, param in model.named_parameters()}
        self.optimizer = optimizer
        self.held: dict[str, Slice | None] = {}
        self.state: dict[str, tuple[Tensor, Tensor, int]] = {}

    def step(self, tokens: Tensor, max_norm: float | None = None) -> None:
        now = {self.names[id(param)]: place for param, place in self.optimizer.trained.items()}
        params = dict(self.model.named_parameters())
        for name, place in now.items():
            if name not in self.held or self.held[name] != place:
                self.state[name] = torch.zeros_like(params[name]), torch.zeros_like(params[name]), 0
        self.held = now
        self.model.zero_grad()
        loss_of(self.model, tokens).backward()
        masked = {name: params[name].grad * self.mask(params[name], place) for name, place in now.items()}
        norm = sum(g.square().sum() for g in masked.values()).sqrt()
        factor = 1.0 if max_norm is None else min(1.0, max_norm / (norm.item() + 1e-6))
        group = self.optimizer.param_groups[0]
        for name, place in now.items():
            m, v, age = self.state[name]
            g, mask, age = masked[name] * factor, self.mask(params[name], place), age + 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            self.state[name] = m, v, age
            update = (m / (1 - 0.9**age)) / ((v / (1 - 0.999**age)).sqrt() + 1e-8)
            with torch.no_grad():
                params[name].sub_(mask * group["lr"] * (update + group["weight_decay"] * params[name]))

    @staticmethod
    def mask(param: Tensor, place: Slice | None) -> Tensor:
        mask = torch.zeros_like(param) if place is not None else torch.ones_like(param)
        if place is not None:
            mask.narrow(place.axis, place.first, place.last - place.first).fill_(1.0)
        return mask


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("reach", ["down", "output", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_rounds_are_those_of_masked_gradients(backend, reach, kind):
    model = build(hidden=48)
    optimizer = sliced(model, 2, reach, kind, backend=backend)
    oracle = Masked(model, optimizer)
    before = weights(model)
    touched = {name: torch.zeros_like(param, dtype=torch.bool) for name, param in before.items()}
    for step in range(14):
        oracle.step(batch(step))
        active = sum(optimizer.modules[number].numel for number in optimizer.active)
        assert active <= 0.1 * sum(param.numel() for param in before.values())
        for param, place in optimizer.trained.items():
            touched[oracle.names[id(param)]] |= Masked.mask(param, place).bool()
        train(model, optimizer, 1, step)
    assert {len(optimizer.trained), len(optimizer.active)} == {{"down": 4, "output": 8, "all": 28}[reach]}
    for (name, param), expected in zip(model.named_parameters(), oracle.model.parameters(), strict=True):
        # AdamW divides by a root of squares: gradients of 1e-9 make steps of lr.
        torch.testing.assert_close(param.double(), expected, rtol=0, atol=2e-4, msg=name)
        assert torch.equal(param[~touched[name]], before[name][~touched[name]]), name
        assert touched[name].any() == (not torch.equal(param, before[name]))


def test_of_each_linear_layer_what_leads_back_by_columns_and_the_others_by_rows():
    model = build(hidden=48)
    places = _places(model, sliced(model, reach="all", delta=0.3))
    assert {name.split(".")[-2]: place.axis for name, place in places.items() if "blocks.0" in name} == {
        "q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 1,
    }  # fmt: skip


def _places(model: nn.Module, optimizer: MISA) -> dict[str, Slice]:
    names = {id(param): name for name, param in model.named_parameters()}
    return {names[id(param)]: place for param, place in optimizer.trained.items()}


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("precision", ["master", "split", "stochastic"])
def test_kernels_and_reference_agree_on_bfloat16(precision, state_dtype):
    # With a smaller eps a gradient of 1e-5, whose sign one rounding elsewhere turns, moves a weight as any other does.
    options = {"param_precision": precision, "state_dtype": state_dtype, "momentum_flush": True, "eps": 1e-4}
    trained = {}
    for backend in BACKENDS:
        model = build(dtype=torch.bfloat16, hidden=48)
        optimizer = sliced(model, 1, "all", backend=backend, **options)
        train(model, optimizer, 8)
        optimizer.release()
        trained[backend] = torch.cat([param.detach().flatten() for param in model.parameters()]).float()
    apart = (trained["cpu"] - trained["reference"]).abs()
    assert apart.max() < 0.05
    assert (apart > 2**-7).float().mean() < 0.01


def test_nothing_of_the_rest_exists():
    model = build(layers=3, width=32, hidden=128)
    optimizer = sliced(model, "run", "down", delta=0.05)
    tokens = batch(0)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.nbytes)
        return tensor

    loss = _packed(model, tokens, pack)
    with_slices, _ = sum(saved), saved.clear()
    loss.backward()
    columns = {id(param): place.last - place.first for param, place in optimizer.trained.items()}
    tokens_in = tokens[:, :-1].numel()
    for param, place in optimizer.trained.items():
        assert isinstance(param.grad, SlicedGradient)
        assert param.grad.part.shape == (32, place.last - place.first)
    assert sum(param.grad is not None for param in model.parameters()) == 3
    optimizer.step()
    slots = sum(32 * width for width in columns.values())
    # Moments in float32, rounded up to groups.
    assert 8 * slots <= optimizer.state_bytes <= 8 * (optimizer._partition.budget + 3 * 128)
    optimizer.release()
    # Frozen, and made to backpropagate from the lowest layer up: its down projection's output.
    model.requires_grad_(False)
    handle = model.blocks[0].down.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
    _packed(model, tokens, pack)
    handle.remove()
    kept = sum(columns.values()) * tokens_in * 4
    assert with_slices == sum(saved) + kept


def _packed(model: nn.Module, tokens: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return loss_of(model, tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("foreach", [None, False, True])
def test_clipping_by_the_loop_is_that_of_the_slices(backend, foreach):
    model = build(hidden=48)
    optimizer = sliced(model, backend=backend)
    oracle, norms = Masked(model, optimizer), []
    for step in range(7):
        oracle.step(batch(step), 0.05)
        each = lambda: norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05, foreach=foreach))  # noqa: E731
        train(model, optimizer, 1, step, each)
    assert min(norms) > 0.05
    for param, expected in zip(model.parameters(), oracle.model.parameters(), strict=True):
        torch.testing.assert_close(param.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_in_the_step_is_the_same(backend):
    models = [build(hidden=48), build(hidden=48)]
    train(models[0], sliced(models[0], backend=backend, max_grad_norm=0.05), 7)
    train(
        models[1],
        optimizer := sliced(models[1], backend=backend),
        7,
        each=lambda: nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.05),
    )
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_grad_scaler_unscales_and_skips(backend):
    plain, scaled = build(hidden=48), build(hidden=48)
    train(plain, sliced(plain, backend=backend, skip_nonfinite=True), 8)
    optimizer = sliced(scaled, backend=backend, skip_nonfinite=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(8):
        scaler.scale(loss_of(scaled, batch(step))).backward()
        if step % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    loss = scaler.scale(loss_of(scaled, batch(8)) * float("inf"))
    loss.backward()
    before = weights(scaled)
    scaler.step(optimizer)
    assert all(torch.equal(param, before[name]) for name, param in scaled.named_parameters())


def test_gradients_add_up_and_a_layer_may_be_called_twice_or_never():
    class Twice(Tiny):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            for block in (self.blocks[0], self.blocks[1], self.blocks[0]):
                x = block(x)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model = Twice(3, WIDTH, 48)
    optimizer = sliced(model, "run", "down")
    full = copy.deepcopy(model).requires_grad_(True)
    for step in range(3):
        for each in (model, full):
            (loss_of(each, batch(step)) / 3).backward()
    for (name, param), expected in zip(model.named_parameters(), full.parameters(), strict=True):
        if (place := optimizer.trained.get(param)) is not None and "blocks.2" not in name:
            part = expected.grad.narrow(place.axis, place.first, place.last - place.first)
            torch.testing.assert_close(param.grad.part, part)
    assert full.blocks[2].down.weight.grad is None
    assert model.blocks[2].down.weight.grad is None
    before = weights(model)
    optimizer.step()
    assert torch.equal(model.blocks[2].down.weight, before["blocks.2.down.weight"])
    assert not torch.equal(model.blocks[0].down.weight, before["blocks.0.down.weight"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    class Checkpointed(Tiny):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            x = x.requires_grad_() if reentrant else x
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(self.norm(x))

    trained = []
    for kind in (Tiny, Checkpointed):
        torch.manual_seed(0)
        model = kind(3, WIDTH, 48)
        train(model, sliced(model, 1, "all"), 7)
        trained.append(model)
    for a, b in zip(*(model.parameters() for model in trained), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_released_gradients_give_the_same_weights(kind):
    configs = {
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                n_embd=32, n_layer=3, n_head=4, vocab_size=32, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
            )  # fmt: skip
        ),
    }
    trained = []
    for released in (False, True):
        torch.manual_seed(0)
        model = configs[kind]()
        optimizer = sliced(model, 1, "all", delta=0.2, release_gradients=released, backend="cpu")
        for step in range(8):
            model(batch(step), labels=batch(step)).loss.backward()
            if released:
                large = [p for p in optimizer.trained if p.grad is not None and p.numel() > 3000]
                assert not large or step == 0
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model)
    for a, b in zip(*(model.parameters() for model in trained), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_a_run_resumes_in_mid_round_to_the_bit(backend, state_dtype, tmp_path):
    options = {"hold": 2, "reach": "all", "backend": backend, "state_dtype": state_dtype, "inner_steps": 4}
    whole, first, second = (build(dtype=torch.bfloat16, hidden=48) for _ in range(3))
    train(whole, sliced(whole, **options), 17)
    optimizer = sliced(first, **options)
    train(first, optimizer, 10)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    second.load_state_dict(saved["model"])
    resumed = sliced(second, **options)
    resumed.load_state_dict(saved["optimizer"])
    assert _places(second, resumed) == _places(first, optimizer)
    train(second, resumed, 7, 10)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_other_widths_is_refused():
    model = build(hidden=48)
    optimizer = sliced(model)
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match="the delta"):
        sliced(build(hidden=48), delta=0.05).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_model_and_optimizer_are_copied_together(how):
    model = build(hidden=48)
    optimizer = sliced(model, 2, inner_steps=4)
    train(model, optimizer, 6)
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(model, optimizer, 9, 6)
    train(twin, other, 9, 6)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_copy_in_mid_round_is_an_ordinary_model(tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    )
    optimizer = sliced(model)
    keys = list(model.state_dict())
    model(batch(0), labels=batch(0)).loss.backward()
    optimizer.step()
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    for each in (twin, loaded):
        each.requires_grad_(True)
        loss = each(batch(1), labels=batch(1)).loss
        loss.backward()
        assert all(type(param.grad) is Tensor for param in each.parameters())
        assert not is_hooked(each)
    assert is_hooked(model)
    # A copy within the round is recognised, whatever is written to slices in the meantime.
    with pytest.warns(UserWarning, match="copy of one that MISA trained"):
        again = MISA(param_groups(copy.deepcopy(model)), delta=0.3)
    assert len(again.modules) == 14


def test_release_and_deletion_leave_an_ordinary_model():
    model = build(hidden=48)
    model.blocks[1].requires_grad_(False)
    optimizer = sliced(model)
    assert not any(param.requires_grad for param in model.parameters())
    train(model, optimizer, 4)
    optimizer.release()
    assert not is_hooked(model)
    assert [p.requires_grad for p in model.blocks[1].parameters()] == [False] * 11
    assert all(p.requires_grad for p in model.blocks[0].parameters())
    model.blocks[1].requires_grad_(True)
    optimizer = sliced(model)
    train(model, optimizer, 1)
    del optimizer
    gc.collect()
    assert not is_hooked(model)
    assert all(p.requires_grad for p in model.parameters())


def test_flags_of_the_user():
    model = build(hidden=48)
    optimizer = sliced(model, 1, "down")
    train(model, optimizer, 4)
    loss_of(model, batch(4)).backward()
    held = {param: param.grad.part.clone() for param in optimizer.trained}
    with optimizer.thawed():
        assert all(param.requires_grad for param in model.parameters())
        # Gradients of the whole, which are not those of the round.
        torch.autograd.grad(loss_of(model, batch(0)), list(model.parameters()))
    # A gradient that was there stays.
    assert all(torch.equal(param.grad.part, held[param]) for param in held)
    optimizer.step()
    optimizer.zero_grad()
    frozen = model.blocks[2]
    with optimizer.thawed():
        frozen.requires_grad_(False)
    before = weights(frozen)
    train(model, optimizer, 9, 5)
    assert all(torch.equal(param, before[name]) for name, param in frozen.named_parameters())
    assert len(optimizer.active) == 3
    with optimizer.thawed():
        frozen.requires_grad_(True)
    train(model, optimizer, 6, 14)
    assert len(optimizer.active) == 4
    assert not torch.equal(frozen.down.weight, before["down.weight"])


def test_what_is_switched_on_is_switched_off_again():
    model = build(hidden=48)
    optimizer = sliced(model)
    train(model, optimizer, 1)
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match="switched on while not active"):
        optimizer.zero_grad()
    assert not any(param.requires_grad for param in model.parameters())
    before = weights(model)
    train(model, optimizer, 5, 1)
    assert sum(not torch.equal(param, before[name]) for name, param in model.named_parameters()) == 4


def test_a_gradient_of_the_whole_weight_is_used_in_its_slice():
    model, other = build(hidden=48), build(hidden=48)
    optimizers = [sliced(each) for each in (model, other)]
    for each, optimizer in zip((model, other), optimizers, strict=True):
        loss_of(each, batch(0)).backward()
        if each is other:
            for param in optimizer.trained:
                param.grad = param.grad.dense()
        optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_model_is_cast_and_layers_replaced_before_the_first_step():
    model = build(hidden=48)
    optimizer = sliced(model)
    model.to(torch.bfloat16)
    train(model, optimizer, 4)
    assert all(state.dtype == torch.float32 for own in optimizer.state.values() for key, state in own.items()
               if key.startswith("master"))  # fmt: skip
    # What is exchanged later gets no gradient, and that is said.
    model = build(hidden=48)
    optimizer = sliced(model, "run")
    train(model, optimizer, 1)
    model.blocks[1].down = nn.Linear(48, WIDTH, bias=False)
    with pytest.warns(UserWarning, match="blocks.1.down"):
        train(model, optimizer, 12, 1)


def test_a_weight_exchanged_within_its_layer_is_noticed_at_once():
    model = build(hidden=48)
    optimizer = sliced(model, "run", "down")
    train(model, optimizer, 1)
    model.blocks[1].down.weight = nn.Parameter(torch.zeros(WIDTH, 48))
    with pytest.warns(UserWarning, match="blocks.1.down.weight is trained in slices, and its layer is called with ano"):
        loss_of(model, batch(0)).backward()
    assert sum(param.grad is not None for param in optimizer.trained) == 3


def test_a_loop_that_switches_the_whole_model_on_trains_the_slices_as_ever():
    model, other = build(hidden=48), build(hidden=48)
    optimizer, same = sliced(model), sliced(other)
    with pytest.warns(UserWarning, match="had requires_grad switched on while not active"):
        for step in range(7):
            optimizer.zero_grad()
            # As training of GANs does, mostly before `zero_grad`.
            model.requires_grad_(True)
            loss_of(model, batch(step)).backward()
            optimizer.step()
            model.requires_grad_(False)
            train(other, same, 1, step)
    for (name, param), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=1e-5, msg=name)
        assert ("down" in name) == (not torch.equal(param, build(hidden=48).get_parameter(name))), name


def test_a_weight_that_is_used_without_its_layer_is_noticed():
    model = build(hidden=48)
    optimizer = sliced(model)
    down = model.blocks[1].down
    # As some models do with kernels of their own.
    model.blocks[1].forward = lambda x: x + F.silu(x @ down.weight) @ down.weight.T
    with pytest.warns(
        UserWarning, match=r"^blocks.1.down.* had no gradient.* used otherwise than by calling its layer"
    ):
        train(model, optimizer, 30)


@pytest.mark.parametrize("how", ["forward", "class"])
def test_a_layer_that_computes_otherwise_than_before_is_noticed_and_not_trained(how):
    model = build(hidden=48)
    optimizer = sliced(model, reach="output")
    layer = model.blocks[1].o
    if how == "forward":
        # As accelerate's hooks do; what it returns is not known to be the weight times the input.
        layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    else:
        layer.__class__ = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    before = weights(model)
    with pytest.warns(UserWarning, match=r"^blocks.1.o.weight is trained in slices, .* or has another forward now"):
        loss_of(model, batch(0)).backward()
    assert layer.weight.grad is None and model.blocks[0].o.weight.grad is not None
    optimizer.step()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=r"finds no linear layer with the weight blocks.1.o.weight"):
        train(model, optimizer, 5, 1)
    assert torch.equal(layer.weight, before["blocks.1.o.weight"])
    assert not torch.equal(model.blocks[0].o.weight, before["blocks.0.o.weight"])


@pytest.mark.parametrize("is_late", [False, True])
def test_hooks_of_accelerate_that_were_removed_leave_an_ordinary_layer(is_late):
    hooks = pytest.importorskip("accelerate.hooks")
    model = build(hidden=48)
    optimizer = sliced(model) if is_late else None
    for layer in (block.down for block in model.blocks):
        hooks.add_hook_to_module(layer, hooks.ModelHook())
        hooks.remove_hook_from_module(layer)
    optimizer = optimizer or sliced(model)
    loss_of(model, batch(0)).backward()
    assert all(type(block.down.weight.grad) is SlicedGradient for block in model.blocks)
    assert len(optimizer.trained) == 4


def test_a_gradient_of_an_earlier_slice_trains_nothing_of_this_one():
    model = build(hidden=48)
    optimizer = sliced(model, 1, "down", CyclicSampler, inner_steps=1)
    loss_of(model, batch(0)).backward()
    earlier = {param: param.grad for param in optimizer.trained}
    optimizer.step()
    before = weights(model)
    for param, grad in earlier.items():
        param.grad = grad
    optimizer.param_groups[0]["weight_decay"] = 0.0
    places = _places(model, optimizer)
    optimizer.step()
    for name, param in model.named_parameters():
        changed = (param != before[name]).nonzero()[:, -1].unique().tolist()
        if name in places:
            # What this slice has in common with that one.
            grad, place = earlier[param], places[name]
            common = range(max(grad.first, place.first), min(grad.first + grad.part.shape[1], place.last))
            assert changed == list(common)
        else:
            assert not changed


def test_autocast():
    model, full = build(hidden=48), build(hidden=48)
    optimizer = sliced(model, "run", "all")
    for each in (model, full):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(each(batch(0)[:, :-1]).flatten(0, 1).float(), batch(0)[:, 1:].flatten())
        loss.backward()
    for (name, param), expected in zip(model.named_parameters(), full.parameters(), strict=True):
        if (place := optimizer.trained.get(param)) is not None:
            part = expected.grad.narrow(place.axis, place.first, place.last - place.first)
            torch.testing.assert_close(param.grad.part, part, rtol=2e-2, atol=2e-3, msg=name)
            assert param.grad.dtype == torch.float32


def test_only_what_param_groups_knows_can_be_sliced():
    with pytest.raises(ValueError, match=r"finds no matrix to slice.*param_groups\(model\)"):
        MISA(build().parameters(), delta=0.1, **slices())
    groups = param_groups(build(hidden=48))
    gc.collect()
    # The model is gone.
    with pytest.raises(RuntimeError, match="finds no linear layer with the weight blocks.0.down.weight"):
        MISA(groups, delta=0.1, **slices())


def test_a_construction_that_finds_no_layer_leaves_an_earlier_optimizer_and_all_flags_as_they_were():
    model = build(hidden=48)
    groups = param_groups(model)
    optimizer = MISA(groups, delta=0.1, **slices())
    params = list(model.parameters())
    flags, weight = [param.requires_grad for param in params], model.blocks[1].down.weight
    model.blocks[1].down = nn.Identity()
    gc.collect()
    with pytest.raises(RuntimeError, match="finds no linear layer with the weight blocks.1.down.weight"):
        MISA(groups, delta=0.1, **slices())
    assert weight in optimizer.trained and not optimizer.is_released
    assert flags == [param.requires_grad for param in params]


def test_a_weight_that_is_more_than_one_of_linear_layers_is_not_sliced():
    model = build(hidden=48)
    model.head.weight = model.embedding.weight
    again = nn.Linear(48, WIDTH, bias=False)
    again.weight = model.blocks[0].down.weight
    model.blocks[0].add_module("again", again)
    groups = param_groups(model, sampled=[model.embedding.weight])
    optimizer = MISA(groups, delta=0.3, sampler=UniformSampler(granularity="slice", slices="all"))
    assert optimizer.coverage(100).slicing.unsliced == model.embedding.weight.numel()
    # Two linear layers with one weight add up.
    assert {model.blocks[0].down.weight, model.blocks[1].q.weight} < optimizer.trained.keys()
    assert model.embedding.weight not in optimizer.trained


def test_where_nothing_is_known_rows_of_all_are_taken_and_that_is_said():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    with pytest.warns(UserWarning, match="does not see which matrices lead back"):
        optimizer = MISA(param_groups(model), delta=0.1, **slices())
    assert {place.axis for place in optimizer.trained.values()} == {0}
    assert len(optimizer.active) == 6


def test_the_optimizer_shows_what_is_sliced():
    model = build(layers=3, width=32, hidden=128)
    optimizer = MISA(param_groups(model), delta=0.05, **slices())
    assert repr(optimizer).startswith("MISA(3 of ")
    assert "slices in 3 layers active" in repr(optimizer)
    line = str(optimizer).splitlines()[1]
    assert line.startswith("slices: 3 x down: ")
    assert "of 128 columns" in line
    planned = optimizer.coverage(1000)
    assert (planned.sets, planned.advice) == (1, None)
    assert str(planned.slicing) == line.removeprefix("slices: ")
    record = optimizer.monitor.current
    assert record.gradient_fraction == record.active_fraction <= 0.05
    assert record.backward_depth == 3


def test_a_round_is_recorded():
    model = build(hidden=48)
    optimizer = sliced(model, "run")
    train(model, optimizer, 7)
    first, second, _ = optimizer.monitor.rounds
    assert first.active == second.active
    assert (first.grad_norm > 0).all()
    assert (first.update_ratio > 0).all()
    assert second.age.tolist() == [6] * 4


def test_dense_parameters_beside_slices():
    model = build(hidden=48)
    groups = param_groups(model, dense=[model.head])
    optimizer = MISA(groups, lr=1e-2, delta=0.1, inner_steps=3, sampler=UniformSampler(granularity="slice"))
    oracle = Masked(model, optimizer)
    for step in range(7):
        oracle.step(batch(step))
        train(model, optimizer, 1, step)
    for param, expected in zip(model.parameters(), oracle.model.parameters(), strict=True):
        torch.testing.assert_close(param.double(), expected, rtol=0, atol=2e-4)
    model.head.requires_grad_(False)
    model.head.requires_grad_(True)
    assert HIDDEN == 40


def _slots(optimizer: MISA) -> Iterator[str]:
    for own in optimizer.state.values():
        yield from (key for key in own if key.startswith("exp_avg."))


def test_rehearsal_takes_what_a_run_takes():
    model = build(hidden=48)
    optimizer = sliced(model)
    optimizer.rehearse()
    train(model, optimizer, 1)
    held = optimizer.state_bytes
    train(model, optimizer, 8, 1)
    assert optimizer.state_bytes == held
    assert len(set(_slots(optimizer))) > 1
