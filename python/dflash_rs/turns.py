"""One at a time: threads wait for each other, signal handlers and finalizers for nobody."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from .errors import DflashError

_T = TypeVar("_T")


class Turns:
    """Who may change an engine. `tidy` of a call does what others asked for while somebody had the turn.

    The lock is entered by ``with``, where no interruption falls between taking it and being sure to give it back. It knows its
    owner, so a call out of a signal handler in the middle of the same thread's turn is seen, and does not wait for itself.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._ending = False

    def mine(self) -> bool:
        """Whether this thread is in the middle of a turn."""
        return self._lock._is_owned()  # type: ignore[attr-defined]  # every RLock has it, typeshed does not

    def forked(self) -> bool:
        """Whether this is a child of the process that all this was made in."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Refuses a call that cannot have a turn."""
        # Threads, the GPU's context and whoever had a lock stay behind.
        if self.forked():
            raise DflashError(
                f"LLM: got a call in process {os.getpid()}, forked from {self._process} which made this LLM, expected one there: make a "
                "new LLM in the child, started by the method 'spawn' of multiprocessing"
            )

        if self._ending:
            if threading.current_thread() is not threading.main_thread():
                threading.Event().wait()  # a daemon thread, which ends with the process
            raise DflashError("LLM: got a call while its process ends, expected none")
        if self.mine():
            raise DflashError(
                "LLM: got a call in the middle of a step of the same thread, expected none but abort, close and stats: a signal handler "
                "may leave the rest to the program it came into"
            )

    def take(self, work: Callable[[], _T], tidy: Callable[[], None]) -> _T:
        """Waits for a turn and does `work` in it."""
        self.check()
        with self._lock:
            try:
                tidy()
                return work()
            finally:
                tidy()

    def end(self, patience_s: float) -> None:
        """Waits for the turn that somebody has, `patience_s` seconds at most, and lets nobody have another one: the process ends.

        A daemon thread in the middle of a step would be torn out of code that cannot be left that way.
        """
        if not self.forked() and not self.mine():
            self._ending = True
            self._lock.acquire(timeout=patience_s)

    def soon(self, tidy: Callable[[], None]) -> None:
        """Tidies up unless somebody has the turn, who then does so at its end. Waits for nothing, as finalizers must not."""
        if not self.forked() and not self.mine() and self._lock.acquire(blocking=False):
            try:
                tidy()
            finally:
                self._lock.release()
