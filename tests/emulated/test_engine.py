"""`LLM` on the emulated GPU: the bundled pair in bfloat16, text with and without drafts, graphs, every sampling option."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from no_values import Crossings
from second import second

from dflash_rs import LLM, DflashError, SamplingParams, StepCosts, _core
from dflash_rs.config import assets
from dflash_rs.engine.device import ahead
from dflash_rs.engine.device import step as device_step
from dflash_rs.engine.device.step import DeviceBackend
from dflash_rs.engine.host import HostBackend
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
    "min tokens": {"temperature": 0.7, "seed": 16, "min_tokens": 12, "stop_token_ids": list(range(0, 400, 2)), "presence_penalty": 0.2},
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
        added = None if residual is None else residual.float().contiguous()
        self.exact.product(
            (x.data_ptr(), x.stride(0), self.inputs),
            x.shape[0],
            (out.data_ptr(), self.outputs, self.outputs),
            None if added is None else (added.data_ptr(), added.stride(0), self.outputs),
            1,
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
        assert isinstance(made._loop.backend, DeviceBackend) and made._loop.backend.graphs is not None
        assert made._target.path == "fused"
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


@pytest.mark.parametrize("options", [{}, {"tree_nodes": 7}], ids=["chains", "trees"])
def test_a_drafter_of_a_part_of_the_vocabulary_proposes_that_part_alone(exact, tmp_path, monkeypatch, options):
    folder = shutil.copytree(assets() / "draft", tmp_path / "draft")
    part = [token for token in range(2, 4096) if token % 7]
    (folder / "draft_vocab.json").write_text(json.dumps(part))
    picked: list[torch.Tensor] = []
    with engine(model=assets() / "target", draft=folder, **options) as made:
        assert isinstance(made._loop.backend, DeviceBackend)
        runtime = made._draft.runtime

        def watch(original, *args):
            found = original(*args)
            picked.append(found[0] if isinstance(found, tuple) else found)
            return found

        for name in ("choose", "branch"):
            monkeypatch.setattr(runtime, name, functools.partial(watch, getattr(runtime, name)))
        plain = tokens(made.generate(PROMPTS, params("seeded"), draft=False))
        drafted = made.generate(PROMPTS, params("seeded"))
    assert tokens(drafted) == plain
    assert sum(sum(o.metrics["accept_histogram"][1:]) for o in drafted) > 0
    assert picked and all(torch.isin(found, torch.tensor(part)).all() for found in picked)


def test_min_tokens_are_written_before_a_token_that_stops(llm):
    most = 20
    for output in llm.generate(PROMPTS, params("min tokens", most)):
        early, last = output.token_ids[:12], output.token_ids[-1]
        assert len(early) == 12 and not any(token < 400 and token % 2 == 0 for token in early)
        assert output.finish_reason == ("stop" if last < 400 and last % 2 == 0 else "length")
    without = SamplingParams(**MATRIX["min tokens"] | {"min_tokens": 0, "max_tokens": most})
    assert min(len(output.token_ids) for output in llm.generate(PROMPTS, without)) < 12


@pytest.mark.parametrize("chunk", [3, 1024])
def test_a_prompt_is_no_output_for_penalties_however_it_is_cut(exact, chunk):
    heavy = SamplingParams(max_tokens=1, presence_penalty=2.0, frequency_penalty=2.0)
    prompts = ["a b a b a b a b a b a", "x = x = x = x = x = x"]
    with LLM(
        device="cpu", dtype="bfloat16", max_running=3, adaptive=False, max_context=256, max_batch_tokens=chunk
    ) as made:
        there = tokens(made.generate(prompts, heavy))
        plain = tokens(made.generate(prompts, SamplingParams(max_tokens=1)))
    assert there == plain, "nothing has been put out, so nothing is penalised"


def test_requests_that_ask_for_different_things_share_a_batch(llm):
    each = [params(name) for name in ("greedy", "filters", "penalties", "bias")]
    together = tokens(llm.generate(PROMPTS, each))
    alone = [tokens(llm.generate([prompt], [one], draft=False))[0] for prompt, one in zip(PROMPTS, each)]
    assert together == alone


def test_graphs_are_captured_once_and_replayed(llm, monkeypatch):
    graphs = llm._loop.backend.graphs
    for _ in range(2):  # the second time prompts come from the prefix cache
        expected = tokens(llm.generate(PROMPTS, params("greedy")))
    captured, replays = set(graphs._captured), 0
    run = graphs.run

    def counted(key, work):
        nonlocal replays
        replays += 1
        return run(key, work)

    monkeypatch.setattr(graphs, "run", counted)
    assert tokens(llm.generate(PROMPTS, params("greedy"))) == expected
    assert set(graphs._captured) == captured
    assert replays > 8
    assert llm.stats()["cuda_graphs"] == len(captured)


def test_the_host_waits_for_results_only_and_launches_the_next_step_before(llm, monkeypatch):
    asked = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    llm.generate(PROMPTS[:3], asked)  # graphs are captured
    backend, log, crossed = llm._loop.backend, [], []
    launch, wait = backend.launch, backend._wait

    def launched(step):
        log.append("launch")
        if step.plan.is_prefill.any():
            return launch(step)
        with Crossings() as seen:
            flight = launch(step)
        crossed.append(seen.log)
        return flight

    def waited(flight):
        log.append("wait")
        wait(flight)

    monkeypatch.setattr(backend, "launch", launched)
    monkeypatch.setattr(backend, "_wait", waited)
    assert tokens(llm.generate(PROMPTS[:3], asked))
    steps = log.count("wait")
    assert steps <= log.count("launch") <= steps + 1, "one wait a step; the last one launched may be called off"
    ahead = sum(now == then == "launch" for then, now in zip(log, log[1:]))
    assert ahead == 1 and log[-1] == "wait" and "launch wait launch wait" in " ".join(log), "always one step ahead"
    # After the first two launches every wait is followed by a launch: two steps are in flight whenever the host waits.
    depths, depth = [], 0
    for entry in log:
        depths += [depth] if entry == "wait" else []
        depth += 1 if entry == "launch" else -1
    assert depths.count(2) >= len(depths) - 2
    # Of a step one copy goes up and one comes down, and nothing else crosses.
    assert len(crossed) > 5 and all(each == ["copy_", "copy_"] for each in crossed), crossed


@pytest.mark.parametrize("name", ["greedy", "filters", "penalties"])
def test_text_is_the_same_without_overlap(llm, exact, name):
    expected = tokens(llm.generate(PROMPTS, params(name, 12)))
    with engine(overlap=False) as made:
        assert tokens(made.generate(PROMPTS, params(name, 12))) == expected
        assert made.stats()["steps_ahead"] == 0


def test_a_target_of_other_code_runs_without_a_graph(exact, monkeypatch):
    from dflash_rs.models.target.fused import FusedModel

    def linear(x, weight, bias=None):
        rows = x.reshape(-1, x.shape[-1]).float()
        out = torch.stack([torch.mv(weight.float(), row) for row in rows]) if len(rows) else rows @ weight.float().T
        out = out if bias is None else out + bias.float()
        return out.view(*x.shape[:-1], -1).to(x.dtype)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(FusedModel, "build", lambda made: (None, "turned off"))
    with engine() as made:
        assert made._target.path == "modules" and not made._loop.backend.target_in_graph
        plain = tokens(made.generate(PROMPTS[:2], params("filters", 8), draft=False))
        assert tokens(made.generate(PROMPTS[:2], params("filters", 8))) == plain
        assert {key[0] for key in made._loop.backend.graphs._captured} == {"catch up", "draft"}


@pytest.mark.parametrize(
    "options",
    [{"block_size": 3}, {"block_size": 3, "tree_nodes": 3}, {"draft": None}],
    ids=["chains", "trees", "plain"],
)
def test_graphs_captured_ahead_are_those_that_requests_meet(exact, options):
    small = {
        "device": "cpu",
        "dtype": "bfloat16",
        "max_running": 2,
        "adaptive": False,
        "max_context": 128,
        "model": "bundled",
    }
    with LLM(**small, **options) as made:
        expected = [tokens(made.generate(PROMPTS[:2], params(name, 8))) for name in ("greedy", "filters")]
        met = set(made._loop.backend.graphs._captured) - {("catch up",)}
        assert "captured_ahead" not in made.stats()
    most = 60
    with LLM(**small, **options, capture_ahead=most) as made:
        said, graphs = made.stats()["captured_ahead"], made._loop.backend.graphs
        there = set(graphs._captured)
        assert (
            said["graphs"] == made.stats()["cuda_graphs"] == len(there) <= most and said["seconds"] > 0 == said["bytes"]
        )
        assert there >= met, met - there
        assert [tokens(made.generate(PROMPTS[:2], params(name, 8))) for name in ("greedy", "filters")] == expected
        assert set(graphs._captured) - there == {("catch up",)}
    with LLM(**small, **options, capture_ahead=3) as made:
        assert made.stats()["captured_ahead"]["graphs"] == len(made._loop.backend.graphs) == 3


def test_graphs_and_what_they_allocate_are_bounded_under_random_shapes(exact, monkeypatch):
    from dflash_rs import cuda

    taken, room = [], cuda.attention_workspace

    def noted(*args):
        found = room(*args)
        taken.append(0 if found is None else found.out.nbytes + found.stats.nbytes)
        return found

    monkeypatch.setattr(cuda, "attention_workspace", noted)
    monkeypatch.setattr(cuda, "WORKSPACE_BYTES", 4 << 20)
    sizes = {"max_running": 256, "num_pages": 600, "max_context": 128, "block_size": 3}
    with LLM(device="cpu", dtype="bfloat16", adaptive=False, **sizes) as made:
        backend = made._loop.backend
        graphs, capture = backend.graphs, backend.graphs._capture
        graphs.most = 4
        # Shapes as they would be captured, run once.
        monkeypatch.setattr(graphs, "_capture", lambda work: (lambda: None, work()))
        generator, seen = np.random.default_rng(3), set()
        for turn in range(8):
            requests, keys = (int(2 ** generator.uniform(0, most)) if turn else 1 << most for most in (8, 15))
            shape = device_step._bucket(requests, 256), int(generator.integers(1, 4)), device_step._splits(keys)
            ahead.run(backend, ahead.Shape(*shape, False), 2)
            seen |= set(graphs._captured)
            assert len(graphs) <= 4
        assert len(seen) > 8 and max(taken) <= cuda.WORKSPACE_BYTES
        assert max(taken) > cuda.WORKSPACE_BYTES // 2, "256 requests at 32k take several launches"
        monkeypatch.setattr(graphs, "_capture", capture)
        graphs.forget()
        expected = tokens(made.generate(PROMPTS[:1], params("greedy", 4), draft=False))
        assert tokens(made.generate(PROMPTS[:1], params("greedy", 4))) == expected and 0 < len(graphs) <= 4


def test_without_graphs_the_text_is_the_same(llm, exact):
    expected = tokens(llm.generate(PROMPTS[:2], params("filters", 12)))
    with engine(cuda_graphs=False) as plain:
        assert plain._loop.backend.graphs is None
        assert tokens(plain.generate(PROMPTS[:2], params("filters", 12))) == expected


def test_small_chunks_prefix_hits_and_one_page_a_token(llm, exact):
    prompts = [PROMPTS[0] * 6 + "x", PROMPTS[0] * 6 + "y", PROMPTS[1]]
    expected = tokens(llm.generate(prompts, params("seeded", 10), draft=False))
    with engine(page_size=1, max_batch_tokens=24) as small:
        for _ in range(2):  # the second time from the prefix cache
            outputs = small.generate(prompts, params("seeded", 10))
            assert tokens(outputs) == expected
        assert outputs[0].metrics["cached_prompt_tokens"] > 0


def test_a_planner_with_costs_measured_on_the_device(exact, monkeypatch):
    monkeypatch.setattr(device_step, "_ROUNDS", 1)
    with LLM(device="cpu", dtype="bfloat16", max_running=2, max_context=128) as made:
        rows = [rows for rows, _ in made.costs.target]
        assert rows == sorted(set(rows)) and rows[0] == 1 and rows[-1] == 2 * made.block_size
        expected = tokens(made.generate(PROMPTS[:2], params("greedy", 8), draft=False))
        assert tokens(made.generate(PROMPTS[:2], params("greedy", 8))) == expected


def test_without_a_drafter(exact, llm):
    expected = tokens(llm.generate(PROMPTS[:2], params("bias", 10), draft=False))
    with LLM(None, None, device="cpu", dtype="bfloat16", max_running=2, max_context=128) as plain:
        assert isinstance(plain._loop.backend, DeviceBackend) and plain._loop.backend.draft is None
        assert tokens(plain.generate(PROMPTS[:2], params("bias", 10))) == expected


def test_contexts_of_several_splits_up_to_the_last_position(exact):
    prompt = list(range(100, 603))
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=64, ignore_eos=True)
    with LLM(device="cpu", dtype="bfloat16", max_running=1, adaptive=False, max_context=525) as made:
        drafted = tokens(made.generate([prompt], sampling))
        assert [(len(ids), reason) for ids, reason in drafted] == [
            (22, "length")
        ]  # ended by max_context, inside a block
        assert tokens(made.generate([prompt], sampling, draft=False)) == drafted


@pytest.mark.parametrize("top", [0, 3])
def test_log_probabilities_are_those_of_the_logits(llm, top):
    sampling = SamplingParams(temperature=0.7, seed=4, max_tokens=6, logprobs=top)
    (output,) = llm.generate([PROMPTS[0]], sampling)
    ids = llm.encode(PROMPTS[0])
    for place, entry in enumerate(output.logprobs):
        logits = llm.next_token_logits(ids + output.token_ids[:place]).astype(np.float64)
        scores = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert entry.token_id == output.token_ids[place]
        assert entry.logprob == pytest.approx(scores[entry.token_id], abs=1e-4)
        likeliest = np.argsort(-scores, kind="stable")[:top]
        assert [token for token, _ in entry.top] == likeliest.tolist()
        assert [score for _, score in entry.top] == pytest.approx(scores[likeliest].tolist(), abs=1e-4)


def test_a_row_that_cannot_be_drawn_fails_its_request_alone(llm, monkeypatch):
    expected = tokens(llm.generate([PROMPTS[0]], params("greedy", 8)))
    step = llm._loop.backend
    run, steps = step.target.run, 0

    def spoiled(*args):
        nonlocal steps
        steps += 1
        logits, features = run(*args)
        if steps == 4:
            logits[1] = torch.nan
        return logits, features

    monkeypatch.setattr(step.target, "run", spoiled)
    monkeypatch.setattr(step, "graphs", None)  # what is captured does not change any more
    good, bad = llm.generate([PROMPTS[0], PROMPTS[1]], params("greedy", 8), draft=False)
    assert bad.finish_reason == "error" and "NaN" in bad.error
    assert tokens([good]) == expected
    assert llm.stats()["running"] == 0


def test_many_edits_make_room_and_old_graphs_are_dropped(llm):
    prompts = PROMPTS[:2]
    bias = SamplingParams(temperature=0.0, max_tokens=6, logit_bias={i: -float(i % 7) for i in range(700)})
    few = tokens(llm.generate(prompts, params("bias", 6)))
    graphs = llm._loop.backend.graphs
    room = llm._loop.backend._edits.host["bias_tokens"].size
    expected = tokens(llm.generate(prompts, bias, draft=False))
    assert llm._loop.backend._edits.host["bias_tokens"].size > room
    assert tokens(llm.generate(prompts, bias)) == expected
    assert tokens(llm.generate(prompts, params("bias", 6))) == few
    assert len(graphs) > 0


def test_the_host_engine_says_the_same_up_to_rounding(llm, exact, monkeypatch):
    """The host's attention adds in another order: a text may part where two tokens are all but tied."""
    from dflash_rs import cuda

    there = llm.generate(PROMPTS, params("greedy", 16))
    monkeypatch.setattr(cuda, "available", lambda device="cuda": False)
    with engine() as host:
        assert isinstance(host._loop.backend, HostBackend)
        here = host.generate(PROMPTS, params("greedy", 16))
        agreed = 0
        for prompt, a, b in zip(PROMPTS, there, here):
            same = next(
                (i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y),
                min(len(a.token_ids), len(b.token_ids)),
            )
            agreed += same
            if same < len(a.token_ids):
                logits = host.next_token_logits(host.encode(prompt) + a.token_ids[:same])
                assert abs(logits[a.token_ids[same]] - logits[b.token_ids[same]]) < 0.15
    assert agreed >= 32


def test_a_walk_that_differs_from_the_cores_is_a_defect(llm, monkeypatch):
    wait = llm._loop.backend._wait

    def wrong(launched):
        wait(launched)
        launched.out["accepted"] += 1

    monkeypatch.setattr(llm._loop.backend, "_wait", wrong)
    with pytest.raises(DflashError, match="this is a defect"):
        llm.generate([PROMPTS[0]], params("greedy", 6))
    monkeypatch.undo()
    assert llm.generate([PROMPTS[0]], params("greedy", 6))[0].error is None


@pytest.fixture(scope="module")
def planted(exact):
    with engine(tree_nodes=11) as made:
        yield made


@pytest.mark.parametrize("name", MATRIX)
def test_text_is_the_same_with_trees(llm, planted, name):
    expected = tokens(llm.generate(PROMPTS, params(name), draft=False))
    before = planted.stats()
    outputs = planted.generate(PROMPTS, params(name))
    assert tokens(outputs) == expected
    after = planted.stats()
    gained = {key: after[key] - before[key] for key in ("verified", "drafted", "accepted")}
    assert gained["verified"] > gained["drafted"] > gained["accepted"] > 0


def test_trees_are_captured_and_the_accepted_path_is_moved(planted, monkeypatch):
    moved = []
    compact = device_step.cuda.compact_kv

    def counted(path, *rest):
        moved.append(path > torch.arange(path.shape[1]))
        compact(path, *rest)

    monkeypatch.setattr(device_step.cuda, "compact_kv", counted)
    graphs = planted._loop.backend.graphs
    graphs.forget()
    planted.generate(PROMPTS, params("seeded"))
    assert any(bool(each.any()) for each in moved), "every accepted path was a chain's"
    assert {key[3] for key in graphs._captured if key[0] == "draft"} >= {planted.block_size}


def test_a_tree_may_be_smaller_than_a_block(exact, llm):
    with engine(tree_nodes=3) as made:
        assert tokens(made.generate(PROMPTS, params("filters"))) == tokens(
            llm.generate(PROMPTS, params("filters"), draft=False)
        )
        stats = made.stats()
        assert stats["accepted"] > 0 and stats["verified"] <= 3 * stats["passes"]


def test_trees_with_prompts_plain_requests_and_ends_of_texts(llm, planted):
    each = [params(name, most) for name, most in zip(("greedy", "filters", "penalties", "seeded"), (3, 9, 14, 20))]
    expected = [tokens(llm.generate([prompt], [one], draft=False))[0] for prompt, one in zip(PROMPTS, each)]
    drafting = planted.stream(PROMPTS, each)
    plain = planted.stream(PROMPTS, each, draft=False)
    got: dict[str, dict[int, object]] = {"drafting": {}, "plain": {}}
    for name, events in [("drafting", drafting), ("plain", plain)] * 40:
        event = next(events, None)
        if event is not None and event.output is not None:
            got[name][event.index] = event.output
    for name, events in (("drafting", drafting), ("plain", plain)):
        got[name] |= {event.index: event.output for event in events if event.output is not None}
        assert tokens([got[name][i] for i in range(4)]) == expected


def test_trees_planned_by_cost_and_log_probabilities(exact, llm):
    costs = StepCosts.lines(1.0, 0.02, 0.1, 0.0)
    with LLM(
        device="cpu", dtype="bfloat16", max_running=3, max_context=256, tree_nodes=23, costs=costs, page_size=1
    ) as made:
        scored = SamplingParams(temperature=0.8, seed=3, max_tokens=14, logprobs=2)
        (output,) = made.generate([PROMPTS[2]], scored)
        (plain,) = llm.generate([PROMPTS[2]], scored, draft=False)
        assert output.token_ids == plain.token_ids
        for ours, theirs in zip(output.logprobs, plain.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        assert tokens(made.generate(PROMPTS, params("greedy"))) == tokens(
            llm.generate(PROMPTS, params("greedy"), draft=False)
        )
        assert {key[2] for key in made._loop.backend.graphs._captured if key[0] == "verify"} <= {
            1, *made._loop.backend.widths
        }  # fmt: skip


@pytest.mark.parametrize("nodes", [0, 9])
def test_a_dflash_2_stays_on_the_device(exact, llm, tmp_path, nodes):
    with LLM(
        assets() / "target", second(tmp_path, 0.03), device="cpu", dtype="bfloat16", max_running=3, adaptive=False, max_context=256,
        tree_nodes=nodes,
    ) as made:  # fmt: skip
        for name in ("greedy", "filters"):
            expected = tokens(llm.generate(PROMPTS, params(name), draft=False))
            assert tokens(made.generate(PROMPTS, params(name))) == expected
        assert made.stats()["accepted"] > 0
        assert {key[0] for key in made._loop.backend.graphs._captured} == {"catch up", "draft", "verify"}


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM, Gemma2Config, {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}


def granite_swa():
    from transformers import GraniteSWAConfig, GraniteSWAForCausalLM

    return GraniteSWAForCausalLM, GraniteSWAConfig, {}


@pytest.mark.parametrize("family", [gemma2, granite_swa], ids=lambda f: f.__name__)
def test_soft_caps_and_sinks_of_a_target_reach_the_kernel(gpu, family):
    from models_helpers import Pages, randomise

    from dflash_rs.models.target import TargetModel

    made, config, options = family()
    model = made(
        config(
            vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=64, max_position_embeddings=128, sliding_window=16, **options,
        )
    )  # fmt: skip
    target = TargetModel(randomise(model, 1, std=0.15).to(torch.bfloat16))
    kinds = {(kv.softcap, kv.sinks) for kv in target.kv_layers.values()}
    assert target.kernel and (kinds == {(2.0, False)} if family is gemma2 else any(sinks for _, sinks in kinds))
    pages, ids = Pages(2, 64, 4), np.random.default_rng(2).integers(0, 97, 60).tolist()
    results = []
    for kernel in (True, False):
        target.kernel = kernel
        target.alloc_kv(pages.num_slots)
        target.forward(pages.batch([(1, 0, ids[:40]), (0, 0, ids[:3])]))
        results.append(target.forward(pages.batch([(0, 3, [5]), (1, 40, ids[40:])]))[0].float())
    error = (results[0] - results[1]).norm() / results[1].norm()
    assert float(error) < 0.03
