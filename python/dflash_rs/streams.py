"""The events of one call, as an iterator that may be left, closed and shared in any way."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .errors import DflashError
from .outputs import Output, StreamEvent, first_of

if TYPE_CHECKING:
    from .engine.requests import Active
    from .llm import LLM


class Stream(Iterator[StreamEvent]):
    """The events of one `LLM.stream`. Closing it, leaving its ``with`` block or dropping it ends what is unfinished.

    ``for event in llm.stream(...)`` drops it when the loop is left; a stream that is held by a name goes on to own its requests, which
    other calls' steps carry on, until it is closed::

        with llm.stream(prompts) as events:
            for event in events:
                ...

    Threads may share one: each event goes to one of them. `close` may be called from anywhere, a signal handler included; whoever
    waits for an event then sees the end of the stream.
    """

    def __init__(self, llm: LLM):
        self._llm = llm
        self._waiting: dict[int, Active] = {}
        # Of these, who has ended and was not seen to.
        self._ended: deque[Active] = deque()
        self._events: deque[StreamEvent] = deque()
        self._turn = threading.RLock()
        self._closed = False

    def __next__(self) -> StreamEvent:
        self._llm._turns.check()
        if self._turn._is_owned():  # type: ignore[attr-defined]  # every RLock has it, typeshed does not
            raise DflashError(
                "stream: got next() in the middle of another one of the same thread, expected one at a time"
            )
        with self._turn:
            while not self._closed:
                if self._events:
                    return self._events.popleft()
                if not self._waiting:
                    break
                try:
                    self._events.extend(self._llm._ready(self._waiting))
                    self._ended.clear()
                except BaseException:
                    self.close()
                    raise
            raise StopIteration

    def _outputs(self, progress: Any = None) -> dict[int, Output]:
        """By their prompts' places, the outputs of everything that is still to come, the first answers with the others: its events are never
        made. `progress` is shown how many requests are done, and their tokens."""
        with self._turn:
            answers = {event.index: [event.output] for event in self._events if event.output is not None}
            done = tokens = 0
            while self._waiting:
                self._llm._advance(self._ended)
                while self._ended:
                    active = self._ended.popleft()
                    output = active.output()
                    answers.setdefault(active.index, []).append(output)
                    del self._waiting[active.request_id]
                    done, tokens = done + 1, tokens + len(output.token_ids)
                if progress is not None:
                    progress.show(done, tokens)
            if progress is not None:
                progress.clear()
            return {index: first_of(its) for index, its in answers.items()}

    def close(self) -> None:
        """Ends what is unfinished; its pages return at the end of the running step at the latest. Waits for nothing."""
        self._closed = True
        self._llm._drop(list(self._waiting))

    def __enter__(self) -> Stream:  # noqa: PYI034 (typing.Self needs Python 3.11)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Bound early: at the end of a process modules lose their names before their objects are dropped.
    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():
            self.close()
