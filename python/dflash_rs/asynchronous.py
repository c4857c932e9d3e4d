"""An engine for asyncio: tasks wait for events, one thread takes the steps for all of them, so tasks share batches.

    task ── open ──> thread: submits, then step after step while anybody waits ──> events ──> the task's own loop

Submissions and steps take turns in the thread, so no task waits for more than a step to be let in. The thread begins with the first task and
ends when nobody waits.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from .outputs import Output, StreamEvent, first_of
from .streams import Stream


class _Served:
    """A stream of the thread's, and the task that it is for."""

    def __init__(self, begin: Callable[[], Stream], loop: asyncio.AbstractEventLoop):
        self.begin, self.loop = begin, loop
        # Events, then an error or None for the end.
        self.arrived: asyncio.Queue[StreamEvent | BaseException | None] = asyncio.Queue()
        self.stream: Stream | None = None
        self.closed = False

    def close(self) -> None:
        self.closed = True
        if self.stream is not None:
            self.stream.close()

    def tell(self, arrived: Sequence[StreamEvent | BaseException | None]) -> bool:
        """Sends events, an error or the end to the task; False when nobody is there to hear of it."""

        def put() -> None:
            for one in arrived:
                self.arrived.put_nowait(one)

        try:
            self.loop.call_soon_threadsafe(put)
        except RuntimeError:  # the loop is closed
            return False
        return not self.closed


class AsyncStream(AsyncIterator[StreamEvent]):
    """The events of one `LLM.astream`, for ``async for``. It begins when the first one is asked for.

    Closing it, leaving its ``async with`` block, dropping it, or cancelling the task that waits for an event ends what is unfinished.
    """

    def __init__(self, driver: Driver, begin: Callable[[], Stream]):
        self._driver, self._begin = driver, begin
        self._served: _Served | None = None
        self._closed = False

    async def __anext__(self) -> StreamEvent:
        if self._closed:
            raise StopAsyncIteration
        if self._served is None:
            self._served = _Served(self._begin, asyncio.get_running_loop())
            self._driver.open(self._served)
        queue = self._served.arrived
        try:
            arrived = await queue.get()
        except asyncio.CancelledError:
            self.close()
            raise
        if isinstance(arrived, StreamEvent):
            return arrived
        # Whoever asks again, or beside, hears of the end as well.
        queue.put_nowait(None)
        if arrived is None:
            raise StopAsyncIteration
        raise arrived

    def close(self) -> None:
        """Ends what is unfinished, at the end of the running step at the latest. Waits for nothing; of the task's own thread."""
        self._closed = True
        if self._served is not None:
            self._served.close()
            self._served.arrived.put_nowait(None)

    async def aclose(self) -> None:
        """The same, as ``contextlib.aclosing`` calls it."""
        self.close()

    async def __aenter__(self) -> AsyncStream:  # noqa: PYI034 (typing.Self needs Python 3.11)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    # Bound early: at the end of a process modules lose their names before their objects are dropped.
    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # Nobody waits any more, and the garbage collector may come from any thread.
        if self._served is not None and not ending():
            self._served.close()


class Driver:
    """The thread that serves the tasks of an `LLM`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opening: deque[_Served] = deque()
        self._running = False

    def open(self, one: _Served) -> None:
        """Serves a stream from now on."""
        with self._lock:
            self._opening.append(one)
            if not self._running:
                self._running = True
                threading.Thread(target=self._serve, name="dflash-rs asyncio", daemon=True).start()

    def _serve(self) -> None:
        served: list[tuple[_Served, Stream]] = []
        while True:
            with self._lock:
                opening = list(self._opening)
                self._opening.clear()
                if not opening and not served:
                    self._running = False
                    return
            served += [(one, stream) for one in opening if (stream := _submit(one)) is not None]
            del opening
            if served:
                served = _step(served)


def _submit(one: _Served) -> Stream | None:
    if one.closed:
        return None
    try:
        stream = one.stream = one.begin()
    except BaseException as error:  # the task's to handle
        one.tell([error])
        return None
    refused = list(stream._events)
    stream._events.clear()
    # Closed in between, it has not closed what was not there.
    if not one.tell(refused):
        stream.close()
    return stream


def _step(served: list[tuple[_Served, Stream]]) -> list[tuple[_Served, Stream]]:
    """Takes a step for these, unless there is news already; gives those that go on."""
    try:
        news = served[0][1]._llm._ready_for([stream._waiting for _, stream in served])
    except BaseException as error:  # the tasks' to handle
        for one, stream in served:
            stream.close()
            one.tell([error])
        return []
    going = []
    for (one, stream), events in zip(served, news):
        ended = not stream._waiting
        if (events or ended) and not one.tell([*events, None] if ended else events):
            stream.close()
        if not ended:
            going.append((one, stream))
    return going


class AsyncCalls:
    """What an `LLM` has for asyncio. The arguments are those of the calls of the same names without the a."""

    stream: Any
    stream_chat: Any
    _driver: Driver

    def astream(self, *args: Any, **options: Any) -> AsyncStream:
        """`stream` for asyncio: ``async for event in llm.astream(prompts, params)``. Many tasks share batches; cancelling one ends its requests."""
        return AsyncStream(self._driver, lambda: self.stream(*args, **options))

    async def agenerate(self, *args: Any, **options: Any) -> list[Output]:
        """`generate` for asyncio: ``await llm.agenerate(prompts, params)``. Cancelling the task ends its requests."""
        return await _whole(self.astream(*args, **options))

    def astream_chat(self, *args: Any, **options: Any) -> AsyncStream:
        """`stream_chat` for asyncio."""
        return AsyncStream(self._driver, lambda: self.stream_chat(*args, **options))

    async def achat(self, *args: Any, **options: Any) -> list[Output]:
        """`chat` for asyncio."""
        return await _whole(self.astream_chat(*args, **options))


async def _whole(events: AsyncStream) -> list[Output]:
    answers: dict[int, list[Output]] = {}
    async with events:
        async for event in events:
            if event.output is not None:
                answers.setdefault(event.index, []).append(event.output)
    return [first_of(answers[index]) for index in sorted(answers)]
