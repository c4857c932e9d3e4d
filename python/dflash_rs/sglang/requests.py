"""Which requests cannot be honoured exactly, and what to answer them. The server goes on."""

from __future__ import annotations

import copy
from typing import Any


def ours() -> bool:
    """Whether this server runs ``DFLASH_RS``: SGLang asks for every algorithm of DFLASH's family."""
    from sglang.srt.runtime_context import get_spec

    from dflash_rs.sglang import ALGORITHM

    return get_spec().speculative_algorithm == ALGORITHM


def refusal(req: Any) -> str | None:
    """What to answer a request that cannot be honoured, naming the option; None serves it."""
    from sglang.srt.runtime_context import get_exec

    answer = why_not(req, seeded=get_exec().deterministic.enable_deterministic_inference)
    if answer is not None:
        harmless(req)
    return answer


def harmless(req: Any) -> None:
    """A refused request still runs through one prefill before SGLang answers it; what was refused must not happen there."""
    req.sampling_params = copy.copy(req.sampling_params)
    req.sampling_params.min_p = 0.0
    req.return_hidden_states = req.return_sampling_mask = False


def why_not(req: Any, seeded: bool) -> str | None:
    """``refusal`` for a server whose draws are seeded (deterministic inference) or not."""
    if req.return_hidden_states:
        return "return_hidden_states: got true, expected false: DFLASH_RS uses the hidden states itself"
    if req.return_sampling_mask:
        return "return_sampling_mask: got true, expected false: DFLASH_RS does not record what its filters left of the vocabulary"
    if seeded and req.sampling_params.min_p > 0:
        return (
            f"min_p: got {req.sampling_params.min_p}, expected 0 with --enable-deterministic-inference: SGLang's seeded sampler "
            "cannot apply it"
        )
    return None
