"""Errors raised by the Python side of dflash-rs.

Every message names the argument, option or file field, what was found there and what was expected.
Nothing is ever replaced by a default in silence.
"""

import sys
import warnings


class DflashError(Exception):
    """Base class of every error that dflash-rs raises on purpose."""


class InvalidArgument(DflashError, ValueError):
    """A caller passed a value that cannot be honoured exactly."""


class MissingPackage(DflashError, ImportError):
    """A package that is only needed for this is not installed, or cannot be imported."""


class OutOfPages(DflashError):
    """The KV page pool cannot hold what was asked of it, not even if nothing else ran."""


class CheckpointError(DflashError, ValueError):
    """A checkpoint on disk is damaged, incomplete, or does not fit the target model."""


class UnsupportedModel(DflashError, ValueError):
    """The model's architecture has a part that the engine does not run exactly."""


def warn(message: str) -> None:
    """A UserWarning that points at whoever called this package, however deep in it the reason was found."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)
