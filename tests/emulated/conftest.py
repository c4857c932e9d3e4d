"""The GPU path of the engine without a GPU.

A stand-in for CUDA's driver runs the kernels' host-compiled logic, tensors on the CPU are passed off as tensors of cuda:0, and a
captured graph is the captured function, called again. So everything between `LLM` and the kernels' own logic is the code that
runs on a GPU: launcher, checks, buffers, buckets, what a graph may and may not do. What it cannot show: the GPU's own execution
(tests/gpu) and that torch's operations can be captured.

Runs in a process of its own, since a driver is looked for once.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from no_values import HOST, NoValues  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "pair: generates with the bundled pair")


def pytest_collection_modifyitems(config, items):
    """Of the GPU's tests the first two cases each: there are many, for a GPU."""
    seen: dict[str, int] = {}
    kept, left = [], []
    for item in items:
        name = item.originalname
        seen[name] = seen.get(name, 0) + 1
        extra = item.path.name == "test_gpu_tests.py" and seen[name] > 2
        (left if extra else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def _flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value or () for t in _flat(part)]


def _capture(self, work):
    work()
    with NoValues():
        outputs = work()

    def replay():
        for old, new in zip(_flat(outputs), _flat(work()), strict=True):
            old.copy_(new)

    return replay, outputs


@pytest.fixture(scope="session", autouse=True)
def driver(tmp_path_factory):
    """Compiles and loads the driver before anything looks for one."""
    import emulated_driver

    return ctypes.CDLL(str(emulated_driver.build(tmp_path_factory.mktemp("driver"))), mode=ctypes.RTLD_GLOBAL)


@pytest.fixture(scope="session")
def gpu(driver):
    """Passes the CPU off as cuda:0."""
    from dflash_rs import _core, cuda
    from dflash_rs.engine.device import arena, graphs

    if not _core.cuda_info()["fatbin_bytes"]:
        pytest.skip("this build contains no CUDA kernels")
    with pytest.MonkeyPatch.context() as patch:
        view = cuda._view

        def on_device(tensor):
            address, dtype, _, shape, strides = view(tensor)
            return address, dtype, 0, shape, strides

        patch.setattr(cuda, "_view", on_device)
        patch.setattr(cuda, "available", lambda device="cuda": True)
        patch.setattr(cuda, "load", lambda device="cuda": _core.cuda_load())
        patch.setattr(cuda, "clusters", lambda device: _core.cuda_clusters(0))
        patch.setattr(graphs.Graphs, "_capture", _capture)
        make = arena.Arena.__init__

        def made(self, *args):
            make(self, *args)
            for staging in self._staging:
                place = staging.untyped_storage().data_ptr()
                HOST.add(place)
                weakref.finalize(self, HOST.discard, place)

        patch.setattr(arena.Arena, "__init__", made)
        # Memory that nobody wrote is NaN or the largest number: what reads it shows.
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield torch.device("cpu")
        torch.use_deterministic_algorithms(False)
