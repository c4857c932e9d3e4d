"""The target's tokens drawn by this package's kernel in place of SGLang's sampler, on the stand-in for CUDA's driver: prints what was found, as JSON.

A process of its own: a driver is looked for once. SGLang's own function is measured by the same law and the same yardstick as the kernel.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch
from sglang_host import cuda as host_cuda
from sglang_host.counting import Operations

host_cuda.emulate()

from filtered_law import distance, law  # noqa: E402

from dflash_rs import verify  # noqa: E402
from dflash_rs.sglang.coupled import Drawn  # noqa: E402
from dflash_rs.sglang.kernels import TOP_K_ALL, Draws  # noqa: E402
from dflash_rs.sglang.sampling import TargetSampler  # noqa: E402

VOCAB, DRAWS, PLACES = 96, 12_000, 8
SETTINGS = {
    "temperature": {"temperature": 1.4},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "joint": {"temperature": 1.2, "top_k": 12, "top_p": 0.8},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}


def asked(**options: Any) -> Any:
    """SGLang's sampling parameters of a request."""
    return SimpleNamespace(
        **{"temperature": 1.0, "top_k": TOP_K_ALL, "top_p": 1.0, "min_p": 0.0, "frequency_penalty": 0.0} | options,
        **{"presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0},
    )


def law_of(logits: torch.Tensor, p: Any) -> dict[int, float]:
    """The law of a request on a row of logits."""
    return law(logits, p.temperature, p.top_k, p.top_p, p.min_p)


class Theirs:
    """SGLang's sampler with its torch backend, as far as drawing goes."""

    def __init__(self) -> None:
        self.called = 0

    def _preprocess_logits(self, logits: torch.Tensor, _: Any) -> torch.Tensor:
        return logits

    def __call__(self, output: Any, info: Any, *_: Any) -> torch.Tensor:
        self.called += 1
        logits = output.next_token_logits
        logits.div_(info.temperatures)
        logits[:] = torch.softmax(logits, dim=-1)
        drawn = top_k_top_p_min_p_sampling_from_probs_torch(
            logits, info.top_ks, info.top_ps, info.min_ps, info.need_min_p_sampling, None, None
        )
        return drawn[0] if isinstance(drawn, tuple) else drawn


def info_of(params: list[Any]) -> Any:
    """SGLang's sampling info of a batch."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    return SamplingBatchInfo(
        temperatures=torch.tensor([[p.temperature] for p in params]),
        top_ps=torch.tensor([p.top_p for p in params]),
        top_ks=torch.tensor([p.top_k for p in params], dtype=torch.int32),
        min_ps=torch.tensor([p.min_p for p in params]),
        is_all_greedy=False,
        is_any_greedy=False,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
        need_min_p_sampling=any(p.min_p > 0 for p in params),
        vocab_size=VOCAB,
        custom_params=[None] * len(params),
    )


class Batch:
    """Requests that are drawn together, step after step."""

    def __init__(self, params: list[Any], draws: Draws | None):
        self.theirs = Theirs()
        self.sampler = TargetSampler(self.theirs, 64, VOCAB, "cpu", draws)
        self.reqs = [SimpleNamespace(sampling_params=p, custom_logit_processor=None) for p in params]
        self.info = info_of(params)
        self.at = 5

    def step(self, row: torch.Tensor) -> torch.Tensor:
        """i64 ``[R, PLACES]``, every row of the block with the same logits."""
        rows = len(self.reqs)
        logits = row.expand(rows * PLACES, VOCAB).clone()
        block = torch.zeros((rows, PLACES), dtype=torch.int64)
        starts = torch.full((rows,), self.at)
        self.at += PLACES
        before = logits.clone()
        tokens = self.sampler.targets(logits, self.info, self.reqs, torch.arange(rows), block, starts, False)
        self.untouched = torch.equal(logits, before)
        return tokens


def coupled(early: int) -> tuple[float, float]:
    """The law of texts whose drafts see the numbers of verification: how far off, and drafts accepted of a step. `early`: places by which drafts see numbers
    too soon, which is to be noticed: whether a place is reached then hangs on the numbers that its token is drawn with.

    Every token's law hangs on the one before it; the drafter has a blurred one for each place, by the anchor. After every other step the batch changes, and
    with it the numbers of what was not reached.
    """
    kinds, rows, places, steps = 8, 40, 4, 480
    table = torch.randn((kinds, kinds), generator=torch.Generator().manual_seed(5)) * 1.5
    laws = torch.softmax(table.double(), -1)
    # Of the tokens that follow the anchor in 1, 2, ... steps.
    blurred = torch.stack([torch.linalg.matrix_power(laws, n + 1) for n in range(places - 1)], 1).log().float()
    params = [asked() for _ in range(rows)]
    draws = Draws(torch.device("cpu"), True)
    batch = Batch(params, draws)
    batch.sampler.vocab = kinds
    anchors, starts = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), 5)
    seen: Counter[tuple[int, int]] = Counter()
    accepted = 0
    for step in range(steps):
        if step % 2:
            # Objects of their own: other requests, as far as the kernel is told.
            batch.reqs = [SimpleNamespace(sampling_params=asked(), custom_logit_processor=None) for _ in params]
        now = [req.sampling_params for req in batch.reqs]
        positions = starts[:, None] + torch.arange(places - 1) + early
        head = SimpleNamespace(weight=torch.eye(kinds))
        drafts = Drawn(draws, now).draft(blurred[anchors].flatten(0, 1), head, None, positions).view(rows, -1)
        block = torch.cat([anchors[:, None], drafts], 1)
        drawn = batch.sampler.targets(
            table[block].flatten(0, 1), batch.info, batch.reqs, torch.arange(rows), block, starts, False
        )
        lengths, bonus = map(torch.from_numpy, verify.walk(drafts.numpy(), drawn.numpy()))
        for before, text, length in zip(anchors.tolist(), drawn.tolist(), lengths.tolist()):
            gained = [before, *text[: length + 1]]
            seen.update(zip(gained, gained[1:]))
        accepted += int(lengths.sum())
        anchors, starts = bonus, starts + lengths + 1
    reached = Counter()
    for (before, _), count in seen.items():
        reached[before] += count
    draws_in_all = sum(seen.values())
    expected = {
        (before, token): reached[before] / draws_in_all * float(laws[before, token])
        for before in range(kinds)
        for token in range(kinds)
    }
    return distance(seen, expected), accepted / (rows * steps)


def main() -> None:
    torch.manual_seed(7)
    logits = torch.randn(VOCAB) * 2
    logits[::9] = -math.inf  # what a grammar forbids
    found: dict[str, Any] = {"laws": {}}
    for name, options in SETTINGS.items():
        p = asked(**options)
        expected = law_of(logits, p)
        ours, theirs = Batch([p] * 10, Draws(torch.device("cpu"), True)), Batch([p] * 10, None)
        steps = DRAWS // (10 * PLACES)
        drawn = torch.cat([ours.step(logits).flatten() for _ in range(steps)])
        other = torch.cat([theirs.step(logits).flatten() for _ in range(steps)])
        wrong = law_of(logits, asked(**options | {"temperature": p.temperature * 1.25, "top_k": min(p.top_k, 60)}))
        found["laws"][name] = {
            "ours": distance(Counter(drawn.tolist()), expected),
            "theirs": distance(Counter(other.tolist()), expected),
            "another": distance(Counter(drawn.tolist()), wrong),
            "calls": [ours.theirs.called, theirs.theirs.called],
            "untouched": ours.untouched,
        }
    greedy, warm = asked(top_k=1), asked(temperature=1.5)
    mixed = Batch([greedy, warm, greedy], Draws(torch.device("cpu"), True))
    tokens = mixed.step(logits)
    found["greedy"] = bool((tokens[[0, 2]] == logits.argmax()).all()) and len(set(tokens[1].tolist())) > 1
    # The same place again: the same noise, while the batch is the same.
    mixed.at = 5
    found["again"] = torch.equal(mixed.step(logits), tokens)
    changed = Batch([warm], mixed.sampler.draws)
    found["anew"] = not torch.equal(changed.step(logits), tokens[1:2])
    triple = asked(top_k=5, top_p=0.5, min_p=0.1)
    for name, params, joint, calls in (
        ("triple", [triple, warm], False, 1),
        ("pair", [asked(top_k=5, top_p=0.5), warm], False, 0),
        ("triple, joint", [triple, warm], True, 0),
        ("coldest", [asked(temperature=2e-6)], True, 1),
    ):
        batch = Batch(params, Draws(torch.device("cpu"), joint))
        batch.step(logits)
        found[name] = batch.theirs.called == calls
    nothing = Batch([warm], Draws(torch.device("cpu"), True))
    found["no token"] = nothing.step(torch.full((VOCAB,), -math.inf)).tolist() == [[0] * PLACES]
    found["operations"] = {}
    for name, draws in (("ours", Draws(torch.device("cpu"), True)), ("theirs", None)):
        batch = Batch([asked(top_p=0.9, temperature=0.8)] * 4, draws)
        batch.step(logits)
        rows = logits.repeat(4 * PLACES, 1)
        block, starts = torch.zeros((4, PLACES), dtype=torch.int64), torch.full((4,), 9)
        slots = torch.arange(4)
        with Operations() as counted:
            batch.sampler.targets(rows, batch.info, batch.reqs, slots, block, starts, False)
        found["operations"][name] = counted.operations
    found["coupled"] = [*coupled(0), coupled(1)[0]]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
