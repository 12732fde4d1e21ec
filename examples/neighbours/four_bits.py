"""How do the linear layers of any model come to have 4 bits? As bitsandbytes' NF4, in place.

Models of transformers are loaded so, with `quantization_config=BitsAndBytesConfig(load_in_4bit=True)`.
"""

from __future__ import annotations

from torch import nn


def quantise(model: nn.Module) -> None:
    """Replace the linear layers within a model's lists of layers by bitsandbytes' of 4 bits (NF4), in place.

    What lies outside of the lists stays, such as the output head.

    Args:
        model: On any device that bitsandbytes has kernels for; on CPUs it has.
    """
    from bitsandbytes.nn import Linear4bit

    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    within = {id(layer) for layers in lists for layer in layers.modules()}
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or id(layer) not in within:
            continue
        kind = {"bias": layer.bias is not None, "compute_dtype": layer.weight.dtype, "quant_type": "nf4"}
        packed = Linear4bit(layer.in_features, layer.out_features, **kind)
        packed.load_state_dict(layer.state_dict())
        # It is quantised as it moves to a device, the one where it is, too.
        model.set_submodule(name, packed.to(layer.weight.device).requires_grad_(False))
