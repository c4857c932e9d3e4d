"""Servers shared by the tests, started when the first test needs them; and stock DFLASH's results, printed beside ours."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SGLANG_PLATFORM", "host")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# A server is up in a third of the time. Those of several ranks, of the oldest version and of benchmarks start as SGLang does.
os.environ.setdefault("SGLANG_HOST_FORK", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emulated"))
import cases
import emulated_driver
import pytest
from servers import Server, speculative, widths


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where servers write their logs."""
    return tmp_path_factory.mktemp("sglang")


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The stand-in for CUDA's driver, with the kernels compiled for the host: once, because that takes a while."""
    return str(emulated_driver.build(tmp_path_factory.mktemp("driver")))


@pytest.fixture(scope="session")
def started(logs: Path) -> Iterator[dict[str, Server]]:
    """The two servers that most tests compare, starting side by side.

    ``ours``: DFLASH_RS with overlap scheduling and pages of 16, every step of another width. ``plain``: SGLang without speculation, and without overlap
    scheduling, because with it SGLang's penalties count the tokens before the last one only. Both draw with seeds.
    """
    common = {
        "enable_deterministic_inference": True,
        "enable_custom_logit_processor": True,
        "grammar_backend": "xgrammar",
    }
    servers = {
        "ours": Server(
            logs / "ours.log",
            env=widths("cycle"),
            **speculative(page_size=16, enable_return_hidden_states=True, **common),
        ),
        "plain": Server(logs / "plain.log", disable_overlap_schedule=True, **common),
    }
    yield servers
    for server in servers.values():
        server.close()


@pytest.fixture(scope="session")
def ours(started: dict[str, Server]) -> Server:
    """DFLASH_RS."""
    return started["ours"].wait()


@pytest.fixture(scope="session")
def reference(started: dict[str, Server]) -> dict[str, list[dict[str, Any]]]:
    """What SGLang without speculation answers to every case, with log-probabilities."""
    answers = {}
    with started["plain"] as server:
        for name, params in cases.matrix().items():
            answers[name] = server.together(cases.bodies(params, return_logprob=True, top_logprobs_num=2))
        answers["eight"] = server.together(cases.bodies(cases.greedy()["greedy"], 8))
        for name, fields in cases.custom().items():
            answers[name] = server.together(cases.bodies(**fields))
        answers["crowd"] = server.together(cases.crowd())
        answers["talk"] = [answer for answers in cases.converse(server) for answer in answers]
        for prompt in cases.kit_prompts():
            answers[f"kit: {prompt}"] = [server.generate(prompt, {"temperature": 0, "max_new_tokens": 48})]
    return answers


@pytest.fixture(scope="session")
def web(logs: Path) -> Iterator[Server]:
    """DFLASH_RS as most would start it: overlap scheduling, widths as they pay, unseeded draws, metrics, chat, grammars. No plain steps:
    SGLang's own tests want drafts accepted, however busy the machine is.

    The context is longer than the target was trained for, because SGLang's own tests send long prompts.
    """
    template = logs / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    options = speculative(
        enable_metrics=True,
        chat_template=template,
        skip_server_warmup=None,
        speculative_num_draft_tokens=6,
        grammar_backend="xgrammar",
        constrained_json_disable_any_whitespace=True,
        context_length=2048,
    )
    env = {
        "DFLASH_RS_CONFIG": json.dumps({"alarm_passes": 64, "alarm_tau": 7, "widths": [2, 4, 6]}),
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    }
    with Server(logs / "web.log", env=env, **options) as server:
        yield server


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Cases in which each algorithm gives plain SGLang's tokens."""
    if not cases.STOCK:
        return
    terminalreporter.section("texts equal to plain SGLang's, of 4 (with recurrent layers: of 2)")
    terminalreporter.write_line(f"{'case':<24} DFLASH_RS  DFLASH")
    for name, equal in cases.STOCK.items():
        terminalreporter.write_line(f"{name:<24} {cases.OURS.get(name, '-')!s:>9}  {equal:>6}")
