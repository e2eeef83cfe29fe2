"""How configurations are shrunk, for `perf.architectures`.

`SMALL` holds a small value for the names of fields; `SETTINGS` what names do not settle, by type; `VARIANTS` settings
of a type that change how it reads; `SKIPPED` the types that are not built, with the reason.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
VOCABULARY, CONTEXT, WINDOW = 288, 128, 8
SWITCH = 24  # length from which on a rope that depends on it takes other factors
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NAMES: tuple[tuple[float, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size shape_vocab_size pronunciation_vocab_size"),
    (CONTEXT, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length"),
    (CONTEXT, "max_target_positions original_max_position_embeddings"),
    (WINDOW, "sliding_window sliding_window_size window_size attention_window_size local_attention keep_window_size"),
    (WINDOW, "attention_chunk_size local_attn_chunk_length lsh_attn_chunk_length"),
    (64, "hidden_size n_embd d_model emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size"),
    (64, "word_embed_proj_dim attention_hidden_size lru_width backbone_hidden_size intermediate_size ffn_dim n_inner"),
    (64, "moe_intermediate_size decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner ffn_hidden_size feed_forward_size"),
    (64, "expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp"),
    (64, "moe_shared_expert_intermediate_size dense_intermediate_size prefix_dense_intermediate_size"),
    (32, "qk_head_dim dim_model_base"),
    (32, "index_n_heads"),  # with few heads many tokens have the score 0, and which of them are read is left to chance
    (16, "head_dim d_head dim_head kv_channels swa_head_dim attention_head_size attention_head_dim v_head_dim"),
    (16, "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim indexer_head_dim qk_nope_head_dim"),
    (16, "qk_rope_head_dim query_pre_attn_scalar q_lora_rank kv_lora_rank o_lora_rank laurel_rank gated_norm_rank"),
    (16, "mamba_d_state ssm_state_size state_size mamba_head_dim mamba_d_head mamba_headdim chunk_size"),
    (16, "mamba_chunk_size hidden_size_per_layer_input d_rel hc_lowrank pronunciation_embed_dim shape_embed_dim"),
    (8, "rotary_dim mamba_n_heads mamba_num_heads n_mamba_heads indexer_budget"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads"),
    (4, "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads"),
    (4, "linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num index_topk"),
    (4, "index_block_size indexer_compress_ratio mamba_dt_rank"),
    (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_blocks"),
    (2, "num_encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads n_group"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts indexer_n_heads index_topk_blocks"),
    (1, "topk_group first_k_dense_replace num_dense_layers n_shared_experts indexer_kv_heads"),
    # what scales or caps is to be at work
    (0.3, "logit_scale lm_head_multiplier attention_multiplier"),
    (0.5, "residual_multiplier"),
    (3.0, "logits_scaling logits_mup_width_multiplier embedding_multiplier"),
    (1.5, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
)
SMALL = {name: size for size, names in NAMES for name in names.split()}

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
WINDOWED: Json = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
SPARSE: Json = {"mlp_layer_types": ["dense", "sparse"]}
CONVOLUTION: Json = {"num_hidden_layers": 2, "layer_types": ["conv", FULL]}
SHARED_KEYS: Json = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2}
ZAMBA: Json = {
    "num_hidden_layers": 4,
    "layers_block_type": [LINEAR, "hybrid"] * 2,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "num_key_value_heads": 4,
}
ZAMBA2 = ZAMBA | {"mamba_headdim": 16, "kv_channels": 16}


def rope(kind: str = "default", **more: Any) -> Json:
    """Return the parameters of a rotary embedding."""
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=SWITCH)
LONG = rope(
    "longrope",
    short_factor=[1.0] * 8,
    long_factor=[1.0, 2.0, 3.0, 4.0, 6.0, 9.0, 14.0, 20.0],
    original_max_position_embeddings=SWITCH,
)
LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=SWITCH)

SETTINGS: dict[str, Json] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 32,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_config": {"hidden_size_global": 128},
        "decoder_config": {"hidden_size_global": 128},
        "global_config": {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8},
    },
    "cohere_compass_text": WINDOWED
    | {"rope_parameters": dict.fromkeys((FULL, SLIDING), rope(mrope_section=[4, 2, 2]))},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3": {"mm_tokens_per_image": 4, "vision_config": {"image_size": 28, "patch_size": 2}},
    "gemma3n_text": SHARED_KEYS | {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "intermediate_size": 64},
    "got_ocr2": {
        "vision_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_dim": 64,
            "image_size": 32,
            "window_size": 2,
            "output_channels": 32,
            "global_attn_indexes": [1],
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL]},
    "hrm_text": {"num_layers_per_stack": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": WINDOWED | SPARSE | {"num_attention_heads_per_layer": [4, 4]},
    "lfm2": CONVOLUTION | {"full_attn_idxs": [1]},
    "lfm2_moe": CONVOLUTION,
    "llama4_text": {
        "num_hidden_layers": 2,
        "layer_types": ["chunked_attention", FULL],
        "no_rope_layers": [1, 0],
        "moe_layers": [1],
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mellum": WINDOWED | SPARSE,
    "minimax_m3_vl_text": SPARSE
    | {"index_n_heads": 2, "num_hidden_layers": 2, "layer_types": [FULL, "minimax_m3_sparse"]},
    "qwen4_exp_text": {
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4, "hash_seed": 0},
    "smollm3": {
        "num_hidden_layers": 2,
        "layer_types": [FULL, SLIDING],
        "no_rope_layers": [1, 0],
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA | {"n_mamba_heads": 2},
    "zamba2": ZAMBA2 | {"num_mem_blocks": 2},
    "zaya": {"num_experts_per_tok": 1},
}

VARIANTS: tuple[tuple[str, str, Json], ...] = (
    ("bloom", "post-norm", {"apply_residual_connection_post_layernorm": True}),
    ("deepseek_v3", "rope yarn", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    ("electra", "narrow embedding", {"embedding_size": 32}),
    ("falcon", "alibi", {"alibi": True}),
    ("falcon", "new decoder", {"new_decoder_architecture": True}),
    (
        "gemma3_text",
        "rope linear",
        {"rope_parameters": {FULL: rope("linear", factor=4.0), SLIDING: rope()}},
    ),
    ("gemma4_text", "experts and shared keys", SHARED_KEYS | {"enable_moe_block": True}),
    ("gpt2", "inverse layer scale", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    ("gpt_bigcode", "many keys", {"multi_query": False}),
    ("gpt_neox", "sequential", {"use_parallel_residual": False}),
    ("llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    (
        "llama",
        "rope dynamic",
        {"rope_parameters": rope("dynamic", factor=4.0), "max_position_embeddings": SWITCH},
    ),
    ("llama", "rope linear", {"rope_parameters": rope("linear", factor=4.0)}),
    ("llama", "rope llama3", {"rope_parameters": LLAMA3}),
    ("llama", "rope longrope", {"rope_parameters": LONG}),
    ("llama", "rope yarn", {"rope_parameters": YARN}),
    ("llama", "tied", {"tie_word_embeddings": True}),
    ("mistral", "no window", {"sliding_window": None}),
    ("mpt", "no alibi", {"attn_config": {"alibi": False}}),
    ("olmo", "clipped", {"clip_qkv": 0.5}),
    ("opt", "post-norm, narrow embedding", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("phi3", "rope longrope", {"rope_parameters": LONG, "original_max_position_embeddings": SWITCH}),
    ("qwen2", "windows", WINDOWED | {"use_sliding_window": True}),
    ("rembert", "narrow embedding", {"input_embedding_size": 32, "output_embedding_size": 96}),
    ("stablelm", "parallel", {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}),
    (
        "zamba2",
        "adapters and rope",
        ZAMBA2 | {"use_shared_attention_adapter": True, "use_mem_rope": True, "adapter_rank": 8},
    ),
)

DRAFTER = "drafts for another model, whose keys and values it reads; alone it says nothing"
SOUND = "writes sound, in several codes at each step, and no text"
SKIPPED: dict[str, str] = {
    "gemma3n": "reads pictures with the package timm; its text model is gemma3n_text",
    "gemma4_assistant": DRAFTER,
    "gemma4_unified_assistant": DRAFTER,
    "musicgen": SOUND,
    "musicgen_melody": SOUND,
}
