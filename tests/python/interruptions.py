"""Steps that somebody interrupts, for the tests of engines."""

from __future__ import annotations

import contextlib


def finish_interrupted(llm, stream, monkeypatch, leaves: int | None = None) -> tuple[dict[int, list[int]], int]:
    """Steps until the requests of `stream` are through; every third step is interrupted before what was drafted is accepted, and the request
    of index `leaves` is aborted after the first one. The token ids of those that ended, by index, and how often a step came that far."""
    backend = type(llm._loop.backend)
    accept, calls = backend._accept, 0

    def interrupted(self, plan, *rows):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise KeyboardInterrupt
        return accept(self, plan, *rows)

    monkeypatch.setattr(backend, "_accept", interrupted)
    if leaves is not None:
        gone = list(llm._requests.active)[leaves]
        llm._loop.step()
        assert llm.abort(gone)
    while llm._requests.active:
        with contextlib.suppress(KeyboardInterrupt):
            llm._loop.step()
    return {event.index: event.output.token_ids for event in stream if event.output is not None}, calls
