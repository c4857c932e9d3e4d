"""Steps that vary in width: what is counted, and that drafts after plain steps are as good as ever. The text is compared in `test_text`,
whose servers take every step in another width; the choice is the core's, and tested there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import cases
import pytest
from servers import Server, side_by_side, speculative, widths

LONG = {"temperature": 0, "max_new_tokens": 96, "ignore_eos": True}


@pytest.fixture(scope="module")
def servers(logs) -> Iterator[dict[str, Server]]:
    """Whole blocks, and a plain step before each of them; without overlap scheduling, so that no pass is launched in vain."""
    options = speculative(enable_metrics=True, disable_overlap_schedule=True, page_size=16, grammar_backend="none")
    started = {
        "whole": Server(logs / "widths-whole.log", env=widths(False), **options),
        "turns": Server(logs / "widths-turns.log", env=widths("cycle", 1, 8), **options),
    }
    with side_by_side(started):
        yield started


class Counts:
    """A server's counters."""

    def __init__(self, server: Server):
        self.text = server.get("/metrics")

    def by(self, name: str, label: str) -> dict[int, float]:
        """A counter by one of its labels, a number."""
        found = re.findall(
            rf'^dflash_rs_spec_{name}{{[^}}]*{label}="(\d+)"[^}}]*}} ([0-9.e+]+)$', self.text, re.MULTILINE
        )
        return {int(key): float(value) for key, value in found}

    def of(self, name: str) -> float:
        """A counter without labels of its own."""
        (value,) = re.findall(rf"^dflash_rs_spec_{name}{{[^}}]*}} ([0-9.e+]+)$", self.text, re.MULTILINE)
        return float(value)


def run(server: Server) -> tuple[Counts, Counts, list[dict[str, Any]]]:
    """Counters before and after, and what the answers say of themselves; one request at a time, so that every request drafts."""
    before = Counts(server)
    answers = server.together(cases.bodies(LONG, 6), at_once=1)
    return before, Counts(server), [answer["meta_info"] for answer in answers]


def test_counters_and_answers_agree_on_what_was_verified(servers: dict[str, Server]) -> None:
    before, after, infos = run(servers["turns"])
    passes = {
        width: after.by("passes_total", "width")[width] - n for width, n in before.by("passes_total", "width").items()
    }
    assert set(passes) == {1, 8} and min(passes.values()) > 0
    assert sum(passes.values()) == sum(info["spec_verify_ct"] for info in infos)
    gained = {
        name: after.of(name) - before.of(name)
        for name in ("drafts_total", "draft_tokens_total", "accepted_tokens_total")
    }
    assert gained["drafts_total"] == passes[8] and gained["draft_tokens_total"] == 7 * passes[8]
    assert gained["accepted_tokens_total"] == sum(info["spec_num_correct_drafts"] for info in infos)
    histogram = Counter()
    for info in infos:
        histogram.update(dict(enumerate(info["spec_correct_drafts_histogram"])))
        assert info["spec_accept_length"] == info["completion_tokens"] / info["spec_verify_ct"]
        # SGLang counts a whole block for every pass, plain ones included.
        assert info["spec_num_proposed_drafts"] == 7 * info["spec_verify_ct"]
    assert sum(histogram.values()) == sum(passes.values())
    for position in range(7):
        here = after.by("accepted_tokens_per_pos_total", "position")[position]
        reached = sum(n for length, n in histogram.items() if length > position)
        assert here - before.by("accepted_tokens_per_pos_total", "position")[position] == reached
    assert after.of("width") in (1, 8) and after.of("block_size") == 8


def test_a_draft_after_a_plain_step_is_as_good_as_after_a_block(servers: dict[str, Server]) -> None:
    taus = {}
    for name, server in servers.items():
        before, after, _ = run(server)
        drafts, accepted = (after.of(n) - before.of(n) for n in ("drafts_total", "accepted_tokens_total"))
        taus[name] = 1 + accepted / drafts
    # Not the same drafts: they start from other places of the same text.
    assert taus["turns"] > 0.9 * taus["whole"] > 1.8, taus


def test_the_text_is_the_same(servers: dict[str, Server]) -> None:
    whole, turns = (server.together(cases.bodies(LONG, 8)) for server in servers.values())
    assert cases.tokens(whole) == cases.tokens(turns)
    assert all(server.flush_is_clean() for server in servers.values())
