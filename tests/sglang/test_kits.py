"""SGLang's own server tests, from its wheel, against a DFLASH_RS server with the bundled pair.

The methods are SGLang's; here are the server, the thresholds and the sizes that fit a target of 5 million parameters on a CPU.
What does not run, and why:

| kit | why not |
|---|---|
| SpecAccuracyKit, KLDivergenceMixin, UnifiedRadixTreeTestMixin, LMEvalMixin | they download data sets |
| SpecPerfKit, SpecDecodingMixin, perf_bench_kit | they assert speed |
| SpecHiddenStatesKit, SpecSamplingMaskKit | refused by name, which `test_text` tests |
| BasicDecodeCorrectnessMixin, MatchedStopMixin, Regex- and EBNFConstrainedMixin | some methods, marked below |
| BasicSchedulerStressMixin | asks for capitals of countries, and for 8000 tokens of prompt |
| JSONModeMixin | any JSON: this target opens objects and never closes them |
| WaitingTimeoutMixin, RunningTimeoutTwoWaveMixin | what happens depends on the machine's speed; `test_serving` has time limits |
| reasoning_kit, anthropic_messages_kit, mmmu_vlm_kit | other models; they test the front end |
| PrefixCacheBranchingMixin | caches of state-space models |
| streaming_session_kit | 100000 tokens in a turn; `test_serving` has sessions |
"""

from __future__ import annotations

import json
import random
import re
import time
import unittest
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import requests
from kits import (
    abort_timeout_kit,
    basic_api_contract_kit,
    basic_decode_correctness_kit,
    cache_hit_kit,
    ebnf_constrained_kit,
    json_constrained_kit,
    matched_stop_kit,
    pause_generation_kit,
    radix_cache_server_kit,
    regex_constrained_kit,
    spec_server_kits,
)
from servers import TARGET, Server

LEFT_OUT = None
# Seconds for what takes one on a machine that does nothing else.
PATIENCE = 60


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left(web: Server) -> Iterator[None]:
    yield
    assert web.flush_is_clean()


class Served(unittest.TestCase):
    """What the kits ask of the class they are mixed into."""

    model = TARGET

    @pytest.fixture(autouse=True)
    def _served(self, web: Server) -> None:
        self.server, self.process = web, web.process
        self.base_url = f"http://127.0.0.1:{web.port}"

    @property
    def tokenizer(self) -> Any:
        """The bundled tokenizer, as far as the kits use one."""
        end = json.loads((Path(TARGET) / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
        return SimpleNamespace(encode=lambda text, **_: cases.ids(text), eos_token_id=end)

    def _post(self, params: dict[str, Any], text: str = "def main():\n", **fields: Any) -> requests.Response:
        timeout = fields.pop("timeout", 120)
        body = {"text": text, "sampling_params": params, **fields}
        return requests.post(f"{self.base_url}/generate", json=body, timeout=timeout)

    def run_decode(self, params: dict[str, Any]) -> None:
        """One request of the penalty kit."""
        answer = self._post(
            {"max_new_tokens": 48, "temperature": 0.7} | params, return_logprob=True, top_logprobs_num=5
        )
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["meta_info"]["output_token_logprobs"]) >= params.get("min_new_tokens", 1)

    def send_request(self) -> None:
        """A client that waits."""
        for prompt in cases.prompts(3):
            assert self._post({"temperature": 0, "max_new_tokens": 64}, prompt).status_code == 200

    def send_requests_abort(self) -> None:
        """A client that does not: it leaves when the first tokens are there, of many."""
        params = {"temperature": 0, "max_new_tokens": 1024, "ignore_eos": True}
        for prompt in cases.prompts(6):
            events = self.server.stream("/generate", {"text": prompt, "sampling_params": params})
            assert next(events)["meta_info"]["finish_reason"] is None
            events.close()


class Patient:
    """A kit's ``time``. Where the kit sleeps so that its requests are under way, this waits until they are."""

    def __init__(self, *naps: Callable[[], bool] | float):
        """What comes in place of the first naps, a condition or a number of seconds. Later ones are slept as the kit says."""
        self.naps = list(naps)

    def sleep(self, seconds: float) -> None:
        """One nap of the kit."""
        nap = self.naps.pop(0) if self.naps else seconds
        if not callable(nap):
            time.sleep(nap)
            return
        deadline = time.monotonic() + PATIENCE
        while not nap():
            assert time.monotonic() < deadline, f"not so after {PATIENCE} s"
            time.sleep(0.05)


class Taken:
    """Requests that a server has taken from now on, by the lines of its log about its batches: those it began, and those that wait."""

    def __init__(self, server: Server):
        self.log = server.log
        self.start = self.log.stat().st_size

    def __call__(self) -> int:
        with self.log.open("rb") as file:
            file.seek(self.start)
            text = file.read().decode(errors="replace")
        waiting = re.findall(r"#queue-req: (\d+)", text)
        return sum(map(int, re.findall(r"#new-seq: (\d+)", text))) + int(waiting[-1] if waiting else 0)


class TestCorrectness(spec_server_kits.SpecCorrectnessKit, Served):
    """Drafts are accepted; end tokens; requests that end within the first block."""

    acc_length_thres = 1.5
    batch_accept_len_thres = 1.2


class TestParity(spec_server_kits.SpecParityKit, Served):
    """Greedy text; the reference server is the one that the other tests use."""

    @classmethod
    def setUpClass(cls) -> None:
        pass

    @pytest.fixture(autouse=True)
    def _expected(self, reference: dict) -> None:
        self.parity_ref_outputs = {p: reference[f"kit: {p}"][0]["text"] for p in self.parity_prompts}


class TestLogprobs(spec_server_kits.SpecLogprobKit, Served):
    """Log-probabilities of drafting and of a prefill; float32, so far nearer than the kit asks."""

    logprob_match_delta = 2e-3

    @pytest.fixture(autouse=True)
    def _shorter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The kit goes through 112 requests of up to 2000 tokens; those of up to 500 are as much as a CPU can be asked.
        check = spec_server_kits.run_logprob_check
        monkeypatch.setattr(
            spec_server_kits, "run_logprob_check", lambda case, given: given[0] > 500 or check(case, given)
        )


class TestPenalties(spec_server_kits.SpecPenaltyKit, Served):
    """Penalties of all kinds side by side."""


class TestFeatures(spec_server_kits.SpecFeatureKit, Served):
    """Prefix trees, clients that hang up, JSON."""

    @pytest.fixture(autouse=True)
    def _smaller(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The kit numbers tokens up to 32000 and asks for 400 nodes.
        numbers = random.Random(5)
        capped = SimpleNamespace(
            choice=numbers.choice,
            shuffle=numbers.shuffle,
            randint=lambda low, high: numbers.randint(low, min(high, 4095)),
        )
        monkeypatch.setattr(radix_cache_server_kit, "random", capped)
        tree = partial(radix_cache_server_kit.gen_radix_tree, 24, 48)
        monkeypatch.setattr(radix_cache_server_kit, "gen_radix_tree", tree)


class TestGrammar(spec_server_kits.SpecGrammarKit, Served):
    """Nothing is written behind the end of a grammar."""

    grammar_json_schema = json.dumps(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
                "population": {"type": "integer", "minimum": 0, "maximum": 999},
                "country": {"type": "string", "pattern": "^[a-z]{1,8}$"},
                "capital": {"type": "string", "pattern": "^[a-z]{1,8}$"},
            },
            "required": ["name", "population", "country", "capital"],
            "additionalProperties": False,
        }
    )


def bounded(grammar: str) -> str:
    """A kit's grammar with words that end: the target may draw letters until no token is left for what must follow."""
    return grammar.replace("[a-z]+", "[a-z]{1,16}")


class TestRegex(regex_constrained_kit.RegexConstrainedMixin, Served):
    """Regular expressions, three samples each."""

    test_regex_generate_complex_json = LEFT_OUT  # white space without end

    def _run_decode_regex(self, regex: str, *args: Any, **kwargs: Any) -> None:
        super()._run_decode_regex(bounded(regex), *args, **kwargs)


class TestEbnf(ebnf_constrained_kit.EBNFConstrainedMixin, Served):
    """Grammars, three samples each."""

    test_ebnf_generate_complex_json = LEFT_OUT  # the grammar allows other objects than the pattern that is looked for

    def _run_decode_ebnf(self, ebnf: str, *args: Any, **kwargs: Any) -> None:
        super()._run_decode_ebnf(bounded(ebnf), *args, **kwargs)


class TestJson(json_constrained_kit.JSONConstrainedMixin, Served):
    """JSON schemas, beside requests without one."""

    json_schema = json.dumps(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
                "population": {"type": "integer", "minimum": 0, "maximum": 999},
            },
            "required": ["name", "population"],
            "additionalProperties": False,
        }
    )


class TestStops(matched_stop_kit.MatchedStopMixin, Served):
    """Stop strings and lengths, and which string matched."""

    test_finish_stop_eos = LEFT_OUT  # other models' end tokens
    test_finish_stop_regex_str = LEFT_OUT  # ends of sentences


class TestContract(basic_api_contract_kit.BasicAPIContractMixin, Served):
    """The HTTP interface."""


class TestDecode(basic_decode_correctness_kit.BasicDecodeCorrectnessMixin, Served):
    """Greedy decoding twice, one token, no gibberish."""

    test_capital_france = test_basic_math = test_color_completion = LEFT_OUT  # facts


class TestAbortAll(abort_timeout_kit.AbortAllMixin, Served):
    """Everything is aborted at once, running and waiting."""

    abort_all_num_requests = 16
    abort_all_max_new_tokens = 1800

    @pytest.fixture(autouse=True)
    def _when_all_are_there(self, web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        taken = Taken(web)
        # One that comes later would not be aborted.
        monkeypatch.setattr(abort_timeout_kit, "time", Patient(lambda: taken() >= self.abort_all_num_requests))


class TestPause(pause_generation_kit.PauseResumeInPlaceMixin, Served):
    """Generation is held and goes on."""

    pause_num_requests = 12
    pause_max_new_tokens = 384
    pause_duration = 1
    pause_ignore_eos = True

    @pytest.fixture(autouse=True)
    def _when_they_run(self, web: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        taken = Taken(web)
        # Then what was under way when the pause began has time to end: a step, which takes milliseconds.
        monkeypatch.setattr(pause_generation_kit, "time", Patient(lambda: taken() > 0, 4.0))


def test_a_conversation_hits_the_cache(web: Server, tmp_path: Path) -> None:
    texts = cases.prompts(8)
    talk = [{"conversations": [{"value": text}, {"value": text}]} for text in texts]
    data = tmp_path / "talk.json"
    data.write_text(json.dumps(talk))
    cache_hit_kit.run_multiturn_cache_hit_test(
        f"http://127.0.0.1:{web.port}",
        TARGET,
        num_clients=4,
        num_rounds=3,
        request_length=48,
        output_length=16,
        dataset_path=str(data),
    )
