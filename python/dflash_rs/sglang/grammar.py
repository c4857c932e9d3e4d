"""Where a grammar ends a request: at the token at which it ends without speculation.

Without speculation SGLang asks whether the grammar is over before it tells the grammar of the new token. So a request that
ignores the end token gets one token more than its grammar has, which nothing constrains. With speculation SGLang tells the
grammar of all that was accepted, drops what is behind its end, and then asks. Here one token behind the end is kept, or still
waited for where the end was the last token accepted.
"""

from __future__ import annotations

from typing import Any

from dflash_rs.sglang.sampling import stop_ids

# An attribute of a request: its output tokens up to the one that ended its grammar.
_ENDED = "dflash_rs_grammar_ended"


def accept(original: Any, processor: Any, req: Any, tokens: Any) -> list[int]:
    """Around SGLang's ``_accept_grammar_tokens``: tells the grammar of a step's tokens, and returns those that are kept."""
    run = [tokens] if isinstance(tokens, int) else list(tokens)
    before = req.grammar.is_terminated()
    kept = original(processor, req, run)
    if before or not kept or not req.grammar.is_terminated():
        return kept
    # The step's tokens are appended to the output later.
    setattr(req, _ENDED, len(req.output_ids) + len(kept))
    ends = not req.sampling_params.ignore_eos and kept[-1] in stop_ids(req)
    return kept if ends else run[: len(kept) + 1]


def arrive(req: Any) -> None:
    """A request arrives with its KV, and its grammar has been told of all its tokens: SGLang asks next whether it has ended."""
    if req.grammar is not None and req.grammar.is_terminated():
        setattr(req, _ENDED, len(req.output_ids))


def finish(original: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """Around SGLang's ``update_finish_state``: the token that ends a grammar does not end its request."""
    ended = getattr(req, _ENDED, None)
    if ended is None or len(req.output_ids) > ended:
        return original(req, *args, **kwargs)
    grammar, req.grammar = req.grammar, None
    try:
        return original(req, *args, **kwargs)
    finally:
        req.grammar = grammar
