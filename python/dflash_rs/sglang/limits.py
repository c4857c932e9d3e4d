"""How many drafts of a request may be accepted in one pass: what the request says, and what the server says of all.

A request says it in `custom_params`, which SGLang's routes carry as they are: ``{"dflash_rs": {"max_drafts": 2}}``; 0 decodes plainly. Limits change no text,
only how soon it comes: a batch has one width, so what lies beyond a request's limit is verified for its neighbours' sake and not accepted, and a batch in
which nobody may draft much is verified in narrow steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

KEY = "dflash_rs"


class Said(NamedTuple):
    """What a request says of its drafts: the most that are accepted in one pass, None where it does not say; whether whole blocks are drafted though
    less might pay."""

    max_drafts: int | None = None
    whole_blocks: bool = False


def of_request(params: Any) -> Said:
    """What a request's sampling parameters say.

    Raises ValueError naming what is wrong with them.
    """
    given = getattr(params, "custom_params", None)
    said = given.get(KEY) if isinstance(given, dict) else None
    if said is None:
        return Said()
    if not isinstance(said, dict):
        raise ValueError(f"custom_params.{KEY}: got {said!r:.60}, expected an object with {' or '.join(Said._fields)}")
    if unknown := sorted(str(name) for name in said if name not in Said._fields):
        raise ValueError(f"custom_params.{KEY}: got {', '.join(unknown)[:60]}, expected {' or '.join(Said._fields)}")
    most, whole = said.get("max_drafts"), said.get("whole_blocks", False)
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
        raise ValueError(f"custom_params.{KEY}.max_drafts: got {most!r:.60}, expected an integer of at least 0")
    if not isinstance(whole, bool):
        raise ValueError(f"custom_params.{KEY}.whole_blocks: got {whole!r:.60}, expected true or false")
    return Said(most, whole)


def why_not(req: Any) -> str | None:
    """What to answer a request whose limit cannot be read; None where it can."""
    try:
        of_request(req.sampling_params)
    except ValueError as error:
        return str(error)
    return None


class Limits:
    """The limits of a batch. `max_drafts` is the server's for requests that say nothing; `max_draft_context`: a request whose text is longer than this
    many tokens drafts nothing more. None does not limit."""

    def __init__(self, block: int, max_drafts: int | None, max_draft_context: int | None):
        self._whole, self._default, self._context = block - 1, max_drafts, max_draft_context

    def of(self, reqs: Sequence[Any]) -> list[int] | None:
        """Most drafts of each request; None where no request is limited."""
        found = [self._of(req) for req in reqs]
        return found if min(found, default=self._whole) < self._whole else None

    def whole(self, reqs: Sequence[Any]) -> bool:
        """Whether all of them want whole blocks."""
        return all(of_request(req.sampling_params).whole_blocks for req in reqs)

    def _of(self, req: Any) -> int:
        said = of_request(req.sampling_params).max_drafts
        most = self._default if said is None else said
        if self._context is not None and len(req.origin_input_ids) + len(req.output_ids) > self._context:
            return 0
        return self._whole if most is None else min(most, self._whole)
