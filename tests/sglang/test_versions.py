"""DFLASH_RS in the oldest SGLang it supports, 0.5.17: the contract, and the same tokens as that version without speculation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cases
import pytest
from cases import flat, tokens
from servers import TARGET, Server, environment, side_by_side, speculative, widths

VERSION = "0.5.17"
ENV = {
    "PYTHONPATH": str(Path(sys.prefix) / f"sglang-{VERSION}"),
    "SGLANG_HOST_FORK": "0",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",  # or a server that fails takes a minute to end
}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process that finds this version."""
    return subprocess.run(
        [sys.executable, *arguments], env=environment(**ENV), capture_output=True, text=True, timeout=600, check=False
    )


def test_the_contract_holds() -> None:
    done = python("-c", "from importlib.metadata import version; print(version('sglang'))")
    assert done.stdout.strip() == VERSION, done.stderr
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("test_parts.py")))
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture(scope="module")
def servers(logs: Path) -> Iterator[dict[str, Server]]:
    """Without speculation and without overlap scheduling, and with DFLASH_RS, overlap scheduling and every step of another width; they
    start side by side."""
    common = {
        "enable_deterministic_inference": True,
        "enable_custom_logit_processor": True,
        "grammar_backend": "xgrammar",
        "page_size": 16,
    }
    started = {
        "plain": Server(logs / "oldest-plain.log", env=ENV, disable_overlap_schedule=True, **common),
        "ours": Server(logs / "oldest-ours.log", env=ENV | widths("cycle"), **speculative(**common)),
    }
    with side_by_side(started):
        yield started


def both(servers: dict[str, Server], bodies: list[dict[str, Any]]) -> tuple[list[dict], list[dict]]:
    """The answers of plain SGLang and of DFLASH_RS, which write them side by side."""
    with ThreadPoolExecutor(2) as pool:
        plain, ours = pool.map(lambda name: servers[name].together(bodies), ("plain", "ours"))
    return plain, ours


# Of the seeded cases, which differ in what happens to a row of logits after it has been chosen, the ends.
SEEDED = ["seed", "seed, top_k and top_p", "seed, penalties"]


@pytest.mark.parametrize("name", [*cases.greedy(), *SEEDED, *cases.constrained(), *cases.custom()])
def test_the_tokens_are_those_of_plain_sglang(servers: dict[str, Server], name: str) -> None:
    bodies = cases.bodies(**cases.custom()[name]) if name in cases.custom() else cases.bodies(cases.matrix()[name])
    expected, answers = both(servers, bodies)
    assert tokens(answers) == tokens(expected)
    if name == "greedy":
        assert sum(answer["meta_info"]["spec_accept_length"] for answer in answers) > 1.5 * len(answers)


@pytest.mark.parametrize("name", ["greedy", "all penalties", "seed, top_k and top_p", "regex"])
def test_log_probabilities_are_those_of_plain_sglang(servers: dict[str, Server], name: str) -> None:
    fields = {"return_logprob": True, "top_logprobs_num": 2, "token_ids_logprob": cases.ids("def self")}
    expected, answers = both(servers, cases.bodies(cases.matrix()[name], **fields))
    assert tokens(answers) == tokens(expected)
    for answer, want in zip(answers, expected):
        for key in ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"):
            numbers = flat(answer["meta_info"][key])
            assert numbers and numbers == pytest.approx(flat(want["meta_info"][key]), abs=2e-3, rel=2e-3), key


@pytest.mark.parametrize(
    ("option", "fields"),
    [
        ("input_ids", {"input_ids": [-3]}),
        ("top_logprobs_num", {"text": "def f", "return_logprob": True, "top_logprobs_num": 1_000_000}),
        ("custom_logit_processor", {"text": "def f", "custom_logit_processor": "nonsense"}),
    ],
)
def test_what_would_end_plain_sglang_is_refused_by_name(servers: dict[str, Server], option: str, fields: dict) -> None:
    status, answer = servers["ours"].post("/generate", {"sampling_params": {"max_new_tokens": 4}, **fields})
    assert status == 400 and f"{option}: got" in json.dumps(answer), (status, answer)
    assert servers["ours"].flush_is_clean()


def test_new_weights_of_the_target_leave_the_drafter_alone(servers: dict[str, Server]) -> None:
    bodies, ours = cases.bodies(cases.greedy()["greedy"]), servers["ours"]
    before = ours.together(bodies)
    status, answer = ours.post("/update_weights_from_disk", {"model_path": TARGET})
    assert status == 200 and answer["success"], answer
    after = ours.together(bodies)
    assert tokens(after) == tokens(before)
    assert sum(a["meta_info"]["spec_accept_length"] for a in after) > 1.5 * len(after)
    assert ours.flush_is_clean()
