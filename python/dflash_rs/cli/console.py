"""What the commands read from and write to: the three standard streams, the exit codes, and how a mistake is told."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

from dflash_rs.errors import DflashError, InvalidArgument

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Unwritable(DflashError):
    """Standard output takes no more: the disk is full, for example."""


def warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Shows a warning: stands in for `warnings.showwarning`."""
    say(f"dflash-rs: warning: {message}")


def say(message: str) -> None:
    """Writes a line to standard error."""
    # Ctrl-C ends the reader of a pipe, too, and what is left to say must not change the exit code.
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        settle(sys.stderr)


def complain(message: str, code: int, debug: bool = False) -> int:
    """Tells of an error, with `debug` of the traceback, too, and returns `code`."""
    say((traceback.format_exc() if debug else "") + f"dflash-rs: error: {message}")
    return code


def crash(error: Exception, debug: bool) -> int:
    """Tells of an error that nobody foresaw."""
    advice = "" if debug else "\nRun the same command with --debug for the traceback."
    return complain(f"{type(error).__name__}: {error}{advice}", FAILED, debug)


def prepare_streams() -> set[str]:
    """Makes the three standard streams safe to use, and returns the names of those that the caller had closed.

    A descriptor that is free would be given to the next file that is opened, and then be written to by whoever means the
    stream. And no character that a terminal cannot show may end the command.
    """
    closed = {name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None}
    if closed:
        while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(free)
    for name in closed:
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return closed


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Has what is written to standard output within arrive: whoever reads along sees it now."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unwritable(f"standard output: {error.strerror or error}") from None


def emit(text: str) -> None:
    """Writes to standard output, at once."""
    with writing():
        sys.stdout.write(text)


def settle(*streams: TextIO) -> None:
    """Has these streams flushed, or, where nobody takes it, what they hold and what comes go nowhere: the interpreter flushes
    them when it exits, and answers a failure with a traceback and a code of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def as_text(name: str, text: str) -> str:
    """A word of the command line, whose bytes are taken for UTF-8 where the locale could not read them."""
    if text.isascii() or not re.search("[\ud800-\udfff]", text):
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{name}: got bytes that are not UTF-8 (byte {error.start}), expected text") from None


def decoding(stdin: TextIO) -> None:
    """Has standard input read in the locale's encoding, where that is more than ASCII, else as UTF-8."""
    if isinstance(stdin, io.TextIOWrapper):
        own = codecs.lookup(stdin.encoding).name
        stdin.reconfigure(encoding="utf-8" if own == "ascii" else own, errors="strict")


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        kind = error.encoding.upper()
        raise InvalidArgument(
            f"{name}: got standard input that is not {kind} (byte {error.start}), expected text"
        ) from None
    except OSError as error:  # a folder, for example
        raise InvalidArgument(f"{name}: standard input cannot be read: {error.strerror or error}") from None


def read_all(stdin: TextIO) -> str:
    """The text on standard input; in the locale's encoding, where that is more than ASCII, else UTF-8."""
    decoding(stdin)
    with _reading("PROMPT"):
        return stdin.read().removeprefix("\ufeff")


def read_line(stdin: TextIO) -> str:
    """The next line of standard input with its end, in the same encoding; empty when there is none."""
    with _reading("message"):
        return stdin.readline()
