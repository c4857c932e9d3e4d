"""KV room for the next step: what SGLang's own draft input does with Python loops, in one crossing to the core.

With ``C`` tokens committed as far as the host knows and at most one step unresolved, the device is at ``C <= S <= C + B`` and the
next step writes ``[S, S + B)``: a request needs ``C + 2 * B`` slots, rounded up to pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dflash_rs import serving
from dflash_rs.sglang import compat


class DraftInput(compat.installed().draft_input_class()):  # type: ignore[misc]  # SGLang's, known when it runs
    """What a step hands to the next one, and the room it makes for it."""

    # Requests whose first step this is and that were not prefilled here: a prefill server has, or they come back from a retraction with their KV.
    arrived: Sequence[Any] = ()

    def merge_batch(self, spec_info: Any) -> None:
        """As SGLang's, with those of both that have arrived."""
        super().merge_batch(spec_info)
        self.arrived = [*self.arrived, *spec_info.arrived]

    def prepare_for_decode(self, batch: Any) -> None:
        """Reserves KV for the next block of every request; leaves SGLang's batch as its own draft input would."""
        if not compat.installed().lengths_in_kv:
            super().prepare_for_decode(batch)
            return
        from sglang.srt.mem_cache.allocation import alloc_for_spec_decode
        from sglang.srt.runtime_context import get_spec

        rows = batch.batch_size()
        if rows == 0:
            return
        batch.maybe_evict_swa()
        pinned = torch.device(batch.device).type == "cuda"
        committed = torch.empty(rows, dtype=torch.int64)
        owned = torch.empty(rows, dtype=torch.int32, pin_memory=pinned)
        wanted = torch.empty(rows, dtype=torch.int32, pin_memory=pinned)
        block = int(get_spec().speculative_num_draft_tokens)
        page = batch.token_to_kv_pool_allocator.page_size
        missing, committed_sum, wanted_sum = serving.plan_decode(
            batch.reqs, 2 * block, page, committed.numpy(), owned.numpy(), wanted.numpy()
        )
        if missing:
            alloc_for_spec_decode(
                batch.tree_cache,
                batch.req_to_token_pool,
                reqs=batch.reqs,
                req_pool_indices=batch.req_pool_indices,
                cur_kv_lens=owned.to(batch.device, non_blocking=True),
                cur_kv_lens_cpu=owned,
                nxt_kv_lens=wanted.to(batch.device, non_blocking=True),
                nxt_kv_lens_cpu=wanted,
                num_needed_tokens=missing,
                batch=batch,
            )
        for req in batch.reqs:
            req.decode_batch_idx += 1
        # The host's view; with overlap scheduling the published lengths replace it before the step runs.
        batch.seq_lens_cpu = committed
        batch.seq_lens_sum = committed_sum
        self.nxt_kv_lens_cpu = wanted
        self.nxt_kv_lens_sum = wanted_sum


def arrived(theirs: Any, reqs: Sequence[Any]) -> DraftInput:
    """The first step's input of `reqs`, which arrive with their KV; `theirs` is what SGLang has made of them."""
    mine = draft_input(theirs.bonus_tokens, theirs.new_seq_lens)
    mine.future_indices = theirs.future_indices
    mine.arrived = list(reqs)
    return mine


def draft_input(bonus: torch.Tensor, new_seq_lens: torch.Tensor) -> DraftInput:
    """The next step's input: its anchors i64 ``[R]`` and their positions ``[R]``."""
    rows, device = int(new_seq_lens.numel()), bonus.device
    return DraftInput(
        topk_p=torch.empty((rows, 0), device=device, dtype=torch.float32),
        topk_index=torch.empty((rows, 0), device=device, dtype=torch.int64),
        bonus_tokens=bonus.to(torch.int64),
        new_seq_lens=new_seq_lens.to(torch.int64),
        hidden_states=torch.empty((rows, 0), device=device, dtype=torch.float16),
    )
