"""What steps leave for the drafter waits until it is asked: it then finds what it would have found without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dflash_rs
from dflash_rs.config import StepCosts
from dflash_rs.engine import deferred
from dflash_rs.engine.deferred import Deferred

PROMPTS = ["def area(width, height):\n", "The river", "import json\n\n", "In the year"]
# Rows so dear that nothing is drafted but what a look now and then drafts.
DEAR = StepCosts(target=((1, 1.0), (2, 9.0), (64, 900.0)), draft=((1, 5.0),))


class Drafter:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[list, list, list]] = []

    def inject(self, features, positions, slots) -> None:
        assert features.dtype in (torch.float32, torch.bfloat16)
        self.told.append((features.float().tolist(), positions.tolist(), slots.tolist()))


def step(waiting: Deferred, memory: torch.Tensor, values: list[float], slots: list[int]) -> None:
    """Tokens whose features are at the odd rows of a pass's memory, and what the next pass does to it."""
    for row, value in enumerate(values):
        memory[2 * row + 1] = value
    rows = np.arange(len(values)) * 2 + 1
    waiting.add(memory, rows, positions=np.array(slots) + 100, slots=np.array(slots))
    memory.fill_(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_waits_is_written_in_one_call_in_its_order(dtype: torch.dtype) -> None:
    drafter, memory = Drafter(), torch.zeros(6, 2, dtype=dtype)
    waiting = Deferred(drafter.inject)
    waiting.write()
    assert (drafter.told, waiting.written) == ([], 0)
    step(waiting, memory, [1, 2], [7, 9])
    step(waiting, memory, [3], [8])
    assert drafter.told == [] and len(waiting) == 3
    waiting.write()
    assert drafter.told == [([[1, 1], [2, 2], [3, 3]], [107, 109, 108], [7, 9, 8])]
    assert (waiting.written, len(waiting)) == (2, 0)
    waiting.write()
    assert (len(drafter.told), waiting.written) == (1, 0)


def test_steps_and_tokens_that_wait_are_bounded_and_a_slot_waits_once() -> None:
    drafter, memory = Drafter(), torch.zeros(12, 1)
    waiting = Deferred(drafter.inject, steps=3, tokens=5)
    for at in range(3):
        step(waiting, memory, [at], [at])
    assert [slots for _, _, slots in drafter.told] == [[0, 1, 2]]
    # Three are there and three more would be too many; five are as many as may wait.
    step(waiting, memory, [1, 2, 3], [1, 2, 3])
    step(waiting, memory, [4, 5, 6], [4, 5, 6])
    assert [slots for _, _, slots in drafter.told[1:]] == [[1, 2, 3]]
    step(waiting, memory, [7, 8], [7, 8])
    assert [slots for _, _, slots in drafter.told[2:]] == [[4, 5, 6, 7, 8]]
    # A slot that changed hands: its old token first.
    step(waiting, memory, [1], [3])
    step(waiting, memory, [2], [3])
    assert [slots for _, _, slots in drafter.told[3:]] == [[3]] and len(waiting) == 1
    waiting.write()
    assert [features for features, _, _ in drafter.told[3:]] == [[[1]], [[2]]]


def test_a_drafter_without_taps_is_told_of_its_tokens() -> None:
    told: list[tuple] = []
    waiting = Deferred(lambda features, **named: told.append((features, named)))
    for slot in (4, 2):
        waiting.add(None, np.array([0]), slots=np.array([slot]), token_ids=np.array([slot + 1]))
    waiting.write()
    ((features, named),) = told
    assert features is None and {name: values.tolist() for name, values in named.items()} == {
        "slots": [4, 2],
        "token_ids": [5, 3],
    }


def run(monkeypatch: pytest.MonkeyPatch, steps: int, draft: str = "auto") -> tuple[list[str], list, int, int]:
    """Texts, everything that was drafted, and how many steps and calls of `inject` there were."""
    monkeypatch.setattr(deferred.Deferred.__init__, "__defaults__", (steps, deferred.TOKENS))
    llm = dflash_rs.LLM(draft=draft, costs=DEAR, lookup=False, max_running=3, num_pages=24, page_size=16, overlap=False)
    backend = llm._loop.backend
    drafted, calls = [], []
    candidates, inject = backend.draft.candidates, backend._deferred._inject

    def propose(*given, **named):
        tokens, chances = candidates(*given, **named)
        drafted.append((tokens.tolist(), chances.tolist()))
        return tokens, chances

    monkeypatch.setattr(backend.draft, "candidates", propose, raising=False)
    backend._deferred._inject = lambda *given, **named: calls.append(1) or inject(*given, **named)
    # Twice the same prompts: the second time from the cache, whose pages have to be complete.
    texts = [out.text for _ in range(2) for out in llm.generate(PROMPTS, dict(max_tokens=90, temperature=0.7, seed=3))]
    return texts, drafted, llm._loop.steps, len(calls)


def test_a_drafter_finds_the_context_it_would_have_found(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = run(monkeypatch, 1)
    later = run(monkeypatch, deferred.STEPS)
    assert later[0] == at_once[0] and later[2] == at_once[2] > 120
    assert len(later[1]) == len(at_once[1]) > 2
    for (tokens, chances), (expected, likely) in zip(later[1], at_once[1], strict=True):
        assert tokens == expected
        # More rows share a product.
        np.testing.assert_allclose(chances, likely, rtol=1e-4, atol=1e-6)
    assert later[3] < at_once[3] / 8, (later[2:], at_once[2:])


def test_a_drafter_that_does_not_pay_rests_and_wakes_before_it_is_looked_at_again() -> None:
    params = dict(max_tokens=260, temperature=0.7, seed=3, ignore_eos=True)
    with dflash_rs.LLM(draft=None, max_running=2) as plain:
        expected = [out.token_ids for out in plain.generate(PROMPTS[:2], params)]
    with dflash_rs.LLM(costs=DEAR, lookup=False, max_running=2, overlap=False) as llm:
        backend, added, asked = llm._loop.backend, [], []
        add, candidates = backend._deferred.add, backend.draft.candidates

        def told(features, rows, **named):
            added.extend([llm._loop.steps] * rows.size)
            add(features, rows, **named)

        def propose(anchors, lengths, *given, valid_from, **named):
            asked.append((llm._loop.steps, (lengths - valid_from).tolist()))
            return candidates(anchors, lengths, *given, valid_from=valid_from, **named)

        backend._deferred.add, backend.draft.candidates = told, propose
        assert [out.token_ids for out in llm.generate(PROMPTS[:2], params)] == expected
    # After 32, 96 and 224 steps; the third finds what was written for it since the drafter was woken, no less and no more.
    looks = [step for step, _ in asked]
    assert looks == [31, 95, 223], asked
    steps = np.array(added)
    assert not ((steps > 95) & (steps < 191)).any() and (steps >= 191).any() and not (steps > 223).any()
    written = np.count_nonzero((steps >= 191) & (steps < 223))
    assert sum(asked[2][1]) == written >= 64 and max(asked[2][1]) < 60 < min(asked[1][1])
