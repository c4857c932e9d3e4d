"""What may not ask the device for a value: captured functions, and the launch of a step."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

# Asks for a value, or brings one in from the host.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "item", "unique", "masked_select")


class NoValues(TorchDispatchMode):
    """Refuses, while a function is captured, what a CUDA graph would refuse."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in FORBIDDEN:
            raise AssertionError(f"{function} cannot be captured in a CUDA graph")
        return function(*args, **(kwargs or {}))
