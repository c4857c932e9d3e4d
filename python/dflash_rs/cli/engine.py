"""The engine as the command line asks for it."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any

from dflash_rs import known_models
from dflash_rs.arguments import shown_path
from dflash_rs.config import LOOKUP
from dflash_rs.errors import InvalidArgument, OutOfPages
from dflash_rs.options import pick_models


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
    if args.draft is not None and plain:
        raise InvalidArgument("--no-draft: got --draft, too; expected one of them")
    known = None if args.model is None else known_models.find(args.model)
    if args.model is not None and known is None and not os.path.exists(args.model):
        from dflash_rs.models.checkpoint.folder import is_hub_name

        # Whatever else is wrong, this is what has to be seen first.
        if not is_hub_name(args.model):
            raise InvalidArgument(f"--model: got {shown_path(args.model)}, and there is no such folder or file")
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
        "lookup",
        "adaptive",
        "page_size",
        "num_pages",
        "max_context",
        "max_running",
    )
    options = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if plain:
        options["draft"] = None
    if (
        args.model is None
        and args.matmul_precision is None
        and getattr(args, "suite", None) not in ("reference", "peers")
    ):
        options["matmul_precision"] = "auto"
    if args.model is None and args.threads is None:
        # Its matrices are small: two threads share a block's products well, more were never measured.
        options["threads"] = min(
            2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
    return LLM(**(options | more))


class Shared:
    """Engines of several drafters for the target that the command line names, whose weights are read once.

    A call gives the engine of a drafter (None: plain decoding), of so many requests at once, tokens of a block, drafts of a tree, and with look-up
    beside the drafter or without. Engines of the same drafter and kind of draft share their KV, so the last one has to be closed before the next is
    made; others may live beside it.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        # By drafter and kind of draft: (target, drafter, tokenizer, bytes of tokens), and where the models are.
        self._parts: dict[tuple[str | None, bool, bool], tuple[tuple[Any, Any, Any, Any], tuple[Any, Any]]] = {}

    def __call__(
        self, draft: str | None, max_running: int, block_size: int | None, tree_nodes: int, lookup: bool = False
    ) -> Any:
        key = (draft, tree_nodes > 0, lookup)
        own: dict[str, Any] = {"max_running": max_running, "prefix_cache": False}
        if key not in self._parts and not self._beside(key):
            llm = make_engine(self._asked(draft, block_size, tree_nodes), lookup=lookup, **own)
            self._parts[key] = (
                (llm._target, llm._draft, llm.tokenizer, llm._bytes),
                (llm.model_dir, llm.draft_dir),
            )
            return llm
        from dflash_rs.llm import LLM

        (target, drafter, tokenizer, token_bytes), places = self._parts[key]
        names = ("adaptive", "page_size", "num_pages", "max_context")
        given: dict[str, Any] = {name: value for name in names if (value := getattr(self._args, name)) is not None}
        llm = LLM.from_parts(
            target,
            drafter,
            tokenizer=tokenizer,
            token_bytes=token_bytes,
            block_size=block_size,
            tree_nodes=tree_nodes,
            lookup=lookup,
            **given,
            **own,
        )
        llm.model_dir, llm.draft_dir = places
        return llm

    def _asked(self, draft: str | None, block_size: int | None, tree_nodes: int) -> argparse.Namespace:
        given = {"draft": draft, "no_draft": draft is None, "block_size": block_size, "tree_nodes": tree_nodes or None}
        return argparse.Namespace(**{**vars(self._args), **given})

    def _beside(self, key: tuple[str | None, bool, bool]) -> bool:
        """Prepares an engine over the weights that are there; False where there are none yet, or they cannot be shared."""
        if not self._parts:
            return False
        (target, _, tokenizer, token_bytes), (model_dir, _) = next(iter(self._parts.values()))
        if target.state is not None or not hasattr(target, "twin"):
            return False
        _, place = pick_models(self._args.model, key[0])
        twin, drafter = target.twin(), None
        if place == LOOKUP:
            from dflash_rs.models.lookup import LookUp

            drafter = LookUp()
        elif place is not None:
            from dflash_rs.models.loader import load_draft

            drafter = load_draft(place, twin, matmul_precision=target.matmul_precision)
        self._parts[key] = (
            (twin, drafter, tokenizer, token_bytes),
            (model_dir, None if place is None else str(place)),
        )
        return True


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
