"""The server as users meet it: chat, streams, metrics, unseeded sampling; and two ranks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cases
import pytest
from cases import tokens
from filtered_law import distance
from servers import DRAFT, TARGET, Server, environment


@pytest.mark.parametrize("name", ["greedy", "logit_bias", "stop", "all penalties"])
def test_greedy_is_exact_without_deterministic_inference(web: Server, reference: dict, name: str) -> None:
    assert tokens(web.together(cases.bodies(cases.greedy()[name]))) == tokens(reference[name])


def test_chat_streams_what_it_answers(web: Server) -> None:
    body = {
        "model": TARGET,
        "messages": [{"role": "user", "content": "def main():"}],
        "temperature": 0,
        "max_tokens": 24,
    }
    status, answer = web.post("/v1/chat/completions", body)
    assert status == 200, answer
    text = answer["choices"][0]["message"]["content"]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in web.stream("/v1/chat/completions", body)]
    assert text and "".join(pieces) == text
    status, answer = web.post(
        "/v1/completions", {"model": TARGET, "prompt": "import os", "temperature": 0, "max_tokens": 12}
    )
    assert status == 200 and answer["usage"]["completion_tokens"] == 12


def test_a_server_says_what_its_drafter_is_worth_before_it_takes_requests(web: Server) -> None:
    (said,) = re.findall(
        r"DFLASH_RS: this drafter gives ([0-9.]+) tokens per pass .* (in the tokenizer's chat template)",
        web.log.read_text(),
    )
    assert float(said[0]) > 1.5, said


def test_the_counters_are_exported_and_the_alarm_rings(web: Server) -> None:
    def total(name: str) -> float:
        found = re.findall(rf"^dflash_rs_spec_{name}(?:{{[^}}]*}})? ([0-9.e+]+)$", text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))

    text = ""
    while not text or total("drafts_total") < 64:  # a look at the acceptance takes that many
        web.together(cases.bodies(cases.greedy()["greedy"]))
        text = web.get("/metrics")

    drafts, drafted, accepted = total("drafts_total"), total("draft_tokens_total"), total("accepted_tokens_total")
    found = re.findall(r'^dflash_rs_spec_passes_total{[^}]*width="(\d+)"} ([0-9.e+]+)$', text, re.MULTILINE)
    passes = {int(width): float(count) for width, count in found}
    assert set(passes) == {2, 4, 6} and drafts == sum(passes.values()) > 0
    assert drafted == sum(count * (width - 1) for width, count in passes.items()) and 0 < accepted < drafted
    assert total("width") in passes
    assert total("accepted_tokens_per_pos_total") == accepted
    assert 1 < total("tau") < 6 and total("block_size") == 6
    assert not re.search(r"dflash_rs_spec_\w+{[^}]*dp_rank", text), "there is one rank"
    assert "drafting gains nothing" in web.log.read_text(errors="replace"), (
        "7 tokens a pass are out of reach with blocks of 6"
    )


@pytest.mark.parametrize(
    ("option", "fields"),
    [
        ("input_ids", {"input_ids": [-3]}),
        ("input_ids", {"input_ids": [5, 999999]}),
        ("input_ids", {"text": ""}),
        ("top_logprobs_num", {"text": "def f", "return_logprob": True, "top_logprobs_num": 1_000_000}),
        ("custom_logit_processor", {"text": "def f", "custom_logit_processor": "nonsense"}),
        ("custom_logit_processor", {"text": "def f", "custom_logit_processor": '{"callable": "80044b052e"}'}),
        (
            "custom_params.dflash_rs.max_drafts",
            {"text": "def f", "sampling_params": {"custom_params": {"dflash_rs": {"max_drafts": -1}}}},
        ),
    ],
)
def test_what_would_end_plain_sglang_is_refused_by_name(ours: Server, option: str, fields: dict) -> None:
    alone = cases.bodies(cases.greedy()["greedy"], 1)[0] | {"return_logprob": True}
    expected = ours.together([alone])
    # Beside a request that goes on, with which the refused one may share a pass.
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(ours.together, [alone])
        for _ in range(3):
            status, answer = ours.post("/generate", {"sampling_params": {"max_new_tokens": 4}, **fields})
            assert status == 400 and f"{option}: got" in json.dumps(answer), (status, answer)
        assert tokens(beside.result()) == tokens(expected)
    body = {"sampling_params": {"max_new_tokens": 4}, **fields}
    *_, last = ours.stream("/generate", body)
    reason = last["meta_info"]["finish_reason"]
    assert (reason["type"], reason["status_code"]) == ("abort", 400) and f"{option}: got" in reason["message"]
    assert tokens(ours.together([alone])) == tokens(expected) and ours.process.poll() is None


def drafts_per_pass(answer: dict) -> float:
    """Drafts accepted in a pass, as the answer's notes tell; the first token came of the prompt."""
    meta = answer["meta_info"]
    return (meta["completion_tokens"] - 1) / meta["spec_verify_ct"] - 1


def test_a_request_may_limit_its_drafts_and_the_text_stays(ours: Server, reference: dict) -> None:
    limits: list[int | None] = [None, 0, 1, 2]
    for name, params in (("greedy", cases.greedy()["greedy"]), ("seed", cases.seeded()["seed"])):
        asked = cases.bodies(params)
        for body, most in zip(asked, limits, strict=True):
            if most is not None:
                body["sampling_params"] = params | {"custom_params": {"dflash_rs": {"max_drafts": most}}}
        together = ours.together(asked)
        assert tokens(together) == tokens(reference[name])
        free, *limited = map(drafts_per_pass, together)
        assert limited[0] == 0 and 0 < limited[1] <= 1 and 0 < limited[2] <= 2 and free > limited[0]
    # Nobody drafts.
    alone = ours.together([asked[1]])
    assert tokens(alone) == tokens(reference["seed"])[1:2] and drafts_per_pass(alone[0]) == 0


def test_the_openai_routes_carry_a_limit(ours: Server) -> None:
    body = {"model": TARGET, "prompt": cases.prompts()[0], "temperature": 0, "max_tokens": 24}
    texts = []
    for more in ({}, {"custom_params": {"dflash_rs": {"max_drafts": 0}}}):
        status, answer = ours.post("/v1/completions", body | more)
        assert status == 200, answer
        texts.append(answer["choices"][0]["text"])
    assert texts[0] == texts[1]
    status, answer = ours.post("/v1/completions", body | {"custom_params": {"dflash_rs": 3}})
    assert status == 400 and "custom_params.dflash_rs: got 3" in json.dumps(answer)


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"temperature": 0.8, "top_k": 1}])
def test_min_p_of_a_greedy_request_is_served_where_draws_are_seeded(ours: Server, greedy: dict) -> None:
    params = cases.greedy()["greedy"] | greedy
    drawn = cases.bodies(cases.seeded()["seed, top_k"], 1)  # both filter, so neither draw depends on the other
    expected = ours.together(cases.bodies(params, 1) + drawn)
    assert tokens(ours.together(cases.bodies(params | {"min_p": 0.3}, 1) + drawn)) == tokens(expected)


SHAPE = {"temperature": 1.3, "top_k": 4, "top_p": 0.95, "min_p": 0.05}


def law(prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
    """Probability of every continuation under `SHAPE`. Asked of a process of its own: with SGLang's plugins loaded transformers gives other logits."""
    script = Path(__file__).with_name("filtered_law.py")
    given = json.dumps([TARGET, prompt, length, SHAPE])
    done = subprocess.run(
        [sys.executable, str(script), given], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {tuple(path): p for path, p in json.loads(done.stdout)}


def follows_the_law(server: Server) -> None:
    """Asserts that what a server draws without seeds is distributed as the filters say."""
    prompt, length, draws = cases.ids(cases.prompts()[0])[:24], 3, 400
    expected = law(prompt, length)
    body = {"input_ids": prompt, "sampling_params": SHAPE | {"max_new_tokens": length, "ignore_eos": True}}
    seen = Counter(tuple(answer["output_ids"]) for answer in server.together([body] * draws))
    # False alarms are rarer than one in a million runs: chi-square of so many kinds is about normal.
    assert distance(seen, expected) < 5


def test_unseeded_draws_follow_the_filtered_distribution(web: Server) -> None:
    follows_the_law(web)


RANKS = """
import json, sys
def main():
    import sglang
    options, prompts, params = json.loads(sys.argv[1])
    engine = sglang.Engine(**options)
    answers = engine.generate(prompts, params)
    print("ANSWERS", json.dumps([[a["output_ids"], a["meta_info"]["spec_accept_length"]] for a in answers]))
    engine.shutdown()
if __name__ == "__main__":
    main()
"""


def test_two_ranks_and_the_engine_in_python(reference: dict, tmp_path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    options = {
        "model_path": TARGET,
        "device": "cpu",
        "attention_backend": "host",
        "dtype": "float32",
        "disable_cuda_graph": True,
        "mem_fraction_static": 0.3,
        "max_total_tokens": 4096,
        "max_running_requests": 4,
        "grammar_backend": "none",
        "tp_size": 2,
        "speculative_algorithm": "DFLASH_RS",
        "speculative_draft_model_path": DRAFT,
        "log_level": "warning",
    }
    given = json.dumps([options, list(cases.prompts()), cases.greedy()["all penalties"]])
    env = environment(SGLANG_CPU_OMP_THREADS_BIND="0|1", SGLANG_HOST_FORK="0")
    done = subprocess.run(
        [sys.executable, str(script), given], env=env, capture_output=True, text=True, timeout=400, check=False
    )
    found = re.search(r"^ANSWERS (.*)$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-2000:] + done.stderr[-4000:]
    answers = json.loads(found.group(1))
    assert [ids for ids, _ in answers] == tokens(reference["all penalties"])
    assert max(length for _, length in answers) > 1.2
