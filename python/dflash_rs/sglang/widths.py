"""How many tokens of each request the next step verifies: one number for the whole batch.

    start of a step ──> next ──> width ──> SGLang's step in that shape (shapes)
    accept lengths, one step late with overlap scheduling ──> verified ──> acceptance

The core (``dflash_rs.WidthPlanner``) decides; this file tells it what steps took. The clock is read where a step starts, which
costs nothing and waits for nobody: from one start to the next is a step and what the scheduler does around it. Only steps that follow
one another count, with no prefill and no pause between them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dflash_rs import WidthPlanner
from dflash_rs.sglang.metrics import Kind

# More steps than this are never on their way at once.
_ON_THEIR_WAY = 64


class Verified(NamedTuple):
    """A step that has been verified: its width, the most drafts of each request (None where none is limited), and of what kind they are."""

    width: int
    limits: list[int] | None = None
    kinds: Sequence[Kind] = ()


class Widths:
    """Chooses the width of every decoding step.

    - `widths`: those to choose from, rising; the last one is what a step has where there is no choice.
    - `tree_depth`: where the last one is a tree's, the most drafts of it that are accepted.
    - `cycle`: take them in turn instead of judging.
    - `agree`: with several ranks, hands rank 0's width to all of them; its argument is None on the others. Their clocks differ, and
      with them what they would choose.
    - `leads`: whether this is rank 0.
    - `ahead`: whether steps are launched and run later. What is seen between two starts is then one of two steps, so that it counts
      only where the step before had the same width.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        cycle: bool = False,
        agree: Callable[[int | None], int] | None = None,
        leads: bool = True,
        ahead: bool = False,
        tree_depth: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.widths, self.cycle, self.agree, self.ahead, self.clock = tuple(widths), cycle, agree, ahead, clock
        judges = leads and not cycle and len(self.widths) > 1
        self.planner = WidthPlanner(list(self.widths), tree_depth=tree_depth) if judges else None
        self._tree_depth = tree_depth
        # Requests, width, limits, temperatures and kinds.
        self._launched: deque[tuple[int, int, list[int] | None, list[float], list[Kind]]] = deque(maxlen=_ON_THEIR_WAY)
        # The step that runs: requests, width, tokens of context, when it started, and whether its time counts.
        self._running: tuple[int, int, int, float, bool] | None = None
        self._turn = 0

    def next(
        self, requests: int, limits: list[int] | None = None, reqs: Sequence[Any] = (), whole: bool = False
    ) -> int:
        """The width of the step of so many requests that starts now; `limits`: most drafts of each, None where none is limited; `reqs`: the requests,
        where what is known of them is to count; `whole`: a block, whatever pays."""
        context, temperatures = described(reqs) if self.planner is not None else (0, [])
        if whole:
            # Without trees, where there is a choice.
            width = self.widths[-1 if self._tree_depth is None or len(self.widths) == 1 else -2]
            self._running = None
        elif self.planner is not None:
            now, last = self.clock(), None
            if self._running is not None:
                before, last, length, began, counts = self._running
                if counts:
                    self.planner.observe(before, last, now - began, length)
            width = self._enough(self.planner.choose(requests, context, temperatures), limits)
            self._running = (requests, width, context, now, last == width or not self.ahead)
        elif self.cycle:
            width = self.widths[self._turn % len(self.widths)]
            self._turn += 1
        else:
            width = self.widths[-1]
        if self.agree is not None and not whole and not self.cycle and len(self.widths) > 1:
            width = self.agree(None if self.planner is None else width)
        width = self._enough(width, limits)
        self._launched.append((requests, width, limits, temperatures, [kind_of(req) for req in reqs]))
        return width

    def _enough(self, width: int, limits: list[int] | None) -> int:
        """No wider than what somebody may use; a tree has more than one draft for the first place."""
        if self._tree_depth is not None and width == self.widths[-1] and limits is not None and max(limits) > 0:
            return width
        most = self.widths[-1] if limits is None else 1 + max(limits)
        return min(width, next((w for w in self.widths if w >= most), self.widths[-1]))

    def interrupted(self) -> None:
        """Something else than a decoding step runs: what lies between two steps is no step's time."""
        self._running = None

    def verified(self, accepted: Sequence[int]) -> Verified:
        """The oldest step whose accept lengths have not come had these: drafts accepted by each request."""
        while self._launched:
            requests, width, limits, temperatures, kinds = self._launched.popleft()
            if requests == len(accepted):
                # What a request may not accept says nothing of the drafts.
                deepest = width - 1
                if self._tree_depth is not None and width == self.widths[-1]:
                    deepest = self._tree_depth
                free = [i for i, most in enumerate(limits or [width] * requests) if most >= deepest]
                if self.planner is not None and free:
                    warm = [temperatures[i] for i in free] if temperatures else []
                    self.planner.record(width, [accepted[i] for i in free], warm)
                return Verified(width, limits, kinds)
        return Verified(self.widths[-1])


def kind_of(req: Any) -> Kind:
    """Of what kind a request is, as far as it decides how well drafts fit: greedy, sampled, or bound to a grammar; and the id of its adapter."""
    how = "constrained" if req.grammar is not None else "greedy" if req.sampling_params.top_k <= 1 else "sampled"
    return how, req.lora_id


def described(reqs: Sequence[Any]) -> tuple[int, list[float]]:
    """Tokens of these requests together, as far as the host knows, and the temperature of each; 0 is greedy."""
    params = [req.sampling_params for req in reqs]
    context = sum(len(req.origin_input_ids) + len(req.output_ids) for req in reqs)
    return context, [0.0 if p.top_k <= 1 else float(p.temperature) for p in params]


def over(group: Any) -> Callable[[int | None], int]:
    """`Widths.agree` for a tensor-parallel group of SGLang, over the group its scheduler hands requests around in."""
    import torch

    number = torch.zeros(1, dtype=torch.int64)

    def agree(width: int | None) -> int:
        if width is not None:
            number[0] = width
        torch.distributed.broadcast(number, src=group.first_rank, group=group.cpu_group)
        return int(number[0])

    return agree
