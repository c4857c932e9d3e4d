"""Names of other engines' options, and what they are called here: whoever comes from vLLM or SGLang is told, instead of being told nothing.

Nothing is translated in silence: a name that is not ours is refused, with ours in the message where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, TypeVar

from .arguments import shown
from .errors import InvalidArgument

# What is written here instead; None where there is nothing like it.
SAMPLING: Mapping[str, str | None] = {
    "allowed_tokens": "allowed_token_ids",
    "beam_width": None,
    "best_of": None,
    "custom_params": None,
    "detokenize": None,
    "early_stopping": None,
    "ebnf": "structured_outputs={'grammar': ...}",
    "extra_args": None,
    "flat_logprobs": None,
    "guided_decoding": "structured_outputs",
    "json_schema": "structured_outputs={'json': ...}",
    "length_penalty": None,
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "no_stop_trim": "include_stop_str_in_output",
    "num_beams": None,
    "output_kind": "generate for whole outputs, stream for new text",
    "regex": "structured_outputs={'regex': ...}",
    "return_logprob": "logprobs",
    "sampling_seed": "seed",
    "spaces_between_special_tokens": None,
    "stop_regex": None,
    "structural_tag": None,
    "top_logprobs_num": "logprobs",
    "use_beam_search": None,
}
CALLS: Mapping[str, str | None] = {
    "image_data": None,
    "input_embeds": None,
    "input_ids": "token ids as prompts",
    "lora_path": None,
    "lora_request": None,
    "logprob_start_len": "prompt_logprobs of SamplingParams",
    "mm_processor_kwargs": None,
    "multi_modal_data": None,
    "priority": None,
    "prompt": "prompts",
    "prompt_token_ids": "token ids as prompts",
    "return_hidden_states": None,
    "return_logprob": "logprobs of SamplingParams",
    "rid": "request_ids",
    "tokenization_kwargs": None,
    "top_logprobs_num": "logprobs of SamplingParams",
}
ENGINE: Mapping[str, str | None] = {
    "attention_backend": None,
    "chunked_prefill_size": "max_batch_tokens",
    "context_length": "max_context",
    "cpu_offload_gb": None,
    "data_parallel_size": None,
    "disable_cuda_graph": "cuda_graphs=False",
    "disable_overlap_schedule": "overlap=False",
    "disable_radix_cache": "prefix_cache=False",
    "dp_size": None,
    "enable_lora": None,
    "enable_prefix_caching": "prefix_cache",
    "enforce_eager": "cuda_graphs=False",
    "gpu_memory_utilization": "num_pages",
    "load_format": None,
    "logits_processors": "logits_processors of SamplingParams",
    "max_model_len": "max_context",
    "max_num_batched_tokens": "max_batch_tokens",
    "max_num_seqs": "max_running",
    "max_running_requests": "max_running",
    "max_total_tokens": "num_pages",
    "mem_fraction_static": "num_pages",
    "model_path": "model",
    "pipeline_parallel_size": None,
    "quantization": None,
    "seed": "seed of SamplingParams",
    "speculative_algorithm": "draft",
    "speculative_config": "draft",
    "speculative_draft_model_path": "draft",
    "speculative_model": "draft",
    "speculative_num_draft_tokens": "block_size",
    "swap_space": None,
    "tensor_parallel_size": None,
    "tokenizer": None,
    "tp_size": None,
    "trust_remote_code": None,
}

_MOST_NAMES = 12
_C = TypeVar("_C", bound=type)


def refuse(given: Mapping[str, Any], table: Mapping[str, str | None]) -> None:
    """Refuses the first of these names that another engine has. Raises InvalidArgument naming it."""
    for name, value in given.items():
        if name in table:
            here = table[name]
            expected = f"{here}, as it is called here" if here else "no such option: this engine does not have it"
            raise InvalidArgument(f"{name}: got {shown(value)}, expected {expected}")


def unknown(function: str, given: Mapping[str, Any], table: Mapping[str, str | None]) -> None:
    """Refuses whatever is in `given`, arguments that `function` does not have: a TypeError unless another engine has the name."""
    refuse(given, table)
    if given:
        raise TypeError(f"{function}() got an unexpected keyword argument {next(iter(given))!r}")


def known(name: str, given: Mapping[Any, Any], names: Collection[str], table: Mapping[str, str | None]) -> None:
    """Refuses what is in the mapping `given` and not among `names`. Raises InvalidArgument."""
    other = {key: value for key, value in given.items() if key not in names}
    refuse({key: value for key, value in other.items() if isinstance(key, str)}, table)
    if other:
        # In full they would not fit into a message.
        some = [*names][:_MOST_NAMES] + (["..."] if len(names) > _MOST_NAMES else [])
        raise InvalidArgument(f"{name}: got {shown(next(iter(other)))}, expected some of {', '.join(some)}")


def explained(table: Mapping[str, str | None]) -> Callable[[_C], _C]:
    """A class whose construction refuses the names in `table` with what they are called here."""

    def change(cls: _C) -> _C:
        made: Callable[..., None] = cls.__init__  # type: ignore[misc]

        @wraps(made)
        def init(self: Any, *args: Any, **options: Any) -> None:
            if not table.keys().isdisjoint(options):
                refuse(options, table)
            made(self, *args, **options)

        cls.__init__ = init  # type: ignore[misc]
        return cls

    return change
