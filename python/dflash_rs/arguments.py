"""Whole numbers as callers write them: Python's, NumPy's, or anything else that can index a list."""

from __future__ import annotations

import operator
from typing import Any

from .errors import InvalidArgument


def integer(name: str, value: Any, low: int, high: int | None = None, *, expected: str | None = None) -> int:
    """`value` as an int in `low..high`; a truth value is none. Raises InvalidArgument naming the argument."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        raise InvalidArgument(f"{name}: got {value!r}, expected {expected or f'an integer in {low}..{high}'}")
    return number
