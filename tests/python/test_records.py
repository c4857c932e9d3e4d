"""What the core keeps of a request's output, piece by piece and as a whole, held against Python's own decoder."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dflash_rs import _core
from dflash_rs.text import Detokenizer

# Whole characters, parts of characters, bytes that are none, and tokens without text.
TABLE = [
    b"",
    b"a",
    b"bc",
    "\u00e9".encode(),
    b"\xe6",
    b"\x97\xa5",
    b"\x97",
    b"\xa5x",
    b"\xff",
    b"\xf0\x9f",
    b"\x98\x80!",
    b"\xed\x80",
    b"\x80",
    b"stop",
    b"st",
    b"op",
]
EOS = 0


def engine(**options) -> _core.Engine:
    options = {"vocabulary": TABLE} | options
    return _core.Engine(
        num_pages=64, vocab_size=len(TABLE), page_size=4, block_size=4, max_context=200, eos_ids=[EOS], **options
    )


def step(core: _core.Engine, draw: random.Random, allowed: list[int]) -> _core.Events:
    """A step whose rows draw any of these tokens, and whose drafts are right by chance."""
    plan = core.plan()
    if plan.draft_rows.size:
        shape = plan.draft_rows.size, int(plan.block_len.max()) - 1
        plan.set_drafts(np.array(draw.choices(allowed, k=shape[0] * shape[1])).reshape(shape))
    drafts = np.roll(plan.token_ids[plan.logit_rows], -1)
    sampled = [int(right) if right in allowed and draw.random() < 0.6 else draw.choice(allowed) for right in drafts]
    return core.commit(plan, core.accept_sampled(plan, np.array(sampled, dtype=np.int64)))


@pytest.mark.parametrize("seed", range(40))
def test_text_of_a_record_is_what_pythons_decoder_makes_of_the_same_pieces(seed):
    draw, core = random.Random(seed), engine()
    stop = draw.choice([(), ("stop",), ("st", "opa"), (b"\x97\xa5x",), ("\u65e5",)])
    request = core.add([1, 2], {"max_tokens": draw.choice([1, 30, 90]), "stop": list(stop)})
    record, oracle = core.record(request), Detokenizer(None, TABLE)
    allowed = [token for token in range(len(TABLE)) if token != EOS or draw.random() < 0.3]
    expected, tokens, read, often = [], [], [], draw.random()
    while core.has_work:
        events = step(core, draw, allowed)
        ids, end, finish = events.tokens.tolist(), int(events.text_ends[0]), int(events.finish[0])
        text = oracle.push(ids, None if end < 0 else end, finish != 0)
        expected.append((text, ids, min(int(events.accepted[0]), len(ids)), finish))
        tokens += ids
        if draw.random() < often:
            read += record.read()
    assert "".join(piece[0] for piece in read) == oracle.text[: sum(len(piece[0]) for piece in read)]
    if draw.random() < 0.5:
        assert record.text() == oracle.text and record.read() == []
    else:
        assert read + record.read() == expected
    assert (record.text(), record.tokens(), record.finish) == (oracle.text, tokens, expected[-1][3])
    assert events.ended == [request] and core.record(request) is None


def test_many_records_are_read_in_one_call_in_their_order():
    core, draw = engine(), random.Random(0)
    ids = [core.add([1], {"max_tokens": 9}) for _ in range(3)]
    records = [core.record(request) for request in ids]
    for _ in range(2):
        step(core, draw, [1, 2])
    pieces = _core.read_records([records[2], records[0]])
    assert [piece[0] for piece in pieces] == [0, 0, 1, 1]
    assert [tuple(piece[1:]) for piece in pieces[2:]] == [piece for piece in _again(core, records[0], pieces[2:])]
    assert _core.read_records(records[::2]) == [] and len(records[1].read()) == 2


def _again(core, record, pieces):
    """The pieces as their record's tokens have them."""
    at, found = 0, []
    for _, _, tokens, accepted, code in pieces:
        own = record.tokens()[at : at + len(tokens)]
        at += len(own)
        found.append((b"".join(TABLE[token] for token in own).decode(), own, accepted, code))
    assert at == len(record.tokens())
    return found


def test_an_aborted_request_keeps_what_it_was_given_and_shows_nothing_that_was_held_back():
    core = engine()
    request, waits = core.add([1], {"max_tokens": 9, "stop": ["stop"]}), core.add([1], {})
    record, other = core.record(request), core.record(waits)
    assert core.abort(waits) and other.read() == [("", [], 0, 5)] and other.tokens() == []
    for token in (1, 14):
        plan = core.plan(1)
        core.commit(plan, core.accept_sampled(plan, np.array([token])))
    assert core.abort(request) and not core.abort(request)
    assert record.read() == [("a", [1], 0, 0), ("", [14], 0, 0), ("", [], 0, 5)]
    assert (record.text(), record.tokens(), record.finish, record.error) == ("a", [1, 14], 5, None)


def test_a_request_that_fails_has_the_message_and_what_came_before():
    core = engine()
    request = core.add([1], {"max_tokens": 9})
    record = core.record(request)
    plan = core.plan()
    core.commit(plan, core.accept_sampled(plan, np.array([4])))
    plan = core.plan(1)
    events = core.commit(plan, core.accept(plan, np.full((1, len(TABLE)), np.nan, np.float32)))
    assert events.ended == [request] and events.errors == [(request, record.error)]
    assert record.error.startswith(f"request {request}: logits: got NaN")
    assert record.read() == [("", [4], 0, 0), ("\ufffd", [], 0, 4)] and record.finish == 4


def test_scores_and_counts_are_those_of_the_events():
    core, draw = engine(vocabulary=None), random.Random(3)
    request = core.add([1, 2, 3], {"max_tokens": 40, "logprobs": 2})
    record, expected = core.record(request), []
    drafted, accepted, committed = [], [], 0
    while core.has_work:
        plan = core.plan()
        if plan.draft_rows.size:
            plan.set_drafts(np.array([draw.choices([1, 2], k=int(plan.block_len.max()) - 1)]))
        logits = np.random.default_rng(len(expected)).normal(size=(plan.logit_rows.size, len(TABLE))).astype(np.float32)
        logits[:, [1, 2]] += 3
        events = core.commit(plan, core.accept(plan, logits))
        first = not expected
        for at, token in enumerate(events.tokens.tolist()):
            top = slice(*events.top_starts[at : at + 2].tolist())
            expected.append(
                (
                    token,
                    float(events.logprobs[at]),
                    list(zip(events.top_tokens[top].tolist(), events.top_logprobs[top].tolist())),
                )
            )
        if not first and events.tokens.size:
            drafted.append(int(events.drafted[0]))
            accepted.append(int(events.accepted[0]))
            committed += events.tokens.size
    assert record.scores() == expected and [len(score[2]) for score in expected] == [2] * 40
    metrics = record.metrics()
    assert metrics["steps"] == len(drafted) and metrics["drafted_steps"] == sum(d > 0 for d in drafted)
    assert metrics["tau"] == committed / len(drafted) and metrics["output_tokens"] == 40
    assert metrics["accept_histogram"] == [accepted.count(a) for a in range(max(accepted) + 1)]
    reached = [sum(d > i for d in drafted) for i in range(max(drafted))]
    assert metrics["accepted_per_position"] == [sum(a > i for a in accepted) / n for i, n in enumerate(reached)]
    assert 0 <= metrics["ttft_s"] <= metrics["total_s"]
    assert all(text is None for text, *_ in record.read())


def test_bytes_that_are_no_text_become_what_pythons_decoder_makes_of_all_of_them():
    edges = [0x00, 0x41, 0x7F, 0x80, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF]
    core = _core.Engine(
        num_pages=64, vocab_size=256, page_size=4, block_size=1, vocabulary=[bytes([b]) for b in range(256)]
    )
    for seed in range(20):
        output = random.Random(seed).choices(edges, k=24)
        record = core.record(core.add([1], {"max_tokens": 24, "ignore_eos": True}))
        for token in output:
            plan = core.plan()
            core.commit(plan, core.accept_sampled(plan, np.array([token])))
        whole = bytes(output).decode("utf-8", "replace")
        assert (record.text() if seed % 2 else "".join(piece[0] for piece in record.read())) == whole
