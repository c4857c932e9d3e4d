"""What was drafted and accepted: counters for Prometheus, and an alarm when drafting gains nothing.

Counted where SGLang learns a step's accept lengths on the host, so counting never waits for the device. As in vLLM, drafts are
counted without the anchor (one less than the width, per pass); SGLang's own ``spec_accept_length`` counts the bonus token, like
``tau`` here. A plain step verifies no drafts: it counts as a pass of width 1 and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from dflash_rs.sglang import ALGORITHM

logger = logging.getLogger(__name__)

PREFIX = "dflash_rs_spec_"
# How a request draws its tokens, and the id of its adapter. So many are told apart: adapters come and go.
Kind = tuple[str, str | None]
MOST_KINDS = 64
OTHERS: Kind = ("other", None)
# Passes after which the log says for the first time what drafts are worth: enough to tell whether a drafter is this target's at all.
FIRST_PASSES = 64


class Window:
    """What was seen of one kind of request since the last look at it."""

    def __init__(self, how: str, adapter: str, all_passes: int, all_accepted: int):
        self.how, self.adapter = how, adapter
        self.passes = self.accepted = 0
        # What all kinds together had seen when it began.
        self.before = all_passes, all_accepted
        self.alarmed = False
        self.counters: tuple[Any, Any] | None = None


class Acceptance:
    """Counts passes of single requests that verified drafts, warns through `logger` when they gain too little."""

    def __init__(
        self,
        block: int,
        alarm_tau: float,
        alarm_passes: int,
        exporter: Exporter | None = None,
        adapter_name: Callable[[str], str] = str,
    ):
        """`adapter_name` gives the name of an adapter by its id."""
        self.block, self.alarm_tau, self.alarm_passes, self.exporter = block, alarm_tau, alarm_passes, exporter
        self.adapter_name = adapter_name
        self.passes = self.accepted = 0
        self.window_passes = self.window_accepted = 0
        self.alarmed = False
        self._kinds: dict[Kind, Window] = {}
        # Passes that accepted the draft at each place, until the first look; None after it.
        self._first: list[int] | None = [0] * (block - 1)

    @property
    def tau(self) -> float | None:
        """Tokens per pass that verified drafts since the start, the bonus token counted."""
        return 1 + self.accepted / self.passes if self.passes else None

    def observe(
        self,
        accepted: Sequence[int],
        width: int | None = None,
        limits: Sequence[int] | None = None,
        kinds: Sequence[Kind] = (),
    ) -> None:
        """One step: drafts accepted by each request of `width` tokens, by default of a whole block. `limits`: most drafts of each, None where none
        is limited; who may accept none has drafted nothing, and who may accept few counts for what it may. `kinds`: of what kind each is."""
        if not accepted:
            return
        width = self.block if width is None else width
        drafted = [min(most, width - 1) for most in (limits or [width - 1] * len(accepted))]
        if self.exporter is not None:
            self.exporter.step(accepted, width, drafted)
        passes, total = sum(n > 0 for n in drafted), sum(accepted)
        self.passes += passes
        self.accepted += total
        if self._first is not None and passes:
            self._look_first(accepted)
        self.window_passes += passes
        self.window_accepted += total
        if self.window_passes >= self.alarm_passes:
            self._look()
        if kinds:
            self._observe_kinds(kinds, accepted, drafted)

    def kernel_failed(self, kernel: str, error: Exception) -> None:
        """A kernel of this package failed; SGLang's own code does its work from here on."""
        logger.error("%s: kernel %s failed, SGLang's own code takes over: %s", ALGORITHM, kernel, error)
        if self.exporter is not None:
            self.exporter.kernel_failures.inc()

    def _look_first(self, accepted: Sequence[int]) -> None:
        assert self._first is not None
        for place in range(len(self._first)):
            self._first[place] += sum(n > place for n in accepted)
        if self.passes < FIRST_PASSES:
            return
        assert self.tau is not None
        gains = self.alarm_tau == 0 or self.tau > self.alarm_tau
        logger.log(
            logging.INFO if gains else logging.WARNING,
            "%s: the first %d target passes with drafts gave %.2f tokens each, plain decoding gives 1; drafts accepted by place: %s%s",
            ALGORITHM,
            self.passes,
            self.tau,
            " ".join(f"{hits / self.passes:.2f}" for hits in self._first),
            "" if gains else ". Is the drafter the one trained for this target?",
        )
        self._first = None

    def _observe_kinds(self, kinds: Sequence[Kind], accepted: Sequence[int], drafted: Sequence[int]) -> None:
        seen: dict[Kind, list[int]] = {}
        for kind, hits, drafts in zip(kinds, accepted, drafted):
            if drafts:
                sums = seen.setdefault(kind, [0, 0])
                sums[0] += 1
                sums[1] += hits
        for kind, (passes, hits) in seen.items():
            window = self._kinds.get(kind)
            if window is None:
                kind = kind if len(self._kinds) < MOST_KINDS else OTHERS
                window = self._kinds.setdefault(
                    kind, Window(*self._told(kind), self.passes - passes, self.accepted - hits)
                )
            window.passes += passes
            window.accepted += hits
            if self.exporter is not None:
                self.exporter.of_kind(window, passes, hits)
            if window.passes >= self.alarm_passes:
                self._look_at(window)
                window.passes = window.accepted = 0
                window.before = self.passes, self.accepted

    def _look_at(self, window: Window) -> None:
        tau = 1 + window.accepted / window.passes
        name = window.how + (f", with adapter {window.adapter}" if window.adapter else "")
        if tau > self.alarm_tau:
            if window.alarmed:
                logger.info(
                    "%s: drafts of requests (%s) are accepted again: %.2f tokens per target pass", ALGORITHM, name, tau
                )
            window.alarmed = False
            return
        passes = self.passes - window.before[0] - window.passes
        others = 1 + (self.accepted - window.before[1] - window.accepted) / passes if passes > 0 else 1.0
        # Where all gain too little the alarm of all says so.
        if not window.alarmed and others > self.alarm_tau:
            logger.warning(
                "%s: the last %d target passes of some requests (%s) gave %.2f tokens each, those of the others %.2f, plain decoding gives 1: "
                "drafting gains nothing for them (alarm_tau %s in DFLASH_RS_CONFIG; max_drafts of a request switches it off)",
                ALGORITHM,
                window.passes,
                name,
                tau,
                others,
                self.alarm_tau,
            )
            window.alarmed = True

    def _told(self, kind: Kind) -> tuple[str, str]:
        how, adapter = kind
        return how, "" if adapter is None else self.adapter_name(adapter)

    def _look(self) -> None:
        tau = 1 + self.window_accepted / self.window_passes
        if self.exporter is not None:
            self.exporter.tau.set(tau)
        if tau > self.alarm_tau:
            if self.alarmed:
                logger.info("%s: drafts are accepted again: %.2f tokens per target pass", ALGORITHM, tau)
            self.alarmed = False
        elif not self.alarmed:
            logger.warning(
                "%s: the last %d target passes gave %.2f tokens each, plain decoding gives 1: drafting gains nothing. Is the "
                "drafter the one trained for this target, and unchanged since? (alarm_tau %s in DFLASH_RS_CONFIG)",
                ALGORITHM,
                self.window_passes,
                tau,
                self.alarm_tau,
            )
            self.alarmed = True
        self.window_passes = self.window_accepted = 0


class Exporter:
    """Prometheus metrics in the process of the scheduler; SGLang's /metrics collects them from all processes."""

    def __init__(self, block: int, labels: dict[str, str], registry: Any = None, widths: Sequence[int] = ()):
        from prometheus_client import REGISTRY, Counter, Gauge

        names, registry = list(labels), registry or REGISTRY

        def counter(name: str, text: str, extra: Sequence[str] = ()) -> Any:
            return Counter(PREFIX + name, text, [*names, *extra], registry=registry)

        self.drafts = counter("drafts", "Target passes that verified drafts, one per request.").labels(**labels)
        self.draft_tokens = counter("draft_tokens", "Drafts verified, the anchor not counted.").labels(**labels)
        self.accepted_tokens = counter("accepted_tokens", "Drafts accepted.").labels(**labels)
        per_position = counter("accepted_tokens_per_pos", "Drafts accepted at each place of the block.", ["position"])
        self.per_position = [per_position.labels(**labels, position=str(i)) for i in range(block - 1)]
        passes = counter("passes", "Target passes, one per request, by tokens verified in each.", ["width"])
        self.passes = {width: passes.labels(**labels, width=str(width)) for width in sorted({*widths, block})}
        self._labels, of_kind = labels, ["kind", "adapter"]
        self._width: int | None = None
        self._kind_drafts = counter("kind_drafts", "Target passes that verified drafts, by kind of request.", of_kind)
        self._kind_accepted = counter("kind_accepted_tokens", "Drafts accepted, by kind of request.", of_kind)
        self.kernel_failures = counter(
            "kernel_failures", "Failures of kernels of this package; SGLang's own code took over."
        ).labels(**labels)
        self.deferred_tokens = counter(
            "deferred_tokens", "Tokens of plain steps whose draft KV was put off until it is read."
        ).labels(**labels)
        self.injected_tokens = counter("injected_tokens", "Those of them whose draft KV has been written.").labels(
            **labels
        )
        self.injections = counter("injections", "In how many goes it was written.").labels(**labels)
        gauges = {"registry": registry, "multiprocess_mode": "mostrecent"}
        self.tau = Gauge(
            PREFIX + "tau", "Tokens per target pass that verified drafts, over recent ones.", names, **gauges
        ).labels(**labels)
        self.width = Gauge(
            PREFIX + "width", "Tokens verified of each request in the last step.", names, **gauges
        ).labels(**labels)
        Gauge(PREFIX + "block_size", "Tokens per block, the anchor counted.", names, **gauges).labels(**labels).set(
            block
        )

    def of_kind(self, window: Window, passes: int, accepted: int) -> None:
        """Passes of requests of one kind that verified drafts."""
        if window.counters is None:
            labels = self._labels | {"kind": window.how, "adapter": window.adapter}
            window.counters = self._kind_drafts.labels(**labels), self._kind_accepted.labels(**labels)
        drafts, tokens = window.counters
        drafts.inc(passes)
        tokens.inc(accepted)

    def step(self, accepted: Sequence[int], width: int, drafted: Sequence[int]) -> None:
        """One step: drafts accepted by each request of `width` tokens, of those that it might accept."""
        self.passes[width].inc(len(accepted))
        if width != self._width:
            self._width = width
            self.width.set(width)
        if not any(drafted):
            return
        self.drafts.inc(sum(n > 0 for n in drafted))
        self.draft_tokens.inc(sum(drafted))
        self.accepted_tokens.inc(sum(accepted))
        for position, counter in enumerate(self.per_position[: width - 1]):
            if hits := sum(n > position for n in accepted):
                counter.inc(hits)
