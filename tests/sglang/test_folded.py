"""What the drafter's CUDA graphs leave: coupled drafts and trees are chosen from it, and the head's product is computed once.

Graphs are stood in for (``sglang_host/graphs.py``): what SGLang captures behind the drafter's pass runs behind it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "python"))
import cases
import pytest
import torch
from cases import tokens
from second import second
from servers import Server, side_by_side, speculative

from dflash_rs.sglang import compat
from dflash_rs.sglang.folded import Chosen, Lattices, Logits
from dflash_rs.sglang.trees import Computed, head_logits

VOCAB, WIDTH, BLOCK, MOST = 90, 6, 5, 4


def sampler(weight: torch.Tensor, start: int = 0, group: Any = None) -> Any:
    """SGLang's, of a rank's part of the head."""
    from sglang.srt.speculative.dflash_worker_v2 import _DflashDraftSampler

    found = _DflashDraftSampler(
        weight=weight, block_size=BLOCK, num_org=len(weight), org_vocab_start=start, max_bs=MOST, tp_group=None
    )
    found.tp_group = group
    return found


def given(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A head, in which many tokens are as likely as others, and the drafter's hidden states of so many blocks."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(VOCAB // 2, WIDTH, generator=generator).repeat(2, 1)
    return weight, torch.randn(rows * BLOCK, WIDTH, generator=generator)


def test_a_graph_drafts_what_sglangs_does_and_leaves_the_logits_of_it() -> None:
    weight, hidden = given()
    theirs, ours = sampler(weight), Logits(sampler(weight), None)
    theirs(hidden)
    ours(hidden)
    drafts = 3 * (BLOCK - 1)
    assert torch.equal(ours.out[:drafts], theirs.out[:drafts])
    told: list[Any] = []
    worker = SimpleNamespace(drafts_of=lambda hidden, head: told.append((hidden, head)) or "drafts")
    assert Chosen(ours, lambda: ours.choose(worker, 3)).out == "drafts"
    [(kept, head)] = told
    assert head == Computed(0)
    expected = hidden.view(3, BLOCK, WIDTH)[:, 1:].reshape(drafts, WIDTH) @ weight.T
    assert torch.equal(head_logits(kept, head)[0], expected)


def test_shorter_blocks_share_the_room_of_longer_ones() -> None:
    weight, hidden = given()
    longer = Logits(sampler(weight), None)
    assert Logits(sampler(weight), longer.room).room is longer.room
    short = sampler(weight)
    short.out = short.out[:3]
    assert Logits(short, longer.room).room is longer.room
    assert Logits(sampler(weight), Logits(short, None).room).room.shape == longer.room.shape


class Ranks:
    """A group that gathers what this rank has and what the other one would send, in the order of what is asked for."""

    def __init__(self, rank: int, others: list[torch.Tensor]):
        self.rank, self.others = rank, iter(others)

    def all_gather(self, mine: torch.Tensor, dim: int) -> torch.Tensor:
        other = next(self.others)
        return torch.cat([mine, other] if self.rank == 0 else [other, mine], dim)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_with_parts_of_the_vocabulary_draft_the_same(rank: int) -> None:
    weight, hidden = given()
    whole = Logits(sampler(weight), None)
    whole(hidden)
    # Parts are not equally long.
    parts = [(0, weight[:50]), (50, weight[50:])]
    start, part = parts[1 - rank]
    rows = hidden.view(3, BLOCK, WIDTH)[:, 1:].reshape(-1, WIDTH)
    best, found = (rows @ part.T).max(-1, keepdim=True)
    start, part = parts[rank]
    ours = Logits(sampler(part, start, Ranks(rank, [best, found + parts[1 - rank][0]])), None)
    ours(hidden)
    assert torch.equal(ours.out[:12], whole.out[:12])
    worker = SimpleNamespace(drafts_of=lambda hidden, head: (hidden, head))
    kept, head = ours.choose(worker, 3)
    assert head == Computed(start) and torch.equal(kept, rows @ part.T)


def test_a_dflash_2_leaves_its_lattice(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, scores = torch.arange(3 * 4 * 2).view(3, 4, 2), torch.randn(3, 4, 2, 2)
    seams = SimpleNamespace(
        lattice=lambda worker, hidden, anchors, head: (ids + anchors[:, None, None], scores),
        best_path=lambda worker, tokens, scores: tokens[:, :, 1],
    )
    monkeypatch.setattr(compat, "installed", lambda: seams)
    theirs = SimpleNamespace(
        block_size=BLOCK,
        out=torch.zeros(MOST * 4, dtype=torch.int64),
        candidate_out=torch.zeros(MOST, 4, 2, dtype=torch.int64),
    )
    ours = Lattices(theirs, "worker", "head")
    block = torch.arange(3 * BLOCK)
    ours(torch.zeros(3 * BLOCK, WIDTH), block)
    expected = ids + torch.tensor([0, 5, 10])[:, None, None]
    assert torch.equal(ours.out[:12], expected[:, :, 1].reshape(-1))
    worker = SimpleNamespace(drafts_along=lambda tokens, scores: torch.stack([tokens.sum(2), scores.sum((2, 3))]))
    found, sums = Chosen(ours, lambda: ours.choose(worker, 3)).out.view(2, 3, 4)
    assert torch.equal(found, expected.sum(2).to(found)) and torch.equal(sums, scores.sum((2, 3)))
    # SGLang tells it what it would sample with, also while another chooses.
    Chosen(ours, lambda: theirs.out).stage_sampling_params(bs=3, sampling_info=None)


def test_only_samplers_that_leave_something_are_chosen_from() -> None:
    from dflash_rs.sglang.worker import DflashRsWorker

    worker = DflashRsWorker.__new__(DflashRsWorker)
    weight, hidden = given()
    for before in (None, sampler(weight)):
        vars(worker)["_draft_sampler"] = before
        with worker._choosing():
            # As without a graph: SGLang hands the hidden states to the worker.
            assert vars(worker)["_draft_sampler"] is None
        assert vars(worker)["_draft_sampler"] is before
    vars(worker)["_draft_sampler"] = kept = Logits(sampler(weight), None)
    kept(hidden)
    with pytest.raises(ZeroDivisionError), worker._choosing():
        assert isinstance(vars(worker)["_draft_sampler"], Chosen)
        raise ZeroDivisionError
    assert vars(worker)["_draft_sampler"] is kept


# --- servers ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["DFlash", "DFlash 2"])
def pair(request: pytest.FixtureRequest, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """With graphs of up to two requests, and without; chains of two lengths and trees in turn."""
    options = speculative(page_size=16, enable_deterministic_inference=True, grammar_backend="none")
    if request.param == "DFlash 2":
        options["speculative_draft_model_path"] = str(second(tmp_path_factory.mktemp("second"), 0.001))
    given = {"DFLASH_RS_CONFIG": json.dumps({"tree_nodes": 12, "adaptive": "cycle", "widths": [4, 8]})}
    started = {}
    for graphs in (True, False):
        name = f"folded-{request.param}-{graphs}".replace(" ", "-")
        env = (
            given | {"SGLANG_HOST_COUNT": str(logs / f"{name}.json")} | ({"SGLANG_HOST_GRAPHS": "2"} if graphs else {})
        )
        started[graphs] = Server(logs / f"{name}.log", env=env, **options)
    with side_by_side(started):
        yield started


def test_drafts_are_the_same_and_the_heads_product_is_computed_once(pair: dict[bool, Server]) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 40, "ignore_eos": True}
    bodies = [
        {"text": prompt, "sampling_params": params | {"sampling_seed": 100 + n}}
        for n, prompt in enumerate(cases.prompts(4))
    ]
    answers = {graphs: server.together(bodies, at_once=1) for graphs, server in pair.items()}
    passes = {graphs: [a["meta_info"]["spec_verify_ct"] for a in of] for graphs, of in answers.items()}
    assert tokens(answers[True]) == tokens(answers[False])
    assert passes[True] == passes[False] and max(passes[True]) < 38, passes
    # The target's and the drafter's. Where the batch is too large for a graph, hidden states are handed on.
    counted = {graphs: json.loads(server.log.with_suffix(".json").read_text()) for graphs, server in pair.items()}
    assert counted[True]["1"]["heads"] == counted[False]["1"]["heads"] == 2, counted
    assert tokens(pair[True].together(bodies, at_once=4)) == tokens(answers[False])
