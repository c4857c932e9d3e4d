"""Drafts that are right as often as a test wants, and states that are kept wrongly on purpose.

``SGLANG_HOST_STEER`` names a JSON file, which is read again whenever it has changed:

- `texts`: token ids of prompts with what follows them. A draft is the token that stands there, if the anchor's does.
- `wrong`: which drafts are a token off, a function of ``dflash_rs.check.drafts`` without its ending; ``some`` is one of four.
- `keep`: how many of the tokens that a block was accepted with its state keeps: ``accepted``, or for tests of the tests ``all``, ``fewer``
  (one token less) or ``none``.

The drafter's passes run as ever; only what it says at their end is exchanged.
"""

import json
import os
from functools import cache
from pathlib import Path


def on() -> bool:
    """Whether there is something to be steered by."""
    return bool(os.environ.get("SGLANG_HOST_STEER"))


@cache
def _read(path: Path, changed: int) -> dict:
    return {"texts": [], "wrong": "some", "keep": "accepted"} | json.loads(path.read_text(encoding="utf-8"))


def steer() -> dict:
    """What the file says now."""
    path = Path(os.environ["SGLANG_HOST_STEER"])
    return _read(path, path.stat().st_mtime_ns)


def drafts(original, worker, *, hidden_states, **kwargs):
    """Stands around the worker's function that turns the drafter's hidden states ``[requests * (block - 1), hidden]`` into tokens."""
    from dflash_rs.check import drafts as known

    own = original(worker, hidden_states=hidden_states, **kwargs)
    said, block = steer(), int(worker.block_size)
    if block == 1:  # a plain step
        return own
    rows = hidden_states.shape[0] // (block - 1)
    anchors = worker._draft_block_ids_buf[:rows, 0].numpy()
    places = worker._draft_block_positions_buf[:rows, 0].numpy()
    scripted = known.Scripted(
        int(worker.model_runner.model_config.vocab_size), block, getattr(known, said["wrong"] + "_wrong")
    )
    scripted.texts = said["texts"]
    tokens, _ = scripted.candidates(anchors, places, None, page_size=1)
    return own.new_tensor(tokens[:, :, 0]).flatten()


def keep(original, backend, last_correct_step_indices, *args, **kwargs):
    """Stands around the attention backend's function that keeps the states after a verified block."""
    how = steer()["keep"]
    if how == "none":
        return None
    if how == "fewer":
        last_correct_step_indices = (last_correct_step_indices - 1).clamp(min=0)
    if how == "all":
        block = backend.linear_attn_backend.req_to_token_pool.mamba_pool.mamba_cache.intermediate_ssm.shape[2]
        last_correct_step_indices = last_correct_step_indices * 0 + block - 1
    return original(backend, last_correct_step_indices, *args, **kwargs)


def hooks():
    """What stands around functions of SGLang's, by name."""
    return {
        "sglang.srt.speculative.dflash_worker_v2.DFlashWorkerV2._greedy_sample_from_vocab_parallel_head": drafts,
        "sglang.srt.layers.attention.hybrid_linear_attn_backend.HybridLinearAttnBackend.update_mamba_state_after_mtp_verify": keep,
    }
