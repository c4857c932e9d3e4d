"""The KV pool without the Triton kernels that its constructor warms up."""

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, move_kv_cache_native


class HostKVPool(MHATokenToKVPool):
    """Moves slots with torch indexing."""

    def _init_kv_copy_and_warmup(self):
        self._kv_copy_config = None

    def _move_kv_cache_impl(self, tgt_loc, src_loc):
        if tgt_loc.numel():
            move_kv_cache_native(self.k_buffer, self.v_buffer, tgt_loc, src_loc)
