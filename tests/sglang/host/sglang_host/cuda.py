"""Passes the CPU off as a GPU to the kernels of dflash_rs, on top of the driver that SGLANG_HOST_CUDA names (tests/emulated)."""

import ctypes
import os


def emulate() -> None:
    """Does nothing unless the variable is set; before anything opens a driver."""
    library = os.environ.get("SGLANG_HOST_CUDA")
    if not library:
        return
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    from dflash_rs import _core, cuda

    view = cuda._view

    def on_device(tensor):
        address, dtype, _, shape, strides = view(tensor)
        return address, dtype, 0, shape, strides

    cuda._view = on_device
    cuda.available = lambda device="cuda": True
    cuda.load = lambda device="cuda": _core.cuda_load()
    cuda.clusters = lambda device: _core.cuda_clusters(0)
