"""Tiny random models of every causal architecture that transformers has: configurations made small by the names of their fields."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCAB, WINDOW, CONTEXT = 97, 8, 128
MOST_PARAMETERS = 8_000_000

_SMALL: dict[str, Any] = {
    # sizes
    "pronunciation_vocab_size": 16, "shape_vocab_size": 16, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "text_vocab_size": VOCAB, "vocab_size_nonaudio": VOCAB,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "emb_dim": 32, "embed_dim": 32, "word_embed_proj_dim": 32,
    "embedding_size": 32, "hidden_size_per_layer_input": 8, "input_embedding_size": 32, "dim_model": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "d_ff": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "dim_ff": 48,
    "ffn_hidden_size": 48, "dff": 48, "intermediate_size_mlp": 48, "dense_intermediate_size": 48, "feed_forward_size": 48,
    "block_ff_dim": 48, "shared_intermediate_size": 16, "expert_ffn_hidden_size": 16, "zero_expert_num": 2,
    # depth and heads
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 3, "encoder_layers": 2, "depth": 2,
    "num_decoder_layers": 3, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_global_key_value_heads": 2, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "num_query_groups": 2, "head_dim": 8, "global_head_dim": 16, "swa_head_dim": 8, "kv_channels": 8, "v_head_dim": 8,
    "swa_v_head_dim": 8, "attention_head_dim": 8, "dim_head": 8, "d_kv": 8, "attention_head_size": 8,
    # multi-head latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16,
    "index_head_dim": 16, "index_n_heads": 4, "index_topk": 8, "o_lora_rank": 16,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2, "top_k_experts": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "moe_ffn_hidden_size": 16, "n_shared_experts": 1,
    "expert_intermediate_size": 16, "moe_num_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 0, "moe_latent_size": 16, "n_hash_layers": 0,
    "num_hash_layers": 0, "moe_num_dense_layers": 1,
    # recurrent layers
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_heads": 4,
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "mamba_d_head": 8, "mamba_n_groups": 1, "n_groups": 1, "mamba_expand": 2, "mamba_d_ssm": 64, "mamba_dt_rank": 4, "time_step_rank": 4,
    "n_mamba_heads": 2, "mamba_ngroups": 1, "lru_width": 32, "chunk_size": 8, "mamba_chunk_size": 8, "attention_hidden_size": 32,
    # lengths
    "max_position_embeddings": CONTEXT, "n_positions": CONTEXT, "max_seq_len": CONTEXT, "max_sequence_length": CONTEXT,
    "max_seq_length": CONTEXT, "model_max_length": CONTEXT, "max_target_positions": CONTEXT, "max_source_positions": CONTEXT,
    "sliding_window": WINDOW, "attention_window_size": WINDOW, "window_size": WINDOW, "local_attention": WINDOW,
    "sliding_window_size": WINDOW, "attention_chunk_size": WINDOW, "context_length": CONTEXT, "max_window_layers": 2,
    "encoder_hash_byte_group_vocab": 100, "local_attention_window_len": WINDOW, "shared_experts_intermediate_size": 16,
    # marks
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
    "hidden_dropout": 0.0, "num_nextn_predict_layers": 0, "num_mtp_layers": 0, "mtp_num_hidden_layers": 0,
    # towers that text does not use
    "image_size": 16, "patch_size": 8, "num_channels": 3, "image_token_id": 5, "image_token_index": 5, "audio_token_id": 6,
    "video_token_id": 7, "boi_token_id": 8, "eoi_token_id": 9, "boa_token_id": 10, "eoa_token_id": 11, "num_mel_bins": 16,
}  # fmt: skip

# What the names above do not say.
_SPECIAL: dict[str, dict[str, Any]] = {
    "ctrl": {"dff": 48},
    "mpt": {"max_seq_len": CONTEXT},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "phimoe": {"sliding_window": WINDOW},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "feed_forward_size": 48},
    "qwen2": {"use_sliding_window": True},
    "qwen3": {"use_sliding_window": True},
    "qwen2_moe": {"use_sliding_window": True, "decoder_sparse_step": 1},
    "qwen3_moe": {"use_sliding_window": True, "decoder_sparse_step": 1},
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "nemotron": {"num_key_value_heads": 2},
    "mamba2": {"num_heads": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}},
    "dots3_note": {"num_key_value_heads": 4},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "smollm3": {"no_rope_layer_interval": 2, "no_rope_layers": None},
}


# Fields that a default configuration leaves open.
_MAY_BE_NONE = ("pad_token_id", "head_dim", "sliding_window", "num_experts_per_tok")


def classes() -> dict[str, str]:
    """Model type -> class name, of everything that AutoModelForCausalLM makes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))


def _shrunk(values: dict[str, Any], kind: str) -> dict[str, Any]:
    small = {}
    for name, value in values.items():
        if (
            isinstance(value, dict)
            and name.endswith("config")
            and name not in ("quantization_config", "per_layer_config")
        ):
            named = {"model_type": value["model_type"]} if "model_type" in value else {}
            small[name] = _shrunk(value, value.get("model_type", "")) | named
        elif name in _SMALL and (value is None) <= (name in _MAY_BE_NONE):
            small[name] = _SMALL[name]
    kinds = list(dict.fromkeys(values.get("layer_types") or ()))
    if kinds:
        depth = next((small[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if n in small), 4)
        small["layer_types"] = [kinds[i % len(kinds)] for i in range(depth)]
    mlps = list(dict.fromkeys(values.get("mlp_layer_types") or ()))
    if mlps:
        small["mlp_layer_types"] = [mlps[min(i, len(mlps) - 1)] for i in range(4)]
    if values.get("kv_lora_rank"):  # latent attention has a key per head
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small | _SPECIAL.get(kind, {})


def small_config(kind: str, **options):
    """The configuration of a tiny model of type `kind`; `options` are set on its text part."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    values = _shrunk(made().to_dict(), kind)
    if options:
        part = values["text_config"] if isinstance(values.get("text_config"), dict) else values
        part.update(options)
    return made(**{name: value for name, value in values.items() if name != "model_type"})


def build(kind: str, seed: int = 0, std: float = 0.3, **options) -> nn.Module:
    """A model of type `kind` with random weights, large enough that choices differ from token to token.

    Raises ValueError when it is not small.
    """
    import transformers

    config = small_config(kind, **options)
    made = getattr(transformers, classes()[kind])
    if "is_decoder" in config.to_dict():
        config.is_decoder = True
    with torch.device("meta"):
        try:
            parameters = sum(p.numel() for p in made(config).parameters())
        except AttributeError:  # a class for the text part alone
            config = config.get_text_config()
            parameters = sum(p.numel() for p in made(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters:,} parameters, expected at most {MOST_PARAMETERS:,}")
    torch.manual_seed(seed)
    model = made(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model


def save(model: nn.Module, folder: Path) -> None:
    """Writes model and a tokenizer of `VOCAB` words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    words = {"a": 0} | {f"w{i}": i for i in range(1, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def takes(function, name: str) -> bool:
    return name in inspect.signature(function).parameters
