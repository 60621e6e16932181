"""A tiny random-weight configuration for every model type that mlx-lm ships.

`CONFIGS` maps "type" or "type:variant" to the keys that differ from `COMMON`; a variant adds its
keys to the entry of its type. Every kind of layer of a family appears, and sliding windows are
shorter than the contexts of the tests. The one type without an entry is olmo: in mlx-lm 0.32 its
attention adds the mask "causal" to the scores as if it were an array, so it reads no prompt.
"""

from __future__ import annotations

import math
from copy import deepcopy

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.utils import _get_classes

FULL, LOCAL = "full_attention", "sliding_attention"

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "sliding_window": 8,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
}

MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
GROUPS = {"n_group": 2, "topk_group": 1, "num_expert_group": 2}

MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}

MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 32,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}

DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}

KDA = {
    "kda_layers": [1, 2],
    "full_attn_layers": [3],
    "num_heads": 4,
    "head_dim": 32,
    "short_conv_kernel_size": 4,
}

SHORT = {"original_max_position_embeddings": 64}
LINEAR_ROPE = {"type": "linear", "rope_type": "linear", "factor": 2.0}
DYNAMIC_ROPE = {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    **SHORT,
}
YARN_ROPE = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, **SHORT}
DEEPSEEK_ROPE = {**YARN_ROPE, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7}
LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
    **SHORT,
}
MISTRAL_ROPE = {**DEEPSEEK_ROPE, "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}
LOCAL_GLOBAL_ROPE = {
    FULL: {**YARN_ROPE, "rope_theta": 50000.0, "partial_rotary_factor": 0.5},
    LOCAL: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
}
QWEN35_ROPE = {
    "rope_type": "default",
    "mrope_section": [1, 1, 0],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
}


def text(**config) -> dict:
    """The configuration of a model that nests its language model's keys."""
    return {"text_config": {**COMMON, **config}}


DEEPSEEK = {**MOE, **GROUPS, **MLA, "num_hidden_layers": 3, "rope_scaling": DEEPSEEK_ROPE}
INDEXED = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
QWEN35 = {**DELTA, "num_hidden_layers": 4, "rope_parameters": QWEN35_ROPE}
QWEN35_MOE = {k: v for k, v in MOE.items() if k != "mlp_only_layers"}
GEMMA3 = {
    "num_hidden_layers": 4,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 24,
    "rope_theta": 1000000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
GEMMA4 = {
    "num_hidden_layers": 6,
    "layer_types": [LOCAL, FULL] * 3,
    "num_kv_shared_layers": 2,
    "global_head_dim": 32,
    "num_key_value_heads": 1,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
LFM2 = {
    "num_hidden_layers": 3,
    "layer_types": ["conv", FULL, "conv"],
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 48,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}
GRANITE = {
    "logits_scaling": 0.5,
    "attention_multiplier": 0.125,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "tie_word_embeddings": True,
}
MINICPM = {
    "dim_model_base": 32,
    "scale_depth": 1.4,
    "scale_emb": 12,
}
LLAMA4 = {
    **MOE,
    "num_hidden_layers": 4,
    "attention_chunk_size": 8,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 40,
    "use_qk_norm": True,
    "floor_scale": 4,
    "rope_scaling": LLAMA3_ROPE,
}
MINISTRAL3 = {
    "layer_types": [LOCAL, FULL],
    "rope_parameters": {**MISTRAL_ROPE, "original_max_position_embeddings": 8},
}
MISTRAL4 = {
    **DEEPSEEK,
    "rope_parameters": {**MISTRAL_ROPE, "original_max_position_embeddings": 8},
}
LONGCAT = {
    **MLA,
    **MOE,
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "zero_expert_num": 2,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 32,
    "moe_topk": 2,
    "num_layers": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
KIMI_LINEAR = {
    **MOE,
    **MLA,
    **GROUPS,
    "num_hidden_layers": 3,
    "linear_attn_config": KDA,
    "model_max_length": 512,
    "mla_use_nope": True,
}

CONFIGS: dict[str, dict] = {
    "Klear": MOE,
    "afm7": {
        "hidden_dim": 64,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim_scale_factor": 0.75,
    },
    "afmoe": {
        **MOE,
        **GROUPS,
        "num_hidden_layers": 4,
        "layer_types": [LOCAL, LOCAL, LOCAL, FULL],
        "num_dense_layers": 2,
    },
    "apertus": {"post_norm": False, "qk_norm": True, "rope_scaling": LLAMA3_ROPE},
    "baichuan_m1": {
        "sliding_window_layers": [0],
        "conv_window": 2,
        "num_swa_attention_heads": 2,
        "num_swa_key_value_heads": 1,
    },
    "bailing_hybrid": {
        **MOE,
        **GROUPS,
        **MLA,
        "num_hidden_layers": 4,
        "layer_group_size": 2,
        "group_norm_size": 2,
    },
    "bailing_moe": {**MOE, "norm_head": True, "n_group": 1, "topk_group": 1},
    "bailing_moe:v2": {
        **GROUPS,
        "norm_head": False,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "bailing_moe_linear": {
        **MOE,
        **GROUPS,
        "num_hidden_layers": 4,
        "layer_group_size": 2,
        "group_norm_size": 2,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "bailing_moe_v3": {
        **MOE,
        **GROUPS,
        **MLA,
        "num_hidden_layers": 4,
        "layer_group_size": 2,
        "head_dim": 32,
    },
    "bitnet": {},
    "cohere": {"logit_scale": 0.5},
    "cohere:qk_norm": {"use_qk_norm": True},
    "cohere2": {"num_hidden_layers": 4, "logit_scale": 0.5},
    "dbrx": {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
    },
    "deepseek": {**MOE, "num_hidden_layers": 3},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "group_limited_greedy"},
    "deepseek_v2:lite": {"q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
    "deepseek_v32": {**DEEPSEEK, **INDEXED},
    "deepseek_v41": {
        **MOE,
        "num_hidden_layers": 5,
        "q_lora_rank": 24,
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "o_groups": 2,
        "o_lora_rank": 16,
        "swiglu_limit": 4.0,
        "compress_ratios": (0, 1, 4, 4, 4),
        "kv_source_layer_ids": (1, 2),
        "index_source_layer_ids": (1, 2, 3),
        "candidate_source_layer_id": 2,
        "candidate_topk_blocks": 2,
        "candidate_block_size": 2,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 2,
        "rope_scaling": YARN_ROPE,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 4,
    },
    "dots1": {**MOE, **GROUPS},
    "ernie4_5": {"use_bias": True, "tie_word_embeddings": True},
    "ernie4_5_moe": {
        **MOE,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
        "moe_use_aux_free": True,
        "tie_word_embeddings": True,
    },
    "exaone": {"num_layers": 2, "rope_scaling": LLAMA3_ROPE},
    "exaone4": {
        "num_hidden_layers": 4,
        "sliding_window_pattern": "LLLG",
        "rope_scaling": LLAMA3_ROPE,
    },
    "exaone4:full": {"sliding_window": None, "sliding_window_pattern": None},
    "exaone_moe": {
        **MOE,
        **GROUPS,
        "num_hidden_layers": 4,
        "layer_types": [LOCAL, LOCAL, LOCAL, FULL],
        "is_moe_layer": [False, True, True, True],
    },
    "falcon_h1": {**MAMBA2, "attention_in_multiplier": 1.1, "lm_head_multiplier": 0.5},
    "falcon_h1:rms_norm": {
        "mamba_rms_norm": True,
        "tie_word_embeddings": True,
        "lm_head_multiplier": 4.0,
    },
    "gear": {
        "num_hidden_layers": 3,
        "layer_types": ["conv_mixer", LOCAL, FULL],
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma": {},
    "gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3": text(model_type="gemma3_text", **GEMMA3),
    "gemma3_text": GEMMA3,
    "gemma3n": text(
        model_type="gemma3n_text",
        num_hidden_layers=6,
        layer_types=[LOCAL, FULL] * 3,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=97,
        rope_local_base_freq=10000.0,
        rope_theta=1000000.0,
        final_logit_softcapping=3.0,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
        hidden_size_per_layer_input=8,
        altup_num_inputs=3,
        altup_coef_clip=120.0,
        altup_correct_scale=True,
        altup_active_idx=0,
        laurel_rank=8,
    ),
    "gemma4": text(model_type="gemma4_text", **GEMMA4),
    "gemma4_text": GEMMA4,
    "gemma4_text:moe": {
        **MOE,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "use_double_wide_mlp": False,
    },
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4_moe": {
        **MOE,
        **GROUPS,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
    "glm4_moe_lite": {**MOE, **GROUPS, **MLA},
    "glm_moe_dsa": {
        **DEEPSEEK,
        **INDEXED,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "gpt2": {"n_ctx": 512, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_inner": 48, "n_head": 4, "n_positions": 512},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5, "num_key_value_heads": 4},
    "gpt_neox:sequential": {"use_parallel_residual": False},
    "gpt_oss": {**MOE, "layer_types": [LOCAL, FULL], "rope_scaling": YARN_ROPE},
    "gptj": {"n_embd": 64, "n_positions": 512, "n_head": 4, "rotary_dim": 8, "n_layer": 2},
    "granite": GRANITE,
    "granitemoe": {**MOE, **GRANITE},
    "granitemoehybrid": {
        **MOE,
        **GRANITE,
        **MAMBA2,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": "nope",
    },
    "granitemoehybrid:dense": {
        "num_local_experts": None,
        "layer_types": ["attention"] * 3,
        "position_embedding_type": "rope",
    },
    "helium": {},
    "hunyuan": {
        **MOE,
        "num_hidden_layers": 4,
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}},
    "internlm2": {"bias": False, "rope_scaling": DYNAMIC_ROPE},
    "internlm3": {"rope_scaling": DYNAMIC_ROPE},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": 8},
    "jamba": {
        **MOE,
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
    },
    "kimi_k25": text(**DEEPSEEK),
    "kimi_k3": text(
        **KIMI_LINEAR,
        hidden_act="situ",
        activation_situ_beta=2.0,
        activation_situ_linear_beta=4.0,
        attn_res_block_size=2,
        mla_use_output_gate=True,
        routed_expert_hidden_size=32,
        latent_moe_use_norm=True,
    ),
    "kimi_linear": KIMI_LINEAR,
    "kimi_vl": text(**DEEPSEEK),
    "laguna": {
        **MOE,
        "num_hidden_layers": 4,
        "layer_types": [FULL, LOCAL, LOCAL, LOCAL],
        "num_attention_heads_per_layer": [4, 2, 2, 2],
        "rope_parameters": LOCAL_GLOBAL_ROPE,
        "moe_router_logit_softcapping": 2.0,
        "moe_routed_scaling_factor": 1.5,
    },
    "lfm2-vl": text(model_type="lfm2", **LFM2),
    "lfm2": LFM2,
    "lfm2_moe": {**MOE, **LFM2, "use_expert_bias": True, "num_dense_layers": 1},
    "lille-130m": {
        "block_size": 512,
        "n_embd": 64,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 2,
        "tie_word_embeddings": True,
    },
    "llama": {},
    "llama:tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama:traditional_rope": {"rope_traditional": True},
    "llama:llama3_rope": {"rope_scaling": LLAMA3_ROPE},
    "llama:linear_rope": {"rope_scaling": LINEAR_ROPE},
    "llama:dynamic_rope": {"rope_scaling": DYNAMIC_ROPE},
    "llama:yarn_rope": {"rope_scaling": YARN_ROPE},
    "llama:sliding": {"layer_types": [LOCAL, FULL]},
    "llama4": text(model_type="llama4_text", **LLAMA4),
    "llama4_text": {
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 40,
        "no_rope_layers": [1, 1, 1, 0],
        "use_qk_norm": True,
    },
    "llama4_text:tied": {"tie_word_embeddings": True},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": {**LONGCAT, "ngram_vocab_size_ratio": 3, "emb_split_num": 2},
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "time_step_rank": 4,
        "intermediate_size": 128,
        "tie_word_embeddings": True,
    },
    "mamba:falcon": {"model_type": "falcon_mamba"},
    "mamba2": {
        "num_heads": 8,
        "state_size": 32,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_conv_bias": True,
        "intermediate_size": 128,
        "time_step_limit": (0.0, float("inf")),
        "time_step_rank": "auto",
    },
    "mellum": {**MOE, "layer_types": [LOCAL, FULL], "rope_parameters": LOCAL_GLOBAL_ROPE},
    "mimo": {},
    "mimo_v2_flash": {
        **MOE,
        **GROUPS,
        "num_hidden_layers": 3,
        "hybrid_layer_pattern": [0, 1, 1],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 8,
        "n_shared_experts": None,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "v_head_dim": 12,
        "swa_head_dim": 16,
        "swa_v_head_dim": 12,
        "partial_rotary_factor": 0.5,
        "attention_value_scale": 0.7,
    },
    "minicpm": MINICPM,
    "minicpm:tied": {"tie_word_embeddings": True},
    "minicpm3": {**MLA, **MINICPM, "qk_rope_head_dim": 16, "rope_scaling": LONG_ROPE},
    "minimax": {**MOE, "rotary_dim": 8},
    "minimax_m3_vl": text(
        **{k: v for k, v in MOE.items() if k != "moe_layer_freq"},
        num_hidden_layers=3,
        dense_intermediate_size=40,
        rotary_dim=8,
        moe_layer_freq=[0, 1, 1],
        sparse_attention_config={
            "sparse_num_index_heads": 2,
            "sparse_index_dim": 16,
            "sparse_block_size": 4,
            "sparse_topk_blocks": 2,
            "sparse_local_block": 1,
            "sparse_attention_freq": [0, 1, 1],
        },
    ),
    "ministral3": MINISTRAL3,
    "mistral3": text(model_type="mistral"),
    "mistral3:ministral3": text(model_type="ministral3", **MINISTRAL3),
    "mistral3:mistral4": text(model_type="mistral4", **MISTRAL4),
    "mistral4": MISTRAL4,
    "mixtral": MOE,
    "muse_glimmer": {
        "num_hidden_layers": 4,
        "final_logit_softcapping": 3.0,
        "output_multiplier": 0.8,
    },
    "muse_spark": text(
        **{**MOE, "num_shared_experts": 0},
        post_norm_eps=1e-6,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        layer_rope_theta=[10000.0, 0],
        layer_types=[LOCAL, FULL],
        final_logit_softcapping=3.0,
        output_multiplier=0.5,
        moe_hidden_size=32,
    ),
    "nanbeige": {"num_loops": 2},
    "nanochat": {},
    "nemotron-nas": {
        "num_hidden_layers": 4,
        "rope_scaling": LLAMA3_ROPE,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 0.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ],
    },
    "nemotron": {"hidden_act": "relu2", "partial_rotary_factor": 0.5},
    "nemotron_h": {
        **MOE,
        **GROUPS,
        "hybrid_override_pattern": ["M", "*", "-", "E"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 32,
        "conv_kernel": 4,
        "n_groups": 2,
        "use_conv_bias": True,
    },
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4},
    "olmo_hybrid": {
        **DELTA,
        "num_hidden_layers": 4,
        "linear_num_key_heads": 4,
        "linear_allow_neg_eigval": True,
    },
    "olmoe": MOE,
    "openelm": {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 8],
        "num_kv_heads": [2, 4],
        "ffn_multipliers": [0.5, 1.0],
    },
    "phi": {"partial_rotary_factor": 0.5, "num_key_value_heads": 4},
    "phi3": {},
    "phi3:longrope": {"rope_scaling": LONG_ROPE, "original_max_position_embeddings": 64},
    # Not causal in mlx-lm: its block-sparse layers add the boolean mask to the scores.
    "phi3small": {
        "vocab_size": 100352,
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 48,
        "gegelu_limit": 20.0,
        "mup_width_multiplier": 2.0,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 2,
    },
    "phimoe": {**MOE, "rope_scaling": {**LONG_ROPE, "short_mscale": 1.2, "long_mscale": 1.2}},
    "phixtral": {
        **MOE,
        "num_vocab": 97,
        "model_dim": 64,
        "num_heads": 4,
        "num_layers": 2,
        "rotary_dim": 8,
    },
    "pixtral": text(model_type="llama"),
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        "num_hidden_layers": 4,
        "hidden_size_per_head": 16,
        "attention_window_size": 8,
        "full_attention_idx": [3],
        "mamba_d_state": 32,
        "mamba_num_heads": 4,
        "tie_word_embeddings": True,
    },
    # Past its window mlx-lm attends to one token more in a chunk than in single steps.
    "plamo3": {"num_hidden_layers": 2, "sliding_window_pattern": 2, "rope_local_theta": 1000.0},
    "prism_hadamard_qwen35": {
        **text(**{**QWEN35, "hidden_size": 128, "intermediate_size": 512}),
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": path, "embedding": path.endswith("tokens"), "dtype": "float16", "block": block}
            for path, block in [
                ("model.embed_tokens", 0),
                ("model.layers.0.mlp.down_proj", 512),
                ("model.layers.3.self_attn.q_proj", 0),
            ]
        ],
    },
    "qwen": {"kv_channels": 16, "intermediate_size": 96},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2:untied": {"tie_word_embeddings": False},
    "qwen2_moe": MOE,
    "qwen2_vl": text(model_type="qwen2"),
    "qwen3": {"tie_word_embeddings": True},
    "qwen3:untied_yarn": {"tie_word_embeddings": False, "rope_scaling": YARN_ROPE},
    "qwen3_5": text(**QWEN35),
    "qwen3_5_moe": text(**QWEN35, **QWEN35_MOE),
    "qwen3_moe": MOE,
    "qwen3_next": {**DELTA, **MOE, "num_hidden_layers": 4, "partial_rotary_factor": 0.25},
    "qwen3_vl": text(model_type="qwen3"),
    "qwen3_vl_moe": text(model_type="qwen3_moe", **MOE),
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "block_types": ["recurrent", "recurrent", "attention"],
        "conv1d_width": 4,
        "logits_soft_cap": 3.0,
        "attention_window_size": 8,
    },
    "rwkv7": {
        "head_dim": 32,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    "seed_oss": {"attention_bias": True},
    "seed_oss:tied": {"tie_word_embeddings": True},
    "smollm3": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "solar_open": {**MOE, "partial_rotary_factor": 1.0, "rope_scaling": YARN_ROPE},
    "spark2_5": {
        "num_hidden_layers": 4,
        "rope_parameters": LOCAL_GLOBAL_ROPE,
        "tie_word_embeddings": True,
    },
    "stablelm": {"use_qkv_bias": True, "partial_rotary_factor": 0.25},
    "stablelm:parallel_qk_norm": {
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "use_qkv_bias": False,
    },
    "starcoder2": {"tie_word_embeddings": True},
    "step3p5": {
        **MOE,
        "num_hidden_layers": 4,
        "num_attention_groups": 2,
        "layer_types": [FULL, LOCAL, LOCAL, LOCAL],
        "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0],
        "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2},
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 24,
        "moe_layers_enum": "2,3",
        "swiglu_limits": [0, 0, 0, 2.0],
        "swiglu_limits_shared": [0, 0, 0, 2.0],
        "rope_scaling": LLAMA3_ROPE,
        "yarn_only_types": [FULL],
    },
    "talkie": {},
    "telechat3": {"rope_scaling": {**DEEPSEEK_ROPE, "type": "telechat3-yarn"}},
    "youtu_llm": MLA,
}

# Parameters by the end of their path. Recurrences decay so slowly that the first tokens of a
# context stay visible, and afm7 rounds its keys and values to a small step.
CENTRES = {
    "A_log": -3.0,
    "recurrent_param": -4.0,
    "w_lora.lora.2.bias": -3.0,
    "quant_key_scale": 0.05,
    "quant_value_scale": 0.05,
}
FIXED = ("signs", "act_fn.eps", "act_fn.beta")
METAL_ONLY = {"muse_spark"}  # never claimed: the outcome must not depend on the machine


def names() -> list[str]:
    """The names that run on every machine."""
    return [name for name in CONFIGS if name not in METAL_ONLY]


def _ternary_matmul(layer: BitLinear, x: mx.array, packed: mx.array) -> mx.array:
    """What BitLinear's Metal kernel computes."""
    rows = mx.concatenate([(packed >> shift) & 3 for shift in (0, 2, 4, 6)])
    return x @ (rows.astype(x.dtype) - 1).T * layer.weight_scale


if not mx.metal.is_available():
    BitLinear.execute_matmul_kernel = _ternary_matmul


def config(name: str) -> dict:
    kind = name.partition(":")[0]
    # A copy: some argument classes change the dictionaries they are given.
    return deepcopy({"model_type": kind, **COMMON, **CONFIGS[kind], **CONFIGS[name]})


def build(name: str, seed: int = 0, dtype: mx.Dtype = mx.float32, **more) -> nn.Module:
    """The model with random weights: nothing in it is left at a value that switches it off.

    more  keys of the configuration, or of its language model's
    """
    keys = config(name)
    keys.get("text_config", keys).update(more)
    model_class, args_class = _get_classes(keys)
    model = model_class(args_class.from_dict(keys))
    cast = getattr(model, "cast_predicate", lambda path: True)
    key = mx.random.key(seed)
    weights = []
    for path, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating) and not path.endswith(FIXED):
            key, sub = mx.random.split(key)
            value = _random(path, value, sub)
            weights.append((path, value.astype(dtype) if cast(path) else value))
    model.update(tree_unflatten(weights))
    for _, module in model.named_modules():
        key, sub = mx.random.split(key)
        if isinstance(module, BitLinear):
            module.weight = _ternary(module.weight.shape, sub)
            module.weight_scale = module.weight_scale / math.sqrt(module.in_features)
        elif "scales" in module:
            weight = _scaled_normal((module.scales.shape[0], module.weight.shape[1] * 16), sub)
            weight = weight.astype(dtype)
            packed = mx.quantize(weight, group_size=module.group_size, bits=module.bits)
            module.weight, module.scales, module.biases = packed
    mx.eval(model.parameters())
    return model.eval()


def _random(path: str, value: mx.array, key: mx.array) -> mx.array:
    """A matrix at 1.5 / sqrt(fan in), a vector (norm, bias) around the constant it starts from."""
    first = value.flatten()[0]
    centre = next((c for ending, c in CENTRES.items() if path.endswith(ending)), None)
    if centre is None and value.size > max(value.shape, default=1):
        return _scaled_normal(value.shape, key)
    if centre is None:
        centre = first.item() if mx.all(value == first).item() else 0.0
    return centre + 0.2 * (abs(centre) or 1.0) * mx.random.normal(value.shape, key=key)


def _scaled_normal(shape: tuple[int, ...], key: mx.array) -> mx.array:
    fan_in = math.prod(shape[1:]) if shape[-1] == 1 else shape[-1]
    return mx.random.normal(shape, key=key) * 1.5 / math.sqrt(fan_in)


def _ternary(shape: tuple[int, ...], key: mx.array) -> mx.array:
    """Four values of {-1, 0, 1} in each byte, as BitLinear packs them."""
    digits = mx.random.randint(0, 3, (4, *shape), key=key).astype(mx.uint8)
    return digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6
