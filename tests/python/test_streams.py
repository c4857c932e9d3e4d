"""`LLM` in other people's programs: threads, signal handlers, loops that are left, forks, the end of the process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")

from dflash_rs import LLM, DflashError, SamplingParams  # noqa: E402

PROMPTS = ["import os\n", "class Stack:\n", "def read(path):\n"]
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    torch.set_num_threads(1)
    with LLM(device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(llm):
    return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


def idle(engine: LLM) -> bool:
    stats = engine.stats()
    free = stats["free_pages"] + stats["cached_pages"] == stats["total_pages"]
    return free and stats["running"] == stats["waiting"] == 0 and not engine._requests.active


def during_a_step(monkeypatch, engine: LLM, at: int, what) -> None:
    """Calls `what` in the middle of the `at`-th step from now, in the thread that takes it."""
    forward, steps = engine._target.forward, iter(range(10**9))

    def interrupted(batch):
        if next(steps) == at:
            what()
        return forward(batch)

    monkeypatch.setattr(engine._target, "forward", interrupted)


@pytest.fixture
def handler():
    """Sets what SIGUSR1 does; a signal that a thread sends to itself is handled before its next line of Python."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda do: signal.signal(signal.SIGUSR1, lambda *_: do())
    signal.signal(signal.SIGUSR1, before)


def raise_signal() -> None:
    signal.raise_signal(signal.SIGUSR1)


def test_leaving_the_with_block_of_a_stream_ends_its_requests(llm, expected):
    with llm.stream(PROMPTS, LONG) as events:
        next(events)
        assert llm.stats()["running"] == 3
    assert idle(llm) and list(events) == []
    with pytest.raises(ZeroDivisionError), llm.stream(PROMPTS, LONG) as events:
        for _ in events:
            raise ZeroDivisionError
    assert idle(llm)
    assert [o.token_ids for o in llm.generate(PROMPTS, PARAMS)] == expected


def test_a_loop_that_is_left_by_an_exception_ends_its_requests(llm):
    def consume():
        for _ in llm.stream(PROMPTS, LONG):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert idle(llm)


def test_a_stream_that_is_still_held_goes_on_when_its_loop_is_left(llm, expected):
    held = llm.stream(PROMPTS[0], PARAMS)
    tokens = []
    for event in held:
        tokens += event.token_ids
        break
    assert llm.generate(PROMPTS[1], PARAMS)[0].token_ids == expected[1]
    for event in held:
        tokens += event.token_ids
    assert tokens == expected[0] and idle(llm)
    held = llm.stream(PROMPTS[0], LONG)
    next(held)
    held.close()
    held.close()
    assert idle(llm) and list(held) == []


def test_a_loop_over_a_stream_may_generate_with_the_same_llm(llm, expected):
    tokens = []
    for event in llm.stream(PROMPTS[0], PARAMS):
        tokens += event.token_ids
        assert llm.generate(PROMPTS[1], PARAMS)[0].token_ids == expected[1]
    assert tokens == expected[0] and idle(llm)


def test_threads_that_share_a_stream_each_get_what_the_others_do_not(llm, expected):
    for _ in range(3):
        stream, found, errors = llm.stream(PROMPTS, PARAMS), [], []

        def consume(stream=stream, found=found, errors=errors):
            try:
                found.extend(stream)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=consume) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors and not any(thread.is_alive() for thread in threads)
        outputs = {event.index: event.output.token_ids for event in found if event.output is not None}
        assert [outputs[i] for i in range(3)] == expected
        assert sum(len(event.token_ids) for event in found) == sum(map(len, expected))
        assert idle(llm)


def test_closing_a_stream_that_another_thread_waits_for_ends_its_loop(llm, monkeypatch):
    inside, closed = threading.Event(), threading.Event()
    during_a_step(monkeypatch, llm, 2, lambda: (inside.set(), closed.wait(60)))
    stream, seen = llm.stream(PROMPTS, LONG), []
    thread = threading.Thread(target=lambda: seen.extend(stream))
    thread.start()
    assert inside.wait(60)
    # The step is held up until this has returned: it waits for nothing.
    stream.close()
    closed.set()
    thread.join(60)
    assert not thread.is_alive() and idle(llm)
    assert all(event.output is None for event in seen)


def test_closing_the_llm_ends_what_other_threads_wait_for(monkeypatch):
    with LLM(device="cpu") as engine:
        inside, outputs = threading.Event(), []
        during_a_step(monkeypatch, engine, 2, inside.set)
        thread = threading.Thread(target=lambda: outputs.extend(engine.generate(PROMPTS, LONG)))
        thread.start()
        assert inside.wait(60)
        engine.close()
        thread.join(60)
        assert not thread.is_alive()
        assert [o.finish_reason for o in outputs] == ["abort"] * 3
        assert 0 < len(outputs[0].token_ids) < 400
        engine.close()


def test_a_signal_handler_may_close_the_llm_in_the_middle_of_a_step(monkeypatch, handler):
    with LLM(device="cpu") as engine:
        handler(engine.close)
        during_a_step(monkeypatch, engine, 2, raise_signal)
        outputs = engine.generate(PROMPTS, LONG)
        assert [o.finish_reason for o in outputs] == ["abort"] * 3
        assert engine._target.caches == {} and engine.stats()["running"] == 0
        with pytest.raises(DflashError, match="this LLM is closed"):
            engine.generate(PROMPTS[0])


def test_a_signal_handler_may_abort_a_request_and_close_its_stream(llm, expected, monkeypatch, handler):
    ended = {}
    stream = llm.stream(PROMPTS, PARAMS)
    first = min(llm._requests.active)
    handler(lambda: ended.setdefault("known", llm.abort(first)))
    with monkeypatch.context() as patch:
        during_a_step(patch, llm, 1, raise_signal)
        outputs = [event.output for event in stream if event.output is not None]
    assert ended["known"]
    by_place = {o.request_id - first: o for o in outputs}
    assert by_place[0].finish_reason == "abort" and by_place[0].token_ids == expected[0][: len(by_place[0].token_ids)]
    assert [by_place[i].token_ids for i in (1, 2)] == expected[1:]
    stream = llm.stream(PROMPTS, LONG)
    handler(stream.close)
    with monkeypatch.context() as patch:
        during_a_step(patch, llm, 2, raise_signal)
        assert all(event.output is None for event in stream)
    assert idle(llm)


def test_a_call_that_would_step_in_the_middle_of_a_step_is_refused_and_harms_nobody(
    llm, expected, monkeypatch, handler
):
    bystander = llm.stream(PROMPTS[1], PARAMS)
    refused = []

    def misuse():
        for call in (
            lambda: llm.generate(PROMPTS[2], PARAMS), lambda: llm.stream(PROMPTS[2]), lambda: next(bystander),
            lambda: llm.next_token_logits([5]), lambda: next(stream),
        ):  # fmt: skip
            with pytest.raises(
                DflashError, match="in the middle of a step of the same thread|in the middle of another"
            ) as error:
                call()
            refused.append(str(error.value))
        assert llm.stats()["running"] == 2

    handler(misuse)
    with monkeypatch.context() as patch:
        during_a_step(patch, llm, 1, raise_signal)
        stream = llm.stream(PROMPTS[0], PARAMS)
        tokens = [token for event in stream for token in event.token_ids]
    assert tokens == expected[0] and len(refused) == 5
    assert [token for event in bystander for token in event.token_ids] == expected[1]
    assert idle(llm)


@pytest.mark.parametrize("where", ["plan", "accept", "commit", "route"])
def test_an_interruption_anywhere_in_a_step_leaves_no_text_with_a_hole(llm, expected, monkeypatch, where):
    class Core:
        """The core, and an interruption when a stage has just returned: its value is lost."""

        calls = 0

        def __getattr__(self, name):
            stage = getattr(core, name)
            if name != where:
                return stage

            def call(*args, **kwargs):
                value = stage(*args, **kwargs)
                Core.calls += 1
                if Core.calls == 3:
                    del value
                    raise KeyboardInterrupt
                return value

            return call

    loop = llm._loop
    core, route, routed = loop.core, loop._route, iter(range(10**9))

    def interrupted(events):
        if next(routed) == 2:
            raise KeyboardInterrupt
        route(events)

    first, second = llm.stream(PROMPTS[0], PARAMS), llm.stream(PROMPTS[1], PARAMS)
    with monkeypatch.context() as patch:
        if where == "route":
            patch.setattr(loop, "_route", interrupted)
        else:
            interrupts = Core()
            for part in (loop, loop.backend):
                patch.setattr(part, "core", interrupts)
        with pytest.raises(KeyboardInterrupt):
            list(first)
    assert list(first) == []
    tokens, output = [], None
    for event in second:
        tokens += event.token_ids
        output = event.output
    if where in ("commit", "route"):
        # Its tokens were decided and did not arrive.
        assert output.finish_reason == "abort" and tokens == output.token_ids == expected[1][: len(tokens)]
    else:
        assert tokens == expected[1]
    assert idle(llm)
    assert llm.generate(PROMPTS[2], PARAMS)[0].token_ids == expected[2]


def test_an_interruption_while_requests_are_handed_over_leaves_none_behind(llm, monkeypatch):
    from dflash_rs.engine import requests as module

    draw, calls = module.secrets.randbits, iter(range(10**9))

    def interrupted(bits):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return draw(bits)

    monkeypatch.setattr(module.secrets, "randbits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, PARAMS)
    assert idle(llm)


def test_a_finalizer_waits_for_no_step(llm):
    """Garbage may be collected while another thread is in a step, by one that holds what the step needs."""
    stream = llm.stream(PROMPTS, LONG)
    next(stream)
    cycle = [stream]
    cycle.append(cycle)
    holds, release = threading.Event(), threading.Event()

    def step():
        llm._turns.take(lambda: (holds.set(), release.wait(60)), lambda: None)

    thread = threading.Thread(target=step)
    thread.start()
    assert holds.wait(60)
    del stream, cycle
    gc.collect()
    assert len(llm._requests.active) == 3
    release.set()
    thread.join(60)
    assert idle(llm)


def test_two_llms_at_once_say_what_each_says_alone(llm, expected):
    with LLM(device="cpu", block_size=4) as other:
        found = {}

        def run(name, engine):
            found[name] = [o.token_ids for o in engine.generate(PROMPTS, PARAMS)]

        threads = [threading.Thread(target=run, args=pair) for pair in (("one", llm), ("other", other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        interleaved = [[], []]
        for pair in zip(llm.stream(PROMPTS[0], PARAMS), other.stream(PROMPTS[0], PARAMS)):
            for tokens, event in zip(interleaved, pair):
                tokens += event.token_ids
    assert found == {"one": expected, "other": expected}
    for tokens in interleaved:
        assert tokens == expected[0][: len(tokens)]
    assert idle(llm)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_and_hangs_nowhere(llm, expected):
    stream = llm.stream(PROMPTS[0], PARAMS)
    tokens = list(next(stream).token_ids)
    holds, release = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: llm._turns.take(lambda: (holds.set(), release.wait(60)), lambda: None))
    thread.start()
    assert holds.wait(60)
    child = os.fork()
    if child == 0:
        told = 0
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            for call in (lambda: llm.generate(PROMPTS[0]), lambda: next(stream), llm.stats, lambda: llm.abort(0)):
                try:
                    call()
                except DflashError as error:
                    told += "forked from" in str(error)
            stream.close()
            llm.close()
        finally:
            os._exit(told)
    release.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    for event in stream:
        tokens += event.token_ids
    assert tokens == expected[0] and idle(llm)


ENDING = """
import sys, threading
from dflash_rs import LLM, SamplingParams

llm, params = LLM(device="cpu", threads=1), SamplingParams(max_tokens=900, ignore_eos=True)
held = llm.stream("import os", params)
next(held)
loop = [held, llm]
loop.append(loop)
begun = threading.Event()


def consume():
    for event in llm.stream("class A:", params):
        begun.set()


threading.Thread(target=consume, daemon=True).start()
assert begun.wait(60)
print("end")
"""


def test_a_process_ends_quietly_with_streams_held_and_a_step_running():
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
