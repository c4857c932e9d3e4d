"""Requests that a prefill server has prefilled and that this one decodes.

What comes with a request is its KV, the drafter's as well as the target's, and its first token. SGLang pairs the buffers of the two servers that both
have and says nothing of the others: behind a prefill server without a drafter, drafts would be made from what other requests have left in the drafter's
pages. So a prefill server of ours signs what it hands over, in a field that SGLang sends with every request and that DFLASH leaves empty, and requests
that come without are refused.
"""

from __future__ import annotations

from typing import Any

import torch

from dflash_rs.sglang import ALGORITHM, grammar

# At least 16 numbers of float32 are sent.
SIGNATURE = torch.tensor([*ALGORITHM.encode()], dtype=torch.float32)


def sign(row: torch.Tensor) -> None:
    """Signs the hidden states that go with a request, f32 ``[n]``, ``n`` at least 16."""
    row[: len(SIGNATURE)] = SIGNATURE


def unsigned(req: Any) -> str | None:
    """What to answer a request that has arrived from a prefill server without our drafter; None serves it."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    if req.bootstrap_host in (None, FAKE_BOOTSTRAP_HOST):
        return None  # SGLang's own, for warming up and asking whether the server lives: nothing has come at all
    row = req.hidden_states_tensor
    if row is None or torch.equal(row[: len(SIGNATURE)].cpu(), SIGNATURE):
        return None
    return (
        f"bootstrap_host: got {req.bootstrap_host}:{req.bootstrap_port}, a prefill server without --speculative-algorithm {ALGORITHM}, expected one with it: "
        "there is no knowing whether the drafter's keys and values of the prompt have come"
    )


def arrive(req: Any) -> None:
    """A request is about to decode here, with its first token or with all that it had when it was retracted."""
    grammar.arrive(req)
    if (answer := unsigned(req)) is not None:
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        # SGLang asks next whether requests have ended.
        req.to_finish = FINISH_ABORT(answer, 400)
