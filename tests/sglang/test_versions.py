"""DFLASH_RS in the oldest SGLang it supports, 0.5.17: the contract, and the same tokens as that version without speculation.

What the host cannot run there: pages of more than one token (a Triton kernel) and grammars (their masks are pinned memory).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cases
import pytest
from cases import tokens
from servers import Server, environment, speculative

VERSION = "0.5.17"
ENV = {
    "PYTHONPATH": str(Path(sys.prefix) / f"sglang-{VERSION}"),
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
    """Without speculation and without overlap scheduling, and with DFLASH_RS and overlap scheduling; they start side by side."""
    common = {
        "enable_deterministic_inference": True,
        "enable_custom_logit_processor": True,
        "grammar_backend": "none",
    }
    started = {
        "plain": Server(logs / "oldest-plain.log", env=ENV, disable_overlap_schedule=True, **common),
        "ours": Server(logs / "oldest-ours.log", env=ENV, **speculative(page_size=1, **common)),
    }
    try:
        for server in started.values():
            server.wait()
        yield started
    finally:
        for server in started.values():
            server.close()


@pytest.mark.parametrize("name", [*cases.all_cases(), *cases.custom()])
def test_the_tokens_are_those_of_plain_sglang(servers: dict[str, Server], name: str) -> None:
    bodies = cases.bodies(**cases.custom()[name]) if name in cases.custom() else cases.bodies(cases.all_cases()[name])
    answers = servers["ours"].together(bodies)
    assert tokens(answers) == tokens(servers["plain"].together(bodies))
    if name == "greedy":
        assert sum(answer["meta_info"]["spec_accept_length"] for answer in answers) > 1.5 * len(answers)


def test_log_probabilities_are_refused_by_name(servers: dict[str, Server]) -> None:
    body = {"text": "def f", "sampling_params": {"max_new_tokens": 4}, "return_logprob": True}
    status, answer = servers["ours"].post("/generate", body)
    assert status == 400 and "return_logprob" in str(answer), (status, answer)
    assert servers["ours"].flush_is_clean()
