"""Is the chunked loss of the examples the loss of all logits, without holding them?"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory import PeakMemory
from examples.loops.chunked_loss import chunked_cross_entropy

TOKENS, WIDTH, VOCABULARY = 50, 8, 4000


def inputs(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[::7] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_loss_and_gradients_are_those_of_all_logits_in_float64(chunk):
    hidden, weight, targets = inputs(torch.float32)
    loss = chunked_cross_entropy(hidden, weight, targets, chunk)
    loss.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy(F.linear(*exact), targets)
    expected.backward()
    # Sums of 50 terms, of logits that sum 8: some ulps of float32.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for x, y in zip((hidden, weight), exact, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_of_logits_is_held_at_most(dtype):
    hidden, weight, targets = inputs(dtype)
    weight.requires_grad_(False)
    chunk = 5
    with PeakMemory() as forward:
        loss = chunked_cross_entropy(hidden, weight, targets, chunk)
    of_a_chunk = 4 * chunk * VOCABULARY
    # Logits and log-probabilities in float32, what they are computed from, and little else; nothing is left.
    assert forward.peak_bytes < 3 * of_a_chunk < 4 * TOKENS * VOCABULARY
    assert forward.held_bytes < 0.1 * of_a_chunk
    with PeakMemory() as backward:
        loss.backward()
    # Log-probabilities, their gradient and that of the logits.
    assert backward.peak_bytes < 3.2 * of_a_chunk
