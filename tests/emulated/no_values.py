"""What may not ask the device for a value, or bring one in from the host: captured functions, and the launch of a step.

All tensors are on the CPU here. Host's memory is what NumPy's arrays were made into tensors of, and the staging of arenas (`HOST`, filled
by conftest.py); all else counts as the device's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Asks for a value, or brings one in from the host.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "item", "unique", "masked_select")
# Methods that no dispatch sees where a tensor is on the CPU already.
READS = ("cpu", "numpy", "tolist", "item")
# Where the host's memory begins, of all tensors that stand for it.
HOST: set[int] = set()


def is_hosts(tensor: torch.Tensor) -> bool:
    # Packed weights have no memory that could be asked for.
    return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in HOST


def _tensors(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    return (
        [t for value in values for t in _tensors(value)] if isinstance(values, (list, tuple, type({}.values()))) else []
    )


class Crossings(TorchDispatchMode):
    """Writes down, by name and in order, what moves between the host and the device or makes the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self._quiet = False

    def saw(self, name: str) -> None:
        self.log.append(name)

    def __enter__(self):
        self._methods = {name: getattr(torch.Tensor, name) for name in READS}
        self._from_numpy = torch.from_numpy

        def reading(name, method):
            def read(tensor, *args, **kwargs):
                if not is_hosts(tensor):
                    self.saw(name)
                return method(tensor, *args, **kwargs)

            return read

        def from_numpy(array):
            self._quiet = True  # nothing has moved yet
            tensor = self._from_numpy(array)
            self._quiet = False
            HOST.add(tensor.untyped_storage().data_ptr())
            self._made.append(tensor)
            return tensor

        # Kept as long as they count as the host's: their memory is nobody else's meanwhile.
        self._made: list[torch.Tensor] = []
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, reading(name, method))
        torch.from_numpy = from_numpy
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, method)
        torch.from_numpy = self._from_numpy
        HOST.difference_update(tensor.untyped_storage().data_ptr() for tensor in self._made)
        self._made = []
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # Of one side alone: a view, mostly.
        forbidden = name in FORBIDDEN and not self._quiet
        if forbidden or len({is_hosts(tensor) for tensor in _tensors([args, kwargs or {}])}) == 2:
            self.saw(name)
        return function(*args, **(kwargs or {}))


class NoValues(Crossings):
    """Refuses, while a function is captured, what a CUDA graph would refuse."""

    def saw(self, name: str) -> None:
        raise AssertionError(f"{name} cannot be captured in a CUDA graph")
