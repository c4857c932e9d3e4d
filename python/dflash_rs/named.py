"""Errors about arguments of the wrong kind, told by a function's own annotations."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar

from .arguments import bad
from .errors import InvalidArgument

_F = TypeVar("_F", bound=Callable[..., Any])


def named(function: _F) -> _F:
    """Makes what fails inside `function` because of an argument's kind an InvalidArgument that names it, by the function's own
    annotations. Nothing is looked at where nothing fails: for functions that are called for every layer."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
            refusal = _refusal(function, args, kwargs, error)
            if refusal is None:
                raise
            raise refusal from error

    return typing.cast(_F, call)


def _refusal(function: Callable[..., Any], args: Any, kwargs: Any, error: Exception) -> InvalidArgument | None:
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:
        return None  # arguments that are missing or unknown, and Python has said which
    hints = typing.get_type_hints(function)
    for name, value in given.items():
        wrong = _misfit(name, value, hints[name])
        if wrong is not None:
            return wrong
    # A tensor without dimensions, of which the first was asked for.
    for name, value in given.items():
        if isinstance(error, IndexError) and getattr(value, "shape", None) == ():
            return bad(name, value, "a tensor with dimensions")
    return None


def _misfit(name: str, value: Any, hint: Any) -> InvalidArgument | None:
    """What is wrong with `value` for an argument that is annotated so."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if not any(_is_a(value, kind) for kind in kinds):
        return bad(name, value, " or ".join(_kind(kind) for kind in kinds))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        inner = typing.get_type_hints(type(value))
        misfits = (_misfit(f"{name}.{field}", getattr(value, field), inner[field]) for field in value._fields)
        return next((misfit for misfit in misfits if misfit is not None), None)
    return None


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, Real if kind is float else int) and not isinstance(value, bool)
    origin = typing.get_origin(kind)
    if origin is None:
        return isinstance(value, kind)
    return (
        isinstance(value, origin)
        and not isinstance(value, str)
        and all(isinstance(entry, typing.get_args(kind)[:1]) for entry in value)
    )


def _kind(kind: Any) -> str:
    words = {int: "an integer", float: "a number", bool: "True or False", str: "a name", type(None): "None"}
    if typing.get_origin(kind) is not None:
        return f"a list of {typing.get_args(kind)[0].__name__}s"
    return words.get(kind) or f"a {kind.__module__}.{kind.__name__}"
