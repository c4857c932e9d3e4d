"""Drafts of requests that sample share the target's random numbers: more of them are right. That the texts are plain SGLang's is what `test_text` and
`test_trees` compare, and the law of draws without a seed what `draws_on_cpu.py` measures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from cases import tokens
from servers import Server, side_by_side, speculative
from sglang.srt.layers import sampler as their_sampler
from sglang_host.kernels import murmur_hash32

from dflash_rs.sglang import coupled, trees
from dflash_rs.sglang.coupled import Couplings, Seeded
from dflash_rs.sglang.sampling import TargetSampler

VOCAB, PLACES, ALL = 90, 40, 1 << 30
# Requests: two that sample, of which the second is cold; one that filters; one that is greedy.
ASKED = [
    {"temperature": 1.3, "sampling_seed": 11},
    {"temperature": 0.4, "sampling_seed": 2**63 - 5},
    {"temperature": 1.0, "sampling_seed": 11, "top_k": 5},
    {"temperature": 1.0, "sampling_seed": 3, "top_k": 1},
]


@pytest.fixture(autouse=True)
def hash_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(their_sampler, "murmur_hash32", murmur_hash32)


def requests(asked: list[dict[str, Any]]) -> tuple[Any, list[Any]]:
    """SGLang's sampling info, and as much of requests as is looked at."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    rest = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    params = [SimpleNamespace(**{"top_k": ALL, "top_p": 1.0, "min_p": 0.0} | rest | a) for a in asked]
    info = SamplingBatchInfo(
        temperatures=torch.tensor([[p.temperature] for p in params]),
        top_ps=torch.tensor([p.top_p for p in params]),
        top_ks=torch.tensor([p.top_k for p in params], dtype=torch.int32),
        min_ps=torch.zeros(len(params)),
        sampling_seed=torch.tensor([p.sampling_seed for p in params]),
        is_all_greedy=all(p.top_k == 1 for p in params),
        is_any_greedy=any(p.top_k == 1 for p in params),
        need_top_p_sampling=False,
        need_top_k_sampling=True,
        need_min_p_sampling=False,
        vocab_size=VOCAB,
    )
    return info, [SimpleNamespace(sampling_params=p, custom_logit_processor=None) for p in params]


def drawn(output: Any, info: Any, _: Any, __: Any, ___: Any, positions: torch.Tensor) -> torch.Tensor:
    """SGLang's sampler with its torch backend, as far as seeded draws go."""
    probs = torch.softmax(output.next_token_logits / info.temperatures, dim=-1)
    if not (info.need_top_k_sampling or info.need_top_p_sampling):
        return their_sampler.sampling_from_probs_torch(probs, info.sampling_seed, positions)
    return their_sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        probs, info.top_ks, info.top_ps, info.min_ps, False, info.sampling_seed, positions
    )


def seeded(asked: list[dict[str, Any]]) -> Seeded:
    """The numbers of such requests."""
    info, reqs = requests(asked)
    found = Couplings(VOCAB, None, torch.float32).of(info, reqs, chains_of_logits=False)
    assert isinstance(found, Seeded)
    return found


def given(rows: int) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Logits ``[R, PLACES, VOCAB]``, a head whose logits for them are themselves, and positions ``[R, PLACES]``."""
    logits = torch.randn((rows, PLACES, VOCAB), generator=torch.Generator().manual_seed(4)) * 2
    starts = torch.tensor([7, 300, 5, 90])[:rows]
    return logits, SimpleNamespace(weight=torch.eye(VOCAB)), starts[:, None] + torch.arange(PLACES)


@pytest.mark.parametrize("rows", [64, 7], ids=["at once", "in parts"])
def test_a_drafter_that_is_the_target_drafts_what_will_be_drawn(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every seed, temperature, position and token in its place: one of them off, and next to no draft of a warm request is right."""
    monkeypatch.setattr(coupled, "SHARPER", 1.0)
    monkeypatch.setattr(coupled, "_ROWS", rows)
    logits, head, positions = given(4)
    info, reqs = requests(ASKED)
    block = torch.zeros((4, PLACES), dtype=torch.int64)
    sampler = TargetSampler(drawn, 8, VOCAB, "cpu")
    said = sampler.targets(logits.flatten(0, 1).clone(), info, reqs, torch.arange(4), block, positions[:, 0])
    monkeypatch.setattr(coupled, "CANDIDATES", VOCAB)
    drafts = seeded(ASKED).draft(logits.flatten(0, 1), head, None, positions).view(4, PLACES)
    likeliest = logits.argmax(-1)
    assert torch.equal(drafts[[0, 1, 3]], said[[0, 1, 3]])
    assert (said[0] != likeliest[0]).sum() > PLACES // 2, "the case is meant to be one of warm draws"
    # Which token has which rank is the target's affair.
    assert torch.equal(drafts[2], likeliest[2])
    alone = seeded(ASKED[:2]).draft(logits[:2].flatten(0, 1), head, None, positions[:2])
    assert torch.equal(alone.view(2, PLACES), said[:2])


def test_a_sharper_drafter_of_few_candidates_is_still_right_often() -> None:
    logits, head, positions = given(1)
    info, reqs = requests(ASKED[:1])
    noisy = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(6)) * 0.3
    said = TargetSampler(drawn, 8, VOCAB, "cpu").targets(
        logits[0].clone(), info, reqs, torch.arange(1), torch.zeros((1, PLACES), dtype=torch.int64), positions[:, 0]
    )
    right = (seeded(ASKED[:1]).draft(noisy[0], head, None, positions) == said[0]).sum()
    assert right > PLACES * 0.6 > 2 * (noisy[0].argmax(-1) == said[0]).sum()


def sums(logits: torch.Tensor, position: int, asked: dict[str, Any]) -> torch.Tensor:
    """What the tokens of a row come to, by the definition."""
    words = murmur_hash32(torch.tensor([asked["sampling_seed"]]), torch.tensor([position]), torch.arange(VOCAB))
    uniform = words[0].to(torch.float64) / (2**32 - 1)
    return 1.3 * logits.double() / asked["temperature"] - (-uniform.log()).log()


def test_candidates_of_trees_come_by_their_sums_with_their_shares() -> None:
    logits, head, positions = given(4)
    found = trees.candidates(logits.flatten(0, 1), head, None, 64)
    ids, shares = (part.view(4, PLACES, 6) for part in seeded(ASKED).reordered(*found, positions, 6))
    for row in range(2):
        for place in range(PLACES):
            tokens = found[0].view(4, PLACES, -1)[row, place]
            mine = sums(logits[row, place], int(positions[row, place]), ASKED[row])[tokens]
            order = mine.argsort(descending=True)[:6]
            assert torch.equal(ids[row, place], tokens[order])
            assert torch.allclose(shares[row, place].double(), mine.log_softmax(-1)[order], atol=1e-4)
    assert torch.equal(ids[2:], found[0].view(4, PLACES, -1)[2:, :, :6])
    assert shares.isfinite().all() and (shares <= 0).all()


def test_a_lattice_is_followed_by_its_sums() -> None:
    """The candidate behind the one before that its score and the number of its token favour."""
    generator = torch.Generator().manual_seed(8)
    _, _, positions = given(4)
    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:8] for _ in range(4 * PLACES)]).view(4, PLACES, 8)
    scores = torch.randn((4, PLACES, 8, 8), generator=generator)
    found = seeded(ASKED).along(ids, scores, positions)
    for row in range(2):
        for place in range(PLACES):
            whole = torch.zeros(8, VOCAB).scatter(1, ids[row, place].expand(8, 8), scores[row, place])
            expected = sums(whole, int(positions[row, place]), ASKED[row])[:, ids[row, place]]
            assert torch.allclose(found[row, place].double(), expected, atol=1e-4)
    assert torch.equal(found[2:], scores[2:])


def test_where_no_number_is_known_the_likeliest_is_drafted() -> None:
    couplings = Couplings(VOCAB, None, torch.float32)
    for asked in (ASKED[3:], ASKED[2:], [{"temperature": 0.8, "sampling_seed": 1, "top_p": 0.9}]):
        assert couplings.of(*requests(asked), chains_of_logits=True) is None
    info, reqs = requests(ASKED)
    first = couplings.of(info, reqs, chains_of_logits=True)
    assert isinstance(first, Seeded) and couplings.of(info, reqs, chains_of_logits=True) is first
    assert couplings.of(*requests(ASKED), chains_of_logits=True) is not first, "other requests have other seeds"
    assert Couplings(None, None, torch.float32).of(info, reqs, chains_of_logits=True) is None
    info.sampling_seed = None
    assert couplings.of(info, reqs, chains_of_logits=True) is None
    # This package's kernel draws for itself, where each draft has logits of its own.
    draws: Any = SimpleNamespace(serves=lambda params, dtype: all(p.top_k != 5 for p in params))
    knows = Couplings(VOCAB, draws, torch.float32)
    assert knows.of(info, reqs[:2], chains_of_logits=True) is not None
    assert knows.of(info, reqs[:2], chains_of_logits=False) is None
    assert knows.of(info, reqs, chains_of_logits=True) is None


# --- beside drafts that are the likeliest -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(logs) -> Iterator[dict[bool, Server]]:
    """With and without; chains of whole blocks where a request asks for them, otherwise chains and trees in turn."""
    options = speculative(page_size=16, enable_deterministic_inference=True, grammar_backend="none")
    given = {"tree_nodes": 12, "adaptive": "cycle", "widths": [8]}
    started = {
        on: Server(logs / f"coupled-{on}.log", env={"DFLASH_RS_CONFIG": json.dumps(given | {"coupled": on})}, **options)
        for on in (True, False)
    }
    with side_by_side(started):
        yield started


@pytest.mark.parametrize("chains", [True, False], ids=["chains", "chains and trees"])
def test_fewer_passes_write_the_same_text(pair: dict[bool, Server], chains: bool) -> None:
    """One request after the other: what is drafted hangs on nothing else. Where chains alone are coupled, those with trees between them have 0.94 of the passes;
    both coupled 0.88, and chains by themselves 0.86."""
    params = {"temperature": 1.0, "max_new_tokens": 48, "ignore_eos": True}
    if chains:
        params["custom_params"] = {"dflash_rs": {"whole_blocks": True}}
    bodies = [
        {"text": prompt, "sampling_params": params | {"sampling_seed": 100 + n}}
        for n, prompt in enumerate(cases.prompts(10))
    ]
    with ThreadPoolExecutor() as pool:
        asked = {on: pool.submit(server.together, bodies, at_once=1) for on, server in pair.items()}
    answers = {on: of.result() for on, of in asked.items()}
    assert tokens(answers[True]) == tokens(answers[False])
    passes = {on: sum(answer["meta_info"]["spec_verify_ct"] for answer in answers[on]) for on in pair}
    assert passes[True] < 0.91 * passes[False], passes
