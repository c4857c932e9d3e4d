"""A step that drafts nothing: the target's pass over one token of every request, and the worker's own rules for what comes of it.

SGLang's step always prepares a block for its drafter. Where none is drafted, what is left of a step is::

    the token of every request, its position, its slot
    the target's pass                                    Seams.pass_over
    grammar mask                                         SGLang's, behind its barrier
    the target's own tokens                              DflashRsWorker._accept_block
    log-probabilities, recurrent states                  Seams.log_probabilities, Seams.keep_states
    publish
    what the pass has left for the drafter               deferred.Deferred, or written at once
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask

from dflash_rs.sglang import compat


def step(
    worker: Any, batch: Any, on_publish: Any = None, grammar_barrier: Any = None, pp_proxy_tensors: Any = None
) -> Any:
    """One step of `worker`, which has the shape of width 1. Arguments and result are those of SGLang's worker; there are no proxy tensors, which
    belong to pipelines."""
    seams, rows = compat.installed(), len(batch.seq_lens)
    # They come from the step before, which may have run on another stream.
    batch.seq_lens.record_stream(torch.get_device_module(worker.device).current_stream())
    told, lengths = batch.spec_info, batch.seq_lens
    tokens = told.bonus_tokens.view(-1)
    # A copy: what is published for the next step is not what this pass reads.
    positions = lengths.to(torch.int64, copy=True)
    table = worker.model_runner.req_to_token_pool.req_to_token
    slots = table[batch.req_pool_indices.to(torch.int64), positions].to(torch.int64)
    # On its way to the host before the target's pass is launched.
    grammar = GrammarTree.from_linear_chain(tokens[:, None]) if batch.has_grammar else None

    batch.out_cache_loc = slots
    done = seams.pass_over(worker, batch, tokens, positions, slots)
    logits = done.output.logits_output
    if grammar is not None:
        mask = build_grammar_vocab_mask(
            reqs=batch.reqs,
            tree=grammar,
            sampling_info=batch.sampling_info,
            device=logits.next_token_logits.device,
            barrier=grammar_barrier,
        )
        if mask is not None:
            mask.apply(logits.next_token_logits)
    _, commit_lens, bonus, gained, new_lengths = worker._accept_block(
        candidates=tokens[:, None],
        next_token_logits=logits.next_token_logits,
        sampling_info=batch.sampling_info,
        draft_input=told,
        prefix_lens=lengths,
        bs=rows,
        target_predict=done.likeliest,
    )
    if new_lengths is None:
        new_lengths = lengths + 1
    if batch.return_logprob:
        seams.log_probabilities(batch, logits, gained.reshape(-1))
    if worker._need_mamba_verify_commit:
        seams.keep_states(worker, batch, lengths, new_lengths, commit_lens)
    if on_publish is not None:
        on_publish(new_lengths)

    # In this step: the next pass of the target writes to the same memory.
    worker._append_target_hidden_to_draft_kv_by_loc(
        target_hidden=logits.hidden_states.view(rows, -1),
        cache_loc=done.slots,
        cache_loc_2d=done.slots.view(rows, 1),
        positions=positions,
        commit_lens=commit_lens,
    )
    # With overlap scheduling what is left here is copied to the host.
    logits.hidden_states = None
    return GenerationBatchResult(
        logits_output=logits,
        next_token_ids=gained.reshape(-1),
        accept_lens=commit_lens,
        can_run_cuda_graph=done.output.can_run_cuda_graph,
        next_draft_input=worker._make_next_draft_input_decode(bonus_tokens=bonus, new_seq_lens=new_lengths),
        speculative_num_draft_tokens=1,
        new_seq_lens=new_lengths,
        routed_experts_output=done.output.routed_experts_output,
        indexer_topk_output=done.output.indexer_topk_output,
    )
