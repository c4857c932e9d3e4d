"""The command that installs this package with an extra, as it works here: from an index, or from the clone that it was built in."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

_OURS = re.compile(r'^name = "dflash-rs"$', re.MULTILINE)


def install(extra: str | None = None, options: str = "") -> str:
    """``pip install`` with these options and the extra of this name, for a message that says what is missing."""
    clone, wanted = _clone(), f"[{extra}]" if extra else ""
    if clone is None:
        package = f"dflash-rs{wanted}"
    else:
        package = f"{'.' if clone == _here() else clone}{wanted}"
    return " ".join(("pip install", *options.split(), shlex.quote(package)))


def clone() -> bool:
    """Whether this package comes from a clone that is still there."""
    return _clone() is not None


def _clone() -> Path | None:
    """The folder of the sources that this was installed from, that its virtual environment lies in, or that the command is called in: an index
    may have no such package, or another version."""
    for place in _places():
        for folder in (place, *place.parents):
            try:
                if _OURS.search((folder / "pyproject.toml").read_text(encoding="utf-8")):
                    return folder
            except (OSError, ValueError):
                continue
    return None


def _places() -> Iterator[Path]:
    try:
        # What pip keeps of a package that came from a folder or a file (PEP 610).
        url = urlsplit(
            json.loads(metadata.distribution("dflash-rs").read_text("direct_url.json") or "{}").get("url", "")
        )
        if url.scheme == "file":
            yield Path(unquote(url.path))
    except (metadata.PackageNotFoundError, ValueError):
        pass
    yield Path(sys.prefix)
    if (here := _here()) is not None:
        yield here


def _here() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # removed under our feet
        return None
