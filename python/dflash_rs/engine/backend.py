"""What the loop asks of whoever takes a step."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from .timing import StageTimes


class Step(NamedTuple):
    """A planned step, and what is to be done beside verifying.

    `plan`: a `_core.StepPlan`. `block`: tokens of the drafter's blocks, the anchor counted. `trees`: the drafts are trees. `inject`: what
    is kept gets draft KV. `drafted_rows`: rows of the drafter's pass, of whose requests none is looked up for.
    """

    plan: Any
    block: int
    trees: bool
    inject: bool
    drafted_rows: int


class Backend(Protocol):
    """Takes steps, in the order they are launched."""

    times: StageTimes
    asks_host: bool
    """Whether the host chooses, between drafting and verifying, which drafts are worth it; otherwise all of them are verified."""

    injected_steps: int
    """How many steps' tokens got draft KV before the last step drafted."""

    @property
    def num_graphs(self) -> int:
        """CUDA graphs that were captured."""

    def launch(self, step: Step) -> Any:
        """Starts a step without waiting for anything; gives what `resolve` wants to have."""

    def keep(self, step: Step, accepted: Any) -> None:
        """After the commit of a resolved step: the target's states move over what was kept. Before it, they stand where they stood, so that
        a step can still be called off."""

    def resolve(self, launched: Any) -> Any:
        """Waits for a step and gives the core's `Accepted`; KV is where it belongs, what is kept has draft KV before anybody drafts again, if the
        step injects."""
