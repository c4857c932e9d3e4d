"""Prefill on one server, decoding on another: DFLASH_RS gives the tokens of plain SGLang on a single one.

A few cases run in `make sglang-test`, the matrix in `make sglang-long`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from cases import matrix, tokens
from pairs import Pair
from servers import Server, speculative, widths
from test_text import CHECKED, retractions

long = pytest.mark.long

SEEDED = {
    "enable_deterministic_inference": True,
    "enable_custom_logit_processor": True,
    "grammar_backend": "xgrammar",
}
ASKED = {"return_logprob": True, "top_logprobs_num": 2}


def lengths(answers: list[dict[str, Any]]) -> float:
    """Mean accept length."""
    return sum(answer["meta_info"]["spec_accept_length"] for answer in answers) / len(answers)


# --- a pair of servers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(logs: Path) -> Iterator[Pair]:
    """Overlap scheduling, pages of 16, steps of changing width."""
    options = speculative(page_size=16, enable_cache_report=True, **SEEDED)
    with Pair(logs / "pair", env=CHECKED | widths("cycle"), **options) as servers:
        yield servers


def test_the_tokens_are_those_of_one_plain_server(pair: Pair, reference: dict) -> None:
    for name in (
        "greedy",
        "all penalties",
        "seed, top_p",
        "seed, penalties",
        "min_new_tokens",
        "regex, penalties",
        "regex, ignore_eos, at once",  # the token of the prefill server ends the grammar
    ):
        answers = pair.together(cases.bodies(matrix()[name], **ASKED))
        assert tokens(answers) == tokens(reference[name]), name
        cases.scored_alike(answers, reference[name])
        if name != "greedy":
            # Prompts are found in the prefill server's cache, and the drafter's context with them.
            assert all(answer["meta_info"]["cached_tokens"] >= 16 for answer in answers), name
        if name == "greedy":
            assert lengths(answers) > 1.5
    log = pair.prefill.log.read_text(errors="replace")
    assert "prompts are prefilled here and decoded elsewhere" in log and "each step verifies" not in log
    assert pair.flush_is_clean()


def test_what_is_refused_is_refused_by_both_servers_which_go_on(pair: Pair, reference: dict) -> None:
    body = cases.bodies(cases.greedy()["greedy"], 1)[0]
    for fields, named in (
        ({"return_logprob": True, "top_logprobs_num": 129}, "top_logprobs_num: got 129, expected at most 128 with"),
        ({"sampling_params": {"custom_params": {"dflash_rs": {"max_drafts": -1}}}}, "max_drafts: got -1"),
    ):
        for status, answer in pair.send(body | fields):
            assert status == 400 and named in json.dumps(answer), (status, answer)
    # What SGLang warms servers up with goes to no other server.
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    own = body | {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": 0}
    assert [server.post("/generate", own)[0] for server in (pair.prefill, pair.decode)] == [200, 200]
    assert tokens(pair.together([body])) == tokens(reference["greedy"])[:1]
    assert pair.flush_is_clean()


SHAPES = {
    "pages of 1": {"env": widths("cycle"), "page_size": 1},
    "pages of 16, no overlap": {"env": widths("cycle"), "page_size": 16, "disable_overlap_schedule": True},
    "trees": {"env": {"DFLASH_RS_CONFIG": json.dumps({"adaptive": "cycle", "tree_nodes": 12})}, "page_size": 16},
    "chunks": {"env": widths(False), "page_size": 16, "chunked_prefill_size": 32},
}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=long) for name in SHAPES])
def shaped(request: pytest.FixtureRequest, logs: Path) -> Iterator[Pair]:
    """A pair of another shape."""
    options = {**SHAPES[request.param]}
    env = CHECKED | options.pop("env")
    with Pair(logs / request.param, env=env, **speculative(**SEEDED, **options)) as servers:
        yield servers


def test_the_whole_matrix(shaped: Pair, reference: dict) -> None:
    for name, params in matrix().items():
        answers = shaped.together(cases.bodies(params, **ASKED))
        assert tokens(answers) == tokens(reference[name]), name
        cases.scored_alike(answers, reference[name])
    for name, fields in cases.custom().items():
        assert tokens(shaped.together(cases.bodies(**fields))) == tokens(reference[name]), name
    talk = [answer for answers in cases.converse(shaped) for answer in answers]
    assert tokens(talk) == tokens(reference["talk"])
    assert max(answer["meta_info"]["cached_tokens"] for answer in talk) >= 48
    assert shaped.flush_is_clean()


@long
@pytest.mark.parametrize("backup", ["host_pool", "cpu_tensor"])
@pytest.mark.parametrize("overlap", [True, False])
def test_requests_that_are_retracted_come_back_with_their_history(
    logs: Path, reference: dict, overlap: bool, backup: str
) -> None:
    options = speculative(page_size=16, disable_overlap_schedule=not overlap, **SEEDED)
    small = {
        "max_total_tokens": 768,
        "num_reserved_decode_tokens": 8,
        "disaggregation_decode_retraction_backup": backup,
    }
    name = f"retracted-{backup}-{overlap}"
    with Pair(logs / name, env=CHECKED | widths("cycle"), decode=small, **options) as pair:
        answers = pair.together(cases.crowd(), at_once=16)
        assert retractions(answers) > 0
        assert tokens(answers) == tokens(reference["crowd"])
        assert pair.flush_is_clean()


@long
def test_the_drafter_has_the_context_that_it_has_on_one_server(logs: Path, reference: dict) -> None:
    bodies = cases.bodies(cases.greedy()["greedy"], 8)
    options = speculative(page_size=16, **SEEDED)
    with Server(logs / "single.log", env=widths(False), **options) as server:
        single = server.together(bodies, at_once=1)
    found = {}
    for carried in ("whole", "without_draft_kv", "without_kv"):
        with Pair(logs / carried, env=widths(False), transfer=carried, **options) as pair:
            found[carried] = pair.together(bodies, at_once=1)

    def passes(answers: list[dict[str, Any]]) -> list[int]:
        return [answer["meta_info"]["spec_verify_ct"] for answer in answers]

    assert tokens(single) == tokens(found["whole"]) == tokens(found["without_draft_kv"]) == tokens(reference["eight"])
    assert passes(single) == passes(found["whole"])
    # What was left out is missed: drafts, and text.
    assert sum(passes(found["without_draft_kv"])) > sum(passes(single))
    assert tokens(found["without_kv"]) != tokens(reference["eight"])


@long
@pytest.mark.parametrize("other", [{}, speculative("DFLASH")], ids=["no drafter", "DFLASH"])
def test_a_prefill_server_of_another_kind_is_named(logs: Path, other: dict) -> None:
    body = cases.bodies(cases.greedy()["greedy"], 1)[0]
    with Pair(logs / f"other-{len(other)}", page_size=16, prefill=other, decode=speculative()) as pair:
        for _ in range(2):
            _, (status, answer) = pair.send(body)
            assert status == 400 and "a prefill server without --speculative-algorithm DFLASH_RS" in json.dumps(answer)
        assert pair.flush_is_clean()


# --- parts ---------------------------------------------------------------------------------------------------------------


def arrival(**fields: Any) -> SimpleNamespace:
    """A request of the decode server whose KV has come."""
    from dflash_rs.sglang import disaggregation

    row = torch.zeros(16)
    disaggregation.sign(row)
    values = {"hidden_states_tensor": row, "bootstrap_host": "there", "bootstrap_port": 1, "grammar": None}
    return SimpleNamespace(**values | {"output_ids": [5], "to_finish": None} | fields)


def test_a_request_is_served_if_its_prefill_server_has_signed_it() -> None:
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    from dflash_rs.sglang import disaggregation

    warming_up = arrival(bootstrap_host=FAKE_BOOTSTRAP_HOST, hidden_states_tensor=torch.zeros(16))
    for served in (arrival(), arrival(hidden_states_tensor=None), warming_up):
        disaggregation.arrive(served)
        assert served.to_finish is None
    for row in (torch.zeros(16), torch.full((16,), 68.0)):
        refused = arrival(hidden_states_tensor=row)
        disaggregation.arrive(refused)
        assert refused.to_finish.status_code == 400
        assert refused.to_finish.message.startswith("bootstrap_host: got there:1, a prefill server without")


def test_a_grammar_that_the_first_token_ends_does_not_end_its_request() -> None:
    from dflash_rs.sglang import disaggregation, grammar

    asked = []
    for ended in (True, False):
        over = SimpleNamespace(is_terminated=lambda ended=ended: ended)
        req = arrival(grammar=over)
        disaggregation.arrive(req)
        grammar.finish(lambda req: asked.append(req.grammar), req)
        assert req.grammar is over
    assert asked == [None, over]


def test_those_who_arrive_are_told_to_the_step_with_those_who_run() -> None:
    from dflash_rs.sglang import planning

    ids = torch.tensor([1, 2])
    theirs = SimpleNamespace(bonus_tokens=ids, new_seq_lens=ids + 10, future_indices=ids)
    new = planning.arrived(theirs, ["a", "b"])
    assert new.arrived == ["a", "b"] and new.future_indices is ids and new.new_seq_lens.tolist() == [11, 12]
    running = planning.draft_input(torch.tensor([9]), torch.tensor([3]))
    running.future_indices = torch.tensor([0])
    assert list(running.arrived) == []
    running.merge_batch(new)
    assert running.arrived == ["a", "b"] and running.future_indices.tolist() == [0, 1, 2]


def test_who_arrives_brings_its_history_and_ends_the_timing_of_steps() -> None:
    from dflash_rs.sglang.sampling import TargetSampler
    from dflash_rs.sglang.worker import DflashRsWorker

    def req(*output: int) -> SimpleNamespace:
        params = SimpleNamespace(frequency_penalty=1.0, presence_penalty=0.0, repetition_penalty=1.0)
        return SimpleNamespace(sampling_params=params, output_ids=list(output))

    running, new, gone = req(1), req(7, 7, 3), req(2)
    worker, interrupted = SimpleNamespace(), []
    worker.targets = TargetSampler(None, 4, 8, "cpu")
    worker._widths = SimpleNamespace(interrupted=lambda: interrupted.append(True))
    slots = torch.tensor([2, 3])
    # Another request has had the row before.
    worker.targets.begin([req(4, 4)], slots[1:])
    worker.targets.begin([running], slots[:1])
    told = SimpleNamespace(arrived=[gone, new])
    for _ in range(2):  # the second step knows of nobody
        DflashRsWorker._admit(worker, told, [running, new], slots)
    table = worker.targets.history.table
    assert table[2].tolist() == [0, 1, 0, 0, 0, 0, 0, 0] and table[3].tolist() == [0, 0, 0, 1, 0, 0, 0, 2]
    assert interrupted == [True]
