"""Write down the module trees of models whose packages are not installed here: what `trees.py` rebuilds.

Needs timm 1.0, torchvision 0.28, diffusers 0.42 and open_clip 3.3 somewhere, none of them the project's:

    PYTHONPATH=/where/they/lie python tests/draw/record_trees.py

It downloads no weights, and needs torchvision's Python half alone: nothing calls its operators, since Faster R-CNN is
not run. Of every module, in the order of registration, it takes down name, class, the class of torch.nn that this
derives from, what that lists as its constants, and the shapes of the module's own parameters; and the order in which
one forward first called the modules, where there is one.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Without its library, which fits one build of torch alone, torchvision's Python half asks for these at its import.
for operator in ("nms", "qnms"):
    torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import diffusers  # noqa: E402
import open_clip  # noqa: E402
import timm  # noqa: E402
import torchvision  # noqa: E402

IMAGE = torch.zeros(1, 3, 224, 224)


def base_of(cls: type) -> str | None:
    """Name of the first public class of torch.nn that a class is or derives from, except for nn.Module."""
    names = (c.__name__ for c in cls.__mro__ if c is not nn.Module and getattr(nn, c.__name__, None) is c)
    return next(names, None)


def constants(module: nn.Module, base: str | None) -> dict[str, Any]:
    listed = getattr(getattr(nn, base), "__constants__", []) if base else []
    found = {name: getattr(module, name, None) for name in listed}
    return {name: value for name, value in found.items() if isinstance(value, (int, str, tuple))}


def order_of(model: nn.Module, inputs: dict[str, Any] | tuple[Any, ...]) -> list[str]:
    """Names of the modules in the order of their first call."""
    called: dict[str, None] = {}
    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(lambda _module, _args, name=name: called.setdefault(name))
    with torch.no_grad():
        model.eval()(*inputs) if isinstance(inputs, tuple) else model.eval()(**inputs)
    return list(called)


def tree(model: nn.Module, inputs: dict[str, Any] | tuple[Any, ...] | None) -> dict[str, Any]:
    modules = []
    assert len(list(model.parameters())) == len(list(model.named_parameters(remove_duplicate=False)))
    assert len(list(model.modules())) == len(list(model.named_modules(remove_duplicate=False)))
    for name, module in model.named_modules():
        cls, base = type(module), base_of(type(module))
        own = {key: list(param.shape) for key, param in module.named_parameters(recurse=False)}
        modules.append([name, f"{cls.__module__}.{cls.__qualname__}", base, constants(module, base), own])
    places = {name: place for place, (name, *_) in enumerate(modules)}
    return {"modules": modules, "order": [places[name] for name in order_of(model, inputs)] if inputs else None}


def of_timm(name: str, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (timm.create_model(name, **options), (IMAGE,))


def of_torchvision(name: str, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (getattr(torchvision.models, name)(**options), (IMAGE,))


def faster_rcnn() -> tuple[nn.Module, Any]:
    options = {"weights": None, "weights_backbone": None}
    return torchvision.models.detection.fasterrcnn_resnet50_fpn(**options), None


def unet() -> tuple[nn.Module, Any]:
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return model, (torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 5, 24))


def autoencoder() -> tuple[nn.Module, Any]:
    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    options = {"block_out_channels": (16, 32, 32), "layers_per_block": 2, "norm_num_groups": 8}
    model = diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, **options)
    return model, (torch.zeros(1, 3, 32, 32),)


def dit() -> tuple[nn.Module, Any]:
    options = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "sample_size": 8}
    model = diffusers.DiTTransformer2DModel(**options)
    labels = {"timestep": torch.tensor([1]), "class_labels": torch.tensor([1])}
    return model, {"hidden_states": torch.zeros(1, 4, 8, 8), **labels}


def flux() -> tuple[nn.Module, Any]:
    options = {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2}
    model = diffusers.FluxTransformer2DModel(
        in_channels=8, joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6), **options
    )
    states = {"hidden_states": torch.zeros(1, 4, 8), "encoder_hidden_states": torch.zeros(1, 3, 24)}
    places = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    more = {"pooled_projections": torch.zeros(1, 12), "timestep": torch.ones(1)}
    return model, {**states, **places, **more}


def sd3() -> tuple[nn.Module, Any]:
    options = {"num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32}
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, joint_attention_dim=24, pooled_projection_dim=12, **options
    )
    states = {"hidden_states": torch.zeros(1, 4, 8, 8), "encoder_hidden_states": torch.zeros(1, 3, 24)}
    return model, {**states, "pooled_projections": torch.zeros(1, 12), "timestep": torch.ones(1)}


def clip() -> tuple[nn.Module, Any]:
    vision = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    return model, (torch.zeros(1, 3, 32, 32), torch.ones(1, 8, dtype=torch.long))


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "timm Swin": of_timm("swin_tiny_patch4_window7_224", depths=(2, 2, 3, 2)),
    "timm ConvNeXt": of_timm("convnext_atto"),
    "timm EfficientNet": of_timm("efficientnet_b0"),
    "timm FastViT": of_timm("fastvit_t8"),
    "timm MaxViT": of_timm("maxvit_rmlp_pico_rw_256", img_size=224),
    "timm CoAtNet": of_timm("coatnet_nano_rw_224"),
    "timm ViT": of_timm("vit_tiny_patch16_224", depth=3),
    "timm EVA-02": of_timm("eva02_tiny_patch14_224", depth=3),
    "timm MLP-Mixer": of_timm("mixer_s32_224"),
    "timm XCiT": of_timm("xcit_nano_12_p16_224", depth=3),
    "timm RegNet": of_timm("regnety_002"),
    "torchvision ResNet": of_torchvision("resnet50"),
    "torchvision DenseNet": of_torchvision("densenet121"),
    "torchvision MobileNetV3": of_torchvision("mobilenet_v3_small"),
    "torchvision Swin": of_torchvision("swin_t"),
    "torchvision ViT": of_torchvision("vit_b_16"),
    "torchvision Faster R-CNN": faster_rcnn,
    "diffusers UNet2DCondition": unet,
    "diffusers AutoencoderKL": autoencoder,
    "diffusers DiT": dit,
    "diffusers Flux": flux,
    "diffusers SD3": sd3,
    "open_clip CLIP": clip,
}


def main() -> None:
    trees = {name: tree(*build()) for name, build in MODELS.items()}
    text = json.dumps(trees, separators=(",", ":"))
    # Without a time, so that the same trees give the same file.
    with open(Path(__file__).with_name("trees.json.gz"), "wb") as file:
        file.write(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
