"""`LLM` on the emulated GPU: the bundled pair in bfloat16, text with and without drafts, graphs, every sampling option."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dflash_rs import LLM, SamplingParams, _core, device_step
from dflash_rs.models import fused

pytestmark = pytest.mark.pair
PROMPTS = ["def add(a, b):\n", "import os\n\n\ndef main(", "class Stack:\n    ", "for i in range("]
MATRIX = {
    "greedy": {},
    "seeded": {"temperature": 0.8, "seed": 11},
    "filters": {"temperature": 0.9, "seed": 12, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "penalties": {
        "temperature": 0.7, "seed": 13, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3,
    },
    "bias": {"temperature": 0.7, "seed": 14, "logit_bias": {10: -3.0, 200: 1.5, 5: -100.0}},
    "greedy penalties": {"temperature": 0.0, "repetition_penalty": 1.3},
    "stop": {"temperature": 0.6, "seed": 15, "stop": ["\n"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def exact(gpu):
    """Products whose rows do not depend on how many there are: any difference in text is then an error, never rounding."""

    def product(self, x, residual=None):
        if getattr(self, "exact", None) is None:
            weight = self.weight.float().contiguous().numpy()
            self.exact = _core.PackedWeight(weight, None if self.bias is None else self.bias.float().numpy(), "highest")
        x = x.float().contiguous()
        out = torch.empty(x.shape[0], self.outputs)
        if residual is not None:
            residual = residual.float().contiguous()
            residual = (residual.data_ptr(), residual.stride(0), self.outputs)
        self.exact.product(
            (x.data_ptr(), x.stride(0), self.inputs), x.shape[0], (out.data_ptr(), self.outputs, self.outputs), residual, 1
        )
        return out.bfloat16()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused.PackedLinear, "__call__", product)
        patch.setattr(fused.PackedLinear, "plus", product)
        yield


def engine(**options):
    return LLM(device="cpu", dtype="bfloat16", max_running=3, adaptive=False, max_context=256, **options)


@pytest.fixture(scope="module")
def llm(exact):
    with engine() as made:
        assert made._device_step is not None and made._device_step.graphs is not None
        yield made


def tokens(outputs):
    assert all(o.error is None for o in outputs), [o.error for o in outputs]
    return [(o.token_ids, o.finish_reason) for o in outputs]


def params(name, max_tokens=20):
    return SamplingParams(**{"temperature": 0.0, **MATRIX[name], "max_tokens": max_tokens})


@pytest.mark.parametrize("name", MATRIX)
def test_text_is_the_same_with_and_without_drafts(llm, name):
    plain = tokens(llm.generate(PROMPTS, params(name), draft=False))
    drafted = llm.generate(PROMPTS, params(name))
    assert tokens(drafted) == plain
    assert sum(sum(o.metrics["accept_histogram"][1:]) for o in drafted) > 0, "no draft was ever accepted"


def test_requests_that_ask_for_different_things_share_a_batch(llm):
    each = [params(name) for name in ("greedy", "filters", "penalties", "bias")]
    together = tokens(llm.generate(PROMPTS, each))
    alone = [tokens(llm.generate([prompt], [one], draft=False))[0] for prompt, one in zip(PROMPTS, each)]
    assert together == alone
