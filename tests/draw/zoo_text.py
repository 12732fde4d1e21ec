"""What is right for the architectures of text models?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from zoo import Kind, Row

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
TEXT = {**SIZES, **IDS, "num_key_value_heads": 2}
SEQ2SEQ = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
T5 = {"vocab_size": 32, "d_model": 16, "d_ff": 24, "num_heads": 4, "d_kv": 4, "num_layers": 2}
MOE = {**TEXT, "num_experts": 3, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])
PAIR = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}


def of(name: str, head: str = "ForCausalLM", base: dict[str, Any] = TEXT, **options: Any) -> Callable[[], nn.Module]:
    """Make a model of the transformers package by the prefix of its classes' names."""
    config, model = getattr(transformers, f"{name}Config"), getattr(transformers, name + head)
    return lambda: model(config(**{**base, **options}))


def encoder_decoder() -> nn.Module:
    encoder = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)
    config = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    return transformers.EncoderDecoderModel(encoder=encoder, decoder=transformers.BertLMHeadModel(config))


ATTENTION = Kind(qkv="self_attn.{q,k,v}_proj", output="self_attn.o_proj")
LLAMA = ATTENTION | Kind(up="mlp.{gate,up}_proj", down="mlp.down_proj")
OUT_PROJ = Kind(qkv="self_attn.{q,k,v}_proj", output="self_attn.out_proj")
BART = OUT_PROJ | Kind(up="fc1", down="fc2")
BART_CROSS = BART | Kind(qkv="encoder_attn.{q,k,v}_proj", output="encoder_attn.out_proj")
FUSED = Kind(qkv="self_attention.query_key_value", output="self_attention.dense")
FUSED |= Kind(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")
EXPERTS = Kind(up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj", unjudged="mlp.gate")
BERT_FFN = Kind(up="intermediate.dense", down="output.dense")
BERT = Kind(qkv="attention.self.{query,key,value}", output="attention.output.dense") | BERT_FFN
BERT_CROSS = BERT | Kind(qkv="crossattention.self.{query,key,value}", output="crossattention.output.dense")
T5_SELF = Kind(qkv="layer.0.SelfAttention.{q,k,v}", output="layer.0.SelfAttention.o")
T5_CROSS = T5_SELF | Kind(qkv="layer.1.EncDecAttention.{q,k,v}", output="layer.1.EncDecAttention.o")
NLLB = OUT_PROJ
NLLB_CROSS = NLLB | Kind(qkv="cross_attention.{q,k,v}_proj", output="cross_attention.out_proj")
NLLB_DENSE = Kind(up="ffn.fc1", down="ffn.fc2")
NLLB_SPARSE = Kind(up="ffn.experts.expert_{0-2}.fc1", down="ffn.experts.expert_{0-2}.fc2")
NLLB_SPARSE |= Kind(unjudged="ffn.router.classifier")
MLA = Kind(qkv="self_attn.{q_a_proj,kv_a_proj_with_mqa}", output="self_attn.o_proj", none="self_attn.{q_b,kv_b}_proj")
MAMBA = Kind(none="conv1d x_proj dt_proj A_log", unjudged="in_proj out_proj")
REFORMER = Kind(qkv="attention.self_attention.value", output="attention.output.dense")
REFORMER |= Kind(up="feed_forward.dense.dense", down="feed_forward.output.dense")
FUNNEL = Kind(qkv="attention.{q,k,v}_head", output="attention.post_proj", none="attention.r_kernel")
FUNNEL |= Kind(up="ffn.linear_1", down="ffn.linear_2")
DELTA = Kind(none="linear_attn.conv1d", unjudged="linear_attn.{in_proj_qkvz,in_proj_ba,out_proj}")
GRIFFIN = Kind(up="mlp_block.{gate,up}_proj", down="mlp_block.down_proj")


DECODERS = {
    "LLaMA": Row(of("Llama"), {"model.layers.{0-1}": LLAMA}, rest=7),
    "LLaMA of one layer": Row(of("Llama", num_hidden_layers=1), {"model.layers.0": LLAMA}, rest=5),
    "Qwen2": Row(of("Qwen2"), {"model.layers.{0-1}": LLAMA}, rest=13),
    "Qwen3": Row(of("Qwen3", head_dim=4), {"model.layers.{0-1}": LLAMA}, rest=11),
    "Gemma 2": Row(of("Gemma2", head_dim=4), {"model.layers.{0-1}": LLAMA}, rest=10),
    "Phi": Row(
        of("Phi"),
        {"model.layers.{0-1}": Kind("self_attn.{q,k,v}_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2")},
        rest=21,
    ),
    "Phi-3": Row(
        of("Phi3"),
        {"model.layers.{0-1}": Kind("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")},
        rest=7,
    ),
    "GPT-2": Row(
        of("GPT2", "LMHeadModel", {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}),
        {"transformer.h.{0-1}": Kind("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
        rest=20,
    ),
    # Its projections between the widths of embedding and layers are registered before these.
    "OPT": Row(
        of("OPT", base={**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 16}),
        {"model.decoder.layers.{0-1}": BART},
        rest=26,
    ),
    "BLOOM": Row(
        of("Bloom", base={"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 4}),
        {"transformer.h.{0-1}": FUSED},
        rest=21,
    ),
    "Falcon": Row(of("Falcon", new_decoder_architecture=True, num_kv_heads=2), {"transformer.h.{0-1}": FUSED}, rest=11),
    "GPT-NeoX": Row(
        of("GPTNeoX", base=SIZES),
        {
            "gpt_neox.layers.{0-1}": Kind(
                "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
            )
        },
        rest=20,
    ),
    "Mixtral": Row(of("Mixtral", num_local_experts=3), {"model.layers.{0-1}": ATTENTION | EXPERTS}, rest=7),
    # The biases of the experts are stacked, too, and so are matrices in shape alone.
    "GPT-OSS": Row(
        of("GptOss", num_local_experts=3, head_dim=4),
        {
            "model.layers.{0-1}": ATTENTION
            | Kind(up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj", unjudged="mlp.router")
        },
        rest=23,
    ),
    "DeepSeek-V3": Row(
        of(
            "DeepseekV3",
            base={**MOE, "num_key_value_heads": 4},
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
        ),
        {
            "model.layers.0": MLA | Kind(up="mlp.{gate,up}_proj", down="mlp.down_proj"),
            "model.layers.1": MLA
            | EXPERTS
            | Kind(up="mlp.shared_experts.{gate,up}_proj", down="mlp.shared_experts.down_proj"),
        },
        rest=11,
    ),
    # The gate of the shared expert has one output, so it is a vector.
    "Qwen3-Next": Row(
        of(
            "Qwen3Next",
            base={**MOE, "num_hidden_layers": 4, "shared_expert_intermediate_size": 8},
            head_dim=4,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=4,
            linear_value_head_dim=4,
        ),
        {
            layers: mixer | EXPERTS | Kind(up="mlp.shared_expert.{gate,up}_proj", down="mlp.shared_expert.down_proj")
            for layers, mixer in {"model.layers.{0-2}": DELTA, "model.layers.3": ATTENTION}.items()
        },
        rest=26,
    ),
    "Mamba": Row(
        of(
            "Mamba",
            base={**IDS, "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
            time_step_rank=4,
        ),
        {"backbone.layers.{0-1}": MAMBA.within("mixer")},
        rest=10,
    ),
    "Mamba-2": Row(
        of(
            "Mamba2",
            base={**IDS, "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
            num_heads=4,
            head_dim=8,
            n_groups=1,
        ),
        {"backbone.layers.{0-1}": Kind(none="mixer.conv1d", unjudged="mixer.{in,out}_proj")},
        rest=15,
    ),
    # What a token mixes with the one before it is a vector per layer, with two axes of 1 before it.
    "RWKV": Row(
        of("Rwkv", base={"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}),
        {
            "rwkv.blocks.{0-1}": Kind(
                unjudged="attention.{key,value,receptance,output} feed_forward.{key,receptance,value}"
            )
        },
        rest=28,
    ),
    "Jamba": Row(
        of(
            "Jamba",
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=3,
            mamba_d_state=4,
            mamba_dt_rank=4,
        ),
        {
            "model.layers.{0,2}": MAMBA.within("mamba")
            | Kind(up="feed_forward.{gate,up}_proj", down="feed_forward.down_proj"),
            "model.layers.{1,3}": ATTENTION
            | Kind(up="feed_forward.experts.gate_up_proj", down="feed_forward.experts.down_proj")
            | Kind(unjudged="feed_forward.router"),
        },
        rest=23,
        example={"input_ids": TOKENS},
    ),
    # The gates of its recurrence are stacked blocks of a diagonal, with stacked biases.
    "RecurrentGemma": Row(
        of("RecurrentGemma", num_hidden_layers=3, lru_width=16),
        {
            "model.layers.{0-1}": GRIFFIN
            | Kind(none="temporal_block.conv_1d temporal_block.rg_lru.{input,recurrent}_gate_weight")
            | Kind(unjudged="temporal_block.linear_{x,y,out}"),
            "model.layers.2": GRIFFIN | Kind("temporal_block.{q,k,v}_proj", "temporal_block.o_proj"),
        },
        rest=32,
    ),
}

ENCODERS = {
    "BERT": Row(of("Bert", "ForMaskedLM", SIZES), {"bert.encoder.layer.{0-1}": BERT}, rest=30),
    "BERT with pooler": Row(
        of("Bert", "ForSequenceClassification", SIZES), {"bert.encoder.layer.{0-1}": BERT}, rest=29
    ),
    "RoBERTa": Row(of("Roberta", "ForSequenceClassification", SIZES), {"roberta.encoder.layer.{0-1}": BERT}, rest=29),
    "DistilBERT": Row(
        of(
            "DistilBert",
            "ForSequenceClassification",
            {"vocab_size": 32, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4},
        ),
        {
            "distilbert.transformer.layer.{0-1}": Kind(
                "attention.{q,k,v}_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"
            )
        },
        rest=28,
    ),
    # What projects the positions reads a table. The one convolution is registered behind the layers.
    # What reads positions is as wide as what reads the stream.
    "DeBERTa-v2": Row(
        of(
            "DebertaV2",
            "ForSequenceClassification",
            SIZES,
            relative_attention=True,
            position_buckets=4,
            pos_att_type=["p2c", "c2p"],
            max_relative_positions=8,
            share_att_key=False,
            conv_kernel_size=3,
        ),
        {
            "deberta.encoder.layer.{0-1}": BERT_FFN
            | Kind("attention.self.{query,key,value}_proj", "attention.output.dense")
            | Kind(unjudged="attention.self.pos_{key,query}_proj")
        },
        rest=37,
    ),
    # Two groups of two layers, each used twice.
    "ALBERT": Row(
        of("Albert", "Model", SIZES, embedding_size=8, num_hidden_groups=2, inner_group_num=2, num_hidden_layers=4),
        {
            "encoder.albert_layer_groups.{0-1}.albert_layers.{0-1}": Kind(
                "attention.{query,key,value}", "attention.dense", "ffn", "ffn_output"
            )
        },
        rest=49,
        example={"input_ids": TOKENS},
    ),
    "ModernBERT": Row(
        of("ModernBert", "ForMaskedLM", {**SIZES, **IDS}, cls_token_id=None, sep_token_id=None),
        {"model.layers.{0-1}": Kind("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")},
        rest=9,
    ),
    # Raw matrices of (width, heads, width of a head). Its biases and the embedding of segments have the heads, too.
    "XLNet": Row(
        of("XLNet", "LMHeadModel", {"vocab_size": 32, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24}),
        {"transformer.layer.{0-1}": Kind(unjudged="rel_attn.{q,k,v,o,r} ff.layer_{1,2}")},
        rest=23,
    ),
    "Funnel": Row(
        of(
            "Funnel",
            "ForMaskedLM",
            {"vocab_size": 32, "block_sizes": [2, 2], "num_decoder_layers": 2, "d_model": 16, "n_head": 4, "d_head": 4},
            d_inner=24,
        ),
        {"funnel.encoder.blocks.{0-1}.{0-1}": FUNNEL, "funnel.decoder.layers.{0-1}": FUNNEL},
        rest=82,
        example={"input_ids": torch.ones(1, 8, dtype=torch.long)},
    ),
    # Local attention in every other layer. The table of positions is a sum of two, one an axis.
    "Reformer": Row(
        of(
            "Reformer",
            "ModelWithLMHead",
            {"vocab_size": 32, "hidden_size": 16, "attention_head_size": 4, "num_attention_heads": 4},
            feed_forward_size=24,
            attn_layers=["local", "lsh", "local", "lsh"],
            axial_pos_shape=(4, 4),
            axial_pos_embds_dim=(8, 8),
            is_decoder=True,
            max_position_embeddings=16,
        ),
        {
            "reformer.encoder.layers.{0,2}": REFORMER | Kind(qkv="attention.self_attention.{query,key}"),
            "reformer.encoder.layers.{1,3}": REFORMER | Kind(qkv="attention.self_attention.query_key"),
        },
        rest=31,
    ),
    "Longformer": Row(
        of("Longformer", "ForMaskedLM", SIZES, attention_window=4),
        {"longformer.encoder.layer.{0-1}": BERT | Kind(qkv="attention.self.{query,key,value}_global")},
        rest=36,
    ),
    "FNet": Row(of("FNet", "ForMaskedLM", SIZES), {"fnet.encoder.layer.{0-1}": BERT_FFN}, rest=26),
}

PAIRS = {
    "T5": Row(
        of("T5", "ForConditionalGeneration", T5, feed_forward_proj="gated-gelu"),
        {
            "encoder.block.{0-1}": T5_SELF
            | Kind(up="layer.1.DenseReluDense.wi_{0,1}", down="layer.1.DenseReluDense.wo"),
            "decoder.block.{0-1}": T5_CROSS
            | Kind(up="layer.2.DenseReluDense.wi_{0,1}", down="layer.2.DenseReluDense.wo"),
        },
        rest=15,
        example=PAIR,
    ),
    "BART": Row(
        of("Bart", "ForConditionalGeneration", SEQ2SEQ, max_position_embeddings=16),
        {"model.encoder.layers.{0-1}": BART, "model.decoder.layers.{0-1}": BART_CROSS},
        rest=59,
        example=PAIR,
    ),
    # Experts are modules in a dictionary, in the second layer of each stack.
    "Switch Transformer": Row(
        of(
            "SwitchTransformers",
            "ForConditionalGeneration",
            {**T5, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
            num_experts=3,
        ),
        {
            f"{stack}.block.{number}": attention
            | (Kind(up="wi", down="wo") if number == 0 else sparse).within(f"layer.{place}.mlp")
            for sparse in [
                Kind(up="experts.expert_{0-2}.wi", down="experts.expert_{0-2}.wo", unjudged="router.classifier")
            ]
            for stack, place, attention in [("encoder", 1, T5_SELF), ("decoder", 2, T5_CROSS)]
            for number in (0, 1)
        },
        rest=15,
        example=PAIR,
    ),
    "NLLB-MoE": Row(
        of(
            "NllbMoe",
            "ForConditionalGeneration",
            {**SEQ2SEQ, "num_experts": 3, "expert_capacity": 4, "max_position_embeddings": 16},
            encoder_sparse_step=2,
            decoder_sparse_step=2,
        ),
        {
            "model.encoder.layers.0": NLLB | NLLB_DENSE,
            "model.encoder.layers.1": NLLB | NLLB_SPARSE,
            "model.decoder.layers.0": NLLB_CROSS | NLLB_DENSE,
            "model.decoder.layers.1": NLLB_CROSS | NLLB_SPARSE,
        },
        rest=65,
    ),
    # Two whole models, of the embeddings to a head.
    "BERT to BERT": Row(
        encoder_decoder,
        {"encoder.encoder.layer.{0-1}": BERT, "decoder.bert.encoder.layer.{0-1}": BERT_CROSS},
        rest=67,
        example={**PAIR, "decoder_attention_mask": torch.ones_like(TOKENS)},
    ),
}

ROWS = DECODERS | ENCODERS | PAIRS
