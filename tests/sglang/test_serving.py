"""Servers of other shapes: replicas, shared attention, a drafter that sees a window, sessions, time limits, a cache behind the cache."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import cases
import pytest
from cases import matrix, tokens
from second import second
from servers import TARGET, Server, speculative, widths
from test_text import CHECKED

SEEDED = {"enable_deterministic_inference": True, "grammar_backend": "xgrammar"}
TWO_CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_HOST_FORK": "0"}


def passes_counted(server: Server) -> dict[int, float]:
    """Passes of the target by data-parallel rank, from /metrics."""
    text = server.get("/metrics")
    found = re.findall(r'^dflash_rs_spec_passes_total{dp_rank="(\d)"[^}]*} ([0-9.e+]+)$', text, re.MULTILINE)
    return {
        rank: sum(float(count) for r, count in found if int(r) == rank) for rank in {int(rank) for rank, _ in found}
    }


def lengths(answers: list[dict[str, Any]]) -> float:
    """Mean accept length."""
    return sum(answer["meta_info"]["spec_accept_length"] for answer in answers) / len(answers)


@pytest.mark.parametrize(
    "ranks",
    [{"dp_size": 2}, {"tp_size": 2, "attn_dp_size": 2, "enable_dp_lm_head": True}],
    ids=["replicas", "shared attention"],
)
def test_data_parallel_ranks_give_the_same_and_count_apart(reference: dict, logs, ranks: dict) -> None:
    names = ["greedy", "all penalties", "seed, top_k", "regex"]
    options = speculative(page_size=16, enable_metrics=True, **SEEDED, **ranks)
    with Server(logs / f"ranks-{'-'.join(ranks)}.log", env=TWO_CORES | widths("cycle"), **options) as server:
        # One request: with shared attention the other rank has to keep step without one.
        assert tokens(server.together(cases.bodies(cases.greedy()["greedy"], 1))) == tokens(reference["greedy"])[:1]
        before = passes_counted(server)
        answers = []
        for name in names:
            answers += server.together(cases.bodies(matrix()[name]))
        assert tokens(answers) == [text for name in names for text in tokens(reference[name])]
        assert lengths(answers) > 1.5
        after = passes_counted(server)
        assert set(after) == {0, 1}
        for rank, count in after.items():
            own = [answer["meta_info"] for answer in answers if answer["meta_info"]["dp_rank"] == rank]
            assert own, "a rank without requests"
            # With overlap scheduling, a request that has ended is in one more pass.
            verified = sum(info["spec_verify_ct"] for info in own)
            assert verified <= count - before.get(rank, 0) <= verified + len(own), rank
        assert server.flush_is_clean()
        whole = "whole blocks: ranks with data-parallel attention" in server.log.read_text(errors="replace")
        assert whole == ("attn_dp_size" in ranks)


@pytest.mark.parametrize(
    "shape",
    [{"page_size": 1}, {"page_size": 16, "disable_overlap_schedule": True}],
    ids=["pages of 1, overlapped", "pages of 16"],
)
def test_texts_that_run_to_the_end_of_the_context_leave_their_neighbours_alone(logs, shape: dict) -> None:
    # Twice the drafter's own block: the longer a block, the further beyond the context a step may write.
    options = {"context_length": 160, "speculative_num_draft_tokens": 16, **shape}
    plain = {name: value for name, value in options.items() if "speculative" not in name}
    asked = [
        {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}}
        for text in cases.prompts(4)
        for most in (159 - len(cases.tokenizer().encode(text).ids), 40)
    ]
    name = f"end-{shape['page_size']}"
    with Server(logs / f"{name}-plain.log", **plain) as server:
        expected = server.together(asked)
    with Server(logs / f"{name}.log", env=CHECKED, **speculative(**options)) as server:
        for _ in range(2):
            answers = server.together(asked)
            assert tokens(answers) == tokens(expected)
        ends = [a["meta_info"]["prompt_tokens"] + a["meta_info"]["completion_tokens"] for a in answers]
        assert max(ends) >= 158 and lengths(answers) > 1.5
        assert server.flush_is_clean()


def test_a_dflash_2_drafts_its_best_path(reference: dict, logs, tmp_path) -> None:
    names = ["greedy", "all penalties", "seed", "seed, top_k"]
    options = speculative(**SEEDED) | {"speculative_draft_model_path": str(second(tmp_path, 0.001))}
    with Server(logs / "second.log", env=widths(False), **options) as server:
        answers = []
        for name in names:
            answers += server.together(cases.bodies(matrix()[name]))
        assert tokens(answers) == [text for name in names for text in tokens(reference[name])]
        assert lengths(answers) > 1.5


# --- a window, sessions and time limits, on one server ----------------------------------------------------------------

RUNNING, WAITING = 30, 6

SLOW = '''
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

class Slow(CustomLogitProcessor):
    """Holds every pass of its batch up."""
    def __call__(self, logits, params):
        import time
        time.sleep(0.4)
        return logits
'''


def slow(count: int) -> list[dict[str, Any]]:
    """Requests that no machine finishes within the limit: at least 900 / 8 passes of 0.4 seconds."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(SLOW, space)
    params = {"temperature": 0, "max_new_tokens": 900, "ignore_eos": True, "custom_params": {"any": 1}}
    return cases.bodies(params, count, custom_logit_processor=space["Slow"].to_str())


@pytest.fixture(scope="module")
def limited(logs) -> Iterator[Server]:
    """Two requests at a time, within limits of time; every step of another width; a drafter that sees 16 tokens; sessions; no overlap
    scheduling."""
    options = speculative(
        speculative_draft_window_size=16,
        enable_streaming_session=True,
        enable_custom_logit_processor=True,
        disable_overlap_schedule=True,
        max_running_requests=2,
        **SEEDED,
    )
    limits = {"SGLANG_REQ_RUNNING_TIMEOUT": str(RUNNING), "SGLANG_REQ_WAITING_TIMEOUT": str(WAITING)}
    with Server(logs / "limited.log", env=CHECKED | limits | widths("cycle"), **options) as server:
        yield server


@pytest.mark.parametrize("name", ["greedy", "all penalties", "seed, top_k", "regex", "regex, ignore_eos"])
def test_a_drafter_that_sees_a_window_only(limited: Server, reference: dict, name: str) -> None:
    answers = limited.together(cases.bodies(matrix()[name]), at_once=2)
    assert tokens(answers) == tokens(reference[name])
    if name == "greedy":
        assert lengths(answers) > 1.5
        assert "draft_window_size=16, compact_cache=True" in limited.log.read_text(errors="replace")


class Session:
    """A streaming session: each turn sends what is new, and the server knows the rest. It keeps a place in the batch until it ends."""

    def __init__(self, server: Server):
        self.server, self.last = server, None
        status, self.id = server.post("/open_session", {"capacity_of_str_len": 4000, "streaming": True})
        assert status == 200, self.id

    def turn(self, new: list[int], params: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """The body of the next turn."""
        return {
            "input_ids": new,
            "sampling_params": params,
            "session_params": {"id": self.id, "rid": self.last},
            "return_logprob": True,
            **fields,
        }

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        status, answer = self.server.post("/close_session", {"session_id": self.id})
        assert status == 200, answer


def logprobs(answer: dict[str, Any]) -> list[float]:
    """Log-probabilities of the tokens written."""
    return [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]


@pytest.mark.parametrize("length", [7, 10, 13])
def test_the_turns_of_a_session_are_those_of_a_conversation(limited: Server, length: int) -> None:
    """With lengths at which a turn ends on a draft and on a token that no pass has had as its input."""
    params = cases.greedy()["greedy"] | {"max_new_tokens": length}
    said = new = cases.ids(cases.prompts()[0])
    with Session(limited) as session:
        for number in range(3):
            (answer,) = limited.together([session.turn(new, params)])
            (expected,) = limited.together([{"input_ids": said, "sampling_params": params, "return_logprob": True}])
            assert answer["output_ids"] == expected["output_ids"]
            assert logprobs(answer) == pytest.approx(logprobs(expected), abs=1e-3)
            if number:
                assert answer["meta_info"]["cached_tokens"] == len(said) - len(new) - 1, (
                    "all but the last token is known"
                )
            session.last = answer["meta_info"]["id"]
            new = cases.ids(cases.prompts(8)[4 + number])[:20]
            said = said + answer["output_ids"] + new
    assert limited.flush_is_clean()


def test_a_turn_that_is_aborted_was_never_said(limited: Server) -> None:
    params = cases.greedy()["greedy"] | {"max_new_tokens": 12}
    first, second = cases.ids(cases.prompts()[1]), cases.ids(cases.prompts()[2])[:20]
    with Session(limited) as session:
        (answer,) = limited.together([session.turn(first, params)])
        session.last = answer["meta_info"]["id"]
        (endless,) = slow(1)
        processor = endless["custom_logit_processor"]
        gone = session.turn(second, endless["sampling_params"], rid="gone", custom_logit_processor=processor)
        stream = limited.stream("/generate", gone)
        next(stream)
        limited.post("/abort_request", {"rid": "gone"})
        *_, last = stream
        assert last["meta_info"]["finish_reason"]["type"] == "abort"
        (after,) = limited.together([session.turn(second, params)])
    said = first + answer["output_ids"] + second
    (expected,) = limited.together([{"input_ids": said, "sampling_params": params, "return_logprob": True}])
    assert after["output_ids"] == expected["output_ids"]
    assert logprobs(after) == pytest.approx(logprobs(expected), abs=1e-3)
    assert limited.flush_is_clean()


def test_limits_of_time_cut_requests_off_and_lose_no_pages(limited: Server, reference: dict) -> None:
    one, two, late = slow(3)
    running = [limited.stream("/generate", body) for body in (one, two)]
    with ThreadPoolExecutor(2) as pool:
        assert all(event["meta_info"]["finish_reason"] is None for event in pool.map(next, running))
        # Both places are taken now, for longer than it waits.
        status, answer = limited.post("/generate", late)
        ends = list(pool.map(lambda events: list(events)[-1], running))
    assert status == 503 and "waiting timeout" in json.dumps(answer)
    assert all("running timeout" in json.dumps(end) for end in ends)
    assert limited.flush_is_clean()
    answers = limited.together(cases.bodies(cases.greedy()["all penalties"]), at_once=2)
    assert tokens(answers) == tokens(reference["all penalties"])


# --- a cache behind the cache, and new weights ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layered(logs) -> Iterator[Server]:
    """A pool that holds two requests, and room for what it forgets behind it."""
    options = speculative(
        enable_hierarchical_cache=True,
        hicache_ratio=8.0,
        hicache_io_backend="direct",
        hicache_mem_layout="layer_first",
        enable_cache_report=True,
        max_total_tokens=512,
        page_size=16,
        **SEEDED,
    )
    with Server(logs / "layered.log", env=CHECKED | widths(False), **options) as server:
        yield server


def test_pages_that_come_back_bring_the_drafters_context(layered: Server, reference: dict) -> None:
    bodies = cases.bodies(cases.greedy()["greedy"], 8)
    first, again = (layered.together(bodies, at_once=2) for _ in range(2))
    assert tokens(first) == tokens(again) == tokens(reference["eight"])
    found = [(answer["meta_info"]["cached_tokens_details"] or {}).get("host", 0) for answer in again]
    assert sum(n >= 16 for n in found) >= 4, found
    assert lengths(again) > 0.9 * lengths(first)
    assert layered.flush_is_clean()


def test_new_weights_of_the_target_leave_the_drafter_alone(layered: Server, reference: dict) -> None:
    bodies = cases.bodies(cases.greedy()["greedy"])
    before = layered.together(bodies)
    status, answer = layered.post("/update_weights_from_disk", {"model_path": TARGET})
    assert status == 200 and answer["success"], answer
    after = layered.together(bodies)
    assert tokens(before) == tokens(after) == tokens(reference["greedy"])
    assert lengths(after) > 0.9 * lengths(before) > 1.5
    assert layered.flush_is_clean()
