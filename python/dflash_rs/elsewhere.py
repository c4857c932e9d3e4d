"""Names of other engines' options, and what they are called here: whoever comes from vLLM or SGLang is told, instead of being told nothing.

Nothing is translated in silence: a name that is not ours is refused, with ours in the message where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

from .arguments import shown
from .errors import InvalidArgument

# What is written here instead; None where there is nothing like it.
SAMPLING: Mapping[str, str | None] = {
    "add_special_tokens": None,
    "allowed_tokens": "allowed_token_ids",
    "beam_width": None,
    "best_of": None,
    "custom_logit_processor": "logits_processors",
    "custom_params": None,
    "detokenize": None,
    "early_stopping": None,
    "ebnf": "structured_outputs={'grammar': ...}",
    "ebnf_full_assistant": None,
    "echo": None,
    "extra_args": None,
    "flat_logprobs": None,
    "guided_choice": "structured_outputs={'choice': ...}",
    "guided_decoding": "structured_outputs",
    "guided_decoding_backend": None,
    "guided_grammar": "structured_outputs={'grammar': ...}",
    "guided_json": "structured_outputs={'json': ...}",
    "guided_json_object": "structured_outputs={'json_object': True}",
    "guided_regex": "structured_outputs={'regex': ...}",
    "guided_whitespace_pattern": "structured_outputs={..., 'disable_any_whitespace': True}",
    "json_schema": "structured_outputs={'json': ...}",
    "length_penalty": None,
    "logprob_start_len": "prompt_logprobs",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "no_stop_trim": "include_stop_str_in_output",
    "num_beams": None,
    "output_kind": "generate for whole outputs, stream for new text",
    "regex": "structured_outputs={'regex': ...}",
    "response_format": "structured_outputs",
    "return_logprob": "logprobs",
    "sampling_seed": "seed",
    "skip_reading_prefix_cache": None,
    "spaces_between_special_tokens": None,
    "stop_regex": None,
    "stream": "generate for whole outputs, stream for new text",
    "stream_interval": None,
    "structural_tag": None,
    "thinking_token_budget": None,
    "token_ids_logprob": None,
    "top_logprobs_num": "logprobs",
    "use_beam_search": None,
    "watermark": None,
}
_CALLS: Mapping[str, str | None] = {
    "audio_data": None,
    "cache_salt": None,
    "chat_template_content_format": None,
    "custom_logit_processor": "logits_processors of SamplingParams",
    "data_parallel_rank": None,
    "guided_options_request": "structured_outputs of SamplingParams",
    "image_data": None,
    "input_embeds": None,
    "input_ids": "token ids as prompts",
    "logprob_start_len": "prompt_logprobs of SamplingParams",
    "lora_path": None,
    "lora_request": None,
    "mm_processor_kwargs": None,
    "multi_modal_data": None,
    "output_kind": "the calls generate and stream",
    "priority": None,
    "prompt": "prompts",
    "prompt_adapter_request": None,
    "prompt_token_ids": "token ids as prompts",
    "request_id": "request_ids",
    "require_reasoning": None,
    "return_hidden_states": None,
    "return_logprob": "logprobs of SamplingParams",
    "rid": "request_ids",
    "session_id": None,
    "session_params": None,
    "stream": "the calls stream and astream",
    "token_ids_logprob": None,
    "tokenization_kwargs": None,
    "top_logprobs_num": "logprobs of SamplingParams",
    "video_data": None,
}
ENGINE: Mapping[str, str | None] = {
    "additional_config": None,
    "async_scheduling": "overlap",
    "attention_backend": None,
    "base_gpu_id": "device",
    "chat_template": "chat_template of chat",
    "chunked_prefill_size": "max_batch_tokens",
    "compilation_config": None,
    "context_length": "max_context",
    "cpu_offload_gb": None,
    "cuda_graph_bs": "capture_ahead",
    "cuda_graph_max_bs": "capture_ahead",
    "data_parallel_size": None,
    "disable_cuda_graph": "cuda_graphs=False",
    "disable_custom_all_reduce": None,
    "disable_log_stats": None,
    "disable_overlap_schedule": "overlap=False",
    "disable_radix_cache": "prefix_cache=False",
    "distributed_executor_backend": None,
    "download_dir": None,
    "dp_size": None,
    "enable_chunked_prefill": "max_batch_tokens",
    "enable_expert_parallel": None,
    "enable_lora": None,
    "enable_metrics": None,
    "enable_prefix_caching": "prefix_cache",
    "enable_sleep_mode": None,
    "enable_torch_compile": None,
    "enforce_eager": "cuda_graphs=False",
    "ep_size": None,
    "generation_config": None,
    "gpu_memory_utilization": "num_pages",
    "grammar_backend": None,
    "guided_decoding_backend": None,
    "hf_overrides": None,
    "hf_token": None,
    "json_model_override_args": None,
    "kv_cache_dtype": None,
    "kv_cache_memory_bytes": "num_pages",
    "limit_mm_per_prompt": None,
    "load_format": None,
    "log_level": None,
    "logits_processors": "logits_processors of SamplingParams",
    "lora_paths": None,
    "max_logprobs": None,
    "max_lora_rank": None,
    "max_loras": None,
    "max_model_len": "max_context",
    "max_num_batched_tokens": "max_batch_tokens",
    "max_num_seqs": "max_running",
    "max_parallel_loading_workers": None,
    "max_prefill_tokens": "max_batch_tokens",
    "max_running_requests": "max_running",
    "max_seq_len_to_capture": None,
    "max_total_tokens": "num_pages",
    "mem_fraction_static": "num_pages",
    "model_impl": None,
    "model_path": "model",
    "ngram_prompt_lookup_max": "lookup",
    "ngram_prompt_lookup_min": "lookup",
    "nnodes": None,
    "node_rank": None,
    "num_gpu_blocks_override": "num_pages",
    "num_lookahead_slots": None,
    "num_scheduler_steps": None,
    "num_speculative_tokens": "block_size",
    "override_generation_config": None,
    "pipeline_parallel_size": None,
    "pp_size": None,
    "quantization": None,
    "random_seed": "seed of SamplingParams",
    "revision": None,
    "rope_scaling": None,
    "rope_theta": None,
    "runner": None,
    "sampling_backend": None,
    "schedule_policy": None,
    "scheduling_policy": None,
    "seed": "seed of SamplingParams",
    "served_model_name": None,
    "skip_tokenizer_init": None,
    "speculative_accept_threshold_acc": None,
    "speculative_accept_threshold_single": None,
    "speculative_algorithm": "draft",
    "speculative_config": "draft",
    "speculative_draft_model_path": "draft",
    "speculative_draft_model_revision": None,
    "speculative_draft_tensor_parallel_size": None,
    "speculative_eagle_topk": "tree_nodes",
    "speculative_max_model_len": None,
    "speculative_model": "draft",
    "speculative_num_draft_tokens": "block_size",
    "speculative_num_steps": "block_size",
    "speculative_token_map": None,
    "structured_outputs_config": None,
    "swap_space": None,
    "task": None,
    "tensor_parallel_size": None,
    "tokenizer": None,
    "tokenizer_mode": None,
    "tokenizer_path": None,
    "tokenizer_pool_size": None,
    "tokenizer_revision": None,
    "torch_compile_max_bs": None,
    "tp_size": None,
    "trust_remote_code": None,
    "worker_cls": None,
}
# Whoever asks for an option of a request in the call itself.
CALLS: Mapping[str, str | None] = {
    **{name: here and f"{here} of SamplingParams" for name, here in SAMPLING.items()},
    **_CALLS,
}

_MOST_NAMES = 12
_C = TypeVar("_C", bound=Callable[..., Any])


def refuse(given: Mapping[str, Any], table: Mapping[str, str | None]) -> None:
    """Refuses the first of these names that another engine has. Raises InvalidArgument naming it."""
    for name, value in given.items():
        if name in table:
            here = table[name]
            expected = f"{here}, as it is called here" if here else "no such option: this engine does not have it"
            raise InvalidArgument(f"{name}: got {shown(value)}, expected {expected}")


def known(name: str, given: Mapping[Any, Any], names: Collection[str], table: Mapping[str, str | None]) -> None:
    """Refuses what is in the mapping `given` and not among `names`. Raises InvalidArgument."""
    other = {key: value for key, value in given.items() if key not in names}
    refuse({key: value for key, value in other.items() if isinstance(key, str)}, table)
    if other:
        # In full they would not fit into a message.
        some = [*names][:_MOST_NAMES] + (["..."] if len(names) > _MOST_NAMES else [])
        raise InvalidArgument(f"{name}: got {shown(next(iter(other)))}, expected some of {', '.join(some)}")


def explained(table: Mapping[str, str | None]) -> Callable[[_C], _C]:
    """A function, or a class when it is made, that refuses the names in `table` with what they are called here, before Python says which
    arguments are unknown or missing."""

    def change(made: _C) -> _C:
        function: Callable[..., Any] = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]

        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if not table.keys().isdisjoint(options):
                refuse(options, table)
            return function(*args, **options)

        if not isinstance(made, type):
            return cast(_C, call)
        made.__init__ = call  # type: ignore[misc]
        return made

    return change
