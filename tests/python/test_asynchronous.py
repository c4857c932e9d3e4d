"""The engine for asyncio: tasks share batches, one that is cancelled takes its requests along, errors reach the task they belong to."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest

from dflash_rs import DflashError, InvalidArgument, SamplingParams

torch = pytest.importorskip("torch")

from dflash_rs import LLM  # noqa: E402

pytestmark = pytest.mark.pair
PROMPTS = ["def add(a, b):\n", "import os\n\n\ndef main(", "class Stack:\n    ", "for i in range("]
WARM = SamplingParams(temperature=0.9, seed=5, max_tokens=16)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    torch.set_num_threads(1)
    with LLM(device="cpu", max_running=8, adaptive=False) as engine:
        yield engine


def until(condition, patience: float = 60.0) -> bool:
    """Waits for what other threads do; how long that takes decides nothing."""
    end = time.monotonic() + patience
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def idle(engine: LLM) -> bool:
    stats = engine.stats()
    free = stats["free_pages"] + stats["cached_pages"] == stats["total_pages"]
    return free and stats["running"] == stats["waiting"] == 0 and not engine._requests.active


def test_events_and_outputs_are_those_of_the_plain_calls(llm):
    expected = llm.generate(PROMPTS, WARM)

    async def work():
        texts: dict[int, str] = {}
        async for event in llm.astream(PROMPTS, WARM):
            texts[event.index] = texts.get(event.index, "") + event.text
        return (
            texts,
            await llm.agenerate(PROMPTS, WARM, draft=False),
            await llm.agenerate(PROMPTS[0], {"temperature": 0.9, "seed": 5, "max_tokens": 16, "n": 2}),
        )

    texts, outputs, (several,) = asyncio.run(work())
    assert texts == {i: output.text for i, output in enumerate(expected)}
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert [a.metrics["seed"] for a in several.outputs] == [5, 6] and several.token_ids == expected[0].token_ids
    assert idle(llm) and until(lambda: not llm._driver._running)


def test_many_tasks_share_batches(llm):
    alone = [llm.generate(prompt, LONG)[0] for prompt in PROMPTS]
    before = llm.stats()["steps"]

    async def one(prompt):
        (output,) = await llm.agenerate(prompt, LONG)
        return output

    async def work():
        return await asyncio.gather(*(one(prompt) for prompt in PROMPTS * 2))

    outputs = asyncio.run(work())
    assert [o.token_ids for o in outputs] == [o.token_ids for o in alone] * 2
    # Each by itself they take more than four times as many.
    assert llm.stats()["steps"] - before < sum(o.metrics["steps"] for o in alone) and idle(llm)


def test_a_task_that_is_cancelled_takes_its_requests_along_and_no_others(llm):
    expected = llm.generate(PROMPTS[0], LONG)[0].token_ids

    async def work():
        begun = asyncio.Event()

        async def left():
            async for _ in llm.astream(PROMPTS[1:3], LONG, request_ids=["x", "y"]):
                begun.set()

        task, whole = asyncio.create_task(left()), asyncio.create_task(llm.agenerate(PROMPTS[3], LONG))
        stays = asyncio.create_task(llm.agenerate(PROMPTS[0], LONG))
        await begun.wait()
        task.cancel()
        whole.cancel()
        ended = await asyncio.gather(task, whole, return_exceptions=True)
        assert [type(error) for error in ended] == [asyncio.CancelledError] * 2
        return await stays

    (output,) = asyncio.run(work())
    assert output.token_ids == expected
    assert until(lambda: idle(llm)) and not llm.abort("x") and not llm.abort("y")


def test_a_task_that_is_cancelled_before_it_is_let_in_leaves_nothing(llm, monkeypatch):
    inside, go, stream = threading.Event(), threading.Event(), llm.stream

    def slow(*args, **options):
        inside.set()
        assert go.wait(60)
        return stream(*args, **options)

    monkeypatch.setattr(llm, "stream", slow)

    async def work():
        task = asyncio.create_task(llm.agenerate(PROMPTS[0], LONG))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()

    asyncio.run(work())
    assert until(lambda: not llm._driver._running) and idle(llm)


def test_leaving_closing_and_dropping_end_what_is_unfinished(llm):
    async def work():
        async with llm.astream(PROMPTS, LONG) as events:
            await anext(events)
        assert [e async for e in events] == []
        events = llm.astream(PROMPTS, LONG)
        await anext(events)
        events.close()
        await events.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        async for _ in llm.astream(PROMPTS, LONG):
            break
        gc.collect()
        never = llm.astream(PROMPTS, LONG)
        never.close()
        assert [e async for e in never] == []

    asyncio.run(work())
    assert until(lambda: idle(llm)) and until(lambda: not llm._driver._running)


def test_a_loop_that_is_gone_leaves_nothing_behind(llm):
    loop = asyncio.new_event_loop()
    events = llm.astream(PROMPTS, LONG)
    loop.run_until_complete(anext(events))
    loop.close()
    assert until(lambda: idle(llm)) and until(lambda: not llm._driver._running)


def test_errors_reach_their_task_and_nobody_else(llm, monkeypatch):
    expected = llm.generate(PROMPTS[0], LONG)[0].token_ids

    async def work():
        stays = asyncio.create_task(llm.agenerate(PROMPTS[0], LONG))
        with pytest.raises(InvalidArgument, match=r"^prompts\[1\]: got an empty prompt"):
            await llm.agenerate(["x", ""], WARM)
        first, refused = await llm.agenerate(["x", ""], WARM, on_error="return")
        assert first.error is None and refused.finish_reason == "error"
        with pytest.raises(TypeError, match="nothing"):
            await llm.agenerate("x", nothing=1)
        return await stays

    assert asyncio.run(work())[0].token_ids == expected

    def broken():
        raise DflashError("the step is broken")

    async def fails():
        return await asyncio.gather(llm.agenerate(PROMPTS[0], LONG), llm.agenerate("x", LONG), return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(llm._loop, "step", broken)
        errors = asyncio.run(fails())
    assert [str(error) for error in errors] == ["the step is broken"] * 2
    assert until(lambda: idle(llm)) and asyncio.run(llm.agenerate(PROMPTS[0], LONG))[0].token_ids == expected


def test_threads_and_tasks_share_an_engine(llm):
    expected = [llm.generate(prompt, LONG)[0].token_ids for prompt in PROMPTS]
    heard: dict[int, list[int]] = {}

    def plain(i):
        heard[i] = llm.generate(PROMPTS[i], LONG)[0].token_ids

    threads = [threading.Thread(target=plain, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()

    async def work():
        return await asyncio.gather(*(llm.agenerate(PROMPTS[i], LONG) for i in (2, 3)))

    outputs = asyncio.run(work())
    for thread in threads:
        thread.join()
    assert [heard[0], heard[1], *(output[0].token_ids for output in outputs)] == expected and idle(llm)


def test_chats_of_tasks(llm):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talk = [{"role": "user", "content": PROMPTS[0]}]
    (expected,) = llm.chat(talk, WARM, chat_template=template)

    async def work():
        text = ""
        async for event in llm.astream_chat(talk, WARM, chat_template=template):
            text += event.text
        return text, await llm.achat(talk, WARM, chat_template=template)

    text, (output,) = asyncio.run(work())
    assert text == output.text == expected.text


def test_closing_the_engine_ends_what_tasks_wait_for():
    with LLM(device="cpu", max_running=4, adaptive=False) as engine:

        async def work():
            task = asyncio.create_task(engine.agenerate(PROMPTS[:2], LONG))
            async for _ in engine.astream("x", LONG):
                # Let in with the next step.
                if len(engine._requests.active) == 3:
                    break
            engine.close()
            outputs = await task
            with pytest.raises(DflashError, match="this LLM is closed"):
                await engine.agenerate("x")
            return outputs

        assert [o.finish_reason for o in asyncio.run(work())] == ["abort", "abort"]
