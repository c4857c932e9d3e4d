"""The options of ``DFLASH_RS_CONFIG``: JSON, inline or a path to a file.

SGLang's own flags keep their meaning; only what SGLang has no flag for is here.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dflash_rs.errors import InvalidArgument

VARIABLE = "DFLASH_RS_CONFIG"


@dataclass(frozen=True)
class Options:
    """What can be set.

    - `alarm_tau`: warn when tokens per target pass, over the last `alarm_passes` passes, are at most this; 0 never warns.
      1 is plain decoding: drafts that are never accepted cost time and gain nothing.
    - `alarm_passes`: how many passes of single requests one look at the acceptance covers.
    - `metrics`: counters for Prometheus (they appear where SGLang's own do, with --enable-metrics).
    - `kernels`: on a GPU, this package's CUDA kernels for the walk and for draft K and V; false leaves both to SGLang's.
    - `allow_untested_sglang`: run on an SGLang version that the tests have not seen, if its seams look right.
    """

    alarm_tau: float = 1.05
    alarm_passes: int = 4096
    metrics: bool = True
    kernels: bool = True
    allow_untested_sglang: bool = False

    def __post_init__(self) -> None:
        tau = self.alarm_tau
        if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 <= tau < float("inf"):
            raise _bad("alarm_tau", tau, "a finite number of at least 0")
        passes = self.alarm_passes
        if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
            raise _bad("alarm_passes", passes, "an integer of at least 1")
        for name in ("metrics", "kernels", "allow_untested_sglang"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "true or false")


def parse(text: str | None) -> Options:
    """Options from the variable's value; empty or None means the defaults.

    Raises InvalidArgument naming the option, what was got and what was expected.
    """
    text = (text or "").strip()
    if not text:
        return Options()
    if not text.startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidArgument(
                f"{VARIABLE}: got {text!r}, expected a JSON object or a path to one ({error.strerror})"
            ) from error
    try:
        given: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{VARIABLE}: not JSON: {error}") from error
    if not isinstance(given, dict):
        raise InvalidArgument(f"{VARIABLE}: got {type(given).__name__}, expected a JSON object")
    known = [field.name for field in fields(Options)]
    if unknown := sorted(set(given) - set(known)):
        raise InvalidArgument(f"{VARIABLE}: unknown option {', '.join(unknown)}; known are {', '.join(known)}")
    return Options(**given)


def load() -> Options:
    """Options from the environment."""
    return parse(os.environ.get(VARIABLE))


def _bad(name: str, got: Any, expected: str) -> InvalidArgument:
    return InvalidArgument(f"{VARIABLE}: {name}: got {got!r}, expected {expected}")
