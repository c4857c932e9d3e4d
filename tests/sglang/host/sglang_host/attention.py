"""SGLang's own torch attention, and the verification of a block, which it lacks.

One request at a time, every query row of a block against the same keys: a row's numbers do not depend on the batch.
"""

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_spec
from torch.nn.functional import scaled_dot_product_attention


class HostAttention(TorchNativeAttnBackend):
    """Causal blocks for the target, bidirectional ones for a drafter's encoder-only layers.

    Like SGLang's backends for GPUs it is made for one block length and serves no other, and reads custom masks.
    """

    reads_custom_masks = True

    def __init__(self, model_runner):
        super().__init__(model_runner)
        self.block = get_spec().speculative_num_draft_tokens

    def get_cuda_graph_seq_len_fill_value(self):
        """Length of the rows that pad a batch to its neighbours' size, under data-parallel attention."""
        return 1

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if not forward_batch.forward_mode.is_target_verify():
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache and k is not None:
            where = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)
        block = int(forward_batch.spec_info.draft_token_num)
        assert block == self.block, f"a block of {block} on a backend for {self.block}"
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        table = self.req_to_token_pool.req_to_token
        if block == 1:
            # What SGLang's own decoding step computes, in the same code: one row sees all of its context.
            rows = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
            out = torch.empty_like(rows[..., : layer.v_head_dim])
            self._run_sdpa_forward_decode(
                rows,
                out,
                keys,
                values,
                table,
                forward_batch.req_pool_indices,
                forward_batch.seq_lens + 1,
                scaling=layer.scaling,
                enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
            )
            return out.view(q.shape[0], -1)
        queries = q.view(-1, block, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(queries[..., : layer.v_head_dim])
        causal = layer.attn_type != AttentionType.ENCODER_ONLY
        # As SGLang's backends for GPUs read it: for each request after the other a row of keys for each of its queries.
        given, begin = getattr(forward_batch.spec_info, "custom_mask", None), 0
        rows = zip(forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist())
        for number, (row, prefix) in enumerate(rows):
            slots = table[row, : prefix + block].to(torch.int64)
            mask = torch.ones(block, prefix + block, dtype=torch.bool)
            if given is not None:
                mask = given[begin : begin + mask.numel()].view_as(mask)
                begin += mask.numel()
            elif causal:
                mask[:, prefix:].tril_()
            result = scaled_dot_product_attention(
                queries[number].transpose(0, 1)[None],
                keys[slots].transpose(0, 1)[None].to(q.dtype),
                values[slots].transpose(0, 1)[None].to(q.dtype),
                attn_mask=mask,
                scale=layer.scaling,
                enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
            )
            out[number] = result[0].transpose(0, 1)
        return out.reshape(q.shape[0], -1)
