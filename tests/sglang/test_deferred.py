"""Draft keys and values of plain steps, written late: the drafter finds what it would have found, whatever comes in between.

Servers keep a shadow of the drafter's pool, in which every token is written at once (``sglang_host/shadow.py``), and compare it with the real one
before each block they draft.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from cases import tokens
from servers import Server, speculative, widths
from test_text import CHECKED, FULL, retractions

from dflash_rs.sglang import compat
from dflash_rs.sglang.deferred import Deferred
from dflash_rs.sglang.metrics import Exporter

# --- the parts, on scripted steps --------------------------------------------------------------------------------------


class Pool:
    """A pool of slots whose "keys" are the features written there, and what they would be if every step wrote its own at once."""

    def __init__(self, slots: int = 64, features: int = 3, **bounds: int):
        self.late, self.at_once = torch.zeros(slots, features), torch.zeros(slots, features)
        self.writes: list[int] = []
        self.deferred = Deferred(self.write, **bounds)
        self.given = 0.0

    def write(self, target_hidden: torch.Tensor, cache_loc: torch.Tensor, positions: torch.Tensor) -> None:
        assert len(set(cache_loc.tolist())) == len(cache_loc), "a slot is written twice in one go"
        assert torch.equal(cache_loc + 1000, positions)
        self.writes.append(len(cache_loc))
        self.late[cache_loc] = target_hidden

    def step(self, plain: bool, slots: dict[str, list[int]]) -> None:
        """A step or prefill of these requests, which leaves features for these slots of theirs."""
        self.deferred.begin(plain, list(slots))
        if not plain:
            assert torch.equal(self.late, self.at_once), "a step that may read finds all that was left"
        written = torch.tensor([slot for own in slots.values() for slot in own])
        hidden = self.given + torch.arange(len(written) * 3, dtype=torch.float32).view(-1, 3)
        self.given += 1000
        self.at_once[written] = hidden
        # SGLang's passes pad their rows, and work in the same memory again.
        padded = torch.cat([hidden, torch.full((2, 3), -1.0)])
        positions = written + 1000
        if not self.deferred.keep(padded, written, positions):
            self.write(hidden, written, positions)
        padded.fill_(-2)

    def finished(self) -> None:
        """All is written."""
        self.deferred.inject()
        assert torch.equal(self.late, self.at_once)


def test_plain_steps_of_the_same_requests_are_written_in_one_go() -> None:
    pool = Pool(steps=4)
    for step in range(6):
        pool.step(True, {"a": [step], "b": [32 + step]})
    # Four steps filled it; two wait.
    assert pool.writes == [8] and not torch.equal(pool.late, pool.at_once)
    pool.step(False, {"a": [6, 7], "b": [38]})
    assert pool.writes == [8, 4, 3] and torch.equal(pool.late, pool.at_once)


def test_there_is_room_for_so_many_tokens() -> None:
    pool = Pool(steps=32, tokens=8)
    for step in range(4):
        pool.step(True, {name: [8 * step + n] for n, name in enumerate("abc")})
    assert pool.writes == [6, 6]
    # More than half of it: nothing is kept.
    pool.step(True, {name: [40 + n] for n, name in enumerate("abcde")})
    assert pool.writes == [6, 6, 5] and torch.equal(pool.late, pool.at_once)
    pool = Pool(steps=0)
    pool.step(True, {"a": [1]})
    assert pool.writes == [1]


def test_a_slot_that_gets_another_owner_keeps_what_that_one_wrote() -> None:
    pool = Pool()
    pool.step(True, {"a": [1], "b": [2]})
    pool.step(True, {"a": [3], "b": [4]})
    # b has ended, and a gets its slots.
    pool.step(True, {"a": [4]})
    pool.step(True, {"a": [2]})
    assert pool.writes == [4]
    # a is retracted, and comes back by a prefill to slots that it had before.
    pool.step(False, {"a": [2, 4, 5]})
    pool.step(True, {"a": [1]})
    pool.finished()


@pytest.mark.parametrize("seed", range(20))
def test_no_context_is_lost_whatever_comes_in_between(seed: int) -> None:
    """Random lives: requests come, are prefilled, decode in plain steps and others, end or are retracted; their slots go to others."""
    chance = random.Random(seed)
    pool = Pool(steps=chance.randint(1, 6), tokens=chance.randint(1, 24))
    free, owned, number = list(range(64)), {}, 0

    def take(count: int) -> list[int]:
        return [free.pop(chance.randrange(len(free))) for _ in range(count)]

    for _ in range(300):
        what = chance.random()
        if (what < 0.15 or not owned) and len(free) > 8 and len(owned) < 5:
            number += 1
            owned[f"r{number}"] = take(chance.randint(1, 6))
            pool.step(False, {f"r{number}": owned[f"r{number}"]})
        elif what < 0.3 or len(free) < 3 * len(owned):
            # An end, an abort or a retraction, seen by the next step.
            free += owned.pop(chance.choice(list(owned)))
        else:
            plain = what < 0.9
            wrote = {name: take(1 if plain else chance.randint(1, 2)) for name in owned}
            for name, slots in wrote.items():
                owned[name] = owned[name] + slots
            if wrote:
                pool.step(plain, wrote)
    pool.finished()


def test_what_waits_and_what_was_written_is_counted() -> None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    exporter = Exporter(8, {"model_name": "m"}, registry)
    pool = Pool(exporter=exporter)

    def counted() -> list[float | None]:
        names = ("deferred_tokens", "injected_tokens", "injections")
        return [registry.get_sample_value(f"dflash_rs_spec_{name}_total", {"model_name": "m"}) for name in names]

    for step in range(3):
        pool.step(True, {"a": [step], "b": [8 + step]})
    assert counted() == [6, 0, 0]
    pool.step(False, {"a": [4]})
    assert counted() == [6, 6, 1]


def test_the_worker_keeps_only_what_plain_steps_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    from dflash_rs.sglang import compat
    from dflash_rs.sglang.worker import DflashRsWorker

    written: list[dict[str, Any]] = []
    base = compat.installed().worker_class()
    monkeypatch.setattr(
        base, "_append_target_hidden_to_draft_kv_by_loc", lambda self, **given: written.append(given), raising=True
    )
    worker = DflashRsWorker.__new__(DflashRsWorker)
    vars(worker)["_deferred"] = Deferred(super(DflashRsWorker, worker)._append_target_hidden_to_draft_kv_by_loc)
    given = {"target_hidden": torch.ones(2, 3), "cache_loc": torch.tensor([1, 2]), "positions": torch.tensor([7, 8])}
    worker._deferred.begin(True, ["a", "b"])
    worker._append_target_hidden_to_draft_kv_by_loc(**given, commit_lens=torch.tensor([1, 1]))
    assert written == []
    worker._deferred.begin(False, ["a", "b"])
    assert [call["cache_loc"].tolist() for call in written] == [[1, 2]] and "commit_lens" not in written[0]
    worker._append_target_hidden_to_draft_kv_by_loc(**given, commit_lens="as given")
    assert written[1]["commit_lens"] == "as given"


@pytest.mark.parametrize(("copied", "mode"), [(True, "null"), (False, "null"), (False, "decode")])
def test_who_else_copies_or_writes_pages_is_asked_for(copied: bool, mode: str) -> None:
    worker = SimpleNamespace(
        server_args=SimpleNamespace(enable_hierarchical_cache=copied, disaggregation_mode=mode),
        hicache_draft_plan=SimpleNamespace(device_pools=("pool",) if copied else ()),
    )
    assert compat.installed().shares_pages(worker) is (copied or mode != "null")


# --- servers with a shadow -----------------------------------------------------------------------------------------------

BASE = {"temperature": 0, "ignore_eos": True}
PLAIN = {"custom_params": {"dflash_rs": {"max_drafts": 0}}}


def drafts(most: int, length: int, prompts: int = 6) -> list[dict[str, Any]]:
    """/generate bodies; every `most`-th request may draft, the others decode plainly."""
    params = [BASE | {"max_new_tokens": length + 9 * n} | ({} if n % most == 0 else PLAIN) for n in range(prompts)]
    return [{"text": text, "sampling_params": own} for text, own in zip(cases.prompts(prompts), params)]


@pytest.fixture(scope="module")
def plain(logs: Path) -> Iterator[Server]:
    """SGLang without speculation."""
    with Server(logs / "deferred-plain.log", grammar_backend="none") as server:
        yield server


SHAPES = {
    # With overlap scheduling, and pages that whole prompts fill.
    "overlapped": {"page_size": 16},
    # Without; chunks of prompts come between steps, and requests are retracted.
    "tight": {
        "page_size": 1,
        "disable_overlap_schedule": True,
        "chunked_prefill_size": 16,
        "max_total_tokens": 560,
        "schedule_conservativeness": 0.05,
    },
    # A drafter that sees few tokens, in the drafter's own rows.
    "window": {"page_size": 4, "speculative_draft_window_size": 24},
}


class Shadowed:
    """A server of this shape and what its shadow says."""

    def __init__(self, logs: Path, shape: str):
        self.report = logs / f"deferred-{shape}.jsonl"
        env = CHECKED | widths("cycle", 1, 8) | {"SGLANG_HOST_SHADOW": str(self.report)}
        options = speculative(grammar_backend="none", enable_metrics=True, **SHAPES[shape])
        self.server = Server(logs / f"deferred-{shape}.log", env=env, **options)

    def compared(self) -> tuple[int, float]:
        """Tokens of context compared since the last call, and the largest difference."""
        lines = [json.loads(line) for line in self.report.read_text(encoding="utf-8").splitlines()]
        self.report.write_text("")
        return sum(line["tokens"] for line in lines), max((line["differs"] for line in lines), default=0.0)

    def counts(self) -> list[float]:
        """Tokens deferred, those written, and in how many goes."""
        text = self.server.get("/metrics")
        names = ("deferred_tokens", "injected_tokens", "injections")
        found = [
            re.findall(rf"^dflash_rs_spec_{name}_total{{[^}}]*}} ([0-9.e+]+)$", text, re.MULTILINE) for name in names
        ]
        return [float(value) for (value,) in found]


@pytest.fixture(scope="module", params=SHAPES)
def shadowed(request: pytest.FixtureRequest, logs: Path) -> Iterator[Shadowed]:
    """DFLASH_RS: a plain step before each block."""
    made = Shadowed(logs, request.param)
    with made.server:
        yield made
        assert made.server.flush_is_clean()


def same(shadowed: Shadowed) -> None:
    """All that drafts were made from was what it would have been."""
    compared, differs = shadowed.compared()
    # Rows are rounded differently in a product of one and of many.
    assert compared > 500 and differs < 1e-4, (compared, differs)


def test_requests_that_draft_and_others_that_do_not_share_batches(plain: Server, shadowed: Shadowed) -> None:
    for most, at_once in ((2, 1), (4, 3)):
        bodies = drafts(most, 20)
        assert tokens(shadowed.server.together(bodies, at_once=at_once)) == tokens(plain.together(bodies))
    same(shadowed)
    deferred, injected, goes = shadowed.counts()
    # Nobody waits but the last requests' last steps.
    assert 0 <= deferred - injected <= 64 and injected > 4 * goes, (deferred, injected, goes)


def test_what_plain_steps_wrote_is_found_in_the_cache_and_drafted_from(plain: Server, shadowed: Shadowed) -> None:
    first = [{"text": text, "sampling_params": BASE | PLAIN | {"max_new_tokens": 50}} for text in cases.prompts(4)]
    shadowed.server.flush_is_clean()
    answers = shadowed.server.together(first, at_once=2)
    expected = plain.together(first)
    assert tokens(answers) == tokens(expected)
    assert all(answer["meta_info"]["spec_accept_length"] < 1.1 for answer in answers), "the first token is the prompt's"
    shadowed.compared()
    longer = [
        {"input_ids": cases.ids(text) + answer["output_ids"], "sampling_params": BASE | {"max_new_tokens": 40}}
        for text, answer in zip(cases.prompts(4), answers)
    ]
    again = shadowed.server.together(longer, at_once=2)
    assert tokens(again) == tokens(plain.together(longer))
    if "tight" not in shadowed.server.log.name:
        cached = [answer["meta_info"]["cached_tokens"] for answer in again]
        assert max(cached) > 40, cached
    same(shadowed)


def test_retractions_and_aborts_lose_nothing(plain: Server, shadowed: Shadowed) -> None:
    params = BASE | {"max_new_tokens": 110, "ignore_eos": False, "logit_bias": {"0": -1000.0}}
    bodies = [
        {"text": text, "sampling_params": params | (PLAIN if n % 3 else {})}
        for n, text in enumerate(cases.prompts(8) * 2)
    ]
    expected = tokens(plain.together(bodies))

    def leave(number: int) -> str:
        body = bodies[number] | {"rid": f"leaving-{number}"}
        body["sampling_params"] = body["sampling_params"] | {"max_new_tokens": 400} | PLAIN
        stream = shadowed.server.stream("/generate", body)
        for _ in range(2 + number):
            next(stream)
        shadowed.server.post("/abort_request", {"rid": f"leaving-{number}"})
        *_, last = stream
        return last["meta_info"]["finish_reason"]["type"]

    with ThreadPoolExecutor(3) as pool:
        ends = pool.map(leave, range(3))
        answers = shadowed.server.together(bodies)
        assert list(ends) == ["abort"] * 3
    assert tokens(answers) == expected
    if "tight" in shadowed.server.log.name:
        assert retractions(answers) > 0 and FULL in shadowed.server.log.read_text(errors="replace")
    same(shadowed)
