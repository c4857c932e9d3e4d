"""SGLang 0.5.17 has no seams for some of what the host needs: its functions are replaced where they are used."""

from sglang_host import kernels


def is_it() -> bool:
    """Whether this is such a version."""
    from sglang.srt.platforms.interface import SRTPlatform

    return not hasattr(SRTPlatform, "get_kv_pool_cls")


def register(attention: str) -> None:
    """No Triton outside of kernels, and the drafter on the target's attention backend."""
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
    from sglang.srt.mem_cache import allocation
    from sglang.srt.mem_cache.allocator import paged
    from sglang.srt.model_executor import forward_batch_info
    from sglang.srt.speculative import dflash_worker_v2, draft_worker_common

    for module in (allocation, forward_batch_info):
        module.support_triton = lambda backend: False
    dflash_worker_v2.assign_extend_cache_locs_func = kernels.block_slots
    XGrammarGrammar.apply_vocab_mask = mask
    paged.alloc_extend_kernel, paged.alloc_decode_kernel = Launched(extend_pages), Launched(decode_pages)
    draft_worker_common._resolve_draft_attention_backend_fallback = lambda **_: attention


def allocator(size: int, page_size: int, **options):
    """KV slots one by one, or in pages."""
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

    if page_size == 1:
        return TokenToKVPoolAllocator(size, **options)
    return PagedTokenToKVPoolAllocator(size, page_size, **options)


class Launched:
    """A function called the way a Triton kernel is: ``kernel[grid](...)``."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        return self.function


def extend_pages(prefix_lens, seq_lens, last_loc, free_pages, out_indices, bs, page_size, *_):
    """KV slots behind each request's last one, its open page first."""
    from sglang.srt.mem_cache.allocator import alloc_extend_naive

    pages = (seq_lens + page_size - 1) // page_size - (prefix_lens + page_size - 1) // page_size
    if int(pages.sum()) <= len(free_pages):  # or the caller, which counts after the kernel, gives up
        alloc_extend_naive(prefix_lens, seq_lens, last_loc, free_pages, out_indices, page_size, out_indices.device)


def decode_pages(seq_lens, last_loc, free_pages, out_indices, bs, page_size, *_):
    """The KV slot of one more token."""
    extend_pages(seq_lens - 1, seq_lens, last_loc, free_pages, out_indices, bs, page_size)


def mask(self, logits, vocab_mask):
    """Tokens that a grammar forbids, on a CPU."""
    import xgrammar

    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")
