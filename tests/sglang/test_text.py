"""DFLASH_RS gives the tokens that SGLang gives without speculation."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cases
import pytest
from cases import OURS, STOCK, custom, matrix, tokens
from servers import Server, speculative, widths


@pytest.mark.parametrize("name", matrix())
def test_the_tokens_are_those_of_plain_sglang(ours: Server, reference: dict, name: str) -> None:
    expected = tokens(reference[name])
    answers = ours.together(cases.bodies(matrix()[name]))
    OURS[name] = sum(a == b for a, b in zip(tokens(answers), expected))
    assert tokens(answers) == expected
    assert [a["meta_info"]["finish_reason"] for a in answers] == [
        a["meta_info"]["finish_reason"] for a in reference[name]
    ]


@pytest.mark.parametrize("name", custom())
def test_a_custom_processor_sees_the_text_of_its_place(ours: Server, reference: dict, name: str) -> None:
    assert tokens(ours.together(cases.bodies(**custom()[name]))) == tokens(reference[name])


def test_drafts_are_accepted(ours: Server) -> None:
    answers = ours.together(cases.bodies(cases.greedy()["greedy"]))
    accepted = [answer["meta_info"]["spec_accept_length"] for answer in answers]
    assert sum(accepted) / len(accepted) > 1.5, accepted


@pytest.mark.parametrize("size", range(1, 9))
def test_a_batch_of_any_size_gives_the_same(ours: Server, reference: dict, size: int) -> None:
    answers = ours.together(cases.bodies(cases.greedy()["greedy"], size))
    assert tokens(answers) == tokens(reference["eight"])[:size]


def test_requests_of_all_kinds_share_a_batch(ours: Server, reference: dict) -> None:
    # SGLang's own seeded draws of the first token depend on whether a request of the batch filters; all of these do.
    names = [*cases.greedy(), *(n for n in cases.seeded() if "top_" in n), "regex", "regex, penalties"]
    bodies = [body for name in names for body in cases.bodies(matrix()[name])]
    expected = [answer for name in names for answer in tokens(reference[name])]
    assert tokens(ours.together(bodies)) == expected


def test_a_prefix_found_in_the_cache_changes_nothing(ours: Server, reference: dict) -> None:
    params = cases.greedy()["greedy"]
    known = reference["greedy"]
    longer = [
        {"input_ids": cases.ids(prompt) + answer["output_ids"][:20], "sampling_params": params | {"max_new_tokens": 20}}
        for prompt, answer in zip(cases.prompts(), known)
    ]
    answers = ours.together(longer)
    assert all(answer["meta_info"]["cached_tokens"] >= 16 for answer in answers), "pages of the first run are reused"
    assert tokens(answers) == [answer["output_ids"][20:] for answer in known]


@pytest.mark.parametrize("name", ["greedy", "all penalties", "logit_bias", "seed", "seed, top_k and top_p", "regex"])
def test_log_probabilities_are_those_of_plain_sglang(ours: Server, reference: dict, name: str) -> None:
    answers = ours.together(cases.bodies(matrix()[name], return_logprob=True, top_logprobs_num=2))
    cases.scored_alike(answers, reference[name])


def test_streamed_pieces_make_the_same_text(ours: Server, reference: dict) -> None:
    body = cases.bodies(cases.greedy()["greedy"])[0]
    events = list(ours.stream("/generate", body))
    assert len(events) > 3
    assert events[-1]["text"] == reference["greedy"][0]["text"]


def test_an_abort_in_mid_stream_harms_nobody(ours: Server, reference: dict) -> None:
    long = {"temperature": 0, "max_new_tokens": 700, "ignore_eos": True}
    streams = []
    for number, prompt in enumerate(cases.prompts(3)):
        body = {"text": prompt, "sampling_params": long, "rid": f"gone-{number}"}
        stream = ours.stream("/generate", body)
        next(stream)
        streams.append(stream)
    streams.pop().close()  # the client hangs up
    for number in range(2):
        ours.post("/abort_request", {"rid": f"gone-{number}"})
    answers = ours.together(cases.bodies(cases.greedy()["all penalties"]))
    assert tokens(answers) == tokens(reference["all penalties"])
    for stream in streams:
        *_, last = stream
        assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert ours.flush_is_clean()


@pytest.mark.parametrize(
    ("option", "params", "fields"),
    [
        ("min_p", {"temperature": 0.8, "min_p": 0.1}, {}),
        ("return_hidden_states", {"temperature": 0}, {"return_hidden_states": True}),
        ("return_sampling_mask", {"temperature": 0.8, "top_k": 4}, {"return_sampling_mask": True}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(ours: Server, reference: dict, option: str, params, fields) -> None:
    body = {"text": "def f", "sampling_params": params | {"max_new_tokens": 4}, **fields}
    status, answer = ours.post("/generate", body)
    assert status == 400 and f"{option}: got" in json.dumps(answer), (status, answer)
    assert tokens(ours.together(cases.bodies(cases.greedy()["greedy"], 1))) == tokens(reference["greedy"])[:1]


# SGLang counts its KV pool after every pass, and looks for slots that are owned twice or owned and free: it stops if any are.
CHECKED = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}
FULL = "KV cache pool is full. Retract requests."


@pytest.fixture(scope="module")
def tight(logs) -> Any:
    """DFLASH_RS: every step of another width, no overlap, pages of one, prompts in chunks of 16, a pool too small for eight requests."""
    options = speculative(
        page_size=1,
        enable_deterministic_inference=True,
        disable_overlap_schedule=True,
        chunked_prefill_size=16,
        max_total_tokens=560,
        schedule_conservativeness=0.05,
        grammar_backend="none",
    )
    with Server(logs / "tight.log", env=CHECKED | widths("cycle"), **options) as server:
        yield server


@pytest.fixture(scope="module")
def crowded(logs) -> Any:
    """DFLASH_RS with overlap scheduling, whole blocks, pages of 4 and a pool too small for eight requests."""
    options = speculative(
        page_size=4,
        enable_deterministic_inference=True,
        max_total_tokens=640,
        schedule_conservativeness=0.05,
        grammar_backend="none",
    )
    with Server(logs / "crowded.log", env=CHECKED | widths(False), **options) as server:
        yield server


def retractions(answers: list[dict[str, Any]]) -> int:
    """How often these requests were put back into the queue."""
    return sum(answer["meta_info"]["num_retractions"] for answer in answers)


def test_without_overlap_with_chunks_the_tokens_are_the_same(tight: Server, reference: dict) -> None:
    names = [*cases.greedy(), *(n for n in cases.seeded() if "top_" in n)]
    bodies = [body for name in names for body in cases.bodies(matrix()[name])]
    assert tokens(tight.together(bodies)) == [answer for name in names for answer in tokens(reference[name])]
    assert tight.flush_is_clean()


@pytest.mark.parametrize("name", ["crowded", "tight"])
def test_requests_that_are_retracted_go_on_where_they_were(request, reference: dict, name: str) -> None:
    server: Server = request.getfixturevalue(name)
    answers = server.together(cases.crowd())
    assert tokens(answers) == tokens(reference["crowd"])
    assert retractions(answers) > 0 and FULL in server.log.read_text(errors="replace"), "the pool was meant to run out"
    assert retractions(reference["crowd"]) == 0
    assert server.flush_is_clean()


def test_aborts_in_a_full_pool_harm_nobody(crowded: Server, reference: dict) -> None:
    """Half the crowd leaves while it is being written; the other half must not notice, and its pages must come back."""
    bodies, expected = cases.crowd(), tokens(reference["crowd"])
    leaving, staying = bodies[0::2], list(range(1, len(bodies), 2))

    def leave(number: int) -> str:
        body = leaving[number] | {"rid": f"leaving-{number}"}
        body["sampling_params"] = body["sampling_params"] | {"max_new_tokens": 400}
        stream = crowded.stream("/generate", body)
        for _ in range(1 + number % 3):
            next(stream)
        if number % 2:
            stream.close()  # the client hangs up
            return "closed"
        crowded.post("/abort_request", {"rid": f"leaving-{number}"})
        *_, last = stream
        return last["meta_info"]["finish_reason"]["type"]

    with ThreadPoolExecutor(len(leaving)) as pool:
        ends = pool.map(leave, range(len(leaving)))
        answers = crowded.together([bodies[n] for n in staying])
        assert list(ends) == ["abort", "closed"] * (len(leaving) // 2)
    assert tokens(answers) == [expected[n] for n in staying]
    assert crowded.flush_is_clean()
    assert tokens(crowded.together(bodies[:2])) == expected[:2]


def test_a_conversation_finds_its_past_in_the_cache(ours: Server, reference: dict) -> None:
    assert ours.flush_is_clean()
    talk = cases.converse(ours)
    assert tokens([answer for answers in talk for answer in answers]) == tokens(reference["talk"])
    for before, after in zip(talk, talk[1:]):
        for earlier, answer in zip(before, after):
            # All but the last token, whose KV nobody has needed yet, in whole pages.
            known = len(earlier["prompt"]) + len(earlier["output_ids"]) - 1
            assert answer["meta_info"]["cached_tokens"] >= known // 16 * 16 > len(earlier["prompt"]) // 16 * 16


def test_stock_dflash_beside_it(reference: dict, logs) -> None:
    options = speculative("DFLASH", enable_deterministic_inference=True, grammar_backend="xgrammar")
    with Server(logs / "stock.log", **options) as server:
        for name, params in matrix().items():
            answers = tokens(server.together(cases.bodies(params)))
            STOCK[name] = sum(a == b for a, b in zip(answers, tokens(reference[name])))
    assert STOCK["greedy"] == 4
