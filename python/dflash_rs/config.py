"""Sizes of an engine, and where the bundled pair lives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ._core import Planner
from .arguments import bad, flag, integer, real
from .errors import InvalidArgument

# What `draft` is called that is no checkpoint: a `str` of this and nothing else.
LOOKUP = "lookup"
# Candidates per position that a tree is made of. With the bundled pair the target's token is among the first four in 0.91 of the cases
# in which it is among the first eight at temperature 0, in 0.85 at 0.7, in 0.81 at 1.
BRANCHES = 4
# Candidates per place from which a request that samples is drafted one, see `src/draft/coupled.rs`. Of what they gain with the bundled pair at
# temperature 1, half as many lost a sixth and a quarter as many a third.
CANDIDATES = 64
# How much more a drafter's preferences count there than they say, as in the core: for whoever couples drafts to numbers that are not the core's.
SHARPER = 1.3
# CUDA graphs that an engine keeps. Shapes come in powers of two, so a workload settles on far fewer; what this bounds is memory where shapes keep
# changing.
MOST_GRAPHS = 256
# What the KV cache may take by default. A serving machine sets num_pages itself.
_DEFAULT_KV_BYTES = 512 << 20


@dataclass(frozen=True)
class EngineConfig:
    """Sizes, all in tokens, pages or requests; 0 lets the engine choose.

    - `page_size`: KV slots per page. `num_pages`: pages of the pool; 0 gives every running request a full context, within
      512 MiB, in which a target that keeps state besides has its slots for that, too. `max_running`: requests that run at a time, the rest wait.
    - `max_context`: prompt and output of one request together; 0 is the target's own limit.
    - `max_batch_tokens`: tokens of one step, prefill chunks and blocks together.
    - `prefix_cache`: keep the pages of finished prompts for requests that begin the same way.
    """

    page_size: int = 16
    num_pages: int = 0
    max_running: int = 32
    max_context: int = 0
    max_batch_tokens: int = 1024
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for names, low in ((("page_size", "max_running", "max_batch_tokens"), 1), (("num_pages", "max_context"), 0)):
            for name in names:
                object.__setattr__(self, name, integer(name, getattr(self, name), low, 2**63 - 1))
        if self.max_context == 1:
            raise bad("max_context", 1, "0 or at least 2: a token of prompt and one of output")
        flag("prefix_cache", self.prefix_cache)

    def pages(self, bytes_per_token: int, max_context: int, block_size: int, state_bytes: int = 0) -> int:
        """Pages of the pool for KV of `bytes_per_token`, beside so much state that is not in pages."""
        if self.num_pages:
            return self.num_pages
        row = -(-(max_context + block_size) // self.page_size)
        affordable = max(_DEFAULT_KV_BYTES - state_bytes, 0) // max(bytes_per_token * self.page_size, 1)
        return max(row, min(row * self.max_running, affordable))


@dataclass(frozen=True)
class StepCosts:
    """What a step costs, in seconds or any other one unit: curves over its rows (packed tokens), each as pairs of rows and time.

    `target`: a target pass. `draft`: a drafter pass and the injection that follows, over the rows of its blocks. Times are
    straight between the points, flat before the first, and beyond the last as between the last two. `context`: what a token of context
    adds to a target pass; the keys and values of a request are read once, however many of its tokens are verified. ``LLM(costs=...)`` takes
    them where measuring anew is not wanted, for example to make the number of steps repeatable.
    """

    target: Sequence[tuple[float, float]] = ((0, 1.0),)
    draft: Sequence[tuple[float, float]] = ((0, 0.0),)
    context: float = 0.0

    def __post_init__(self) -> None:
        for name in ("target", "draft"):
            value = getattr(self, name)
            try:
                points = tuple((float(rows), float(time)) for rows, time in value)
            except (TypeError, ValueError, OverflowError):
                raise bad(f"costs.{name}", value, "pairs of rows and time") from None
            object.__setattr__(self, name, points)
        object.__setattr__(self, "context", real("costs.context", self.context, 0.0, math.inf))
        try:
            self.planner(2)
        except InvalidArgument as error:
            raise InvalidArgument(f"costs.{error}") from None

    @classmethod
    def lines(cls, fixed: float, row: float, draft_fixed: float, draft_row: float) -> StepCosts:
        """A target pass takes ``fixed + row * rows``, a drafter pass ``draft_fixed + draft_row * rows``."""
        fixed, row = _time("fixed", fixed), _time("row", row)
        draft_fixed, draft_row = _time("draft_fixed", draft_fixed), _time("draft_row", draft_row)
        return cls(((0, fixed), (1, fixed + row)), ((0, draft_fixed), (1, draft_fixed + draft_row)))

    def planner(self, block_size: int, tree_nodes: int = 0) -> Planner:
        """A planner that judges by these costs, of trees of up to `tree_nodes` drafts."""
        return Planner(
            block_size, target=list(self.target), draft=list(self.draft), context=self.context, tree_nodes=tree_nodes
        )


def _time(name: str, value: float) -> float:
    return real(name, value, 0.0, math.inf)


def assets() -> Path:
    """The folder of the bundled pair: ``target/``, ``draft/``, ``prompts.json``, ``MODEL_CARD.md``."""
    return Path(str(files("dflash_rs") / "assets"))
