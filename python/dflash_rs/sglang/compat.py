"""Everything here depends on SGLang's version: which ones are known to fit, and the names they are reached by.

The worker overrides private methods of SGLang's DFLASH worker, so a version counts as supported only after the tests have run on
it. ``check`` compares the version and every name the worker leans on, and says what is wrong before a model is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from typing import Any

from dflash_rs.errors import DflashError

TESTED = ("0.5.17", "0.5.23")
INSTALL = f"pip install sglang=={TESTED[-1]}"

# Methods of DFlashWorkerV2 that are overridden, and the parameters that are relied on.
SEAMS = {
    "__init__": ("server_args", "gpu_id", "nccl_port", "target_worker"),
    "forward_batch_generation": ("batch", "on_publish", "grammar_barrier", "pp_proxy_tensors"),
    "_can_skip_verify_logits": ("batch", "sampling_info"),
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
    "alloc_memory_pool": ("memory_pool_config", "req_to_token_pool", "token_to_kv_pool_allocator"),
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
# Where it asks which models new weights are for, and where a turn of a streaming session ends. Not hooked in 0.5.17, whose worker
# is asked itself about the weights, and where streaming sessions are refused.
WEIGHTS_FOR = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager._select_runners"
TURN_ENDS = "sglang.srt.session.streaming_session.StreamingSession.try_cache_finished_req"


class UnsupportedSGLang(DflashError):
    """This SGLang is not one the worker is known to fit."""


def version() -> str | None:
    """SGLang's version, or None where it is not installed."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def is_oldest() -> bool:
    """Whether this is 0.5.17."""
    return version() == TESTED[0]


def worker_class() -> type:
    """SGLang's own DFLASH worker."""
    from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2

    return DFlashWorkerV2 if hasattr(DFlashWorkerV2, "_accept_block") else _with_accept_block(DFlashWorkerV2)


@cache
def _with_accept_block(stock: type) -> type:
    """0.5.17 accepts in the middle of ``forward_batch_generation``: its worker with ``_accept_block``, as later versions have it.

    Three functions that it calls there are replaced. The one that adjusts logits only remembers them: there is nothing to adjust,
    see ``sampling.bare``. The one that asks whether this device can sample says no, so that the drafts are always compared with
    tokens, and the one that compares them hands over to ``_accept_block``. In between SGLang masks the same logits by grammar.

    That worker refuses batches with log-probabilities, because it computes none. Here they are computed after it, from the logits
    that the tokens were chosen by, with the function that its EAGLE worker uses.
    """
    from sglang.srt.speculative import dflash_worker_v2 as module

    compare = module.compute_dflash_correct_drafts_and_bonus
    running: dict[str, Any] = {}

    class Worker(stock):
        def __init__(self, server_args: Any, gpu_id: int, nccl_port: int, target_worker: Any, **kwargs: Any):
            super().__init__(
                server_args=server_args, gpu_id=gpu_id, nccl_port=nccl_port, target_worker=target_worker, **kwargs
            )
            # The fused kernel knows the argmax only.
            self._use_triton_accept_bonus = False
            self._target_tp_rank = self.ps.tp_rank

        def forward_batch_generation(
            self, batch: Any, on_publish: Any = None, grammar_barrier: Any = None, pp_proxy_tensors: Any = None
        ) -> Any:
            running.update(worker=self, batch=batch)
            wanted, batch.return_logprob = batch.return_logprob, False
            self._return_logprob = wanted
            try:
                result = super().forward_batch_generation(batch, on_publish, grammar_barrier)
            finally:
                batch.return_logprob = wanted
                running.clear()
            # Of a verified block; those of a prompt and its first token are SGLang's.
            if wanted and result.accept_lens is not None and result.logits_output is not None:
                _log_probabilities(batch, result)
            return result

        def _can_skip_verify_logits(self, batch: Any, sampling_info: Any) -> bool:
            return False

        def _accept_block(
            self,
            *,
            candidates: Any,
            next_token_logits: Any,
            sampling_info: Any,
            draft_input: Any,
            prefix_lens: Any,
            bs: int,
            target_predict: Any = None,
        ) -> tuple:
            sampled = target_predict.view_as(candidates)
            accepted, bonus = compare(candidates=candidates, target_predict=sampled)
            commit_lens = accepted + 1
            return accepted, commit_lens, bonus, sampled, prefix_lens + commit_lens.to(prefix_lens.dtype)

        def update_weights_from_disk(self, recv_req: Any) -> tuple[bool, str]:
            return True, "the drafter keeps its weights"

        update_weights_from_ipc = update_weights_from_disk

    def remember(*, next_token_logits: Any, **_: Any) -> None:
        running["logits"] = next_token_logits

    def accept(*, candidates: Any, target_predict: Any) -> tuple:
        batch = running["batch"]
        accepted, _, bonus, _, _ = running["worker"]._accept_block(
            candidates=candidates,
            next_token_logits=running["logits"],
            sampling_info=batch.sampling_info,
            draft_input=batch.spec_info,
            prefix_lens=batch.seq_lens,
            bs=len(batch.seq_lens),
        )
        return accepted, bonus

    module.apply_dflash_verify_logits_adjustments = remember
    module.compute_dflash_correct_drafts_and_bonus = accept
    module.is_dflash_sampling_verify_available = lambda: False
    return Worker


def _log_probabilities(batch: Any, result: Any) -> None:
    """Log-probabilities of every token of a verified block, in 0.5.17; those behind the last accepted one are never read."""
    from sglang.srt.layers.logprob_processor import compute_spec_v2_logprobs

    tokens, block = result.next_token_ids, result.speculative_num_draft_tokens
    rows = tokens.new_ones(tokens.shape).cumsum(0) - 1
    compute_spec_v2_logprobs(batch, result.logits_output, tokens, rows.view(-1, block), block - 1)


def past_the_checks(worker: Any, batch: Any) -> None:
    """SGLang's worker has looked at the batch and begins: what 0.5.17's was not to see is put back."""
    batch.return_logprob = getattr(worker, "_return_logprob", batch.return_logprob)


def cannot_share_attention(args: Any) -> str | None:
    """Why these server arguments cannot have data-parallel attention, naming the flag; None if they can, or do not ask for it."""
    if not hasattr(args, "attn_dp_size"):
        # 0.5.17: its DFLASH worker does not keep step with idle ranks.
        return "--enable-dp-attention: got true, expected false with this SGLang" if args.enable_dp_attention else None
    if args.attn_dp_size == 1:
        return None
    if not args.enable_dp_lm_head:
        # The drafter borrows the target's head, which it has to find whole within its own ranks.
        return f"--enable-dp-lm-head: not given, expected with --attn-dp-size {args.attn_dp_size}"
    if args.attn_cp_size != 1:
        return f"--attn-cp-size: got {args.attn_cp_size}, expected 1 with --attn-dp-size {args.attn_dp_size}"
    return None


def draft_input_class() -> type:
    """What SGLang's DFLASH worker hands from one step to the next."""
    from sglang.srt.speculative.dflash_info_v2 import DFlashDraftInputV2

    return DFlashDraftInputV2


def lengths_in_kv() -> bool:
    """Whether requests keep their committed length in ``req.kv``, from where ``serving.plan_decode`` reads it."""
    return "nxt_kv_lens_cpu" in draft_input_class().__dataclass_fields__


def problems() -> list[str]:
    """What the installed SGLang lacks of what the worker leans on, in words; empty when it fits."""
    if version() is None:
        return ["sglang: not installed, expected one of " + ", ".join(TESTED)]
    try:
        worker = worker_class()
        draft_input_class()
    except ImportError as error:
        return [f"sglang {version()}: its DFLASH worker cannot be imported ({error})"]
    found = []
    for name, expected in SEAMS.items():
        method = getattr(worker, name, None)
        if method is None:
            found.append(f"DFlashWorkerV2.{name}: not there")
            continue
        missing = [p for p in expected if p not in inspect.signature(method).parameters]
        if missing:
            found.append(f"DFlashWorkerV2.{name}: no parameter {', '.join(missing)}")
    return found


def check(allow_untested: bool) -> None:
    """Raises UnsupportedSGLang unless this version was tested, or fits and `allow_untested` is set."""
    have = version()
    if have not in TESTED and not allow_untested:
        raise UnsupportedSGLang(
            f"sglang: got version {have}, tested with {', '.join(TESTED)}; install one of those, or set "
            '"allow_untested_sglang": true in DFLASH_RS_CONFIG'
        )
    if found := problems():
        raise UnsupportedSGLang(f"sglang {have} does not fit DFLASH_RS: " + "; ".join(found))


def not_hooked() -> list[str]:
    """Which of the hooks SGLang could not apply; it logs that and goes on."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    wanted = [REQUEST_CHECK, ROW_WIDTH, GRAMMAR, FINISH] + ([] if is_oldest() else [WEIGHTS_FOR, TURN_ENDS])
    return [name for name in wanted if name not in HookRegistry._patched]


def resolved(server_args: Any) -> Any:
    """Server arguments with everything filled in."""
    from sglang.srt.arg_groups import overrides

    # 0.5.17 fills them in themselves.
    view = getattr(overrides, "resolving_view", None)
    return server_args if view is None else view(server_args)


def metrics_enabled(server_args: Any) -> bool:
    """Whether the server exports metrics."""
    return bool(resolved(server_args).enable_metrics)


def counts() -> bool:
    """Whether this process counts for the ranks that run the same requests: with data-parallel attention, not all ranks do."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().attn_tp_rank) == 0


def data_parallel_rank(worker: Any) -> dict[str, str]:
    """The label that SGLang's own metrics tell data-parallel ranks apart by; empty where there is only one."""
    from sglang.srt.runtime_context import get_parallel

    where = worker.ps if hasattr(worker, "ps") else get_parallel()  # the name in 0.5.17
    return {} if where.dp_rank is None else {"dp_rank": str(where.dp_rank)}


def served_model_name(server_args: Any) -> str:
    """The model's name, as SGLang's own metrics label it."""
    return str(resolved(server_args).served_model_name)


def draft_model_path(server_args: Any) -> str:
    """Where the drafter is."""
    return str(resolved(server_args).speculative_draft_model_path)


def simulates_acceptance() -> bool:
    """Whether SGLANG_SIMULATE_ACC_LEN asks for made-up accept lengths, for measuring; the text is then meaningless."""
    from sglang.srt.speculative.spec_utils import SIMULATE_ACC_LEN

    return SIMULATE_ACC_LEN > 0


@cache
def takes_media() -> bool:
    """Whether prompts of this target may hold placeholders of images, sound or video, which can be outside the vocabulary."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.runtime_context import get_server_args

    return bool(ModelConfig.from_server_args(get_server_args()).is_multimodal)


def same_on_all_ranks(worker: Any, tokens: Any, drawn: bool) -> Any:
    """Tokens of rank 0 on every rank of the tensor-parallel group, as SGLANG_SPEC_TP_SYNC asks for `drawn` ones or others."""
    if not hasattr(worker, "_tp_sync"):
        return tokens  # 0.5.17 has no such setting
    from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

    site = SpecTpSyncSite.DFLASH_ACCEPT_SAMPLE if drawn else SpecTpSyncSite.DFLASH_ACCEPT_GREEDY
    return worker._tp_sync.sync(site, tokens.contiguous())


def hook(ours: Any, refusal: Any) -> None:
    """Has SGLang ask us first where its own answer would not do for this algorithm, which is the server's if `ours()`.

    `refusal(req)` returns a text to refuse a request with, or None.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from dflash_rs.sglang import grammar

    oldest = is_oldest()

    def check(original, req, enable_overlap):
        if not ours():
            return original(req, enable_overlap)
        if (answer := refusal(req)) is not None:
            return answer
        if oldest:
            # It would refuse it because its own worker computes no log-probabilities.
            req = copy.copy(req)
            req.return_logprob = False
        return original(req, enable_overlap)

    def weights_for(original, self, selector="all"):
        # The target's weights and the drafter's have the same names: loaded into both, they would leave no drafter.
        return original(self, "target" if selector == "all" and ours() else selector)

    def turn_ends(original, self, req):
        kept = original(self, req)
        if kept and ours():
            # The last token may be one that no pass has had as its input yet: its KV is missing, or a rejected draft's.
            kv = self.slots[req.session.session_id].kv
            kv.kv_committed_len = min(kv.kv_committed_len, len(req.origin_input_ids) + len(req.output_ids) - 1)
        return kept

    def row_width(original, *args):
        extra = original(*args)
        if not ours():
            return extra
        block, page = _block_and_page(*args)
        # Where a step that the host plans at the end of the context may write, in whole pages. With pages of one token SGLang makes
        # rows narrower than what is reserved, and the last slots of one request would be the first of the next.
        return max(extra, 2 * block + page)

    def grammar_accepts(original, self, req, tokens):
        return grammar.accept(original, self, req, tokens) if ours() else original(self, req, tokens)

    HookRegistry.register(REQUEST_CHECK, check, HookType.AROUND)
    HookRegistry.register(ROW_WIDTH, row_width, HookType.AROUND)
    HookRegistry.register(GRAMMAR, grammar_accepts, HookType.AROUND)
    HookRegistry.register(FINISH, grammar.finish, HookType.AROUND)
    if not oldest:
        HookRegistry.register(WEIGHTS_FOR, weights_for, HookType.AROUND)
        HookRegistry.register(TURN_ENDS, turn_ends, HookType.AROUND)


def _block_and_page(server_args: Any = None) -> tuple[int, int]:
    """Tokens of a block and of a page; 0.5.17 hands its server arguments around."""
    if server_args is not None:
        return int(server_args.speculative_num_draft_tokens), int(server_args.page_size)
    from sglang.srt.runtime_context import get_schedule, get_spec

    return int(get_spec().speculative_num_draft_tokens), int(get_schedule().page_size)


def block_spec(width: int, device: Any) -> Any:
    """What the drafter's pass is told of its block."""
    from sglang.srt.speculative.draft_worker_common import make_draft_block_spec_info

    return make_draft_block_spec_info(draft_token_num=width, device=device)


@contextlib.contextmanager
def sized_for(width: int) -> Iterator[None]:
    """What is made within the context is made for this many tokens per request."""
    from sglang.srt.runtime_context import get_context, get_spec

    block = get_spec().speculative_num_draft_tokens
    get_context().override("dflash_rs.width", speculative_num_draft_tokens=width)
    try:
        yield
    finally:
        get_context().override("dflash_rs.whole_block", speculative_num_draft_tokens=block)


@contextlib.contextmanager
def for_drafter(worker: Any) -> Iterator[None]:
    """What is made within the context is made for the drafter's ranks."""
    if not hasattr(worker, "draft_parallel_layout"):
        yield  # 0.5.17: they are the target's
        return
    from sglang.srt.speculative.spec_utils import draft_pp_context, draft_tp_context

    with draft_pp_context(), draft_tp_context(worker.draft_parallel_layout):
        yield


def own_pass(runner: Any, width: int, drafts_of: Any = None) -> dict[str, Any]:
    """An attention backend for this width, and CUDA graphs if the runner has some; within `sized_for`.

    `drafts_of` is the worker, in this width's shape, if the runner is its drafter's: its graphs draw the drafts, too.
    """
    backend = runner._get_attention_backend(init_new_workspace=True)
    if hasattr(runner, "kv_index_translator"):
        runner.kv_index_translator.bind_and_verify_backends([backend])
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


def tensor_parallel_group() -> Any:
    """The group of ranks that run the same requests."""
    from sglang.srt.distributed import get_tp_group

    return get_tp_group()


def only_whole_blocks(worker: Any, names: tuple[str, ...], asked: bool) -> str | None:
    """Why every step of this worker has to be a whole block, in words; None where the attributes `names` can be exchanged for one.

    `asked`: whether other widths were asked for in so many words.
    """
    import torch
    from sglang.srt.runtime_context import get_parallel

    device = torch.device(worker.device).type
    if device != "cpu" and not asked:
        return f'other widths have not been run on {device}; "adaptive": true in DFLASH_RS_CONFIG tries them'
    args = resolved(worker.server_args)
    if args.enable_two_batch_overlap or args.enable_pdmux:
        return "--enable-two-batch-overlap and --enable-pdmux keep attention backends of their own"
    parallel = get_parallel()
    if getattr(parallel, "attn_dp_enabled", parallel.attn_dp_size > 1):  # 0.5.17 has the size only
        return "ranks with data-parallel attention must keep step, each with requests of its own"
    if getattr(worker, "selector", None) is not None or getattr(worker, "lilicorr", None) is not None:
        return f"{type(worker.draft_model).__name__} selects among candidates within its block"
    if getattr(worker, "_is_domino", False):
        return f"{type(worker.draft_model).__name__} rolls its block out token by token"
    if worker._need_mamba_verify_commit:
        return "the target keeps a state besides its KV, of whole blocks"
    if simulates_acceptance():
        return "SGLANG_SIMULATE_ACC_LEN makes up accept lengths of whole blocks"
    if lacking := [name for name in names if name not in vars(worker)]:
        return f"SGLang's worker has no {', '.join(lacking)}"
    return None


def processors(info: Any) -> list[tuple[Any, list[int]]]:
    """The custom logit processors of a batch, each with the numbers of its requests."""
    return [
        (entry[0], entry[1].nonzero().flatten().tolist()) if isinstance(entry, tuple) else (entry.processor, entry.rows)
        for entry in info.custom_logit_processor.values()
    ]


def no_sampling_mask() -> dict[str, Any]:
    """The fields of the sampling info that have a sampler record what its filters left, empty."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    names = ("sampling_mask_batch_indices", "return_sampling_masks")
    return {name: None for name in names if name in SamplingBatchInfo.__dataclass_fields__}
