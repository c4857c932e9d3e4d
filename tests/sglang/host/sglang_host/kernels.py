"""Torch forms of what SGLang has as Triton kernels only."""

import torch


def block_slots(*, req_pool_indices, req_to_token, start_offset, end_offset, batch_size, draft_token_num, device):
    """KV slots of each request's block."""
    positions = start_offset.to(torch.int64)[:, None] + torch.arange(draft_token_num, device=device)
    return req_to_token[req_pool_indices.to(torch.int64)[:, None], positions].reshape(-1).to(torch.int64)


def assign_req_to_token_pool(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, batch_size):
    """Writes new slots behind each request's old ones."""
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist()):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def get_last_loc(req_to_token, req_pool_indices, prefix_lens):
    """Slot of the last token of each prefix, -1 for an empty one (page size above 1)."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(req_to_token, req_pool_indices, prefix_lens)


def transfer(*, src_layers, dst_layers, src_indices, dst_indices, page_size):
    """Copies KV slots, from the pool to the cache behind it or back."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def all_gather_into_tensor(self, output, input):
    """Tensor parallelism over gloo."""
    torch.distributed.all_gather_into_tensor(output, input.contiguous(), group=self.device_group)


def drafter_attention(original, self, *args, **kwargs):
    """In bfloat16 it would normalise and rotate with a Triton kernel; in other types it does so with torch."""
    self.use_table_qk_norm_rope = False
    return original(self, *args, **kwargs)


def drafter_forward(original, self, input_ids, positions, forward_batch, input_embeds=None, *args, **kwargs):
    """Undoes the cast of input embeddings to bfloat16, for drafters in float32."""
    if input_embeds is not None:
        input_embeds = input_embeds.to(next(self.parameters()).dtype)
    return original(self, input_ids, positions, forward_batch, input_embeds, *args, **kwargs)


def penalties_in_order(self, logits, repeat=None):
    """Additive penalties first, as SGLang applies them with overlap scheduling. Without it, it goes through a set, whose order
    changes from process to process: (l - a) / r or l / r - a."""
    for penalizer in sorted(self.penalizers.values(), key=lambda penalizer: penalizer.is_multiplicative):
        penalizer.apply(logits)


def no_batch_invariant_kernels(self):
    """They are GPU kernels; what deterministic inference is wanted for here is seeded sampling."""


def murmur_hash32(seed, positions, col_indices):
    """MurmurHash3, 32 bit, of (seed low, seed high, position, column): seed u64 [n], positions [n], columns [m] -> u32 [n, m]."""
    bits = 0xFFFFFFFF

    def mix(state, word):
        word = (word * 0xCC9E2D51) & bits
        word = ((word << 15) | (word >> 17)) & bits
        state = state ^ ((word * 0x1B873593) & bits)
        state = ((state << 13) | (state >> 19)) & bits
        return (state * 5 + 0xE6546B64) & bits

    seed = seed.view(torch.int64)
    state = mix(torch.zeros_like(seed), seed & bits)
    state = mix(state, (seed >> 32) & bits)
    state = mix(state, positions.to(torch.int64) & bits)
    state = mix(state[:, None], col_indices.to(torch.int64)[None, :] & bits) ^ 16
    state = state ^ (state >> 16)
    state = (state * 0x85EBCA6B) & bits
    state = state ^ (state >> 13)
    state = (state * 0xC2B2AE35) & bits
    return (state ^ (state >> 16)).to(torch.uint32)
