"""The options of ``DFLASH_RS_CONFIG``: JSON, inline or a path to a file.

SGLang's own flags keep their meaning; only what SGLang has no flag for is here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dflash_rs.errors import InvalidArgument

VARIABLE = "DFLASH_RS_CONFIG"
MOST_PASSES = 2**31 - 1
# More drafts of a tree than this no kernel of this package takes.
MOST_NODES = 1023


@dataclass(frozen=True)
class Options:
    """What can be set.

    - `alarm_tau`: warn when tokens per target pass, over the last `alarm_passes` passes, are at most this; 0 never warns.
      1 is plain decoding: drafts that are never accepted cost time and gain nothing.
    - `alarm_passes`: how many passes of single requests one look at the acceptance covers.
    - `metrics`: counters for Prometheus (they appear where SGLang's own do, with --enable-metrics).
    - `kernels`: on a GPU, this package's CUDA kernels for the walk and for draft K and V; false leaves both to SGLang's.
    - `adaptive`: before each step choose how many tokens of a block are drafted and verified, a plain step and a tree included, by what steps
      take and how many drafts are accepted. False drafts and verifies whole blocks, or trees; None is true on a CPU and false elsewhere. "cycle" takes
      the widths in turn, for tests.
    - `widths`: what to choose from, tokens per request with the anchor counted; None is 1, 2, 4 and so on, and the block.
    - `tree_nodes`: most drafts of a tree that is verified in one pass, at least as many tokens as the block has; 0 verifies one chain of drafts.
    - `max_drafts`: most drafts of a request that are accepted in one pass, where the request does not say it itself; 0 decodes plainly, None does not
      limit.
    - `max_draft_context`: requests whose prompt and output are longer than this many tokens draft nothing more; None does not limit.
    - `coupled`: draft for requests that sample by the random numbers that their tokens will be drawn with; false drafts the likeliest.
    - `probe`: when the server warms up, answer a few built-in prompts and say in the log what the drafter is worth here.
    - `allow_untested_sglang`: run on an SGLang version that the tests have not seen, if its seams look right.
    """

    alarm_tau: float = 1.05
    alarm_passes: int = 4096
    metrics: bool = True
    kernels: bool = True
    adaptive: bool | str | None = None
    widths: Sequence[int] | None = None
    tree_nodes: int = 0
    max_drafts: int | None = None
    max_draft_context: int | None = None
    coupled: bool = True
    probe: bool = True
    allow_untested_sglang: bool = False

    def __post_init__(self) -> None:
        tau = self.alarm_tau
        if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 <= tau < float("inf"):
            raise _bad("alarm_tau", tau, "a finite number of at least 0")
        passes = self.alarm_passes
        if isinstance(passes, bool) or not isinstance(passes, int) or not 1 <= passes <= MOST_PASSES:
            raise _bad("alarm_passes", passes, f"an integer of at least 1 and at most {MOST_PASSES}")
        for name in ("max_drafts", "max_draft_context"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise _bad(name, value, "an integer of at least 0")
        nodes = self.tree_nodes
        if isinstance(nodes, bool) or not isinstance(nodes, int) or not 0 <= nodes <= MOST_NODES:
            raise _bad("tree_nodes", nodes, f"an integer of at least 0 and at most {MOST_NODES}")
        for name in ("metrics", "kernels", "coupled", "probe", "allow_untested_sglang"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "true or false")
        if not isinstance(self.adaptive, bool) and self.adaptive not in (None, "cycle"):
            raise _bad("adaptive", self.adaptive, 'true, false or "cycle"')
        if self.widths is not None:
            self._check_widths()

    def _check_widths(self) -> None:
        widths = self.widths
        if (
            not isinstance(widths, list | tuple)
            or not widths
            or any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths)
        ):
            raise _bad("widths", widths, "a list of integers of at least 1")
        if len(set(widths)) < len(widths):
            raise _bad("widths", widths, "each width once")
        if self.adaptive is False:
            raise _bad("widths", widths, 'none with "adaptive": false')
        object.__setattr__(self, "widths", tuple(sorted(widths)))

    def widths_of(self, block: int) -> tuple[int, ...]:
        """The widths to choose from with blocks of this many tokens, rising; a step that has the tokens of a tree verifies one.

        Raises InvalidArgument when `widths` has one that is larger than the block, or a tree fewer drafts than the block has tokens.
        """
        trees = () if not self.tree_nodes else (self.tree_nodes + 1,)
        if trees and self.tree_nodes < block:
            raise _bad("tree_nodes", self.tree_nodes, f"at least the block, {block}")
        if self.adaptive is False:
            return trees or (block,)
        if self.widths is None:
            return (*(w for w in (1 << n for n in range(block.bit_length())) if w < block), block, *trees)
        if self.widths[-1] > block:
            raise _bad("widths", list(self.widths), f"at most the block, {block}")
        return (*self.widths, *trees)


def parse(text: str | None) -> Options:
    """Options from the variable's value; empty or None means the defaults.

    Raises InvalidArgument naming the option, what was got and what was expected.
    """
    text = (text or "").strip()
    if not text:
        return Options()
    if not text.startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            if _is_json(text):
                raise InvalidArgument(f"{VARIABLE}: got {text[:80]}, expected an object") from error
            raise InvalidArgument(
                f"{VARIABLE}: got {text!r}, expected a JSON object or a path to one ({error.strerror})"
            ) from error
    try:
        given: Any = json.loads(text, object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{VARIABLE}: not JSON: {error}") from error
    if not isinstance(given, dict):
        raise InvalidArgument(f"{VARIABLE}: got {text.strip()[:80]}, expected an object")
    known = [field.name for field in fields(Options)]
    if unknown := sorted(set(given) - set(known)):
        raise InvalidArgument(f"{VARIABLE}: unknown option {', '.join(unknown)}; known are {', '.join(known)}")
    return Options(**given)


def load() -> Options:
    """Options from the environment."""
    return parse(os.environ.get(VARIABLE))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidArgument(f"{VARIABLE}: {', '.join(twice)}: given more than once, expected once")
    return dict(pairs)


def _bad(name: str, got: Any, expected: str) -> InvalidArgument:
    return InvalidArgument(f"{VARIABLE}: {name}: got {got!r}, expected {expected}")
