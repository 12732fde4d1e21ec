"""What do optimizers that train all weights keep of a tensor, where, and what does its update work with?"""

from __future__ import annotations

import math

# bitsandbytes 0.50, optim/optimizer.py: a byte for each moment, and a float32 scale for 256 of them.
BITSANDBYTES_BYTES = 2 * (1 + 4 / 256)
# flashoptim 0.1.4, optimizers.py: a byte for each moment, a float16 scale for 32 of them.
FLASHOPTIM_BYTES = 2 * (1 + 2 / 32)
# bitsandbytes 0.50, optim/optimizer.py, get_state_buffer: moments of tensors of so many elements are paged, scales not.
PAGED_ELEMENTS = 10**5
# torchao 0.18, optim/subclass_4bit.py and adam.py: half a byte for each moment, a float32 scale for 128 of them, two
# tables of 16 float32; tensors that are smaller, or no multiple of the block, have moments in their own dtype. What its
# compiled update works with is left out: 26 bytes an element of the tensor at work on a CPU, unknown on GPUs.
TORCHAO_BLOCK, TORCHAO_LEAST, TORCHAO_TABLES = 128, 4096, 2 * 16 * 4
TORCHAO_BYTES = 2 * (1 / 2 + 4 / TORCHAO_BLOCK)
# APOLLO (arXiv 2412.05270): rank 256, Mini 1. apollo-torch 1.0.3, apollo.py: moments of r by the larger
# side and a projector of r by the smaller, in the gradient's dtype; the update makes two tensors of a gradient's size.
APOLLO_RANKS = {"APOLLO": 256, "APOLLO-Mini": 1}
# All weights are trained, and all gradients held unless a package releases them: flashoptim itself; for APOLLO
# transformers 5, "apollo_adamw_layerwise", on one GPU; for the others torchtune, `optimizer_in_bwd` of
# recipes/full_finetune_single_device.py, whose 8B_full_single_device.yaml has it with PagedAdamW8bit.
RELEASED = ("AdamW 8-bit", "AdamW paged", "AdamW 4-bit", "FlashOptim", *APOLLO_RANKS)
WHOLE = ("AdamW", *RELEASED)


def states_of(method: str, size: tuple[int, ...], is_projected: bool, element: int) -> tuple[float, float, float]:
    """Return the bytes of a tensor's states on the GPU, of those in host memory, and what its update works with.

    Args:
        method: One of `WHOLE`.
        size: Of the tensor.
        is_projected: Whether it is a matrix of a layer, which APOLLO projects.
        element: Bytes of an element of weights and gradients, 2 or 4.
    """
    numel = math.prod(size)
    if method in APOLLO_RANKS:
        elements = APOLLO_RANKS[method] * (2 * max(size) + min(size)) if is_projected else 2 * numel
        return element * elements, 0, 2 * element * numel
    if method == "AdamW paged":
        paged = 2 * numel * (numel >= PAGED_ELEMENTS)
        return BITSANDBYTES_BYTES * numel - paged, paged, paged
    if method == "AdamW 4-bit":
        is_quantised = numel >= TORCHAO_LEAST and numel % TORCHAO_BLOCK == 0
        return TORCHAO_BYTES * numel + TORCHAO_TABLES if is_quantised else 2 * element * numel, 0, 0
    narrow = element == 2
    each = {"AdamW": 4 * (2 + narrow), "AdamW 8-bit": BITSANDBYTES_BYTES, "FlashOptim": FLASHOPTIM_BYTES + narrow}
    return each[method] * numel, 0, 0
