"""What DFLASH_RS needs of SGLang: one attribute or method each, the same for every served version.

What is written out here works in all of them. The rest is abstract, and each version's file says how that version does it. Nothing
imports SGLang before a method is called.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

# Methods of DFlashWorkerV2 that are overridden or called, and the parameters that are relied on.
METHODS = {
    "__init__": ("server_args", "gpu_id", "nccl_port", "target_worker"),
    "forward_batch_generation": ("batch", "on_publish", "grammar_barrier", "pp_proxy_tensors"),
    "_can_skip_verify_logits": ("batch", "sampling_info"),
    "_greedy_sample_from_vocab_parallel_head": ("hidden_states", "lm_head"),
    "_accept_block": (
        "candidates",
        "next_token_logits",
        "sampling_info",
        "draft_input",
        "prefix_lens",
        "bs",
        "target_predict",
    ),
    "_validate_phase1_sampling_support": ("batch",),
    "init_attention_backends": (),
    "init_cuda_graphs": (),
    "_maybe_build_draft_sampler": (),
    "alloc_memory_pool": ("memory_pool_config", "req_to_token_pool", "token_to_kv_pool_allocator"),
    "_append_target_hidden_to_draft_kv_by_loc": (
        "target_hidden",
        "cache_loc",
        "positions",
        "cache_loc_2d",
        "commit_lens",
    ),
    "_append_target_hidden_fused": (
        "ctx_hidden",
        "ctx_positions",
        "ctx_cache_loc",
        "ctx_cache_loc_2d",
        "commit_lens",
    ),
    "_make_next_draft_input_prefill": ("bonus_tokens", "seq_lens"),
    "_make_next_draft_input_decode": ("bonus_tokens", "new_seq_lens"),
    "on_verify_complete_cpu": ("num_correct_drafts_per_req", "batch_size"),
}

# Where the scheduler asks whether a request can be served; answered by `requests.refusal`.
REQUEST_CHECK = "sglang.srt.managers.scheduler.validate_dflash_request"
# How many columns a request's row of KV slots has beyond the context.
ROW_WIDTH = "sglang.srt.mem_cache.kv_cache_configurator.get_req_to_token_extra_context_len"
# Where a step's tokens are told to a request's grammar, and where it asks whether a request has ended; see `grammar`.
GRAMMAR = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor._accept_grammar_tokens"
FINISH = "sglang.srt.managers.schedule_batch.Req.update_finish_state"

# Whether the server runs this algorithm; a request's refusal, or None; and what stands around a function of SGLang's, which is its
# first argument.
Ours = Callable[[], bool]
Refusal = Callable[[Any], "str | None"]
Around = Callable[..., Any]


class Passed(NamedTuple):
    """What the target's pass over one token of every request has left.

    - `output`: SGLang's result of it.
    - `likeliest`: the tokens i64 ``[R]``, where no logits were gathered for anything else.
    - `slots`: i64 ``[R]``, where the drafter's keys and values of these tokens belong.
    """

    output: Any
    likeliest: Any
    slots: Any


class Seams(ABC):
    """SGLang as DFLASH_RS sees it. `args` are its server arguments, `worker` is its DFLASH worker, `runner` a model runner."""

    # --- what versions do differently --------------------------------------------------------------------------------

    # Whether requests keep their committed length in ``req.kv``, from where ``serving.plan_decode`` reads it; otherwise SGLang's own
    # draft input makes the room for a step.
    lengths_in_kv: bool

    @abstractmethod
    def lacking(self) -> list[str]:
        """What this version's file leans on beside METHODS and SGLang does not have, in words."""

    @abstractmethod
    def worker_class(self) -> Any:
        """SGLang's own DFLASH worker, with the METHODS."""

    @abstractmethod
    def past_the_checks(self, worker: Any, batch: Any) -> None:
        """SGLang's worker has looked at the batch and begins: what it was not to see is put back."""

    @abstractmethod
    def refused(self, args: Any) -> str | None:
        """Why these server arguments cannot be served, naming the flag, up to the words "and DFLASH_RS"; None if they can."""

    @abstractmethod
    def resolved(self, args: Any) -> Any:
        """Server arguments with everything filled in."""

    @abstractmethod
    def prepared(self, req: Any) -> Any:
        """The request as SGLang's own check of requests is to see it."""

    @abstractmethod
    def more_hooks(self, ours: Ours) -> dict[str, Around]:
        """Hooks beside those that every version has."""

    @abstractmethod
    def block_and_page(self, *args: Any) -> tuple[int, int]:
        """Tokens of a block and of a page, from what SGLang hands to ROW_WIDTH."""

    @abstractmethod
    def data_parallel_rank_of(self, worker: Any) -> int | None:
        """The number of this data-parallel rank; None where there is only one."""

    @abstractmethod
    def shares_attention(self) -> bool:
        """Whether ranks have data-parallel attention."""

    @abstractmethod
    def same_on_all_ranks(self, worker: Any, tokens: Any, drawn: bool) -> Any:
        """Tokens of rank 0 on every rank of the tensor-parallel group, as SGLANG_SPEC_TP_SYNC asks for `drawn` ones or others."""

    @abstractmethod
    def for_drafter(self, worker: Any) -> contextlib.AbstractContextManager[None]:
        """What is made within the context is made for the drafter's ranks."""

    @abstractmethod
    def new_backend(self, runner: Any) -> Any:
        """An attention backend with room of its own."""

    @abstractmethod
    def states_of_whole_blocks(self, worker: Any) -> str | None:
        """Why the states of the worker's target, which has some beside its KV, are those of whole blocks only; None if they need not be."""

    @abstractmethod
    def no_trees(self, worker: Any) -> list[str]:
        """Everything for which this worker cannot verify trees, in words; empty if it can."""

    @abstractmethod
    def verifying(self, step: Any) -> contextlib.AbstractContextManager[None]:
        """SGLang's step within the context verifies the trees of `step`, a ``trees.Step``, and not the chain that it drafts."""

    @abstractmethod
    def pass_over(self, worker: Any, batch: Any, tokens: Any, positions: Any, slots: Any) -> Passed:
        """Runs the target over one token of every request: `tokens`, `positions` and KV `slots` i64 ``[R]``. The batch is left as SGLang's step would."""

    @abstractmethod
    def log_probabilities(self, batch: Any, logits_output: Any, tokens: Any) -> None:
        """Puts those of a plain step's `tokens` i64 ``[R]`` into `logits_output`."""

    @abstractmethod
    def keep_states(self, worker: Any, batch: Any, before: Any, after: Any, commit_lens: Any) -> None:
        """The target's recurrent states are those behind the first `commit_lens` ``[R]`` tokens of a pass, which took lengths from `before` to `after`."""

    @abstractmethod
    def mask_room(self, backend: Any) -> int | None:
        """How many entries of a mask an attention backend's CUDA graphs have room for; None where that does not limit."""

    @abstractmethod
    def lattice(self, worker: Any, hidden: Any, anchors: Any, lm_head: Any) -> tuple[Any, Any]:
        """A DFlash 2's candidates for every place of a block, i64 ``[R, B - 1, k]``, and their scores behind those of the place before
        ``[R, B - 1, k, k]``; `hidden` is what its pass over a block has left, `anchors` ``[R]``."""

    @abstractmethod
    def best_path(self, worker: Any, tokens: Any, scores: Any) -> Any:
        """The path i64 ``[R, B - 1]`` along a `lattice` that takes the best candidate behind the one before."""

    @abstractmethod
    def masks_captured(self) -> contextlib.AbstractContextManager[None]:
        """CUDA graphs that are captured within the context read a mask of who attends to whom."""

    @abstractmethod
    def processors(self, info: Any) -> list[tuple[Any, list[int]]]:
        """The custom logit processors of a batch, each with the numbers of its requests."""

    @abstractmethod
    def no_sampling_mask(self) -> dict[str, Any]:
        """The fields of the sampling info that have a sampler record what its filters left, empty."""

    @abstractmethod
    def shares_pages(self, worker: Any) -> bool:
        """Whether others than this worker's steps read or write the drafter's pages of a request that ends. Asked once attention backends are made."""

    @abstractmethod
    def follow_all_drafts(self, worker: Any) -> None:
        """Drafts are followed only where the target draws the same: a drafter that samples drafts its likeliest path instead."""

    # --- hooks -------------------------------------------------------------------------------------------------------

    def hooks(self, ours: Ours, refusal: Refusal) -> dict[str, Around]:
        """By the names of functions in SGLang: what stands around them. Elsewhere than in a server of `ours` they are as they were."""
        from dflash_rs.sglang import grammar

        def check(original: Any, req: Any, enable_overlap: bool) -> Any:
            if not ours():
                return original(req, enable_overlap)
            if (answer := refusal(req)) is not None:
                return answer
            return original(self.prepared(req), enable_overlap)

        def row_width(original: Any, *args: Any) -> Any:
            extra = original(*args)
            if not ours():
                return extra
            block, page = self.block_and_page(*args)
            # Where a step that the host plans at the end of the context may write, in whole pages. With pages of one token SGLang makes
            # rows narrower than what is reserved, and the last slots of one request would be the first of the next.
            return max(extra, 2 * block + page)

        def grammar_accepts(original: Any, processor: Any, req: Any, tokens: Any) -> Any:
            if ours():
                return grammar.accept(original, processor, req, tokens)
            return original(processor, req, tokens)

        everywhere: dict[str, Around] = {
            REQUEST_CHECK: check,
            ROW_WIDTH: row_width,
            GRAMMAR: grammar_accepts,
            FINISH: grammar.finish,
        }
        return everywhere | self.more_hooks(ours)

    # --- the server ----------------------------------------------------------------------------------------------------

    def metrics_enabled(self, args: Any) -> bool:
        """Whether the server exports metrics."""
        return bool(self.resolved(args).enable_metrics)

    def served_model_name(self, args: Any) -> str:
        """The model's name, as SGLang's own metrics label it."""
        return str(self.resolved(args).served_model_name)

    def draft_model_path(self, args: Any) -> str:
        """Where the drafter is."""
        return str(self.resolved(args).speculative_draft_model_path)

    def counts(self) -> bool:
        """Whether this process counts for the ranks that run the same requests: with data-parallel attention, not all ranks do."""
        from sglang.srt.runtime_context import get_parallel

        return int(get_parallel().attn_tp_rank) == 0

    def data_parallel_rank(self, worker: Any) -> dict[str, str]:
        """The label that SGLang's own metrics tell data-parallel ranks apart by; empty where there is only one."""
        rank = self.data_parallel_rank_of(worker)
        return {} if rank is None else {"dp_rank": str(rank)}

    def tensor_parallel_group(self) -> Any:
        """The group of ranks that run the same requests."""
        from sglang.srt.distributed import get_tp_group

        return get_tp_group()

    def selects(self, worker: Any) -> bool:
        """Whether the worker's drafter is a DFlash 2, whose candidates depend on those before them."""
        return getattr(worker, "selector", None) is not None

    def drafts_in_place(self, worker: Any) -> bool:
        """Whether the worker's drafter drafts where `METHODS` has it draft, which some kinds do not that not every version knows."""
        return getattr(worker, "lilicorr", None) is None and not getattr(worker, "_is_domino", False)

    def drafter_group(self) -> Any:
        """The ranks that have a part of the head each, where SGLang's step draws the drafts."""
        from sglang.srt.runtime_context import get_parallel

        return get_parallel().tp_group

    def joint_filters(self, sampler: Any) -> bool | None:
        """Whether SGLang's sampler applies top-k and top-p at once where there is a min-p, too; None where its draws follow no law that is known here."""
        from sglang.srt.layers.sampler import Sampler
        from sglang.srt.runtime_context import get_exec

        backend = get_exec().kernel.sampling_backend
        known = type(sampler) is Sampler and sampler.rl_on_policy_target is None
        return _LAWS.get(backend) if known else None

    def sanitized(self, sampler: Any, logits: Any, info: Any) -> Any:
        """Logits ``[rows, V]`` as the sampler reads them, which may take numbers out that are none."""
        return sampler._preprocess_logits(logits, info)

    def hashed(self, seeds: Any, positions: Any, columns: Any) -> Any:
        """The words that SGLang makes the numbers of a seeded draw of, u32 ``[n, C]``: `seeds` u64 ``[n]``, `positions` ``[n]`` of the tokens before the one
        that is drawn, `columns` ``[C]``."""
        from sglang.srt.layers import sampler

        return sampler.murmur_hash32(seeds, positions, columns)

    def simulates_acceptance(self) -> bool:
        """Whether SGLANG_SIMULATE_ACC_LEN asks for made-up accept lengths, for measuring; the text is then meaningless."""
        from sglang.srt.speculative.spec_utils import SIMULATE_ACC_LEN

        return SIMULATE_ACC_LEN > 0

    def takes_media(self) -> bool:
        """Whether prompts of this target may hold placeholders of images, sound or video, which can be outside the vocabulary."""
        return _takes_media()

    def most_top_logprobs(self) -> int | None:
        """The largest `top_logprobs_num` that a server can hand on; None where the vocabulary is the limit."""
        return None

    # --- a step ----------------------------------------------------------------------------------------------------------

    def draft_input_class(self) -> Any:
        """What SGLang's DFLASH worker hands from one step to the next."""
        from sglang.srt.speculative.dflash_info_v2 import DFlashDraftInputV2

        return DFlashDraftInputV2

    def state_types(self, worker: Any) -> tuple[list[Any], list[Any]]:
        """What the target's convolutions keep their last inputs in, and its recurrent layers their states; nothing if it has none."""
        if not worker._need_mamba_verify_commit:
            return [], []
        kept = worker.model_runner.req_to_token_pool.mamba_pool.mamba_cache
        return [part.dtype for part in kept.conv if part.numel()], [kept.temporal.dtype] * (kept.temporal.numel() > 0)

    def block_spec(self, width: int, device: Any) -> Any:
        """What the drafter's pass is told of its block."""
        from sglang.srt.speculative.draft_worker_common import make_draft_block_spec_info

        return make_draft_block_spec_info(draft_token_num=width, device=device)

    @contextlib.contextmanager
    def reaching(self, batch: Any, tokens: int, reserved: Any) -> Iterator[None]:
        """Within the context the host takes a batch's lengths for those behind a pass over so many tokens of each request; for the `reserved` ones,
        which are a draft input's, where it knows no others."""
        lengths, total = batch.seq_lens_cpu, batch.seq_lens_sum
        if lengths is not None:
            batch.seq_lens_cpu = lengths + tokens
            batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
        elif reserved is not None:
            batch.seq_lens_cpu, batch.seq_lens_sum = reserved, int(reserved.sum())
        try:
            yield
        finally:
            batch.seq_lens_cpu, batch.seq_lens_sum = lengths, total

    @contextlib.contextmanager
    def sized_for(self, width: int) -> Iterator[None]:
        """What is made within the context is made for this many tokens per request."""
        from sglang.srt.runtime_context import get_context, get_spec

        block = get_spec().speculative_num_draft_tokens
        get_context().override("dflash_rs.width", speculative_num_draft_tokens=width)
        try:
            yield
        finally:
            get_context().override("dflash_rs.whole_block", speculative_num_draft_tokens=block)

    def own_pass(self, runner: Any, width: int, drafts_of: Any = None) -> dict[str, Any]:
        """An attention backend for this width, and CUDA graphs if the runner has some; within `sized_for`.

        `drafts_of` is the worker, in this width's shape, if the runner is its drafter's: its graphs draw the drafts, too.
        """
        backend = self.new_backend(runner)
        graphs = runner.decode_cuda_graph_runner
        if graphs is None or graphs is runner.eager_runner:
            return {"attn_backend": backend, "decode_cuda_graph_runner": graphs}
        hooks, before = runner.capture_tail_hooks, runner.attn_backend
        if drafts_of is not None:
            from sglang.srt.speculative.draft_worker_common import make_draft_sampler_capture_hook

            drafts_of._draft_sampler = sampler = drafts_of._maybe_build_draft_sampler()
            runner.capture_tail_hooks = [] if sampler is None else [make_draft_sampler_capture_hook(sampler)]
        runner.attn_backend = backend
        try:
            captured = type(graphs)(
                runner, attn_backend=backend, speculative_num_steps=1, speculative_num_draft_tokens=width
            )
        finally:
            runner.capture_tail_hooks, runner.attn_backend = hooks, before
        return {"attn_backend": backend, "decode_cuda_graph_runner": captured}

    def only_whole_blocks(self, worker: Any, names: tuple[str, ...], asked: bool) -> str | None:
        """Why every step of this worker has to be a whole block, in words; None where the attributes `names` can be exchanged for one.

        `asked`: whether other widths were asked for in so many words.
        """
        import torch

        device = torch.device(worker.device).type
        if device != "cpu" and not asked:
            return f'other widths have not been run on {device}; "adaptive": true in DFLASH_RS_CONFIG tries them'
        args = self.resolved(worker.server_args)
        if args.enable_two_batch_overlap or args.enable_pdmux:
            return "--enable-two-batch-overlap and --enable-pdmux keep attention backends of their own"
        if device != "cpu" and getattr(args, "enable_lora", None):
            return "--enable-lora: CUDA graphs with adapters are for one number of tokens per request"
        if self.shares_attention():
            return "ranks with data-parallel attention must keep step, each with requests of its own"
        # Kinds of drafters, which not every version knows.
        if getattr(worker, "lilicorr", None) is not None:
            return f"{type(worker.draft_model).__name__} selects among candidates within its block"
        if getattr(worker, "_is_domino", False):
            return f"{type(worker.draft_model).__name__} rolls its block out token by token"
        if worker._need_mamba_verify_commit and (reason := self.states_of_whole_blocks(worker)) is not None:
            return reason
        if self.simulates_acceptance():
            return "SGLANG_SIMULATE_ACC_LEN makes up accept lengths of whole blocks"
        if lacking := [name for name in names if name not in vars(worker)]:
            return f"SGLang's worker has no {', '.join(lacking)}"
        return None


# Sampling backends whose filters are known: whether top-k and top-p are applied at once where there is a min-p, too. Without one both do that.
_LAWS = {"pytorch": True, "flashinfer": False}


@cache
def _takes_media() -> bool:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.runtime_context import get_server_args

    return bool(ModelConfig.from_server_args(get_server_args()).is_multimodal)
