"""The engine's Python face: arrays, stages, errors. What it decides is tested in Rust."""

from __future__ import annotations

import gc
import re
import threading

import numpy as np
import pytest
from cuda_header import header_structures

from dflash_rs import DflashError, InvalidArgument, OutOfPages, SamplingParams, verify
from dflash_rs._core import Engine, PagePool, Planner, WidthPlanner

VOCAB = 31


def next_token(text: list[int]) -> int:
    """A target whose next token depends on the whole text."""
    state = 1469598103934665603
    for token in text:
        state = ((state ^ token) * 1099511628211) % 2**64
    return (state >> 20) % VOCAB


def continuation(prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(next_token(text))
    return text[len(prompt) :]


def engine(**sizes) -> Engine:
    return Engine(
        **{"num_pages": 40, "vocab_size": VOCAB, "page_size": 4, "block_size": 4, "max_context": 200, **sizes}
    )


def rows_of(plan):
    return [(int(plan.query_starts[r]), int(plan.query_starts[r + 1])) for r in range(len(plan.row_ids))]


class Loop:
    """Runs an engine with the fake target; every third draft is wrong."""

    def __init__(self, core: Engine) -> None:
        self.core = core
        self.texts: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.finish: dict[int, int] = {}
        self.text_ends: dict[int, int] = {}

    def add(self, prompt: list[int], **options) -> int:
        request = self.core.add(prompt, options)
        self.texts[request] = list(prompt)
        self.prompts[request] = len(prompt)
        return request

    def output(self, request: int) -> list[int]:
        return self.texts[request][self.prompts[request] :]

    def drafts(self, plan) -> np.ndarray:
        drafts = np.zeros((len(plan.draft_rows), self.core.block_size - 1), np.int64)
        for k, row in enumerate(plan.draft_rows):
            text = list(self.texts[int(plan.request_ids[row])])
            for j in range(drafts.shape[1]):
                drafts[k, j] = next_token(text) if (len(text) + j) % 3 else 0
                text.append(int(drafts[k, j]))
        return drafts

    def logits(self, plan) -> np.ndarray:
        logits = np.zeros((len(plan.logit_rows), VOCAB), np.float32)
        for row, (start, _) in enumerate(rows_of(plan)):
            context = self.texts[int(plan.request_ids[row])][: plan.context_lens[row]]
            for at in range(plan.logit_starts[row], plan.logit_starts[row + 1]):
                block = plan.token_ids[start : plan.logit_rows[at] + 1].tolist()
                logits[at, next_token(context + block)] = 9.0
        return logits

    def step(self):
        plan = self.core.plan()
        if len(plan.draft_rows):
            plan.set_drafts(self.drafts(plan))
        accepted = self.core.accept(plan, self.logits(plan))
        events = self.core.commit(plan, accepted)
        self.hear(events)
        return plan, accepted, events

    def hear(self, events) -> None:
        for e, request in enumerate(events.request_ids.tolist()):
            self.texts[request] += events.tokens[events.token_starts[e] : events.token_starts[e + 1]].tolist()
            self.text_ends[request] = int(events.text_ends[e])
            if events.finish[e]:
                self.finish[request] = int(events.finish[e])

    def run(self) -> None:
        while self.core.has_work:
            self.step()


def test_text_is_the_targets_own_and_all_pages_come_back():
    loop = Loop(engine())
    requests = [loop.add(list(range(3, 4 + n)), max_tokens=20) for n in range(9)]
    loop.run()
    for n, request in enumerate(requests):
        assert loop.output(request) == continuation(list(range(3, 4 + n)), 20)
        assert loop.finish[request] == 3
    assert loop.core.stats()["tau"] > 1.5
    counts = loop.core.counts()
    assert counts["free_pages"] + counts["reclaimable_pages"] == counts["total_pages"] == 40
    assert loop.core.evict() == counts["cached_pages"]
    assert loop.core.counts()["free_pages"] == 40


def test_a_plan_describes_a_packed_ragged_batch():
    loop = Loop(engine(prefix_cache=False))
    loop.add([5, 6, 7], max_tokens=20)
    loop.step()
    loop.add([1, 2, 3, 4, 5, 6], max_tokens=20)
    plan, accepted, events = loop.step()
    assert plan.block_len.tolist() == [4, 6]
    assert plan.is_prefill.tolist() == [False, True]
    assert plan.query_starts.tolist() == [0, 4, 10]
    assert plan.context_lens.tolist() == [3, 0]
    assert plan.positions.tolist() == [3, 4, 5, 6, 0, 1, 2, 3, 4, 5]
    assert plan.logit_rows.tolist() == [0, 1, 2, 3, 9]
    assert plan.logit_starts.tolist() == [0, 4, 5]
    assert plan.draft_rows.tolist() == [0]
    assert plan.start_known.all()
    table = loop.core.page_table
    for row, (start, end) in enumerate(rows_of(plan)):
        for at in range(start, end):
            page = table[plan.row_ids[row], plan.positions[at] // 4]
            assert plan.slots[at] == page * 4 + plan.positions[at] % 4
    kept = accepted.accepted[0] + 1
    assert accepted.commit_rows.tolist() == [*range(kept), *range(4, 10)]
    assert np.diff(accepted.token_starts).tolist() == [kept, 1]
    assert events.tokens.tolist() == accepted.tokens.tolist()
    assert np.isnan(events.logprobs).all()
    dtypes = {
        "request_ids": np.uint64, "row_ids": np.int32, "query_starts": np.int32, "context_lens": np.int32,
        "token_ids": np.int64, "positions": np.int64, "slots": np.int64, "logit_rows": np.int32,
        "logit_starts": np.int32, "draft_rows": np.int32, "block_len": np.int32, "is_prefill": np.bool_,
        "draft_valid_from": np.int32, "start_known": np.bool_,
    }  # fmt: skip
    assert {name: getattr(plan, name).dtype.type for name in dtypes} == dtypes


def test_arrays_outlive_their_plan_and_are_not_reused_while_looked_at():
    loop = Loop(engine())
    request = loop.add([1, 2, 3], max_tokens=30)
    plan, accepted, events = loop.step()
    slots, tokens, new = plan.slots, accepted.tokens, events.tokens
    before = [slots.tolist(), tokens.tolist(), new.tolist()]
    del plan, accepted, events
    gc.collect()
    loop.run()
    assert [slots.tolist(), tokens.tolist(), new.tolist()] == before
    assert len(loop.output(request)) == 30


def test_the_page_table_is_one_read_only_view():
    core = engine()
    table = core.page_table
    assert table.dtype == np.int32
    assert table.shape[0] == 32
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1
    core.add([1] * 9)
    plan = core.plan()
    assert len(set(table[plan.row_ids[0], :3].tolist())) == 3, "the old view shows the new pages"
    del core
    gc.collect()
    assert table[0, 0] >= 0


def test_an_interrupted_step_is_called_off_and_nothing_is_lost():
    for interrupt in ("drop", "cancel", "cancel_all"):
        loop = Loop(engine())
        request = loop.add([1, 2, 3, 4, 5], max_tokens=25)
        loop.step()
        plan = loop.core.plan()
        if interrupt == "drop":
            del plan
        elif interrupt == "cancel":
            assert loop.core.cancel(plan) is True
            assert not plan.is_open
            assert loop.core.cancel(plan) is False
        else:
            loop.core.cancel_all()
        assert loop.core.counts()["in_flight"] == 0
        loop.run()
        assert loop.output(request) == continuation([1, 2, 3, 4, 5], 25)


def test_abort_takes_waiting_and_running_requests():
    loop = Loop(engine(max_running=1, max_batch_tokens=8))
    running, waiting, other = (loop.add([n, n, n], max_tokens=20) for n in (1, 2, 3))
    plan = loop.core.plan()
    assert loop.core.abort(running) is True
    assert loop.core.abort(waiting) is True
    assert loop.core.abort(waiting) is False
    assert loop.core.abort(12345) is False
    accepted = loop.core.accept(plan, loop.logits(plan))
    assert len(loop.core.commit(plan, accepted).request_ids) == 0, "nobody is left to hear the result"
    loop.run()
    assert loop.output(other) == continuation([3, 3, 3], 20)
    assert loop.core.counts()["reclaimable_pages"] + loop.core.counts()["free_pages"] == 40


def test_a_nan_row_ends_its_request_with_an_error_that_names_it():
    loop = Loop(engine())
    bad, good = loop.add([1, 2], max_tokens=9), loop.add([3, 4], max_tokens=9)
    plan = loop.core.plan()
    logits = loop.logits(plan)
    logits[list(plan.request_ids).index(bad), 5] = np.nan
    accepted = loop.core.accept(plan, logits)
    assert [row for row, _ in accepted.failed] == [list(plan.request_ids).index(bad)]
    events = loop.core.commit(plan, accepted)
    loop.hear(events)
    [(request, message)] = events.errors
    assert request == bad
    assert f"request {bad}" in message and "NaN" in message and "column 5" in message
    loop.run()
    assert loop.finish == {bad: 4, good: 3}
    assert loop.output(good) == continuation([3, 4], 9)


def test_stop_strings_cut_the_text_and_stop_tokens_end_it():
    spelling = [bytes([97 + token % 26]) for token in range(VOCAB)]
    prompt = [1, 2, 3]
    tokens = continuation(prompt, 30)
    text = b"".join(spelling[token] for token in tokens)
    stop = text[7:10]
    loop = Loop(engine(vocabulary=spelling))
    by_string = loop.add(prompt, max_tokens=30, stop=[stop])
    by_token = loop.add(prompt, max_tokens=30, stop_token_ids=[tokens[11]])
    by_length = loop.add(prompt, max_tokens=4)
    loop.run()
    cut = text.find(stop)
    assert loop.output(by_string) == tokens[: cut + len(stop)]
    assert loop.text_ends[by_string] == cut
    assert loop.output(by_token) == tokens[: tokens.index(tokens[11]) + 1]
    assert loop.output(by_length) == tokens[:4]
    assert (loop.finish[by_string], loop.finish[by_token], loop.finish[by_length]) == (2, 1, 3)
    assert loop.text_ends[by_length] == -1


def test_scores_and_alternatives_come_with_the_tokens():
    loop = Loop(engine())
    loop.add([1, 2], max_tokens=5, logprobs=2)
    loop.add([3, 4], max_tokens=5)
    _, accepted, events = loop.step()
    expected = 9.0 - np.log(np.exp(9.0) + VOCAB - 1)
    first = list(events.request_ids).index(0)
    assert events.logprobs[first] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(events.logprobs[1 - first])
    span = slice(events.top_starts[first], events.top_starts[first + 1])
    assert events.top_tokens[span].tolist()[0] == events.tokens[first]
    assert len(events.top_tokens[span]) == len(events.top_logprobs[span]) == 2
    assert accepted.top_starts[-1] == 2


def test_sampled_tokens_of_a_device_are_walked():
    core = engine()
    core.add([1, 2], {"max_tokens": 9})
    plan = core.plan()
    core.commit(plan, core.accept_sampled(plan, np.array([7])))
    plan = core.plan()
    plan.set_drafts(np.array([[5, 6, 8]]))
    assert plan.token_ids.tolist() == [7, 5, 6, 8]
    accepted = core.accept_sampled(plan, np.array([5, 6, 9, 1]), np.array([-1.0, -2.0, -3.0, -4.0], np.float32))
    assert accepted.accepted.tolist() == [2]
    assert accepted.tokens.tolist() == [5, 6, 9]
    assert accepted.logprobs.tolist() == [-1.0, -2.0, -3.0]


def device_step(options=({},)):
    """An engine whose requests have one token each, and the plan of their next step with drafts 5, 6, 8."""
    core = engine(max_running=4)
    for extra in options:
        core.add([3, 1, 3], {"max_tokens": 9, **extra})
    plan = core.plan()
    core.commit(plan, core.accept_sampled(plan, np.full(len(options), 7)))
    plan = core.plan()
    plan.set_drafts(np.array([[5, 6, 8]] * len(options)))
    return core, plan


def test_a_device_names_the_likeliest_tokens_and_everyone_gets_what_they_asked_for():
    core, plan = device_step(({"logprobs": 2}, {"logprobs": 0}, {}))
    n = len(plan.logit_rows)
    tops = np.arange(3 * n, dtype=np.int64).reshape(n, 3) % 31
    scores = -np.arange(3 * n, dtype=np.float32).reshape(n, 3)
    drawn = np.array([5, 9, 1, 1] * 3)
    accepted = core.accept_sampled(
        plan, drawn, np.full(n, -0.5, np.float32), status=np.zeros(n, np.int32), top_tokens=tops, top_logprobs=scores
    )
    events = core.commit(plan, accepted)
    assert events.tokens.tolist() == [5, 9] * 3
    assert np.diff(events.top_starts).tolist() == [2, 2, 0, 0, 0, 0]
    assert events.top_tokens.tolist() == tops[:2, :2].reshape(-1).tolist()
    assert events.top_logprobs.tolist() == scores[:2, :2].reshape(-1).tolist()


@pytest.mark.parametrize(
    ("status", "message"),
    [(1, "got NaN or \\+inf"), (2, "31 columns that are all -inf"), (3, "an overflow"), (9, "unknown status")],
)
def test_a_row_that_a_device_could_not_draw_fails_its_request_alone(status, message):
    core, plan = device_step(({}, {}))
    statuses = np.array([0, status, 0, 0, 0, 0, 0, status], np.int32)
    accepted = core.accept_sampled(plan, np.array([5, -1, 1, 1, 5, 9, 1, -1]), status=statuses)
    events = core.commit(plan, accepted)
    assert events.finish.tolist() == [4, 0] and events.tokens.tolist() == [5, 9]
    assert re.search(message, events.errors[0][1])


def test_what_a_device_drew_has_the_plans_shape():
    core, plan = device_step()
    good = np.array([5, 6, 9, 1])
    for name, options in (
        ("sampled", {"sampled": good[:3]}),
        ("logprobs", {"logprobs": np.zeros(3, np.float32)}),
        ("status", {"status": np.zeros(5, np.int32)}),
        ("top_tokens", {"top_tokens": np.zeros((3, 2), np.int64), "top_logprobs": np.zeros((4, 2), np.float32)}),
        ("top_logprobs", {"top_tokens": np.zeros((4, 2), np.int64), "top_logprobs": np.zeros((4, 1), np.float32)}),
    ):
        with pytest.raises(InvalidArgument, match=f"^{name}: got"):
            core.accept_sampled(plan, **{"sampled": good, **options})
    core.commit(plan, core.accept_sampled(plan, good))


def rows_of_sampling(packed):
    """The rows as NumPy sees the header's structure."""
    return np.frombuffer(packed.rows.tobytes(), dtype=np.dtype(header_structures()["SamplingRow"]))


def test_a_device_is_told_what_its_rows_ask_for():
    asked = (
        {},
        {"presence_penalty": 0.5, "logprobs": 2},
        {"repetition_penalty": 1.5, "temperature": 0.5, "top_p": 0.75, "seed": 2**64 - 1},
        {"logit_bias": {7: -1.0, 3: 2.0}, "min_tokens": 4, "stop_token_ids": [5, 2, 5], "logprobs": 0},
    )
    core, plan = device_step(asked)
    packed = core.device_sampling(plan)
    rows = rows_of_sampling(packed)
    assert rows["seed"].tolist() == [0, 0, 2**64 - 1, 0] and rows["temperature"].tolist() == [0, 0, 0.5, 0]
    assert rows["repetition_penalty"].tolist() == [1, 1, 1.5, 1] and rows["top_p"].tolist() == [1, 1, 0.75, 1]
    assert rows["history_start"].tolist() == [0, 0, 3, 6] and rows["history_end"].tolist() == [0, 3, 6, 6]
    assert packed.history_tokens.tolist() == [1, 3, 7] * 2 and packed.history_counts.tolist() == [0, 0, 1] * 2
    last = rows[3]
    assert (last["bias_start"], last["bias_end"], last["mask_end"], last["mask_before"]) == (0, 2, 4, 7)
    assert packed.bias_tokens.tolist() == [3, 7, 2, 5] and packed.bias_values.tolist() == [2, -1, -np.inf, -np.inf]
    assert (packed.filters, packed.scores, packed.alternatives, packed.unresolved) == (True, True, 2, False)
    drawn = np.array([5, 6, 7, 7] * 4)
    core.commit(plan, core.accept_sampled(plan, drawn))
    with pytest.raises(DflashError, match="committed or called off"):
        core.device_sampling(plan)
    packed = core.device_sampling(core.plan())
    assert packed.history_tokens[:5].tolist() == [1, 3, 5, 6, 7] and packed.history_counts[:5].tolist() == [
        0,
        0,
        1,
        1,
        2,
    ]


def test_a_history_that_waits_for_a_step_says_so():
    core = engine(depth=1)
    core.add([1, 2], {"presence_penalty": 0.5})
    first = core.plan()
    assert not core.device_sampling(first).unresolved
    second = core.plan()
    assert core.device_sampling(second).unresolved
    core.commit(first, core.accept_sampled(first, np.array([7])))
    packed = core.device_sampling(second)
    assert not packed.unresolved and packed.history_tokens.tolist() == [1, 2, 7]


def test_a_row_whose_request_has_left_asks_for_nothing():
    core, plan = device_step(({"presence_penalty": 0.5}, {"temperature": 0.5}))
    core.abort(0)
    packed = core.device_sampling(plan)
    rows = rows_of_sampling(packed)
    assert packed.history_tokens.size == 0 and rows["repetition_penalty"].tolist() == [1, 1]
    assert rows["temperature"].tolist() == [1, 0.5]


def test_the_core_and_sampling_params_mean_the_same_by_nothing():
    packed = []
    for params in (None, {}, SamplingParams().for_core(0, True)):
        core = engine()
        core.add([1, 2], params)
        packed.append(core.device_sampling(core.plan()))
    assert {one.rows.tobytes() for one in packed} == {packed[0].rows.tobytes()}
    assert {(one.filters, one.scores, one.alternatives, one.bias_tokens.size) for one in packed} == {
        (False, False, 0, 0)
    }
    lengths = []
    for params in (None, SamplingParams().for_core(0, True)):
        core = engine(num_pages=80)
        core.add([1, 2], params)
        length = 0
        while (plan := core.plan(1)) is not None:
            length += core.commit(plan, core.accept_sampled(plan, np.array([7]))).tokens.size
        lengths.append(length)
    assert lengths == [128, 128]


def test_min_tokens_keeps_the_text_going():
    """The target would say token 9, which ends the text, at every place, and a stop string is spelled at once."""
    spelling = [b"ab"] * VOCAB
    logits = np.zeros((9, VOCAB), np.float32)
    logits[:, 9], logits[:, 4], logits[:, 6] = 3.0, 2.0, 1.0
    for least, stops, expected, finish in (
        (0, {}, [9], 1),
        (3, {}, [4, 4, 4, 9], 1),
        (3, {"stop_token_ids": [4]}, [6, 6, 6, 9], 1),
        (5, {"ignore_eos": True}, [4, 4, 4, 4, 4, 9, 9], 3),
        (0, {"stop": ["ba"], "ignore_eos": True}, [9, 9], 2),
        (2, {"stop": ["ba"]}, [4, 4, 9], 1),
        (2, {"stop": ["ba"], "ignore_eos": True}, [4, 4, 9], 2),
        (7, {"stop": ["ba"]}, [4] * 7, 3),
    ):
        core = engine(eos_ids=[9], vocabulary=spelling)
        core.add([1, 2], {"min_tokens": least, "max_tokens": 7, **stops})
        tokens, last = [], 0
        while (plan := core.plan()) is not None:
            if plan.draft_rows.size:
                # Right for a while, then wrong.
                plan.set_drafts(np.array([[4, 9, 4]]))
            accepted = core.accept(plan, logits[: plan.logit_rows.size])
            events = core.commit(plan, accepted)
            tokens += events.tokens.tolist()
            last = int(events.finish[-1]) if events.finish.size else last
        assert (tokens, last) == (expected, finish), (least, stops)


def test_a_row_of_nothing_but_masked_tokens_fails_its_request():
    core = engine(eos_ids=[9])
    core.add([1, 2], {"min_tokens": 2})
    plan = core.plan()
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[0, 9] = 0.0
    events = core.commit(plan, core.accept(plan, logits))
    assert events.finish.tolist() == [4] and "-inf" in events.errors[0][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt: got 0 tokens"),
        ({"prompt": [VOCAB]}, "prompt: got token 31, expected tokens in 0..30"),
        ({"prompt": [-1]}, "prompt: got token -1"),
        ({"prompt": [1] * 200}, "prompt: got 200 tokens"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"max_tokens": 8, "min_tokens": 9}, r"min_tokens: got 9, expected 0..8 \(max_tokens\)"),
        ({"topp": 0.5}, "params: got 'topp', expected some of temperature, top_k, top_p, "),
        ({"temperature": -1.0}, "temperature: got -1"),
        ({"top_p": 0.0}, "top_p: got 0"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias: got token 31"),
        ({"stop_token_ids": [99]}, "stop_token_ids: got token 99"),
        ({"stop": [b"x"]}, "stop: got strings for an engine without a vocabulary"),
        ({"logprobs": VOCAB + 1}, "logprobs: got 32"),
    ],
)
def test_a_bad_request_is_refused_by_name(options, message):
    core = engine()
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        core.add(options.pop("prompt", [1]), options)
    assert not core.has_work


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_pages": 0}, "num_pages: got 0"),
        ({"page_size": 0}, "page_size: got 0"),
        ({"max_batch_tokens": 3, "max_running": 4}, "max_batch_tokens: got 3, expected at least max_running = 4"),
        ({"depth": 2}, "depth: got 2, expected 0 or 1"),
        ({"eos_ids": [31]}, "eos_ids: got token 31"),
        ({"vocabulary": [b"a"]}, "vocabulary: got 1 elements, expected 31"),
    ],
)
def test_bad_sizes_are_refused_by_name(sizes, message):
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        engine(**sizes)


def test_a_prompt_that_can_never_fit_is_out_of_pages():
    with pytest.raises(
        OutOfPages,
        match="prompt: got 100 tokens with max_tokens 99, 50 pages of 4 slots, expected at most the pool's 40",
    ):
        engine().add([1] * 100, {"max_tokens": 99})


def test_a_narrowed_step_verifies_and_counts_only_what_is_left():
    core = engine()
    core.add([1, 2], {"max_tokens": 9})
    plan = core.plan()
    core.commit(plan, core.accept_sampled(plan, np.array([7])))
    plan = core.plan()
    plan.set_drafts(np.array([[5, 6, 8]]))
    with pytest.raises(InvalidArgument, match="widths: got 5 for request 0, expected 1..4, the tokens of its row"):
        plan.narrow(np.array([5], np.int32))
    plan.narrow(np.array([2], np.int32))
    assert plan.token_ids.tolist() == [7, 5] and plan.block_len.tolist() == [2] and len(plan.logit_rows) == 2
    accepted = core.accept_sampled(plan, np.array([5, 6]))
    events = core.commit(plan, accepted)
    assert events.tokens.tolist() == [5, 6]
    assert (events.drafted.tolist(), events.accepted.tolist()) == ([1], [1])


def test_a_step_of_trees_says_what_has_to_move():
    core = engine()
    core.add([1, 2], {"max_tokens": 9})
    plan = core.plan()
    core.commit(plan, core.accept_sampled(plan, np.array([7])))
    plan = core.plan()
    slots = plan.slots.copy()
    tokens, parents = np.array([[7, 5, 6, 8, 0]]), np.array([[-1, 0, 0, 2, 0]], np.int32)
    for change, message in (
        ({"counts": np.array([5], np.int32)}, "trees: got 5 nodes for request 0, expected at most 4"),
        ({"counts": np.array([6], np.int32)}, "counts: got 6, expected 1..5"),
        ({"counts": np.array([4, 4], np.int32)}, r"counts: got shape \[2\], expected shape \[1\]"),
        ({"tokens": np.array([[8, 5, 6, 8, 0]])}, "trees: got anchor 8 for request 0, expected its last token 7"),
        ({"parents": np.array([[-1, 0, 2, 2, 0]], np.int32)}, "parents: got 2 at node 2"),
        ({"parents": np.zeros((1, 4), np.int32)}, r"parents: got shape \[1, 4\], expected shape \[1, 5\]"),
    ):
        given = {"tokens": tokens, "parents": parents, "counts": np.array([4], np.int32), **change}
        with pytest.raises(InvalidArgument, match=f"^{message}"):
            plan.set_trees(given["tokens"], given["parents"], given["counts"])
        assert plan.parents.size == 0 and plan.block_len.tolist() == [4]
    plan.set_trees(tokens, parents, np.array([4], np.int32))
    assert plan.token_ids.tolist() == [7, 5, 6, 8] and plan.positions.tolist() == [2, 3, 3, 4]
    assert plan.parents.tolist() == [-1, 0, 0, 2] and plan.ancestors.tolist() == [0b1, 0b11, 0b101, 0b1101]
    with pytest.raises(DflashError, match="trees already"):
        plan.narrow(np.array([1], np.int32))
    accepted = core.accept_sampled(plan, np.array([6, 0, 8, 3]))
    assert accepted.commit_rows.tolist() == [0, 2, 3] and accepted.commit_starts.tolist() == [0, 3]
    assert accepted.commit_slots.tolist() == slots[:3].tolist()
    assert (accepted.move_from.tolist(), accepted.move_to.tolist()) == (slots[2:4].tolist(), slots[1:3].tolist())
    planner = Planner(4, tree_nodes=3)
    planner.record_step(plan, accepted)
    assert plan.temperatures.tolist() == [0.0] and plan.drafts
    assert min(planner.acceptance(0.0)[:2]) > 0.7 and planner.acceptance(1.0)[:2] == [0.7, 0.7]
    events = core.commit(plan, accepted)
    assert events.tokens.tolist() == [6, 8, 3]
    assert (events.drafted.tolist(), events.verified.tolist(), events.accepted.tolist()) == ([2], [3], [2])
    assert core.stats()["verified"] == 3 and core.stats()["drafted"] == 2


def test_the_planner_shares_out_the_nodes_of_trees():
    anchors, most, hot = np.array([7, 9]), np.array([6, 3], np.int32), np.ones(2, np.float32)
    tokens = np.arange(12).reshape(2, 3, 2)
    probabilities = np.array([[[0.9, 0.05]] * 3, [[0.5, 0.4]] * 3], np.float32)
    free = Planner(4, tree_nodes=5)
    trees, parents, widths = free.admit_trees(anchors, tokens, probabilities, hot, most)
    assert widths.tolist() == [6, 3] and trees.shape == parents.shape == (2, 6)
    assert trees[0, :4].tolist() == [7, 0, 2, 4] and parents[0, :4].tolist() == [-1, 0, 1, 2]
    assert trees[1, :3].tolist() == [9, 6, 7] and parents[1, :3].tolist() == [-1, 0, 0]
    dear = Planner(4, target=[(0, 1.0), (1, 1.2)], tree_nodes=5)
    assert dear.admit_trees(anchors, tokens, probabilities, hot, most, others=3)[2].sum() < 9
    assert free.decide(hot) == (6, 4, True) and dear.decide(hot[:0], 3) == (1, 1, False)
    flat = Planner(4, target=[(0, 1.0)], tree_nodes=5)
    assert flat.decide(hot[:1]) == (6, 4, True)
    assert [flat.decide(hot[:1], widths=[4, 6], room=room) for room in (6, 5, 3)] == [
        (6, 4, True),
        (4, 4, True),
        (1, 1, False),
    ]
    for arguments, message in (
        ((anchors, tokens, probabilities[:1], hot, most), "probabilities: got shape"),
        ((anchors[:1], tokens, probabilities, hot, most), "tokens: got shape"),
        ((anchors, tokens, probabilities, hot, most[:1]), r"most: got shape \[1\], expected shape \[2\]"),
        ((anchors, tokens, probabilities, hot[:1], most), r"temperatures: got shape \[1\], expected shape \[2\]"),
        ((anchors, tokens.astype(np.int32), probabilities, hot, most), "tokens: got a int32 array"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{message}"):
            free.admit_trees(*arguments)
    with pytest.raises(InvalidArgument, match="^tree_nodes: got 2000"):
        Planner(4, tree_nodes=2000)


def test_the_planner_weighs_rows_against_tokens():
    hot, most = np.ones(64, np.float32), np.full(64, 8, np.int32)
    free = Planner(8)
    assert free.decide(hot) == (8, 8, False) and free.costs is None
    assert free.admit(np.zeros((2, 7), np.float32), hot[:2], np.array([8, 5], np.int32)).tolist() == [8, 5]
    dear = Planner(8, target=[(0, 1.0), (10, 2.0)])
    sure, unsure = [0.9] * 7, [0.9, 0.05] + [0.9] * 5
    widths = dear.admit(np.array([sure, unsure], np.float32), hot[:2], most[:2])
    assert widths.dtype == np.int32 and widths[0] > 4 and widths[1] == 2
    assert dear.costs == ([(0.0, 1.0), (10.0, 2.0)], [(0.0, 0.0)], 0.0)
    assert Planner(8, context=0.25).costs == ([(0.0, 1.0)], [(0.0, 0.0)], 0.25)
    for _ in range(60):
        dear.observe(10, 1.5, 8, 9.0)
    (_, empty), (_, full) = dear.costs[0]
    assert full == pytest.approx(1.5) and 0.5 < empty < 1.0 and dear.costs[1] == [(0.0, 0.0)]
    for _ in range(200):
        dear.observe(10, 1.8)
    assert dear.costs[0][1][1] == pytest.approx(1.8)
    for _ in range(200):
        dear.record(7, 0, 0.5, np.full(7, 0.9, np.float32))
    assert dear.decide(np.full(4, 0.5, np.float32)) == (1, 1, False) and dear.decide(hot[:4])[0] > 1
    assert dear.acceptance(0.5)[0] < 0.05 and dear.acceptance()[0] == 0.7
    assert dear.exponent(0.5) > 5 and dear.exponent() == 1
    stairs = Planner(8, target=[(4, 1.0), (5, 9.0)])
    assert stairs.admit(np.full((1, 7), 0.3, np.float32), hot[:1], most[:1]).tolist() == [4]
    for options, message in (
        ({"target": [(0, 0.0)]}, "target: got no time"),
        ({"target": []}, "target: got no points"),
        ({"draft": [(0, 1.0), (4, 0.5)]}, r"draft: got \(4, 0.5\), expected times"),
        ({"draft": [(4, 1.0), (4, 1.0)]}, r"draft: got \(4, 1\), expected rows"),
        ({"context": -1.0}, "context: got -1, expected a finite time"),
    ):
        with pytest.raises(InvalidArgument, match=f"^{message}"):
            Planner(8, **options)
    with pytest.raises(InvalidArgument, match="block_size: got 1099511627776, expected 1..4096"):
        Planner(2**40)
    with pytest.raises(DflashError):
        dear.record(3, 5)
    with pytest.raises(InvalidArgument, match="probabilities: got"):
        dear.admit(np.ones((2, 14), np.float32)[:, ::2], hot[:2], most[:2])
    with pytest.raises(
        InvalidArgument, match="^probabilities: got 2 elements, expected at least 3, one for each draft"
    ):
        dear.record(3, 1, 1.0, hot[:2])


def test_what_the_drafters_probabilities_are_worth_is_learnt_from_the_steps_they_were_admitted_in():
    loop = Loop(engine())
    for prompt, temperature in (([1, 2, 3], 0.0), ([4, 5], 1.0)):
        loop.add(prompt, max_tokens=40, temperature=temperature)
    loop.step()
    planner, temperatures = Planner(4), np.array([0.0, 1.0], np.float32)
    for _ in range(6):
        plan = loop.core.plan()
        # The first request's drafts are always right, those of the second one never.
        texts = [loop.texts[request] for request in plan.request_ids.tolist()]
        right = np.array([continuation(text, 3) for text in texts])
        right[1] = (right[1] + 1) % VOCAB
        plan.set_drafts(right)
        widths = planner.admit(
            np.full((2, 3), 0.5, np.float32), temperatures, plan.block_len[plan.draft_rows], plan=plan
        )
        plan.narrow(widths)
        accepted = loop.core.accept(plan, loop.logits(plan))
        assert accepted.accepted.tolist() == [3, 0]
        assert plan.temperatures.tolist() == temperatures.tolist()
        planner.record_step(plan, accepted)
        loop.hear(loop.core.commit(plan, accepted))
    assert planner.exponent(0.0) < 0.6 and 1.5 < planner.exponent(1.0) and planner.exponent(0.4) == 1


def test_arrays_of_the_wrong_shape_are_refused_and_the_step_can_go_on():
    loop = Loop(engine())
    request = loop.add([1, 2, 3], max_tokens=8)
    loop.step()
    plan = loop.core.plan()
    with pytest.raises(InvalidArgument, match="drafts: got shape"):
        plan.set_drafts(np.zeros((2, 3), np.int64))
    with pytest.raises(InvalidArgument, match="drafts: got 2 columns"):
        plan.set_drafts(np.zeros((1, 2), np.int64))
    with pytest.raises(InvalidArgument, match="drafts: got token 31"):
        plan.set_drafts(np.full((1, 3), VOCAB))
    with pytest.raises(DflashError, match="drafts are missing: call set_drafts"):
        loop.core.accept(plan, np.zeros((4, VOCAB), np.float32))
    plan.set_drafts(loop.drafts(plan))
    with pytest.raises(InvalidArgument, match=r"logits: got shape \[4, 30\]"):
        loop.core.accept(plan, np.zeros((4, VOCAB - 1), np.float32))
    with pytest.raises(InvalidArgument, match="not C-contiguous"):
        loop.core.accept(plan, np.zeros((VOCAB, 4), np.float32).T)
    with pytest.raises(
        InvalidArgument, match=r"logits: got a float64 array of shape \[4, 31\], expected a C-contiguous float32"
    ):
        loop.core.accept(plan, np.zeros((4, VOCAB), np.float64))
    with pytest.raises(InvalidArgument, match="sampled: got 3 elements, expected 4"):
        loop.core.accept_sampled(plan, np.zeros(3, np.int64))
    with pytest.raises(DflashError, match="not resolved: commit or cancel it"):
        loop.core.plan()
    accepted = loop.core.accept(plan, loop.logits(plan))
    loop.hear(loop.core.commit(plan, accepted))
    with pytest.raises(DflashError, match="committed or called off already"):
        loop.core.commit(plan, accepted)
    loop.run()
    assert loop.output(request) == continuation([1, 2, 3], 8)


def test_threads_that_share_an_engine_do_not_wait_for_each_other_in_a_circle():
    core = Engine(num_pages=256, vocab_size=5_000, max_running=64, max_batch_tokens=512)
    for n in range(64):
        core.add([n, n + 1], {"temperature": 1.0, "seed": n})
    plan = core.plan()
    logits = np.random.default_rng(0).standard_normal((len(plan.logit_rows), 5_000), np.float32)
    expected = core.accept(plan, logits).tokens.tolist()
    heard = []

    def draw() -> None:
        # The lock of the engine must never be waited for with the GIL held by someone the GIL's owner waits for.
        for _ in range(20):
            heard.append(core.accept(plan, logits).tokens.tolist())

    workers = [threading.Thread(target=draw, daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        assert core.counts()["running"] == 64
        assert core.page_table.shape[0] == 64
    assert heard == [expected] * 60


def test_a_page_pool_counts_owners_and_refuses_a_second_free():
    pool = PagePool(4)
    pages = pool.alloc(3)
    assert pages.tolist() == [0, 1, 2]
    with pytest.raises(OutOfPages, match="2 pages needed, 1 of 4 are free"):
        pool.alloc(2)
    pool.retain(pages[:1])
    assert [pool.owners(page) for page in range(4)] == [2, 1, 1, 0]
    with pytest.raises(InvalidArgument, match="page 3: not held"):
        pool.retain([0, 3])
    with pytest.raises(InvalidArgument, match="page 1: not held"):
        pool.release([1, 1])
    assert [pool.owners(page) for page in range(4)] == [2, 1, 1, 0], "all or nothing"
    pool.release([0, 0, 1, 2])
    assert pool.num_free == pool.num_pages == 4
    with pytest.raises(InvalidArgument):
        pool.release(pages)
    with pytest.raises(InvalidArgument):
        PagePool(0)


def test_a_width_is_chosen_from_what_steps_took():
    planner = WidthPlanner([1, 4, 8])
    assert planner.widths == [1, 4, 8] and len(planner.acceptance()) == 7
    assert planner.choose(2) == 8 and planner.times(2) == [None] * 3
    for _ in range(50):
        width = planner.choose(2)
        planner.observe(2, width, 0.1 * width)
        planner.record(width, [0, 0])
    assert planner.choose(2) == 1
    assert planner.times(2) == [0.1, pytest.approx(0.4), 0.8] and planner.times(3) == [None] * 3
    # Deeper places, which nothing reached, are taken to be as likely; other temperatures and longer contexts are judged for themselves.
    assert max(planner.acceptance()) < 0.2 and planner.acceptance(1.0) == [pytest.approx(0.7)] * 7
    assert planner.times(2, 5000) == [None] * 3
    planner.observe(2, 4, 0.5, 5000)
    planner.record(8, [7, 0], [1.0, 0.0])
    assert planner.times(2, 5000) == [None, 0.5, None] and planner.acceptance(1.0)[6] > 0.7
    assert planner.choose(2, 5000, [1.0, 0.0]) in (1, 4, 8)
    for widths in ([], [0], [4, 1], [2**13]):
        with pytest.raises(InvalidArgument, match="^widths: got"):
            WidthPlanner(widths)
    with pytest.raises(InvalidArgument, match="accepted: got 4 accepted drafts of 3"):
        planner.record(4, [1, 4])


# Temperatures and most tokens of two requests.
ROWS = np.ones(2, np.float32), np.full(2, 4, np.int32)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: PagePool(-1), "num_pages"),
        (lambda: PagePool(2**70), "num_pages"),
        (lambda: PagePool(4).alloc(-1), "count"),
        (lambda: PagePool(4).owners(2**40), "page"),
        (lambda: Planner(-1), "block_size"),
        (lambda: Planner(8).decide(np.zeros(1)), "temperatures"),
        (lambda: Planner(8).decide(np.zeros(1, np.float32), 2**70), "others"),
        (lambda: Planner(8).decide(np.zeros(1, np.float32), room=-1), "room"),
        (lambda: Planner(8).acceptance(-1.0), "temperature"),
        (lambda: Planner(8).exponent(float("nan")), "temperature"),
        (lambda: Planner(8).record(-1, 2), "drafted"),
        (lambda: Planner(8).observe(-1, 1.0), "target_rows"),
        (lambda: Planner(8).admit(np.zeros((2, 3), np.float32), *ROWS, -1), "others"),
        (lambda: Planner(8).admit(np.zeros((2, 3)), *ROWS), "probabilities"),
        (lambda: WidthPlanner(8), "widths"),
        (lambda: WidthPlanner([1, 8]).choose(-1), "requests"),
        (lambda: WidthPlanner([1, 8]).choose(1, -1), "context"),
        (lambda: WidthPlanner([1, 8]).choose(1, 0, [-1.0]), "temperatures"),
        (lambda: WidthPlanner([1, 8]).observe(1, 8, -1.0), "seconds"),
        (lambda: WidthPlanner([1, 8]).record(8, [-1]), "accepted"),
        (lambda: WidthPlanner([1, 8]).record(0, [0]), "width"),
        (lambda: verify.sample_rows(np.zeros((1, 4), np.float32), [0], top_k=-1), "top_k"),
        (lambda: verify.top_logprobs(np.zeros(4, np.float32), -1), "n"),
        (lambda: verify.gumbel(-1, 0, 4), "seed"),
        (lambda: verify.gumbel(0, 2**64, 4), "position"),
        (lambda: verify.gumbel(0, 0, 2**32), "columns"),
    ],
)
def test_a_number_that_does_not_fit_is_refused_by_name(call, name):
    with pytest.raises(InvalidArgument, match=f"^{name}: got"):
        call()
