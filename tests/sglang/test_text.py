"""DFLASH_RS gives the tokens that SGLang gives without speculation."""

from __future__ import annotations

import json
from typing import Any

import cases
import pytest
from cases import OURS, STOCK, custom, matrix, tokens
from servers import Server, speculative


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
    for answer, expected in zip(answers, reference[name]):
        got, want = answer["meta_info"], expected["meta_info"]
        for key in ("output_token_logprobs", "output_top_logprobs"):
            assert _flat(got[key]) == pytest.approx(_flat(want[key]), abs=2e-3, rel=2e-3)


def _flat(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for part in value for number in _flat(part)]
    return [max(float(value), -1e4)] if isinstance(value, int | float) else []


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


@pytest.fixture(scope="module")
def tight(logs) -> Any:
    """DFLASH_RS: no overlap, pages of one, prompts in chunks of 16, a pool too small for eight requests."""
    options = speculative(
        page_size=1,
        enable_deterministic_inference=True,
        disable_overlap_schedule=True,
        chunked_prefill_size=16,
        max_total_tokens=560,
        schedule_conservativeness=0.05,
        grammar_backend="none",
    )
    with Server(logs / "tight.log", **options) as server:
        yield server


def test_without_overlap_with_chunks_and_retractions_the_tokens_are_the_same(tight: Server, reference: dict) -> None:
    names = [*cases.greedy(), *(n for n in cases.seeded() if "top_" in n)]
    bodies = [body for name in names for body in cases.bodies(matrix()[name])]
    assert tokens(tight.together(bodies)) == [answer for name in names for answer in tokens(reference[name])]
    # Forbidding the end token, rather than ignoring it, has SGLang admit requests that the pool cannot hold to their end.
    long = {"temperature": 0, "max_new_tokens": 150, "logit_bias": {"0": -1000.0}, "frequency_penalty": 0.75}
    alone = [tight.generate(prompt, long)["output_ids"] for prompt in cases.prompts()]
    full = "KV cache pool is full. Retract requests."
    tight.post("/flush_cache", {})
    assert full not in tight.log.read_text(errors="replace")
    assert tokens(tight.together(cases.bodies(long))) == alone
    assert full in tight.log.read_text(errors="replace"), "the pool was meant to run out"
    assert tight.flush_is_clean()


def test_stock_dflash_beside_it(reference: dict, logs) -> None:
    options = speculative("DFLASH", enable_deterministic_inference=True, grammar_backend="xgrammar")
    with Server(logs / "stock.log", **options) as server:
        for name, params in matrix().items():
            answers = tokens(server.together(cases.bodies(params)))
            STOCK[name] = sum(a == b for a, b in zip(answers, tokens(reference[name])))
    assert STOCK["greedy"] == 4
