"""Verification on NumPy arrays: which drafts to keep so that the text stays exactly the target's.

Three verifiers, each a pure function of its arguments:

- ``walk``: tokens were drawn from the target at every drafted place (``sample_rows``, or by a device); follow the drafts while
  they match. Lossless for every draft that does not depend on the draws. The default.
- ``token`` (arXiv 2211.17192) and ``block`` (arXiv 2403.10444): for drafts that were *sampled* from the ``q`` passed in. Lossless
  only if ``q`` is exactly what was sampled from, truncation included, the coins are fresh every round, and whether a place is
  verified never depended on its own draft or a later one. ``block`` accepts at least as many drafts in expectation.

Shapes: ``R`` requests, ``g`` drafts each, ``V`` columns. ``token`` and ``block`` also take one request without the leading ``R``.
Arrays are C-contiguous, of the dtype named; anything else is an ``InvalidArgument`` that says what was got and expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dflash_rs import _core
from dflash_rs.arguments import bad, integer
from dflash_rs.errors import InvalidArgument

__all__ = ["block", "gumbel", "sample_rows", "token", "top_logprobs", "walk"]


def walk(
    drafts: NDArray[np.int64] | _core.DraftTree,
    sampled: NDArray[np.int64],
    lengths: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int64]] | tuple[NDArray[np.int32], int]:
    """Follows the drafts while they match the target's own tokens.

    Chains: ``drafts`` i64 ``[R, g]``, ``sampled`` i64 ``[R, g + 1]`` (``sampled[r, i]`` was drawn after ``drafts[r, :i]``),
    ``lengths`` i64 ``[R]`` drafts to verify (default ``g``; the rest of a row is not read). Returns ``accepted`` i32 ``[R]`` and
    ``bonus`` i64 ``[R]``: request ``r`` commits ``drafts[r, :accepted[r]]`` and ``bonus[r]``.

    A tree: ``drafts`` is a ``DraftTree`` of ``n`` nodes and ``sampled`` i64 ``[n]``, one token per node. Returns the accepted nodes
    from depth 1 down, i32, and the bonus token.
    """
    if isinstance(drafts, _core.DraftTree):
        if lengths is not None:
            raise InvalidArgument("lengths: got them beside a DraftTree, expected None")
        return drafts.walk(sampled)
    return _core.walk(drafts, sampled, lengths)


def token(
    p: NDArray[np.floating],
    q: NDArray[np.floating],
    drafts: NDArray[np.int64],
    *,
    seeds: ArrayLike | None = None,
    round_starts: ArrayLike | None = None,
    accept_coins: NDArray[np.float64] | None = None,
    last_coins: ArrayLike | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int64]] | tuple[int, int]:
    """Token-level rejection sampling (arXiv 2211.17192) of sampled drafts.

    ``p`` ``[R, g + 1, V]`` are the target's probabilities after its whole sampling transform, ``q`` ``[R, g, V]`` those the drafts
    were sampled from (both f32 or both f64, rows sum to 1), ``drafts`` i64 ``[R, g]``. The coins are either keyed by ``seeds`` and
    ``round_starts`` (the number of tokens in the sequence before the round), u64 ``[R]``, or given: ``accept_coins`` f64
    ``[R, g]`` and ``last_coins`` f64 ``[R]``, all in [0, 1).

    Returns ``accepted`` i32 ``[R]`` and ``last`` i64 ``[R]``, the token after the accepted drafts; two ints for a single request.
    """
    return _ratio(_core.verify_token, p, q, drafts, seeds, round_starts, accept_coins, last_coins)


def block(
    p: NDArray[np.floating],
    q: NDArray[np.floating],
    drafts: NDArray[np.int64],
    *,
    seeds: ArrayLike | None = None,
    round_starts: ArrayLike | None = None,
    accept_coins: NDArray[np.float64] | None = None,
    last_coins: ArrayLike | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int64]] | tuple[int, int]:
    """Block verification (arXiv 2403.10444) of sampled drafts; arguments and results are those of ``token``."""
    return _ratio(_core.verify_block, p, q, drafts, seeds, round_starts, accept_coins, last_coins)


def _ratio(function, p, q, drafts, seeds, round_starts, accept_coins, last_coins):
    single = isinstance(drafts, np.ndarray) and drafts.ndim == 1
    if single:
        p, q, drafts, accept_coins = (x[None] if isinstance(x, np.ndarray) else x for x in (p, q, drafts, accept_coins))
    accepted, last = function(
        p,
        q,
        drafts,
        seeds=None if seeds is None else _unsigned("seeds", seeds),
        round_starts=None if round_starts is None else _unsigned("round_starts", round_starts),
        accept_coins=accept_coins,
        last_coins=_coins("last_coins", last_coins),
    )
    return (int(accepted[0]), int(last[0])) if single else (accepted, last)


def _unsigned(name: str, values: ArrayLike, rows: int | None = None) -> NDArray[np.uint64]:
    """A u64 vector; a number stands for ``rows`` equal ones."""
    array = _array(values)
    if array.dtype.kind not in "iu":
        # NumPy has no type of its own for whole numbers on both sides of 2^63.
        array = _array(values, object)
        if not all(isinstance(value, Integral) and not isinstance(value, bool) for value in array.flat):
            raise bad(name, values, "integers in 0..18446744073709551615")
    if array.size and not (array.min() >= 0 and array.max() < 2**64):
        raise bad(name, values, "integers in 0..18446744073709551615")
    array = np.ascontiguousarray(array, dtype=np.uint64)
    return np.repeat(array, rows) if rows is not None and np.ndim(values) == 0 else array


def _coins(name: str, values: ArrayLike | None) -> NDArray[np.float64] | None:
    """An f64 vector; the core looks at the numbers themselves."""
    if values is None:
        return None
    array = _array(values)
    if array.dtype.kind not in "fiu":
        raise bad(name, values, "numbers in [0, 1)")
    return np.ascontiguousarray(array, dtype=np.float64)


def _array(values: ArrayLike, dtype: type | None = None) -> NDArray[Any]:
    try:
        return np.atleast_1d(np.asarray(values, dtype))
    except (TypeError, ValueError, OverflowError, MemoryError):  # rows of unequal length, or ranges without end
        return np.array([None])


def sample_rows(
    logits: NDArray[np.float32],
    positions: ArrayLike,
    seeds: ArrayLike = 0,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    paths: Sequence[Sequence[int]] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Draws the target's token for every row of raw logits, f32 ``[N, V]``.

    ``positions`` ``[N]`` is the absolute position of each token drawn and ``seeds`` one number, or one per row: together they key
    the random numbers, so a token does not depend on the batch or the block it is drawn in. Transform: penalties, bias,
    temperature (0 is greedy, ties to the lowest id), top-k and top-p jointly on the tempered distribution, min-p.
    The repetition penalty counts ``prompt`` and ``output``, the other two ``output`` alone; ``paths[n]`` are the drafts between
    the output and row ``n``, and count as output.

    Returns tokens i64 ``[N]`` and the log-softmax of the raw logits at them, f32 ``[N]``. A row with NaN, +inf or nothing but -inf
    raises ``InvalidArgument`` naming row and column.
    """
    rows = logits.shape[0] if isinstance(logits, np.ndarray) and logits.ndim else 0
    if logit_bias is not None and not isinstance(logit_bias, Mapping):
        raise bad("logit_bias", logit_bias, "a mapping from token ids to numbers")
    transform = {
        "temperature": temperature,
        "top_k": integer("top_k", top_k, 0, 2**32 - 1),
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": dict(logit_bias or {}),
    }
    return _core.sample_rows(
        logits,
        _unsigned("positions", positions),
        _unsigned("seeds", seeds, rows),
        transform,
        prompt=prompt,
        output=output,
        paths=paths,
    )


def top_logprobs(logits: NDArray[np.float32], n: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The ``n`` likeliest tokens of one raw row, f32 ``[V]``, with their log-softmax: falling, lowest id first among equals."""
    return _core.top_logprobs(logits, n)


def gumbel(seed: int, position: int, columns: int, domain: str = "draw") -> NDArray[np.float32]:
    """The Gumbel(0, 1) numbers of columns ``0..columns``, f32, bit for bit those of every draw with this key.

    ``domain`` is ``"draw"``, ``"accept"``, ``"residual"`` or ``"draft"``: a drafter that samples uses its own.
    """
    return _core.gumbel(seed, position, columns, domain)
