"""Draft trees in SGLang: the tree itself, without a server; what is refused; and servers beside plain SGLang."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "python"))
import cases
import numpy as np
import pytest
import torch
from cases import custom, matrix, tokens
from second import second
from servers import Server, environment, speculative
from test_http import follows_the_law
from test_parts import server_args, worker
from test_serving import TWO_CORES
from test_text import CHECKED
from test_widths import Counts

from dflash_rs import DraftTree
from dflash_rs.errors import InvalidArgument
from dflash_rs.sglang import algorithm, compat, config
from dflash_rs.sglang.kernels import PathKv
from dflash_rs.sglang.sampling import History
from dflash_rs.sglang.trees import Tree, candidates, links
from dflash_rs.sglang.widths import Widths

# --- the tree ---------------------------------------------------------------------------------------------------------

VOCAB, DEPTH, BEST = 50, 5, 6


def drafted(rows: int, drafts: int, seed: int = 0, sharp: float = 2.0) -> tuple[Tree, list[DraftTree]]:
    """Trees of random candidates, and the core's own beside them."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(rows, DEPTH, VOCAB, generator=generator)
    log_probs, found = logits.log_softmax(-1).topk(BEST)
    anchors = torch.randint(VOCAB, (rows,), generator=generator)
    expected = [DraftTree.build(int(a), t.numpy(), p.numpy(), drafts) for a, t, p in zip(anchors, found, log_probs)]
    return Tree.build(anchors, found, log_probs, drafts), expected


@pytest.mark.parametrize("drafts", [1, 5, 8, 30])
def test_a_tree_is_the_cores(drafts: int) -> None:
    tree, expected = drafted(3, drafts)
    assert tree.nodes == drafts + 1
    for row, one in enumerate(expected):
        assert tree.tokens[row].tolist() == one.tokens.tolist()
        assert tree.parents[row].tolist() == one.parents.tolist()
        assert tree.depths[row].tolist() == one.depths.tolist()
        assert np.array_equal(tree.seen[row].numpy(), one.attention_mask())
    assert tree.positions(torch.tensor([10, 20, 30]))[1].tolist() == (20 + expected[1].depths).tolist()


def test_a_tree_with_fewer_nodes_than_there_is_room_for_accepts_no_others() -> None:
    # Two places with two candidates each: six drafts at most.
    found, log_probs = torch.tensor([[[3, 4], [5, 6]]]), torch.tensor([[[0.6, 0.4], [0.7, 0.3]]]).log()
    tree = Tree.build(torch.tensor([3]), found, log_probs, 9)
    assert tree.nodes == 10 and tree.real.sum() == 7
    # The room that is left has the anchor's token: drawing it everywhere must not lead there.
    path, accepted = tree.walk(torch.full((1, 10), 3))
    (node,) = path[0, 1 : 1 + int(accepted)].tolist()
    assert tree.tokens[0, node] == 3 and tree.parents[0, node] == 0 and tree.real[0, node]


@pytest.mark.parametrize("limit", [None, 0, 1, 3])
def test_the_walk_is_the_cores(limit: int | None) -> None:
    longest = 0
    for seed in range(40):
        tree, expected = drafted(4, 20, seed)
        # What is drawn is a child in most places.
        generator = torch.Generator().manual_seed(seed)
        sampled = torch.randint(VOCAB, (4, 21), generator=generator)
        for row, one in enumerate(expected):
            for node, child in enumerate(one.first_child.tolist()):
                if child >= 0 and torch.rand((), generator=generator) < 0.8:
                    sampled[row, node] = int(one.tokens[child])
        path, accepted = tree.walk(sampled, None if limit is None else torch.tensor([limit] * 4))
        for row, one in enumerate(expected):
            nodes, _ = one.walk(sampled[row].numpy())
            nodes = nodes[:limit] if limit is not None else nodes
            assert path[row].tolist() == [0, *nodes.tolist(), *[0] * (DEPTH - len(nodes))]
            assert accepted[row] == len(nodes)
            longest = max(longest, len(nodes))
    assert longest == (DEPTH if limit is None else limit)


def test_a_mask_has_a_row_of_keys_for_each_node() -> None:
    tree, expected = drafted(2, 6)
    starts = [4, 9]
    flat_mask = tree.mask(torch.tensor(starts), 400)
    begin = 0
    for start, one in zip(starts, expected):
        size = 7 * (start + 7)
        rows = flat_mask[begin : begin + size].view(7, start + 7)
        assert rows[:, :start].all(), "the context is seen from everywhere"
        assert np.array_equal(rows[:, start:].numpy(), one.attention_mask())
        begin += size
    assert flat_mask[begin:].all()


def test_links_are_the_cores_but_for_the_order_of_siblings() -> None:
    tree, expected = drafted(3, 25)
    child, sibling = links(tree.parents)
    for row, one in enumerate(expected):
        parents = one.parents.tolist()
        for node in range(26):
            here, walked = int(child[row, node]), []
            while here >= 0:
                walked.append(here)
                here = int(sibling[row, here])
            assert walked == [n for n in range(1, 26) if parents[n] == node]


def test_counts_are_those_of_the_path() -> None:
    tree, expected = drafted(2, 12)
    history = History(4, VOCAB, "cpu")
    rows = torch.tensor([1, 3])
    history.start(rows, [[1, 1, 2], []])
    counts = history.at(rows, tree.tokens[:, 1:], tree.seen)
    for row, one in enumerate(expected):
        before = np.bincount([[1, 1, 2], []][row], minlength=VOCAB) if row == 0 else np.zeros(VOCAB)
        for node in range(13):
            path = np.bincount(one.path_tokens(node), minlength=VOCAB)
            assert np.array_equal(counts[row, node].numpy(), before + path)
    chain = torch.tensor([[4, 4, 7]])
    seen = torch.ones(4, 4, dtype=torch.bool).tril()[None]
    assert torch.equal(history.at(rows[:1], chain), history.at(rows[:1], chain, seen))


@pytest.mark.parametrize("drafts", [1, 6, 25])
def test_a_tree_along_a_lattice_has_the_likeliest_prefixes(drafts: int) -> None:
    generator = torch.Generator().manual_seed(5)
    found = torch.stack([torch.randperm(VOCAB, generator=generator)[:BEST] for _ in range(2 * 3)]).view(2, 3, BEST)
    log_probs = (2 * torch.randn(2, 3, BEST, BEST, generator=generator)).log_softmax(-1)
    tree = Tree.along(torch.tensor([7, 9]), found, log_probs, drafts)
    for row in range(2):
        prefixes: dict[tuple[int, ...], float] = {(): 0.0}
        for place in range(3):
            for path in [path for path in prefixes if len(path) == place]:
                before = path[-1] if path else 0
                for last in range(BEST):
                    prefixes[(*path, last)] = prefixes[path] + float(log_probs[row, place, before, last])
        likeliest = sorted(prefixes, key=lambda path: -prefixes[path])[: drafts + 1]
        expected = {tuple(int(found[row, place, c]) for place, c in enumerate(path)) for path in likeliest}
        got = set()
        for node in range(drafts + 1):
            path = [int(tree.tokens[row, n]) for n in range(1, drafts + 1) if tree.seen[row, node, n]]
            assert len(path) == tree.depths[row, node]
            got.add(tuple(path))
        assert got == expected and tree.real.all()
        assert tree.tokens[row, 0] == (7, 9)[row]
    # Where candidates do not depend on those before them it is the other builder's.
    alone = log_probs[:, :, :1].sort(-1, descending=True).values.expand(-1, -1, BEST, -1)
    same = Tree.build(torch.tensor([7, 9]), found, alone[:, :, 0].contiguous(), drafts)
    along = Tree.along(torch.tensor([7, 9]), found, alone, drafts)
    assert torch.equal(along.tokens, same.tokens) and torch.equal(along.seen, same.seen)


def test_a_lattice_with_fewer_prefixes_than_there_is_room_for() -> None:
    log_probs = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    tree = Tree.along(torch.tensor([1]), torch.tensor([[[3, 4], [5, 6]]]), log_probs, 9)
    assert tree.nodes == 10 and tree.real.sum() == 7
    assert sorted(tree.tokens[0, 1:7].tolist()) == [3, 4, 5, 5, 6, 6]


class Ranks:
    """A group of two ranks, of which this is one; the other's part is known."""

    world_size = 2

    def __init__(self, heads: list[Any], rank: int, hidden: torch.Tensor):
        self.heads, self.rank, self.hidden, self.asked = heads, rank, hidden, 0

    def all_gather(self, mine: torch.Tensor, dim: int) -> torch.Tensor:
        other = candidates_before_gathering(self.hidden, self.heads[1 - self.rank])[self.asked]
        self.asked += 1
        return torch.cat([mine, other] if self.rank == 0 else [other, mine], dim)


def candidates_before_gathering(hidden: torch.Tensor, head: Any) -> tuple[torch.Tensor, ...]:
    logits = hidden @ head.weight[: head.shard_indices.num_org_elements].T
    values, found = logits.topk(BEST)
    return values, found + head.shard_indices.org_vocab_start_index, logits.logsumexp(-1, keepdim=True)


def test_candidates_are_the_same_on_all_ranks_and_those_of_the_whole_head() -> None:
    weight = torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(7, 8, generator=torch.Generator().manual_seed(2))
    whole = candidates(hidden, SimpleNamespace(weight=weight), None, BEST)
    expected = (hidden @ weight.T).log_softmax(-1).topk(BEST)
    assert torch.equal(whole[0], expected.indices) and torch.allclose(whole[1], expected.values, atol=1e-5)
    heads = [
        SimpleNamespace(
            # A part is padded behind its own rows.
            weight=torch.cat([part, torch.full((3, 8), 100.0)]),
            shard_indices=SimpleNamespace(num_org_elements=len(part), org_vocab_start_index=start),
        )
        for start, part in ((0, weight[:30]), (30, weight[30:]))
    ]
    for rank in range(2):
        found, log_probs = candidates(hidden, heads[rank], Ranks(heads, rank, hidden), BEST)
        assert torch.equal(found, whole[0]) and torch.allclose(log_probs, whole[1], atol=1e-5)


def test_a_drafter_that_is_not_finite_drafts_something() -> None:
    hidden = torch.full((DEPTH, 8), torch.nan)
    found, log_probs = candidates(hidden, SimpleNamespace(weight=torch.randn(VOCAB, 8)), None, BEST)
    assert log_probs.isfinite().all()
    tree = Tree.build(torch.tensor([1]), found[None], log_probs[None], 8)
    assert tree.tokens.min() >= 0 and tree.tokens.max() < VOCAB


# --- options and refusals ---------------------------------------------------------------------------------------------


def test_the_widths_of_trees() -> None:
    assert config.Options(tree_nodes=16).widths_of(8) == (1, 2, 4, 8, 17)
    assert config.Options(tree_nodes=16, adaptive=False).widths_of(8) == (17,)
    assert config.Options(tree_nodes=16, adaptive="cycle").widths_of(8) == (1, 2, 4, 8, 17)
    assert config.Options(tree_nodes=16, adaptive="cycle", widths=[1, 3]).widths_of(8) == (1, 3, 17)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"tree_nodes": -1}, "tree_nodes: got -1, expected an integer of at least 0 and at most 1023"),
        ({"tree_nodes": True}, "tree_nodes: got True"),
        ({"tree_nodes": 1024}, "tree_nodes: got 1024"),
        ({"tree_nodes": 7}, "tree_nodes: got 7, expected at least the block, 8"),
        ({"tree_nodes": 16, "widths": [1, 9]}, r"widths: got \[1, 9\], expected at most the block, 8"),
    ],
)
def test_bad_options_are_named(given: dict, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        config.Options(**given).widths_of(8)


def test_sglang_makes_room_for_the_tree_and_remembers_the_block() -> None:
    args = server_args(speculative_num_draft_tokens=6)
    for _ in range(2):
        assert algorithm.fill_in(args, 16) == 6
        assert (args.speculative_num_draft_tokens, args.speculative_dflash_block_size) == (17, 6)


def test_a_limit_below_the_depth_says_nothing_of_the_tree() -> None:
    widths = Widths([1, 8, 17], tree_depth=7)
    recorded: list[int] = []
    widths.planner = SimpleNamespace(record=lambda width, free, temperatures: recorded.append(len(free)))
    for limits in ([7, 3], [6, 6], None):
        widths._launched.append((2, 17, limits, [0.0, 0.7], [("greedy", None)] * 2))
        assert widths.verified([0, 0])[:2] == (17, limits)
    assert recorded == [1, 2]


def able(**changes: Any) -> SimpleNamespace:
    """A worker that can verify trees, but for the changes to its model runner and head."""
    device, routed = changes.pop("device", "cpu"), changes.pop("routed", False)
    head = {"weight": torch.zeros(4, 4), "shard_indices": None} | changes.pop("head", {})
    runner = SimpleNamespace(
        **{
            "attn_backend": type("TritonAttnBackend", (), {})(),
            "sliding_window_size": None,
            "attention_chunk_size": None,
            "kv_index_translator": SimpleNamespace(reads_are_translated=False),
            "model": SimpleNamespace(lm_head=SimpleNamespace(**head)),
            "model_config": SimpleNamespace(hf_config=None),
            "token_to_kv_pool": SimpleNamespace(k_buffer=[torch.zeros(4, 2, 8)]),
        }
        | changes
    )
    return worker(
        model_runner=runner,
        target_worker=SimpleNamespace(model_runner=runner),
        server_args=SimpleNamespace(enable_return_routed_experts=routed),
        device=device,
    )


splitting = type("TritonAttnBackend", (), {"use_verify_splitkv": True})()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"attn_backend": type("FlashInferAttnBackend", (), {})()}, None),
        ({"attn_backend": type("FlashAttentionBackend", (), {})()}, "--attention-backend: FlashAttentionBackend"),
        ({"attn_backend": splitting}, "the attention backend verifies chains by a kernel of their own"),
        ({"device": "cuda"}, "this build of dflash-rs has no kernels for cuda"),
        ({"routed": True}, "--enable-return-routed-experts"),
        ({"token_to_kv_pool": SimpleNamespace(kv_buffer=[])}, "a path's K and V cannot be moved"),
        ({"token_to_kv_pool": SimpleNamespace(k_buffer=[torch.zeros(1, 2, 4, 8)])}, "a path's K and V cannot be moved"),
        ({"sliding_window_size": 128}, "the target attends within windows"),
        ({"attention_chunk_size": 8192}, "the target attends within windows"),
        ({"kv_index_translator": SimpleNamespace(reads_are_translated=True)}, "KV slots of this server"),
        ({"head": {"weight": torch.zeros(4, 4, dtype=torch.int8)}}, "the target's head is quantized"),
        ({"head": {"shard_indices": SimpleNamespace(num_added_elements=2)}}, "the target's vocabulary"),
    ],
)
def test_what_cannot_verify_trees_says_so(monkeypatch: pytest.MonkeyPatch, changes: dict, reason: str | None) -> None:
    import sglang.srt.runtime_context as context

    from dflash_rs import cuda

    monkeypatch.setattr(context, "get_parallel", lambda: SimpleNamespace(attn_dcp_size=1))
    monkeypatch.setattr(type(compat.installed()), "resolved", lambda self, args: args)
    monkeypatch.setattr(cuda, "available", lambda device: False)
    monkeypatch.setattr("sglang.srt.configs.hybrid_arch.mambaish_config", lambda config: None)
    found = compat.installed().no_trees(able(**changes))
    assert found == [] if reason is None else len(found) == 1 and found[0].startswith(reason)
    several = able(sliding_window_size=8)
    several._need_mamba_verify_commit = True
    assert len(compat.installed().no_trees(several)) == 2, "everything at once"


def test_paths_move_to_the_front_and_nothing_else_does() -> None:
    generator = torch.Generator().manual_seed(3)
    pool = SimpleNamespace(k_buffer=[], v_buffer=[])
    for _ in range(2):
        pool.k_buffer.append(torch.randn(60, 2, 8, generator=generator))
        pool.v_buffer.append(torch.randn(60, 2, 8, generator=generator))
    before = [cache.clone() for cache in (*pool.k_buffer, *pool.v_buffer)]
    slots = torch.randperm(60, generator=generator)[:20].view(2, 10)
    # Each entry reads what the next one is written to.
    path, accepted = torch.tensor([[0, 2, 3, 4, 9], [0, 5, 0, 0, 0]]), torch.tensor([4, 1], dtype=torch.int32)
    PathKv(pool, torch.zeros(2, 2, dtype=torch.int32))(path, accepted, slots, torch.tensor([0, 0]), torch.arange(2))
    for cache, old in zip((*pool.k_buffer, *pool.v_buffer), before):
        expected = old.clone()
        for row in range(2):
            for depth in range(int(accepted[row]) + 1):
                expected[slots[row, depth]] = old[slots[row, path[row, depth]]]
        assert torch.equal(cache, expected)


def test_a_limit_leaves_a_tree_where_it_allows_a_draft() -> None:
    widths = Widths([1, 8, 17], tree_depth=7)
    widths.planner = SimpleNamespace(choose=lambda *_: 17, observe=lambda *_: None)
    assert [widths.next(2, limits) for limits in (None, [7, 0], [0, 1], [0, 0])] == [17, 17, 17, 1]


def test_candidates_come_in_parts_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden = SimpleNamespace(weight=torch.randn(VOCAB, 8)), torch.randn(11, 8)
    whole = candidates(hidden, head, None, BEST)
    monkeypatch.setattr("dflash_rs.sglang.trees.ROWS", 4)
    assert all(torch.equal(a, b) for a, b in zip(whole, candidates(hidden, head, None, BEST)))


# --- beside plain SGLang ----------------------------------------------------------------------------------------------


def trees(drafts: int = 16, **more: Any) -> dict[str, str]:
    """Environment of a server that drafts trees."""
    return {"DFLASH_RS_CONFIG": json.dumps({"tree_nodes": drafts} | more)}


@pytest.fixture(scope="module")
def forest(logs) -> Iterator[Server]:
    """With overlap scheduling and pages of 16; trees, chains and plain steps in turn."""
    options = speculative(
        page_size=16,
        enable_deterministic_inference=True,
        enable_custom_logit_processor=True,
        grammar_backend="xgrammar",
    )
    with Server(logs / "forest.log", env=trees(adaptive="cycle", widths=[1, 8]), **options) as server:
        yield server


@pytest.fixture(scope="module")
def grove(logs) -> Iterator[Server]:
    """Without overlap scheduling, pages of one token and a pool that runs out; every step drafts a tree."""
    options = speculative(
        disable_overlap_schedule=True,
        enable_deterministic_inference=True,
        enable_metrics=True,
        grammar_backend="none",
        max_total_tokens=720,
        schedule_conservativeness=0.05,
        chunked_prefill_size=16,
    )
    with Server(logs / "grove.log", env=CHECKED | trees(12, adaptive=False), **options) as server:
        yield server


@pytest.mark.parametrize("name", matrix())
def test_the_tokens_are_those_of_plain_sglang(forest: Server, reference: dict, name: str) -> None:
    answers = forest.together(cases.bodies(matrix()[name]))
    assert tokens(answers) == tokens(reference[name])
    assert [a["meta_info"]["finish_reason"] for a in answers] == [
        a["meta_info"]["finish_reason"] for a in reference[name]
    ]


@pytest.mark.parametrize("name", custom())
def test_a_custom_processor_sees_the_path_to_its_node(forest: Server, reference: dict, name: str) -> None:
    assert tokens(forest.together(cases.bodies(**custom()[name]))) == tokens(reference[name])


@pytest.mark.parametrize("name", ["greedy", "all penalties", "seed, top_k and top_p", "regex"])
def test_log_probabilities_are_those_of_plain_sglang(forest: Server, reference: dict, name: str) -> None:
    answers = forest.together(cases.bodies(matrix()[name], return_logprob=True, top_logprobs_num=2))
    cases.scored_alike(answers, reference[name])


def test_requests_of_all_kinds_share_a_batch(forest: Server, reference: dict) -> None:
    names = [*cases.greedy(), *(n for n in cases.seeded() if "top_" in n), "regex", "regex, penalties"]
    bodies = [body for name in names for body in cases.bodies(matrix()[name])]
    expected = [answer for name in names for answer in tokens(reference[name])]
    assert tokens(forest.together(bodies)) == expected


def test_prefixes_sessions_and_limits(forest: Server, reference: dict) -> None:
    talk = cases.converse(forest)
    assert tokens([answer for answers in talk for answer in answers]) == tokens(reference["talk"])
    for most in (0, 1, 3):
        params = cases.greedy()["greedy"] | {"custom_params": {"dflash_rs": {"max_drafts": most}}}
        answers = forest.together(cases.bodies(params))
        assert tokens(answers) == tokens(reference["greedy"])
        histograms = [answer["meta_info"]["spec_correct_drafts_histogram"] for answer in answers]
        assert max(len(histogram) for histogram in histograms) == most + 1
    assert forest.flush_is_clean()


def test_requests_that_are_retracted_go_on_where_they_were(grove: Server, reference: dict) -> None:
    answers = grove.together(cases.crowd())
    assert tokens(answers) == tokens(reference["crowd"])
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0, "the pool was meant to run out"
    assert grove.flush_is_clean()


def test_aborts_in_a_full_pool_harm_nobody(grove: Server, reference: dict) -> None:
    bodies, expected = cases.crowd(), tokens(reference["crowd"])
    leaving = grove.stream("/generate", bodies[0] | {"rid": "leaving"})
    next(leaving)
    grove.post("/abort_request", {"rid": "leaving"})
    assert tokens(grove.together(bodies[1:6])) == expected[1:6]
    assert list(leaving)[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert grove.flush_is_clean()


def test_more_drafts_are_accepted_than_of_a_chain(grove: Server, logs) -> None:
    """The tree holds the chain's first drafts and others beside them."""
    params = {"temperature": 0.7, "max_new_tokens": 64, "ignore_eos": True}
    bodies = [
        {"text": prompt, "sampling_params": params | {"sampling_seed": 100 + n}}
        for n, prompt in enumerate(cases.prompts(12))
    ]
    options = speculative(enable_deterministic_inference=True, grammar_backend="none", disable_overlap_schedule=True)
    with Server(logs / "chain.log", env={"DFLASH_RS_CONFIG": '{"adaptive": false}'}, **options) as server:
        chains = server.together(bodies, at_once=4)
    nodes = grove.together(bodies, at_once=4)
    assert tokens(chains) == tokens(nodes)
    passes = [sum(answer["meta_info"]["spec_verify_ct"] for answer in answers) for answers in (chains, nodes)]
    assert passes[1] * 1.1 < passes[0], passes


@pytest.fixture(scope="module")
def ranks(logs) -> Iterator[Server]:
    """Two ranks with half of every layer and of the vocabulary each, and no seeds."""
    options = speculative(tp_size=2, grammar_backend="none")
    with Server(logs / "tree-ranks.log", env=TWO_CORES | trees(10, adaptive=False), **options) as server:
        yield server


@pytest.mark.long
def test_ranks_draft_the_same_trees(ranks: Server, reference: dict) -> None:
    for name in ("greedy", "all penalties"):
        answers = ranks.together(cases.bodies(matrix()[name]))
        assert tokens(answers) == tokens(reference[name])
        assert max(answer["meta_info"]["spec_accept_length"] for answer in answers) > 1.5


@pytest.mark.long
def test_unseeded_draws_follow_the_filtered_distribution(ranks: Server) -> None:
    follows_the_law(ranks)


def test_sglangs_triton_kernel_reads_the_mask_as_it_is_meant() -> None:
    """`tree_attention.py` says what is compared."""
    script = Path(__file__).with_name("tree_attention.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    largest = [float(line) for line in done.stdout.split()]
    assert len(largest) == 3 and max(largest[:2]) < 1e-5 < 1e-2 < largest[2], largest


def test_a_dflash_2_drafts_trees_along_its_lattice(reference: dict, logs, tmp_path) -> None:
    options = speculative(page_size=16, enable_deterministic_inference=True, grammar_backend="none")
    options["speculative_draft_model_path"] = str(second(tmp_path, 0.001))
    with Server(logs / "tree-second.log", env=trees(12, adaptive=False), **options) as server:
        for name in ("greedy", "all penalties", "seed, top_k"):
            answers = server.together(cases.bodies(matrix()[name]))
            assert tokens(answers) == tokens(reference[name])
            assert sum(answer["meta_info"]["spec_accept_length"] for answer in answers) > 6
        assert "each step verifies one of 13 tokens" in server.log.read_text(errors="replace")


def test_steps_of_a_dflash_2_vary_in_width_and_between_chains_and_trees(reference: dict, logs, tmp_path) -> None:
    options = speculative(
        page_size=16, enable_deterministic_inference=True, enable_metrics=True, grammar_backend="none"
    )
    options["speculative_draft_model_path"] = str(second(tmp_path, 0.001))
    env = trees(12, adaptive="cycle", widths=[1, 3, 8])
    with Server(logs / "widths-second.log", env=env, **options) as server:
        before = Counts(server).by("passes_total", "width")
        for name in ("greedy", "all penalties", "seed, top_k"):
            answers = server.together(cases.bodies(matrix()[name]))
            assert tokens(answers) == tokens(reference[name])
        gained = {width: count - before[width] for width, count in Counts(server).by("passes_total", "width").items()}
        assert set(gained) == {1, 3, 8, 13} and min(gained.values()) > 20, gained
        # Chains of every width and trees are worth something.
        accepted = sum(answer["meta_info"]["spec_accept_length"] for answer in answers)
        assert accepted > 1.3 * len(answers), accepted


def test_counters_tell_what_was_verified(grove: Server) -> None:
    before = Counts(grove)
    infos = [a["meta_info"] for a in grove.together(cases.bodies(cases.greedy()["greedy"]), at_once=1)]
    after = Counts(grove)
    gained = {
        name: after.of(name) - before.of(name)
        for name in ("drafts_total", "draft_tokens_total", "accepted_tokens_total")
    }
    passes = after.by("passes_total", "width")[13] - before.by("passes_total", "width")[13]
    assert passes == gained["drafts_total"] == sum(info["spec_verify_ct"] for info in infos)
    assert gained["draft_tokens_total"] == 12 * passes
    assert gained["accepted_tokens_total"] == sum(info["spec_num_correct_drafts"] for info in infos)
    assert after.of("width") == 13 and after.of("block_size") == 8
    assert len(after.by("accepted_tokens_per_pos_total", "position")) == 7
