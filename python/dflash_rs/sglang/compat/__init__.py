"""Which versions of SGLang are served, and whether the installed one is one of them.

The worker overrides private methods of SGLang's DFLASH worker, so a version is served only after the tests have run on it. What
DFLASH_RS needs of SGLang is one class, ``seams.Seams``; each served version has a file that says how it does what versions do
differently:

    SERVED ──> v0_5_23.py, v0_5_17.py ──> installed() ──> what the rest of dflash_rs.sglang asks

To drop a version delete its row and its file; to add one write a file and a row, and run the tests on it. ``check`` compares the
version and every name the worker leans on, and says what is wrong before a model is loaded.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

from dflash_rs.errors import DflashError
from dflash_rs.sglang.compat import seams

# SGLang's version, and the file of this folder that serves it; rising.
SERVED = {
    "0.5.17": "v0_5_17",
    "0.5.23": "v0_5_23",
}

TESTED = tuple(SERVED)
INSTALL = f"pip install sglang=={TESTED[-1]}"


class UnsupportedSGLang(DflashError):
    """This SGLang is not one the worker is known to fit."""


def version() -> str | None:
    """SGLang's version, or None where it is not installed."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def served_as(have: str) -> str:
    """The served version whose file fits `have`: itself, or for one that was not tested the last one before it, else the oldest."""
    if have in SERVED:
        return have

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)[:3]]

    return next((tested for tested in reversed(TESTED) if numbers(tested) <= numbers(have)), TESTED[0])


@cache
def installed() -> seams.Seams:
    """The seams of the installed SGLang. Imports nothing of it yet.

    Raises UnsupportedSGLang where there is none.
    """
    have = version()
    if have is None:
        raise UnsupportedSGLang(f"sglang: not installed, expected one of {', '.join(TESTED)}")
    return importlib.import_module(f"{__name__}.{SERVED[served_as(have)]}").Version()


def problems() -> list[str]:
    """What the installed SGLang lacks of what the worker leans on, in words; empty when it fits."""
    have = version()
    if have is None:
        return ["sglang: not installed, expected one of " + ", ".join(TESTED)]
    here = installed()
    try:
        if found := here.lacking():
            return found
        worker = here.worker_class()
        here.draft_input_class()
        from sglang.srt.layers import sampler
    except ImportError as error:
        return [f"sglang {have}: its DFLASH worker cannot be imported ({error})"]
    for name, expected in seams.METHODS.items():
        method = getattr(worker, name, None)
        if method is None:
            found.append(f"DFlashWorkerV2.{name}: not there")
            continue
        missing = [p for p in expected if p not in inspect.signature(method).parameters]
        if missing:
            found.append(f"DFlashWorkerV2.{name}: no parameter {', '.join(missing)}")
    if not hasattr(sampler.Sampler, "_preprocess_logits"):
        found.append("Sampler._preprocess_logits: not there")
    if not hasattr(sampler, "murmur_hash32"):
        found.append("sampler.murmur_hash32: not there")
    return found


def check(allow_untested: bool) -> None:
    """Raises UnsupportedSGLang unless this version was tested, or fits and `allow_untested` is set."""
    have = version()
    if have not in TESTED and not allow_untested:
        raise UnsupportedSGLang(
            f"sglang: got version {have}, tested with {', '.join(TESTED)}; install one of those, or set "
            '"allow_untested_sglang": true in DFLASH_RS_CONFIG'
        )
    if found := problems():
        raise UnsupportedSGLang(f"sglang {have} does not fit DFLASH_RS: " + "; ".join(found))


def hook(ours: Callable[[], bool], refusal: Callable[[Any], str | None]) -> None:
    """Has SGLang ask us first where its own answer would not do for this algorithm, which is the server's if `ours()`.

    `refusal(req)` returns a text to refuse a request with, or None.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name, around in installed().hooks(ours, refusal).items():
        HookRegistry.register(name, around, HookType.AROUND)


def not_hooked() -> list[str]:
    """Which of the hooks SGLang could not apply; it logs that and goes on."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from dflash_rs.sglang import requests

    wanted = installed().hooks(requests.ours, requests.refusal)
    return [name for name in wanted if name not in HookRegistry._patched]
