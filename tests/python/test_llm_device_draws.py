"""The engine's path that draws tokens where the logits are, with the kernel replaced by the core's own sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dflash_rs import LLM, SamplingParams, _core, cuda

pytestmark = pytest.mark.pair
PROMPTS = ["def add(a, b):\n", "import os\n\n\ndef main(", "class Stack:\n    "]
PARAMS = [
    SamplingParams(max_tokens=24),
    SamplingParams(temperature=0.9, seed=5, max_tokens=20, top_p=0.9, logit_bias={10: -2.0}),
    SamplingParams(temperature=0.7, seed=2**62 + 3, max_tokens=28, top_k=20, min_p=0.02),
]


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
        rows = np.frombuffer(sampling.rows.numpy().tobytes(), dtype=cuda.SAMPLING_ROW)
        drawn = []
        for n, token in enumerate(row_tokens.tolist()):
            row = rows[int(np.searchsorted(query_starts.numpy(), token, side="right")) - 1]
            bias = slice(row["bias_start"], row["bias_end"])
            tokens, _ = _core.sample_rows(
                logits[n : n + 1].float().numpy(),
                np.array([int(positions[token]) + 1], dtype=np.uint64),
                row["seed"].reshape(1).astype(np.uint64),
                **{name: row[name].item() for name in ("temperature", "top_k", "top_p", "min_p")},
                logit_bias=list(zip(sampling.bias_tokens[bias].tolist(), sampling.bias_values[bias].tolist())),
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


@pytest.mark.parametrize("option", [{"presence_penalty": 0.5}, {"repetition_penalty": 1.1}, {"logprobs": 1}])
def test_what_the_device_does_not_do_is_done_on_the_host(llm, calls, monkeypatch, option):
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=6, **option)
    drawn = texts(llm, params)
    assert not calls
    monkeypatch.setattr(llm._loop.backend, "draws_there", False)
    assert texts(llm, params) == drawn
