"""SGLang 0.5.17, the oldest that is served."""

from __future__ import annotations

import contextlib
import copy
from functools import cache
from typing import Any

from dflash_rs.sglang.compat.seams import Around, Ours, Passed, Seams


class Version(Seams):
    """Its worker accepts in the middle of a step and computes no log-probabilities, and its requests have no ``kv``."""

    lengths_in_kv = False

    def lacking(self) -> list[str]:
        """See ``Seams``."""
        from sglang.srt.speculative import dflash_worker_v2 as module

        found = [f"dflash_worker_v2.{name}: not there" for name in REPLACED if not hasattr(module, name)]
        if hasattr(module.DFlashWorkerV2, "_accept_block"):
            found.append("DFlashWorkerV2._accept_block: there, where 0.5.17 has none")
        return found

    def worker_class(self) -> Any:
        """See ``Seams``."""
        from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2

        return _with_accept_block(DFlashWorkerV2)

    def past_the_checks(self, worker: Any, batch: Any) -> None:
        """Its worker was not to see that log-probabilities are wanted."""
        batch.return_logprob = worker._return_logprob

    def refused(self, args: Any) -> str | None:
        """See ``Seams``."""
        if args.enable_dp_attention:
            # Its DFLASH worker does not keep step with idle ranks.
            return "--enable-dp-attention: got true, expected false with this SGLang"
        if args.disaggregation_mode != "null":
            # The tests have not seen it there.
            return f"--disaggregation-mode: got {args.disaggregation_mode}, expected null with this SGLang"
        if args.enable_streaming_session:
            # It counts the last token of a turn as cached before any pass has had it as its input.
            return "--enable-streaming-session: got true, expected false with this SGLang"
        return None

    def resolved(self, args: Any) -> Any:
        """Server arguments fill themselves in."""
        return args

    def prepared(self, req: Any) -> Any:
        """Without log-probabilities: it would refuse the request because its own worker computes none."""
        req = copy.copy(req)
        req.return_logprob = False
        return req

    def more_hooks(self, ours: Ours) -> dict[str, Around]:
        """None: its worker is asked itself about new weights, and streaming sessions are refused."""
        return {}

    def block_and_page(self, *args: Any) -> tuple[int, int]:
        """From the server arguments, which are handed around."""
        (server_args,) = args
        return int(server_args.speculative_num_draft_tokens), int(server_args.page_size)

    def data_parallel_rank_of(self, worker: Any) -> int | None:
        """See ``Seams``."""
        return worker.ps.dp_rank

    def shares_attention(self) -> bool:
        """See ``Seams``."""
        from sglang.srt.runtime_context import get_parallel

        return get_parallel().attn_dp_size > 1

    def drafter_group(self) -> Any:
        """The drafter's ranks are the target's."""
        return self.tensor_parallel_group()

    def same_on_all_ranks(self, worker: Any, tokens: Any, drawn: bool) -> Any:
        """It has no such setting."""
        return tokens

    def for_drafter(self, worker: Any) -> contextlib.AbstractContextManager[None]:
        """The drafter's ranks are the target's."""
        return contextlib.nullcontext()

    def new_backend(self, runner: Any) -> Any:
        """See ``Seams``."""
        return runner._get_attention_backend(init_new_workspace=True)

    def states_of_whole_blocks(self, worker: Any) -> str | None:
        """The tests have seen others in later versions only."""
        return "the target keeps a state beside its KV, of whole blocks with this SGLang"

    def no_trees(self, worker: Any) -> list[str]:
        """Its step cannot be told of another pass than that of the chain."""
        return ["trees are served with sglang 0.5.23, not with this one"]

    def verifying(self, step: Any) -> contextlib.AbstractContextManager[None]:
        """Never: see `no_trees`."""
        raise NotImplementedError

    def pass_over(self, worker: Any, batch: Any, tokens: Any, positions: Any, slots: Any) -> Passed:
        """See ``Seams``."""
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
        from sglang.srt.speculative.dflash_info import DFlashVerifyInput

        target, told = worker.target_worker, batch.spec_info
        verified = DFlashVerifyInput(
            draft_token=tokens, positions=positions, draft_token_num=1, capture_hidden_mode=CaptureHiddenMode.FULL
        )
        with self.reaching(batch, 1, told.reserved_seq_lens_cpu):
            forward_batch, _ = verified.prepare_for_verify(batch, target)
        output = target.forward_batch_generation(
            batch=None, forward_batch=forward_batch, is_verify=True, skip_attn_backend_init=True
        )
        return Passed(output, None, slots)

    def log_probabilities(self, batch: Any, logits_output: Any, tokens: Any) -> None:
        """See ``Seams``."""
        _log_probabilities(batch, logits_output, tokens, 1)

    def keep_states(self, worker: Any, batch: Any, before: Any, after: Any, commit_lens: Any) -> None:
        """Never: see `states_of_whole_blocks`."""
        raise NotImplementedError

    def mask_room(self, backend: Any) -> int | None:
        """Never: see `no_trees`."""
        raise NotImplementedError

    def lattice(self, worker: Any, hidden: Any, anchors: Any, lm_head: Any) -> tuple[Any, Any]:
        """Never: see `no_trees`."""
        raise NotImplementedError

    def best_path(self, worker: Any, tokens: Any, scores: Any) -> Any:
        """Never: none of its drafters selects."""
        raise NotImplementedError

    def masks_captured(self) -> contextlib.AbstractContextManager[None]:
        """Never: see `no_trees`."""
        raise NotImplementedError

    def processors(self, info: Any) -> list[tuple[Any, list[int]]]:
        """See ``Seams``."""
        return [
            (processor, chosen.nonzero().flatten().tolist())
            for processor, chosen in info.custom_logit_processor.values()
        ]

    def no_sampling_mask(self) -> dict[str, Any]:
        """See ``Seams``."""
        return {"return_sampling_masks": None}

    def shares_pages(self, worker: Any) -> bool:
        """See ``Seams``."""
        return bool(worker.server_args.enable_hierarchical_cache)

    def follow_all_drafts(self, worker: Any) -> None:
        """None of its drafters samples."""


# Functions that `_with_accept_block` replaces.
REPLACED = (
    "apply_dflash_verify_logits_adjustments",
    "compute_dflash_correct_drafts_and_bonus",
    "is_dflash_sampling_verify_available",
)


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
                _log_probabilities(
                    batch, result.logits_output, result.next_token_ids, result.speculative_num_draft_tokens
                )
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


def _log_probabilities(batch: Any, logits_output: Any, tokens: Any, block: int) -> None:
    """Log-probabilities of every token of a verified block, in 0.5.17; those behind the last accepted one are never read."""
    from sglang.srt.layers.logprob_processor import compute_spec_v2_logprobs

    rows = tokens.new_ones(tokens.shape).cumsum(0) - 1
    compute_spec_v2_logprobs(batch, logits_output, tokens, rows.view(-1, block), block - 1)
