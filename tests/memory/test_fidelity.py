"""What compressed moments do to an update: on gradients of a real training run, and on gradients made to do harm.

Every figure is of the optimizer itself on zero weights, with lr 1 and no decay: what it leaves is the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from examples.demo.data import finetuning_corpus, random_batches
from examples.demo.model import Llama, LlamaConfig
from examples.demo.train import batch_loss
from misa_kernels import MISA
from misa_kernels.memory.codec import FORMATS

STEPS = 50
# Per format: the least cosine of an update with that of torch.optim.AdamW in float32, and the largest ratio of their
# root mean squares, at any age; on gradients made to do harm, that ratio of the largest ones, and the largest element,
# which in AdamW is at most (1 - beta1) / sqrt(1 - beta2) = 3.2 in the long run.
LIMITS = {
    "fp32": (0.9999, 1.001, 1.001, 4.0),
    "bf16": (0.996, 1.02, 1.02, 4.0),
    "int8": (0.996, 1.02, 1.1, 4.0),
    # E4M3 has 3 bits of mantissa: what a group spans beyond 16 octaves coarsens them further.
    "fp8": (0.996, 1.02, 2.5, 16.0),
    "int8+int4": (0.94, 1.2, 1.1, 4.0),
}
# The least cosine at age 200, to which dense tensors and modules that stay come, and the largest ratio there.
OLD = {"fp32": 0.9999, "bf16": 0.999, "int8": 0.998, "fp8": 0.99, "int8+int4": 0.94}
OLDEST_RATIO = 1.1


@pytest.fixture(scope="module")
def gradients() -> list[list[Tensor]]:
    """Gradients of 200 steps of AdamW on C++ headers, of the matrices of the first and the last layer."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(layers=2, context=64))
    batches = random_batches(finetuning_corpus().train, 4, 64, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    chosen = [p for layer in (model.layers[0], model.layers[-1]) for p in layer.parameters() if p.ndim == 2]
    recorded = []
    for step in range(20 + 4 * STEPS):
        batch_loss(model, next(batches)).backward()
        if step >= 20:
            recorded.append([p.grad.clone() for p in chosen])
        optimizer.step()
        optimizer.zero_grad()
    return recorded


def updates(recorded: Sequence[Sequence[Tensor]], state_dtype: str | None) -> Iterator[Tensor]:
    """Yield the update of each step, one vector; AdamW's own without a format."""
    params = [nn.Parameter(torch.zeros_like(g)) for g in recorded[0]]
    if state_dtype is None:
        optimizer = torch.optim.AdamW(params, lr=1.0, weight_decay=0.0)
    else:
        optimizer = MISA(
            params, lr=1.0, weight_decay=0.0, delta=1.0, state_dtype=state_dtype, inner_steps=STEPS, backend="reference"
        )
    for step in recorded:
        for p, g in zip(params, step, strict=True):
            p.data.zero_()
            p.grad = g.clone()
        optimizer.step()
        yield torch.cat([-p.detach().flatten() for p in params])


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def cosines(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    return [cosine_similarity(a, b, 0).item() for a, b in zip(ours, exact, strict=True)]


def test_every_format_has_limits():
    assert LIMITS.keys() == FORMATS.keys()


@pytest.mark.parametrize("state_dtype", FORMATS)
def test_updates_from_zero_state_are_those_of_adamw(gradients, state_dtype):
    exact, ours = (list(updates(gradients[:STEPS], name)) for name in (None, state_dtype))
    least_cosine, largest_ratio, _, _ = LIMITS[state_dtype]
    found = cosines(ours, exact)
    assert min(found) >= least_cosine, (found.index(min(found)) + 1, min(found))
    ratios = [rms(a) / rms(b) for a, b in zip(ours, exact, strict=True)]
    assert 0.8 <= min(ratios) and max(ratios) <= largest_ratio, (min(ratios), max(ratios))


@pytest.mark.parametrize("state_dtype", FORMATS)
def test_old_updates_do_not_drift_away(gradients, state_dtype):
    """Rounded to nearest, a second moment stands still once beta2 moves it by less than half a step."""
    attention = [step[:3] for step in gradients]
    exact, ours = (list(updates(attention, name))[-20:] for name in (None, state_dtype))
    assert min(cosines(ours, exact)) >= OLD[state_dtype]
    ratios = [rms(a) / rms(b) for a, b in zip(ours, exact, strict=True)]
    assert 1 / OLDEST_RATIO <= min(ratios) and max(ratios) <= OLDEST_RATIO, (min(ratios), max(ratios))


def dynamic_map(signed: bool) -> Tensor:
    """The 256 numbers of dynamic tree quantization, as bitsandbytes fills them (Dettmers et al., arXiv 2110.02861).

    A sign, e zeros for 10^-e, a one, and the bits that remain for equal steps between .1 and 1, at their middles.
    """
    numbers = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - e if signed else 7 - e) + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0**-e).tolist()
        numbers += middles + [-x for x in middles if signed]
    assert len(numbers) == 256
    return torch.tensor(sorted(numbers))


def quantized(x: Tensor, numbers: Tensor) -> Tensor:
    blocks = x.view(-1, 128)
    scale = blocks.abs().amax(1, keepdim=True)
    middles = (numbers[1:] + numbers[:-1]) / 2
    return (numbers[torch.bucketize(blocks / scale.clamp(min=1e-38), middles)] * scale).view(-1)


def dynamic_updates(recorded: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """Yield the updates of AdamW whose moments are stored in bitsandbytes' 8 bits."""
    flat = [torch.cat([g.flatten() for g in step]) for step in recorded]
    m, v = torch.zeros_like(flat[0]), torch.zeros_like(flat[0])
    for t, g in enumerate(flat, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        yield m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        m, v = quantized(m, dynamic_map(True)), quantized(v, dynamic_map(False))


def test_int8_is_as_close_as_the_dynamic_map_of_bitsandbytes(gradients):
    assert sum(g.numel() for g in gradients[0]) % 128 == 0
    gradients = gradients[:STEPS]
    exact = list(updates(gradients, None))
    ours, theirs = (cosines(list(found), exact) for found in (updates(gradients, "int8"), dynamic_updates(gradients)))
    assert min(theirs) > 0.99
    gap = max(b - a for a, b in zip(ours, theirs, strict=True))
    assert gap < 0.001, (gap, min(ours), min(theirs), ours[-1], theirs[-1])


def harmful(kind: str) -> list[list[Tensor]]:
    """150 gradients of 8 rows of 256: two groups a row."""
    random = torch.Generator().manual_seed(0)
    spread = 10.0 ** torch.linspace(-8, 2, 256)
    made = []
    for step in range(150):
        g = torch.randn(8, 256, generator=random)
        rare = torch.rand(8, 256, generator=random) < 0.01
        if kind == "burst, then zeros":
            g *= 1e-3
            g[:, ::50] = 1e3 * (step == 5)
        elif kind == "burst alone":
            g = torch.zeros(8, 256)
            g[:, ::50] = 1e3 * (step == 5)
            g[:, 1::50] = 1e-3 * (step == 60)
        elif kind == "ten decades in a row":
            g *= spread
        elif kind == "ten decades of constants":
            g = spread.repeat(8, 1)
        elif kind == "constant":
            g = torch.full((8, 256), 1e-4)
        elif kind == "sparse":
            g *= rare
        elif kind == "falling":
            g *= 10.0 ** (-step / 10)
        elif kind == "rising":
            g *= 10.0 ** (step / 20 - 15)
        elif kind == "huge":
            g *= 1e15
        made.append([g])
    return made


HARMFUL = (
    "burst, then zeros",
    "burst alone",
    "ten decades in a row",
    "ten decades of constants",
    "constant",
    "sparse",
    "falling",
    "rising",
    "huge",
)


@pytest.mark.parametrize("kind", HARMFUL)
def test_no_gradients_make_an_update_without_bound(kind):
    """A second moment that fell to 0 beside a momentum that did not would move a weight by 1e8."""
    made = harmful(kind)
    largest = max(map(rms, updates(made, None)))
    for state_dtype in FORMATS:
        ours = list(updates(made, state_dtype))
        assert max(u.abs().max().item() for u in ours) <= LIMITS[state_dtype][3], state_dtype
        assert max(map(rms, ours)) <= LIMITS[state_dtype][2] * largest, state_dtype
