"""The battery: it finds nothing where nothing is wrong, and what is wrong where something is; two servers beside each other."""

from __future__ import annotations

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hybrid_models import build, keep_wrongly
from models_helpers import VOCAB, qwen3_target
from toy_models import LookUp

from dflash_rs import LLM, SamplingParams, cli
from dflash_rs.check import Battery, as_json, lines
from dflash_rs.check.layers import first_layer
from dflash_rs.check.servers import Server, compare_servers
from dflash_rs.errors import DflashError
from dflash_rs.models.target import TargetModel

BYTES = [bytes([33 + token]) for token in range(VOCAB)]
PROMPTS = [np.random.default_rng(n).integers(3, VOCAB, n).tolist() for n in (2, 5, 12, 33)]


def battery(target, draft=None, **options) -> Battery:
    def engine(drafter, **sizes):
        # What drafts is the drafter alone, right or wrong.
        return LLM.from_parts(target, drafter, tokenizer=None, token_bytes=BYTES, adaptive=False, lookup=False, **sizes)

    options = {"block_size": 5, "max_tokens": 24, "rejected": 60, "rounds": 2, **options}
    return Battery(engine, draft, PROMPTS, **options)


@pytest.mark.parametrize("kind", ["attention", "dense"])
def test_a_target_that_is_exact_passes_every_case(kind):
    target = TargetModel(qwen3_target() if kind == "attention" else build(kind))
    results = battery(target, LookUp() if kind == "attention" else None).run()
    assert [result.problems for result in results] == [[]] * len(results)
    assert all(result.passed and not result.different for result in results), lines(results)
    taus = {result.name: result.tau for result in results}
    assert taus["all drafts right"] > 3 > taus["half of a block right"] > 2
    assert taus["first draft wrong"] == taus["all drafts wrong, 60 tokens"] == 1
    assert len(results) == (12 if kind == "attention" else 7)
    assert lines(results)[-1] == f"{sum(r.texts for r in results)} texts, all equal to plain decoding"
    assert as_json(results)["passed"] is True and json.dumps(as_json(results))


def test_a_state_that_keeps_a_rejected_draft_is_found(monkeypatch):
    target = TargetModel(build("dense"))
    keep = target.state.keep

    def one_more(rows, counts):
        lengths = [target.state._pass.by_row[row].end - target.state._pass.by_row[row].start for row in rows.tolist()]
        keep_wrongly(target.state, keep, rows, counts, np.minimum(counts + 1, lengths))

    monkeypatch.setattr(target.state, "keep", one_more)
    results = {result.name: result for result in battery(target).run()}
    # Where nothing is rejected nothing is kept that should not be.
    assert results["plain, eight at once"].passed
    wrong = results["first draft wrong"]
    assert not wrong.passed and any(not one.explained and abs(one.lead) > 1e-3 for one in wrong.different)
    said = lines(list(results.values()))
    assert any("first draft wrong" in line and "WRONG" in line for line in said)
    assert any("no rounding" in line for line in said) and "cases are wrong" in said[-1]


def test_a_report_names_the_layer_whose_state_is_broken(monkeypatch):
    target, broken = TargetModel(build("dense")), 2
    with LLM.from_parts(target, None, tokenizer=None, token_bytes=BYTES) as llm:
        assert first_layer(llm, PROMPTS[3], 5) is None
    mixer = target.state.mixers[broken]
    run = mixer.run

    def off(room, spans, fed):
        # A token more than was kept, where one more was fed in.
        room.pending.add_(((room.pending > 0) & (room.pending < room.block)).int())
        return run(room, spans, fed)

    monkeypatch.setattr(mixer, "run", off)
    few = battery(target, rejected=12, rounds=1, temperatures=(0.0,))
    [wrong] = [result for result in few.run() if result.name == "half of a block right"]
    assert not wrong.passed and [one.layer for one in wrong.different if one.layer is not None] == [broken]
    assert f"; layer {broken} is the first whose output hangs on the passes before" in "\n".join(lines([wrong]))


def test_what_differs_is_explained_by_the_lead_of_the_token_that_was_drawn():
    target = TargetModel(qwen3_target())
    checked = battery(target)
    checked.run()
    made = LLM.from_parts(target, None, tokenizer=None, token_bytes=BYTES)
    with made as llm:
        for temperature in (0.0, 0.8):
            for i, (prompt, text) in enumerate(zip(PROMPTS, checked._plain[temperature, 24], strict=True)):
                for at in (0, 7):
                    leads = [
                        checked._lead(llm, prompt + text[:at], text[at], other, i, temperature)
                        for other in range(VOCAB)
                    ]
                    # Nothing else was as good, and a token is as good as itself.
                    assert leads[text[at]] == 0 and min(leads) == 0 and sorted(leads)[1] > 0


def test_a_case_that_was_not_what_it_says_is_a_problem(monkeypatch):
    from dflash_rs.check import drafts

    checked = battery(TargetModel(qwen3_target()))
    monkeypatch.setattr(drafts.Scripted, "candidates", lambda self, anchors, *_, block_size, **__: (
        np.zeros((len(anchors), block_size - 1, 1), dtype=np.int64), np.full((len(anchors), block_size - 1, 1), 0.9, np.float32),
    ))  # fmt: skip
    results = {result.name: result for result in checked.run()}
    assert "the drafts were not what the case is about" in results["all drafts right"].problems[0]
    assert not results["all drafts right"].different and not results["all drafts right"].passed


# ---- two servers -----------------------------------------------------------------------------------------------------


class Completions(BaseHTTPRequestHandler):
    """Greedy completions out of a table: letters that follow each other; `server.change` may alter an answer."""

    def log_message(self, *_):
        pass

    def _send(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self._send({"data": [{"id": "letters"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] != "letters" or asked["temperature"] != 0:
            return self._send({"error": "no such model"}, 404)
        first = ord(asked["prompt"][-1])
        tokens = [chr(97 + (first + i) % 26) for i in range(asked["max_tokens"])]
        top = [{token: -0.1, "Z": -0.1 - self.server.lead} for token in tokens]
        tokens = self.server.change(asked["prompt"], tokens)
        choice = {"text": "".join(tokens)}
        if self.server.scores:
            choice["logprobs"] = {"tokens": tokens, "top_logprobs": top}
        self._send({"choices": [choice]})


@pytest.fixture
def served():
    """A function that starts a server and gives it with its address."""
    running = []

    def start(change=lambda prompt, tokens: tokens, lead=0.01, scores=True):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
        server.change, server.lead, server.scores = change, lead, scores
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/v1"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def spoilt(prompt, tokens):
    return [*tokens[:3], "Z", *tokens[4:]] if prompt == "two" else tokens


@pytest.mark.parametrize(
    ("change", "lead", "scores", "passed", "said"),
    [
        (None, 0.01, True, True, "all equal to plain decoding"),
        (spoilt, 0.01, True, True, "differ where two tokens are tied up to rounding"),
        (spoilt, 2.0, True, False, "2 of 3 cases are wrong"),
        (spoilt, 0.01, False, False, "2 of 3 cases are wrong"),
    ],
    ids=["equal", "tied", "wrong", "unexplained"],
)
def test_two_servers_are_compared_and_differences_explained(
    served, change, lead, scores, passed, said, tmp_path, capsys
):
    plain = served(lead=lead, scores=scores)
    other = served(change or (lambda prompt, tokens: tokens), lead, scores)
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    words = ["--prompt-file", str(tmp_path / "prompts.txt"), "--max-tokens", "6", "--rounds", "2"]
    words += ["--json", str(tmp_path / "found.json")]
    assert cli.main(["check", "--plain", plain, "--speculative", other, *words]) == (0 if passed else 1)
    assert said in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] is passed and [case["texts"] for case in found["cases"]] == [3, 3, 6]
    different = [one for case in found["cases"] for one in case["different"]]
    assert len(different) == (0 if change is None else 3)
    assert all((one["prompt"], one["position"]) == (1, 3) for one in different)
    if scores and change:
        assert different[0]["lead"] == pytest.approx(lead) and different[0]["other_token"] == "Z"


def test_a_server_that_does_not_answer_or_refuses_is_named(served):
    address = served()
    with pytest.raises(DflashError, match=r"/v1/completions: status 404: .*no such model"):
        Server(address, "another").complete("x", 2)
    with pytest.raises(DflashError, match="http://127.0.0.1:9/v1/models"):
        Server("http://127.0.0.1:9", timeout=5)
    fine = Server(address)
    results = compare_servers(fine, fine, ["one"], max_tokens=3, rounds=1, tolerance=0.5)
    assert [dataclasses.replace(r, tau=0.0).passed for r in results] == [True] * 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--plain", "http://127.0.0.1:9"], "--plain: got it without --speculative"),
        (["--speculative", "http://127.0.0.1:9"], "--speculative: got it without --plain"),
        (["--plain", "a", "--speculative", "b", "--model", "c"], "--plain: got --model or --draft, too"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(words, said, capsys):
    assert cli.main(["check", *words]) == 2
    assert said in capsys.readouterr().err


def test_params_of_the_battery_are_what_a_lead_is_computed_of():
    params = Battery._params(3, 0.8, 10)
    assert params == SamplingParams(temperature=0.8, seed=1003, max_tokens=10, ignore_eos=True)
