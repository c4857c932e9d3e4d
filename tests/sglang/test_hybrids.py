"""Targets with recurrent layers beside attention: DFLASH_RS gives plain SGLang's tokens, with SGLang's own kernels on Triton's interpreter.

Random targets and steered drafts (see `hybrids`). A few of the cases run in `make sglang-test`, all of them in `make sglang-hybrids`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hybrids
import pytest
from cases import OURS, STOCK, tokens
from hybrids import KINDS, Interpreted, Steering, prompts
from pairs import Pair
from servers import speculative, widths
from test_text import CHECKED, FULL, retractions

long = pytest.mark.long
FIRST = "dense"
ALL = [pytest.param(kind, marks=() if kind == FIRST else long) for kind in KINDS]

GREEDY = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
# Both filter, so that SGLang's draws of first tokens do not depend on who shares the prefill.
SEEDED = GREEDY | {"temperature": 0.9, "sampling_seed": 7, "top_k": 50}


def bodies(*params: dict[str, Any], count: int = 2) -> list[dict[str, Any]]:
    """One /generate body per prompt and kind of sampling."""
    return [{"input_ids": prompt, "sampling_params": p} for p in params for prompt in prompts(8)[1 :: 8 // count]]


def mixed() -> list[dict[str, Any]]:
    """Two requests that are greedy, two that are seeded."""
    return bodies(GREEDY, SEEDED)


def long_ones() -> list[dict[str, Any]]:
    """Prompts of a chunk of SGLang's and more, whose texts pass the place where it keeps a state for others."""
    return [{"input_ids": prompt, "sampling_params": GREEDY | {"max_new_tokens": 66}} for prompt in prompts(3, 90)[1:]]


def crowd() -> list[dict[str, Any]]:
    """Eight that a small pool does not hold to their end; the end token is forbidden as in `cases.crowd`."""
    kinds = {"temperature": 0}, {"temperature": 0.9, "sampling_seed": 29, "top_k": 20}
    return bodies(*({"max_new_tokens": 32, "logit_bias": {"0": -1000.0}} | kind for kind in kinds), count=4)


class Kind:
    """One target: plain SGLang beside DFLASH_RS with overlap scheduling, pages of 16 and steps of changing widths."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.target = hybrids.write_target(name, folder / "target")
        self.draft = hybrids.write_draft(folder / "draft")
        self.steering = Steering(folder / "steer.json")
        self.known: dict[str, list[dict[str, Any]]] = {}
        self.plain = hybrids.server(folder / "plain.log", self.target, page_size=16, mamba_track_interval=64)
        self.ours = self.speculative("ours", env=widths("cycle", 1, 3, 6), page_size=16, mamba_track_interval=64)

    def speculative(
        self, name: str, algorithm: str = "DFLASH_RS", env: dict[str, str] | None = None, **options: Any
    ) -> Interpreted:
        """A server with the drafter."""
        options = speculative(algorithm, **options) | {"speculative_draft_model_path": self.draft}
        env = {"SGLANG_HOST_STEER": str(self.steering.path)} | (env or {})
        return hybrids.server(self.folder / f"{name}.log", self.target, env=env, **options)

    def expected(self, name: str, asked: list[dict[str, Any]]) -> list[list[int]]:
        """Plain SGLang's tokens, which the drafts know from now on."""
        if name not in self.known:
            self.known[name] = self.plain.together(asked)
            self.steering.learn(asked, self.known[name])
        return tokens(self.known[name])


@pytest.fixture(scope="module", params=ALL)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    """A target with its two servers."""
    made = Kind(request.param, tmp_path_factory.mktemp(request.param))
    try:
        made.plain.wait(), made.ours.wait()
        yield made
    finally:
        made.plain.close(), made.ours.close()


first = pytest.mark.parametrize("kind", [FIRST], indirect=True)
each = pytest.mark.parametrize("kind", ALL, indirect=True)


def lengths(answers: list[dict[str, Any]]) -> float:
    """Mean accept length."""
    return sum(answer["meta_info"]["spec_accept_length"] for answer in answers) / len(answers)


def record(table: dict[str, int], kind: Kind, answers: list[dict[str, Any]], expected: list[list[int]]) -> None:
    """How many of the texts of `mixed` are plain SGLang's, for the table at the end."""
    same = [got == text for got, text in zip(tokens(answers), expected)]
    table[f"{kind.name}, greedy"], table[f"{kind.name}, seed"] = sum(same[:2]), sum(same[2:])


@each
def test_the_tokens_are_those_of_plain_sglang(kind: Kind) -> None:
    expected = kind.expected("mixed", mixed())
    answers = kind.ours.together(mixed())
    record(OURS, kind, answers, expected)
    assert tokens(answers) == expected
    assert 1.5 < lengths(answers) < 5
    assert "each step verifies one of 1, 3, 6 tokens" in kind.ours.log.read_text(errors="replace")


@pytest.mark.parametrize("keep", ["fewer", pytest.param("all", marks=long), pytest.param("none", marks=long)])
@each
def test_a_state_that_is_kept_wrongly_shows_in_every_text(kind: Kind, keep: str) -> None:
    expected = kind.expected("mixed", mixed())
    asked = [body | {"sampling_params": GREEDY | {"max_new_tokens": 12}} for body in bodies(GREEDY)]
    kind.steering.say(wrong="none" if keep == "fewer" else "some", keep=keep)
    try:
        answers = kind.ours.together(asked)
    finally:
        kind.steering.say()
    assert kind.ours.flush_is_clean()
    same = [number for number, (got, text) in enumerate(zip(tokens(answers), expected)) if got == text[:12]]
    assert not same


# --- all of the following is for `make sglang-hybrids` ----------------------------------------------------------------


@long
@pytest.mark.parametrize("wrong", ["none", "all", "first", "rest"])
@each
def test_blocks_that_are_kept_whole_in_part_or_not_at_all(kind: Kind, wrong: str) -> None:
    expected = kind.expected("mixed", mixed())
    kind.steering.say(wrong=wrong)
    try:
        answers = kind.ours.together(mixed())
    finally:
        kind.steering.say()
    assert tokens(answers) == expected
    assert lengths(answers) < 1.2 if wrong in ("all", "first") else lengths(answers) > 1.5


@long
@each
def test_alone_and_in_a_crowd_are_the_same(kind: Kind) -> None:
    expected = kind.expected("crowd", crowd())
    assert tokens(kind.ours.together(crowd())) == expected
    assert tokens(kind.ours.together(crowd()[::4], at_once=1)) == expected[::4]


@long
@each
def test_a_state_found_in_the_cache_is_the_one_that_was_accepted(kind: Kind) -> None:
    """A text passes position 64 or 128 in the middle of some block. The state after that very token is left for others."""
    asked = long_ones()
    expected = kind.expected("long", asked)
    said = kind.ours.together(asked)
    assert tokens(said) == expected
    more = [
        body | {"input_ids": body["input_ids"] + text + prompts(2)[1][:5], "sampling_params": GREEDY}
        for body, text in zip(asked, expected)
    ]
    expected = kind.expected("more", more)
    answers = kind.ours.together(more)
    found = [answer["meta_info"]["cached_tokens"] for answer in answers]
    assert all(cached > len(body["input_ids"]) // 64 * 64 for cached, body in zip(found, asked)), found
    assert tokens(answers) == expected
    assert kind.ours.flush_is_clean()


@long
@each
def test_an_abort_in_mid_stream_harms_nobody(kind: Kind) -> None:
    expected = kind.expected("mixed", mixed())
    body = bodies(GREEDY)[0] | {"rid": "gone"}
    body["sampling_params"] = body["sampling_params"] | {"max_new_tokens": 400}
    stream, closed = (kind.ours.stream("/generate", body | {"rid": rid}) for rid in ("gone", "closed"))
    next(stream), next(closed)
    closed.close()  # the client hangs up
    kind.ours.post("/abort_request", {"rid": "gone"})
    assert tokens(kind.ours.together(mixed())) == expected
    *_, last = stream
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert kind.ours.flush_is_clean()


@long
@each
def test_without_overlap_in_a_pool_too_small_the_tokens_are_the_same(kind: Kind) -> None:
    options = {
        "page_size": 1,
        "disable_overlap_schedule": True,
        "max_total_tokens": 280,
        "chunked_prefill_size": 64,
        "schedule_conservativeness": 0.05,
    }
    expected, full = kind.expected("mixed", mixed()), kind.expected("crowd", crowd())
    chunks = [long_ones()[1] | {"sampling_params": GREEDY}]
    last = kind.expected("chunks", chunks)
    with kind.speculative("tight", env=CHECKED | widths(False), **options) as server:
        answers = server.together(mixed())
        assert tokens(answers) == expected
        assert 2 < lengths(answers) < 5
        answers = server.together(crowd())
        assert tokens(answers) == full
        assert retractions(answers) > 0 and FULL in server.log.read_text(errors="replace"), (
            "the pool was meant to run out"
        )
        assert tokens(server.together(chunks)) == last
        assert server.flush_is_clean()


@long
@first
def test_widths_as_they_pay_give_the_same(kind: Kind) -> None:
    expected = kind.expected("mixed", mixed())
    with kind.speculative("paying", page_size=4) as server:
        for _ in range(2):
            assert tokens(server.together(mixed())) == expected
        assert "each step verifies one of 1, 2, 4, 6 tokens" in server.log.read_text(errors="replace")


@long
@first
@pytest.mark.parametrize(
    ("env", "options", "words"),
    [
        ({"SGLANG_MAMBA_CONV_DTYPE": "bfloat16"}, {}, "SGLANG_MAMBA_CONV_DTYPE: got bfloat16, expected float32"),
        ({}, {"mamba_ssm_dtype": "bfloat16"}, "--mamba-ssm-dtype: got bfloat16, expected float32"),
    ],
    ids=["convolutions", "states"],
)
def test_states_that_would_be_rounded_are_refused_at_start(kind: Kind, env: dict, options: dict, words: str) -> None:
    server = kind.speculative(f"refused-{len(options)}", env=env, **options)
    with contextlib.closing(server), pytest.raises(RuntimeError, match="the server ended"):
        server.wait()
    assert words in server.log.read_text(errors="replace")


@long
@each
def test_stock_dflash_beside_it(kind: Kind) -> None:
    """Reported, not judged."""
    expected = kind.expected("mixed", mixed())
    with kind.speculative("stock", "DFLASH", page_size=16) as server:
        record(STOCK, kind, server.together(mixed()), expected)


@long
@each
def test_a_prompt_that_was_prefilled_elsewhere_comes_with_its_states(kind: Kind) -> None:
    expected = kind.expected("mixed", mixed())
    options = hybrids.OPTIONS | speculative() | {"model_path": kind.target, "speculative_draft_model_path": kind.draft}
    env = hybrids.ENVIRONMENT | {"SGLANG_HOST_STEER": str(kind.steering.path)} | widths("cycle", 1, 3, 6)
    log = kind.folder / "pair"
    with Pair(log, env=env, kind=Interpreted, page_size=16, mamba_track_interval=64, **options) as pair:
        for _ in range(2):
            answers = pair.together(mixed())
            assert tokens(answers) == expected
            assert 1.5 < lengths(answers) < 5
        assert pair.flush_is_clean()
    with Pair(log, env=env, kind=Interpreted, transfer="without_kv", page_size=16, **options) as pair:
        # SGLang sends states by another way than keys and values.
        assert tokens(pair.together(mixed())) != expected
