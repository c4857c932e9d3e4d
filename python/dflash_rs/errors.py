"""The errors that dflash_rs raises on purpose. Anything else that escapes is a bug."""

from __future__ import annotations


class DflashError(Exception):
    """Base of every error raised on purpose by this package."""


class InvalidArgument(DflashError, ValueError):
    """An argument outside its documented domain: the message names it, what was got and what is accepted."""


class OutOfPages(DflashError):
    """A request that cannot fit into the KV pool even when it runs alone."""


class CheckpointError(DflashError):
    """A checkpoint that is missing, truncated, or does not fit the other model of the pair."""
