"""What SGLang asks of a platform, answered for a host with torch and nothing else."""

from sglang.srt.platforms import interface
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum

ATTENTION = "host"


def activate() -> str:
    """The entry point: where the platform class is."""
    return "sglang_host.platform:HostPlatform"


class HostPlatform(CpuDeviceMixin, interface.SRTPlatform):
    """No Triton but interpreted, no graphs, one attention backend."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    if hasattr(interface, "PlatformCapabilities"):
        capabilities = interface.PlatformCapabilities()

    def get_default_attention_backend(self):
        return ATTENTION

    def get_default_speculative_draft_attention_backend(self, algorithm):
        return ATTENTION

    def supports_speculative_algorithm(self, algorithm):
        return True

    def supports_speculative_draft_attention_backend(self, algorithm, backend):
        return backend == ATTENTION

    def support_mamba_cache_extra_buffer(self):
        # States that requests leave behind for others with the same prompt.
        return True

    def get_dispatch_key_name(self):
        return "native"

    def get_speculative_cache_locs_fn(self):
        from sglang_host.kernels import block_slots

        return block_slots

    def get_kv_pool_cls(self, *, kind):
        if kind != "mha":
            return None
        from sglang_host.pool import HostKVPool

        return HostKVPool

    def get_mha_kv_pool_cls(self):
        return self.get_kv_pool_cls(kind="mha")  # the name in 0.5.17

    def get_paged_allocator_cls(self):
        # 0.5.17 asks for one with pages of a single token, too.
        from sglang_host import older

        return older.allocator if older.is_it() else super().get_paged_allocator_cls()

    def init_backend(self):
        import torch

        if torch.Tensor.record_stream is _record_stream:
            return
        # Streams of the CPU are stand-ins that record_stream rejects; the workers call it unconditionally.
        torch.Tensor.record_stream = _record_stream
        # Pinned memory takes a driver. Some of SGLang asks first whether it can be had, some does not.
        torch.Tensor.pin_memory = lambda tensor, *device: tensor
        for name in ("tensor", "empty", "zeros", "ones", "full", "empty_like", "zeros_like"):
            setattr(torch, name, _unpinned(getattr(torch, name)))


def _record_stream(tensor, stream):
    return None


def _unpinned(original):
    def function(*args, pin_memory=False, **kwargs):
        return original(*args, **kwargs)

    return function
