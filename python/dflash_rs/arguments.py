"""What callers write, checked and shown: every message is ``name: got X, expected Y``, and X is short whatever was passed.

Integers are expected ``in 0..31``, both ends included; real numbers in an interval, ``[0, 1)``.
"""

from __future__ import annotations

import math
import operator
import os
import reprlib
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any

from .errors import InvalidArgument

# Longer than this, what was passed tells less than what it is.
_LONG = 80
# Larger numbers are none for a processor.
_MOST = sys.float_info.max
_MOST_ENTRIES = 1 << 26


class _Short(reprlib.Repr):
    """Python's own way of writing values, of a few entries and of two levels; arrays and the like by their kind."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = self.maxarray = (
            self.maxdict
        ) = 4
        self.maxstring, self.maxother = 40, 60

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write more than a few thousand digits.
        return f"an integer of {value.bit_length()} bits" if value.bit_length() > 128 else repr(value)

    def repr_bytes(self, value: bytes | bytearray, level: int) -> str:
        return repr(value) if len(value) <= self.maxstring else f"{bytes(value[: self.maxstring])!r}..."

    repr_bytearray = repr_bytes

    def repr_ndarray(self, value: Any, level: int) -> str:
        return f"a {value.dtype} array of shape {tuple(value.shape)}"

    def repr_Tensor(self, value: Any, level: int) -> str:  # noqa: N802 (named after the class)
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"

    def repr_instance(self, value: Any, level: int) -> str:
        if type(value).__repr__ is object.__repr__:
            return f"a {type(value).__name__}"
        return super().repr_instance(value, level)


_SHORT = _Short()


def shown(value: Any) -> str:
    """`value` as Python writes it, shortened to a line that fits into a message."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # whatever a class does when it is asked to write itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."


def bad(name: str, got: Any, expected: str) -> InvalidArgument:
    """The error about an argument that is not what is expected."""
    return InvalidArgument(f"{name}: got {shown(got)}, expected {expected}")


def shown_path(path: Any) -> str:
    """A path as messages have it: one that is empty is seen to be."""
    return str(path) or "''"


def integer(name: str, value: Any, low: int, high: int | None = None, *, expected: str | None = None) -> int:
    """`value` as an int in `low..high`: Python's, NumPy's, or anything else that can index a list; a truth value is none.

    Raises InvalidArgument naming the argument.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        among = f"of at least {low}" if high is None else f"in {low}..{high}"
        raise bad(name, value, expected or f"an integer {among}")
    return number


def real(name: str, value: Any, low: float, high: float, *, expected: str | None = None) -> float:
    """`value` as a float in `[low, high]`; a truth value is no number. Raises InvalidArgument naming the argument."""
    # NumPy's numbers would be compared in their own, narrower type.
    number: Any = value.item() if isinstance(value, Real) and hasattr(value, "item") else value
    good = isinstance(number, Real) and not isinstance(number, bool)
    if good and low <= number <= high and abs(number) <= _MOST:
        return float(number)
    above = f"of at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
    raise bad(name, value, expected or f"a number {above}")


def is_list(value: Any) -> bool:
    """Whether `value` is a list or the like, of a length that can be meant: ``range(2**60)`` is none that anything can be done with."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        return False
    try:
        return len(value) <= _MOST_ENTRIES
    except OverflowError:
        return False


def flag(name: str, value: Any) -> bool:
    """`value` if it is True or False. Raises InvalidArgument naming the argument."""
    if not isinstance(value, bool):
        raise bad(name, value, "True or False")
    return value


def one_name(name: str, value: Any, other: Any) -> Any:
    """An argument that also goes by another name, ``sampling_`` and its own."""
    if value is not None and other is not None:
        raise InvalidArgument(f"sampling_{name}: got it beside {name}, expected one of them")
    return other if value is None else value


def thread_count(name: str, value: Any) -> int:
    """`value` as a number of threads that this machine has processors for: OpenMP crashes where it cannot start as many."""
    most = os.cpu_count() or 1
    return integer(name, value, 1, most, expected=f"an integer in 1..{most}, the processors of this machine")
