"""SGLang 0.5.17 has no seams for some of what the host needs: its functions are replaced where they are used."""

from sglang_host import kernels


def is_it() -> bool:
    """Whether this is such a version."""
    from sglang.srt.platforms.interface import SRTPlatform

    return not hasattr(SRTPlatform, "get_kv_pool_cls")


def register(attention: str) -> None:
    """No Triton outside of kernels, and the drafter on the target's attention backend."""
    from sglang.srt.mem_cache import allocation
    from sglang.srt.model_executor import forward_batch_info
    from sglang.srt.speculative import dflash_worker_v2, draft_worker_common

    for module in (allocation, forward_batch_info):
        module.support_triton = lambda backend: False
    dflash_worker_v2.assign_extend_cache_locs_func = kernels.block_slots
    draft_worker_common._resolve_draft_attention_backend_fallback = lambda **_: attention


def allocator(size: int, page_size: int, **options):
    """KV slots one by one; the allocator of larger pages is a Triton kernel."""
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    if page_size != 1:
        raise ValueError(f"--page-size: got {page_size}, expected 1 on the host with this version")
    return TokenToKVPoolAllocator(size, **options)
