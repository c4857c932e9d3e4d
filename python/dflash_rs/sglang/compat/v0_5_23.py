"""SGLang 0.5.23."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from dflash_rs import cuda
from dflash_rs.sglang.compat.seams import Around, Ours, Passed, Seams

# Where it asks which models new weights are for, and where a turn of a streaming session ends.
WEIGHTS_FOR = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager._select_runners"
TURN_ENDS = "sglang.srt.session.streaming_session.StreamingSession.try_cache_finished_req"
# Where it asks which algorithms an adapter can be served with, by their names.
ADAPTERS = "sglang.srt.arg_groups.lora_hook.check_lora_speculative_compatibility"
# Where a prefill server writes down what goes to the decode server beside KV.
HANDED_OVER = "sglang.srt.disaggregation.utils.MetadataBuffers.set_buf"
# What a plain step calls of its worker beside what every version has.
CALLED = ("_draft_write_ids", "_update_target_mamba_state_after_verify")
# Attention backends that read a mask of the whole context, which the custom masks of other algorithms' trees are.
MASKED_BACKENDS = ("TritonAttnBackend", "FlashInferAttnBackend")


class Named:
    """Server arguments as they are seen, with another algorithm's name."""

    def __init__(self, seen: Any, algorithm: str):
        self._seen, self.speculative_algorithm = seen, algorithm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen, name)


class Version(Seams):
    """Its worker has ``_accept_block``, keeps what it needs per request in ``req.kv``, and serves data-parallel attention."""

    lengths_in_kv = True

    def lacking(self) -> list[str]:
        """See ``Seams``."""
        from sglang.srt.speculative import dflash_worker_v2 as module

        found = [f"DFlashWorkerV2.{name}: not there" for name in CALLED if not hasattr(module.DFlashWorkerV2, name)]
        if not hasattr(module, "compute_spec_logprobs"):
            found.append("dflash_worker_v2.compute_spec_logprobs: not there")
        if "nxt_kv_lens_cpu" not in [field.name for field in fields(self.draft_input_class())]:
            found.append("DFlashDraftInputV2.nxt_kv_lens_cpu: not there")
        return found

    def worker_class(self) -> Any:
        """See ``Seams``."""
        from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2

        return DFlashWorkerV2

    def past_the_checks(self, worker: Any, batch: Any) -> None:
        """Nothing was hidden."""

    def refused(self, args: Any) -> str | None:
        """See ``Seams``."""
        if args.enable_pd_role_switch:
            # A prefill server has nothing made that steps need.
            return "--enable-pd-role-switch: got true, expected false with this SGLang"
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
        """New weights are the target's alone, a turn of a session is cached without its last token, adapters are served as with DFLASH: they are
        the target's, and a drafter reads what they make of it; and what a prefill server hands over says that there was a drafter."""

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

        def adapters(original: Any, args: Any) -> Any:
            from sglang.srt.arg_groups import lora_hook as module

            from dflash_rs.sglang import ALGORITHM

            # There is no running server yet that `ours` could be asked about.
            seen = module.resolving_view(args)
            if seen.speculative_algorithm != ALGORITHM:
                return original(args)
            before, module.resolving_view = module.resolving_view, lambda args: Named(seen, "DFLASH")
            try:
                return original(args)
            finally:
                module.resolving_view = before

        def handed_over(original: Any, buffers: Any, req: Any) -> None:
            from dflash_rs.sglang import disaggregation

            original(buffers, req)
            if ours():
                disaggregation.sign(buffers.output_hidden_states[req.metadata_buffer_index])

        return {WEIGHTS_FOR: weights_for, TURN_ENDS: turn_ends, ADAPTERS: adapters, HANDED_OVER: handed_over}

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

    def no_trees(self, worker: Any) -> list[str]:
        """Known of attention over all of the context, in backends that read a mask of the whole of it."""
        import torch
        from sglang.srt.configs.hybrid_arch import mambaish_config
        from sglang.srt.lora.layers import unwrap_lora_layer
        from sglang.srt.runtime_context import get_parallel
        from sglang.srt.speculative.dflash_utils import is_dense_head_weight, resolve_dflash_verify_mask_policy

        runner, found = worker.model_runner, []
        device = torch.device(worker.device)
        if device.type != "cpu" and not cuda.available(device):
            found.append(f"this build of dflash-rs has no kernels for {device}, of which trees need two")
        backend, _ = resolve_dflash_verify_mask_policy(runner.attn_backend)
        if backend not in MASKED_BACKENDS and not getattr(runner.attn_backend, "reads_custom_masks", False):
            found.append(f"--attention-backend: {backend} does not mask a block by tree, triton and flashinfer do")
        if any(getattr(runner.attn_backend, name, False) for name in ("use_verify_splitkv", "use_verify_shared_kv")):
            found.append("the attention backend verifies chains by a kernel of their own, which reads no mask")
        if worker._need_mamba_verify_commit or mambaish_config(runner.model_config) is not None:
            found.append("the target keeps a state beside its KV, which runs over one path")
        window = getattr(runner, "sliding_window_size", None)
        if (window is not None and window > 0) or getattr(runner, "attention_chunk_size", None) is not None:
            found.append("the target attends within windows, which are counted in slots")
        pool = runner.token_to_kv_pool
        buffers = getattr(pool, "k_buffer", None)
        if (
            not isinstance(buffers, list | tuple)
            or buffers[0].ndim != 3
            or any(getattr(pool, name, None) is not None for name in ("k_scale_buffer", "native_k_scale_buffer"))
        ):
            found.append(
                f"a path's K and V cannot be moved in a {type(pool).__name__}, pages in another order or scales beside it"
            )
        if getattr(self.resolved(worker.server_args), "enable_return_routed_experts", False):
            found.append(
                "--enable-return-routed-experts keeps experts by slot, and what a path keeps would move from under them"
            )
        if runner.kv_index_translator.reads_are_translated:
            found.append("KV slots of this server stand for others, and those of the path have to move")
        if get_parallel().attn_dcp_size > 1:
            found.append("--dcp-size: ranks have a part of every context each")
        head = unwrap_lora_layer(worker.target_worker.model_runner.model.lm_head)
        shard = getattr(head, "shard_indices", None)
        if not is_dense_head_weight(getattr(head, "weight", None)):
            found.append("the target's head is quantized")
        elif shard is not None and int(shard.num_added_elements):
            found.append("the target's vocabulary has tokens added by an adapter")
        return found

    @contextlib.contextmanager
    def verifying(self, step: Any) -> Iterator[None]:
        """Its step asks names of its own module for the pass to run and for the tree that a grammar walks along; and one that adjusts logits,
        of which it knows how many a chain has. There is nothing to adjust, see ``sampling.bare``."""
        from sglang.srt.speculative import dflash_worker_v2 as module

        class Verify(module.DFlashVerifyInput):
            """What the target's pass is told."""

            def prepare_for_verify(self, batch: Any, target_worker: Any, **kwargs: Any) -> Any:
                step.verify(self, batch, target_worker.model_runner.req_to_token_pool.req_to_token)
                return super().prepare_for_verify(batch, target_worker, **kwargs)

        class Tree(module.GrammarTree):
            """What a grammar walks along."""

            @classmethod
            def from_linear_chain(cls, verify_ids_2d: Any) -> Any:
                parents = step.tree.parents.masked_fill(~step.tree.real, -1)
                return cls.from_device(parents, parents, step.tree.tokens)

            def resolve(self) -> Any:
                from dflash_rs.sglang.trees import links

                parents, _, tokens = super().resolve()
                return *links(parents), tokens

        ours = {
            "DFlashVerifyInput": Verify,
            "GrammarTree": Tree,
            "apply_dflash_verify_logits_adjustments": lambda **_: None,
        }
        before = {name: getattr(module, name) for name in ours}
        vars(module).update(ours)
        try:
            yield
        finally:
            vars(module).update(before)

    def pass_over(self, worker: Any, batch: Any, tokens: Any, positions: Any, slots: Any) -> Passed:
        """See ``Seams``."""
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
        from sglang.srt.speculative.dflash_info import DFlashVerifyInput

        target, reserved = worker.target_worker, batch.spec_info.nxt_kv_lens_cpu
        plan = target.model_runner.kv_index_translator.plan(
            req_pool_indices=batch.req_pool_indices,
            seq_lens=batch.seq_lens,
            seq_lens_cpu=reserved if batch.seq_lens_cpu is None else batch.seq_lens_cpu,
            write_virtual=slots,
            read_extent=1,
        )
        told = DFlashVerifyInput(
            draft_token=tokens,
            positions=positions,
            draft_token_num=1,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            kv_loc_plan=plan,
        )
        with self.reaching(batch, 1, reserved):
            forward_batch, _ = told.prepare_for_verify(batch, target)
        output = target.forward_batch_generation(
            batch=None, forward_batch=forward_batch, is_verify=True, skip_attn_backend_init=True
        )
        logits, likeliest, gather = output.logits_output, None, worker._target_logits_processor
        if gather is not None and gather.is_deferred_shard(logits.next_token_logits):
            # Every rank has a part of the vocabulary, and none is fetched where the likeliest token is all that is asked for.
            if worker._can_skip_verify_logits(batch, batch.sampling_info):
                likeliest, logits.next_token_logits = gather.deferred_argmax(logits.next_token_logits), None
            else:
                logits.next_token_logits = gather.finish_deferred_gather(logits.next_token_logits)
        return Passed(output, likeliest, worker._draft_write_ids(plan))

    def log_probabilities(self, batch: Any, logits_output: Any, tokens: Any) -> None:
        """See ``Seams``."""
        from sglang.srt.speculative.dflash_worker_v2 import compute_spec_logprobs

        compute_spec_logprobs(batch, logits_output, tokens, chain_stride=1)

    def keep_states(self, worker: Any, batch: Any, before: Any, after: Any, commit_lens: Any) -> None:
        """See ``Seams``."""
        worker._update_target_mamba_state_after_verify(
            batch=batch, seq_lens_pre_verify=before, seq_lens_post_verify=after, commit_lens=commit_lens
        )

    def mask_room(self, backend: Any) -> int | None:
        """Triton's keeps one for the largest batch of whole contexts."""
        mask = getattr(backend, "_verify_mask", None)
        return None if mask is None else int(mask.buffer.numel())

    def lattice(self, worker: Any, hidden: Any, anchors: Any, lm_head: Any) -> tuple[Any, Any]:
        """See ``Seams``."""
        model = worker.draft_model
        if model.lm_head is None:
            model.lm_head = lm_head
        places = hidden.view(len(anchors), -1, hidden.shape[-1])[:, 1:]
        tokens, unary = model.compute_candidates(places.reshape(-1, hidden.shape[-1]))
        tokens = tokens.view(*places.shape[:2], -1)
        return tokens, model.candidate_selector.build_lattice(
            candidate_ids=tokens,
            unary_logits=unary.view_as(tokens),
            hidden_states=places,
            anchor_token_ids=anchors,
        )

    def best_path(self, worker: Any, tokens: Any, scores: Any) -> Any:
        """See ``Seams``."""
        rows, places = tokens.shape[:2]
        path, _ = worker.selector.sample_path(
            candidate_ids=tokens,
            scores=scores,
            uniforms=scores.new_zeros(rows, places),
            temperatures=scores.new_ones(rows),
            greedy_mask=scores.new_ones(rows).bool(),
        )
        return path.view(rows, places)

    @contextlib.contextmanager
    def masks_captured(self) -> Iterator[None]:
        """Its capture asks by the backend's name whether there is a mask."""
        from sglang.srt.speculative import dflash_utils as module

        asked = module.resolve_dflash_verify_mask_policy
        module.resolve_dflash_verify_mask_policy = lambda backend: (asked(backend)[0], True)
        try:
            yield
        finally:
            module.resolve_dflash_verify_mask_policy = asked

    def processors(self, info: Any) -> list[tuple[Any, list[int]]]:
        """See ``Seams``."""
        return [(entry.processor, entry.rows) for entry in info.custom_logit_processor.values()]

    def no_sampling_mask(self) -> dict[str, Any]:
        """See ``Seams``."""
        return {"sampling_mask_batch_indices": None, "return_sampling_masks": None}

    def shares_pages(self, worker: Any) -> bool:
        """A hierarchical cache, and what else is planned for like one, copies them away; a prefill server writes to those that have been given back."""
        return bool(worker.hicache_draft_plan.device_pools) or worker.server_args.disaggregation_mode != "null"

    def most_top_logprobs(self) -> int | None:
        """What a prefill server has room for beside a request's first token; more would end it."""
        import inspect

        from sglang.srt.disaggregation.utils import MetadataBuffers
        from sglang.srt.runtime_context import get_disagg

        if get_disagg().disaggregation_mode == "null":
            return None
        return int(inspect.signature(MetadataBuffers).parameters["max_top_logprobs_num"].default)

    def follow_all_drafts(self, worker: Any) -> None:
        """See ``Seams``."""
        worker._selector_sampling_enabled = False
