"""The packed training pass: many blocks per sequence at once, differentiable (DFlash, arXiv 2602.06036, section 4.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import DraftConfig
from .model import DFlashDraft


def training_hidden(
    draft: DFlashDraft,
    feats: Tensor,
    tokens: Tensor,
    anchor_idx: Tensor,
    block_size: int,
    document: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """Hidden states of many blocks per sequence in one differentiable pass.

    feats [b, S, K*H] float: target features of every position. tokens [b, S] int64. anchor_idx [b, A] int64 in
    0..S-1: the index (= position) of each block's real anchor; any order, repeats allowed. Returns
    [b, A, B, H], normalised and ready for lm_head; row i of a block predicts the token at anchor + i.

    Where a row holds several documents behind each other, `document` [b, S] int64 numbers them and `position` [b, S] int64 counts from the
    beginning of each: a block then sees its own document only.

    A query of block a sees the context strictly before anchor a and its own block, nothing else; the block part is
    bidirectional unless the layer is causal (section 4.2 of the paper). Blocks may reach past S: positions continue.
    Runs under autocast with float32 weights; softmax and norms stay float32.
    """
    batch, length, _ = feats.shape
    anchors = anchor_idx.shape[1]
    c = draft.config
    device = feats.device
    offsets = torch.arange(block_size, device=device)
    if position is None:
        position = torch.arange(length, device=device)
        block_positions = anchor_idx[..., None] + offsets  # [b, A, B]
    else:
        block_positions = position.gather(1, anchor_idx)[..., None] + offsets
    # Context that a block does not see: from its anchor on, and other documents. [b, A, S]
    unseen = torch.arange(length, device=device) >= anchor_idx[..., None]
    if document is not None:
        unseen = unseen | (document[:, None, :] != document.gather(1, anchor_idx)[..., None])

    block_tokens = torch.full((batch, anchors, block_size), c.mask_token_id, dtype=torch.int64, device=device)
    block_tokens[..., 0] = tokens.gather(1, anchor_idx)
    # The target may be kept in fewer bits; what the drafter adds up is kept in its own.
    hidden = draft.embed(block_tokens).view(batch, anchors * block_size, c.hidden_size).to(draft.fc.weight.dtype)
    context = draft.project_features(feats)

    dtype = torch.promote_types(hidden.dtype, torch.float32)
    cos_block, sin_block = draft.cos_sin(block_positions.view(batch, -1), dtype)
    cos_context, sin_context = draft.cos_sin(position, dtype)

    for index, layer in enumerate(draft.layers):
        attention = layer.self_attn
        normed, kept = layer.open(hidden, block_size)
        q = attention.query(normed, cos_block, sin_block)
        k_block, v_block = attention.key_value(normed, cos_block, sin_block)
        k_context, v_context = attention.key_value(context, cos_context, sin_context)
        attended = _packed_attention(
            c, index, q, k_context, v_context, k_block, v_block, anchor_idx, unseen, block_size
        )
        hidden = layer.close(hidden, attended, kept, block_size)
    return draft.norm(hidden).view(batch, anchors, block_size, c.hidden_size)


def _packed_attention(
    c: DraftConfig, index, q, k_context, v_context, k_block, v_block, anchor_idx, unseen, block_size
) -> Tensor:
    """Attention of [b, A*B] queries over their context prefix and own block -> [b, A*B, heads*head_dim].

    Keys of other blocks are never scored: the context part is one [A*B, S] product and the block part A small
    [B, B] products, joined under one softmax. That is S + B columns per query instead of S + A*B.
    """
    batch, length = k_context.shape[:2]
    anchors = anchor_idx.shape[1]
    kv, dim = c.num_key_value_heads, c.head_dim
    group = c.num_attention_heads // kv
    scale = dim**-0.5

    # [b, kv, A, B, g, d]: the query heads that share a key head become extra rows of the same product.
    q = (q * scale).view(batch, anchors, block_size, kv, group, dim).permute(0, 3, 1, 2, 4, 5)
    rows = anchors * block_size * group
    scores_context = q.reshape(batch, kv, rows, dim) @ k_context.permute(0, 2, 3, 1)
    blocks = (batch, anchors, block_size, kv, dim)
    k_own = k_block.view(blocks).permute(0, 3, 1, 4, 2)  # [b, kv, A, d, B]
    v_own = v_block.view(blocks).permute(0, 3, 1, 2, 4)  # [b, kv, A, B, d]
    scores_own = q.reshape(batch, kv, anchors, block_size * group, dim) @ k_own

    causal, window = c.layer_causal[index], c.layer_window[index]
    column = torch.arange(length, device=q.device)  # [S]
    if window is None:
        hidden_context = unseen.view(batch, 1, anchors, 1, length)
    else:
        # Within a document places differ as positions do.
        place = anchor_idx[..., None] + torch.arange(block_size, device=q.device)  # [b, A, B]
        hidden_context = unseen[:, :, None, :] | (place[..., None] - column >= window)
        hidden_context = hidden_context.repeat_interleave(group, dim=2).view(batch, 1, anchors, -1, length)
    scores_context = scores_context.view(batch, kv, anchors, block_size * group, length)
    scores_context = scores_context.masked_fill(hidden_context, -math.inf)
    visible_own = block_mask(block_size, causal, window, q.device)
    if visible_own is not None:
        scores_own = scores_own.masked_fill(~visible_own.repeat_interleave(group, dim=0), -math.inf)

    weights = torch.cat((scores_context, scores_own), dim=-1).softmax(dim=-1, dtype=torch.float32)
    w_context, w_own = weights.to(v_context.dtype).split((length, block_size), dim=-1)
    own = w_own @ v_own  # [b, kv, A, B*g, d]
    out = w_context.reshape(batch, kv, rows, length) @ v_context.permute(0, 2, 1, 3)
    out = out.view(own.shape) + own
    out = out.view(batch, kv, anchors, block_size, group, dim).permute(0, 2, 3, 1, 4, 5)
    return out.reshape(batch, anchors * block_size, kv * group * dim)


def block_mask(block_size: int, causal: bool, window: int | None, device) -> Tensor | None:
    """Which block keys a block query sees, bool [B, B]; None when it sees all of them.

    A causal layer looks back only; a window covers positions with distance < window, on both sides when the layer is
    not causal.
    """
    if not causal and window is None:
        return None
    distance = torch.arange(block_size, device=device)[:, None] - torch.arange(block_size, device=device)[None, :]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance < window
        if not causal:
            visible &= -distance < window
    return visible
