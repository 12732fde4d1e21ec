"""What is right for the architectures of image models?"""

from __future__ import annotations

import torch
import transformers
from torch import nn
from zoo import Kind, Row
from zoo_text import of

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2, 1], "num_heads": [2, 2, 4]}
WINDOWS |= {"window_size": 4, "mlp_ratio": 2.0}
STAGES = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 2, 2, 4]}
DETECTION = {
    "use_timm_backbone": False,
    "backbone": None,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_queries": 5,
}
BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 2, 1, 1], "layer_type": "basic"}


def image(side: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.ones(1, 3, side, side)}


def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(**BACKBONE, out_features=["stage4"])
    config = transformers.DetrConfig(**DETECTION, backbone_config=backbone, d_model=16)
    return transformers.DetrForObjectDetection(config)


def deformable_detr() -> nn.Module:
    backbone = transformers.ResNetConfig(**BACKBONE, out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(**DETECTION, backbone_config=backbone, d_model=32, num_feature_levels=4)
    return transformers.DeformableDetrForObjectDetection(config)


def sam() -> nn.Module:
    image = {"image_size": 32, "patch_size": 4}
    vision = {**image, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 24}
    vision |= {"output_channels": 8, "window_size": 3, "global_attn_indexes": [1]}
    decoder = {"hidden_size": 8, "mlp_dim": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.SamConfig(
        vision_config=vision,
        prompt_encoder_config={**image, "hidden_size": 8, "mask_input_channels": 16},
        mask_decoder_config={**decoder, "iou_head_hidden_dim": 8},
    )
    return transformers.SamModel(config)


def mask2former() -> nn.Module:
    stages = {"depths": [1, 1, 2, 1], "num_heads": [2, 2, 4, 4], "out_features": [f"stage{i}" for i in (1, 2, 3, 4)]}
    backbone = transformers.SwinConfig(image_size=64, patch_size=4, embed_dim=8, window_size=2, mlp_ratio=2.0, **stages)
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=16,
        hidden_dim=32,
        encoder_feedforward_dim=24,
        encoder_layers=2,
        decoder_layers=3,
        num_attention_heads=4,
        dim_feedforward=24,
        num_queries=5,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


MLP = Kind(up="mlp.fc1", down="mlp.fc2")
VIT = Kind("attention.{q,k,v}_proj", "attention.o_proj") | MLP
BERT_LIKE = Kind(up="intermediate.dense", down="output.dense")
SWINV2 = Kind("attention.self.{query,key,value}", "attention.output.dense") | BERT_LIKE
# A network that makes the biases of the positions, not a table of them.
SWINV2 |= Kind(none="attention.self.continuous_position_bias_mlp.{0,2}")
BASIC = Kind(none="layer.{0,1}.convolution")
SHORTCUT = Kind(none="shortcut.convolution")
SELF = Kind("self_attn.{q,k,v}_proj", "self_attn.o_proj")
CROSS = Kind("encoder_attn.{q,k,v}_proj", "encoder_attn.o_proj")
DEFORMABLE = Kind("value_proj", "output_proj", unjudged="sampling_offsets attention_weights")
SAM = Kind("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")
SAM_CROSS = "cross_attn_{token_to_image,image_to_token}"
INVERTED = Kind(none="expand_1x1.convolution conv_3x3.convolution reduce_1x1.convolution")
RESNET = {
    "encoder.stages.0.layers.0": BASIC,
    "encoder.stages.{1-3}.layers.0": BASIC | SHORTCUT,
    "encoder.stages.1.layers.1": BASIC,
}
IN_SWIN = "model.pixel_level_module.encoder.swin.encoder.layers"
PIXELS = "model.pixel_level_module.decoder"


def below(path: str, layers: dict[str, Kind]) -> dict[str, Kind]:
    return {f"{path}.{pattern}": kind for pattern, kind in layers.items()}


TRANSFORMERS = {
    "ViT": Row(of("ViT", "ForImageClassification", VISION), {"vit.layers.{0-1}": VIT}, rest=28),
    "DINOv2": Row(
        of(
            "Dinov2",
            "Model",
            {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8, "patch_size": 4},
            use_swiglu_ffn=True,
        ),
        {
            "encoder.layer.{0-1}": Kind("attention.{q,k,v}_proj", "attention.o_proj")
            | Kind(up="mlp.{gate,up}_proj", down="mlp.down_proj")
        },
        rest=33,
    ),
    # Tables of positions in each layer and before all.
    "BEiT": Row(
        of(
            "Beit",
            "ForImageClassification",
            VISION,
            use_relative_position_bias=True,
            use_absolute_position_embeddings=True,
        ),
        {"beit.layers.{0-1}": VIT},
        rest=32,
    ),
    # The decoder has a width of its own, and positions of its own between the stacks.
    "ViT-MAE": Row(
        of(
            "ViTMAE",
            "ForPreTraining",
            VISION,
            decoder_hidden_size=8,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=12,
        ),
        {"vit.layers.{0-1}": VIT, "decoder.decoder_layers.{0-1}": VIT},
        outside="decoder.decoder_embed",
        rest=53,
        example=image(8),
    ),
    "Swin": Row(
        of("Swin", "ForImageClassification", WINDOWS),
        {"swin.encoder.layers.{0,2}.blocks.0": VIT, "swin.encoder.layers.1.blocks.{0-1}": VIT},
        outside="swin.encoder.layers.{0-1}.downsample.reduction",
        rest=56,
        example=image(32),
    ),
    "Swin v2": Row(
        of("Swinv2", "ForImageClassification", WINDOWS),
        {"swinv2.encoder.layers.{0,2}.blocks.0": SWINV2, "swinv2.encoder.layers.1.blocks.{0-1}": SWINV2},
        outside="swinv2.encoder.layers.{0-1}.downsample.reduction",
        rest=56,
    ),
    # The first layer of a stage has a projection to the stage's width.
    "Hiera": Row(
        of(
            "Hiera",
            "ForImageClassification",
            {"embed_dim": 8, "image_size": [32, 32], "depths": [1, 2, 1], "num_heads": [1, 2, 4], "num_query_pool": 2},
        ),
        {
            "hiera.encoder.stages.0.layers.0": Kind("attn.qkv", "attn.proj") | MLP,
            # Between two widths of the stream.
            "hiera.encoder.stages.{1,2}.layers.0": Kind(unjudged="attn.qkv attn.proj proj") | MLP,
            "hiera.encoder.stages.1.layers.1": Kind("attn.qkv", "attn.proj") | MLP,
        },
        rest=41,
    ),
    # From the second stage on, what embeds patches takes them from the layers before it.
    "SegFormer": Row(
        of("Segformer", "ForSemanticSegmentation", STAGES, decoder_hidden_size=8),
        {
            f"segformer.stages.{blocks}": VIT
            | Kind(none="mlp.dwconv.dwconv")
            | Kind(none="" if blocks[0] == "3" else "attention.sequence_reduction.sequence_reduction")
            for blocks in ("0.blocks.0", "1.blocks.{0-1}", "2.blocks.0", "3.blocks.0")
        },
        outside="segformer.stages.{1-3}.patch_embeddings.proj",
        rest=101,
        example=image(64),
    ),
    # Here they are registered in a list, before all layers.
    "PVT": Row(
        of("Pvt", "ForImageClassification", STAGES, image_size=64),
        {
            f"pvt.encoder.block.{blocks}": Kind("attention.self.{query,key,value}", "attention.output.dense")
            | Kind(up="mlp.dense1", down="mlp.dense2")
            | Kind(none="" if blocks[0] == "3" else "attention.self.sequence_reduction")
            for blocks in ("0.0", "1.{0-1}", "2.0", "3.0")
        },
        rest=87,
    ),
    "SAM": Row(
        sam,
        {
            "vision_encoder.layers.{0-1}": SAM,
            "mask_decoder.transformer.layers.{0-1}": Kind("self_attn.{q,k,v}_proj", "self_attn.out_proj")
            | Kind(f"{SAM_CROSS}.{{q,k,v}}_proj", f"{SAM_CROSS}.out_proj", "mlp.lin1", "mlp.lin2"),
        },
        # The first convolution of masks reads a mask, as a patch embedding reads an image.
        outside="vision_encoder.neck.conv{1,2} prompt_encoder.mask_embed.conv{2-3}",
        rest=134,
    ),
    "DETR": Row(
        detr,
        below("model.backbone.model", RESNET)
        | {"model.encoder.layers.{0-1}": SELF | MLP, "model.decoder.layers.{0-1}": SELF | CROSS | MLP},
        outside="model.input_projection",
        rest=65,
        example=image(64),
    ),
    "Deformable DETR": Row(
        deformable_detr,
        below("model.backbone.model", RESNET)
        | {
            "model.encoder.layers.{0-1}": DEFORMABLE.within("self_attn") | MLP,
            "model.decoder.layers.{0-1}": SELF | DEFORMABLE.within("encoder_attn") | MLP,
        },
        outside="model.input_proj.{0-3}.0",
        rest=77,
    ),
    # A Swin, a deformable encoder of pixels and a decoder, with a small pyramid between the latter.
    "Mask2Former": Row(
        mask2former,
        {
            f"{IN_SWIN}.{{0,1,3}}.blocks.0": VIT,
            f"{IN_SWIN}.2.blocks.{{0-1}}": VIT,
            f"{PIXELS}.encoder.layers.{{0-1}}": DEFORMABLE.within("self_attn") | Kind(up="fc1", down="fc2"),
            "model.transformer_module.decoder.layers.{0-1}": Kind("self_attn.{q,k,v}_proj", "self_attn.out_proj")
            | Kind("cross_attn.in_proj_weight", "cross_attn.out_proj", "fc1", "fc2"),
        },
        outside=f"{IN_SWIN}.{{0-2}}.downsample.reduction {PIXELS}.input_projections.{{0-2}}.0 "
        f"{PIXELS}.{{adapter_1.0,layer_1.0}}",
        # Multiplied with what the decoder makes, which is no module's doing.
        open=f"{PIXELS}.mask_projection",
        rest=151,
    ),
    "MobileViT": Row(
        of(
            "MobileViT",
            "ForImageClassification",
            {"image_size": 32, "hidden_sizes": [8, 8, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16]},
        ),
        {
            "mobilevit.encoder.layer.0.layer.0": INVERTED,
            "mobilevit.encoder.layer.1.layer.{0-2}": INVERTED,
            **{
                f"mobilevit.encoder.layer.{stage}.transformer.layer.{layers}": BERT_LIKE
                | Kind("attention.attention.{query,key,value}", "attention.output.dense")
                for stage, layers in {2: "{0-1}", 3: "{0-3}", 4: "{0-2}"}.items()
            },
        },
        outside="mobilevit.encoder.layer.{2-4}.downsampling_layer.{expand_1x1,conv_3x3,reduce_1x1}.convolution "
        "mobilevit.encoder.layer.{2-4}.{conv_kxk,conv_1x1,conv_projection,fusion}.convolution",
        rest=164,
    ),
}

CONVOLUTIONS = {
    "ConvNeXt": Row(
        of("ConvNext", "ForImageClassification", {"depths": [1, 2, 1], "hidden_sizes": [8, 16, 16], "num_stages": 3}),
        {
            "convnext.encoder.stages.{0,2}.layers.0": Kind(up="pwconv1", down="pwconv2", none="dwconv"),
            "convnext.encoder.stages.1.layers.{0-1}": Kind(up="pwconv1", down="pwconv2", none="dwconv"),
        },
        outside="convnext.encoder.stages.{1,2}.downsampling_layer.1",
        rest=38,
        example=image(32),
    ),
    "ResNet": Row(
        of(
            "ResNet",
            "ForImageClassification",
            {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [1, 2, 1]},
        ),
        {
            "resnet.encoder.stages.0.layers.0": Kind(none="layer.{0-2}.convolution"),
            "resnet.encoder.stages.{1,2}.layers.0": Kind(none="layer.{0-2}.convolution") | SHORTCUT,
            "resnet.encoder.stages.1.layers.1": Kind(none="layer.{0-2}.convolution"),
        },
        rest=33,
        example=image(32),
    ),
    # With squeeze and excitation, a Sequential of two convolutions within one of three.
    "RegNet": Row(
        of(
            "RegNet",
            "ForImageClassification",
            {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 2, 1, 1], "groups_width": 4},
        ),
        {
            f"regnet.encoder.stages.{layers}": Kind(none="layer.{0,1,3}.convolution layer.2.attention.{0,2}")
            | (SHORTCUT if layers.endswith("0") else Kind())
            for layers in ("{0-3}.layers.0", "1.layers.1")
        },
        rest=53,
    ),
    "MobileNetV2": Row(
        of("MobileNetV2", "ForImageClassification", {}),
        {"mobilenet_v2.layer.{0-15}": INVERTED},
        rest=110,
    ),
}

ROWS = TRANSFORMERS | CONVOLUTIONS
