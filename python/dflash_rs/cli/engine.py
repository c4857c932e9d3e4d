"""The engine as the command line asks for it."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any

from dflash_rs import known_models
from dflash_rs.config import LOOKUP
from dflash_rs.errors import InvalidArgument, OutOfPages


def prepare_libraries() -> None:
    """Keeps the loaders' progress bars and notes out of our streams, and torch's threads from waiting awake for long. Only works
    before their first import."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Turns of a loop: about half a millisecond. Left alone it is sixteen of them at every operation whose threads are not all
        # there, which on a busy machine is nearly every one.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def make_engine(args: argparse.Namespace, **more: Any) -> Any:
    """`dflash_rs.LLM` with the options that were given; its own defaults hold for the others."""
    plain = getattr(args, "no_draft", False)
    if args.draft not in (None, "auto", LOOKUP) and args.model is None:
        raise InvalidArgument("--draft: got a drafter without --model; a drafter belongs to one target")
    if args.draft is not None and plain:
        raise InvalidArgument("--no-draft: got --draft, too; expected one of them")
    known = None if args.model is None else known_models.find(args.model)
    if args.model is not None and args.draft is None and not plain and (known is None or known.drafter is None):
        raise InvalidArgument(
            "--model: got a target without a drafter, expected --draft PATH, --draft lookup or --no-draft, too"
        )
    from dflash_rs.llm import LLM

    names = (
        "model",
        "draft",
        "device",
        "dtype",
        "matmul_precision",
        "threads",
        "block_size",
        "tree_nodes",
        "adaptive",
        "page_size",
        "num_pages",
        "max_context",
        "max_running",
    )
    options = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if plain:
        options["draft"] = None
    if args.model is None and args.matmul_precision is None and getattr(args, "suite", None) != "reference":
        options["matmul_precision"] = "auto"
    if args.model is None and args.threads is None:
        # Its matrices are small: two threads share a block's products well, more were never measured.
        options["threads"] = min(
            2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
    return LLM(**(options | more))


def called(index: int, prompts: Sequence[Any]) -> str:
    """How messages call a prompt: by its number, and by where it stands if that is elsewhere."""
    where = prompts[index].where
    return f"prompt {index + 1}" + (f" ({where})" if where else "")


def begin(llm: Any, prompts: Sequence[Any], params: Any) -> Any:
    """The events of all prompts. A prompt that cannot be taken is an error that names it."""
    try:
        return llm.stream([prompt.text for prompt in prompts], params)
    except (InvalidArgument, OutOfPages) as error:
        # One that comes of a prompt alone is about that prompt, unless it is about an option.
        for i, prompt in enumerate(prompts):
            try:
                llm.stream([prompt.text], params).close()
            except type(error) as alone:
                own = re.match(r"prompts?(\[\d+\])?: ", str(alone))
                if own or isinstance(alone, OutOfPages):
                    said = str(alone)[own.end() if own else 0 :]
                    raise type(error)(f"{called(i, prompts)}: {said}") from None
        raise
