"""How long the stages of steps take, kept out of their text."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

STAGES = ("plan", "draft", "verify", "accept", "inject", "commit", "text")


class StageTimes:
    """Seconds that each stage took, in all (`total`) and in the step under way (`step`); `booked`: all of `total`."""

    def __init__(self) -> None:
        self.total = dict.fromkeys(STAGES, 0.0)
        self.step = dict.fromkeys(STAGES, 0.0)
        self.booked = 0.0

    def begin(self) -> None:
        """A step begins."""
        self.step = dict.fromkeys(STAGES, 0.0)

    def add(self, stage: str, seconds: float) -> None:
        self.total[stage] += seconds
        self.step[stage] += seconds
        self.booked += seconds


def stage(name: str) -> Callable[[_F], _F]:
    """A method that is a stage of a step, of an object with `times`. What it spends in a stage that it calls counts there only."""

    def decorate(method: _F) -> _F:
        @functools.wraps(method)
        def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
            times: StageTimes = self.times
            booked, begin = times.booked, time.perf_counter()
            try:
                return method(self, *args, **kwargs)
            finally:
                times.add(name, time.perf_counter() - begin - (times.booked - booked))

        return timed  # type: ignore[return-value]

    return decorate
