"""The drafter's keys and values as they would be if every step wrote its own at once, kept beside the real ones.

``SGLANG_HOST_SHADOW`` names a file. Before each block is drafted, what the drafter has read of its requests' contexts is compared with the shadow,
and a line of JSON is added to the file: ``tokens`` compared, ``differs``, the largest difference relative to the largest number of that layer.
"""

import json
import os
from contextlib import contextmanager

WORKER = "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2"


def on() -> bool:
    """Whether there is a shadow."""
    return bool(os.environ.get("SGLANG_HOST_SHADOW"))


def _buffers(worker):
    pool = worker.draft_model_runner.token_to_kv_pool
    return pool.k_buffer, pool.v_buffer


@contextmanager
def _instead(worker):
    """The pool's buffers are the shadow's."""
    real = _buffers(worker)
    if not hasattr(worker, "_shadow"):
        worker._shadow = [[buffer.clone() for buffer in buffers] for buffers in real]
    kept = [list(buffers) for buffers in real]
    try:
        for buffers, shadow in zip(real, worker._shadow):
            buffers[:] = shadow
        yield
    finally:
        for buffers, own in zip(real, kept):
            buffers[:] = own


def write(original, worker, **given):
    """Stands around what writes keys and values: the shadow has those of kept tokens already."""
    if not getattr(worker, "_late", False):
        with _instead(worker):
            original(worker, **given)
    return original(worker, **given)


def keeps():
    """Has what is kept written into the shadow at once."""
    from dflash_rs.sglang.deferred import Deferred

    keep, inject = Deferred.keep, Deferred.inject

    @contextmanager
    def late(deferred):
        worker = deferred._write.__self__
        worker._late, before = True, getattr(worker, "_late", False)
        try:
            yield worker
        finally:
            worker._late = before

    def kept(deferred, hidden, slots, positions):
        if not keep(deferred, hidden, slots, positions):
            return False
        with late(deferred) as worker, _instead(worker):
            deferred._write(target_hidden=hidden[: slots.numel()], cache_loc=slots, positions=positions)
        return True

    def injected(deferred):
        with late(deferred):
            inject(deferred)

    Deferred.keep, Deferred.inject = kept, injected


def compare(original, worker, **given):
    """Stands around the worker's function that turns the drafter's hidden states into tokens."""
    if int(worker.block_size) > 1 and hasattr(worker, "_shadow"):
        slots = worker._slots
        lengths = worker._draft_block_positions_buf[: len(slots), 0].tolist()
        table = worker.model_runner.req_to_token_pool.req_to_token
        window = worker.draft_window_size if worker.use_compact_draft_cache else None
        read = []
        for row, length in zip(slots.tolist(), lengths):
            begin = 0 if window is None else max(0, length - int(window))
            read += table[row, begin:length].tolist()
        differs = 0.0
        for real, shadow in zip(_buffers(worker), worker._shadow):
            for own, other in zip(real, shadow):
                most = other[read].abs().max().clamp(min=1e-9)
                differs = max(differs, float((own[read] - other[read]).abs().max() / most))
        with open(os.environ["SGLANG_HOST_SHADOW"], "a", encoding="utf-8") as out:
            out.write(json.dumps({"tokens": len(read), "differs": differs}) + "\n")
    return original(worker, **given)


def hooks():
    """What stands around functions of SGLang's, by name."""
    keeps()
    return {
        f"{WORKER}._append_target_hidden_to_draft_kv_by_loc": write,
        f"{WORKER}._greedy_sample_from_vocab_parallel_head": compare,
    }
