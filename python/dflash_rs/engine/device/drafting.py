"""What drafts inside a step on the device: the drafter's pass over blocks, and the chains or trees that are made of it.

    anchors ──> blocks of anchor and masks ──> drafter ──> logits ──┬─> likeliest, or drawn by the target's numbers ──> chains
                                                                    └─> likeliest few of each place ──────────────────> trees

A drafter's token is drawn as the target's will be: by the kernel that draws the target's, for the position at which the token would stand, with the
seed of its request. Where both models say the same, so does the draw (`src/draft/coupled.rs`). Nothing here asks the host for a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ... import cuda
from ...attention import CudaAttention
from ...models.drafter import DeviceDrafter


class Blocks(NamedTuple):
    """The drafter's pass over n blocks of B tokens: where they start int32 [n + 1], anchors int64 [n], positions of their tokens int64 [n * B], tokens
    likewise; of the places behind the anchors hidden states [n, B - 1, H] and logits [n, B - 1, V]."""

    starts: Tensor
    anchors: Tensor
    token_ids: Tensor
    positions: Tensor
    hidden: Tensor
    logits: Tensor


def run(
    draft: DeviceDrafter,
    inputs: Mapping[str, Tensor],
    requests: int,
    block: int,
    page_size: int,
    limit: int,
    max_keys: int,
) -> Blocks:
    """The pass for the first `requests` of the step's drafting rows, padding included; `inputs` are the step's."""
    device, rows = inputs["draft_rows"].device, inputs["draft_rows"][:requests]
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device) * block
    lens, anchors = (inputs[name].index_select(0, rows) for name in ("context_lens", "anchors"))
    table = cuda.PageTable(inputs["pages"], rows, page_size)
    token_ids, positions = (torch.empty(requests * block, dtype=torch.int64, device=device) for _ in range(2))
    cuda.prepare_block(
        query_starts=starts, context_lens=lens, anchors=anchors, table=table,
        token_ids=token_ids, positions=positions, mask_token=draft.mask_token_id,
    )  # fmt: skip
    attention = CudaAttention(
        query_starts=starts,
        context_lens=lens,
        table=table,
        max_block_len=block,
        max_keys=max_keys,
        valid_from=inputs["valid_from"].index_select(0, rows),
    )
    return Blocks(starts, anchors, token_ids, positions, *draft.block(token_ids, positions, limit, attention, block))


def chains(draft: DeviceDrafter, blocks: Blocks, sampling: Tensor | None) -> Tensor:
    """Drafts int64 [n, B - 1]: by `sampling` uint8 [n, SAMPLING_ROW_BYTES], which says how those of each block are drawn; the likeliest where it is
    None."""
    if sampling is None:
        return draft.choose(blocks.hidden, blocks.logits, blocks.anchors)
    return draft.choose(blocks.hidden, blocks.logits, blocks.anchors, lambda logits: _draw(blocks, sampling, logits))


def _draw(blocks: Blocks, sampling: Tensor, logits: Tensor) -> Tensor:
    """Tokens int64 [n, B - 1] of logits [n, B - 1, V] over the target's vocabulary."""
    (n, places, vocab), device = logits.shape, logits.device
    # The place behind a token is drawn as the token behind it.
    packed = torch.arange(blocks.token_ids.shape[0], dtype=torch.int32, device=device)
    counts, values = (torch.empty(0, dtype=dtype, device=device) for dtype in (torch.int32, torch.float32))
    drawn = cuda.sample_rows(
        logits.reshape(-1, vocab),
        cuda.SamplingRows(sampling, counts, counts, counts, values, filters=False),
        query_starts=blocks.starts,
        token_ids=blocks.token_ids,
        positions=blocks.positions,
        row_tokens=packed.view(n, places + 1)[:, :places].contiguous().view(-1),
    )
    # Logits that are no numbers have no token; any is as good then, and it has to be one.
    return drawn.tokens.clamp_min_(0).view(n, places)


def trees(draft: DeviceDrafter, blocks: Blocks, nodes: int) -> cuda.Trees:
    """The likeliest trees of `nodes` nodes each, the anchor counted."""
    return cuda.tree_build(blocks.anchors, *draft.branch(blocks.hidden, blocks.logits, blocks.anchors), nodes - 1)
