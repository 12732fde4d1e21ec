"""What is right for models of timm, torchvision, diffusers and open_clip, whose trees `record_trees.py` wrote down?"""

from __future__ import annotations

import torch
from trees import recorded
from zoo import Kind, Row

# What the trees are called with, which compute nothing.
ANY = (torch.empty(0, device="meta"),)


def within_stages(path: str, depths: list[int], first: Kind, other: Kind | None = None) -> dict[str, Kind]:
    """Layers of stages, `path` having a place for the stage's number, of which the first layer may differ."""
    other = first if other is None else other
    layers = {}
    for stage, depth in enumerate(depths):
        layers[f"{path.format(stage)}.0"] = first
        if depth > 1:
            layers[f"{path.format(stage)}.{{1-{depth - 1}}}"] = other
    return layers


FUSED = Kind("attn.qkv", "attn.proj")
MLP = Kind(up="mlp.fc1", down="mlp.fc2")
VIT = FUSED | MLP
TORCH_MLP = Kind(up="mlp.0", down="mlp.3")
SQUEEZED = Kind(none="conv_dw se.conv_reduce se.conv_expand")
# What scales is a kernel of one element a channel.
FASTVIT = Kind(none="token_mixer.mixer.conv_kxk.0.conv mlp.conv.conv mlp.fc{1,2}")
MBCONV = Kind(none="conv1_1x1 conv2_kxk conv3_1x1 se.fc{1,2}")
WIDENED = Kind(none="shortcut.expand")
MAXVIT = MBCONV.within("conv") | VIT.within("attn_block") | VIT.within("attn_grid")
POSITIONS = Kind(none="{attn_block,attn_grid}.attn.rel_pos.mlp.fc{1,2}")
# With one head, the second matrix of the network that makes the biases of the positions is a vector.
ONE_HEAD = Kind(none="{attn_block,attn_grid}.attn.rel_pos.mlp.fc1")
COATNET = Kind(none="mlp.fc{1,2}", unjudged="attn.qkv attn.proj")
REGNET = Kind(none="conv{1-3}.conv se.fc{1,2}")
BOTTLENECK = Kind(none="conv{1-3}")
DOWNSAMPLED = BOTTLENECK | Kind(none="downsample.0")
DENSE = Kind(none="conv{1,2}")
XCIT = VIT | Kind(none="local_mp.conv{1,2}")
MIXER = Kind(none="mlp_tokens.fc{1,2}", unjudged="mlp_channels.fc{1,2}")
EXCITED = Kind(none="block.2.fc{1,2} block.{0,1,3}.0")
RESNET = Kind(none="conv{1,2} time_emb_proj")
PLAIN_RESNET = Kind(none="conv{1,2}")
SHORTCUT = Kind(none="conv_shortcut")
FEED = Kind(up="ff.net.0.proj", down="ff.net.2")
SPATIAL = (Kind("attn{1,2}.to_{q,k,v}", "attn{1,2}.to_out.0") | FEED).within("transformer_blocks.0")
SPATIAL |= Kind(none="proj_in proj_out")
VAE_ATTENTION = Kind(unjudged="to_{q,k,v} to_out.0")
# Nothing but names tells the two streams apart.
JOINT = Kind(unjudged="attn.to_{q,k,v} attn.add_{q,k,v}_proj attn.to_out.0 {norm1,norm1_context}.linear") | FEED
JOINT_CONTEXT = JOINT | Kind(unjudged="attn.to_add_out", up="ff_context.net.0.proj", down="ff_context.net.2")
RESBLOCK = Kind("attn.in_proj_weight", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")

TIMM = {
    # Here the downsampling stands at the start of a stage.
    "timm Swin": Row(
        recorded("timm Swin"),
        within_stages("layers.{}.blocks", [2, 2, 3, 2], VIT),
        outside="layers.{1-3}.downsample.reduction",
        rest=95,
        example=ANY,
    ),
    "timm ConvNeXt": Row(
        recorded("timm ConvNeXt"),
        within_stages("stages.{}.blocks", [2, 2, 6, 2], Kind(none="conv_dw mlp.fc{1,2}")),
        outside="stages.{1-3}.downsample.1",
        rest=89,
        example=ANY,
    ),
    # The one layer of the first stage is of a class of its own.
    "timm EfficientNet": Row(
        recorded("timm EfficientNet"),
        {"blocks.0.0": SQUEEZED | Kind(none="conv_pw")}
        | {
            f"blocks.{stage}.{{0-{depth - 1}}}": SQUEEZED | Kind(none="conv_pw conv_pwl")
            for stage, depth in enumerate([2, 2, 3, 3, 4, 1], start=1)
        },
        rest=134,
        example=ANY,
    ),
    # The stem is a stack, too, in shape.
    "timm FastViT": Row(
        recorded("timm FastViT"),
        within_stages("stages.{}.blocks", [2, 2, 4, 2], FASTVIT),
        outside="stages.{1-3}.downsample.proj.{0.large_conv.conv,0.small_conv.conv,1.conv_kxk.0.conv}",
        rest=199,
        open="stem.{0-2}.conv_kxk.0.conv stem.0.conv_scale.conv",
        example=ANY,
    ),
    # A layer is a convolution and two attentions, of windows and of a grid.
    "timm MaxViT": Row(
        recorded("timm MaxViT"),
        {"stages.0.blocks.{0-1}": MAXVIT | ONE_HEAD}
        | {
            f"stages.{stage}.blocks.{number}": MAXVIT | POSITIONS | (WIDENED.within("conv") if number == 0 else Kind())
            for stage, depth in [(1, 2), (2, 5), (3, 2)]
            for number in range(depth)
        },
        rest=320,
        example=ANY,
    ),
    "timm CoAtNet": Row(
        recorded("timm CoAtNet"),
        {
            "stages.0.blocks.{0-2}": MBCONV,
            "stages.1.blocks.0": MBCONV | WIDENED,
            "stages.1.blocks.{1-3}": MBCONV,
            "stages.{2-3}.blocks.0": COATNET | WIDENED,
            "stages.2.blocks.{1-5}": COATNET,
            "stages.3.blocks.{1-2}": COATNET,
        },
        rest=155,
        example=ANY,
    ),
    "timm ViT": Row(recorded("timm ViT"), {"blocks.{0-2}": VIT}, rest=32, example=ANY),
    "timm EVA-02": Row(recorded("timm EVA-02"), {"blocks.{0-2}": VIT}, rest=33, example=ANY),
    "timm MLP-Mixer": Row(recorded("timm MLP-Mixer"), {"blocks.{0-7}": MIXER}, rest=70, example=ANY),
    # What embeds patches is a stack of convolutions, too, in shape; a projection of the positions stands behind it.
    "timm XCiT": Row(
        recorded("timm XCiT"),
        {"blocks.{0-2}": XCIT, "cls_attn_blocks.{0-1}": Kind("attn.{q,k,v}", "attn.proj") | MLP},
        rest=92,
        open="patch_embed.proj.{0,2,4,6}.0 pos_embed.token_projection",
        example=ANY,
    ),
    # Stages and their layers are attributes, s1 to s4 and b1 to b7.
    "timm RegNet": Row(
        recorded("timm RegNet"),
        {"s{1-4}.b1": REGNET | Kind(none="downsample.conv"), "s3.b{2-4}": REGNET, "s4.b{2-7}": REGNET},
        rest=117,
        example=ANY,
    ),
}

TORCHVISION = {
    "torchvision ResNet": Row(
        recorded("torchvision ResNet"),
        {
            f"layer{stage + 1}.{layers}": kind
            for stage, depth in enumerate([3, 4, 6, 3])
            for layers, kind in [("0", DOWNSAMPLED), (f"{{1-{depth - 1}}}", BOTTLENECK)]
        },
        rest=109,
        example=ANY,
    ),
    "torchvision DenseNet": Row(
        recorded("torchvision DenseNet"),
        {
            f"features.denseblock{block}.denselayer{{1-{depth}}}": DENSE
            for block, depth in enumerate([6, 12, 24, 16], start=1)
        },
        outside="features.transition{1-3}.conv",
        rest=245,
        example=ANY,
    ),
    # Its stem and its last convolution are of one class, and stand at the ends of the same Sequential.
    "torchvision MobileNetV3": Row(
        recorded("torchvision MobileNetV3"),
        {
            "features.1": Kind(none="block.0.0 block.1.fc{1,2} block.2.0"),
            "features.{2-3}": Kind(none="block.{0-2}.0"),
            "features.{4-11}": EXCITED,
        },
        rest=92,
        example=ANY,
    ),
    # Patches, stages and what lies between them are elements of one Sequential.
    "torchvision Swin": Row(
        recorded("torchvision Swin"),
        {f"features.{stage}.{{0-1}}": FUSED | TORCH_MLP for stage in (1, 3, 7)}
        | {"features.5.{0-5}": FUSED | TORCH_MLP},
        outside="features.{2,4,6}.reduction",
        rest=122,
        example=ANY,
    ),
    "torchvision ViT": Row(
        recorded("torchvision ViT"),
        {
            "encoder.layers.encoder_layer_{0-11}": TORCH_MLP
            | Kind("self_attention.in_proj_weight", "self_attention.out_proj")
        },
        rest=104,
        example=ANY,
    ),
    # A pyramid behind the backbone: its projections to one width, and as many convolutions side by side.
    "torchvision Faster R-CNN": Row(
        recorded("torchvision Faster R-CNN"),
        {
            f"backbone.body.layer{stage + 1}.{layers}": kind
            for stage, depth in enumerate([3, 4, 6, 3])
            for layers, kind in [("0", DOWNSAMPLED), (f"{{1-{depth - 1}}}", BOTTLENECK)]
        },
        rest=133,
        open="backbone.fpn.layer_blocks.{0-3}.0",
    ),
}

DIFFUSERS = {
    # Registered: down, up, middle, and attentions before the convolutions that they follow.
    "diffusers UNet2DCondition": Row(
        recorded("diffusers UNet2DCondition"),
        {
            "down_blocks.{0-1}.attentions.{0-1}": SPATIAL,
            "down_blocks.0.resnets.{0-1}": RESNET,
            "down_blocks.1.resnets.0": RESNET | SHORTCUT,
            "down_blocks.1.resnets.1": RESNET,
            "down_blocks.2.resnets.{0-1}": RESNET,
            "up_blocks.{0-2}.resnets.{0-2}": RESNET | SHORTCUT,
            "up_blocks.{1-2}.attentions.{0-2}": SPATIAL,
            "mid_block.attentions.0": SPATIAL,
            "mid_block.resnets.{0-1}": RESNET,
        },
        outside="down_blocks.{0-1}.downsamplers.0.conv up_blocks.{0-1}.upsamplers.0.conv",
        rest=297,
        example=ANY,
        order="down_blocks.{0-1}.{resnets.0,attentions.0,resnets.1,attentions.1,downsamplers.0.conv} "
        "down_blocks.2.resnets.{0-1} mid_block.{resnets.0,attentions.0,resnets.1} "
        "up_blocks.0.{resnets.{0-2},upsamplers.0.conv} "
        "up_blocks.1.{resnets.0,attentions.0,resnets.1,attentions.1,resnets.2,attentions.2,upsamplers.0.conv} "
        "up_blocks.2.{resnets.0,attentions.0,resnets.1,attentions.1,resnets.2,attentions.2}",
    ),
    # The two convolutions between the halves are registered behind both.
    "diffusers AutoencoderKL": Row(
        recorded("diffusers AutoencoderKL"),
        {
            "encoder.down_blocks.{0,2}.resnets.{0-1}": PLAIN_RESNET,
            "encoder.down_blocks.1.resnets.0": PLAIN_RESNET | SHORTCUT,
            "encoder.down_blocks.1.resnets.1": PLAIN_RESNET,
            "{encoder,decoder}.mid_block.attentions.0": VAE_ATTENTION,
            "{encoder,decoder}.mid_block.resnets.{0-1}": PLAIN_RESNET,
            "decoder.up_blocks.{0-1}.resnets.{0-2}": PLAIN_RESNET,
            "decoder.up_blocks.2.resnets.0": PLAIN_RESNET | SHORTCUT,
            "decoder.up_blocks.2.resnets.{1-2}": PLAIN_RESNET,
        },
        outside="encoder.down_blocks.{0-1}.downsamplers.0.conv encoder.conv_out decoder.conv_in "
        "decoder.up_blocks.{0-1}.upsamplers.0.conv",
        # Between the halves only in the order in which they run.
        open="quant_conv post_quant_conv quant_conv.bias post_quant_conv.bias",
        rest=142,
        example=ANY,
        order="encoder.down_blocks.{0-1}.{resnets.{0-1},downsamplers.0.conv} encoder.down_blocks.2.resnets.{0-1} "
        "encoder.mid_block.{resnets.0,attentions.0,resnets.1} encoder.conv_out "
        "decoder.conv_in decoder.mid_block.{resnets.0,attentions.0,resnets.1} "
        "decoder.up_blocks.{0-1}.{resnets.{0-2},upsamplers.0.conv} decoder.up_blocks.2.resnets.{0-2}",
    ),
    # Each layer embeds time and class anew, and makes its scales and gates of them.
    "diffusers DiT": Row(
        recorded("diffusers DiT"),
        {
            "transformer_blocks.{0-2}": Kind("attn1.to_{q,k,v}", "attn1.to_out.0")
            | FEED
            | Kind(none="norm1.emb.timestep_embedder.linear_{1,2} norm1.linear")
        },
        rest=36,
        example=ANY,
    ),
    # Layers of two streams, then of one whose attention and feed-forward network share their last matrix.
    "diffusers Flux": Row(
        recorded("diffusers Flux"),
        {
            "transformer_blocks.{0-1}": JOINT_CONTEXT,
            "single_transformer_blocks.{0-2}": Kind(unjudged="attn.to_{q,k,v} proj_mlp norm.linear proj_out"),
        },
        rest=76,
        example=ANY,
    ),
    # The last layer has no use for what it would write to the text's stream.
    "diffusers SD3": Row(
        recorded("diffusers SD3"),
        {"transformer_blocks.{0-1}": JOINT_CONTEXT, "transformer_blocks.2": JOINT},
        rest=55,
        example=ANY,
    ),
}

OPEN_CLIP = {
    # Raw matrices project both towers, and raw tables hold their positions.
    "open_clip CLIP": Row(
        recorded("open_clip CLIP"),
        {"visual.transformer.resblocks.{0-2}": RESBLOCK, "transformer.resblocks.{0-1}": RESBLOCK},
        rest=54,
        example=ANY,
    ),
}

ROWS = TIMM | TORCHVISION | DIFFUSERS | OPEN_CLIP
