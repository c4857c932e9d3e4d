"""The overlapped loop on a CPU: the next step is launched before the last one's results are read, and nobody can tell by the text."""

from __future__ import annotations

import pytest

from dflash_rs import LLM, InvalidArgument, SamplingParams, StepCosts

pytestmark = pytest.mark.pair
PROMPTS = ["def add(a, b):\n", "import os\n\n\ndef main(", "class Stack:\n    ", "for i in range("]
MATRIX = [
    SamplingParams(max_tokens=31),
    SamplingParams(temperature=0.9, seed=5, max_tokens=24, top_k=30, top_p=0.9, min_p=0.02, logit_bias={10: -2.0}),
    SamplingParams(temperature=0.7, seed=6, max_tokens=40, stop=["\n"], logprobs=2),
    SamplingParams(temperature=0.7, seed=7, max_tokens=18, repetition_penalty=1.2, presence_penalty=0.4),
]
COSTS = StepCosts.lines(1.0, 0.02, 0.1, 0.0)


def engine(overlap, **options):
    return LLM(device="cpu", max_running=3, costs=COSTS, overlap=overlap, **options)


@pytest.fixture(scope="module", params=[0, 11], ids=["chains", "trees"])
def pair(request):
    with engine(False, tree_nodes=request.param) as plain, engine(True, tree_nodes=request.param) as ahead:
        yield plain, ahead


def said(outputs):
    assert all(o.error is None for o in outputs), [o.error for o in outputs]
    return [(o.text, o.token_ids, o.finish_reason) for o in outputs]


def idle(llm):
    stats = llm.stats()
    free = stats["free_pages"] + stats["cached_pages"] == stats["total_pages"]
    return free and stats["running"] == stats["waiting"] == stats["in_flight"] == 0


def gained(llm, work):
    """What `work` returns, and how many steps were launched ahead for it."""
    before = llm.stats()["steps_ahead"]
    return work(), llm.stats()["steps_ahead"] - before


@pytest.mark.parametrize("params", MATRIX[:3], ids=["greedy", "filters", "stop"])
def test_text_is_the_same_and_steps_are_launched_ahead(pair, params):
    plain, ahead = pair
    expected = said(plain.generate(PROMPTS[:3], params))
    for draft in (True, False):
        outputs, steps = gained(ahead, lambda d=draft: ahead.generate(PROMPTS[:3], params, draft=d))
        assert said(outputs) == expected and steps > 0
        assert idle(ahead)


def test_draws_that_count_earlier_tokens_wait_for_them(pair):
    plain, ahead = pair
    outputs, steps = gained(ahead, lambda: ahead.generate(PROMPTS[:3], MATRIX[3]))
    assert said(outputs) == said(plain.generate(PROMPTS[:3], MATRIX[3])) and steps == 0


def test_more_requests_than_run_at_a_time_all_of_them_different(pair):
    plain, ahead = pair
    prompts, params = PROMPTS * 3, MATRIX * 3
    assert said(ahead.generate(prompts, params)) == said(plain.generate(prompts, params))
    assert idle(ahead)


def test_few_pages_small_chunks_and_a_short_context():
    sizes = {"page_size": 4, "num_pages": 30, "max_context": 100, "max_batch_tokens": 12}
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=50, ignore_eos=True) for i in range(6)]
    prompts = [PROMPTS[i % 4] * 3 for i in range(6)]
    with engine(False, **sizes) as plain, engine(True, **sizes) as ahead:
        outputs, steps = gained(ahead, lambda: ahead.generate(prompts, params))
        assert said(outputs) == said(plain.generate(prompts, params))
        assert steps > 0 and ahead.stats()["retractions"] > 0 and idle(ahead)


def test_an_abort_with_a_step_in_flight_leaves_the_others_as_they_were(pair):
    plain, ahead = pair
    long = SamplingParams(temperature=0.8, seed=3, max_tokens=60, ignore_eos=True)
    expected = [o.token_ids for o in plain.generate(PROMPTS[:3], long)]
    stream = ahead.stream(PROMPTS[:3], long)
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}
    ended = None
    for count, event in enumerate(stream):
        got[event.index] += event.token_ids
        if count == 12:
            assert ahead.stats()["in_flight"] == 1
            (ended,) = [index for index in got if index == event.index]
            assert ahead.abort(event.request_id)
    assert ended is not None
    for index, tokens in got.items():
        assert tokens == expected[index][: len(tokens)]
        assert index == ended or tokens == expected[index]
    assert idle(ahead)


def test_an_interruption_calls_both_steps_off_and_the_requests_go_on(pair, monkeypatch):
    plain, ahead = pair
    expected = [o.token_ids for o in plain.generate(PROMPTS[:3], MATRIX[1])]
    backend, calls = ahead._loop.backend, iter(range(10**9))
    resolve = backend.resolve

    def interrupted(launched):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return resolve(launched)

    first, rest = ahead.stream(PROMPTS[0], MATRIX[1]), ahead.stream(PROMPTS[1:3], MATRIX[1])
    with monkeypatch.context() as patch:
        patch.setattr(backend, "resolve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(first)
    outputs = {event.index: event.output for event in rest if event.output is not None}
    assert [outputs[i].token_ids for i in range(2)] == expected[1:]
    assert idle(ahead)


def test_a_step_ahead_of_a_stream_that_was_left_is_called_off(pair):
    plain, ahead = pair
    with ahead.stream(PROMPTS[:3], SamplingParams(max_tokens=60, ignore_eos=True)) as events:
        for _, _ in zip(range(8), events):
            pass
    assert said(ahead.generate(PROMPTS[:3], MATRIX[0])) == said(plain.generate(PROMPTS[:3], MATRIX[0]))
    assert idle(ahead)


def test_closing_with_a_step_in_flight():
    with engine(True) as ahead:
        stream = ahead.stream(PROMPTS[:2], SamplingParams(max_tokens=60, ignore_eos=True))
        for _, _ in zip(range(6), stream):
            pass
    assert idle(ahead)


def test_overlap_is_none_or_a_flag():
    with pytest.raises(InvalidArgument, match="overlap: got 'yes', expected"):
        LLM(device="cpu", overlap="yes")
    with LLM(device="cpu", draft=None, model=None) as made:
        assert made._loop.overlap is False, "nothing runs beside the host on a CPU"
