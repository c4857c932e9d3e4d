"""Which requests cannot be honoured exactly, or would end SGLang's server, and what to answer them. The server goes on."""

from __future__ import annotations

import copy
from array import array
from typing import Any

import numpy as np

from dflash_rs.sglang import limits


def ours() -> bool:
    """Whether this server runs ``DFLASH_RS``: SGLang asks for every algorithm of DFLASH's family."""
    from sglang.srt.runtime_context import get_spec

    from dflash_rs.sglang import ALGORITHM

    return get_spec().speculative_algorithm == ALGORITHM


def refusal(req: Any) -> str | None:
    """What to answer a request that cannot be honoured, naming the option; None serves it."""
    from sglang.srt.runtime_context import get_exec

    from dflash_rs.sglang import compat

    without_idle_filters(req)
    server = get_exec()
    answer = why_not(req, seeded=server.deterministic.enable_deterministic_inference)
    if answer is None:
        answer = too_many_logprobs(req, compat.installed().most_top_logprobs())
    if answer is None and server.features.enable_custom_logit_processor:
        answer = unreadable(req.custom_logit_processor)
    if answer is None and (answer := unknown_tokens(req)) is not None and compat.installed().takes_media():
        answer = None  # placeholders of images and the like, which SGLang replaces later
    if answer is not None:
        harmless(req)
    return answer


def without_idle_filters(req: Any) -> None:
    """Takes `min_p` from a greedy request, where it changes nothing: a batch would apply it, or fail to, because of that request."""
    params = req.sampling_params
    if params.top_k == 1 and params.min_p > 0:  # SGLang has made a temperature of 0 into this
        req.sampling_params = copy.copy(params)
        req.sampling_params.min_p = 0.0


def harmless(req: Any) -> None:
    """A refused request still runs through one prefill before SGLang answers it; what was refused must not happen there."""
    req.sampling_params = copy.copy(req.sampling_params)
    req.sampling_params.min_p, req.sampling_params.custom_params = 0.0, None
    req.return_hidden_states = req.return_sampling_mask = False
    req.logprob.top_logprobs_num = 0
    req.custom_logit_processor = None
    # SGLang replaces the prompt itself, but for what the text of the answer is put together from.
    req.origin_input_ids_unpadded = array("q", [0])


def why_not(req: Any, seeded: bool) -> str | None:
    """What can be seen in a request alone, for a server whose draws are seeded (deterministic inference) or not."""
    if req.return_hidden_states:
        return "return_hidden_states: got true, expected false: DFLASH_RS uses the hidden states itself"
    if req.return_sampling_mask:
        return "return_sampling_mask: got true, expected false: DFLASH_RS does not record what its filters left of the vocabulary"
    if seeded and req.sampling_params.min_p > 0:
        return (
            f"min_p: got {req.sampling_params.min_p}, expected 0 with --enable-deterministic-inference: SGLang's seeded sampler "
            "cannot apply it"
        )
    if (unreadable_limit := limits.why_not(req)) is not None:
        return unreadable_limit
    if not req.origin_input_ids:
        return "input_ids: got none, expected at least one token: the prompt is empty"
    if not 0 <= (wanted := req.logprob.top_logprobs_num or 0) <= req.vocab_size:
        return f"top_logprobs_num: got {wanted}, expected 0..{req.vocab_size}, the vocabulary"
    return None


def too_many_logprobs(req: Any, most: int | None) -> str | None:
    """What to answer a request for more log-probabilities than go from a prefill server to a decode server, if `most` is not None."""
    wanted = req.logprob.top_logprobs_num or 0
    if most is None or wanted <= most:
        return None
    return f"top_logprobs_num: got {wanted}, expected at most {most} with --disaggregation-mode"


def unknown_tokens(req: Any) -> str | None:
    """What to answer a prompt with tokens outside the vocabulary."""
    ids = np.asarray(req.origin_input_ids)
    outside = ids[(ids < 0) | (ids >= req.vocab_size)]
    if not len(outside):
        return None
    return f"input_ids: got {outside[0]}, expected 0..{req.vocab_size - 1}, the vocabulary"


def unreadable(processor: str | None) -> str | None:
    """What to answer a custom logit processor that SGLang could not read."""
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    if processor is None:
        return None
    try:
        read = CustomLogitProcessor.from_str(processor)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    else:
        if callable(read):
            return None
        found = f"a {type(read).__name__}"
    return (
        f"custom_logit_processor: got what reads as {found[:200]}, expected the string of CustomLogitProcessor.to_str()"
    )
