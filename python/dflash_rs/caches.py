"""The KV caches of all layers, as the CUDA kernels that serve all of them take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import bad
from .errors import InvalidArgument


class KvCaches:
    """The K and V caches of all layers, each bfloat16 [num_slots, kv_heads, head_dim], as the kernels that serve all layers take them.

    Keeps the tensors alive and their addresses on the device. Every layer must have the first one's shape, strides and device.
    """

    def __init__(self, k: Sequence[Tensor], v: Sequence[Tensor]):
        for name, caches in (("k", k), ("v", v)):
            if not isinstance(caches, Sequence) or not all(isinstance(cache, Tensor) for cache in caches):
                raise bad(name, caches, "a list of tensors, one per layer")
        if not k or len(k) != len(v):
            raise InvalidArgument(f"v: got {len(v)} caches for {len(k)} of K, expected as many, at least one")
        first = k[0]
        if first.ndim != 3:
            raise InvalidArgument(f"k[0]: got shape {list(first.shape)}, expected [num_slots, kv_heads, head_dim]")
        for name, caches in (("k", k), ("v", v)):
            for layer, cache in enumerate(caches):
                for what in ("shape", "dtype", "device"):
                    got, expected = getattr(cache, what), getattr(first, what)
                    if got != expected:
                        raise InvalidArgument(f"{name}[{layer}]: got {what} {got}, expected {expected} as k[0]")
                if cache.stride() != first.stride():
                    raise InvalidArgument(
                        f"{name}[{layer}]: got strides {cache.stride()}, expected {first.stride()} as k[0]"
                    )
                if cache.data_ptr() % 16:
                    raise InvalidArgument(f"{name}[{layer}]: address {cache.data_ptr():#x} is not aligned to 16 bytes")
        self.k, self.v = tuple(k), tuple(v)
        self.k_addresses = _addresses(self.k)
        self.v_addresses = _addresses(self.v)


def _addresses(caches: Sequence[Tensor]) -> Tensor:
    return torch.tensor([cache.data_ptr() for cache in caches], dtype=torch.int64, device=caches[0].device)
