"""Counts what a decoding step has torch do outside of the models' passes, and products with heads anywhere, into the file that SGLANG_HOST_COUNT names.

On a GPU each operation is about one launch, so a count says what a step costs beside the passes, wherever it is taken. Views cost nothing and are left out, and
so are values that the host asks for: here it cannot be seen whether it has them already. A kernel of dflash_rs is one operation, and what it does on the
stand-in for CUDA's driver is none.
"""

import json
import os
from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

_FREE = {
    "view", "slice", "select", "unsqueeze", "squeeze", "expand", "detach", "alias", "t", "transpose", "permute", "as_strided",
    "split", "unbind", "_unsafe_view", "_reshape_alias", "empty", "empty_strided", "new_empty", "empty_like", "lift_fresh",
    "_local_scalar_dense",
}  # fmt: skip
_PRODUCTS = {"mm", "addmm", "matmul", "linear"}


class Operations(TorchDispatchMode):
    """Counts while it is entered, but for what runs while `inside` is not 0; and all products with a matrix of `vocab` columns, which are heads."""

    def __init__(self, vocab=None):
        super().__init__()
        self.operations = self.inside = self.heads = 0
        self.vocab = vocab

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.operations += not self.inside and name not in _FREE
        result = function(*args, **(kwargs or {}))
        self.heads += name in _PRODUCTS and result.shape[-1] == self.vocab
        return result


_running = None
_steps: dict[str, list[tuple[int, int]]] = {}


def on():
    """Whether this process is to count."""
    return bool(os.environ.get("SGLANG_HOST_COUNT"))


def _run_batch(original, scheduler, batch, *args, **kwargs):
    global _running
    if not batch.forward_mode.is_decode() or not batch.reqs:
        return original(scheduler, batch, *args, **kwargs)
    _running = step = Operations(scheduler.model_config.vocab_size)
    try:
        with step:
            return original(scheduler, batch, *args, **kwargs)
    finally:
        _running = None
        _steps.setdefault(str(len(batch.reqs)), []).append((step.operations, step.heads))
        _write()


def _forward(original, runner, *args, **kwargs):
    if _running is None:
        return original(runner, *args, **kwargs)
    _running.inside += 1
    try:
        return original(runner, *args, **kwargs)
    finally:
        _running.inside -= 1


def _launch(original):
    def launched(function, tensor, **arguments):
        if _running is not None and not _running.inside:
            _running.operations += 1
        return original(function, tensor, **arguments)

    return launched


def _write():
    """What most steps of so many requests had: the first ones make buffers, and some write down what has waited."""

    def most(counts):
        return Counter(counts).most_common(1)[0][0]

    found = {
        n: dict(zip(("operations", "heads"), map(most, zip(*steps)))) | {"steps": len(steps)}
        for n, steps in _steps.items()
    }
    with open(os.environ["SGLANG_HOST_COUNT"], "w", encoding="utf-8") as file:
        json.dump(found, file)


def hooks():
    """Around what runs a batch and what runs a model."""
    from dflash_rs import cuda

    cuda._launch = _launch(cuda._launch)
    return {
        "sglang.srt.managers.scheduler.Scheduler.run_batch": _run_batch,
        "sglang.srt.model_executor.model_runner.ModelRunner.forward": _forward,
    }
