"""SGLang 0.5.23."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from dflash_rs.sglang.compat.seams import Around, Ours, Seams

# Where it asks which models new weights are for, and where a turn of a streaming session ends.
WEIGHTS_FOR = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager._select_runners"
TURN_ENDS = "sglang.srt.session.streaming_session.StreamingSession.try_cache_finished_req"


class Version(Seams):
    """Its worker has ``_accept_block``, keeps what it needs per request in ``req.kv``, and serves data-parallel attention."""

    lengths_in_kv = True

    def lacking(self) -> list[str]:
        """See ``Seams``."""
        if "nxt_kv_lens_cpu" in [field.name for field in fields(self.draft_input_class())]:
            return []
        return ["DFlashDraftInputV2.nxt_kv_lens_cpu: not there"]

    def worker_class(self) -> Any:
        """See ``Seams``."""
        from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2

        return DFlashWorkerV2

    def past_the_checks(self, worker: Any, batch: Any) -> None:
        """Nothing was hidden."""

    def refused(self, args: Any) -> str | None:
        """See ``Seams``."""
        if args.attn_dp_size == 1:
            return None
        if not args.enable_dp_lm_head:
            # The drafter borrows the target's head, which it has to find whole within its own ranks.
            return f"--enable-dp-lm-head: not given, expected with --attn-dp-size {args.attn_dp_size}"
        if args.attn_cp_size != 1:
            return f"--attn-cp-size: got {args.attn_cp_size}, expected 1 with --attn-dp-size {args.attn_dp_size}"
        return None

    def resolved(self, args: Any) -> Any:
        """See ``Seams``."""
        from sglang.srt.arg_groups.overrides import resolving_view

        return resolving_view(args)

    def prepared(self, req: Any) -> Any:
        """As it came."""
        return req

    def more_hooks(self, ours: Ours) -> dict[str, Around]:
        """New weights are the target's alone, and a turn of a session is cached without its last token."""

        def weights_for(original: Any, manager: Any, selector: str = "all") -> Any:
            # The target's weights and the drafter's have the same names: loaded into both, they would leave no drafter.
            return original(manager, "target" if selector == "all" and ours() else selector)

        def turn_ends(original: Any, session: Any, req: Any) -> Any:
            kept = original(session, req)
            if kept and ours():
                # The last token may be one that no pass has had as its input yet: its KV is missing, or a rejected draft's.
                kv = session.slots[req.session.session_id].kv
                kv.kv_committed_len = min(kv.kv_committed_len, len(req.origin_input_ids) + len(req.output_ids) - 1)
            return kept

        return {WEIGHTS_FOR: weights_for, TURN_ENDS: turn_ends}

    def block_and_page(self, *args: Any) -> tuple[int, int]:
        """From the running server: nothing is handed around."""
        from sglang.srt.runtime_context import get_schedule, get_spec

        return int(get_spec().speculative_num_draft_tokens), int(get_schedule().page_size)

    def data_parallel_rank_of(self, worker: Any) -> int | None:
        """See ``Seams``."""
        from sglang.srt.runtime_context import get_parallel

        return get_parallel().dp_rank

    def shares_attention(self) -> bool:
        """See ``Seams``."""
        from sglang.srt.runtime_context import get_parallel

        return bool(get_parallel().attn_dp_enabled)

    def same_on_all_ranks(self, worker: Any, tokens: Any, drawn: bool) -> Any:
        """See ``Seams``."""
        from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

        site = SpecTpSyncSite.DFLASH_ACCEPT_SAMPLE if drawn else SpecTpSyncSite.DFLASH_ACCEPT_GREEDY
        return worker._tp_sync.sync(site, tokens.contiguous())

    @contextlib.contextmanager
    def for_drafter(self, worker: Any) -> Iterator[None]:
        """See ``Seams``."""
        from sglang.srt.speculative.spec_utils import draft_pp_context, draft_tp_context

        with draft_pp_context(), draft_tp_context(worker.draft_parallel_layout):
            yield

    def new_backend(self, runner: Any) -> Any:
        """See ``Seams``."""
        backend = runner._get_attention_backend(init_new_workspace=True)
        runner.kv_index_translator.bind_and_verify_backends([backend])
        return backend

    def states_of_whole_blocks(self, worker: Any) -> str | None:
        """Known of GatedDeltaNet in SGLang's Triton kernels, which write down the state after each token."""
        runner = worker.model_runner
        layers = getattr(runner.attn_backend, "linear_attn_backend", None)
        kernel = getattr(getattr(layers, "kernel_dispatcher", None), "verify_kernel", None)
        names = type(layers).__name__, type(kernel).__name__
        if names != ("GDNAttnBackend", "TritonGDNKernel"):
            return f"other widths have not been tried with the target's recurrent layers, {' with '.join(names)}"
        if (device := str(worker.device).partition(":")[0]) not in ("cpu", "cuda"):
            return f"other widths have not been tried with the target's recurrent layers on {device}"
        if runner.req_to_token_pool.mamba_pool.mamba_cache.intermediate_ssm is None:
            return "--enable-linear-replayssm-spec keeps what whole blocks were fed with"
        return None

    def processors(self, info: Any) -> list[tuple[Any, list[int]]]:
        """See ``Seams``."""
        return [(entry.processor, entry.rows) for entry in info.custom_logit_processor.values()]

    def no_sampling_mask(self) -> dict[str, Any]:
        """See ``Seams``."""
        return {"sampling_mask_batch_indices": None, "return_sampling_masks": None}

    def copies_pages_away(self, worker: Any) -> bool:
        """A hierarchical cache, and what else is planned for like one."""
        return bool(worker.hicache_draft_plan.device_pools)

    def follow_all_drafts(self, worker: Any) -> None:
        """See ``Seams``."""
        worker._selector_sampling_enabled = False
