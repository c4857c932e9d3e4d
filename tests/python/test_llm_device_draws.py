"""The engine's path that draws tokens where the logits are, with the kernel replaced by the core's own sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_header import header_structures

from dflash_rs import LLM, SamplingParams, _core, cuda

pytestmark = pytest.mark.pair
PROMPTS = ["def add(a, b):\n", "import os\n\n\ndef main(", "class Stack:\n    ", "for i in range(", "x = x = x = x ="]
PARAMS = [
    SamplingParams(max_tokens=24),
    SamplingParams(temperature=0.9, seed=5, max_tokens=20, top_p=0.9, logit_bias={10: -2.0}),
    SamplingParams(temperature=0.7, seed=2**62 + 3, max_tokens=28, top_k=20, min_p=0.02),
    SamplingParams(
        temperature=0.8, seed=1, max_tokens=20, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2
    ),
    SamplingParams(
        temperature=0.8, seed=4, max_tokens=20, min_tokens=12, stop_token_ids=[198, 220, 257, 10], logit_bias={10: 2.0}
    ),
]
NUMBERS = "temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty".split()


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", max_running=2) as made:
        yield made


@pytest.fixture
def calls(llm, monkeypatch):
    """Counts the calls of the stand-in, which reads its arguments as the kernel does."""
    counted = []

    def sample_rows(logits, sampling, *, query_starts, token_ids, positions, row_tokens, parents):
        assert parents is None  # chains
        counted.append(len(logits))
        rows = np.frombuffer(sampling.rows.numpy().tobytes(), dtype=np.dtype(header_structures()["SamplingRow"]))
        drawn = []
        for n, token in enumerate(row_tokens.tolist()):
            request = int(np.searchsorted(query_starts.numpy(), token, side="right")) - 1
            row, position = rows[request], int(positions[token]) + 1
            history, bias = slice(row["history_start"], row["history_end"]), slice(row["bias_start"], row["bias_end"])
            seen = sampling.history_tokens[history].numpy()
            biases = dict(zip(sampling.bias_tokens[bias].tolist(), sampling.bias_values[bias].tolist()))
            if position < row["mask_before"]:
                biases |= dict.fromkeys(sampling.bias_tokens[row["bias_end"] : row["mask_end"]].tolist(), -np.inf)
            tokens, _ = _core.sample_rows(
                logits[n : n + 1].float().numpy(),
                np.array([position], dtype=np.uint64),
                row["seed"].reshape(1).astype(np.uint64),
                {name: row[name].item() for name in NUMBERS} | {"logit_bias": biases},
                prompt=seen,
                output=np.repeat(seen, sampling.history_counts[history].numpy()),
                paths=[token_ids[int(query_starts[request] + row["anchor"]) + 1 : token + 1].tolist()],
            )
            drawn.append(int(tokens[0]))
        return cuda.Sampled(torch.tensor(drawn), torch.zeros(len(drawn), dtype=torch.int32), None)

    monkeypatch.setattr(cuda, "sample_rows", sample_rows)
    monkeypatch.setattr(llm._loop.backend, "draws_there", True)
    return counted


def texts(llm, params):
    return [(output.token_ids, output.finish_reason) for output in llm.generate(PROMPTS, params)]


def test_tokens_drawn_on_the_device_are_those_of_the_host(llm, calls, monkeypatch):
    drawn = texts(llm, PARAMS)
    assert calls
    monkeypatch.setattr(llm._loop.backend, "draws_there", False)
    assert texts(llm, PARAMS) == drawn


def test_rows_of_constrained_requests_are_drawn_on_the_host_beside_others(llm, calls, monkeypatch):
    def odd(output, row):
        row[len(output) % 5 :: 5] = -np.inf
        return row

    each = [
        PARAMS[1],
        SamplingParams(max_tokens=20, logits_processors=[odd], temperature=0.7, seed=3, presence_penalty=0.2),
        PARAMS[0],
        SamplingParams(max_tokens=20, bad_words=["in", "range"], ignore_eos=True),
        PARAMS[2],
    ]
    drawn, steps = texts(llm, each), llm.stats()["steps"]
    assert calls
    monkeypatch.setattr(llm._loop.backend, "draws_there", False)
    assert texts(llm, each) == drawn and llm.stats()["steps"] > steps
    assert drawn[1] != texts(llm, [SamplingParams(max_tokens=20, temperature=0.7, seed=3, presence_penalty=0.2)] * 5)[1]


@pytest.mark.parametrize("option", [{"logprobs": 1}, {"logprobs": 0, "presence_penalty": 0.5}])
def test_what_the_device_does_not_do_is_done_on_the_host(llm, calls, monkeypatch, option):
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=6, **option)
    drawn = texts(llm, params)
    assert not calls
    monkeypatch.setattr(llm._loop.backend, "draws_there", False)
    assert texts(llm, params) == drawn
