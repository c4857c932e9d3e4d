"""JSON files of a checkpoint, and the one kind of error that everything about a checkpoint becomes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, DflashError

CONFIG, GENERATION = "config.json", "generation_config.json"
# Indices of the largest checkpoints have some ten megabytes, tokenizers some thirty.
_MOST_JSON_BYTES = 256 << 20


def short(value: Any) -> str:
    """`repr` of a value of a file, cut where it would fill the screen."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, brackets in brackets
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else text[:97] + "..."


def short_reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    if not lines:
        return "no reason given"
    # A heading says less than what stands under it.
    return (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])[:300]


def some(names: list[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_json(file: Path, missing: str) -> Any:
    """The value in a JSON file. Raises CheckpointError naming it; `missing` says what was expected where there is none."""
    try:
        if not file.exists():
            raise CheckpointError(f"{file}: not found, expected {missing}")
        if not file.is_file() or file.stat().st_size > _MOST_JSON_BYTES:
            raise CheckpointError(f"{file}: expected a file of at most {_MOST_JSON_BYTES >> 20} MiB")
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(f"{file}: not readable as JSON (brackets are nested too deeply)") from None
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not readable as JSON ({short_reason(error)})") from None


def read_object(file: Path, missing: str) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError."""
    value = read_json(file, missing)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: got a {type(value).__name__}, expected an object")
    return value


@contextlib.contextmanager
def readable(path: str | Path, what: str = "target") -> Iterator[None]:
    """Turns whatever is raised about the checkpoint at `path` into one CheckpointError; our own errors stay what they are."""
    try:
        yield
    except DflashError:
        raise
    except BaseException as error:
        # A panic of the tokenizers library is no Exception, but no wish to end the program either.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = short_reason(error)
        if isinstance(error, ImportError):
            raise CheckpointError(f"{what} {path}: needs a package that is not installed ({reason})") from error
        raise CheckpointError(f"{what} {path}: cannot be loaded ({type(error).__name__}: {reason})") from error
