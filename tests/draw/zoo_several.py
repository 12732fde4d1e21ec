"""What is right for sound, and for models of several towers?"""

from __future__ import annotations

import torch
import transformers
from architectures import llava, qwen2_vl
from torch import nn
from zoo import Kind, Row
from zoo_text import BART, BART_CROSS, BERT, BERT_CROSS, LLAMA, OUT_PROJ, SEQ2SEQ, SIZES, TEXT, TOKENS, of
from zoo_vision import VISION, VIT

WAVE = {"input_values": torch.linspace(-1, 1, 400)[None]}
CONVOLUTIONS = {"conv_dim": [8, 8, 8], "conv_kernel": [3, 3, 3], "conv_stride": [2, 2, 2]}
CONVOLUTIONS |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SHORT = {"max_position_embeddings": 8}
PIXELS = torch.ones(1, 3, 8, 8)


def blip2() -> nn.Module:
    text = transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=16)
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config={**SIZES, "encoder_hidden_size": 16},
        text_config=text.to_dict(),
        num_query_tokens=3,
    )
    return transformers.Blip2ForConditionalGeneration(config)


def kosmos2() -> nn.Module:
    text = {"vocab_size": 32, "embed_dim": 16, "layers": 2, "ffn_dim": 24, "attention_heads": 4}
    config = transformers.Kosmos2Config(
        vision_config=VISION, text_config={**text, "max_position_embeddings": 16}, latent_query_num=3
    )
    return transformers.Kosmos2ForConditionalGeneration(config)


def idefics2() -> nn.Module:
    resampler = {"hidden_size": 16, "resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 4}
    config = transformers.Idefics2Config(
        vision_config=VISION,
        text_config=transformers.MistralConfig(**TEXT),
        perceiver_config={**resampler, "resampler_head_dim": 4, "num_key_value_heads": 2},
    )
    return transformers.Idefics2ForConditionalGeneration(config)


def two_vits() -> nn.Module:
    config = transformers.ViTConfig(**VISION)
    return nn.ModuleList(transformers.ViTModel(config, add_pooling_layer=False) for _ in range(2))


CLIP = OUT_PROJ | Kind(up="mlp.fc1", down="mlp.fc2")
BLIP = Kind("self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2")
WAV2VEC2 = Kind("attention.{q,k,v}_proj", "attention.out_proj")
WAV2VEC2 |= Kind(up="feed_forward.intermediate_dense", down="feed_forward.output_dense")
# What reads positions is as wide as what reads the stream, and registered last.
CONFORMER = Kind(unjudged="self_attn.linear_{q,k,v,out,pos}")
CONFORMER |= Kind(up="ffn{1,2}.intermediate_dense", down="ffn{1,2}.output_dense")
CONFORMER |= Kind(none="conv_module.{pointwise_conv1,depthwise_conv,pointwise_conv2}")
QFORMER = Kind("attention.attention.{query,key,value}", "attention.output.dense")
QFORMER |= Kind(up="intermediate_query.dense", down="output_query.dense")
QFORMER_CROSS = Kind("crossattention.attention.{query,key,value}", "crossattention.output.dense")

SOUND = {
    # Between the convolutions and the layers: a projection, and a convolution that adds positions, whose norms are the
    # other tensor that it consists of.
    "wav2vec 2.0": Row(
        of("Wav2Vec2", "ForCTC", SIZES, **CONVOLUTIONS, feat_extract_norm="layer"),
        {"wav2vec2.feature_extractor.conv_layers.{0-2}": Kind(none="conv"), "wav2vec2.encoder.layers.{0-1}": WAV2VEC2},
        outside="wav2vec2.feature_projection.projection "
        "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1",
        rest=36,
        example=WAVE,
    ),
    # The first of its convolutions has another class, since it alone has a norm.
    "HuBERT": Row(
        of("Hubert", "ForCTC", SIZES, **CONVOLUTIONS),
        # The first convolution is of a class of its own, at an end.
        {"hubert.feature_extractor.conv_layers.{1-2}": Kind(none="conv"), "hubert.encoder.layers.{0-1}": WAV2VEC2},
        outside="hubert.feature_projection.projection "
        "hubert.encoder.pos_conv_embed.conv.parametrizations.weight.original1",
        rest=33,
    ),
    "wav2vec 2.0 Conformer": Row(
        of(
            "Wav2Vec2Conformer",
            "ForCTC",
            SIZES,
            **CONVOLUTIONS,
            feat_extract_norm="layer",
            position_embeddings_type="relative",
            conv_depthwise_kernel_size=3,
        ),
        {
            "wav2vec2_conformer.feature_extractor.conv_layers.{0-2}": Kind(none="conv"),
            "wav2vec2_conformer.encoder.layers.{0-1}": CONFORMER,
        },
        outside="wav2vec2_conformer.feature_projection.projection "
        "wav2vec2_conformer.encoder.pos_conv_embed.conv.parametrizations.weight.original1",
        rest=60,
    ),
    # Two convolutions before the layers, which are the patches of sound.
    "Whisper": Row(
        of(
            "Whisper",
            "ForConditionalGeneration",
            SEQ2SEQ,
            num_mel_bins=4,
            max_source_positions=8,
            max_target_positions=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        {"model.encoder.layers.{0-1}": BART, "model.decoder.layers.{0-1}": BART_CROSS},
        rest=57,
        example={"input_features": torch.ones(1, 4, 16), "decoder_input_ids": TOKENS},
    ),
    "Audio Spectrogram Transformer": Row(
        of("AST", "ForAudioClassification", VISION, max_length=8, num_mel_bins=8),
        {"audio_spectrogram_transformer.layers.{0-1}": VIT},
        rest=31,
    ),
}

SEVERAL = {
    # The text tower is registered first and runs last. Both projections stand behind both towers.
    "CLIP": Row(
        of("CLIP", "Model", {"text_config": {**SIZES, **SHORT}, "vision_config": VISION}, projection_dim=8),
        {"text_model.encoder.layers.{0-1}": CLIP, "vision_model.encoder.layers.{0-1}": CLIP},
        rest=54,
        example={"input_ids": TOKENS, "pixel_values": PIXELS},
        order="vision_model.encoder.layers.{0-1} text_model.encoder.layers.{0-1}",
    ),
    # The head of the text tower stands between the towers by accident.
    "SigLIP": Row(
        of("Siglip", "Model", {"text_config": {**SIZES, **SHORT}, "vision_config": VISION}),
        {"text_model.encoder.layers.{0-1}": CLIP, "vision_model.encoder.layers.{0-1}": CLIP},
        rest=63,
        open="text_model.head",
    ),
    "BLIP": Row(
        of(
            "Blip",
            "ForConditionalGeneration",
            {"text_config": {**SIZES, "encoder_hidden_size": 16}, "vision_config": VISION},
        ),
        {"vision_model.encoder.layers.{0-1}": BLIP, "text_decoder.bert.encoder.layer.{0-1}": BERT_CROSS},
        rest=63,
        example={"input_ids": TOKENS, "pixel_values": PIXELS},
    ),
    # Every other layer of the Q-Former attends to the image.
    "BLIP-2": Row(
        blip2,
        {
            "vision_model.encoder.layers.{0-1}": BLIP,
            "qformer.encoder.layer.0": QFORMER | QFORMER_CROSS,
            "qformer.encoder.layer.1": QFORMER,
            "language_model.model.decoder.layers.{0-1}": BART,
        },
        outside="language_projection",
        rest=76,
    ),
    # The projector is registered behind both towers, of which the second runs first.
    "Kosmos-2": Row(
        kosmos2,
        {
            "text_model.model.layers.{0-1}": OUT_PROJ | Kind(up="ffn.fc1", down="ffn.fc2"),
            "vision_model.model.encoder.layers.{0-1}": CLIP,
        },
        rest=64,
        open="image_to_text_projection.{dense,x_attn.{k,v,q,out}_proj}",
        example={
            "input_ids": TOKENS,
            "pixel_values": PIXELS,
            "image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 0]], dtype=torch.bool),
        },
        order="vision_model.model.encoder.layers.{0-1} text_model.model.layers.{0-1}",
    ),
    "LLaVA": Row(
        llava,
        {"model.vision_tower.encoder.layers.{0-1}": CLIP, "model.language_model.layers.{0-1}": LLAMA},
        outside="model.multi_modal_projector.linear_{1,2}",
        rest=36,
        example={"input_ids": torch.tensor([[3, 31, 31, 31, 31, 5]]), "pixel_values": PIXELS},
    ),
    # Its projector is a Sequential of two linear modules.
    "Qwen2-VL": Row(
        qwen2_vl,
        {
            "model.visual.blocks.{0-1}": Kind("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
            "model.language_model.layers.{0-1}": LLAMA,
        },
        outside="model.visual.merger.mlp.{0,2}",
        rest=34,
    ),
    # A resampler with layers of its own between the towers, and the queries that it starts from.
    "Idefics2": Row(
        idefics2,
        {
            "model.vision_model.encoder.layers.{0-1}": CLIP,
            "model.connector.perceiver_resampler.layers.{0-1}": LLAMA,
            "model.text_model.layers.{0-1}": LLAMA,
        },
        outside="model.connector.modality_projection.{gate,up,down}_proj",
        rest=40,
    ),
    # The head is a Sequential of two linear modules.
    "ViLT": Row(
        of("Vilt", "ForQuestionAnswering", {**SIZES, "image_size": 8, "patch_size": 4}),
        {
            "vilt.encoder.layer.{0-1}": Kind("attention.attention.{query,key,value}", "attention.output.dense")
            | Kind(up="intermediate.dense", down="output.dense")
        },
        rest=40,
    ),
    # Neither patches nor positions of the second are a matrix between the layers.
    "a list of ViTs": Row(two_vits, {"{0-1}.layers.{0-1}": VIT}, rest=52),
    "PatchTST": Row(
        of(
            "PatchTST",
            "ForPrediction",
            {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 16},
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=24,
        ),
        {"model.encoder.layers.{0-1}": OUT_PROJ | Kind(up="ff.0", down="ff.3")},
        rest=25,
    ),
    "BERT in a dictionary beside its teacher": Row(
        lambda: nn.ModuleDict(
            {
                name: transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)
                for name in ("student", "teacher")
            }
        ),
        {"{student,teacher}.encoder.layer.{0-1}": BERT},
        rest=50,
    ),
}

ROWS = SOUND | SEVERAL
